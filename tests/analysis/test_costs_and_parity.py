from copy import deepcopy
from functools import partial
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from meta import constant_init

from backbones_nb.analysis.costs import _Ledger, cost_table, count_macs, count_params, peak_memory, summary
from backbones_nb.analysis.parity import (
    assert_parity,
    compare_maps,
    locate,
    map_weights,
    match_keys,
    randomize_,
    rel_error,
)
from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.tables import Table
from backbones_nb.core.layers import ConvNormAct


class Tiny(Backbone):
    def __init__(self, strides=None, eps=1e-5, act='relu'):
        super().__init__()
        cna = partial(ConvNormAct, norm=partial(nn.BatchNorm2d, eps=eps), act=act, stride=2)
        self.stem, self.s2, self.s3 = nn.Sequential(cna(3, 8), cna(8, 16)), cna(16, 24), cna(24, 32)
        rows = [
            feature_row(8, 2, 'stem.0'),
            feature_row(16, 4, 'stem.1'),
            feature_row(24, 8, 's2'),
            feature_row(32, 16, 's3'),
        ]
        self.set_trunk(dict(stem=['stem.0', 'stem.1'], s2=['s2'], s3=['s3']), rows, strides)


class Valued(nn.Module):  # its path depends on values, so it cannot run on the meta device
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.abs().sum().item() == 0 else x


def allocator_peak(model, x, train):
    "Peak of what PyTorch's CPU allocator really handed out, from the profiler's memory events."
    model.train(train)
    with profile(profile_memory=True) as p, torch.set_grad_enabled(train):
        y = model(x)
        if train:
            y.mean().backward()
    live = peak = 4 * x.numel()
    for e in sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()
    ):
        live += e.nbytes()
        peak = max(peak, live)
    return peak / 1e6


class NoConv(nn.Module):  # only operations that take no scratch space
    def __init__(self):
        super().__init__()
        self.n, self.m, self.l = nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.Linear(16, 32)

    def forward(self, x):
        y = F.relu(self.n(x))
        y = F.silu(F.max_pool2d(self.m(torch.cat([x, y + x], 1)), 2), inplace=True)
        return self.l(y.flatten(2).mT).sigmoid()


def test_peak_is_the_allocators():
    net, x = NoConv(), torch.randn(2, 8, 32, 32)
    assert peak_memory(net, x) == pytest.approx(allocator_peak(net, x, False), rel=1e-3)
    silu = nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(True))
    assert peak_memory(silu, x, train=True) == pytest.approx(allocator_peak(silu, x, True), rel=1e-3)


@pytest.mark.parametrize('train', [False, True])
def test_peak_of_convolutions_leaves_out_scratch_only(train):
    model = timm.create_model('resnet18')
    ours, real = (
        peak_memory(model, 160, batch=2, train=train),
        allocator_peak(model, torch.randn(2, 3, 160, 160), train),
    )
    weights = (
        4 * max(p.numel() for p in model.parameters()) / 1e6
    )  # a convolution may copy its weights, more is not explained
    assert 0.99 * real - 2 * weights <= ours <= 1.01 * real


@pytest.mark.parametrize('inplace,allocated,peak', [(False, 6144, 5120), (True, 4096, 4096)])
def test_memory_by_hand(inplace, allocated, peak):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(8, 4, 3, padding=1))
    t = summary(net, torch.zeros(1, 4, 8, 8)).total
    assert (round(t['act_mb'] * 1e6), round(t['peak_mb'] * 1e6)) == (allocated - 1024, peak)
    assert round(summary(net, torch.zeros(3, 4, 8, 8)).total['peak_mb'] * 1e6) == 3 * peak


def test_ledger_forgets_the_dead_and_ignores_views():
    with torch.no_grad(), _Ledger() as mem:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:].t()
        assert mem.live == 400
        c = a + 1
        assert mem.live == 800
        del a
        assert mem.live == 800  # b still holds it
        del b, c
    assert (mem.live, mem.peak, mem.allocated) == (0, 800, 800)


@pytest.mark.parametrize(
    'layer,shape,macs',
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 17, 30), 3 * 9 * 8 * 9 * 15),
        (nn.Conv2d(16, 32, 5, groups=4), (1, 16, 9, 9), 4 * 25 * 32 * 25),
        (nn.Conv2d(16, 16, 3, groups=16, padding=1), (1, 16, 9, 9), 9 * 16 * 81),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(10, 5), (1, 10), 50),
        (nn.BatchNorm2d(4), (1, 4, 8, 8), 0),
    ],
)
def test_macs_by_formula(layer, shape, macs):
    assert count_macs(layer, torch.zeros(shape)) == macs
    assert count_macs(layer.to('meta'), torch.zeros(shape, device='meta')) == macs


@pytest.mark.parametrize(
    'name,px,gmacs',
    [('resnet18', 224, 1.814), ('resnet50', 224, 4.089), ('darknet53', 256, 9.285), ('cspdarknet53', 256, 6.53)],
)
def test_known_macs(name, px, gmacs):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert count_macs(model, px) / 1e9 == pytest.approx(gmacs, rel=0.003)


@pytest.mark.parametrize('size', [64, (50, 70), (200, 230)])
@pytest.mark.parametrize('strides', [None, (8,), (2, 16)])
def test_summary_of_a_backbone(size, strides):
    m = Tiny(strides)
    t = summary(m, size, batch=2)
    marked = [r for r in t.rows if r['map']]
    with torch.no_grad():
        maps = m.eval()(torch.zeros(2, 3, *((size, size) if isinstance(size, int) else size)))
    assert [(r['channels'], r['stride'], r['height'], r['width']) for r in marked] == [
        (c, s, *o.shape[2:]) for c, s, o in zip(m.channels, m.strides, maps)
    ]
    assert sum(r['params'] for r in t.rows) == t.total['params'] == count_params(m)
    assert sum(r['gmacs'] for r in t.rows) == pytest.approx(2 * count_macs(m, size) / 1e9)
    assert [r['stage'] for r in t.rows] == ['stem', 'stem', 's2', 's3']
    assert (t.rows[-1]['gmacs'] == 0) == (16 not in m.strides)
    for text in str(t), t._repr_markdown_():
        assert f'{count_params(m):,}' in text and '✓' in text


def test_summary_of_plain_modules_follows_execution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.a, self.unused = (
                nn.Linear(8, 2),
                nn.ModuleList([nn.Conv2d(3, 8, 3) for _ in range(1)]),
                nn.Linear(7, 7),
            )

        def forward(self, x):
            return self.z(F.relu(self.a[0](x)).mean((2, 3)))

    t = summary(Net(), 10)
    assert [r['stage'] for r in t.rows] == ['a', 'z', 'unused', 'rest']
    assert [r['params'] for r in t.rows] == [8 * 28, 18, 56, 0]
    assert (t.rows[0]['channels'], t.rows[0]['height'], t.rows[1]['channels'], t.rows[1]['stride']) == (8, 8, 2, None)
    assert t.rows[2]['channels'] is None and t.rows[3]['act_mb'] > 0


def test_shared_module_counts_once():
    l = nn.Conv2d(3, 3, 1)
    t = summary(nn.Sequential(l, l), 4)
    assert (
        t.total['params'] == 12
        and sum(r['params'] for r in t.rows) == 12
        and t.total['gmacs'] * 1e9 == pytest.approx(2 * 9 * 16)
    )


@pytest.mark.parametrize('make', [Tiny, Valued])
@pytest.mark.parametrize('train', [False, True])
def test_model_is_left_alone(make, train):
    m = make()
    m(torch.zeros(2, 3, 32, 32))
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    m.train()
    next(m.children()).eval()
    was, modes, rng = deepcopy(m.state_dict()), [o.training for o in m.modules()], torch.get_rng_state()
    summary(m, 32, batch=2)
    peak_memory(m, 32, batch=2, train=train)
    assert all(torch.equal(v, was[k]) for k, v in m.state_dict().items()) and modes == [o.training for o in m.modules()]
    assert all(p.grad.eq(1).all() and p.device.type == 'cpu' for p in m.parameters())
    assert not any(o._forward_hooks or o._forward_pre_hooks for o in m.modules()) and torch.equal(
        rng, torch.get_rng_state()
    )
    pickle.dumps(m)


def test_values_decide():
    assert count_macs(Valued(), 8) == 27 * 4 * 36


def test_training_needs_more_and_freezing_less():
    m = Tiny()
    full = peak_memory(m, 64, batch=2, train=True)
    assert full > 1.5 * peak_memory(m, 64, batch=2)
    for p in m.stem.parameters():
        p.requires_grad_(False)
    assert peak_memory(m, 64, batch=2, train=True) < 0.8 * full


@pytest.mark.parametrize(
    'f,error,says',
    [
        (lambda: summary('vovnet39'), TypeError, 'create_backbone'),
        (lambda: count_params(3), TypeError, 'got int'),
        (lambda: summary(Tiny(), (224,)), ValueError, 'height, width'),
        (lambda: summary(Tiny(), 0), ValueError, 'size=0'),
        (lambda: summary(Tiny(), 22.4), ValueError, 'size=22.4'),
        (lambda: summary(nn.Conv2d(3, 4, 7), 5), ValueError, 'pass a larger size'),
        (
            lambda: peak_memory(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)), 8, train=True),
            ValueError,
            'more than 1 value',
        ),
        (lambda: cost_table(dict(a=Tiny()), 32, 'b'), ValueError, 'expected one of a'),
    ],
)
def test_inspect_errors(f, error, says):
    with pytest.raises(error, match=says) as e:
        f()
    assert '\n' not in str(e.value)


def test_cost_table_gaps():
    t = cost_table(dict(ours=Tiny(), half=dict(params=count_params(Tiny()) / 2), none={}), 32, reference='ours')
    assert t[1]['params_gap'] == pytest.approx(-0.5) and 'params_gap' not in t[0] and 'gmacs_gap' not in t[1]
    assert '-50.00%' in str(t) and 'gap in GMACs' in t._repr_markdown_()
    assert Table([dict(a='x|y')], dict(a=('a', '')))._repr_markdown_().count('\\|') == 1


nets = [
    'resnet18',
    'resnet152',
    'mobilenetv3_large_100',
    'efficientnet_b3',
    'darknet53',
    'cspdarknet53',
    'ese_vovnet39b',
    'vgg11',
    'convnext_pico',
]


@pytest.mark.parametrize('name', nets)
def test_randomized_signals_stay_alive(name):
    with constant_init():
        m = timm.create_model(name, features_only=True)
    randomize_(m).eval()
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = m(x), m(x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    for p, q in zip(a, b):
        assert 0.05 < p.std() < 50 and (p[0] - p[1]).std() > 0.02 * p.std(), (
            name
        )  # neither dead, exploded, nor constant
        assert 1e-7 < rel_error(q, p) < 1e-2, name  # and not chaotic
    for k, v in m.state_dict().items():
        if v.dim() == 1 and v.numel() > 1:
            assert len(v.unique()) > 0.5 * v.numel(), k


def test_randomize_is_deterministic_and_keeps_mode():
    torch.manual_seed(0)
    a = randomize_(Tiny().eval(), seed=5)
    torch.manual_seed(1)
    b = randomize_(Tiny().eval(), seed=5)
    rng = torch.get_rng_state()
    c = randomize_(Tiny(), seed=6)
    same = lambda p, q: all(
        torch.equal(u, v) for u, v in zip(p.state_dict().values(), q.state_dict().values()) if u.dim()
    )
    assert same(a, b) and not same(a, c) and not a.training and c.training
    d = Tiny()
    rng = torch.get_rng_state()
    randomize_(d)
    assert torch.equal(rng, torch.get_rng_state()) and not any(m._forward_pre_hooks for m in d.modules())


def test_randomize_reaches_frozen_norms_and_odd_modules():
    from torchvision.ops import FrozenBatchNorm2d

    m = randomize_(nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8)))
    assert all(v.std() > 0 for v in m[1].state_dict().values())

    class Two(nn.Module):  # takes two inputs: no image reaches its norm
        def __init__(self):
            super().__init__()
            self.c, self.n = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x, y):
            return self.n(self.c(x + y))

    n = randomize_(Two()).n
    assert n.running_mean.std() > 0 and n.running_var.std() > 0 and n.training


def test_map_weights_by_order_and_by_name():
    ref, ours = randomize_(timm.create_model('resnet18')), timm.create_model('resnet18')
    map_weights(ref, ours)
    assert all(torch.equal(v, ref.state_dict()[k]) for k, v in ours.state_dict().items() if 'tracked' not in k)
    a, b = randomize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), ConvNormAct(3, 4, bias=True)
    rules = [('^0', 'conv'), ('^1', 'norm')]
    assert match_keys(a, b) == match_keys(a, b, rules) == match_keys(a.state_dict(), b, rules)
    no_count = {k: v for k, v in a.state_dict().items() if 'tracked' not in k}
    map_weights(no_count, b, rules)
    assert torch.equal(b.norm.running_var, a[1].running_var) and torch.equal(b.conv.bias, a[0].bias)
    a[0].weight.data.zero_()
    assert b.conv.weight.abs().sum() > 0  # a copy, no alias


@pytest.mark.parametrize(
    'src,dst,renames,says',
    [
        (
            Tiny(),
            nn.Conv2d(3, 9, 3),
            None,
            r'matched 0 tensors.*20 of the source .* and 15 more\) '
            r'and 2 of the target \(weight \(9, 3, 3, 3\), bias \(9,\)\) are',
        ),
        (nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 5), [], r'weight \(8, 3, 3, 3\).*weight \(8, 3, 5, 5\)'),
        (nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 3), None, 'none of the source and 1 of the target'),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), [(r'^\d\.', '')], "the same name 'weight'"),
    ],
)
def test_map_weights_is_strict(src, dst, renames, says):
    was = deepcopy(dst.state_dict())
    with pytest.raises(ValueError, match=says) as e:
        map_weights(src, dst, renames)
    assert '\n' not in str(e.value) and all(torch.equal(v, was[k]) for k, v in dst.state_dict().items())


def test_rel_error():
    assert rel_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert rel_error(torch.zeros(2), torch.zeros(2)) == 0 and rel_error(torch.ones(2), torch.zeros(2)) == float('inf')
    nan = rel_error(torch.tensor([float('nan')]), torch.ones(1))
    assert nan != nan
    for a, b in ((torch.ones(2), torch.ones(1)), (torch.ones(0), torch.ones(0))):
        with pytest.raises(ValueError, match='got'):
            rel_error(a, b)


@pytest.mark.parametrize('fault,first', [(dict(eps=1e-3), 'stem.1.conv'), (dict(act='leaky_relu'), 'stem.1.conv')])
def test_faults_are_found_and_located(fault, first):
    ref = randomize_(Tiny())
    good, bad = map_weights(ref, Tiny()), map_weights(ref, Tiny(**fault))
    assert assert_parity(good, ref, sizes=[32, (50, 70)]).worst == 0 and locate(good, ref).worst == 0
    with pytest.raises(AssertionError, match='map 0 .*50x70'):
        assert_parity(bad, ref, (50, 70))
    assert locate(bad, ref)[-1]['ours'] == first
    assert compare_maps(bad, ref, 32, dtype=torch.float64).worst > 1e-5
    assert ref.training and next(ref.parameters()).dtype == torch.float32


def test_nan_is_no_parity():
    ref = randomize_(Tiny())
    bad = map_weights(ref, Tiny())
    bad.s3.norm.running_var.fill_(-1.0)
    t = compare_maps(bad, ref, 32)
    assert t.worst == float('inf')
    with pytest.raises(AssertionError, match='map 2'):
        assert_parity(bad, ref, 32)


def test_maps_must_correspond():
    with pytest.raises(ValueError, match='got 3 maps from ours and 2 from the reference'):
        compare_maps(Tiny(), Tiny((4, 8)), 32)
    with pytest.raises(ValueError, match='shapes'):
        compare_maps(Tiny((4, 8)), Tiny((8, 16)), 32)
    short = nn.Sequential(nn.Conv2d(3, 4, 1))
    long = nn.Sequential(deepcopy(short[0]), nn.Conv2d(4, 4, 1))
    assert 'ours has 1 and the reference 2' in locate(short, long, 8).note
    t = locate(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), 8)
    assert t.note == 'the models diverge at the first layer'
    assert t.worst == float('inf') and '/' in t[0]['shape']
