import copy
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from timm.models.cspnet import CspStagesCfg, model_cfgs
from torch import nn
from torch.nn import functional as F

from common import close, copies, noise, out

from backbones_nb.backbones import darknet as D
from backbones_nb.analysis.parity import assert_parity, map_weights, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones

pytestmark = pytest.mark.usefixtures('quick_meta')
names = list(D.darknet_configs)
built = [(n, v) for n in names for v in D.darknet_variants[n]]
every = (1, 2, 4, 8, 16, 32)
narrow = dict(outs=(8, 16, 32, 64, 128), stem=4)  # every block of a net, with an eighth of its channels
thin = dict(blocks=(0, 1, 1, 1, 1), outs=(16, 24, 32, 40, 48), stem=8)
few = dict(darknet53=dict(blocks=(1, 1, 2, 1, 1)), darknet19={})  # a graph of fewer blocks of each kind


@pytest.fixture
def sizes(slow_run):
    return (64, 75, (70, 110)) if slow_run else (64, (75, 110))


def make(name, **kw):
    return create_backbone(name, **kw)


def meta(name, **kw):
    with torch.device('meta'):
        return make(name, **kw)


def count(m):
    return sum(p.numel() for p in m.parameters())


# --- published numbers


@pytest.mark.parametrize('name,variant', built)
def test_parameters(name, variant):
    body, full = dict(darknet19=(19_817_376, 20_842_376), darknet53=(40_584_928, 41_609_928))[name]
    m = meta(name, variant=variant)
    assert count(m) == body and count(m) == count(meta(name))
    for head in ('linear', 'conv'):
        with torch.device('meta'):
            c = D.DarknetClassifier(m, head=head)
        assert count(c) == full
    norms = sum(count(o) for o in c.modules() if isinstance(o, nn.BatchNorm2d))
    assert name == 'darknet19' or full - norms == 41_574_216  # what is published leaves batch norm out


@pytest.mark.parametrize(
    'name,kw,head,size,bflops',
    [('darknet19', dict(variant='cfg'), 'conv', 224, 5.58), ('darknet53', {}, 'linear', 256, 18.57)],
)
def test_operations(name, kw, head, size, bflops):
    from backbones_nb.analysis.costs import count_macs

    with torch.device('meta'):
        c = D.DarknetClassifier(make(name, strides=32, **kw), head=head)
    assert round(2 * count_macs(c, size) / 1e9, 2) == bflops


def test_named_convolutions():
    for n in names:
        assert sum(isinstance(m, nn.Conv2d) for m in meta(n).modules()) + 1 == int(n[-2:])


# --- parity with timm, body and classifier

leaky = partial(nn.LeakyReLU, negative_slope=0.1)
stages19 = CspStagesCfg(
    depth=(0, 1, 1, 2, 2),
    out_chs=(64, 128, 256, 512, 1024),
    stride=2,
    bottle_ratio=0.5,
    block_ratio=1.0,
    stage_type='dark',
    block_type='dark',
)
acts = dict(
    slope001=('leaky_relu', dict(act=D.timm_leaky)),
    slope01=(leaky, dict(act='leaky_relu')),
    relu=('relu', dict(act='relu')),
)
stem, stages53 = (getattr(model_cfgs['darknet53'], o) for o in ('stem', 'stages'))
# as narrow as `narrow`: cli/test_parity.py compares the parameters of the whole nets
refs = dict(
    darknet53=('darknet53', dict(stages=replace(stages53, out_chs=narrow['outs']))),
    darknet19=('darknet21', dict(stages=replace(stages19, out_chs=narrow['outs']))),
)
refs = {k: (n, kw | dict(stem=replace(stem, out_chs=narrow['stem']))) for k, (n, kw) in refs.items()}
rows = [
    ('darknet53', 'slope001', dict(variant='timm')),
    ('darknet53', 'slope01', {}),
    ('darknet53', 'relu', dict(variant='vt')),
    ('darknet19', 'slope001', None),
    ('darknet19', 'slope01', None),
    ('darknet19', 'relu', {}),
]


@pytest.mark.parametrize('name,act,kw', rows, ids=[f'{n}-{a}' for n, a, _ in rows])
def test_parity_with_timm(name, act, kw, sizes):
    (ref, ref_kw), (theirs, mine) = refs[name], acts[act]
    ref = randomize_(timm.create_model(ref, features_only=True, out_indices=range(6), act_layer=theirs, **ref_kw))
    ours = map_weights(ref, make(name, strides=every, **narrow, **(mine if kw is None else kw)), D.darknet_timm_renames)
    assert {m.negative_slope for m in ours.modules() if isinstance(m, nn.LeakyReLU)} == {
        'slope001': {0.01},
        'slope01': {0.1},
        'relu': set(),
    }[act]
    assert len(assert_parity(ours, ref, sizes=sizes, batch=1, tol=1e-5)) == 6 * len(sizes)
    info = ours.feature_info
    assert info.channels() == ref.feature_info.channels() and info.reduction() == ref.feature_info.reduction()


@pytest.mark.parametrize(
    'name,act',
    [
        ('darknet53', 'slope001'),
        ('darknet53', 'slope01'),
        pytest.param('darknet53', 'relu', marks=pytest.mark.slow),
        pytest.param('darknet19', 'slope01', marks=pytest.mark.slow),
        ('darknet19', 'relu'),
    ],
)
def test_parity_of_the_classifier(name, act, sizes, slow_run):
    (ref, ref_kw), (theirs, mine) = refs[name], acts[act]
    ref = randomize_(timm.create_model(ref, act_layer=theirs, **ref_kw))
    ours = map_weights(
        ref, D.DarknetClassifier(make(name, strides=32, **narrow, **mine)), D._darknet_classifier_renames
    )
    if act != 'slope01':
        sizes = (200,) if slow_run else (100,)
    for r in assert_parity(ours, ref, sizes=sizes, batch=2, tol=1e-5):
        assert r['shape'] == '(2, 1000)'


def test_the_wrong_slope_is_seen():
    name, kw = refs['darknet53']
    ref = randomize_(timm.create_model(name, features_only=True, out_indices=range(6), **kw))
    with pytest.raises(AssertionError, match='relative error'):
        ours = map_weights(ref, make(name, strides=every, **narrow), D.darknet_timm_renames)
        assert_parity(ours, ref, 96, batch=1)


@pytest.mark.parametrize('norm', ('norm', 'bn'))
def test_keys_of_vision_toolbox(norm):
    ours = randomize_(make('darknet19', **narrow))
    sd = {
        re.sub(r'^stages\.0\.conv\.', 'stages.0.', k).replace('.norm.', f'.{norm}.'): v
        for k, v in ours.state_dict().items()
    }
    assert 'stages.0.conv.weight' in sd and f'stages.0.{norm}.running_mean' in sd
    twin = map_weights(sd, make('darknet19', **narrow), D._vt_renames)
    close(out(twin.eval(), noise()), out(ours.eval(), noise()))
    sd53 = {k.replace('.norm.', f'.{norm}.'): v for k, v in make('darknet53', **narrow).state_dict().items()}
    map_weights(sd53, make('darknet53', variant='vt', **narrow), D._vt_renames)


# --- the .cfg files, interpreted line by line in float64
# filters/size/stride, M a max-pool, + a shortcut from three lines before


def cfg53():
    res = ['32/3/1']
    for nf, n in zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)):
        res += [f'{nf}/3/2'] + [f'{nf // 2}/1/1', f'{nf}/3/1', '+'] * n
    return res


cfg19 = '32 M 64 M 128 64/1 128 M 256 128/1 256 M 512 256/1 512 256/1 512 M 1024 512/1 1024 512/1 1024'.split()
cfgs = dict(
    darknet19=[o if o == 'M' else '/'.join((o.split('/') + ['3'])[:2]) + '/1' for o in cfg19], darknet53=cfg53()
)


def pad_pool(x):
    "darknet's maxpool_layer: size 2, stride 2, padding 1 at the end."
    h, w = ((n + 1 - 2) // 2 + 1 for n in x.shape[2:])
    x = F.pad(x, (0, 2 * w - x.shape[3], 0, 2 * h - x.shape[2]), value=float('-inf'))
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))


def interpret(cfg, sd, x, slope=0.1):
    units = [k[: -len('.conv.weight')] for k in sd if k.endswith('.conv.weight')]
    outs, maps = [], []
    for line in cfg:
        if line == 'M':
            y = pad_pool(x)
        elif line == '+':
            y = outs[-1] + outs[-3]
        else:
            nf, ks, stride = map(int, line.split('/'))
            k = units.pop(0)
            w, n = (
                sd[f'{k}.conv.weight'],
                {o: sd[f'{k}.norm.{o}'][:, None, None] for o in ('weight', 'bias', 'running_mean', 'running_var')},
            )
            assert w.shape == (nf // 8, x.shape[1], ks, ks)
            y = F.conv2d(x, w, stride=stride, padding=ks // 2)
            y = (y - n['running_mean']) / torch.sqrt(n['running_var'] + 0.00001) * n['weight'] + n['bias']
            y = torch.where(y > 0, y, slope * y)
        if y.shape[2:] != x.shape[2:]:
            maps.append(x)
        outs.append(y)
        x = y
    assert not units
    return [*maps, x]


@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('hw', [(64, 64), (75, 101)], ids=str)
def test_equals_the_cfg(name, hw):
    m = randomize_(make(name, variant='cfg', strides=every, **narrow)).eval().double()
    x = noise(*hw).double()
    with torch.no_grad():
        close(m(x), interpret(cfgs[name], m.state_dict(), x), 1e-11)


def test_the_head_of_darknet19():
    m = (
        randomize_(D.DarknetClassifier(make('darknet19', variant='cfg', strides=32, **narrow), 10, 'conv'))
        .eval()
        .double()
    )
    x = noise(75, 101, 2).double()
    sd = {k.removeprefix('body.'): v for k, v in m.state_dict().items() if k.startswith('body.')}
    with torch.no_grad():
        last = interpret(cfgs['darknet19'], sd, x)[-1]
        close([m(x)], [F.conv2d(last, m.head.weight, m.head.bias).mean((2, 3))], 1e-11)
        twin = D.DarknetClassifier(m.body, 10).double().eval()
        twin.head.load_state_dict(dict(weight=m.head.weight.flatten(1), bias=m.head.bias))
        close([twin(x)], [m(x)], 1e-11)


def test_what_the_variants_are():
    def kinds(m):
        return (
            {b.residual for s in m.stages for b in s.blocks},
            sum(isinstance(o, nn.MaxPool2d) for o in m.modules()),
            type(m.stem.act),
        )

    assert kinds(meta('darknet19')) == kinds(meta('darknet19', variant='vt')) == ({True}, 0, nn.ReLU)
    assert kinds(meta('darknet19', variant='cfg')) == ({False}, 5, nn.LeakyReLU)
    assert kinds(meta('darknet53')) == kinds(meta('darknet53', variant='timm')) == ({True}, 0, nn.LeakyReLU)
    assert kinds(meta('darknet53', variant='vt')) == ({True}, 0, nn.ReLU)


def test_block():
    b, x = D.DarknetBlock(8, hidden=6), torch.randn(2, 8, 5, 7)
    assert (
        b.conv1.conv.weight.shape == (6, 8, 1, 1)
        and b.conv2.conv.weight.shape == (8, 6, 3, 3)
        and D.DarknetBlock(8).conv1.conv.out_channels == 4
    )
    randomize_(b, x=x).eval()
    plain = D.DarknetBlock(8, hidden=6, residual=False).eval()
    plain.load_state_dict(b.state_dict())
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(b(x), x + plain(x)) and torch.equal(x, before)
    assert (b(x) < -0.5).any()  # no activation after the addition


# --- shapes


def up(n):
    return (n + 1) // 2


@pytest.mark.parametrize('name,variant', built)
def test_shapes(name, variant, slow_run):
    m = meta(name, variant=variant, strides=every)
    more = ((224, 224), (200, 200), (256, 256)) if slow_run else ()
    for hw in ((224, 200), (230, 310), (33, 95), (1, 1), *more):
        want = [hw]
        for _ in range(5):
            want.append(tuple(map(up, want[-1])))
        assert [tuple(o.shape) for o in m(torch.empty(2, 3, *hw, device='meta'))] == [
            (2, c, *o) for c, o in zip(m.channels, want)
        ]


@pytest.mark.parametrize('name,variant', built)
def test_channels(name, variant):
    m = meta(name, variant=variant)
    assert m.strides == (4, 8, 16, 32) and m.channels == (128, 256, 512, 1024) and m.training
    assert m.select(every).channels == (32, 64, 128, 256, 512, 1024)


def test_odd_sizes_run():
    for v in ('vt', 'cfg'):
        for o in out(make('darknet19', variant=v, **narrow).eval(), noise(57, 91)):
            assert o.isfinite().all()


# --- selection


@pytest.mark.parametrize('strides', [(8, 16, 32), (1,), (1, 2, 32), 32, (4, 32), None], ids=str)
@pytest.mark.parametrize('variant', ('vt', 'cfg'))
def test_selection_is_a_part_of_all_maps(strides, variant):
    m = make('darknet19', variant=variant, strides=strides, **narrow).eval()
    x = noise(32)
    with torch.no_grad():
        maps, all_maps = m(x), m.get_feature_maps(x)
    have = every if 1 in m.strides else every[1:]
    assert len(all_maps) == len(have)
    close(maps, [o for o, s in zip(all_maps, have) if s in m.strides])


@pytest.mark.parametrize(
    'strides,indices', [((2, 4, 8, 16, 32), (0, 1, 2, 3, 4)), ((8, 16, 32), (2, 3, 4)), ((32,), (4,)), ((2,), 0)]
)
def test_out_indices(strides, indices):
    assert meta('darknet53', out_indices=indices).strides == strides


def test_stride_1_is_a_map_that_no_default_selects_or_lists():
    m, x = meta('darknet53'), torch.empty(1, 3, 64, 64, device='meta')
    assert m.out_channels_list == [64, 128, 256, 512, 1024] == [o.shape[1] for o in m.get_feature_maps(x)]
    m.select((1, 8))
    assert m.out_channels_list == [32, 64, 128, 256, 512, 1024] == [o.shape[1] for o in m.get_feature_maps(x)]
    m.select()
    assert m.feature_info.reduction() == [4, 8, 16, 32] and m.select(1).feature_info.reduction() == [1]
    assert m.select(every).feature_info.reduction() == list(every)


def test_what_lies_behind_the_last_map_is_not_computed():
    m = make('darknet19', strides=8, **narrow)
    m(noise(n=2))[0].sum().backward()
    assert all(p.grad is not None for p in m.stages[2].parameters()) and all(
        p.grad is None for p in m.stages[3].parameters()
    )


@pytest.mark.parametrize(
    'kw,error,text',
    [
        (dict(strides=64), ValueError, 'no map at stride 64'),
        (dict(strides=(4, 6)), ValueError, 'strides 1, 2, 4, 8, 16, 32'),
        (dict(out_indices=(5,)), ValueError, 'no map at stride 64'),
        (dict(variant='timm'), ValueError, 'only vt, cfg'),
        (dict(down='avg'), ValueError, "expected one of 'conv', 'pool'"),
        (dict(blocks=(1, 1, 1)), ValueError, '3 values in blocks'),
        (dict(residuals=True), TypeError, "Did you mean 'residual'"),
        (dict(act='leaky'), ValueError, 'act'),
    ],
)
def test_errors(kw, error, text):
    with pytest.raises(error) as e:
        make('darknet19', **kw)
    assert text in str(e.value) and '\n' not in str(e.value)


def test_unknown_head():
    with pytest.raises(ValueError, match="got head='fc', expected one of 'linear', 'conv'"):
        D.DarknetClassifier(meta('darknet19'), head='fc')


def test_names():
    assert set(names) <= set(list_backbones('darknet*'))
    with pytest.raises(ValueError, match="'darknet53'"):
        make('darknet35')
    for n in names:
        assert getattr(D, n).__name__ == n


# --- training


@pytest.mark.parametrize('name,variant', built)
def test_gradients_reach_every_parameter(name, variant):
    m = make(name, variant=variant, strides=every, **narrow)
    sum((o * noise(o.shape[2], o.shape[3])[:, :1]).mean() for o in m(noise(n=2))).backward()
    assert [
        n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == []


@pytest.mark.parametrize('name,variant', built)
def test_parameter_groups(name, variant):
    m = meta(name, variant=variant)
    with torch.device('meta'):
        c = D.DarknetClassifier(m, 10)
    for o, n in ((m, 6), (c, 7)):
        groups = o.param_groups()
        assert len(groups) == n and Counter(id(p) for g in groups for p in g) == Counter(id(p) for p in o.parameters())
    assert [id(p) for p in groups[0]] == [id(p) for p in m.stem.parameters()] and [id(p) for p in groups[-1]] == [
        id(p) for p in c.head.parameters()
    ]
    m.freeze_to(2)
    assert not any(
        p.requires_grad for n, p in m.named_parameters() if n.startswith(('stem', 'stages.0.')) and 'norm' not in n
    )
    assert all(p.requires_grad for p in m.stages[1].parameters())
    m.freeze_to(0)
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize('variant', ('vt', 'cfg'))
def test_a_step_lowers_the_loss(variant):
    torch.manual_seed(0)
    m, x = D.DarknetClassifier(make('darknet19', variant=variant, strides=32, **thin), 4), noise(n=8)
    y, opt, losses = torch.arange(8) % 4, torch.optim.AdamW(m.parameters(), 3e-3), []
    for _ in range(8):
        loss = F.cross_entropy(m(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize('variant', ('vt', 'cfg'))
@pytest.mark.parametrize('kw', [dict(norm='gn', stem=32, outs=(64,) * 5), dict(act='silu'), dict(act=None)], ids=str)
def test_other_layers(variant, kw):
    m = make('darknet19', variant=variant, **(thin | kw)).eval()
    assert all(o.isfinite().all() for o in out(m, noise()))
    assert 'norm' not in kw or not any(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    assert 'act' not in kw or not any(isinstance(o, (nn.ReLU, nn.LeakyReLU)) for o in m.modules())


@pytest.mark.parametrize(
    'change',
    [lambda t: t.to(torch.bfloat16), lambda t: t.to(memory_format=torch.channels_last), lambda t: t.double()],
    ids=('bfloat16', 'channels_last', 'float64'),
)
def test_other_formats(change):
    m = randomize_(make('darknet19', **thin)).eval()
    want, got = out(m, noise()), out(change(copy.deepcopy(m)), change(noise()))
    close([o.float() for o in got], want, 0.1 if got[0].dtype == torch.bfloat16 else 1e-5)


# --- keys and graphs; test_matrix has copies and files of the default nets


@pytest.fixture(scope='module')
def nets():
    return {k: randomize_(make(k[0], variant=k[1], strides=every, **narrow | few[k[0]])).eval() for k in kept}


kept = [('darknet19', 'cfg'), ('darknet53', 'cfg')]


@pytest.mark.parametrize('how', copies)
@pytest.mark.parametrize('key', kept, ids='-'.join)
def test_copies(nets, key, how):
    m, x = nets[key], noise(33, 47)
    twin = copies[how](m)
    close(out(twin, x), out(m, x))
    assert twin.strides == m.strides and not {id(p) for p in twin.parameters()} & {id(p) for p in m.parameters()}


def test_keys():
    assert list(meta('darknet19').state_dict()) == list(meta('darknet19', variant='cfg').state_dict())
    sd = meta('darknet53').state_dict()
    for k in (
        'stem.conv.weight',
        'stem.norm.running_var',
        'stages.0.conv.conv.weight',
        'stages.2.blocks.7.conv2.norm.bias',
        'stages.4.blocks.3.conv1.conv.weight',
    ):
        assert k in sd


@pytest.mark.parametrize('key', [pytest.param(kept[0], marks=pytest.mark.slow), kept[1]], ids='-'.join)
def test_compiles_into_one_graph(nets, key):  # test_compile has the other one
    torch._dynamo.reset()
    close(out(torch.compile(nets[key], backend='eager', fullgraph=True), noise()), out(nets[key], noise()), 1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile(backend):
    torch._dynamo.reset()
    m, x = randomize_(make('darknet19', down='pool', **(thin | dict(blocks=(0, 1), outs=(16, 24))))).eval(), noise()
    close(out(torch.compile(m, backend=backend, fullgraph=True), x), out(m, x), 1e-5)


@pytest.mark.parametrize('key', kept, ids='-'.join)
def test_export(nets, key):
    m, x = nets[key], noise(57, 91)
    close(out(torch.export.export(m, (x,)).module(), x), out(m, x), 1e-6)


@pytest.mark.parametrize('variant', ('vt', 'cfg'))
def test_export_takes_any_size(variant):
    m, d = randomize_(make('darknet19', variant=variant, **thin)).eval(), torch.export.Dim.AUTO
    net = torch.export.export(m, (noise(96, 128, 2),), dynamic_shapes=({0: d, 2: d, 3: d},)).module()
    for x in (noise(96, 128, 2), noise(75, 101, 3), noise(200, 64, 2)):
        close(out(net, x), out(m, x), 1e-5)


def test_classifier_is_copied_and_exported():
    m, x = randomize_(D.DarknetClassifier(make('darknet19', variant='cfg', **thin), 10, 'conv')).eval(), noise()
    for how in copies.values():
        close([out(how(m), x)], [out(m, x)])
    close([out(torch.export.export(m, (x,)).module(), x)], [out(m, x)], 1e-6)


@pytest.mark.parametrize('variant', ('vt', 'cfg'))
def test_onnx(variant, tmp_path):
    import onnxruntime

    m, x = randomize_(make('darknet19', variant=variant, **thin)).eval(), noise(75, 101)
    torch.onnx.export(
        m, (x,), tmp_path / 'm.onnx', input_names=['x'], dynamo=False, dynamic_axes=dict(x={0: 'b', 2: 'h', 3: 'w'})
    )
    s = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    for x in (x, noise(96, 64, 2)):
        close([torch.from_numpy(o) for o in s.run(None, dict(x=x.numpy()))], out(m, x), 1e-5)
