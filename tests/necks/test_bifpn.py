import ast
import copy
import inspect
import pickle
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from effdet.config import get_efficientdet_config
from effdet.config.fpn_config import bifpn_config
from effdet.efficientdet import BiFpn
from torch import nn

from common import close, noise

from backbones_nb.core.features import Backbone, check_contract, feature_row
from backbones_nb.analysis.costs import count_macs, count_params
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.analysis.parity import map_weights, match_keys, randomize_, rel_error
from backbones_nb.detectors import faster_rcnn
from backbones_nb.necks import bifpn
from backbones_nb.necks.bifpn import BiFPN, BiFPNLayer, BiFPNNode, Fusion, Resample, project
from backbones_nb.necks.build import attach_neck, create_neck


class Tiny(Backbone):
    def __init__(self, strides=(8, 16, 32), widths=(8, 12, 16, 24, 32)):
        super().__init__()
        for i, (a, b) in enumerate(zip((3, *widths), widths)):
            setattr(self, f's{i}', ConvNormAct(a, b, stride=2))
        rows = [feature_row(c, 2 ** (i + 1), f's{i}') for i, c in enumerate(widths)]
        self.set_trunk({f's{i}': [f's{i}'] for i in range(len(widths))}, rows, strides)


ins, strides = (40, 112, 320), (8, 16, 32)  # EfficientNet-B0's and B1's maps


def seeded(i=0):
    return torch.Generator().manual_seed(i)


def maps_for(size, channels=ins, n=1, at=strides):
    h, w = (size, size) if isinstance(size, int) else size
    return [torch.randn(n, c, -(-h // s), -(-w // s), generator=seeded(s)) for c, s in zip(channels, at)]


# --- parity with effdet's


def renames(n):  # of a net with n levels: effdet numbers the nodes, ours are named by their way and level
    nodes = [(n - 2 - k, 'top_down') for k in range(n - 1)] + [(k, 'bottom_up') for k in range(n - 1)]
    return [
        (r'^resample\.\d+\.conv\.conv', 'extra.0'),
        (r'^resample\.\d+\.conv\.bn', 'extra.1'),
        (r'^cell', 'layers'),
        *((rf'fnode\.{k}\.', f'{way}.{i}.') for k, (i, way) in enumerate(nodes)),
        (r'combine\.edge_weights', 'fuse.weight'),
        *(
            (rf'(top_down\.{n - 2}\.)combine\.resample\.{n - 1}\.conv\.{a}', rf'\1project.1.{b}')
            for a, b in (('conv', 0), ('bn', 1))
        ),  # where C5 is the last level
        (r'combine\.resample\.\d+\.conv\.conv', 'project.0.0'),
        (r'combine\.resample\.\d+\.conv\.bn', 'project.0.1'),
        (r'after_combine\.conv\.conv_', 'conv.'),
        (r'after_combine\.conv\.bn', 'conv.norm'),
        (r'after_combine\.conv\.conv', 'conv.conv'),
    ]


kinds = dict(bifpn_sum='sum', bifpn_attn='softmax', bifpn_fa='fast')
acts = dict(swish='silu', relu6=nn.ReLU6)


def pair(name, size, channels=ins, seed=0, **change):
    "effdet's neck with random weights and ours with the same."
    c = get_efficientdet_config(name)
    c.image_size = (size, size) if isinstance(size, int) else size
    for k, v in change.items():
        c[k] = v
    ref = BiFpn(c, [dict(num_chs=n, reduction=s) for n, s in zip(channels, strides)])
    randomize_(
        ref, seed, x=maps_for(size, channels, 4)
    )  # enough cells at P7 for statistics that do not blow rounding up
    ours = BiFPN(
        channels,
        strides,
        c.fpn_channels,
        c.fpn_cell_repeats,
        c.num_levels,
        fusion=kinds[c.fpn_name or 'bifpn_fa'],
        act=acts[c.act_type],
        norm='bn' if c.apply_resample_bn else None,
        bias=c.redundant_bias,
        same=c.pad_type == 'same',
        separable=c.separable_conv,
        act_first=not c.conv_bn_relu_pattern,
    )
    return map_weights(ref, ours, renames(c.num_levels)), ref


@torch.no_grad()
def run(m, maps):
    return m([o.clone() for o in maps])  # effdet's lengthens the list


names = (
    'efficientdet_d0',
    'efficientdet_d1',
    'tf_efficientdet_d0',
    'tf_efficientdet_d1',
    'efficientdet_lite0',
    'tf_efficientdet_lite0',
)


every_size = 256, 384, (256, 384), (200, 264)


def turns():
    "The sizes take turns over the configurations in every run; the other pairs are slow."
    for i, name in enumerate(names):
        for k, size in enumerate(every_size):
            marks = [] if k == i % len(every_size) or (name, k) == (names[0], 3) else [pytest.mark.slow]
            yield pytest.param(name, size, marks=marks)


@pytest.mark.parametrize('name,size', list(turns()))
def test_equals_effdet(name, size):
    ours, ref = pair(name, size)
    close(run(ours.eval(), maps_for(size)), run(ref.eval(), maps_for(size)), 1e-5)


@pytest.mark.parametrize(
    'change',
    [
        dict(fpn_name='bifpn_attn'),
        dict(fpn_name='bifpn_sum'),
        dict(separable_conv=False),
        dict(redundant_bias=True),
        dict(conv_bn_relu_pattern=True),
        dict(pad_type='same'),
        dict(fpn_cell_repeats=1),
        dict(max_level=5, num_levels=3),
        dict(max_level=6, num_levels=4),
    ],
    ids=str,
)
def test_equals_effdet_elsewhere(change):
    ours, ref = pair('efficientdet_d0', 256, **change)
    close(run(ours.eval(), maps_for(256)), run(ref.eval(), maps_for(256)), 1e-5)


def test_no_projection_where_channels_agree():
    ours, ref = pair('efficientdet_d0', 256, (64, 112, 64))
    maps = maps_for(256, (64, 112, 64))
    close(run(ours.eval(), maps), run(ref.eval(), maps), 1e-5)
    assert isinstance(ours.extra, nn.Identity) and isinstance(ours.layers[0].top_down[0].project[0], nn.Identity)


def test_trains_as_effdet():
    "Outputs in training mode, running statistics and gradients: eps, momentum and the place of the norms."
    ours, ref = pair('efficientdet_d0', 128)
    a, b = ours.train()(maps_for(128, n=2)), ref.train()(maps_for(128, n=2))
    close(a, b, 1e-5)
    sum(o.square().mean() for o in a).backward()
    sum(o.square().mean() for o in b).backward()
    q, p = ref.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    where = match_keys(ref, ours, renames(5))
    close([p[k] for k in where if 'running' in k], [q[v] for k, v in where.items() if 'running' in k], 1e-5)
    grads = [(p[k].grad, q[v].grad) for k, v in where.items() if p[k].requires_grad]
    top = max(b.abs().max() for _, b in grads).item()
    assert len(grads) == len(list(ours.parameters())) and all((a - b).abs().max() <= 1e-4 * top for a, b in grads)
    assert all((m.eps, m.momentum) == (1e-3, 0.01) for m in ours.modules() if isinstance(m, nn.BatchNorm2d))


def test_parity_sees_a_shuffled_weight():
    ours, ref = pair('efficientdet_d0', 128)
    with torch.no_grad():
        ours.layers[2].bottom_up[1].fuse.weight[:] = ours.layers[2].bottom_up[1].fuse.weight.flip(0)
    assert max(map(rel_error, run(ours.eval(), maps_for(128)), run(ref.eval(), maps_for(128)))) > 1e-3


@pytest.mark.parametrize('n', [2, 3, 5])
def test_nodes_are_effdets(n):
    "As many inputs, at the same levels, in the same order."
    layer, conf = BiFPNLayer((4,) * n, [8 * 2**i for i in range(n)], 4), bifpn_config(3, n + 2)
    got = [len(o.project) for o in reversed(layer.top_down)] + [len(o.project) for o in layer.bottom_up]
    assert got == [len(o.inputs_offsets) for o in conf.nodes]


def test_init_is_effdets():
    "Glorot-uniform bounds: sqrt(6/(fan in + fan out)), depth-wise by the fans of one channel; unit norms and weights."
    f = BiFPN(ins, strides, 64, 1)
    for m in f.modules():
        if isinstance(m, nn.Conv2d):
            fans = 18 if m.groups > 1 else m.in_channels + m.out_channels
            assert 0.95 * (6 / fans) ** 0.5 < m.weight.abs().max() <= (6 / fans) ** 0.5
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()
        if isinstance(m, Fusion):
            assert (m.weight == 1).all()


def test_module_needs_no_effdet():
    tree = ast.parse(inspect.getsource(bifpn))
    found = {
        n
        for o in ast.walk(tree)
        if isinstance(o, (ast.Import, ast.ImportFrom))
        for n in [getattr(o, 'module', None), *(a.name for a in o.names)]
    }
    assert not any(n and re.match('effdet|timm', n) for n in found)


# --- fusion


def by_hand(kind, weight, maps):
    "One number at a time."
    out, n = torch.zeros_like(maps[0]), len(maps)
    for at in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        at = tuple(at)
        if kind == 'sum':
            w = [1.0] * n
        elif kind == 'softmax':
            w = [torch.exp(v).item() for v in weight]
        else:
            w = [max(v.item(), 0.0) for v in weight]
        total = 1.0 if kind == 'sum' else sum(w) + (1e-4 if kind == 'fast' else 0)
        out[at] = sum(w[i] / total * maps[i][at].item() for i in range(n))
    return out


@pytest.mark.parametrize('kind', ['fast', 'softmax', 'sum'])
@pytest.mark.parametrize('v', [(1.0, 1.0), (0.3, 2.0), (-1.0, 0.5, 3.0), (0.0, 0.0, 1e-3), (-1.0, -2.0)])
def test_fusion_by_hand(kind, v):
    f = Fusion(len(v), kind)
    if kind != 'sum':
        f.weight.data[:] = torch.tensor(v)
    maps = [torch.randn(1, 2, 3, 2, generator=seeded(i)) for i in range(len(v))]
    torch.testing.assert_close(f(maps), by_hand(kind, torch.tensor(v), maps), rtol=1e-5, atol=1e-6)


def test_fusion_of_nothing_is_zero_not_nan():
    f = Fusion(2)
    f.weight.data[:] = -1
    out = f([torch.ones(1, 1, 2, 2)] * 2)
    assert not out.any() and f.shares().sum() == 0


def test_shares():
    f, s = Fusion(3), Fusion(3, 'softmax')
    torch.testing.assert_close(f.shares(), torch.full((3,), 1 / 3.0001))
    torch.testing.assert_close(s.shares().sum(), torch.tensor(1.0))
    f.weight.data[:] = s.weight.data[:] = torch.tensor([-1.0, 1.0, 3.0])
    torch.testing.assert_close(f.shares(), torch.tensor([0.0, 1.0, 3.0]) / 4.0001)
    assert (s.shares() > 0).all()
    with pytest.raises(ValueError, match="kind 'sum', which has no weights"):
        Fusion(3, 'sum').shares()


def test_a_negative_weight_gets_no_gradient():
    for kind, dead in (('fast', True), ('softmax', False)):
        f = Fusion(2, kind)
        f.weight.data[:] = torch.tensor([-0.1, 1.0])
        f([torch.randn(1, 1, 4, 4, generator=seeded(i)) for i in range(2)]).square().sum().backward()
        assert (f.weight.grad[0] == 0) == dead


def test_fusion_leaves_its_maps_alone():
    maps = [torch.randn(1, 2, 3, 3) for _ in range(3)]
    was = [o.clone() for o in maps]
    for kind in ('fast', 'softmax', 'sum'):
        BiFPNNode((2, 2, 2), 2, Resample(), kind).eval()(maps)
        Fusion(3, kind)(maps)
    assert all(map(torch.equal, maps, was))


# --- resampling


@pytest.mark.parametrize('same', [False, True])
@pytest.mark.parametrize('ratio', [2, 4])
@pytest.mark.parametrize('h,w', [(1, 1), (1, 2), (2, 5), (8, 9), (13, 4)])
def test_pool_by_hand(same, ratio, h, w):
    x = torch.randn(1, 1, h, w, generator=seeded())
    H, W = -(-h // ratio), -(-w // ratio)
    want = torch.empty(1, 1, H, W)

    def window(i, n):  # first cell: TensorFlow puts the odd one of its padding at the end
        first = i * ratio - (((-n) % ratio + 1) // 2 if same else ratio // 2)
        return range(max(first, 0), min(first + ratio + 1, n))

    for i in range(H):
        for j in range(W):
            want[0, 0, i, j] = max(x[0, 0, a, b] for a in window(i, h) for b in window(j, w))
    torch.testing.assert_close(Resample(ratio, False, same)(x, (H, W)), want, rtol=0, atol=0)


def test_pool_meets_a_map_that_was_rounded_down():
    assert Resample(2, False)(torch.zeros(1, 1, 25, 25), (12, 12)).shape[-2:] == (12, 12)


# --- a layer against one written out


def test_layer_written_out():
    torch.manual_seed(0)
    maps = maps_for((72, 104), (6,) * 4, 2, (8, 16, 32, 64))
    m = randomize_(BiFPNLayer((6,) * 4, (8, 16, 32, 64), 6), x=maps).eval()

    def up(a, b):
        return F.interpolate(a, size=b.shape[-2:], mode='nearest')

    def pool(a):
        return F.max_pool2d(a, 3, 2, 1)

    def node(n, *ms):
        w = n.fuse.weight.relu()
        return n.conv(n.act(sum(a * b for a, b in zip(w, ms)) / (w.sum() + 1e-4)))

    p3, p4, p5, p6 = maps
    with torch.no_grad():
        t5 = node(m.top_down[2], p5, up(p6, p5))
        t4 = node(m.top_down[1], p4, up(t5, p4))
        o3 = node(m.top_down[0], p3, up(t4, p3))
        o4 = node(m.bottom_up[0], p4, t4, pool(o3))
        o5 = node(m.bottom_up[1], p5, t5, pool(o4))
        o6 = node(m.bottom_up[2], p6, pool(o5))
        close(m(maps), [o3, o4, o5, o6], 1e-6)


@pytest.mark.parametrize('size', [128, 97, (70, 115), (64, 128), (32, 33), 8])
@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(same=True),
        dict(fusion='softmax'),
        dict(fusion='sum', act='relu'),
        dict(norm=None),
        dict(norm='gn', channels=32),
        dict(separable=False),
        dict(act_first=False),
        dict(act=None),
        dict(extra=None),
        dict(levels=4),
        dict(bias=True),
    ],
    ids=str,
)
def test_any_size(kw, size):
    kw = dict(channels=8, layers=2) | kw
    m = attach_neck(Tiny(), BiFPN, **kw).eval()
    h, w = (size, size) if isinstance(size, int) else size
    n = {'extra': 3, 'levels': 4}.get(next(iter(kw.keys() - {'channels', 'layers'}), ''), 5)
    assert m.strides == (8, 16, 32, 64, 128)[:n] and m.channels == (kw['channels'],) * n
    assert [tuple(o.shape) for o in m(noise(h, w, 2))] == [
        (2, kw['channels'], -(-h // s), -(-w // s)) for s in m.strides
    ]


def test_levels():
    for at, want in (
        ((4, 8, 16, 32), (4, 8, 16, 32, 64)),
        ((8, 32), (8, 32, 64, 128, 256)),
        ((2, 4, 8, 16, 32), (2, 4, 8, 16, 32)),
        (32, (32, 64, 128, 256, 512)),
    ):
        m = attach_neck(Tiny(at), BiFPN, channels=4, layers=1).eval()
        assert m.strides == want
        got = m(noise(200, 264))
        assert [tuple(o.shape[2:]) for o in got] == [(-(-200 // s), -(-264 // s)) for s in want]
    assert attach_neck(Tiny(), BiFPN, extra=None).strides == (8, 16, 32)


def test_a_backbone_that_rounds_down():
    "At 200 px such a net gives 25, 12 and 6 cells; pooling 25 gives 13."
    f = BiFPN((4, 6, 8), strides, 4, 2).eval()
    assert [o.shape[-1] for o in f([torch.zeros(1, c, n, n) for c, n in ((4, 25), (6, 12), (8, 6))])] == [
        25,
        12,
        6,
        3,
        2,
    ]


def test_every_level_hears_every_map():
    f = randomize_(BiFPN((4, 4, 4), strides, 4, 1, fusion='fast', act=None, norm=None), x=maps_for(64, (4, 4, 4)))
    maps = [o.requires_grad_() for o in maps_for(64, (4, 4, 4))]
    for o in f(maps):
        assert all(g.any() for g in torch.autograd.grad(o.square().sum(), maps, retain_graph=True))


# --- contract


def make(**kw):
    return attach_neck(Tiny(), BiFPN, **dict(channels=8, layers=2) | kw)


def test_contract():
    m = check_contract(make())
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(groups) == 6 and len(ids) == len(set(ids)) and set(ids) == set(map(id, m.parameters()))
    assert {id(p) for p in groups[-1]} == set(map(id, m.neck.parameters()))


@pytest.mark.parametrize(
    'kw', [{}, dict(fusion='softmax'), dict(fusion='sum'), dict(extra=None), dict(separable=False)], ids=str
)
def test_gradients_reach_every_parameter(kw):
    m = make(**kw)
    sum(o.square().mean() + o.mean() for o in m(noise(128, n=2))).backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any() and '.fuse.' not in n]
    for n, p in m.named_parameters():  # a batch norm right behind hides a common factor, but not the mixture
        if '.fuse.' in n:
            assert p.grad.isfinite().all()
    if kw.get('fusion') != 'sum':
        assert sum(bool(p.grad.any()) for n, p in m.named_parameters() if '.fuse.' in n) == 2 * (2 * len(m.strides) - 2)


@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize(
    'kw', [{}, dict(act=nn.ReLU6, fusion='sum'), dict(norm=partial(nn.BatchNorm2d, eps=1e-2))], ids=str
)
def test_copies(how, kw):
    m = randomize_(make(**kw)).eval()
    n = how(m)
    close(n(noise(130)), m(noise(130)))
    assert set(map(id, m.parameters())).isdisjoint(id(p) for g in n.param_groups() for p in g)


def test_state_dict_keys():
    m, n = randomize_(make()).eval(), make().eval()
    n.load_state_dict(m.state_dict(), strict=True)
    close(n(noise(96)), m(noise(96)))
    assert {
        'neck.extra.0.weight',
        'neck.extra.1.running_var',
        'neck.layers.0.top_down.0.project.0.0.weight',
        'neck.layers.1.bottom_up.3.fuse.weight',
        'neck.layers.1.top_down.3.conv.dw.weight',
        'neck.layers.0.bottom_up.0.conv.pw.weight',
        'neck.layers.0.top_down.1.conv.norm.bias',
    } <= set(m.state_dict())


@pytest.mark.parametrize('kw', [{}, dict(same=True), dict(fusion='softmax'), dict(fusion='sum')], ids=str)
def test_export(kw):
    m = randomize_(make(layers=1, **kw)).eval()
    close(torch.export.export(m, (noise(70, 90),)).module()(noise(70, 90)), m(noise(70, 90)), 1e-6)


def test_export_with_a_free_batch_and_size():
    m, dim = attach_neck(Tiny((16, 32)), BiFPN, channels=8, layers=1, levels=3), torch.export.Dim
    randomize_(m).eval()
    free = {0: dim('b', min=1, max=8), 2: 128 * dim('h', min=2, max=6), 3: 128 * dim('w', min=2, max=6)}
    prog = torch.export.export(m, (noise(256, 384, n=2),), dynamic_shapes=(free,)).module()
    for size in ((384, 256, 1), (256, 512, 3)):
        close(prog(noise(*size)), m(noise(*size)), 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('kw', [{}, dict(same=True, fusion='sum')], ids=str)
def test_compile(backend, kw):
    m = randomize_(make(layers=1, **kw)).eval()
    torch._dynamo.reset()
    f = torch.compile(
        m, fullgraph=True, backend=backend, dynamic=True
    )  # sizes are symbols, in which not every sum can be written
    with torch.no_grad():
        for n in (70, 90):
            close(f(noise(n)), m(noise(n)), 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    m = randomize_(make()).eval()
    with torch.no_grad():
        want = m(noise(256))
        got = m.cuda().to(dtype)(noise(256).cuda().to(dtype))
    close([o.float().cpu() for o in got], want, 1e-3 if dtype == torch.float32 else 0.2)


def test_channels_last_and_bfloat16():
    m, x = randomize_(make(), x=noise(256, n=4)).eval(), noise(256)
    with torch.no_grad():
        want = m(x)
        close(
            copy.deepcopy(m).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), want, 1e-5
        )
        with torch.autocast('cpu', torch.bfloat16):
            close([o.float() for o in m(x)], want, 0.1)


def test_cost_of_d0():
    "As effdet's neck has, and by a sum over the nodes."
    ours, ref = pair('efficientdet_d0', 256)
    nodes = 24 * (64 * 9 + 64 * 64 + 128) + 3 * (4 * 2 + 3 * 3 + 2)
    lateral = sum(n * 64 + 128 for n in (40, 112, 112, 320, 320, 320))
    assert count_params(ours) == count_params(ref) == nodes + lateral
    assert count_macs(ours, maps_for(256)) == count_macs(ref, maps_for(256))


# --- under a detector


def target(n=1):
    return [dict(boxes=torch.tensor([[10.0, 12.0, 50.0, 60.0]]), labels=torch.tensor([1])) for _ in range(n)]


@pytest.mark.parametrize(
    'neck',
    [BiFPN, lambda c, s: BiFPN(c, s, 16, 1, fusion='sum'), 'instance', 'bifpn'],
    ids=['class', 'callable', 'instance', 'name'],
)
def test_faster_rcnn_trains_a_step(neck):
    torch.manual_seed(0)
    body = Tiny((4, 8, 16, 32))
    if neck == 'instance':
        neck = BiFPN(body.channels, body.strides, 16, 2)
    m = faster_rcnn.model(
        3,
        body,
        neck,
        head_channels=16,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=20,
        box_batch_size_per_image=16,
    )
    assert (neck != 'bifpn') or {o.eps for o in m.backbone.neck.modules() if isinstance(o, nn.BatchNorm2d)} == {
        1e-3
    }  # its own default
    opt = torch.optim.SGD(m.parameters(), 1e-2)
    was = [p.clone() for p in m.backbone.neck.parameters()]
    losses = m.train()([torch.rand(3, 96, 112, generator=seeded(i)) for i in range(2)], target(2))
    sum(losses.values()).backward()
    assert all(o.isfinite() for o in losses.values()) and all(
        p.grad is not None and p.grad.isfinite().all() for p in m.backbone.neck.parameters()
    )
    opt.step()
    assert sum(not torch.equal(a, b) for a, b in zip(was, m.backbone.neck.parameters())) > 0.9 * len(was)
    assert m.strides == (4, 8, 16, 32, 64)
    (out,) = m.eval()([torch.rand(3, 90, 70, generator=seeded())])
    assert out['boxes'].shape[1] == 4 and sum(map(len, m.param_groups())) == len(list(m.parameters()))


def test_by_name():
    m = create_neck('bifpn', Tiny(), channels=8, layers=1)
    assert type(m) is BiFPN and m.strides == (8, 16, 32, 64, 128)
    m = create_neck('bifpn', Tiny(), channels=8, norm=None, extra='pool')  # what the R-CNNs give to a neck by name
    assert not any(isinstance(o, nn.BatchNorm2d) for o in m.modules())


# --- errors


@pytest.mark.parametrize(
    'kw,error,text',
    [
        (dict(fusion='fastt'), ValueError, "got fusion='fastt', expected one of 'fast', 'softmax', 'sum'"),
        (dict(extra='p6p7'), ValueError, "got extra='p6p7', expected one of 'pool', None"),
        (dict(layers=0), ValueError, 'layers=0, expected at least two levels and one layer'),
        (dict(norm='bm'), ValueError, "got norm='bm', expected one of"),
        (dict(act='swich'), ValueError, "got act='swich', expected one of"),
        (dict(fusions='sum'), TypeError, 'fusions'),
    ],
)
def test_errors(kw, error, text):
    with pytest.raises(error, match=text):
        BiFPN((4, 8), (8, 16), 8, **kw)


def test_one_map_and_no_more():
    with pytest.raises(ValueError, match='got 1 level and'):
        BiFPN((4,), (32,), 8, extra=None)


def test_wrong_maps_are_named():
    with pytest.raises(ValueError, match=r'got maps with channels \(8, 4\), expected \(4, 8\)'):
        BiFPN((4, 8), (8, 16), 8)([torch.zeros(1, 8, 8, 8), torch.zeros(1, 4, 4, 4)])


def test_project():
    assert (
        isinstance(project(8, 8), nn.Identity)
        and project(4, 8)[0].bias is None
        and project(4, 8, norm=None)[0].bias is not None
        and project(4, 8, bias=True)[0].bias is not None
    )
