import copy
import pickle
import shutil
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import _registry

from common import close, leaves_of, noise

from backbones_nb.backbones import timm_models as M, timm_plan as P, timm_weights as W
from backbones_nb.core import registry
from backbones_nb.core.features import IMAGENET_MEAN, check_contract
from backbones_nb.analysis.parity import randomize_
from backbones_nb.core.create import create_backbone, register
from backbones_nb.core.registry import list_backbones
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta', 'constant_init', 'plans')
few = ('resnet18', 'convnext_atto', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224')


@pytest.fixture(scope='module')
def plans():
    "A plan and its groups are made once: they are the same for every net of a name."
    with pytest.MonkeyPatch.context() as m:
        for f in M.plan_timm, M.depth_groups:
            m.setattr(M, f.__name__, kept(f))
        yield


def kept(f):
    seen = {}

    def g(*args, **kw):
        key = repr((args, kw))
        if key not in seen:
            seen[key] = f(*args, **kw)
        return copy.deepcopy(seen[key])

    return g


def meta(name, **kw):
    return M.TimmBackbone(name, device='meta', **kw).eval()


def run(net, h, w=None):
    return net(torch.zeros(1, 3, h, w or h, device='meta'))


# --- the matrix: one model of each of timm's modules

modules = [m for m in timm.list_modules() if any(not o.startswith('bbnb_') for o in timm.list_models(module=m))]
# module -> why shapes alone do not do; a success fails too
fails = dict(gemma4_vit='Tensor.item.. cannot be called on meta tensors')
heavy = """sequencer cait mvitv2 focalnet nextvit coat crossvit nest rdnet xcit csatv2 pnasnet nasnet
    metaformer""".split()
sampled = modules[::5]  # what every run tries; a nightly one tries them all


@cache
def first(module):
    "The first name of the module that gives maps, and its backbone; the very first and the error where none does."
    names, error = [o for o in timm.list_models(module=module) if not o.startswith('bbnb_')], None
    for name in names:
        try:
            return name, meta(name)
        except ValueError as e:
            error = error or e
    return names[0], error


def default_size(net):
    return net.img_size or timm.get_pretrained_cfg(net.plan.name).input_size[-2:]


@pytest.mark.parametrize(
    'module', [m if m in sampled and m not in heavy else pytest.param(m, marks=pytest.mark.slow) for m in modules]
)
def test_matrix(module):
    name, net = first(module)
    assert isinstance(net, M.TimmBackbone), f'{name}: {net}'
    if module in fails:
        with pytest.raises(Exception, match=fails[module]):
            run(net, *default_size(net))
        return
    h, w = default_size(net)
    maps = run(net.select([r['reduction'] for r in net.rows]), h, w)
    assert list(net.strides) == sorted(set(net.strides)) and [o.shape[1] for o in maps] == list(net.channels)
    assert P._maps_fit(maps, net.rows, (h, w))
    if net.img_size:
        with pytest.raises(ValueError, match='only accepts images of'):
            run(net, h + 64, w + 32)


@pytest.mark.slow
@pytest.mark.parametrize('module', modules)
def test_matrix_groups(module):
    net = first(module)[1]
    groups = net.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert sorted(ids) == sorted(id(p) for p in net.parameters()) and len(set(ids)) == len(ids)


@pytest.mark.slow
def test_rule_of_the_matrix():
    assert M._first_names() == {m: first(m)[0] for m in modules} and len(modules) > 90


@pytest.mark.slow
@pytest.mark.parametrize('module', modules)
def test_matrix_with_values(module):
    "Real tensors, as small as each model takes."
    name, net = first(module)
    if sum(p.numel() for p in net.parameters()) > 2e8:
        pytest.skip('slow')
    h, w = default_size(net)
    if not net.img_size and P.accepts_size(net, net.rows, (128, 128)):
        h = w = 128
    full = M.TimmBackbone(name, plan=net.plan, strides=[r['reduction'] for r in net.rows]).eval()
    with torch.no_grad():
        maps = full(torch.randn(1, 3, h, w))
    assert [o.shape[1] for o in maps] == list(full.channels) and all(o.isfinite().all() for o in maps)


# --- selection


def test_darknet53_keeps_its_last_map():
    net = meta('darknet53')
    assert (
        net.strides == (4, 8, 16, 32)
        and net.channels == (128, 256, 512, 1024)
        and run(net, 64)[-1].shape == (1, 1024, 2, 2)
    )
    assert [r['reduction'] for r in net.rows] == [1, 2, 4, 8, 16, 32]
    assert net.select(1).feature_info.reduction() == [1]


@pytest.mark.parametrize(
    'name,strides,channels',
    [
        ('resnet18', (8, 32), (128, 512)),
        ('convnext_atto', 16, (160,)),
        ('vgg11', (1, 2), (64, 128)),
        ('vit_tiny_patch16_224', None, (192,)),
        ('tresnet_m', (4, 32), (64, 2048)),
    ],
)
def test_selection_by_stride(name, strides, channels):
    assert meta(name, strides=strides).channels == channels


def test_index_means_a_stride_for_every_model():
    for name in ('resnet18', 'convnext_atto', 'darknet53'):
        assert meta(name, out_indices=(2, 4)).strides == (8, 32)


def test_dilated():
    net = meta('resnet18', output_stride=8)
    assert (
        net.channels == (64, 512)
        and net.strides == (4, 8)
        and [tuple(o.shape) for o in run(net, 64)] == [(1, 64, 16, 16), (1, 512, 8, 8)]
    )


def test_deep_maps_are_not_computed_when_not_wanted():
    net = M.TimmBackbone('resnet18', strides=(4, 8))
    net.body.layer3.register_forward_hook(lambda *a: pytest.fail('layer3 ran'))
    assert [o.shape[1] for o in net(noise())] == [64, 128]


# --- the same function as timm's


@pytest.mark.parametrize('name', [*few, 'darknet53', 'vgg11', 'legacy_xception', 'hrnet_w18_small', 'mambaout_femto'])
def test_parity(name):
    ours = randomize_(M.TimmBackbone(name)).eval()
    ref = timm.create_model(name, features_only=True, **ours.plan.kwargs).eval()
    ref.load_state_dict(ours.body.state_dict(), strict=True)
    x = noise(64 if ours.img_size is None else ours.img_size[0])
    with torch.no_grad():
        got, want = ours.select([r['reduction'] for r in ours.rows])(x), ref(x)
    close(got, [o.permute(0, 3, 1, 2) if ours.nhwc else o for o in want])


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'mambaout_femto'])
def test_channels_last_models_are_turned(name):
    net = meta(name)
    assert net.nhwc and [tuple(o.shape[1:]) for o in run(net, 96, 64)] == [
        (c, 96 // s, 64 // s) for c, s in zip(net.channels, net.strides)
    ]


# --- sizes


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'mobilenetv3_small_050', 'vit_tiny_patch16_224'])
@pytest.mark.parametrize('size', [(96, 64), (75, 101)])
def test_odd_sizes(name, size):
    with torch.no_grad():
        maps = M.TimmBackbone(name, strides=(4, 8, 16, 32) if 'vit' not in name else None).eval()(noise(*size))
    for o, s in zip(maps, (16,) if 'vit' in name else (4, 8, 16, 32)):
        assert all(a // s <= b <= -(-a // s) for a, b in zip(size, o.shape[-2:]))


def test_fixed_size():
    net = meta('efficientformer_l1')
    assert net.img_size == (224, 224)
    with pytest.raises(ValueError, match='only accepts images of 224x224, got 256x256: resize'):
        run(net, 256)
    assert meta('beit_base_patch16_224', img_size=(256, 192)).img_size == (256, 192)


def test_what_timm_marks_as_fixed_and_is_not():
    assert meta('twins_pcpvt_small').img_size is None and meta('xcit_nano_12_p16_224').img_size is None


def test_multiples():
    with pytest.raises(ValueError, match='hrnet_w18_small does not accept 135x64: pass images .*multiples of 32'):
        run(meta('hrnet_w18_small'), 135, 64)


def test_batch_dimension():
    with pytest.raises(ValueError, match=r'add the batch dimension'):
        M.TimmBackbone('resnet18')(torch.zeros(3, 64, 64))


# --- groups


@pytest.mark.parametrize('name', [*few, 'twins_pcpvt_small', 'hrnet_w18_small', 'nasnetalarge'])
def test_groups_are_in_the_order_of_the_data(name):
    net = meta(name)
    groups = net.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in net.parameters()}
    if len(net.rows) == 1:
        return
    x = torch.zeros(1, 3, 224, 224, device='meta')
    for k, m in enumerate(net.select([r['reduction'] for r in net.rows])(x)):  # a map needs nothing of later groups
        later = {id(p) for g in groups[k + 1 :] for p in g}
        assert not later & leaves_of(m)


def test_a_transformer_has_a_group_for_every_block():
    net = meta('vit_tiny_patch16_224')
    groups, names = net.param_groups(), {id(p): n for n, p in net.named_parameters()}
    assert len(groups) == 12 and 'body.model.pos_embed' in {names[id(p)] for p in groups[0]}
    for i, g in enumerate(groups):
        assert all(f'.blocks.{i}.' in names[id(p)] for p in g) or i == 0


def test_freeze():
    net = M.TimmBackbone('resnet18').freeze_to(2)
    assert [n for n, p in net.named_parameters() if p.requires_grad and 'bn' not in n][0].startswith('body.layer2')
    net.freeze_to(0)
    assert all(p.requires_grad for p in net.parameters())


# --- a backbone as all others


@pytest.mark.parametrize('name', few)
def test_copies(name):
    m = randomize_(create_backbone(f'timm/{name}'), x=noise()).eval()
    with torch.no_grad():
        want = m(noise())
        for n in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            close(n(noise()), want)
            assert (n.name, n.channels, n.strides) == (f'timm/{name}', m.channels, m.strides)
            assert len(n.param_groups()) == len(m.param_groups())


def test_hooks_survive_copies():
    m = M.TimmBackbone('legacy_xception').eval()
    close(copy.deepcopy(m)(noise()), m(noise()))


@pytest.mark.parametrize('name', few)
def test_contract(name):
    check_contract(create_backbone(f'timm/{name}'))


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'swin_tiny_patch4_window7_224'])
def test_gradients(name):
    m = create_backbone(f'timm/{name}')
    sum(o.square().mean() for o in m(noise(n=2))).backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None]


def test_save_and_load(tmp_path):
    a, b = randomize_(create_backbone('timm/resnet18')).eval(), create_backbone('timm/resnet18').eval()
    torch.save(a.state_dict(), tmp_path / 'w.pth')
    b.load_state_dict(torch.load(tmp_path / 'w.pth', weights_only=True), strict=True)
    close(a(noise()), b(noise()))
    assert all(k.startswith('body.') for k in a.state_dict())


def test_neck():
    m = attach_neck(create_backbone('timm/swin_tiny_patch4_window7_224', strides=(8, 16, 32)), channels=16)
    assert [tuple(o.shape) for o in m(noise(64))] == [(1, 16, 8, 8), (1, 16, 4, 4), (1, 16, 2, 2)]
    ids = [id(p) for g in m.param_groups() for p in g]
    assert len(ids) == len(set(ids)) == len(list(m.parameters()))


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224'])
def test_export(name):
    m = randomize_(create_backbone(f'timm/{name}')).eval()
    close(torch.export.export(m, (noise(64),)).module()(noise(64)), m(noise(64)), 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.slow
def test_compile():
    m = randomize_(create_backbone('timm/resnet18')).eval()
    with torch.no_grad():
        close(torch.compile(m)(noise(64)), m(noise(64)), 1e-5)


# --- what is wrong with a request


@pytest.mark.parametrize(
    'ask,message',
    [
        (
            dict(name='timm/resnet_18'),
            r"there is no backbone 'timm/resnet_18'. Did you mean 'timm/.*list_backbones\('timm/\*'\)",
        ),
        (dict(name='timm/resnet18', strides=64), 'timm/resnet18 has no map at stride 64'),
        (
            dict(name='timm/resnet18', depth=3),
            "resnet18 returns no feature maps with {'depth': 3}.*unexpected keyword.*leave these arguments out",
        ),
        (
            dict(name='timm/resnet18', pretrained='none'),
            "timm's resnet18 has no weights 'none': choose from .*a1_in1k",
        ),
        (dict(name='timm/resnet18.a1_in1k', pretrained='a2_in1k'), 'contradict each other'),
        (dict(name='timm/darknet17', pretrained=True), 'timm publishes no weights for darknet17'),
    ],
)
def test_errors(ask, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(**ask)


def test_a_model_without_maps(monkeypatch):
    def nomaps(pretrained=False, features_only=False, **kw):
        if features_only:
            raise RuntimeError('features_only is not implemented.')
        return nn.Linear(3, 3)

    monkeypatch.setitem(_registry._model_entrypoints, 'nomaps', nomaps)
    monkeypatch.setattr(
        W,
        'get_pretrained_cfg',
        lambda name: (
            timm.models.PretrainedCfg() if hasattr(timm.models, 'PretrainedCfg') else _registry.PretrainedCfg()
        ),
    )
    with pytest.raises(
        ValueError,
        match=r"timm's nomaps returns no feature maps \(RuntimeError: features_only is not implemented\): "
        'choose another model',
    ):
        M.TimmBackbone('nomaps')


# --- published weights, without a network


@pytest.fixture(scope='module')
def classifier(constant_init):
    return randomize_(timm.create_model('resnet18'))


@pytest.fixture
def published(tmp_path, monkeypatch, classifier):
    "timm's URL of resnet18's default weights points to a file here; the cache is empty."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    name, ref = W.pick_timm_weights('resnet18'), classifier

    def publish(sd=None, model=name):
        torch.save(ref.state_dict() if sd is None else sd, tmp_path / 'w.pth')
        cfg = replace(_registry._model_pretrained_cfgs[model], url=(tmp_path / 'w.pth').as_uri(), hf_hub_id=None)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, model, cfg)
        return ref

    return publish


def features(ref, x):
    net = timm.create_model('resnet18', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    net.load_state_dict({k: v for k, v in ref.state_dict().items() if not k.startswith('fc.')}, strict=True)
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize('name,pretrained', [('resnet18', True), ('resnet18', 'a1_in1k'), ('resnet18.a1_in1k', True)])
def test_pretrained(published, name, pretrained):
    ref = published()
    m = create_backbone(f'timm/{name}', pretrained=pretrained)
    with torch.no_grad():
        close(m.eval()(noise()), features(ref, noise()))
    assert (
        m.pretrained == 'a1_in1k'
        and 'weights=a1_in1k' in repr(m)
        and m.record.name == 'timm/resnet18.a1_in1k'
        and m.record.mean == IMAGENET_MEAN
    )


def test_missing_weights_are_an_error(published):
    "timm's own features_only loader leaves them random in silence."
    sd = timm.create_model('resnet18').state_dict()
    del sd['layer3.0.conv1.weight']
    published(sd)
    with pytest.raises(RuntimeError, match='could not load .*resnet18.a1_in1k .*[Mm]issing'):
        create_backbone('timm/resnet18', pretrained=True)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(RuntimeError, match="could not load timm's weights convnext_atto.d2_in1k .*check the network"):
        create_backbone('timm/convnext_atto', pretrained=True, cache_dir=str(tmp_path))


def test_record():
    r = W.timm_record('vit_tiny_patch16_224')
    assert (
        r.mean == r.std == (0.5, 0.5, 0.5)
        and r.input_size == 224
        and r.tag == 'augreg_in21k_ft_in1k'
        and r.source.startswith('https://huggingface.co/timm/')
    )
    assert create_backbone('timm/resnet18').record is None


@pytest.mark.parametrize('name', few)
def test_every_weight_has_its_place_in_the_classifier(name):
    net = meta(name)
    with torch.device('meta'):
        have = timm.create_model(name, **{k: v for k, v in net.plan.kwargs.items() if k != 'out_indices'}).state_dict()
    ks = [W.classifier_key(k, have) for k in net.body.state_dict()]
    assert len(set(ks)) == len(ks) and [have[o].shape for o in ks] == [v.shape for v in net.body.state_dict().values()]


# --- names


def test_names():
    names = list_backbones('timm/*')
    assert (
        len(names) > 1000
        and {'timm/resnet18', 'timm/resnet18.a1_in1k', 'timm/darknet53'} <= set(names)
        and not [o for o in names if 'bbnb' in o]
    )
    assert list_backbones('timm/darknet53*') == ['timm/darknet53', 'timm/darknet53.c2ns_in1k']
    assert not [o for o in list_backbones() + list_backbones('*vovnet*') if o.startswith('timm/')]


# --- our models in timm's registry

ours = [o for o in list_backbones() if o.isidentifier()]


def test_all_of_ours_are_offered():
    assert {f'bbnb_{o}' for o in ours} <= set(timm.list_models('bbnb_*'))


asked = (None, (2,), (1, 2), (-2, -1), 2)
# every question in every run for nets that begin at stride 1, 2 and 4 and for one with a neck; one of each other family
# takes one of them, and the rest is slow: the families answer with the same code
whole = 'convnext_tiny', 'darknet19', 'resnet18', 'resnet18_fpn'
others = 'cspdarknet19', 'efficientnet_b0', 'mobilenet_v2', 'regnet_x_400mf', 'vgg11', 'vovnet39'
assert {*whole, *others} <= set(ours)


def questions():
    for i, name in enumerate(ours):
        for k, idx in enumerate(asked):
            now = name in whole or name in others and i % len(asked) == k
            yield pytest.param(name, idx, id=f'{name}-{idx}', marks=[] if now else [pytest.mark.slow])


@pytest.mark.parametrize('name,idx', list(questions()))
def test_ours_by_timm(name, idx):
    with torch.device('meta'):
        net = timm.create_model(f'bbnb_{name}', features_only=True, pretrained=False, out_indices=idx).eval()
        maps = net(torch.zeros(1, 3, 64, 64))
    rows = [r['reduction'] for r in net.rows]
    first = 1 if rows[0] <= 2 else 2  # a neck and ConvNeXt begin at stride 4
    have = [o for o in rows if o > 1]
    assert have == [2 ** (i + first) for i in range(len(have))] and len(have) >= 3
    want = have if idx is None else have[-2:] if idx in (2, (-2, -1)) else [2 ** (i + 1) for i in idx]
    assert net.feature_info.reduction() == want and net.feature_info.channels() == [o.shape[1] for o in maps]
    assert [o.shape[-1] for o in maps] == [64 // s for s in want]


def test_a_name_that_is_registered_later(monkeypatch):
    monkeypatch.setattr(registry.REGISTRY, 'entries', dict(registry.REGISTRY.entries))  # other tests list the names
    register('later19', type(create_backbone('vovnet19_slim_dw')), layers=3, dw=True)
    assert timm.create_model('bbnb_later19', features_only=True, out_indices=(4,)).channels == (1024,)


@pytest.mark.parametrize(
    'ask,message',
    [
        (dict(), 'returns feature maps and has no classifier: create it with features_only=True'),
        (dict(features_only=True, output_stride=16), 'got output_stride=16, but its output_stride is always 32'),
        (dict(features_only=True, in_chans=1), 'got in_chans=1'),
        (dict(features_only=True, out_indices=(5,)), 'vovnet39 has no map at stride 64'),
        (dict(features_only=True, pretrained_cfg='none', pretrained=True), "vovnet39 has no weights 'none'"),
    ],
)
def test_what_ours_refuse(ask, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('bbnb_vovnet39', **ask)


@pytest.mark.parametrize('name', ['vovnet19_slim_dw', 'cspdarknet19', 'darknet19', 'resnet18'])
def test_smp(name):
    smp = pytest.importorskip('segmentation_models_pytorch')
    net = smp.Unet(f'tu-bbnb_{name}', encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 8), classes=2)
    assert list(net.encoder.out_channels[1:]) == create_backbone(name, strides=(2, 4, 8, 16)).out_channels_list[:4]
    out = net(noise(64, n=2))
    out.square().mean().backward()
    assert out.shape == (2, 2, 64, 64) and next(net.encoder.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['vovnet19_slim_dw', 'resnet18'])
def test_effdet(name):
    effdet = pytest.importorskip('effdet')
    c = effdet.get_efficientdet_config('efficientdet_d0')
    c.update(
        dict(
            backbone_name=f'bbnb_{name}',
            backbone_args={},
            backbone_indices=(2, 3, 4),
            image_size=(128, 128),
            num_classes=3,
            max_detection_points=500,
        )
    )
    net = effdet.create_model_from_config(
        c, bench_task='train', pretrained=False, pretrained_backbone=False, bench_labeler=True
    )
    target = dict(bbox=torch.tensor([[[8.0, 8, 60, 60]], [[20, 10, 90, 70]]]), cls=torch.tensor([[1.0], [2]]))
    loss = net(noise(128, n=2), target)['loss']
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in net.model.backbone.parameters())
    with torch.no_grad():
        out = effdet.DetBenchPredict(net.model).eval()(noise(128))
    assert out.shape == (1, 100, 6)
