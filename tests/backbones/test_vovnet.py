import copy
import shutil
from collections import Counter

import pytest
import timm
import torch
from torch.nn import functional as F

from common import close, noise, out

from backbones_nb.backbones import vovnet as V
from backbones_nb.analysis.parity import assert_parity, map_weights, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones

pytestmark = pytest.mark.usefixtures('quick_meta')
names = list(V.vovnet_configs)
built = [(n, v) for n in names for v in V.vovnet_variants(n)]
v1 = dict(residual=False, ese=False)
every = (2, 4, 8, 16, 32)


@pytest.fixture
def sizes(slow_run):
    return (64, 75, (70, 110)) if slow_run else (64, (75, 110))


def make(name, **kw):
    return create_backbone(name, **kw)


def meta(name, **kw):
    with torch.device('meta'):
        return make(name, **kw)


def config(name, variant='official', **kw):
    "The arguments of a net, those that have a default included."
    return (
        dict(stem=(64, 64, 128), mids=(128, 160, 192, 224), outs=(256, 512, 768, 1024), blocks=(1, 1, 1, 1))
        | dict(residual=True, pool='official')
        | V.vovnet_configs[name]
        | V.vovnet_variants(name)[variant]
        | kw
    )


def thin(name, **kw):
    "Every block of a net, with an eighth of its channels."
    return {k: tuple(n // 8 for n in config(name, **kw)[k]) for k in ('stem', 'mids', 'outs')}


# --- numbers of the table, millions: V1, eSE in all blocks, eSE in the last of a stage

table = dict(
    vovnet19_slim=(2.164, 2.653, 2.653),
    vovnet19=(None, 10.180, 10.180),
    vovnet19_slim_dw=(None, 1.385, 1.385),
    vovnet19_dw=(None, 5.518, 5.518),
    vovnet27_slim=(3.013, None, None),
    vovnet39=(21.575, 25.184, 23.544),
    vovnet57=(35.615, 41.455, 37.584),
    vovnet99=(60.206, 69.524, 62.174),
)
kinds = dict(zip(('v1', 'all', 'last'), (v1, dict(ese='all'), dict(ese='last'))))


def millions(name, **kw):
    return round(sum(p.numel() for p in meta(name, **kw).parameters()) / 1e6, 3)


@pytest.mark.parametrize('name,kind,want', [(n, k, w) for n, row in table.items() for k, w in zip(kinds, row) if w])
def test_parameters(name, kind, want):
    assert millions(name, **kinds[kind]) == want


@pytest.mark.parametrize('name,want', [(n, row[1] or row[0]) for n, row in table.items()])
def test_parameters_of_the_default(name, want):
    assert millions(name) == want and millions(name, variant='official') == want


@pytest.mark.parametrize('name,want', [('vovnet39', 22.600), ('vovnet57', 36.640)])
def test_parameters_with_a_classifier(name, want):
    assert millions(name, **v1) + (1024 * 1000 + 1000) / 1e6 == pytest.approx(want, abs=5e-4)


# --- parity with timm: the name (and arguments where timm has no name), ours

pairs = [
    ('vovnet39a', {}, 'vovnet39', v1),
    ('vovnet57a', {}, 'vovnet57', v1),
    ('vovnet39a', dict(residual=True), 'vovnet39', dict(ese=False)),
    ('vovnet57a', dict(residual=True), 'vovnet57', dict(ese=False)),
    (
        'vovnet39a',
        dict(stage_conv_chs=[64, 80, 96, 112], stage_out_chs=[128, 256, 384, 512], block_per_stage=[1, 1, 1, 1]),
        'vovnet27_slim',
        dict(variant='timm'),
    ),
    ('ese_vovnet39b', dict(layer_per_block=3, block_per_stage=[1, 1, 1, 1]), 'vovnet19', dict(variant='timm')),
] + [
    (f'ese_vovnet{n}', {}, 'vovnet' + n.replace('b', ''), dict(variant='timm'))
    for n in ('19b_slim', '19b_slim_dw', '19b_dw', '39b', '57b', '99b')
]


def reference(name, **kw):
    return randomize_(timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3, 4), **kw))


def narrow(name, kw):
    "Arguments of timm for a net as narrow as ours with `thin`."
    o = thin(name, **kw)
    return dict(stem_chs=list(o['stem']), stage_conv_chs=list(o['mids']), stage_out_chs=list(o['outs']))


@pytest.mark.parametrize(
    'ref,ref_kw,name,kw',
    # in an eighth of the channels; the deep nets repeat the blocks of these
    # cli/test_parity.py compares the parameters of all of them in every run
    [pytest.param(*o, marks=pytest.mark.slow) if o[2] in ('vovnet57', 'vovnet99') else o for o in pairs],
    ids=[f"{r}{'+' if k else ''}-{n}{'+res' if o == {'ese': False} else ''}" for r, k, n, o in pairs],
)
def test_parity_with_timm(ref, ref_kw, name, kw, sizes):
    ref = reference(ref, **ref_kw | narrow(name, kw))
    ours = map_weights(ref, make(name, strides=every, **kw, **thin(name, **kw)), V.vovnet_timm_renames)
    assert len(assert_parity(ours, ref, sizes=sizes, batch=1, tol=1e-5)) == 5 * len(sizes)
    info = ours.feature_info
    assert info.channels() == ref.feature_info.channels() and info.reduction() == ref.feature_info.reduction()


def test_renames_take_whole_models_of_timm_without_their_head():
    sd = {k: v for k, v in timm.create_model('ese_vovnet19b_slim_dw').state_dict().items() if not k.startswith('head.')}
    ours = map_weights(sd, make('vovnet19_slim_dw'), V.vovnet_timm_renames)
    assert torch.equal(ours.stages[1].blocks[0].ese.fc.weight, sd['stages.1.blocks.0.attn.fc.weight'])


def test_parity_tells_a_wrong_rule_apart():
    "eSE in all blocks, or no identity, is another function: the comparison must see it."
    kw = thin('vovnet39')
    ref = reference('ese_vovnet39b', **narrow('vovnet39', {}))
    with pytest.raises(ValueError, match='left over'):
        map_weights(ref, make('vovnet39', **kw), V.vovnet_timm_renames)
    ours = make('vovnet39', variant='timm', residual=False, strides=every, **kw)
    map_weights(ref, ours, V.vovnet_timm_renames)
    with pytest.raises(AssertionError, match='relative error'):
        assert_parity(ours, ref, 64)


# --- a second forward pass in plain functions, from the state dict and the papers' formulas, for what timm lacks


def naive(sd, x, outs, blocks, residual, early):
    "All maps, finest first; depth-wise layers, eSE and reductions are where the state dict has them."

    def unit(k, x, stride=1):
        if f'{k}.dw.weight' in sd:
            w = sd[f'{k}.dw.weight']
            x = F.conv2d(
                F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=x.shape[1]), sd[f'{k}.pw.weight']
            )
        else:
            x = F.conv2d(x, sd[f'{k}.conv.weight'], stride=stride, padding=sd[f'{k}.conv.weight'].shape[2] // 2)
        g, b, m, v = (sd[f'{k}.norm.{o}'][:, None, None] for o in ('weight', 'bias', 'running_mean', 'running_var'))
        return ((x - m) / (v + 1e-5).sqrt() * g + b).clamp(min=0)

    def pool(x):  # largest of 3x3 at every second place; official: the first window at the edge, vt: centerd on it
        h, w = x.shape[2:]
        begins = [
            [i for i in range(-1 if early else 0, n, 2) if (i + 1 < n if early else i == 0 or i + 1 < n)]
            for n in (h, w)
        ]

        def box(i, n):
            return slice(max(i, 0), min(i + 3, n))

        return torch.stack(
            [torch.stack([x[:, :, box(i, h), box(j, w)].amax((2, 3)) for j in begins[1]], -1) for i in begins[0]], -2
        )

    def block(k, x, add):
        maps, h = [x], unit(f'{k}.reduce', x) if any(o.startswith(f'{k}.reduce.') for o in sd) else x
        n = len({o.split('.')[5] for o in sd if o.startswith(f'{k}.layers.')})
        for i in range(n):
            h = unit(f'{k}.layers.{i}', h)
            maps.append(h)
        y = unit(f'{k}.concat', torch.cat(maps, 1))
        if f'{k}.ese.fc.weight' in sd:
            z = y.flatten(2).mean(2) @ sd[f'{k}.ese.fc.weight'][:, :, 0, 0].T + sd[f'{k}.ese.fc.bias']
            y = y * ((z + 3) / 6).clamp(0, 1)[:, :, None, None]
        return y + x if add else y

    x = unit('stem.1', unit('stem.0', x, 2))
    maps = [x]
    x = unit('stem.2', x, 1 if early else 2)
    if early:
        maps = [x]
    for s, (nf, n) in enumerate(zip(outs, blocks)):
        if early or s:
            x = pool(x)
        for j in range(n):
            x = block(
                f'stages.{s}.blocks.{j}', x, residual == 'same' and x.shape[1] == nf or residual is True and j > 0
            )
        maps.append(x)
    return maps


cases = [
    ('vovnet39', {}),
    ('vovnet39', dict(variant='vt')),
    ('vovnet39', dict(variant='vt', **v1)),
    ('vovnet39', dict(variant='timm')),
    ('vovnet39', dict(residual='same')),
    ('vovnet19_slim', dict(variant='vt')),
    ('vovnet19_slim_dw', {}),
    ('vovnet19_dw', dict(pool='vt')),
    ('vovnet27_slim', {}),
    ('vovnet27_slim', dict(variant='vt')),
    ('vovnet99', dict(variant='vt')),
]


@pytest.mark.parametrize('name,kw', cases, ids=lambda o: str(o).replace(' ', ''))
def test_equals_the_formulas(name, kw):
    conf = config(name, **kw) | thin(name, **kw)
    # float64: rounding is far below the bound, a wrong rule far above
    m = randomize_(make(name, strides=every, **kw, **thin(name, **kw))).eval().double()
    for hw in ((64, 64), (75, 101)):
        x = noise(*hw).double()
        with torch.no_grad():
            close(
                m(x),
                naive(m.state_dict(), x, conf['outs'], conf['blocks'], conf['residual'], conf['pool'] == 'vt'),
                1e-11,
            )


def test_slim_of_vision_toolbox_adds_the_identity_in_its_first_block_too():
    def added(m):
        return [[b.residual for b in s.blocks] for s in m.stages]

    assert added(meta('vovnet19_slim', variant='vt')) == [[True], [False], [False], [False]]
    assert (
        added(meta('vovnet39', variant='vt'))
        == added(meta('vovnet39'))
        == [[False], [False], [False, True], [False, True]]
    )
    assert not any(sum(added(meta('vovnet99', residual=False)), []))


@pytest.mark.parametrize(
    'ese,where', [(True, [1, 3, 9, 3]), ('all', [1, 3, 9, 3]), ('last', [1, 1, 1, 1]), (False, [0, 0, 0, 0])]
)
def test_where_ese_sits(ese, where):
    m = meta('vovnet99', ese=ese)
    assert [sum(b.ese is not None for b in s.blocks) for s in m.stages] == where
    if ese:
        assert all(s.blocks[-1].ese is not None for s in m.stages)


# --- shapes


def expected(size, vt):
    up = lambda n: (n + 1) // 2
    two = up(size)
    four = up(two)
    return [two, four] + [
        f(four)
        for f in (
            [up, lambda n: up(up(n)), lambda n: up(up(up(n)))]
            if vt
            else [lambda n: n // 2, lambda n: n // 4, lambda n: n // 8]
        )
    ]


@pytest.mark.parametrize('name,variant', built)
def test_shapes(name, variant, slow_run):
    m = meta(name, variant=variant, strides=every)
    more = ((224, 224), (200, 200), (64, 96)) if slow_run else ()
    for hw in ((224, 200), (230, 310), (33, 95), *more):
        h, w = (expected(n, variant == 'vt') for n in hw)
        assert [tuple(o.shape) for o in m(torch.empty(2, 3, *hw, device='meta'))] == [
            (2, *o) for o in zip(m.channels, h, w)
        ]


def test_sizes_at_200_px():
    x = torch.empty(1, 3, 200, 200, device='meta')
    assert [o.shape[-1] for o in meta('vovnet39')(x)] == [50, 25, 12, 6]
    assert [o.shape[-1] for o in meta('vovnet39', variant='vt')(x)] == [50, 25, 13, 7]


@pytest.mark.parametrize('name', ('vovnet19_slim', 'vovnet39'))
def test_tap_at_stride_2(name):
    "The official placement has one convolution of the stem before the next stride; in vision-toolbox's the whole stem."
    for variant, channels, module in (('official', 64, 'stem.1'), ('timm', 64, 'stem.1'), ('vt', 128, 'stem.2')):
        m = meta(name, variant=variant, strides=2)
        assert m.channels == (channels,) and m.feature_info.module_name() == [module]
        assert m(torch.empty(1, 3, 64, 64, device='meta'))[0].shape == (1, channels, 32, 32)


@pytest.mark.parametrize('name', names)
def test_channels(name):
    m = meta(name)
    assert m.strides == (4, 8, 16, 32) and len(m.channels) == 4 and m.training
    assert m.out_channels_list == [64, *m.channels]


# --- selection


@pytest.mark.parametrize('strides', [(8, 16, 32), (2,), 32, (4, 32), None], ids=str)
@pytest.mark.parametrize('variant', ('official', 'timm', 'vt'))
def test_selection_is_a_part_of_all_maps(strides, variant):
    m = make('vovnet19_slim', variant=variant, strides=strides).eval()
    x = noise()
    with torch.no_grad():
        maps, all_maps = m(x), m.get_feature_maps(x)
    close(maps, [o for o, s in zip(all_maps, every) if s in m.strides])


@pytest.mark.parametrize(
    'strides,indices', [((2, 4, 8, 16, 32), (0, 1, 2, 3, 4)), ((8, 16, 32), (2, 3, 4)), ((32,), (4,))]
)
def test_out_indices(strides, indices):
    assert meta('vovnet39', out_indices=indices).strides == strides


def test_what_lies_behind_the_last_map_is_not_computed():
    m = make('vovnet19_slim', strides=8)
    m(noise(n=2))[0].sum().backward()
    assert all(p.grad is not None for p in m.stages[1].parameters()) and all(
        p.grad is None for p in m.stages[2].parameters()
    )


@pytest.mark.parametrize(
    'kw,error,text',
    [
        (dict(strides=64), ValueError, 'no map at stride 64'),
        (dict(strides=(4, 6)), ValueError, 'strides 2, 4, 8, 16, 32'),
        (dict(out_indices=(5,)), ValueError, 'no map at stride 64'),
        (dict(variant='mmdet'), ValueError, 'only official, timm, vt'),
        (dict(ese='first'), ValueError, "got ese='first', expected one of True, 'all', 'last', False"),
        (dict(residual='identity'), ValueError, 'residual'),
        (dict(pool='max'), ValueError, "'official', 'vt'"),
        (dict(esse=True), TypeError, "Did you mean 'ese'"),
        (dict(act='rellu'), ValueError, 'act'),
        (dict(blocks=(1, 1, 1)), ValueError, '3 blocks'),
        (dict(stem=(64, 128)), ValueError, '2 channels for the stem'),
        (dict(pretrained='coco'), ValueError, 'weights'),
    ],
)
def test_errors(kw, error, text):
    with pytest.raises(error) as e:
        make('vovnet39', **kw)
    assert text in str(e.value) and '\n' not in str(e.value)


def test_vision_toolbox_has_no_depthwise_nets():
    with pytest.raises(ValueError, match='only official, timm'):
        make('vovnet19_dw', variant='vt')


def test_names():
    assert set(names) <= set(list_backbones('*vovnet*'))
    with pytest.raises(ValueError, match="'vovnet39'"):
        make('vovnet93')
    for n in names:
        assert getattr(V, n).__name__ == n


# --- training


@pytest.mark.parametrize('name,variant', built)
def test_gradients_reach_every_parameter(name, variant):
    m = make(name, variant=variant, strides=every, **thin(name, variant=variant))
    sum((o * noise(o.shape[2], o.shape[3])[:, :1]).sum() for o in m(noise(n=2))).backward()
    assert [
        n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == []


@pytest.mark.parametrize('name', names)
def test_parameter_groups(name):
    m = meta(name)
    groups = m.param_groups()
    assert len(groups) == 5 and Counter(id(p) for g in groups for p in g) == Counter(id(p) for p in m.parameters())
    m.freeze_to(2)
    assert not any(p.requires_grad for n, p in m.named_parameters() if n.startswith('stages.0.') and 'norm' not in n)
    assert all(p.requires_grad for p in m.stages[1].parameters())


def test_a_step_lowers_the_loss():
    torch.manual_seed(0)
    m, x = make('vovnet19_slim_dw', strides=32), noise(n=4)
    opt, losses = torch.optim.AdamW(m.parameters(), 1e-3), []
    for _ in range(6):
        loss = (m(x)[0].mean((2, 3))[:, 0] - torch.arange(4.0)).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize('name', ('vovnet19_slim', 'vovnet19_dw'))
@pytest.mark.parametrize(
    'kw', [dict(norm='gn', mids=(64,) * 4, outs=(128,) * 4), dict(act='silu'), dict(act='leaky_relu')], ids=str
)
def test_other_layers(name, kw):
    with torch.no_grad():
        assert all(o.isfinite().all() for o in make(name, **kw).eval()(noise()))


@pytest.mark.parametrize(
    'change',
    [lambda t: t.to(torch.bfloat16), lambda t: t.to(memory_format=torch.channels_last), lambda t: t.double()],
    ids=('bfloat16', 'channels_last', 'float64'),
)
def test_other_formats(change):
    m = randomize_(make('vovnet19_slim')).eval()
    with torch.no_grad():
        want = m(noise())
        got = change(copy.deepcopy(m))(change(noise()))
    close([o.float() for o in got], want, 0.1 if got[0].dtype == torch.bfloat16 else 1e-5)


# --- keys and graphs; test_matrix has copies and files


@pytest.mark.parametrize('name', ('vovnet19', 'vovnet39'))
def test_keys_are_the_same_in_both_pool_placements(name):
    assert list(meta(name).state_dict()) == list(meta(name, pool='vt').state_dict())


def test_some_keys():
    sd = meta('vovnet19_dw').state_dict()
    for k in (
        'stem.0.conv.weight',
        'stem.1.dw.weight',
        'stages.0.blocks.0.reduce.conv.weight',
        'stages.3.blocks.0.layers.2.pw.weight',
        'stages.3.blocks.0.concat.norm.running_var',
        'stages.3.blocks.0.ese.fc.bias',
    ):
        assert k in sd


@pytest.mark.parametrize('name', ('vovnet39', pytest.param('vovnet19_slim_dw', marks=pytest.mark.slow)))
def test_compiles_into_one_graph(name):  # test_compile has the other one
    torch._dynamo.reset()
    kw = thin(name) | dict(blocks=(1, 1, 2, 1))
    m, x = randomize_(make(name, strides=every, **kw)).eval(), noise()
    close(out(torch.compile(m, backend='eager', fullgraph=True), x), out(m, x), 1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile(backend):
    torch._dynamo.reset()
    m, x = randomize_(make('vovnet19_slim_dw', blocks=(1, 2), mids=(64, 80), outs=(112, 256))).eval(), noise()
    close(out(torch.compile(m, backend=backend, fullgraph=True), x), out(m, x), 1e-5)


@pytest.mark.parametrize('pool', ('official', 'vt'))
def test_export_takes_any_size(pool):
    two = dict(blocks=(1, 1), stem=(8, 8, 16), mids=(8, 16), outs=(16, 32))  # a stage without a pool, one with
    m, d = randomize_(make('vovnet19_slim', pool=pool, **two)).eval(), torch.export.Dim.AUTO
    net = torch.export.export(m, (noise(96, 128, 2),), dynamic_shapes=({0: d, 2: d, 3: d},)).module()
    for x in (noise(96, 128, 2), noise(75, 101, 3), noise(200, 64, 2)):
        close(out(net, x), out(m, x), 1e-5)


@pytest.mark.parametrize(
    'name,variant', [('vovnet19_slim', 'official'), ('vovnet19_slim', 'vt'), ('vovnet19_slim_dw', 'official')]
)
def test_onnx(name, variant, tmp_path):
    import onnxruntime

    m, x = randomize_(make(name, variant=variant, **thin(name, variant=variant))).eval(), noise(75, 101)
    torch.onnx.export(
        m, (x,), tmp_path / 'm.onnx', input_names=['x'], dynamo=False, dynamic_axes=dict(x={0: 'b', 2: 'h', 3: 'w'})
    )
    s = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    for x in (x, noise(96, 64, 2)):
        close([torch.from_numpy(o) for o in s.run(None, dict(x=x.numpy()))], out(m, x), 1e-5)
