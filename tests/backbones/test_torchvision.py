import copy
import functools
import hashlib
import pickle
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from torchvision import models

from common import close, noise

from backbones_nb.backbones import torchvision as T
from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD, check_contract
from backbones_nb.analysis.parity import map_weights, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones
from backbones_nb.core.published import weight_records
from backbones_nb.core.weights import load_weights
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta', 'constant_init')
every = (2, 4, 8, 16, 32)
families = dict(
    resnet=T.resnets,
    mobilenet=T._mobilenets,
    efficientnet=T.efficientnets,
    vgg=T.vggs,
    regnet=T._regnets,
    convnext=T._convnexts,
)
rows = [(n, t) for n, v in T.torchvision_taps.items() for t in v]  # every net with each of its conventions
quick = (
    'resnet18',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'efficientnet_b0',
    'vgg11_bn',
    'regnet_x_400mf',
    'regnet_y_400mf',
    'convnext_tiny',
)
one_each = (
    'resnet18',
    'mobilenet_v2',
    'efficientnet_b0',
    'efficientnet_v2_s',
    'vgg11_bn',
    'regnet_y_400mf',
    'convnext_tiny',
)


def marked(cases, keep=quick):
    return [
        o
        if (o if isinstance(o, str) else o[0]) in keep
        else pytest.param(*([o] if isinstance(o, str) else o), marks=pytest.mark.slow)
        for o in cases
    ]


def classifier(name):
    return models.get_model(name, weights=None)


def reference(name, seed=0):
    "torchvision's classifier, every parameter random; without VGG's 120 million that follow its maps."
    with torch.device('meta'), T.SizesOnCPU():
        net = classifier(name)
    if name in T.vggs:
        net.classifier = nn.Identity()
    return randomize_(net.to_empty(device='cpu'), seed)


def whole(m):
    return m.select([r['reduction'] for r in m.rows])


def meta(name, **kw):
    with torch.device('meta'):
        return whole(create_backbone(name, **kw))


def hooked(net, x, names=('relu', 'layer1', 'layer2', 'layer3', 'layer4')):
    "The outputs of the named modules, as a classifier computes them."
    seen = {}
    hooks = [
        net.get_submodule(o).register_forward_hook(lambda m, i, o, k=o: seen.update({k: o.clone()})) for o in names
    ]
    with torch.no_grad():
        net.eval()(x)
    for h in hooks:
        h.remove()
    return [seen[k] for k in names]


def from_classifier(ref, name, **kw):
    "Our net with the very tensors of the classifier, copied nowhere."
    ours = meta(name, **kw)
    ours.load_state_dict(
        {k: v for k, v in ref.state_dict().items() if k in ours.state_dict()}, strict=True, assign=True
    )
    return ours.eval()


# --- the table of rows

wide = dict(zip(T.resnets, [(64, 128, 256, 512)] * 2 + [(256, 512, 1024, 2048)] * 8))  # channels at strides 4 to 32
wide |= dict(
    mobilenet_v2=(24, 32, 96, 320),
    mobilenet_v3_large=(24, 40, 112, 160),
    mobilenet_v3_small=(16, 24, 48, 96),
    efficientnet_b0=(24, 40, 112, 320),
    efficientnet_b7=(48, 80, 224, 640),
    efficientnet_v2_s=(48, 64, 160, 256),
    efficientnet_v2_l=(64, 96, 224, 640),
    regnet_x_400mf=(32, 64, 160, 400),
    regnet_y_128gf=(528, 1056, 2904, 7392),
    convnext_tiny=(96, 192, 384, 768),
    convnext_large=(192, 384, 768, 1536),
    **{o: (256, 512, 512, 512) for o in T.vggs},
)


@functools.lru_cache(maxsize=1)
def theirs(name):
    "torchvision's classifier on the meta device; both conventions of a net come one after the other."
    with torch.device('meta'), T.SizesOnCPU():
        return classifier(name)


def check_row(name, taps, forward=True):
    m = meta(name, taps=taps)
    first = 4 if name in T._convnexts else 1 if name in T.vggs else 2
    have = [2**i for i in range(6) if 2**i >= first]
    assert (
        m.strides == tuple(have)
        and m.name == name
        and m.pretrained is None
        and m.record is None
        and list(m.trunk)[0] == 'stem'
    )
    if forward:
        maps = m(torch.zeros(2, 3, 96, 64, device='meta'))
        assert [tuple(o.shape) for o in maps] == [(2, c, 96 // s, 64 // s) for c, s in zip(m.channels, have)]
    assert m.select().strides == (4, 8, 16, 32) and (taps != 'block' or m.channels == wide.get(name, m.channels))
    assert [o for v in m.trunk.values() for o in v] == m._steps and len(set(m._steps)) == len(
        m._steps
    )  # no module runs twice
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(groups) == len(m.trunk) - (name in T.vggs) and sorted(ids) == sorted(
        map(id, m.parameters())
    )  # VGG's last has only a pool
    return m


large = (
    'efficientnet_b4',
    'efficientnet_b5',
    'efficientnet_b6',
    'efficientnet_b7',
    'efficientnet_v2_m',
    'efficientnet_v2_l',
)


@pytest.mark.parametrize(
    'name,taps', [pytest.param(*o, marks=pytest.mark.slow) if o[0] in large and o[1] != 'block' else o for o in rows]
)
def test_rows(name, taps, slow_run):
    """Strides, channels and groups; keys and parameters are torchvision's without the head's.

    The default's maps are those of test_matrix, which has the shapes of every name."""
    m = check_row(name, taps, slow_run or taps != 'block')
    ref = theirs(name)
    head = [o for o in ('fc', 'classifier') if hasattr(ref, o)]
    if 'expansion' in T.torchvision_taps[name] and taps == 'block':
        head.append(f'features.{len(ref.features) - 1}')
    left = {k: v.shape for k, v in ref.state_dict().items() if not k.startswith(tuple(f'{o}.' for o in head))}
    assert {k: v.shape for k, v in m.state_dict().items()} == left
    n = sum(p.numel() for o in head for p in ref.get_submodule(o).parameters())
    assert sum(p.numel() for p in m.parameters()) == models.get_model_weights(name).DEFAULT.meta['num_params'] - n


def test_names():
    kinds = {
        f'torchvision.models.{o}'
        for o in ('resnet', 'mobilenetv2', 'mobilenetv3', 'efficientnet', 'vgg', 'regnet', 'convnext')
    }
    theirs = {o for o in models.list_models() if models.get_model_builder(o).__module__ in kinds}
    assert (
        set(T.torchvision_taps) == theirs
        and list(T.torchvision_taps) == [o for v in families.values() for o in v]
        and len(T.torchvision_taps) == 51
    )
    assert set(T.torchvision_taps) <= set(list_backbones()) and {'wide_resnet50_2', 'wide_resnet101_2'} <= set(
        list_backbones('wide_resnet*')
    )
    assert set(T.timm_names) <= set(T.torchvision_taps) and create_backbone("resnet18", strides=8).strides == (8,)


# --- taps

tapped = dict(
    mobilenet_v2=(96, 144, 192, 576, 1280),
    mobilenet_v3_large=(64, 72, 240, 672, 960),
    mobilenet_v3_small=(16, 72, 96, 288, 576),
    efficientnet_b0=(96, 144, 240, 672, 1280),
    efficientnet_v2_s=(24, 48, 256, 960, 1280),
)


@pytest.mark.parametrize('name', tapped)
def test_expansions(name):
    "The map is what the convolution that halves it next reads, and nothing is computed twice."
    m = meta(name, taps='expansion')
    assert m.channels == tapped[name] and tuple(m.out_channels_list) == tapped[name]
    steps = m._steps
    for r in m.rows[:-1]:
        after = [
            o
            for n in steps[steps.index(r['module']) + 1 :]
            for o in m.get_submodule(n).modules()
            if isinstance(o, nn.Conv2d)
        ][0]
        assert after.stride == (2, 2) and after.in_channels == r['num_chs']
    runs = []
    for n, o in m.named_modules():
        if isinstance(o, nn.Conv2d):
            o.register_forward_hook(lambda *a, n=n: runs.append(n))
    m(torch.zeros(1, 3, 64, 64, device='meta'))
    assert len(runs) == len(set(runs)) == sum(isinstance(o, nn.Conv2d) for o in m.modules())


@pytest.mark.parametrize('name', [o for o in T.torchvision_taps if 'expansion' not in T.torchvision_taps[o]])
def test_no_expansions(name):
    with pytest.raises(ValueError, match=f"{name} got taps='expansion', but only accepts 'block': choose that") as e:
        create_backbone(name, taps='expansion')
    assert '\n' not in str(e.value)


def test_unknown_taps():
    with pytest.raises(ValueError, match="got taps='middle', but only accepts 'block' or 'expansion'"):
        create_backbone('mobilenet_v2', taps='middle')


def test_strides_that_are_not_there():
    with pytest.raises(ValueError, match='convnext_tiny has no map at stride 2: choose from its strides 4, 8, 16, 32'):
        meta('convnext_tiny').select(2)
    assert meta('vgg16').select((1, 32)).channels == (64, 512)


# --- the same function as torchvision's and timm's

sizes = [(224,), (200,), (230, 310)]


@pytest.mark.parametrize(
    'name,taps,size',
    [('resnet18', 'block', s) for s in sizes]
    + [('mobilenet_v3_small', 'expansion', sizes[2])]
    + [pytest.param('mobilenet_v3_small', 'expansion', s, marks=pytest.mark.slow) for s in sizes[:2]]
    + [
        pytest.param(n, 'block', sizes[2], marks=pytest.mark.slow)
        for n in ('vgg11', 'efficientnet_b0', 'regnet_y_400mf', 'convnext_tiny')
    ],
)
def test_parity_with_torchvision(name, taps, size):
    "At whole, half and odd sizes; test_parity_with_torchvision_and_timm has the other families at an odd one."
    ref = reference(name)
    ours = from_classifier(ref, name, taps=taps)
    with torch.no_grad():
        close(ours(noise(*size)), hooked(ref, noise(*size), [r['module'] for r in ours.rows]))


@pytest.mark.parametrize('name', marked(T.torchvision_taps))
def test_parity_with_torchvision_and_timm(name):
    ref, x = reference(name), noise(75, 100)
    for taps in T.torchvision_taps[name]:
        ours = from_classifier(ref, name, taps=taps)
        with torch.no_grad():
            got = ours(x)
            close(got, hooked(ref, x, [r['module'] for r in ours.rows]))
        assert min(o.abs().max() for o in got) > 1e-3 and all(o.isfinite().all() for o in got)
        if taps != 'block' or name not in T.timm_names:
            continue
        (other, kw), src = T.timm_names[name], ours
        if name.startswith('mobilenet_v3'):  # timm counts the last convolution as a block
            src = from_classifier(ref, name, taps='expansion')
            with torch.no_grad():
                got[-1] = src(x)[-1]
        with torch.device('meta'):
            other = timm.create_model(other, features_only=True, **kw)
        map_weights(src, other.to_empty(device='cpu'), () if name in T.resnets else None)
        with torch.no_grad():
            close(got, other.eval()(x), 1e-5)
        assert list(other.feature_info.reduction()) == list(ours.strides) and list(other.feature_info.channels()) == [
            o.shape[1] for o in got
        ]


renames = dict(  # ours -> timm's, for families whose modules stand in another order or shape
    regnet=(
        (r'^trunk_output\.block\d\.block(\d)-(\d+)', lambda m: f's{m[1]}.b{int(m[2]) + 1}'),
        (r'proj\.0', 'downsample.conv'),
        (r'proj\.1', 'downsample.bn'),
        (r'f\.a\.', 'conv1.'),
        (r'f\.b\.', 'conv2.'),
        (r'f\.c\.', 'conv3.'),
        (r'f\.se', 'se'),
        (r'(stem|conv\d)\.0', r'\1.conv'),
        (r'(stem|conv\d)\.1', r'\1.bn'),
    ),
    convnext=None,
)
others = dict(
    zip(
        T._regnets,
        [f'regnetx_{o}' for o in ('004_tv', '008', '016', '032', '080', '160', '320')]
        + [f'regnety_{o}' for o in ('004', '008_tv', '016', '032', '080_tv', '160', '320', '1280')],
    )
)  # _tv: other widths than timm's own
others |= {o: o for o in T._convnexts}


@pytest.mark.parametrize('name', marked(others, ('regnet_x_400mf', 'convnext_tiny')))
def test_parity_with_timm_beyond_the_table(name):
    ref, x = reference(name), noise(75, 100)
    ours = from_classifier(ref, name)
    with torch.device('meta'):
        other = timm.create_model(others[name], features_only=True)
    sd = {
        k.replace('layer_scale', 'gamma'): v.flatten() if 'layer_scale' in k else v
        for k, v in ours.state_dict().items()
    }
    map_weights(sd, other.to_empty(device='cpu'), renames[name.split('_')[0]])
    with torch.no_grad():
        close(ours(x), other.eval()(x), 1e-5)


# --- a backbone as all others, with expansion taps; test_matrix has the default ones


@pytest.mark.parametrize('name', [n for n in one_each if 'expansion' in T.torchvision_taps[n]])
def test_contract(name):
    check_contract(whole(create_backbone(name, taps='expansion')))


@pytest.mark.parametrize('name', ['mobilenet_v2', 'efficientnet_b0'])
def test_copies(name):
    m = randomize_(create_backbone(name, taps='expansion'), x=noise()).eval()
    with torch.no_grad():
        want = m(noise(70))
        for n in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            close(n(noise(70)), want)
            assert (n.name, n.channels, n.strides) == (name, m.channels, m.strides)


@pytest.mark.parametrize(
    'name', marked([o for o in one_each if 'expansion' in T.torchvision_taps[o]], ('mobilenet_v2',))
)
def test_export(name):
    m = randomize_(create_backbone(name, taps='expansion')).eval()
    with torch.no_grad():
        close(torch.export.export(m, (noise(70, 90),)).module()(noise(70, 90)), m(noise(70, 90)), 1e-6)


def test_export_with_neck():
    m = randomize_(attach_neck(create_backbone('resnet18'), channels=16)).eval()
    close(torch.export.export(m, (noise(70, 90),)).module()(noise(70, 90)), m(noise(70, 90)), 1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.slow
@pytest.mark.parametrize('name,taps', [('mobilenet_v3_small', 'expansion'), ('convnext_tiny', 'block')])
def test_compile(name, taps):
    m = randomize_(create_backbone(name, taps=taps)).eval()
    with torch.no_grad():
        close(torch.compile(m, fullgraph=True)(noise(70)), m(noise(70)), 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.slow
def test_compile_with_neck():
    m = randomize_(attach_neck(create_backbone('resnet18'), channels=16, extra='pool')).eval()
    with torch.no_grad():
        close(torch.compile(m, fullgraph=True)(noise(70)), m(noise(70)), 1e-5)


def test_deep_maps_are_not_computed_when_not_wanted():
    m = create_backbone('resnet18', strides=(4, 8))
    m.layer3.register_forward_hook(lambda *a: pytest.fail('layer3 ran'))
    assert [o.shape[1] for o in m(noise())] == [64, 128]


# --- published weights, without a network


@functools.cache
def made(name):
    return randomize_(classifier(name), x=noise())


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "The file of a net and the digits of its hash, written once."
    folder = tmp_path_factory.mktemp('classifiers')

    @functools.cache
    def f(name):
        torch.save(made(name).state_dict(), path := folder / f'{name}.pth')
        return path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]

    return f


@pytest.fixture
def published(tmp_path, monkeypatch, kept):
    "torchvision's URL of a net points to a file here, whose name carries its hash; the cache is empty."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def publish(sha=None, sd=None, w=models.ResNet18_Weights.IMAGENET1K_V1, name='resnet18'):
        whole, digits = kept(name)
        if sd is not None:
            torch.save(sd, tmp_path / 'w.pth')
            digits = hashlib.sha256((tmp_path / 'w.pth').read_bytes()).hexdigest()[:8]
        else:
            (tmp_path / 'w.pth').hardlink_to(whole)
        f = (tmp_path / 'w.pth').rename(tmp_path / f'{name}-{sha or digits}.pth')
        monkeypatch.setattr(w.value, 'url', f.as_uri())
        return SimpleNamespace(ref=made(name), file=f, weights=w, cache=tmp_path / 'hub' / 'checkpoints')

    return publish


v1 = models.ResNet18_Weights.IMAGENET1K_V1


def test_pretrained(published):
    p = published()
    want = hooked(p.ref, noise())
    for _ in range(2):
        m = create_backbone('resnet18', strides=every, pretrained=True)
        with torch.no_grad():
            close(m.eval()(noise()), want)
        assert m.pretrained == 'IMAGENET1K_V1' and 'weights=IMAGENET1K_V1' in repr(m)
        assert list(p.cache.iterdir()) == [p.cache / p.file.name]
        p.file.unlink(missing_ok=True)  # the second time it comes from the cache


@pytest.mark.parametrize(
    'kw',
    [dict(pretrained=o) for o in ('IMAGENET1K_V1', 'DEFAULT', 'ResNet18_Weights.IMAGENET1K_V1', v1)]
    + [dict(weights=o) for o in ('IMAGENET1K_V1', 'DEFAULT', 'ResNet18_Weights.IMAGENET1K_V1', v1)]
    + [dict(pretrained=True, weights=v1)],
    ids=str,
)
def test_other_names_of_the_weights(published, kw):
    p = published()
    m = create_backbone('resnet18', **kw)
    have = p.ref.state_dict()
    assert m.pretrained == 'IMAGENET1K_V1' and all(torch.equal(v, have[k]) for k, v in m.state_dict().items())
    assert list(p.cache.iterdir()) == [p.cache / p.file.name]


@pytest.mark.parametrize(
    'name,w',
    [
        ('mobilenet_v2', models.MobileNet_V2_Weights.IMAGENET1K_V2),
        ('efficientnet_b0', models.EfficientNet_B0_Weights.IMAGENET1K_V1),
        ('regnet_y_400mf', models.RegNet_Y_400MF_Weights.IMAGENET1K_V2),
        ('convnext_tiny', models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ],
)
def test_pretrained_families(published, name, w):
    p = published(w=w, name=name)
    for taps in T.torchvision_taps[name]:
        m = whole(create_backbone(name, weights=w.name, taps=taps)).eval()
        with torch.no_grad():
            close(m(noise()), hooked(p.ref, noise(), [r['module'] for r in m.rows]))
        assert (
            m.pretrained == w.name
            and m.record.url == p.file.as_uri()
            and (m.record.mean, m.record.std) == (IMAGENET_MEAN, IMAGENET_STD)
        )


@pytest.mark.parametrize(
    'kw',
    [
        dict(pretrained=True, weights='IMAGENET1K_V1'),
        dict(pretrained='IMAGENET1K_V2', weights=models.ResNet50_Weights.IMAGENET1K_V1),
    ],
    ids=str,
)
def test_two_different_wishes(kw):
    with pytest.raises(
        ValueError,
        match='refer to IMAGENET1K_V2 and IMAGENET1K_V1 of resnet50, which are different weights: pass one of them',
    ):
        create_backbone('resnet50', **kw)


def test_a_record_beside_weights():
    with pytest.raises(
        ValueError, match="got a record as pretrained and weights='DEFAULT' for resnet18: pass one of them"
    ):
        create_backbone('resnet18', pretrained=T._classifier_record(v1), weights='DEFAULT')


@pytest.mark.parametrize('name', ['resnet50', 'resnet50_fpn'])
def test_a_record_of_another_net(name):
    with pytest.raises(ValueError, match='got a weight record for resnet18, expected one for resnet50: weight_records'):
        create_backbone(name, pretrained=T._classifier_record(v1))


def test_the_default_is_torchvisions():
    assert all(
        T._pick_enum(o, True) == T._pick_enum(o, 'DEFAULT') == models.get_model_weights(o).DEFAULT
        and T._pick_enum(o, False, None) is None
        for o in T.torchvision_taps
    )


def test_record_survives_the_neck_and_copies(published):
    published()
    m = attach_neck(create_backbone('resnet18', pretrained=True), channels=16)
    for o in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert (
            o.pretrained == 'IMAGENET1K_V1'
            and o.record.mean == (0.485, 0.456, 0.406)
            and o.record.std == (0.229, 0.224, 0.225)
        )


@pytest.mark.parametrize('name', T.torchvision_taps)
def test_record(name):
    for w in models.get_model_weights(name):
        r, t = T._classifier_record(w), w.transforms()
        assert (list(r.mean), list(r.std), [r.input_size], [r.resize_size]) == (
            t.mean,
            t.std,
            t.crop_size,
            t.resize_size,
        )
        assert r.url == w.url and r.tag == w.name and r.recipe == w.meta.get('recipe')
        assert r.metrics == ({} if w.name == 'IMAGENET1K_FEATURES' else w.meta['_metrics']['ImageNet-1K'])
        assert r.name == name and r.publisher == 'torchvision' and r in weight_records(name)
        assert f'-{r.sha256}.pth' in r.url and len(r.sha256) == 8 and int(r.sha256, 16)
        assert r.license == ('CC-BY-NC-4.0' if 'SWAG' in w.name else None)


def test_batch_norm_freezes_with_published_weights_only(published):
    published()
    for pretrained in (False, True):
        m = create_backbone('resnet18', pretrained=pretrained).freeze_to(2).train()
        bns = {k: o for k, o in m.named_modules() if isinstance(o, nn.BatchNorm2d)}
        frozen = {k for k, o in bns.items() if not o.training}
        assert frozen == ({k for k in bns if k.startswith(('bn1', 'layer1'))} if pretrained else set())
        was = m.bn1.running_mean.clone()
        m(noise(n=2))
        assert torch.equal(m.bn1.running_mean, was) == pretrained
        assert not m.conv1.weight.requires_grad and m.layer2[0].conv1.weight.requires_grad


def test_no_network(published):
    p = published()
    p.file.unlink()
    with pytest.raises(
        RuntimeError,
        match="could not get the weights 'IMAGENET1K_V1' of resnet18 from file:.*"
        'check the path, or put that file at .*pretrained=False',
    ) as e:
        create_backbone('resnet18', pretrained=True)
    assert '\n' not in str(e.value)


def test_wrong_hash(published):
    p = published(sha='00000000')
    with pytest.raises(RuntimeError, match='invalid hash value'):
        create_backbone('resnet18', pretrained=True)
    assert not list(p.cache.glob('*.pth'))


def test_incomplete_weights_raise(published):
    published(sd={k: v for k, v in classifier('resnet18').state_dict().items() if k != 'layer4.1.conv2.weight'})
    with pytest.raises(RuntimeError, match='do not fit the model, with 1 missing .layer4.1.conv2.weight'):
        create_backbone('resnet18', pretrained=True)


class Evil:
    def __reduce__(self):
        return print, ('ran',)


def test_weights_cannot_run_code(published, capsys):
    published(sd=dict(a=Evil()))
    with pytest.raises(ValueError, match='cannot be read as weights'):
        create_backbone('resnet18', pretrained=True)
    assert 'ran' not in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    'pretrained,text',
    [
        ('IMAGENET1K_V7', "resnet18 has no weights 'IMAGENET1K_V7': pass True or one of IMAGENET1K_V1"),
        ('ResNet34_Weights.IMAGENET1K_V1', "has no weights 'ResNet34_Weights.IMAGENET1K_V1'"),
        ('', "got pretrained='' for resnet18, expected True, False, the tag"),
        ('coco', "has no weights 'coco': pass True or one of IMAGENET1K_V1"),
        (3, 'has no weights 3'),
        (models.ResNet50_Weights.IMAGENET1K_V2, 'has no weights ResNet50_Weights.IMAGENET1K_V2'),
    ],
)
def test_unknown_weights(pretrained, text):
    with pytest.raises(ValueError, match=text):
        create_backbone('resnet18', pretrained=pretrained)


@pytest.mark.parametrize(
    'name,taps', [('resnet18', 'block'), ('mobilenet_v3_small', 'block'), ('mobilenet_v3_small', 'expansion')]
)
def test_a_record_of_your_own(published, name, taps):
    w = models.get_model_weights(name).DEFAULT
    p = published(w=w, name=name)
    m = create_backbone(name, pretrained=T._classifier_record(w), taps=taps)
    assert m.record.url == p.file.as_uri() and m.pretrained == w.name and m.config == dict(model=name, taps=taps)
    n = create_backbone(name, taps=taps)
    if taps == 'block':
        assert (
            load_weights(n, T._classifier_record(w)).record.tag == w.name
        )  # the record is whole: it says what to drop
