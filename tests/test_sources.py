"""The two sources' own lines, as written, and their backbones in both R-CNNs.

Families of ours are in detectors/test_matrix.py."""

import dataclasses
import hashlib
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from cases import DETECTORS, T, X, at_once, check_detections, icevision, nine, step
from meta import constant_init

from backbones_nb import all as A
from backbones_nb.core import published
from backbones_nb.analysis.parity import randomize_

# --- the lines of the documentation


@pytest.fixture
def typed(tmp_path, monkeypatch):
    "Runs a line after the star import; published weights are files here, `served` the nets that they were saved from."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    served = {}

    def of_torchvision(name):
        torch.save(served[name], path := tmp_path / f'{name}.pth')
        path = path.rename(tmp_path / f'{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth')
        monkeypatch.setattr(models.get_model_weights(name).DEFAULT.value, 'url', path.as_uri())

    def of_timm(name):
        save_file(served[name], path := tmp_path / f'{name}.safetensors')
        record = next(r for r in published.weight_records(name) if r.publisher == 'timm')
        monkeypatch.setitem(
            published.WEIGHTS.records, name, [dataclasses.replace(record, url=path.as_uri(), hub_id=None)]
        )

    def run(line, *files):
        for f in files:
            known = f in vars(models)
            with constant_init():
                net = models.get_model(f) if known else timm.create_model(f)
            served[f] = randomize_(net, x=X[0][None]).state_dict()
            of_torchvision(f) if known else of_timm(f)
        names = dict(class_map=A.ClassMap(['cat', 'dog']), size=128, x=torch.rand(2, 3, 96, 64))
        exec('from backbones_nb.all import *', names)
        *first, last = line.split('; ')
        exec('; '.join(first), names)
        return SimpleNamespace(result=eval(last, names), names=names, served=served)

    return run


def trains(m):
    assert m.num_classes == 3 and all(o > 0 for o in step(m, X, T).values())
    with torch.no_grad():
        assert len(m.eval()(X)) == 2
    return m


def test_faster_rcnn_on_its_default(typed):
    m = trains(typed('faster_rcnn.model(num_classes=len(class_map))').result)
    assert 'resnet50 (random weights), FPN' in repr(m) and m.strides == (4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    'line,name',
    [
        (
            'faster_rcnn.model(backbone=backbones.resnet_fpn.resnet18(pretrained=True), num_classes=len(class_map))',
            'resnet18',
        ),
        (
            'mask_rcnn.model(backbone=backbones.resnet_fpn.resnet34(pretrained=True), num_classes=len(class_map))',
            'resnet34',
        ),
    ],
)
def test_rcnns_on_published_weights(typed, line, name, slow_run):
    o = typed(line, name)
    m, ref = o.result, {k: v for k, v in o.served[name].items() if not k.startswith('fc.')}
    have = m.backbone.body.state_dict()
    assert have.keys() == ref.keys() and all(torch.equal(have[k], v) for k, v in ref.items()) and m.backbone.pretrained
    assert ('loss_mask' in m.loss_names) == line.startswith('mask')
    if slow_run:
        # in the quick run a default net trains in test_faster_rcnn_on_its_default, and narrow ones in test_trains
        trains(m)


def test_efficientdet(typed):
    m = trains(
        typed(
            'efficientdet.model(model_name="tf_efficientdet_lite0", num_classes=len(class_map), img_size=size)'
        ).result
    )
    assert m.name == 'tf_efficientdet_lite0' and m.img_size == (128, 128)


def test_vision_toolbox(typed):
    o = typed(
        'model = backbones.cspdarknet53(pretrained=True); model.eval(); '
        '(model(x), model.get_feature_maps(x), model.out_channels_list)',
        'cspdarknet53',
    )
    selected, every, channels = o.result
    assert [t.shape[1] for t in every] == channels == [64, 128, 256, 512, 1024] and [
        96 // t.shape[2] for t in every
    ] == [2, 4, 8, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(selected, every[1:])) and o.names['model'].pretrained == 'ra_in1k'


def test_vovnet_v1(typed):
    m = typed('backbones.vovnet39(residual=False, ese=False)').result
    assert m(X[0][None])[-1].shape == (1, 1024, 3, 4)


# --- 9 + 6 + 1 + 4 backbones in both R-CNNs

FOLDERS = dict(resnet_fpn=nine) | icevision
EVERY = [(k, o) for k, v in FOLDERS.items() for o in v]
NOW = [('faster_rcnn', 'resnet18'), ('mask_rcnn', 'mobilenet'), ('mask_rcnn', 'vgg11')]  # test_trains in every run
RCNNS = 'faster_rcnn', 'mask_rcnn'


def backbone(folder, name):
    return getattr(getattr(A.backbones, folder), name)()


@pytest.mark.parametrize(
    'kind,folder,name',  # in every run the backbones take turns between the two
    [
        pytest.param(k, *o, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, o in enumerate(EVERY)
        for j, k in enumerate(RCNNS)
    ],
)
@pytest.mark.usefixtures('quick_meta')
def test_builds(kind, folder, name):
    with torch.device('meta'):
        m = getattr(A, kind).model(num_classes=3, backbone=backbone(folder, name))
        if folder == 'resnet_fpn':
            tv = (MaskRCNN if kind == 'mask_rcnn' else FasterRCNN)(
                resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d), 3
            )
            assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in tv.parameters())
    assert m.strides == ((4, 8, 16, 32, 64) if folder == 'resnet_fpn' else (32,))
    assert (
        sum(len(g) for g in m.param_groups())
        == len({id(p) for g in m.param_groups() for p in g})
        == len(list(m.parameters()))
    )


@pytest.mark.parametrize(
    'kind,folder,name',
    [pytest.param(k, *o, marks=[] if (k, o[1]) in NOW else pytest.mark.slow) for k in RCNNS for o in EVERY],
)
def test_trains(kind, folder, name):
    with constant_init():
        body = backbone(folder, name)
    m = at_once(DETECTORS[kind](num_classes=3, backbone=randomize_(body, x=X[0][None])))
    assert all(o > 0 for o in step(m, X, T).values()) and all(p.grad is not None for p in m.parameters())
    m.eval()
    with torch.no_grad():
        check_detections(m, X, m.losses_and_detections(X, T)[1])


@pytest.mark.parametrize(
    'name',
    [
        'tf_efficientdet_lite1',
        *[
            pytest.param(o, marks=pytest.mark.slow)
            for o in ('tf_efficientdet_lite2', 'efficientdet_d0', 'efficientdet_d1', 'efficientdet_d2')
        ],
    ],
)
def test_efficientdets_train(name):
    m = A.efficientdet.model(name, 3, 128)
    assert all(o > 0 for o in step(m, X, T).values()) and all(p.grad is not None for p in m.parameters())
