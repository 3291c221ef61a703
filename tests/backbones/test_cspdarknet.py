import copy
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from timm.models.cspnet import CspStagesCfg, CspStemCfg
from torch import nn
from torch.nn import functional as F

from common import close, copies, noise, out

from backbones_nb.backbones import cspdarknet as C
from backbones_nb.backbones.csp import CSPStage
from backbones_nb.backbones.csp_convert import convert_split, swap_order
from backbones_nb.backbones.darknet import DarknetClassifier
from backbones_nb.analysis.parity import assert_parity, map_weights, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones

pytestmark = pytest.mark.usefixtures('quick_meta')
names = list(C.cspdarknet_configs)
built = [(n, v) for n in names for v in C.cspdarknet_variants[n]]
splits = ('convs', 'slice')
five, every = (2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)


@pytest.fixture
def sizes(slow_run):
    return (224, 200, (230, 310)) if slow_run else (96, (70, 110))


leaky = partial(nn.LeakyReLU, 0.1, inplace=True)
small = dict(blocks=(0, 1, 2), outs=(32, 48, 64), stem=16)
thin = dict(outs=(16, 24, 32, 40, 48), stem=16)  # every block of a net, with few channels
few = dict(cspdarknet53=dict(blocks=(1, 1, 2, 1, 1)), cspdarknet19={})  # a graph of fewer blocks of each kind


def make(name, **kw):
    return create_backbone(name, **kw)


def meta(name, **kw):
    with torch.device('meta'):
        return make(name, **kw)


def params(m):
    return sum(p.numel() for p in m.parameters())


def convs(m):
    return sum(isinstance(o, nn.Conv2d) for o in m.modules())


# --- numbers


@pytest.mark.parametrize(
    'kw,modules,body',
    [(dict(variant='cfg'), 72, 26_617_184), (dict(variant='timm'), 67, 26_617_184), (dict(variant='vt'), 67, 26_244)],
)
def test_parameters_of_53(kw, modules, body):
    m = meta('cspdarknet53', **kw)
    assert convs(m) == modules and (params(m) == body or round(params(m) / 1e3) == body)


def test_parameters_of_19():
    assert convs(meta('cspdarknet19')) == 30 and round(params(meta('cspdarknet19')) / 1e3) == 15_848


def test_with_a_classifier():
    with torch.device('meta'):
        m = DarknetClassifier(make('cspdarknet53', strides=32))
    assert params(m) == 27_642_184
    assert (
        params(m) - sum(p.numel() for o in m.modules() if isinstance(o, nn.BatchNorm2d) for p in o.parameters())
        == 27_606_856
    )  # published as 27.61 M


def test_the_default_is_the_cfg_with_two_convs():
    a, b = meta('cspdarknet53'), meta('cspdarknet53', variant='cfg', split='convs')
    assert repr(a) == repr(b) and list(a.state_dict()) == list(b.state_dict())
    assert all(o.negative_slope == 0.1 for o in a.modules() if isinstance(o, nn.LeakyReLU))


@pytest.mark.parametrize('name,variant', built)
def test_the_split_changes_no_number(name, variant):
    a, b = (meta(name, variant=variant, split=s) for s in splits)
    assert params(a) == params(b) and convs(a) - convs(b) == sum(n > 0 for n in C.cspdarknet_configs[name]['blocks'])


# --- parity with timm


def thin_timm():
    "timm's net with as few channels as `thin`; cli/test_parity.py compares the parameters of the whole one."
    conf = timm.models.cspnet.model_cfgs['cspdarknet53']
    return dict(
        stem=replace(conf.stem, out_chs=thin['stem']),
        stages=replace(conf.stages, out_chs=thin['outs']),
    )


def reference(**kw):
    kw = thin_timm() | kw
    return randomize_(timm.create_model('cspdarknet53', features_only=True, out_indices=(1, 2, 3, 4, 5), **kw))


@pytest.fixture(scope='module')
def theirs():
    return reference()


def from_timm(ref, split, cs3=False, name='cspdarknet53', **kw):
    "Our net with timm's weights; a cs3 stage has the blocks' half first, in the split and in the concatenation."
    sd = map_weights(ref, make(name, split='slice', **kw), C.cspdarknet_timm_renames).state_dict()
    m = make(name, split=split, strides=five, **kw)
    if cs3:
        sd = convert_split(convert_split(sd, to='convs', first='main'), to='slice')
    if {o.order for o in m.modules() if isinstance(o, CSPStage)} == {'cross' if cs3 else 'blocks'}:
        sd = swap_order(sd)
    if split == 'convs':
        sd = convert_split(sd, to='convs')
    m.load_state_dict(sd, strict=True)
    return m


@pytest.mark.parametrize('split', splits)
def test_parity_with_timm(theirs, split, sizes):
    m = from_timm(theirs, split, variant='timm', **thin)
    assert len(assert_parity(m, theirs, sizes=sizes, batch=1, tol=1e-5)) == 5 * len(sizes)
    assert (
        m.feature_info.channels() == theirs.feature_info.channels()
        and m.feature_info.reduction() == theirs.feature_info.reduction()
    )


orders = [
    ('cross', torch.float32, 1e-5),
    ('blocks', torch.float64, 1e-11),
]  # the same sums in another order: float64 keeps rounding apart


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize('order,dtype,tol', orders, ids=('cross', 'blocks'))
def test_the_cfg_is_timm_with_slope_01_and_the_other_order(split, order, dtype, tol, sizes):
    ref = reference(act_layer=leaky)
    assert all(o.negative_slope == 0.1 for o in ref.modules() if isinstance(o, nn.LeakyReLU))
    m = from_timm(ref, split, variant='cfg', order=order, **thin)
    assert_parity(m, ref, sizes=sizes, batch=1, tol=tol, dtype=dtype)


@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize(
    'order,dtype,tol', [('blocks', torch.float32, 1e-5), ('cross', torch.float64, 1e-11)], ids=('blocks', 'cross')
)
def test_vision_toolbox_is_timm_with_cs3_stages(name, split, order, dtype, tol, sizes):
    blocks = C.cspdarknet_configs[name]['blocks']
    stages = CspStagesCfg(
        depth=blocks,
        out_chs=thin['outs'],
        stride=2,
        block_ratio=0.5,
        bottle_ratio=1.0,
        down_growth=True,
        stage_type=tuple('cs3' if n else 'dark' for n in blocks),
        block_type='dark',
    )
    ref = reference(stem=CspStemCfg(out_chs=thin['stem'], stride=1, pool=''), stages=stages, act_layer='relu')
    m = from_timm(ref, split, cs3=True, name=name, variant='vt', order=order, **thin)
    assert_parity(m, ref, sizes=sizes, batch=1, tol=tol, dtype=dtype)


@pytest.mark.parametrize('split', splits)
def test_logits(split):
    ref = randomize_(timm.create_model('cspdarknet53', **thin_timm())).eval()
    sd = {k: v for k, v in ref.state_dict().items() if not k.startswith('head.')}
    m = DarknetClassifier(from_timm(sd, split, variant='timm', **thin).select(32)).eval()
    m.head.load_state_dict(ref.head.fc.state_dict())
    for x in (noise(96), noise(70, 110)):
        close([out(m, x)], [out(ref, x)], 1e-5)


def test_parity_tells_order_and_slope_apart(theirs):
    sd = from_timm(theirs, 'slice', variant='timm', **thin).state_dict()
    for kw in (dict(order='blocks'), dict(act='leaky_relu')):
        m = make('cspdarknet53', variant='timm', split='slice', strides=five, **thin, **kw)
        m.load_state_dict(sd, strict=True)
        with pytest.raises(AssertionError, match='relative error'):
            assert_parity(m, theirs, 64, batch=1)


# --- conversion of the whole net


@pytest.mark.parametrize('name,variant', built)
@pytest.mark.parametrize('there,back', [splits, splits[::-1]])
def test_conversion_is_exact(name, variant, there, back):
    a = randomize_(make(name, variant=variant, split=there, strides=every, **thin)).eval().double()
    b = make(name, variant=variant, split=back, strides=every, **thin).eval().double()
    sd = a.state_dict()
    b.load_state_dict(convert_split(sd, to=back), strict=True)
    x = noise(45, 71).double()
    close(out(b, x), out(a, x), 1e-12)
    again = convert_split(b.state_dict(), to=there)
    assert list(sorted(again)) == sorted(sd) and all(torch.equal(v, again[k]) for k, v in sd.items())


@pytest.mark.parametrize('there,back', [splits, splits[::-1]])
def test_a_whole_net_converts_too(there, back):
    a = randomize_(make('cspdarknet53', split=there, strides=(8, 32), **thin)).eval()
    keys = list(a.state_dict())
    b = convert_split(a, to=back)
    assert (
        list(b.state_dict()) == list(meta('cspdarknet53', split=back, **thin).state_dict())
        and list(a.state_dict()) == keys
    )
    assert b.strides == (8, 32) and not b.training and len(b.param_groups()) == 6
    x = noise(75, 101)
    close(out(b.double(), x.double()), out(a.double(), x.double()), 1e-12)


def test_swapping_the_order_twice_changes_nothing():
    sd = make('cspdarknet53', **small).state_dict()
    once = swap_order(sd)
    again = swap_order(once)
    assert list(again) == list(sd) and all(torch.equal(v, again[k]) for k, v in sd.items())
    assert sum(not torch.equal(v, once[k]) for k, v in sd.items()) == 2


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize('transition', ('both', 'first'))
def test_swapped_weights_in_the_other_order_are_the_same_function(split, transition):
    kw = dict(small, split=split, transition=transition, strides=(2, 4, 8))
    a, b = (make('cspdarknet53', order=o, **kw).eval().double() for o in ('blocks', 'cross'))
    randomize_(a)
    b.load_state_dict(swap_order(a.state_dict()), strict=True)
    x = noise(40, 56).double()
    close(out(b, x), out(a, x), 1e-12)


# --- csdarknet53.cfg, layer by layer: routes and shortcuts look back over the list of all outputs


def cfg_maps(sd, x, blocks, outs, slope=0.1):
    "All maps, finest first; the weights are taken one after the other."
    names = iter([k[: -len('.conv.weight')] for k in sd if k.endswith('.conv.weight')])
    seen, maps = [], []

    def conv(stride=1):
        k = next(names)
        w = sd[f'{k}.conv.weight']
        g, b, m, v = (sd[f'{k}.norm.{o}'][:, None, None] for o in ('weight', 'bias', 'running_mean', 'running_var'))
        y = F.conv2d(seen[-1] if seen else x, w, stride=stride, padding=w.shape[2] // 2)
        seen.append(F.leaky_relu((y - m) / (v + 1e-5).sqrt() * g + b, slope))

    def route(*places):
        seen.append(torch.cat([seen[i] for i in places], 1))

    conv()
    for n in blocks:
        maps.append(seen[-1])
        conv(2)
        conv()
        route(-2)
        conv()
        for _ in range(n):
            conv()
            conv()
            seen.append(seen[-1] + seen[-3])
        conv()
        route(-1, -3 * n - 4)
        conv()
    assert next(names, None) is None
    return [*maps, seen[-1]]


@pytest.mark.parametrize('kw', [thin, dict(blocks=(1, 1, 2), outs=(32, 48, 64))], ids=('53', 'small'))
def test_equals_the_cfg(kw):
    m = randomize_(make('cspdarknet53', **kw)).eval().double()
    m.select([r['reduction'] for r in m.rows])
    for hw in ((64, 64), (75, 101)):
        x = noise(*hw).double()
        close(out(m, x), out(lambda x: cfg_maps(m.state_dict(), x, kw.get('blocks', (1, 2, 8, 8, 4)), None), x), 1e-11)


# --- shapes


@pytest.mark.parametrize(
    'name,variant,split', [(n, v, 'convs') for n, v in built] + [(n, 'vt', 'slice') for n in names]
)
def test_shapes(name, variant, split, slow_run):
    m = meta(name, variant=variant, split=split, strides=every)
    assert m.channels == (32, 64, 128, 256, 512, 1024)
    more = ((224, 224), (256, 256), (200, 200)) if slow_run else ()
    for h, w in ((224, 200), (230, 310), (33, 95), *more):
        want = [(2, c, -(-h // s), -(-w // s)) for c, s in zip(m.channels, every)]
        assert [tuple(o.shape) for o in m(torch.empty(2, 3, h, w, device='meta'))] == want


@pytest.mark.parametrize('name', names)
def test_channels(name):
    m = meta(name)
    assert m.strides == (4, 8, 16, 32) and m.channels == (128, 256, 512, 1024) and m.training
    assert m.out_channels_list == [64, 128, 256, 512, 1024]


def test_first_stage():
    def widths(i, **kw):
        return [o.shape[0] for o in meta('cspdarknet53', **kw).stages[i].state_dict().values() if o.dim() == 4]

    assert widths(0) == [64, 64, 64, 32, 64, 64, 64] and widths(0, first='half') == [64, 32, 32, 32, 32, 32, 64]
    assert widths(1) == widths(1, first='half')
    assert widths(0, variant='vt') == [64, 32, 32, 32, 32, 64] and [
        *dict(meta('cspdarknet19').stages[0].named_children())
    ] == ['down']


# --- selection


@pytest.mark.parametrize('strides', [(8, 16, 32), (2,), 32, 1, (4, 32), None], ids=str)
@pytest.mark.parametrize('split', splits)
def test_selection_is_a_part_of_all_maps(strides, split):
    m = make('cspdarknet19', split=split, strides=strides, **thin).eval()
    x = noise()
    maps = out(m.get_feature_maps, x)
    assert len(maps) == (6 if 1 in m.strides else 5)
    close(out(m, x), [o for o, s in zip(maps, every[-len(maps) :]) if s in m.strides])


@pytest.mark.parametrize('strides,indices', [(five, (0, 1, 2, 3, 4)), ((8, 16, 32), (2, 3, 4)), ((32,), (4,))])
def test_out_indices(strides, indices):
    assert meta('cspdarknet53', out_indices=indices).strides == strides


def test_what_lies_behind_the_last_map_is_not_computed():
    m = make('cspdarknet19', strides=8, **thin)
    m(noise(n=2))[0].sum().backward()
    assert all(p.grad is not None for p in m.stages[2].parameters()) and all(
        p.grad is None for p in m.stages[3].parameters()
    )


@pytest.mark.parametrize(
    'kw,error,text',
    [
        (dict(strides=64), ValueError, 'no map at stride 64'),
        (dict(variant='mmdet'), ValueError, 'only cfg, timm, vt'),
        (dict(split='chunk'), ValueError, "split='chunk'"),
        (dict(order='any'), ValueError, "order='any'"),
        (dict(transition='none'), ValueError, "transition='none'"),
        (dict(first='all'), ValueError, "'full', 'half'"),
        (dict(splitt='slice'), TypeError, "Did you mean 'split'"),
        (dict(blocks=(1, 2, 8)), ValueError, '3 values in blocks and 5 in outs'),
        (dict(act='rellu'), ValueError, 'act'),
        (dict(pretrained='coco'), ValueError, 'weights'),
    ],
)
def test_errors(kw, error, text):
    with pytest.raises(error) as e:
        make('cspdarknet53', **kw)
    assert text in str(e.value) and '\n' not in str(e.value)


def test_19_is_vision_toolboxs_only():
    with pytest.raises(ValueError, match='only vt'):
        make('cspdarknet19', variant='cfg')


def test_names():
    assert set(names) <= set(list_backbones('cspdark*'))
    for n in names:
        assert getattr(C, n).__name__ == n


# --- training


@pytest.mark.parametrize('name,variant', built)
@pytest.mark.parametrize('split', splits)
def test_gradients_reach_every_parameter(name, variant, split):
    m = make(name, variant=variant, split=split, strides=every, **thin)
    sum((o * noise(o.shape[2], o.shape[3])[:, :1]).sum() for o in m(noise(n=2))).backward()
    assert [
        n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == []


@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('split', splits)
def test_parameter_groups(name, split):
    m = meta(name, split=split)
    groups = m.param_groups()
    assert len(groups) == 6 and Counter(id(p) for g in groups for p in g) == Counter(id(p) for p in m.parameters())
    assert [id(p) for g in groups for p in g] == [id(p) for p in m.parameters()]
    m.freeze_to(2)
    assert not any(p.requires_grad for n, p in m.named_parameters() if n.startswith('stages.0.') and 'norm' not in n)
    assert all(p.requires_grad for p in m.stages[1].parameters())


@pytest.mark.parametrize('split', splits)
def test_a_step_lowers_the_loss(split):
    torch.manual_seed(0)
    m, x = (
        make('cspdarknet53', split=split, strides=8, **small),
        noise(n=4) * torch.arange(1.0, 5)[:, None, None, None],
    )  # contrast tells the images apart
    opt, losses = torch.optim.AdamW(m.parameters(), 3e-3), []
    for _ in range(24):
        loss = (m(x)[0].mean((1, 2, 3)) - torch.arange(4.0) / 4).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize(
    'kw', [dict(norm=partial(nn.GroupNorm, 8)), dict(act='silu'), dict(act='mish')], ids=('gn', 'silu', 'mish')
)
def test_other_layers(split, kw):
    assert all(o.isfinite().all() for o in out(make('cspdarknet53', split=split, **small | kw).eval(), noise()))


@pytest.mark.parametrize(
    'change',
    [lambda t: t.to(torch.bfloat16), lambda t: t.to(memory_format=torch.channels_last), lambda t: t.double()],
    ids=('bfloat16', 'channels_last', 'float64'),
)
@pytest.mark.parametrize('split', splits)
def test_other_formats(change, split):
    m = randomize_(make('cspdarknet53', split=split, **small)).eval()
    want, got = out(m, noise()), out(change(copy.deepcopy(m)), change(noise()))
    close([o.float() for o in got], want, 0.1 if got[0].dtype == torch.bfloat16 else 1e-5)


# --- graphs; test_matrix has the default net's copies and files

cases = [(n, s) for n in names for s in splits]


@pytest.fixture(scope='module')
def nets():
    return {c: randomize_(make(c[0], split=c[1], strides=every, **thin | few[c[0]])).eval() for c in cases}


@pytest.mark.parametrize('how', copies)
def test_copies(nets, how):
    m, x = nets['cspdarknet53', 'slice'], noise()
    twin = copies[how](m)
    close(out(twin, x), out(m, x))
    assert twin.strides == m.strides and not {id(p) for p in twin.parameters()} & {id(p) for p in m.parameters()}


def test_weights_of_one_split_do_not_load_into_the_other():
    for a, b in (splits, splits[::-1]):
        with pytest.raises(RuntimeError, match='Missing key'):
            make('cspdarknet53', split=a, **small).load_state_dict(make('cspdarknet53', split=b, **small).state_dict())


@pytest.mark.parametrize('case', [(names[0], 'slice'), (names[1], 'convs')], ids='-'.join)
def test_compiles_into_one_graph(nets, case):
    torch._dynamo.reset()
    x = noise()
    close(out(torch.compile(nets[case], backend='eager', fullgraph=True), x), out(nets[case], x), 1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize(
    'split,backend',
    [('slice', 'aot_eager'), *(pytest.param(o, 'inductor', marks=pytest.mark.slow) for o in splits)],
)
def test_compile(split, backend):
    torch._dynamo.reset()
    m, x = randomize_(make('cspdarknet53', split=split, blocks=(0, 1), outs=(32, 48), stem=16)).eval(), noise()
    close(out(torch.compile(m, backend=backend, fullgraph=True), x), out(m, x), 1e-5)


@pytest.mark.parametrize('case', cases, ids='-'.join)
def test_export(nets, case):
    m, x = nets[case], noise()
    close(out(torch.export.export(m, (x,)).module(), x), out(m, x), 1e-6)


@pytest.mark.parametrize('split', splits)
def test_export_takes_any_size(split):
    m, d = randomize_(make('cspdarknet53', split=split, **small)).eval(), torch.export.Dim.AUTO
    net = torch.export.export(m, (noise(96, 128, 2),), dynamic_shapes=({0: d, 2: d, 3: d},)).module()
    for x in (noise(96, 128, 2), noise(75, 101, 3), noise(200, 64, 2)):
        close(out(net, x), out(m, x), 1e-5)


@pytest.mark.parametrize('split', splits)
def test_onnx(split, tmp_path):
    import onnxruntime

    m, x = randomize_(make('cspdarknet53', split=split, **small)).eval(), noise(75, 101)
    torch.onnx.export(
        m, (x,), tmp_path / 'm.onnx', input_names=['x'], dynamo=False, dynamic_axes=dict(x={0: 'b', 2: 'h', 3: 'w'})
    )
    s = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    for x in (x, noise(96, 64, 2)):
        close([torch.from_numpy(o) for o in s.run(None, dict(x=x.numpy()))], out(m, x), 1e-5)
