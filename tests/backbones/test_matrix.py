"Every registered backbone x every property of the contract."

import copy
import io
import json
import pickle
import shutil

import pytest
import torch
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import StochasticDepth

from common import leaves_of

from backbones_nb.backbones import torchvision as T
from backbones_nb.core import hub
from backbones_nb.core.features import Backbone, check_contract
from backbones_nb.analysis.parity import randomize_, rel_error
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones

pytestmark = pytest.mark.usefixtures('quick_meta', 'constant_init')
names = list_backbones()
body = dict(  # parameters of the nets that torchvision lacks, in millions, without classifier
    darknet19=19.817,
    darknet53=40.585,
    cspdarknet19=15.848,
    cspdarknet53=26.617,
    vovnet19_slim=2.653,
    vovnet19=10.180,
    vovnet27_slim=3.013,
    vovnet39=25.184,
    vovnet57=41.455,
    vovnet99=69.524,
    vovnet19_slim_dw=1.385,
    vovnet19_dw=5.518,
)
variants = {  # name, variant -> millions, where the variant differs
    ('darknet19', 'cfg'): 19.817,
    ('darknet53', 'timm'): 40.585,
    ('darknet53', 'vt'): 40.585,
    ('cspdarknet53', 'timm'): 26.617,
    ('cspdarknet53', 'vt'): 26.244,
    ('vovnet39', 'timm'): 23.544,
    ('vovnet57', 'timm'): 37.584,
    ('vovnet99', 'timm'): 62.174,
    ('vovnet19_slim', 'timm'): 2.653,
}


def meta(name, **kw):
    with torch.device('meta'):
        return create_backbone(name, **kw)


def count(m):
    return sum(p.numel() for p in m.parameters())


# Every net is built by test_shapes_strides_and_order_of_groups. The other properties come from code that a family
# shares: in every run a small net of each family has them, with real tensors too, and the pairs beyond are slow.
quick = """convnext_tiny cspdarknet19 darknet19 efficientnet_b0 mobilenet_v3_small regnet_y_400mf resnet18 resnet18_fpn
    vgg11 vovnet19_slim_dw vovnet27_slim""".split()
exported = """mobilenet_v3_small regnet_y_400mf resnet18_fpn vgg11 vovnet19_slim_dw""".split()  # others: in their files
described = [*quick, 'cspdarknet53', 'darknet53', 'mobilenet_v2', 'regnet_x_400mf', 'vgg11_bn', 'vovnet39']
assert {*quick, *exported, *described} <= set(names)


def each(kept, fixture='net'):
    marked = [n if n in kept else pytest.param(n, marks=pytest.mark.slow) for n in names]
    return pytest.mark.parametrize(fixture, marked, indirect=True)


def noise(*hw, n=1):
    return torch.randn(n, 3, *hw, generator=torch.Generator().manual_seed(0))


def all_strides(m):
    return tuple(r['reduction'] for r in m.rows)


@pytest.fixture(scope='module', params=names)
def on_meta(request, quick_meta):
    "One build a name for all tests without values, which select and freeze again."
    m = meta(request.param)
    assert m.name == request.param
    return m


@pytest.fixture(scope='module')
def net(request):
    "One build a name for all tests with real tensors; every map is selected."
    m = create_backbone(request.param)
    if not request.param.endswith('_fpn'):
        m.select(all_strides(m))
    return randomize_(m, x=noise(64, 64, n=2)).eval()


def training(m):
    "In training mode, but for layers that drop whole blocks at random."
    for o in m.train().modules():
        if isinstance(o, StochasticDepth):
            o.eval()
    return m


@torch.no_grad()
def out(m, x):
    return m(x)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


# --- shapes and parameters, on the meta device


def mixed_size(name):
    "224 or 256 pixels on one side, an odd number on the other: every other row takes the other ones."
    return ((224, 310), (231, 256))[names.index(name) % 2]


def parts_of(maps, params):
    "For each map, which of those lists of parameters it was computed from."
    used = [leaves_of(o) for o in maps]
    return [[any(id(p) in o for p in group) for group in params] for o in used]


def test_shapes_strides_and_order_of_groups(on_meta, slow_run):
    "The k-th map needs groups up to one of them, and deeper maps need more; all together need every parameter."
    m, name = on_meta.eval(), on_meta.name
    assert isinstance(m, Backbone) and name in names and m.pretrained is None
    pyramid = name.endswith('_fpn')
    m.select() if pyramid else m.select(all_strides(m))
    m.freeze_to(0)
    assert list(m.strides) == sorted(set(m.strides)) and m.strides[-1] >= 32
    for hw in ((224, 224), (256, 256), (231, 310)) if slow_run else (mixed_size(name),):
        maps = m(torch.empty(2, 3, *hw, device='meta'))
        assert [o.shape[:2] for o in maps] == [(2, c) for c in m.channels], hw
        for o, s in zip(maps, m.strides):  # pools without ceil_mode round down
            for k, n in zip(hw, o.shape[2:]):
                assert k // s <= n <= -(-k // s), (hw, s, o.shape)
    groups = m.param_groups()
    need = parts_of(maps, groups)
    reach = [sum(o) for o in need]
    assert reach == sorted(reach) and all(map(any, zip(*need))), need
    if not pyramid:
        assert all(o == sorted(o, reverse=True) for o in need) and reach[-1] == len(groups), need


@each(described, 'on_meta')
def test_default_and_selection(on_meta):
    m, name = on_meta, on_meta.name
    m.select()
    if not name.endswith('_fpn'):
        assert m.strides == tuple(s for s in all_strides(m) if s in (4, 8, 16, 32))
        for s in all_strides(m):
            assert m.select(s).strides == (s,)
        assert [o.shape[2] for o in m.select(out_indices=(4,))(torch.empty(1, 3, 64, 64, device='meta'))] == [2]
        m.select()
    maps = m.get_feature_maps(torch.empty(1, 3, 64, 64, device='meta'))
    assert [o.shape[1] for o in maps] == list(m.out_channels_list)
    assert m.feature_info.channels() == list(m.channels) and m.feature_info.reduction() == list(m.strides)
    with pytest.raises(ValueError, match=f'{name} has no map at stride 3: choose from'):
        m.select(3)


def test_parameters(on_meta):
    "Of torchvision's classifiers: test_rows in test_torchvision.py, from the published count."
    name, size = on_meta.name, count(on_meta)
    if name in body:
        assert round(size / 1e6, 3) == body[name]
    elif name.endswith('_fpn'):
        with torch.device('meta'):
            ref = resnet_fpn_backbone(backbone_name=name[:-4], weights=None)
        frozen = sum(
            b.numel() for n, b in ref.named_buffers() if n.endswith(('weight', 'bias'))
        )  # its batch norms have buffers
        assert size == count(ref) + frozen or size == count(ref)
    else:
        assert name in T.torchvision_taps


@each(described, 'on_meta')
def test_described_and_built_again(on_meta):
    on_meta.select()
    with torch.device('meta'):
        n = hub.from_config(Backbone, json.loads(json.dumps(hub.hub_config(on_meta))))
    assert type(n) is type(on_meta) and n.rows == on_meta.rows
    assert {k: v.shape for k, v in n.state_dict().items()} == {k: v.shape for k, v in on_meta.state_dict().items()}


@pytest.mark.parametrize('name,variant', variants, ids='-'.join)
def test_parameters_of_variants(name, variant):
    assert round(count(meta(name, variant=variant)) / 1e6, 3) == variants[name, variant]


# --- groups


@each(described, 'on_meta')
def test_groups(on_meta):
    m = on_meta
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert (
        len(groups) >= 4 and all(groups) and len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    )
    first = next(p for p in m.parameters() if p.dim() == 4)
    assert any(p is first for p in groups[0]) and first.shape[1] == 3
    for n in range(-len(groups), len(groups) + 1):
        m.freeze_to(n)
        k = n if n >= 0 else len(groups) + n
        for i, g in enumerate(groups):
            convs = [p for p in g if p.dim() > 1]  # batch norms of random weights stay in training
            assert all(p.requires_grad == (i >= k) for p in convs)
    with pytest.raises(ValueError, match='pass a number from'):
        m.freeze_to(len(groups) + 1)


# --- gradients, copies, files


@each(quick)
def test_gradients(net):
    state = copy.deepcopy(net.state_dict())
    try:
        sum(o.square().mean() for o in training(net)(noise(64, 32, n=2))).backward()
    finally:
        net.eval().load_state_dict(state)
    lost = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    dead = [n for n, p in net.named_parameters() if p.dim() > 1 and p.grad is not None and not p.grad.any()]
    net.zero_grad()
    assert not lost and not dead


@each(quick)
def test_contract(net):
    assert check_contract(net) is net


@each(quick)
def test_copies(net):
    x = noise(64, 96)
    want = out(net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert same(out(twin, x), want) and twin.strides == net.strides and twin.name == net.name
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
        assert {id(p) for g in twin.param_groups() for p in g} == {id(p) for p in twin.parameters()}


@each(quick)
def test_state_dict(net):
    f = io.BytesIO()
    torch.save(net.state_dict(), f)
    f.seek(0)
    twin = create_backbone(net.name)
    twin.load_state_dict(torch.load(f, weights_only=True), strict=True)
    if not net.name.endswith('_fpn'):
        twin.select(net.strides)
    assert same(out(twin.eval(), noise(64, 64)), out(net, noise(64, 64)))


@each(exported)
def test_export(net):
    x = noise(64, 96)
    graph = torch.export.export(net, (x,)).module()
    assert max(rel_error(p, q) for p, q in zip(out(graph, x), out(net, x))) <= 1e-5


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')
@pytest.mark.slow
@pytest.mark.parametrize('name', ['vovnet19_slim', 'darknet19', 'cspdarknet19', 'resnet18_fpn'])
def test_compile(name):
    m = randomize_(create_backbone(name)).eval()
    x = noise(64, 64)
    try:
        got = out(torch.compile(m, fullgraph=True), x)
    finally:
        torch._dynamo.reset()
    assert max(rel_error(p, q) for p, q in zip(got, out(m, x))) <= 1e-5
