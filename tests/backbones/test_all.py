"The lines of IceVision's and vision-toolbox's documentation, as a reader of theirs types them."

import pytest
import torch
from torchvision import models
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from cases import icevision, nine

from backbones_nb import all as A
from backbones_nb.core.features import check_contract
from backbones_nb.analysis.parity import randomize_, rel_error
from backbones_nb.core.registry import list_backbones

pytestmark = pytest.mark.usefixtures('quick_meta')
backbones = A.backbones
channels = dict(mobilenet=1280, resnet18=512, resnet34=512) | {o: 512 for o in icevision['vgg']}
vt = dict(darknet19=5, darknet53=5, cspdarknet19=5, cspdarknet53=5, vovnet19_slim=5, vovnet39=5, vovnet57=5, vovnet99=5)


def noise(h=64, w=64):
    return torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', nine)
def test_resnet_fpn(name):
    with torch.device('meta'):
        ours, ref = getattr(backbones.resnet_fpn, name)(), resnet_fpn_backbone(backbone_name=name, weights=None)
    x = torch.empty(1, 3, 96, 64, device='meta')
    with torch.no_grad():
        assert [o.shape for o in ours(x)] == [o.shape for o in ref(x).values()] and ours.has_neck


def test_folders_are_whole():
    for folder, names in icevision.items():
        assert set(vars(getattr(backbones, folder))) == set(names)


@pytest.mark.parametrize('folder,name', [(k, o) for k, v in icevision.items() for o in v])
def test_nets_without_a_pyramid(folder, name):
    "One map at stride 32, as IceVision gave it."
    with torch.device('meta'):
        m = getattr(getattr(backbones, folder), name)()
    maps = m(torch.empty(2, 3, 96, 64, device='meta'))
    assert [tuple(o.shape) for o in maps] == [(2, channels.get(name, 2048), 3, 2)] and m.strides == (32,)


def test_mobilenet_is_all_of_torchvisions_features():
    ours, ref = backbones.mobilenet.mobilenet(), models.mobilenet_v2(weights=None)
    randomize_(ref)
    ours.load_state_dict({k: v for k, v in ref.state_dict().items() if not k.startswith('classifier.')}, strict=True)
    with torch.no_grad():
        assert rel_error(ours.eval()(noise())[0], ref.eval().features(noise())) == 0


@pytest.mark.parametrize('name', vt)
def test_vision_toolbox(name):
    with torch.device('meta'):
        m = getattr(backbones, name)()
    maps = m.get_feature_maps(torch.empty(1, 3, 64, 64, device='meta'))
    assert [o.shape[1] for o in maps] == list(m.out_channels_list) and [64 // o.shape[2] for o in maps] == [
        2,
        4,
        8,
        16,
        32,
    ]


def test_last_map_and_v1():
    m = check_contract(backbones.vovnet39(residual=False, ese=False, strides=(32,)))
    assert m.channels == (1024,) and round(sum(p.numel() for p in m.parameters()) / 1e6, 3) == 21.575


def test_names():
    assert set(list_backbones()) - set(dir(backbones)) == set() and 'vgg' in dir(backbones)
    with pytest.raises(AttributeError, match="no backbone 'darknet_53'. Did you mean 'darknet53'"):
        backbones.darknet_53
    with pytest.raises(AttributeError):
        backbones._repr_html_


def test_star_import():
    names = {}
    exec('from backbones_nb.all import *', names)
    got = {o for o in names if not o.startswith('_')}
    assert {
        'backbones',
        'create_backbone',
        'faster_rcnn',
        'mask_rcnn',
        'efficientdet',
        'detection_learner',
        'COCOMetric',
    } <= got
    assert not got & {'np', 'torch', 'nn', 'partial', 'SimpleNamespace'}
