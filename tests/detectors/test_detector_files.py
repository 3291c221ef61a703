import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead
from torchvision.models.detection.rpn import RPNHead

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import randomize_
from backbones_nb.core.published import WeightRecord
from backbones_nb.detectors import efficientdet, faster_rcnn, fcos, mask_rcnn, retinanet
from backbones_nb.detectors.coco_weights import _torchvision_record
from backbones_nb.detectors.detector_files import change_classes, _class_rows, save_detector

torch.set_num_threads(1)
old, new = ['background', 'RBC', 'WBC', 'Platelets'], ['background', 'Platelets', 'RBC', 'Schizont', 'WBC']
slim = dict(backbone='vovnet19_slim_dw')
families = dict(
    faster_rcnn=(faster_rcnn.model, slim | dict(neck_channels=16, head_channels=32)),
    mask_rcnn=(mask_rcnn.model, slim | dict(neck_channels=16, head_channels=32, mask_channels=16)),
    retinanet=(retinanet.model, slim | dict(neck_channels=16)),
    fcos=(fcos.model, slim | dict(neck_channels=32)),
    efficientdet=(
        efficientdet.model,
        slim | dict(img_size=128, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1),
    ),
)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('family', families)
def test_a_file_gives_the_same_detector(tmp_path, family):
    model, kw = families[family]
    net = randomize_(model(num_classes=4, **kw))
    save_detector(net, tmp_path / 'a.safetensors', old)
    got = model(pretrained=str(tmp_path / 'a.safetensors'), **kw)
    assert same(got.state_dict(), net.state_dict()) and got.num_classes == 4
    assert got.pretrained == got.backbone.body.pretrained == 'a.safetensors'
    assert got.record.license is None
    bb = create_backbone('vovnet19_slim_dw', pretrained=tmp_path / 'a.safetensors')
    assert same(bb.state_dict(), net.backbone.body.state_dict())


@pytest.mark.parametrize('family', families)
def test_rows_move_with_their_class(tmp_path, family):
    model, kw = families[family]
    net = randomize_(model(num_classes=4, **kw))
    save_detector(net, tmp_path / 'a.safetensors', old)
    got = model(class_map=new, pretrained=tmp_path / 'a.safetensors', **kw)
    assert got.num_classes == 5
    was, now = net.state_dict(), got.state_dict()
    a, b = _class_rows(was, 4), _class_rows(now, 5)
    assert a.keys() == b.keys() and len(a) >= 2
    for k, (view, first) in b.items():
        for i, name in enumerate(new[first:], first):
            if name in old:
                assert torch.equal(view[i - first], a[k][0][old.index(name) - first]), (k, name)
    assert all(torch.equal(v, now[k]) for k, v in was.items() if k not in a)


@pytest.mark.parametrize('family', ['retinanet', 'fcos'])
def test_permuted_names_permute_the_logits_of_every_anchor(family):
    model, kw = families[family]
    net = model(num_classes=4, **kw).eval()
    names = ['background', 'Platelets', 'RBC', 'WBC']
    x = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        for view, _ in _class_rows(net.state_dict(), 4).values():
            view.normal_()
        a = net.encode(x, None).outputs['cls_logits']
        b = change_classes(net, names, old).encode(x, None).outputs['cls_logits']
    torch.testing.assert_close(b, a[..., [old.index(o) for o in names]])


@pytest.mark.parametrize('family', families)
def test_files_without_names_tell_how_many_classes_they_have(tmp_path, family):
    model, kw = families[family]
    net = model(num_classes=6, **kw)
    torch.save(dict(model={f'module.{k}': v for k, v in net.state_dict().items()}, epoch=1), tmp_path / 'a.pth')
    got = model(pretrained=tmp_path / 'a.pth', **kw)
    assert got.num_classes == 6 and same(got.state_dict(), net.state_dict())
    assert model(num_classes=3, pretrained=tmp_path / 'a.pth', **kw).num_classes == 3


def test_torchvisions_own_file_of_a_detector(tmp_path):
    body = _resnet_fpn_extractor(resnet18(weights=None), 5, norm_layer=nn.BatchNorm2d)
    head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
    sizes = AnchorGenerator(tuple((2**i,) for i in range(5, 10)), ((0.5, 1.0, 2.0),) * 5)
    few = dict(rpn_post_nms_top_n_test=20)  # four convolutions of 256 channels see each of them
    kw = dict(rpn_anchor_generator=sizes, rpn_head=RPNHead(256, 3, 2), box_head=head)
    ref = randomize_(FasterRCNN(body, 5, **kw, **few))
    torch.save(ref.state_dict(), tmp_path / 'checkpoint.pth')
    v2 = dict(neck_norm='bn', rpn_convs=2, box_convs=4, head_norm='bn', min_size=64, max_size=64)
    net = faster_rcnn.model(backbone='resnet18', pretrained=tmp_path / 'checkpoint.pth', **v2, **few).eval()
    assert net.num_classes == 5
    ref.transform.min_size, ref.transform.max_size = (64,), 64
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        want = ref.eval()(x)[0]
        assert len(want['boxes']) and same(net(x)[0], want)


def test_the_normalization_and_the_backbone_come_with_the_file(tmp_path):
    bb = create_backbone('vovnet19_slim_dw', ese=False)
    bb.record = WeightRecord(bb.name, 'a', 'me', mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    net = retinanet.model(3, bb, neck_channels=16)
    save_detector(net, tmp_path / 'a.safetensors', ['background', 'cat', 'dog'])
    got = retinanet.model(pretrained=tmp_path / 'a.safetensors', neck_channels=16)
    assert got.backbone.body.config['ese'] is False
    assert got.transform.image_mean == pytest.approx([0.1, 0.2, 0.3])
    body = create_backbone('vovnet19_slim_dw', pretrained=tmp_path / 'a.safetensors')
    assert body.record.mean == pytest.approx((0.1, 0.2, 0.3)) and body.config['ese'] is False


def test_errors(tmp_path):
    net = retinanet.model(3, **slim, neck_channels=16)
    save_detector(net, tmp_path / 'a.safetensors', ['background', 'cat', 'dog'])
    with pytest.raises(ValueError, match='the file of a retinanet, for a fcos'):
        fcos.model(3, pretrained=tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='includes its backbone'):
        retinanet.model(3, pretrained=tmp_path / 'a.safetensors', pretrained_backbone=True)
    with pytest.raises(RuntimeError, match='of another shape'):
        retinanet.model(3, pretrained=tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='leave num_classes out'):
        retinanet.model(4, class_map=['background', 'cat'])
    with pytest.raises(ValueError, match='got 2 names for the 3 classes'):
        save_detector(net, tmp_path / 'b.safetensors', ['background', 'cat'])
    assert not (tmp_path / 'b.safetensors').exists() and load_file(tmp_path / 'a.safetensors')


def test_coco_names_its_classes():
    from torchvision.models import get_model_weights

    r = _torchvision_record(get_model_weights('fcos_resnet50_fpn').COCO_V1)
    assert len(r.classes) == 91 and r.classes.index('cat') == 17 and 'N/A' not in r.classes
