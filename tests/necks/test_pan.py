import copy
import pickle
import shutil
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from common import close, maps_of, noise
from meta import constant_init

from backbones_nb.core.features import Backbone, check_contract, feature_row
from backbones_nb.analysis.costs import count_params, summary
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.analysis.parity import map_weights, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.detectors import faster_rcnn
from backbones_nb.necks.fpn import FPN
from backbones_nb.necks.build import attach_neck, create_neck
from backbones_nb.necks.neck import WithNeck
from backbones_nb.necks.pan import PAN


class Tiny(Backbone):
    "`halve` rounds odd sizes up, as ResNet does, or down, as VGG does."

    def __init__(self, strides=None, widths=(8, 12, 16, 24, 32), up=True):
        super().__init__()

        def stage(a, b):
            return ConvNormAct(a, b, stride=2) if up else nn.Sequential(ConvNormAct(a, b), nn.MaxPool2d(2))

        for i, (a, b) in enumerate(zip((3, *widths), widths)):
            setattr(self, f's{i}', stage(a, b))
        rows = [feature_row(c, 2 ** (i + 1), f's{i}') for i, c in enumerate(widths)]
        self.set_trunk({f's{i}': [f's{i}'] for i in range(len(widths))}, rows, strides)


renames = [(r'^inner_blocks', 'lateral'), (r'^layer_blocks', 'smooth')]

sizes = [(224,), (200,), (230, 310), (65, 97)]
fuses = ['sum', 'concat']

# --- top-down against torchvision's, the whole against loops


@pytest.fixture(scope='module')
def resnet():
    with constant_init():
        body = create_backbone('resnet18')
    return randomize_(body, x=noise(64))


@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('norm', [None, 'bn'])
def test_top_down_equals_torchvision(resnet, size, norm):
    body = resnet
    maps = maps_of(body, *size)
    ref = randomize_(
        FeaturePyramidNetwork(list(body.channels), 16, norm_layer=norm and nn.BatchNorm2d),
        x=OrderedDict((str(i), m.clone()) for i, m in enumerate(maps)),
    ).eval()
    ours = randomize_(PAN(body.channels, body.strides, 16, norm=norm), 1, maps).eval()
    rest = {k: v for k, v in ours.state_dict().items() if k.startswith(('down', 'merge'))}
    map_weights(ref.state_dict() | rest, ours, renames)
    want = list(ref(OrderedDict((str(i), m) for i, m in enumerate(maps))).values())
    close(ours.top_down(maps), want)
    close(ours(maps)[:1], want[:1])  # the finest level is handed on as it is


def conv(sd, k, x, stride=1, ks=3):
    "One convolution by its definition on a padded map: a sum over the kernel's cells."
    w, b = sd[k + '.weight'], sd.get(k + '.bias')
    x = F.pad(x, (ks // 2,) * 4)
    h, v = (x.shape[-2] - ks) // stride + 1, (x.shape[-1] - ks) // stride + 1
    out = sum(
        torch.einsum(
            'oi,bihw->bohw',
            w[:, :, i, j],
            x[:, :, i : i + (h - 1) * stride + 1 : stride, j : j + (v - 1) * stride + 1 : stride],
        )
        for i in range(ks)
        for j in range(ks)
    )
    return out if b is None else out + b[:, None, None]


def loop(sd, maps, fuse, act, tool=F.conv2d):
    "The formulas, level by level from a state dict; `tool` None takes `conv` instead of PyTorch's convolution."

    def c(k, x, stride=1, ks=3):
        return tool(x, sd[k + '.weight'], sd[k + '.bias'], stride, ks // 2) if tool else conv(sd, k, x, stride, ks)

    n, m = len(maps), {}
    for i in reversed(range(n)):
        m[i] = c(f'lateral.{i}.0', maps[i], ks=1)
        if i < n - 1:
            (h, w), (a, b) = m[i].shape[-2:], m[i + 1].shape[-2:]
            m[i] = m[i] + m[i + 1][:, :, [y * a // h for y in range(h)]][:, :, :, [x * b // w for x in range(w)]]
    p = [c(f'smooth.{i}.0', m[i]) for i in range(n)]
    out = [p[0]]
    for i in range(1, n):
        d = act(c(f'down.{i - 1}.0.conv', out[-1], 2))[:, :, : p[i].shape[2], : p[i].shape[3]]
        out.append(act(c(f'merge.{i - 1}.conv', d + p[i] if fuse == 'sum' else torch.cat([d, p[i]], 1))))
    return out


acts = dict(relu=F.relu, leaky_relu=lambda x: F.leaky_relu(x, 0.1)) | {None: lambda x: x}


@pytest.mark.parametrize('fuse', fuses)
@pytest.mark.parametrize('act', acts)
@pytest.mark.parametrize('up', [True, False])
def test_equals_a_loop(fuse, act, up):
    body = randomize_(Tiny(up=up))
    ours = randomize_(PAN(body.channels, body.strides, 8, fuse, act=act)).eval()
    for size in sizes:
        maps = maps_of(body, *size)
        close(ours(maps), loop(ours.state_dict(), maps, fuse, acts[act]), 1e-6)
    close(ours(maps), loop(ours.state_dict(), maps, fuse, acts[act], None), 1e-5)  # no convolution of PyTorch at all


@pytest.mark.parametrize('fuse', fuses)
def test_gradients_equal_the_loops(fuse):
    body = randomize_(Tiny())
    ours, maps = randomize_(PAN(body.channels, body.strides, 8, fuse)), maps_of(body, 100, 70)
    sum(o.square().mean() for o in ours(maps)).backward()
    sd = {k: v.detach().clone().requires_grad_() for k, v in ours.named_parameters()}
    sum(o.square().mean() for o in loop(sd, maps, fuse, F.relu)).backward()
    close([p.grad for p in ours.parameters()], [p.grad for p in sd.values()], 1e-4)


def wired_by_effdet(ours, channels, sizes):
    "effdet's layout 'pan_sum' with our layers in the places of its own: its graph, its sums, its upsampling."
    efficientdet = pytest.importorskip('effdet.efficientdet')
    from effdet.config import get_fpn_config

    info = [dict(num_chs=c, size=s) for c, s in zip(channels, sizes)]
    c, n = ours.channels[0], len(channels)
    net = efficientdet.BiFpnLayer(info, dict(enumerate(sizes)), get_fpn_config('pan_sum', 0, n - 1), c, n)
    for k, node in enumerate(net.fnode):  # n nodes on top-down, n on bottom-up
        i, node.after_combine = (
            (n - 1 - k, nn.Identity()) if k < n else (k - n, ours.merge[k - n - 1] if k > n else nn.Identity())
        )
        side, *way = node.combine.resample.values()
        side.add_module('conv', ours.lateral[i] if k < n else ours.smooth[i])
        if k > n:
            way[0].downsample = ours.down[i - 1]
    return net.eval()


@pytest.mark.parametrize('size', sizes)
def test_wired_as_effdets_pan(size):
    body = randomize_(Tiny())
    ours, maps = randomize_(PAN(body.channels, body.strides, 8)).eval(), maps_of(body, *size)
    ref = wired_by_effdet(ours, body.channels, [tuple(o.shape[-2:]) for o in maps])
    with torch.no_grad():
        close(ours(maps), ref(list(maps)), 1e-6)


def test_the_way_up_carries_the_finest_map_to_the_coarsest():
    "In an FPN the coarsest level does not depend on finer maps, in a PAN on all of them; the other way in both."
    for neck, seen in ((FPN, [False, False, True]), (PAN, [True] * 3), (partial(PAN, fuse='concat'), [True] * 3)):
        maps = [torch.randn(1, c, 16 >> i, 16 >> i, requires_grad=True) for i, c in enumerate((4, 6, 8))]
        m = randomize_(neck((4, 6, 8), (4, 8, 16), 8), x=maps)
        for out, want in ((-1, seen), (0, [True] * 3)):
            grads = torch.autograd.grad(m(maps)[out].square().sum(), maps, allow_unused=True)
            assert [g is not None and bool(g.any()) for g in grads] == want


# --- sizes and levels


@pytest.mark.parametrize('fuse', fuses)
@pytest.mark.parametrize('extra,strides', [(None, (4, 8, 16)), ('pool', (4, 8, 16, 32)), ('p6p7', (4, 8, 16, 32, 64))])
def test_strides_and_channels(fuse, extra, strides):
    m = PAN((4, 6, 8), (4, 8, 16), 10, fuse, extra)
    assert m.strides == strides and m.channels == (10,) * len(strides) and m.in_strides == (4, 8, 16)
    got = m([torch.zeros(1, c, 40 // 2**i, 28 // 2**i) for i, c in enumerate((4, 6, 8))])
    assert [tuple(o.shape[1:]) for o in got] == [(10, -(-40 // 2**i), -(-28 // 2**i)) for i in range(len(strides))]


@pytest.mark.parametrize('strides', [(32,), (4, 8), (8, 32), (4, 32), (2, 4, 8, 16, 32), (4, 16, 32)])
@pytest.mark.parametrize('fuse', fuses)
@pytest.mark.parametrize('up', [True, False])
def test_any_levels_at_any_size(strides, fuse, up):
    "Gaps between strides take several steps; backbones that round down give smaller maps than a convolution would."
    body = Tiny(strides, up=up)
    m = attach_neck(body, 'pan', channels=4, fuse=fuse).eval()
    assert [len(o) for o in m.neck.down] == [(b // a).bit_length() - 1 for a, b in zip(strides, strides[1:])]
    for size in sizes:
        assert [o.shape[-2:] for o in m(noise(*size))] == [o.shape[-2:] for o in body(noise(*size))]


def test_one_map_is_an_fpn():
    m = PAN((8,), (32,), 4, extra='pool')
    assert not len(m.down) and [o.shape for o in m([torch.ones(1, 8, 3, 3)])] == [(1, 4, 3, 3), (1, 4, 2, 2)]


@pytest.mark.parametrize('extra,from_c5', [('pool', False), ('p6p7', False), ('p6p7', True)])
def test_extra_levels_start_where_they_say(extra, from_c5):
    m, maps = (
        randomize_(PAN((4, 6), (4, 8), 8, extra=extra, from_c5=from_c5)).eval(),
        [torch.randn(1, 4, 9, 9), torch.randn(1, 6, 5, 5)],
    )
    _, n5, *more = m(maps)
    if extra == 'pool':
        return close(more, [n5[:, :, ::2, ::2]])
    p6 = m.p6(maps[-1] if from_c5 else n5)
    close(more, [p6, m.p7(F.relu(p6))])


@pytest.mark.parametrize('norm,biases,norms', [(None, 8, 0), ('bn', 0, 8), (partial(nn.GroupNorm, 2), 0, 8)])
def test_norm_and_act(norm, biases, norms):
    m = PAN((4, 8, 8), (4, 8, 16), 8, norm=norm, act='silu')
    assert sum(o.bias is not None for o in m.modules() if isinstance(o, nn.Conv2d)) == biases + 2 * (norm is None)
    assert sum(isinstance(o, (nn.BatchNorm2d, nn.GroupNorm)) for o in m.modules()) == norms + 2 * (norm is not None)
    assert sum(isinstance(o, nn.SiLU) for o in m.modules()) == 4  # on bottom-up alone


def test_init():
    "He-uniform with a=1 everywhere, zero biases."
    for o in PAN((64, 128), (4, 8), 64, 'concat', 'p6p7').modules():
        if isinstance(o, nn.Conv2d):
            bound = (3 / o.weight[0].numel()) ** 0.5
            assert 0.95 * bound < o.weight.abs().max() <= bound and not o.bias.any()


@pytest.mark.parametrize('fuse,convs', [('sum', 6), ('concat', 9)])
def test_parameters_over_an_fpn(fuse, convs):
    a, b = FPN((8,) * 4, (4, 8, 16, 32), 16), PAN((8,) * 4, (4, 8, 16, 32), 16, fuse)
    assert count_params(b) - count_params(a) == convs * 9 * 16**2 + 6 * 16


# --- on a backbone, by name

every = dict(
    sum={},
    concat=dict(fuse='concat'),
    pool=dict(extra='pool'),
    p6p7=dict(extra='p6p7', fuse='concat'),
    c5=dict(extra='p6p7', from_c5=True),
    bn=dict(norm='bn', act='silu'),
    linear=dict(act=None),
)


def made(kw, strides=None):
    return attach_neck(Tiny(strides), 'pan', channels=8, **kw)


each = pytest.mark.parametrize('kw', every.values(), ids=every)


def test_by_name():
    body = Tiny()
    m = attach_neck(body, 'pan', channels=8, fuse='concat')
    assert type(m.neck) is PAN and isinstance(m, WithNeck) and m.neck.fuse == 'concat' and m.out_channels == 8
    assert type(create_neck('auto', body)) is FPN
    with pytest.raises(ValueError, match="there is no neck 'pam'. Did you mean 'pan'"):
        create_neck('pam', body)


@each
@pytest.mark.parametrize('size', [(64,), (97,), (70, 115)])
def test_contract(kw, size):
    m = made(kw)
    check_contract(m)
    h, w = (size * 2)[:2]
    assert [tuple(o.shape) for o in m(noise(*size, n=2))] == [
        (2, c, -(-h // s), -(-w // s)) for c, s in zip(m.channels, m.strides)
    ]


@each
def test_gradients_reach_every_parameter(kw):
    m = randomize_(made(kw))
    sum(o.square().mean() for o in m(noise(128, n=2))).backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]


@each
def test_groups_and_freezing(kw):
    m = made(kw)
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(groups) == 6 and len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    assert {id(p) for p in groups[-1]} == {id(p) for p in m.neck.parameters()}
    m.freeze_to(6)
    norms = {id(p) for o in m.modules() if isinstance(o, nn.BatchNorm2d) for p in o.parameters()}
    assert all(p.requires_grad == (id(p) in norms) for p in m.neck.parameters())


@each
@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies(kw, how):
    m = randomize_(made(kw)).eval()
    n = how(m)
    close(n(noise(70)), m(noise(70)))
    assert {id(p) for p in m.parameters()}.isdisjoint(map(id, n.parameters()))


def test_state_dict_round_trip():
    m, n = randomize_(made(every['p6p7'])).eval(), made(every['p6p7']).eval()
    n.load_state_dict(m.state_dict(), strict=True)
    close(n(noise(64)), m(noise(64)))
    assert {
        'neck.lateral.0.0.weight',
        'neck.smooth.3.0.bias',
        'neck.down.2.0.conv.weight',
        'neck.merge.2.conv.bias',
        'neck.p7.weight',
    } <= set(m.state_dict())


@each
def test_export(kw):
    m = randomize_(made(kw)).eval()
    close(torch.export.export(m, (noise(70, 90),)).module()(noise(70, 90)), m(noise(70, 90)), 1e-6)


@pytest.mark.parametrize('fuse', fuses)
def test_export_with_a_free_batch_and_size(fuse):
    m, dim = randomize_(made(dict(fuse=fuse, extra='pool'))).eval(), torch.export.Dim
    free = {0: dim('b', min=1, max=8), 2: 32 * dim('h', min=3, max=16), 3: 32 * dim('w', min=3, max=16)}
    prog = torch.export.export(m, (noise(128, 96, n=2),), dynamic_shapes=(free,)).module()
    for size in ((96, 160, 1), (256, 128, 3)):
        close(prog(noise(*size)), m(noise(*size)), 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize(
    'backend', ['eager', *(pytest.param(o, marks=pytest.mark.slow) for o in ('aot_eager', 'inductor'))]
)
@pytest.mark.parametrize(
    'kw', [pytest.param(every['pool'], marks=pytest.mark.slow), every['p6p7']], ids=['sum', 'concat']
)
def test_compile(backend, kw):
    m = randomize_(made(kw)).eval()
    f = torch.compile(m, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(f(noise(70)), m(noise(70)), 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('fuse', fuses)
def test_cuda(fuse):
    m = randomize_(made(dict(fuse=fuse, extra='pool'))).eval()
    with torch.no_grad():
        want = m(noise(96))
        close([o.cpu() for o in m.cuda()(noise(96).cuda())], want, 1e-3)


def test_channels_last_and_bfloat16():
    m, x = randomize_(made(every['p6p7'])).eval(), noise(96)
    with torch.no_grad():
        want = m(x)
        close(
            copy.deepcopy(m).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), want, 1e-5
        )
        with torch.autocast('cpu', torch.bfloat16):
            close([o.float() for o in m(x)], want, 0.1)


def test_inputs_stay_as_they_are():
    m, maps = PAN((4, 8), (4, 8), 8), [torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]
    before = [o.clone() for o in maps]
    m(maps)
    assert all(map(torch.equal, maps, before)) and len(maps) == 2


def test_summary():
    m = made(every['pool'])
    s = summary(m, 64)
    assert s.total['params'] == count_params(m) and [r['stride'] for r in s.rows if r['map']] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    'kw,text',
    [
        (dict(fuse='mul'), "got fuse='mul', expected one of 'sum', 'concat'"),
        (dict(extra='pol'), "got extra='pol', expected"),
        (dict(norm='bm'), "got norm='bm', expected one of"),
        (dict(act='rely'), "got act='rely', expected one of"),
    ],
)
def test_errors(kw, text):
    with pytest.raises(ValueError, match=text):
        made(kw)


def test_wrong_maps_are_named():
    with pytest.raises(ValueError, match=r'got maps with channels \(8, 4\), expected \(4, 8\)'):
        PAN((4, 8), (4, 8), 8)([torch.zeros(1, 8, 8, 8), torch.zeros(1, 4, 4, 4)])


# --- in a detector


@pytest.mark.parametrize('neck', ['pan', partial(PAN, channels=8, fuse='concat', extra='pool', norm='bn')], ids=fuses)
def test_faster_rcnn_trains_a_step(neck):
    torch.manual_seed(0)
    m = faster_rcnn.model(
        3,
        Tiny(),
        neck,
        neck_channels=8,
        neck_norm='bn',
        head_channels=16,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_train=50,
        box_batch_size_per_image=16,
        box_detections_per_img=5,
    )
    images = [torch.rand(3, 90, 70), torch.rand(3, 64, 96)]
    targets = [
        dict(boxes=torch.tensor([[10.0, 10.0, 50.0, 60.0]]), labels=torch.tensor([1])),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]
    assert isinstance(m.backbone.neck, PAN) and m.backbone.strides == (4, 8, 16, 32, 64)
    opt = torch.optim.SGD(m.parameters(), 0.01)
    weights = [p for p in m.backbone.neck.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in weights]
    losses = m(images, targets)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.backbone.neck.parameters())
    opt.step()
    assert all((p != q).any() for p, q in zip(weights, before))
    out = m.eval()(images)
    assert len(out) == 2 and all(o['boxes'].isfinite().all() for o in out)
