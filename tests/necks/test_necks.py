import copy
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common import close, maps_of, noise
from meta import constant_init

from backbones_nb.core.features import Backbone, as_backbone, check_contract, feature_row
from backbones_nb.analysis.costs import count_params, summary
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.analysis.parity import compare_maps, map_weights, randomize_, rel_error
from backbones_nb.core.create import create_backbone
from backbones_nb.necks import resnet_fpn
from backbones_nb.necks.fpn import FPN
from backbones_nb.necks.build import attach_neck, carries_neck, create_neck
from backbones_nb.necks.neck import Neck, WithNeck


class Tiny(Backbone):
    def __init__(self, strides=None, widths=(8, 12, 16, 24, 32)):
        super().__init__()
        for i, (a, b) in enumerate(zip((3, *widths), widths)):
            setattr(self, f's{i}', ConvNormAct(a, b, stride=2))
        rows = [feature_row(c, 2 ** (i + 1), f's{i}') for i, c in enumerate(widths)]
        self.set_trunk({f's{i}': [f's{i}'] for i in range(len(widths))}, rows, strides)


class Halve(nn.Module):
    "A neck of a user's own, no subclass of ours."

    def __init__(self, in_channels, in_strides, channels=None, strides=None):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(c, c // 2, 1) for c in in_channels])
        self.channels, self.strides = channels or [c // 2 for c in in_channels], strides or in_strides

    def forward(self, maps):
        return tuple(f(m) for f, m in zip(self.convs, maps))


renames = [(r'^inner_blocks', 'lateral'), (r'^layer_blocks', 'smooth'), (r'^extra_blocks\.', '')]


@pytest.fixture(scope='module')
def resnet():
    return randomize_(create_backbone('resnet18', strides=(2, 4, 8, 16, 32)))


# --- FPN against torchvision's


def theirs(kind, ins, c, norm=None):
    extra = {None: None, 'pool': LastLevelMaxPool(), 'p5': LastLevelP6P7(c, c), 'c5': LastLevelP6P7(ins[-1], c)}[kind]
    x = OrderedDict(
        (str(i), torch.randn(2, n, 64 >> i, 64 >> i, generator=torch.Generator().manual_seed(i)))
        for i, n in enumerate(ins)
    )
    return randomize_(FeaturePyramidNetwork(list(ins), c, extra, norm), x=x)


ours_kw = {None: {}, 'pool': dict(extra='pool'), 'p5': dict(extra='p6p7'), 'c5': dict(extra='p6p7', from_c5=True)}


@pytest.mark.parametrize('size', [(224,), (200,), (230, 310), (33, 65)])
@pytest.mark.parametrize('kind', ours_kw)
def test_equals_torchvision(resnet, kind, size):
    body = resnet.select((8, 16, 32) if kind in ('p5', 'c5') else None)
    ref = theirs(kind, body.channels, 32)
    ours = map_weights(ref, FPN(body.channels, body.strides, 32, **ours_kw[kind]), renames)
    maps = maps_of(body, *size)
    with torch.no_grad():
        close(
            ours.eval()(maps), ref.eval()(OrderedDict((str(i), m.clone()) for i, m in enumerate(maps))).values(), 1e-6
        )


def test_equals_torchvision_with_norm_and_gradients(resnet):
    body = resnet.select((4, 8, 16, 32))
    ref = theirs('pool', body.channels, 32, nn.BatchNorm2d).train()
    ours = map_weights(ref, FPN(body.channels, body.strides, 32, 'pool', 'bn'), renames).train()
    maps = maps_of(body, 64)
    a, b = ours(maps), list(ref(OrderedDict((str(i), m) for i, m in enumerate(maps))).values())
    close(a, b, 1e-6)
    sum(o.square().mean() for o in a).backward()
    sum(o.square().mean() for o in b).backward()
    pairs = zip(ours.state_dict(keep_vars=True).values(), ref.state_dict(keep_vars=True).values())
    grads = [(p.grad, q.grad) for p, q in pairs if p.grad is not None]
    assert len(grads) == len(list(ours.parameters()))
    close(*zip(*grads), 1e-4)


def test_equals_torchvisions_whole_backbone():
    "Body and neck together, in the weights' own layout."
    with constant_init():
        ref = resnet_fpn_backbone(backbone_name='resnet18', weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
        ours = attach_neck(create_backbone('resnet18'), extra='pool')
    randomize_(ref, x=noise(64))
    map_weights(ref, ours, [(r'fpn\.inner_blocks', 'neck.lateral'), (r'fpn\.layer_blocks', 'neck.smooth')])
    for size in ((96,), (100, 90)):
        with torch.no_grad():
            close(ours.eval()(noise(*size)), ref.eval()(noise(*size)).values(), 1e-6)


def test_parity_sees_another_interpolation(resnet, monkeypatch):
    body = resnet.select((4, 8, 16, 32))
    ours, maps = randomize_(FPN(body.channels, body.strides, 16)), maps_of(body, 64)
    want, real = ours(maps), F.interpolate
    monkeypatch.setattr(F, 'interpolate', lambda x, size, mode: real(x, size=size, mode='bilinear'))
    got = ours(maps)
    assert rel_error(got[3], want[3]) == 0 and rel_error(got[0], want[0]) > 1e-2


def test_init_is_that_of_torchvision():
    "Same distribution: the bound of He-uniform with a=1 is sqrt(3/fan_in)."
    f = FPN((64, 128), (4, 8), 64, 'p6p7')
    for m in f.modules():
        if isinstance(m, nn.Conv2d):
            bound = (3 / m.weight[0].numel()) ** 0.5
            assert 0.95 * bound < m.weight.abs().max() <= bound and not m.bias.any()


@pytest.mark.parametrize('extra,strides', [(None, (4, 8, 16)), ('pool', (4, 8, 16, 32)), ('p6p7', (4, 8, 16, 32, 64))])
def test_strides_and_channels(extra, strides):
    f = FPN((4, 6, 8), (4, 8, 16), 10, extra)
    assert f.strides == strides and f.channels == (10,) * len(strides)
    got = f([torch.zeros(1, c, 40 // 2**i, 28 // 2**i) for i, c in enumerate((4, 6, 8))])
    assert [tuple(o.shape[1:]) for o in got] == [(10, -(-40 // 2**i), -(-28 // 2**i)) for i in range(len(strides))]


def test_one_map():
    assert FPN((8,), (32,), 4, 'pool')([torch.ones(1, 8, 3, 3)])[1].shape == (1, 4, 2, 2)


@pytest.mark.parametrize('norm,biases', [(None, 4), ('bn', 0), (lambda c: nn.GroupNorm(2, c), 0)])
def test_norm(norm, biases):
    f = FPN((4, 8), (4, 8), 8, norm=norm)
    assert sum(m.bias is not None for m in f.modules() if isinstance(m, nn.Conv2d)) == biases
    assert sum(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for m in f.modules()) == (0 if norm is None else 4)


# --- a backbone with a neck is a backbone

every = dict(
    fpn=dict(channels=8),
    pool=dict(channels=8, extra='pool'),
    p6p7=dict(channels=8, extra='p6p7'),
    c5=dict(channels=8, extra='p6p7', from_c5=True),
    bn=dict(channels=8, norm='bn'),
    own=dict(neck=Halve),
)


@pytest.mark.parametrize('kw', every.values(), ids=every)
@pytest.mark.parametrize('size', [(64,), (97,), (70, 115)])
def test_contract(kw, size):
    m = attach_neck(Tiny(), **kw)
    check_contract(m)
    maps = m(noise(*size, n=2))
    h, w = (size * 2)[:2]
    assert [tuple(o.shape) for o in maps] == [(2, c, -(-h // s), -(-w // s)) for c, s in zip(m.channels, m.strides)]
    assert m.has_neck and carries_neck(m) and isinstance(m, Backbone) and as_backbone(m) is m
    assert m.feature_info.channels() == list(m.channels) and m.feature_info.reduction() == list(m.strides)
    close(m.eval().get_feature_maps(noise(64)), m(noise(64)))


@pytest.mark.parametrize('kw', every.values(), ids=every)
def test_gradients_reach_every_parameter_that_the_neck_uses(kw):
    m = attach_neck(Tiny(), **kw)
    sum(o.square().mean() for o in m(noise(128, n=2))).backward()
    dead = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize('kw', every.values(), ids=every)
@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies(kw, how):
    m = randomize_(attach_neck(Tiny(), **kw)).eval()
    n = how(m)
    close(n(noise(70)), m(noise(70)))
    assert (n.channels, n.strides, n.has_neck) == (m.channels, m.strides, True)
    assert {id(p) for p in m.parameters()}.isdisjoint(id(p) for g in n.param_groups() for p in g)


def test_state_dict_round_trip():
    m, n = (
        randomize_(attach_neck(Tiny(), channels=8, extra='p6p7')).eval(),
        attach_neck(Tiny(), channels=8, extra='p6p7').eval(),
    )
    n.load_state_dict(m.state_dict(), strict=True)
    close(n(noise(64)), m(noise(64)))
    assert {
        'neck.lateral.0.0.weight',
        'neck.lateral.0.0.bias',
        'neck.smooth.3.0.weight',
        'neck.p6.weight',
        'body.s0.conv.weight',
    } <= set(m.state_dict())


@pytest.mark.parametrize('extra,from_c5', [(None, False), ('pool', False), ('p6p7', False), ('p6p7', True)])
def test_export(extra, from_c5):
    m = randomize_(attach_neck(Tiny(), channels=8, extra=extra, from_c5=from_c5)).eval()
    close(torch.export.export(m, (noise(70, 90),)).module()(noise(70, 90)), m(noise(70, 90)), 1e-6)


def test_export_with_a_free_batch_and_size():
    m = randomize_(attach_neck(Tiny(), channels=8, extra='pool')).eval()
    dim = torch.export.Dim
    free = {
        0: dim('b', min=1, max=8),
        2: 32 * dim('h', min=3, max=16),
        3: 32 * dim('w', min=3, max=16),
    }  # a map of one cell would be a case of its own
    prog = torch.export.export(m, (noise(128, 96, n=2),), dynamic_shapes=(free,)).module()
    for size in ((96, 160, 1), (256, 128, 3)):
        close(prog(noise(*size)), m(noise(*size)), 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize('extra', ['pool', pytest.param('p6p7', marks=pytest.mark.slow)])
def test_compile(backend, extra):
    m = randomize_(attach_neck(Tiny(), channels=8, extra=extra)).eval()
    f = torch.compile(m, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(f(noise(70)), m(noise(70)), 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    m = randomize_(attach_neck(create_backbone('resnet18'), extra='pool')).eval()
    with torch.no_grad():
        want = m(noise(96))
        got = m.cuda().to(dtype)(noise(96).cuda().to(dtype))
    close([o.float().cpu() for o in got], want, 1e-3 if dtype == torch.float32 else 0.2)


def test_channels_last_and_bfloat16():
    m, x = randomize_(attach_neck(Tiny(), channels=8, extra='p6p7')).eval(), noise(96)
    with torch.no_grad():
        want = m(x)
        close(
            copy.deepcopy(m).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), want, 1e-5
        )
        with torch.autocast('cpu', torch.bfloat16):
            close([o.float() for o in m(x)], want, 0.1)


# --- selection


def test_select():
    m = attach_neck(Tiny(), channels=8, extra='pool').eval()
    full = m(noise())
    assert m.strides == (4, 8, 16, 32, 64) and m.out_channels_list == [8] * 5
    m.select((8, 64))
    assert m.strides == (8, 64) and m.channels == (8, 8) and m.feature_info.reduction() == [8, 64]
    close(m(noise()), [full[1], full[4]])
    assert len(m.get_feature_maps(noise())) == 5
    assert m.select(out_indices=(1, 5)).strides == (4, 64) and m.select().strides == (4, 8, 16, 32, 64)
    with pytest.raises(ValueError, match='no map at stride 2: choose from its strides 4, 8, 16, 32, 64'):
        m.select((2,))


def test_body_selection_decides_what_the_neck_sees():
    m = attach_neck(Tiny(strides=(8, 32)), channels=8)
    assert m.neck.in_strides == (8, 32) and m.strides == (8, 32)
    assert [o.shape[-1] for o in m(noise(96))] == [12, 3]


def test_out_channels():
    assert attach_neck(Tiny(), channels=8).out_channels == 8
    with pytest.raises(ValueError, match='expected one number for all'):
        attach_neck(Tiny(), Halve).out_channels


# --- groups and freezing


def norms(m):
    return [o for o in m.modules() if isinstance(o, nn.BatchNorm2d)]


def test_param_groups():
    m = attach_neck(Tiny(), channels=8, norm='bn')
    groups = m.param_groups()
    assert len(groups) == 6
    ids = [id(p) for g in groups for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    assert [list(map(id, g)) for g in groups[:5]] == [list(map(id, g)) for g in m.body.param_groups()]
    assert {id(p) for p in groups[-1]} == {id(p) for p in m.neck.parameters()}


def test_groups_of_a_body_with_its_own_rule():
    class Two(Tiny):
        def param_groups(self):
            ps = list(self.parameters())
            return [ps[:3], ps[3:]]

    m = attach_neck(Two(), channels=8)
    assert [len(g) for g in m.param_groups()[:-1]] == [3, 12] and len(m.param_groups()) == 3


@pytest.mark.parametrize('n', [0, 2, 5, 6, -1])
@pytest.mark.parametrize('pretrained,neck', [(None, None), ('some', None), ('whole', 'whole')])
def test_freeze(n, pretrained, neck):
    body = Tiny()
    body.pretrained = pretrained
    m = attach_neck(body, channels=8, norm='bn')
    m.neck.pretrained = neck
    m.freeze_to(n)
    k = n + 6 if n < 0 else n
    for i, g in enumerate(m.param_groups()):
        frozen = i < k
        for p in g:  # batch norms of random weights are never frozen
            bn = any(p is q for o in norms(m) for q in o.parameters())
            assert p.requires_grad == (not frozen or bn and not (neck if i == 5 else pretrained))
    m.eval().train()
    assert [o.training for o in norms(m.body)] == [not (pretrained and i < k) for i in range(5)]
    assert {o.training for o in norms(m.neck)} == {not (neck and k == 6)}


def test_freeze_says_how_many_groups_there_are():
    with pytest.raises(ValueError, match='there are 6 groups: pass a number from -6 to 6'):
        attach_neck(Tiny(), channels=8).freeze_to(7)


def test_facts_of_the_body_are_kept():
    body = Tiny()
    body.name, body.pretrained, body.record = 'tiny', 'V1', dict(mean=(0, 0, 0))
    m = attach_neck(body, channels=8)
    assert (m.name, m.pretrained, m.record) == ('tiny', 'V1', dict(mean=(0, 0, 0))) and 'weights=V1' in repr(m)


# --- which neck


def test_auto():
    assert type(create_neck('auto', Tiny())) is FPN
    assert create_neck('auto', Tiny(strides=32)) is None and create_neck(None, Tiny()) is None
    body, both = Tiny(strides=32), attach_neck(Tiny(), channels=8)
    assert attach_neck(body) is body and attach_neck(both) is both
    assert attach_neck(both, None) is both


def test_auto_sees_torchvisions_neck():
    m = as_backbone(resnet_fpn_backbone(backbone_name='resnet18', weights=None), strides=(4, 8, 16, 32, 64))
    assert carries_neck(m) and attach_neck(m) is m and m.strides == (4, 8, 16, 32, 64)


def test_kinds_of_necks():
    body = Tiny()
    ready = FPN(body.channels, body.strides, 8)
    for neck in ('fpn', ready, FPN, lambda c, s: FPN(c, s, 8), Halve, Halve(body.channels, body.strides)):
        m = attach_neck(body, neck)
        assert isinstance(m, WithNeck) and m.strides == (4, 8, 16, 32)
    assert attach_neck(body, ready).neck is ready
    assert attach_neck(body, FPN, channels=12, extra='pool').out_channels == 12


def test_a_neck_over_a_neck():
    m = attach_neck(attach_neck(Tiny(), channels=8), 'fpn', channels=6)
    assert m.out_channels == 6 and list(m.trunk)[-2:] == ['neck', 'neck2'] and len(m.param_groups()) == 7
    ids = [id(p) for g in m.param_groups() for p in g]
    assert len(ids) == len(set(ids)) == len(list(m.parameters()))
    m.freeze_to(6)
    assert not any(p.requires_grad for p in m.body.parameters() if p.dim() > 1) and all(
        p.requires_grad for p in m.neck.parameters()
    )


def test_any_module_as_body():
    m = attach_neck(nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1)), 'fpn', channels=4)
    assert m.strides == (4,) and m.out_channels == 4 and m(noise(64))[0].shape == (1, 4, 16, 16)


def test_mappings_and_tuples():
    f = FPN((4, 8), (4, 8), 8).eval()
    maps = [torch.randn(1, 4, 9, 7), torch.randn(1, 8, 5, 4)]
    close(f(OrderedDict(a=maps[0], b=maps[1])), f(maps))
    close(f(tuple(maps)), f(maps))


def test_inputs_stay_as_they_are():
    f, maps = FPN((4, 8), (4, 8), 8), [torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]
    before = [o.clone() for o in maps]
    f(maps)
    assert all(map(torch.equal, maps, before)) and len(maps) == 2


def test_summary_of_a_backbone_with_neck():
    m = attach_neck(Tiny(), channels=8, extra='pool')
    s = summary(m, 64)
    assert s.total['params'] == count_params(m) == sum(r['params'] for r in s.rows)
    assert [r['stride'] for r in s.rows if r['map']] == [4, 8, 16, 32, 64]


# --- errors


class NoStrides(nn.Module):
    channels = (8,)


@pytest.mark.parametrize(
    'neck,kw,error,text',
    [
        ('fpm', {}, ValueError, "there is no neck 'fpm'. Did you mean 'fpn'"),
        ('qqqqq', {}, ValueError, "there is no neck 'qqqqq'. Choose 'auto', None or one of fpn"),
        (3, {}, TypeError, "got neck=3, expected 'auto', None, a name, a module or a callable"),
        (NoStrides(), {}, ValueError, 'got NoStrides without strides, expected a neck'),
        (nn.Identity(), {}, ValueError, 'without channels and strides'),
        (lambda c, s: 'x', {}, TypeError, 'got str as neck'),
        (
            FPN((8, 16), (4, 8), 8),
            {},
            ValueError,
            r'got FPN for channels \(8, 16\), but the backbone has \(12, 16, 24, 32\)',
        ),
        (
            FPN((12, 16, 24, 32), (2, 4, 8, 16), 8),
            {},
            ValueError,
            r'got FPN for strides \(2, 4, 8, 16\), but the backbone has \(4, 8, 16, 32\)',
        ),
        (
            FPN((12, 16, 24, 32), (4, 8, 16, 32), 8),
            dict(channels=4),
            ValueError,
            'got an existing FPN and channels for it',
        ),
        (
            lambda c, s: Halve(c, s, channels=[9] * 4),
            {},
            ValueError,
            r'WithNeck claims \(channel, stride\)|claims \(channel',
        ),
        (lambda c, s: Halve(c, s, strides=[2, 4, 8, 16]), {}, ValueError, 'claims'),
        ('fpn', dict(extra='pol'), ValueError, "got extra='pol', expected one of None, 'pool', 'p6p7'"),
        ('fpn', dict(norm='bm'), ValueError, "got norm='bm', expected one of"),
    ],
)
def test_errors(neck, kw, error, text):
    with pytest.raises(error, match=text):
        attach_neck(Tiny(), neck, **kw)


def test_wrong_maps_are_named():
    f = FPN((4, 8), (4, 8), 8)
    with pytest.raises(ValueError, match=r'got maps with channels \(8, 4\), expected \(4, 8\)'):
        f([torch.zeros(1, 8, 8, 8), torch.zeros(1, 4, 4, 4)])
    with pytest.raises(ValueError, match=r'got maps with channels \(4,\), expected \(4, 8\)'):
        f([torch.zeros(1, 4, 8, 8)])


@pytest.mark.parametrize('args', [((4, 8), (4,), 8, (4,)), ((4,), (4,), (8, 8), (4,)), ((), (), 8, ())])
def test_channels_and_strides_go_together(args):
    with pytest.raises(ValueError, match='expected the same number'):
        Neck(*args)


def test_resnet_fpn_is_random_unless_asked():
    with torch.device('meta'):
        assert resnet_fpn.resnet_fpn('resnet18').pretrained is None


@pytest.mark.parametrize('name', resnet_fpn.resnet_fpn_bodies)
def test_resnet_fpn_is_torchvisions(name):
    with torch.device('meta'):
        ours = getattr(resnet_fpn, name)()
        ref = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5)
    assert ours.name == f'{name}_fpn' and ours.strides == (4, 8, 16, 32, 64) and ours.channels == (256,) * 5
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in ref.parameters())
    groups = ours.param_groups()
    assert len({id(p) for g in groups for p in g}) == sum(map(len, groups)) == len(list(ours.parameters()))
    assert attach_neck(ours) is ours  # no second neck


@pytest.fixture(scope='module')
def both_resnet_fpns():
    with constant_init():
        ref = resnet_fpn_backbone(
            backbone_name='resnext50_32x4d', weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
        )
        ours = create_backbone('resnext50_32x4d_fpn')
    randomize_(ref, x=noise(64))
    renames = [(r'fpn\.inner_blocks', 'neck.lateral'), (r'fpn\.layer_blocks', 'neck.smooth')]
    return map_weights(ref, ours, renames), ref


@pytest.mark.parametrize('size', [pytest.param(224, marks=pytest.mark.slow), 104, (115, 155)])
def test_resnet_fpn_parity(both_resnet_fpns, size):
    ours, ref = both_resnet_fpns
    assert compare_maps(ours, ref, size, batch=1).worst <= 1e-5
