import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize

from common import close, cm, copies, make_dls
from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD
from backbones_nb.core.create import create_backbone
from backbones_nb.data.records import ClassMap, Record
from backbones_nb.detectors import faster_rcnn, mask_rcnn
from backbones_nb.detectors.detector import mean_std
from backbones_nb.detectors.effdet_levels import effdet_rows
from backbones_nb.icevision import patches
from backbones_nb.learners.detection import detection_learner
from backbones_nb.icevision.backbone import icevision_backbone, model_modules
from backbones_nb.icevision.compat import icevision_compat
from backbones_nb.icevision.loaders import _IceVisionItems, icevision_dls, _normalize_stats, to_loaders
from backbones_nb.icevision.patches import has_icevision, icevision_module
from backbones_nb.icevision.records import from_records, to_records
from backbones_nb.necks.fpn import FPN

if not has_icevision():
    pytest.skip('IceVision absent', allow_module_level=True)

import albumentations
from fastai.learner import load_learner

icevision_compat()
core, masks, data, tfms = (icevision_module(o) for o in ('core', 'core.mask', 'data', 'tfms.albumentations'))
small = dict(rpn_post_nms_top_n_train=100, box_batch_size_per_image=32, box_detections_per_img=10)
quick, r_cnns = 'vovnet19_slim_dw', ('faster_rcnn', 'mask_rcnn')


def kind(family):
    return icevision_module(f'models.{model_modules[family]}')


def lean(source=quick, *args, **kw):
    return icevision_backbone(source, *args, **dict(channels=32) | kw)(pretrained=False)


def net(family, config, **kw):
    kw = (
        dict(small, **kw)
        if family.endswith('rcnn')
        else dict(dict(img_size=128), **kw)
        if family == 'efficientdet'
        else kw
    )
    return kind(family).model(backbone=config, num_classes=3, **kw)


def maps(config, size=64):
    with torch.no_grad():
        return config.backbone.eval()(torch.zeros(1, 3, size, size))


def body(family, model):
    return model.model.backbone if family == 'efficientdet' else model.backbone


def loss(family, model, size=128):
    "One training step's loss of two images, with its gradients."
    x, box, m = (
        torch.rand(2, 3, size, size),
        torch.tensor([[10.0, 10, 50, 50]]),
        torch.zeros(1, size, size, dtype=torch.uint8),
    )
    m[:, 10:50, 10:50] = 1
    target = dict(boxes=box, labels=torch.tensor([1]), masks=m)
    if family == 'efficientdet':
        res = model.train()(x, dict(bbox=[box[:, [1, 0, 3, 2]]] * 2, cls=[torch.ones(1)] * 2))['loss']
    else:
        res = sum(model.train()(list(x), [dict(target) for _ in x]).values())
    res.backward()
    return res.detach()


def ids(o):
    return {id(p) for p in o.parameters()}


# --- backbones


@pytest.mark.parametrize(
    'neck,extra,want',
    [
        ('auto', 'pool', '0 1 2 3 pool'),
        ('fpn', 'pool', '0 1 2 3 pool'),
        ('pan', 'pool', '0 1 2 3 pool'),
        ('bifpn', 'pool', '0 1 2 3 pool'),
        ('fpn', 'p6p7', '0 1 2 p6 p7'),
        ('pan', 'p6p7', '0 1 2 p6 p7'),
        ('bifpn', 'p6p7', '0 1 2 p6 p7'),
        ('fpn', None, '0 1 2 3'),
        (None, 'pool', '0'),
        (lambda c, s: FPN(c, s, 64, extra='pool'), 'pool', '0 1 2 3 pool'),
    ],
)
def test_maps(neck, extra, want):
    config = lean(quick, neck, extra)
    bb, got = config.backbone, maps(config, 128)
    assert ' '.join(got) == want and [o.shape[1:] for o in got.values()] == [
        (bb.out_channels, 128 // s, 128 // s) for s in bb.strides
    ]
    groups = bb.param_groups()
    flat = [id(p) for g in groups for p in g]
    assert len(flat) == len(set(flat)) == len(list(bb.parameters())) and groups[0][0] is next(bb.body.parameters())
    if neck:
        assert {id(p) for p in groups[-1]} == ids(bb.body.neck)


@pytest.mark.parametrize('family,extra', [('faster_rcnn', 'pool'), ('retinanet', 'p6p7')])
def test_the_maps_are_those_of_icevisions_own_backbones(family, extra):
    stock, own = (
        kind(family).backbones.resnet18_fpn(pretrained=False),
        icevision_backbone('resnet18', extra=extra)(pretrained=False),
    )
    a, b = maps(stock), maps(own)
    assert list(a) == list(b) and [o.shape for o in a.values()] == [o.shape for o in b.values()]
    assert sum(p.numel() for p in stock.backbone.fpn.parameters()) == sum(
        p.numel() for p in own.backbone.body.neck.parameters()
    )


def test_kind_of_configuration():
    config = icevision_backbone(quick)
    assert isinstance(config, icevision_module('backbones').BackboneConfig)
    for k in ('backbone', 'model_name'):
        with pytest.raises(AttributeError, match='has not been called'):
            getattr(config, k)


@pytest.mark.parametrize('family', [*r_cnns, 'efficientdet'])
@pytest.mark.parametrize('source', [quick, 'module'])
def test_every_call_gives_a_new_backbone(family, source):
    own = create_backbone(quick) if source == 'module' else source
    config = lean(own, FPN((112, 256, 384, 512), (4, 8, 16, 32), 32, extra='pool') if family == 'mask_rcnn' else 'auto')
    a, b = (body(family, net(family, config(pretrained=False))) for _ in range(2))
    assert ids(a) and not ids(a) & ids(b)
    if source == 'module':
        assert not ids(own) & (ids(a) | ids(b)) and own.strides == (4, 8, 16, 32)
        assert all(
            torch.equal(p, q) for p, q in zip(own.parameters(), a.parameters())
        )  # a copy, with the weights it had


def test_what_pretrained_means_for_a_module():
    m = create_backbone(quick)
    with pytest.raises(ValueError, match='states no weights'):
        icevision_backbone(m)(pretrained=True)
    m.pretrained = 'mine'
    for o in (True, False):
        assert icevision_backbone(m)(pretrained=o).backbone.body.pretrained == 'mine'


def test_any_name_of_timm_and_any_module():
    for o in ('timm/test_resnet', 'test_resnet'):
        assert len(maps(icevision_backbone(o)(pretrained=False))) == 5
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 16, 1))
    assert [tuple(o.shape) for o in maps(icevision_backbone(plain)(pretrained=False)).values()] == [(1, 8, 4, 4)]


def test_a_backbone_with_a_neck_keeps_it():
    bb = icevision_backbone('resnet18_fpn')(pretrained=False).backbone
    assert (
        type(bb.body.neck).__name__ == 'FPN'
        and type(bb.body.body).__name__ != 'WithNeck'
        and bb.strides == (4, 8, 16, 32, 64)
    )


# one or two of every family
some = """darknet19 darknet53 cspdarknet19 cspdarknet53 vovnet39 resnet18 resnet50 mobilenet_v2 mobilenet_v3_small
    efficientnet_b0 vgg11 convnext_tiny regnet_x_400mf timm/resnet10t timm/ese_vovnet19b_dw""".split()


@pytest.mark.parametrize('family', ['faster_rcnn', 'mask_rcnn', 'efficientdet'])
@pytest.mark.parametrize('name', [quick, 'test_resnet', *[pytest.param(o, marks=pytest.mark.slow) for o in some]])
def test_a_step_of_training(name, family):
    m = net(family, lean(name))
    assert loss(family, m).isfinite() and len([p for g in m.param_groups() for p in g]) == len(ids(m))
    first = body(family, m).param_groups()[0][0]
    assert first.grad is not None and first.grad.abs().sum() > 0


def test_retinanet():
    config = lean(extra='p6p7')
    m = net('retinanet', config)
    assert loss('retinanet', m, 64).isfinite() and len(m.param_groups()) == len(config.backbone.param_groups()) + 1
    own, stock = config.model_args('retinanet')['anchor_generator'], m.anchor_generator
    assert own.sizes == stock.sizes and own.aspect_ratios == stock.aspect_ratios


def test_keypoint_rcnn():
    config = lean()
    m = net('keypoint_rcnn', config, num_keypoints=2, **config.model_args('keypoint_rcnn'))
    target = dict(
        boxes=torch.tensor([[10.0, 10, 50, 50]]),
        labels=torch.tensor([1]),
        keypoints=torch.tensor([[[20.0, 20, 1], [30, 30, 1]]]),
    )
    assert set(m([torch.rand(3, 64, 64)], [target])) >= {'loss_keypoint', 'loss_classifier'}


def test_usual_strides_have_the_usual_anchors():
    config = lean()
    own, stock = config.model_args('mask_rcnn'), net('mask_rcnn', config)
    assert own.keys() == {'rpn_anchor_generator', 'box_roi_pool', 'mask_roi_pool'}
    assert own['rpn_anchor_generator'].sizes == stock.rpn.anchor_generator.sizes
    for k in ('box_roi_pool', 'mask_roi_pool'):
        theirs = getattr(stock.roi_heads, k)
        assert (own[k].featmap_names, own[k].output_size, own[k].sampling_ratio) == (
            theirs.featmap_names,
            theirs.output_size,
            theirs.sampling_ratio,
        )


@pytest.mark.parametrize(
    'family,strides,neck',
    [  # each family takes the same path with other strides; a net without a neck has a large head
        ('faster_rcnn', (8, 16, 32), 'fpn'),
        ('mask_rcnn', (8, 16), 'pan'),
        ('faster_rcnn', (16,), None),
        pytest.param('mask_rcnn', (8, 16, 32), 'fpn', marks=pytest.mark.slow),
        pytest.param('faster_rcnn', (8, 16), 'pan', marks=pytest.mark.slow),
        pytest.param('mask_rcnn', (16,), None, marks=pytest.mark.slow),
    ],
)
def test_other_strides(family, strides, neck):
    config = lean(create_backbone(quick, strides=strides), neck)
    with pytest.raises((ValueError, AssertionError, RuntimeError, IndexError)):
        loss(family, net(family, config), 64)
    config = config(pretrained=False)
    assert loss(family, net(family, config, **config.model_args(kind(family))), 64).isfinite()


@pytest.mark.parametrize('strides', [(4, 8, 16, 32), (16, 32)])
def test_a_configuration_of_effdet(strides):
    config = icevision_backbone(create_backbone(quick, strides=strides), 'pan')(pretrained=False)
    table = dict(effdet_rows)
    cfg = config.model_name
    used = [s for s in strides if s >= 8]
    assert cfg.url == '' and [2 ** (i + 1) for i in cfg.backbone_indices] == used and 2**cfg.min_level == used[0]
    m = net('efficientdet', config)
    assert dict(effdet_rows) == table and m.model.config.name not in table
    assert (
        loss('efficientdet', m).isfinite() and type(m.model.fpn).__name__ == 'BiFpn'
    )  # its own, whatever neck was asked for


def test_two_configurations_of_one_name_stay_apart():
    "No state is shared by name: a model gets the backbone of its own configuration, whatever was made since."
    a, b = (icevision_backbone(create_backbone(quick))(pretrained=False) for _ in range(2))
    assert a.model_name.name == b.model_name.name
    for config in (a, b, a):
        model = net('efficientdet', config)
        assert all(
            torch.equal(p, q)
            for p, q in zip(config.source.parameters(), body('efficientdet', model).parameters(), strict=True)
        )


def test_a_saved_model_holds_its_backbone_once():
    model = net('efficientdet', lean(create_backbone(quick)))
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    again = pickle.loads(pickle.dumps(model.model))
    assert len(pickle.dumps(model.model)) < 1.3 * weights
    for f in (copy.deepcopy(model.model).config, again.config):
        assert f.backbone_name == 'bbnb_icevision'
    import timm

    with pytest.raises(ValueError, match='build the backbone again with icevision_backbone'):
        timm.create_model(again.config.backbone_name, **again.config.backbone_args)


@pytest.mark.parametrize('family', ['faster_rcnn', 'efficientdet'])
@pytest.mark.parametrize('pretrained', [None, 'mine'])
def test_freeze_and_unfreeze(records, tmp_path, family, pretrained):
    own = create_backbone(quick)
    own.pretrained = pretrained
    m = net(family, lean(own))
    learn = kind(family).fastai.learner(dls=to_loaders(make_dls(records, tmp_path, size=128), family), model=m)
    bb = body(family, m)
    norms = [o for o in bb.modules() if isinstance(o, nn.BatchNorm2d)]
    affine = {
        id(p) for o in m.modules() if isinstance(o, nn.BatchNorm2d) for p in o.parameters()
    }  # fastai lets them learn

    def learning():
        return [any(p.requires_grad for p in g if id(p) not in affine) for g in m.param_groups()]

    def moved():
        was = [o.running_mean.clone() for o in norms]
        loss(family, m)
        return any(not torch.equal(a, o.running_mean) for a, o in zip(was, norms))

    learn.freeze()  # IceVision's learner has done it already
    assert learning() == [False] * (len(m.param_groups()) - 1) + [True] and moved() == (not pretrained)
    learn.unfreeze()
    assert all(learning()) and moved()


def test_the_weights_mean_and_std_can_be_read():
    own = create_backbone(quick)
    own.record = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    for family in ('faster_rcnn', 'efficientdet'):
        assert mean_std(body(family, net(family, lean(own)))) == ([0.5] * 3, [0.25] * 3)


def test_copies():
    m = net('faster_rcnn', lean())
    for f in copies.values():
        x, o = torch.rand(1, 3, 64, 64), f(m.backbone)
        with torch.no_grad():
            close(m.backbone.eval()(x).values(), o.eval()(x).values())
    o = copy.deepcopy(m)
    assert not ids(m) & ids(o) and {id(p) for g in o.param_groups() for p in g} == ids(o)


@pytest.mark.parametrize(
    'args,kw,error,match',
    [
        (('vovnet93',), {}, ValueError, 'no backbone .vovnet93.'),
        ((3,), {}, TypeError, 'got int as backbone'),
        ((quick,), dict(extra='p8'), ValueError, "extra='p8'"),
        ((quick, 'fpm'), {}, ValueError, "no neck 'fpm'"),
        ((quick,), dict(effdet='efficientdet_dd'), ValueError, 'no EfficientDet'),
        ((nn.Conv2d(3, 8, 3, 16, 1),), dict(variant='vt'), ValueError, 'variant'),
        ((quick,), dict(color=1), TypeError, 'color'),
    ],
)
def test_bad_backbones(args, kw, error, match):
    with pytest.raises(error, match=match):
        icevision_backbone(*args, **kw)(pretrained=False).backbone


def test_unknown_families():
    config = lean()
    with pytest.raises(ValueError, match="got model type 'faster_rcn', .* Did you mean 'faster_rcnn'"):
        config.model_args('faster_rcn')


# --- records


class Reads:
    def __init__(self, a):
        self.a = a

    def __call__(self):
        return self.a


def record(tmp_path, n=2, masks='array', i=0):
    path = tmp_path / f'{i}.png'
    Image.fromarray(np.random.RandomState(i).randint(0, 255, (40, 60, 3), np.uint8)).save(path)
    m = np.zeros((2, 40, 60), np.uint8)
    m[0, 5:20, 5:25], m[1, 10:30, 20:50] = 1, 1
    m[1, 15, 30] = 0
    m = m[:n]
    boxes = np.array([[5.25, 5, 25, 20], [20, 10, 50, 30]], np.float32)[:n]
    return Record(
        f'im{i}', path, (40, 60), boxes, [1, 2][:n], dict(array=m, callable=Reads(m), none=None)[masks], [0, 1][:n]
    )


def same(a, b):
    assert (a.image_id, a.path, a.size) == (b.image_id, b.path, b.size)
    x, y = a.target(), b.target()
    assert x.keys() == y.keys()
    for k in x:
        assert torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k] == y[k], k


@pytest.mark.parametrize('kind_of', ['array', 'callable', 'none'])
@pytest.mark.parametrize('n', [0, 1, 2])
def test_round_trip(tmp_path, n, kind_of):
    r = record(tmp_path, n, kind_of)
    (ice,), ice_map = to_records([r], cm)
    assert ice_map.get_classes() == cm.names and len(ice.detection.bboxes) == n and ice.width == 60
    back, back_map = from_records([ice])
    assert back_map == cm
    same(r, back[0])
    same(r, pickle.loads(pickle.dumps(back[0])))
    (again,), _ = to_records(back, back_map)
    assert again.detection.bboxes == ice.detection.bboxes and again.detection.label_ids == ice.detection.label_ids
    if kind_of != 'none' and n:
        assert np.array_equal(again.load().detection.mask_array.data, r.target()['masks'].numpy())


def ice_record(tmp_path, parts=None, boxes=((5, 5, 25, 20), (20, 10, 50, 30)), class_map=None, size=(40, 60)):
    res = core.ObjectDetectionRecord() if parts is None else core.InstanceSegmentationRecord()
    record(tmp_path)
    res.set_record_id(7)
    res.set_filepath(tmp_path / '0.png')
    if size:
        res.set_img_size(icevision_module('utils').ImgSize(size[1], size[0]), original=True)
    res.detection.set_class_map(class_map or core.ClassMap(['red', 'blue']))
    res.detection.add_labels(['blue', 'red'][: len(boxes)])
    res.detection.add_bboxes([icevision_module('core.bbox').BBox.from_xyxy(*o) for o in boxes])
    if parts:
        res.detection.add_masks(parts)
    return res


def some_masks(kind_of, tmp_path):
    m = record(tmp_path).masks
    if kind_of == 'MaskArray':
        return [masks.MaskArray(m)], m
    if kind_of == 'EncodedRLEs':
        return [masks.MaskArray(o).to_erles(40, 60) for o in m], m
    if kind_of == 'RLE':
        return [masks.RLE.from_coco(masks.MaskArray(o).to_coco_rle(40, 60)[0]['counts']) for o in m], m
    apart = m * (1 - m[::-1])  # a file of numbers holds no overlap
    Image.fromarray((apart * np.array([1, 2])[:, None, None]).sum(0).astype(np.uint8)).save(tmp_path / 'm.png')
    return [masks.MaskFile(tmp_path / 'm.png')], apart


@pytest.mark.parametrize('kind_of', ['MaskArray', 'EncodedRLEs', 'RLE', 'MaskFile'])
def test_icevisions_masks(tmp_path, kind_of):
    parts, want = some_masks(kind_of, tmp_path)
    ice = ice_record(tmp_path, parts)
    (r,), cm2 = from_records([ice])
    assert r.image_id == 7 and cm2 == cm and r.labels.tolist() == [2, 1] and np.array_equal(r.target()['masks'], want)
    (again,), _ = to_records([r], cm2)
    assert again.detection.bboxes == ice.detection.bboxes and np.array_equal(
        again.load().detection.mask_array.data, want
    )


def test_a_size_that_no_parser_set_is_read(tmp_path):
    assert from_records([ice_record(tmp_path, size=None)])[0][0].size == (40, 60)


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('kind_of', ['array', 'callable'])
def test_masks_go_with_their_boxes_through_transforms(tmp_path, kind_of, flip):
    rs = [record(tmp_path, n, kind_of, n) for n in (2, 0)]
    t = [albumentations.HorizontalFlip(p=1)] * flip + [*tfms.resize_and_pad(64)]
    for i, o in enumerate(_IceVisionItems(data.Dataset(to_records(rs, cm)[0], tfms.Adapter(t)))):
        if i == 2:
            break
        img, target = o
        assert img.shape == (3, 64, 64) and len(target['masks']) == len(target['boxes']) == len(
            target['labels']
        ) == len(rs[i].labels)
        for b, m in zip(target['boxes'], target['masks']):
            y, x = np.nonzero(m.numpy())
            assert np.abs(b.numpy() - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() < 1.5


def test_a_box_that_is_cut_away_takes_its_mask_along(tmp_path):
    t = tfms.Adapter([albumentations.Crop(0, 0, 18, 40), *tfms.resize_and_pad(64)])
    _, target = _IceVisionItems(data.Dataset(to_records([record(tmp_path)], cm)[0], t))[0]
    assert (
        target['labels'].tolist() == [1]
        and target['iscrowd'].tolist() == [0]
        and target['masks'].shape == (1, 64, 64)
        and target['masks'].any()
    )


@pytest.mark.parametrize(
    'make,match',
    [
        (lambda p: [data.Dataset(to_records([record(p)], cm)[0])[0]], 'holds an image in memory'),
        (lambda p: [core.SemanticSegmentationRecord()], 'has no boxes'),
        (lambda p: [ice_record(p, class_map=core.ClassMap(['red', 'blue'], background=None))], 'without background'),
        (
            lambda p: [ice_record(p), ice_record(p, class_map=core.ClassMap(['blue', 'red']))],
            'has the classes background, blue, red',
        ),
        (lambda p: [], 'neither records'),
    ],
)
def test_records_that_cannot_be(tmp_path, make, match):
    with pytest.raises(ValueError, match=match):
        from_records(make(tmp_path))


def test_masks_that_are_too_few(tmp_path):
    r = from_records([ice_record(tmp_path, [masks.MaskArray(np.ones((1, 40, 60), np.uint8))])])[0][0]
    with pytest.raises(ValueError, match='2 boxes and 1 masks'):
        r.target()


def test_labels_beyond_the_class_map(tmp_path):
    with pytest.raises(ValueError, match='has label 2'):
        to_records([record(tmp_path)], ClassMap(['red']))


# --- IceVision's data in our learner


def ice_ds(records, *more, size=64):
    return data.Dataset(to_records(records, cm)[0], tfms.Adapter([*tfms.resize_and_pad(size), *more]))


@pytest.mark.parametrize('mean,std', [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))])
def test_normalized_images_come_back(records, mean, std):
    plain, norm = (_IceVisionItems(ice_ds(records[:5], *o)) for o in ((), (albumentations.Normalize(mean, std),)))
    for i in range(5):
        assert torch.equal(plain[i][0], norm[i][0]) and plain[i][0].dtype == torch.uint8
    assert norm.stats == (mean, std) and plain.stats is None


def test_what_cannot_be_undone(records):
    for o in (albumentations.Normalize(normalization='image'), albumentations.Normalize(p=0.5)):
        with pytest.raises(ValueError, match='leave Normalize out'):
            _normalize_stats(tfms.Adapter([o]))

    def own(record):
        record.set_img(np.asarray(record.img, np.float32) / 50 - 2)
        return record

    items = _IceVisionItems(data.Dataset(to_records(records[:1], cm)[0], own))
    with pytest.raises(ValueError, match='undo the normalization'):
        items[0]
    raw = torch.from_numpy(ice_ds(records[:1], albumentations.Normalize())[0].img).permute(2, 0, 1)
    with pytest.raises(ValueError, match='normalize=False'):
        faster_rcnn.model(3, quick, neck_channels=32, head_channels=32, **small).eval()([raw])


def ours(records, path, **kw):
    n = albumentations.Normalize()
    collection = data.RecordCollection(core.InstanceSegmentationRecord).new(
        to_records(records[:8], cm)[0]
    )  # what a parser gives
    train = data.Dataset(collection, tfms.Adapter([albumentations.HorizontalFlip(p=1), *tfms.resize_and_pad(64), n]))
    return icevision_dls(train, ice_ds(records[16:], n), **dict(bs=4, val_bs=3, device='cpu', path=path) | kw)


def test_our_learner_on_icevisions_data(records, tmp_path):
    dls = ours(records, tmp_path)
    assert (dls.class_map, dls.c, dls.train.size, len(dls.train), len(dls.valid)) == (cm, 3, (64, 64), 2, 3)
    learn = detection_learner(
        dls, mask_rcnn.model(3, quick, neck_channels=32, head_channels=32, mask_channels=16, **small)
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
    _, targets = learn.get_preds()
    assert [o['image_id'] for o in targets] == [o.image_id for o in records[16:]] and {'AP', 'mask_AP'} <= set(
        learn.evaluate()
    )
    with learn.no_bar():
        found = learn.predict(records[0].path, score_thr=0.0)
    h, w = records[0].size
    assert (found['boxes'] <= torch.tensor([w, h, w, h]) + 1e-3).all() and found['masks'].shape[1:] == (h, w)
    assert learn.dls.show_batch().axes
    learn.export('x.pkl')
    again = load_learner(tmp_path / 'x.pkl')
    with again.no_bar():
        assert torch.equal(again.predict(records[0].path, score_thr=0.0)['boxes'], found['boxes'])


def test_results_on_training_data_are_without_augmentation(records, tmp_path):
    dls = ours(records, tmp_path)
    flipped, still = [o for o in dls.train.dataset], [o for o in dls.train.new(tfm=None).dataset]
    assert torch.equal(flipped[0][0].flip(2), still[0][0]) and torch.equal(
        dls.valid.new(tfm=None).dataset[0][0], dls.valid.dataset[0][0]
    )


def test_images_of_many_sizes_become_batches(records, tmp_path):
    ds = data.Dataset(to_records(records[:6], cm)[0])
    x, y = icevision_dls(ds, ds, bs=6, size=(48, 80), device='cpu', path=tmp_path).one_batch()
    assert x.shape == (6, 3, 48, 80) and 0 <= x.min() and x.max() <= 1 and len(y) == 6


def test_data_that_is_no_dataset(records):
    with pytest.raises(TypeError, match='got list, expected'):
        icevision_dls([], [])


# --- our data in IceVision's learner


def square(path, n):
    res = []
    for i in range(n):
        r = record(path, i % 3, 'array', i)
        Image.open(r.path).resize((64, 64)).save(r.path)
        r.size, r.masks = (64, 64), np.pad(r.masks, ((0, 0), (0, 24), (0, 4)))
        r.iscrowd[:] = 0
        res.append(r)
    return res


@pytest.mark.parametrize('family', ['faster_rcnn', 'mask_rcnn', 'retinanet', 'efficientdet'])
def test_our_batches_are_those_of_icevisions_own_loaders(tmp_path, family):
    rs = square(tmp_path, 6)
    own = to_loaders(_dls(rs, tmp_path), kind(family))
    ds = data.Dataset(to_records(rs, cm)[0], tfms.Adapter([albumentations.Normalize()]))
    stock = kind(family).valid_dl(ds, batch_size=3, shuffle=False)
    for (a, ra), (b, rb) in zip(own[1], stock, strict=True):
        assert type(a) is type(b) and type(a[0]) is type(b[0]) and type(a[1]) is type(b[1])
        flat = lambda t: list(t.items()) if isinstance(t, dict) else [kv for o in t for kv in o.items()]
        for x, y in zip(a[0], b[0], strict=True):
            assert torch.allclose(x, y, atol=1e-5)
        for (k, x), (l, y) in zip(flat(a[1]), flat(b[1]), strict=True):
            assert k == l and (
                x is y is None or all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y, strict=True))
            )
        assert [(o.record_id, o.img_size, o.detection.label_ids) for o in ra] == [
            (o.record_id, o.img_size, o.detection.label_ids) for o in rb
        ]


def _dls(rs, path, **kw):
    from backbones_nb.data.batches import detection_dls

    return detection_dls(rs, rs, cm, **dict(size=64, bs=3, device='cpu', augment=None, path=path) | kw)


@pytest.mark.parametrize('family', ['faster_rcnn', 'mask_rcnn', 'efficientdet'])
def test_icevisions_learner_on_our_data(records, tmp_path, family):
    coco = icevision_module('metrics')
    metric = coco.COCOMetric(
        metric_type=coco.COCOMetricType.mask if family == 'mask_rcnn' else coco.COCOMetricType.bbox
    )
    size = 128 if family == 'efficientdet' else 64
    dls = to_loaders(_dls(records[1:5], tmp_path, size=size, bs=2), kind(family))
    learn = kind(family).fastai.learner(dls=dls, model=net(family, lean()), metrics=[metric], path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
    assert np.isfinite(learn.recorder.values[-1]).all() and len(learn.recorder.values[-1]) == 3
    learn.export('x.pkl')
    assert learn.dls.valid.show_batch().axes


@pytest.mark.parametrize('stats', [None, ((0.5,) * 3, (0.25,) * 3)])
def test_normalization_is_what_was_asked_for(records, tmp_path, stats):
    dls = make_dls(records, tmp_path)
    (images, _), _ = to_loaders(dls, 'faster_rcnn', stats)[1].one_batch()
    for x, y in zip(images, dls.valid.one_batch()[0]):
        assert torch.allclose(x, normalize(y, *stats) if stats else y)


def test_crowds_are_counted_out_and_not_learned(tmp_path):
    r = record(tmp_path)
    (_, targets), (ice,) = to_loaders(_dls([r], tmp_path, bs=1), 'mask_rcnn')[1].one_batch()
    assert targets[0]['labels'].tolist() == [1] and len(targets[0]['masks']) == 1 and ice.detection.iscrowds == [0, 1]


def test_data_that_a_family_cannot_use(records, tmp_path):
    dls = make_dls(records, tmp_path)
    with pytest.raises(ValueError, match='keypoints'):
        to_loaders(dls, 'keypoint_rcnn')
    with pytest.raises(ValueError, match="got model type 'unet'"):
        to_loaders(dls, 'unet')
    with pytest.raises(ValueError, match='has none: read the data with masks'):
        to_loaders(_dls([record(tmp_path, masks='none')], tmp_path), 'mask_rcnn')
    with pytest.raises(ValueError, match='model_type.show_batch'):
        to_loaders(dls, 'faster_rcnn')[0].show_batch(())


@pytest.mark.parametrize(
    'call',
    [
        lambda r, d: icevision_backbone(quick),
        lambda r, d: to_records(r, cm),
        lambda r, d: from_records([]),
        lambda r, d: icevision_dls(None, None),
        lambda r, d: to_loaders(d, 'faster_rcnn'),
    ],
)
def test_without_icevision_the_lines_that_install_it(records, tmp_path, monkeypatch, call):
    dls = make_dls(records, tmp_path)
    monkeypatch.setattr(patches, 'has_icevision', lambda: False)
    with pytest.raises(ImportError, match='pip install --no-deps icevision==0.12.0'):
        call(records, dls)


def test_holes_in_the_ids_of_a_coco_file(tmp_path):
    Image.new('RGB', (80, 60)).save(tmp_path / 'a.png')
    theirs = core.ClassMap(['cat', None, 'dog', None])
    r = core.ObjectDetectionRecord()
    r.set_record_id(1)
    r.set_filepath(tmp_path / 'a.png')
    r.detection.set_class_map(theirs)
    r.detection.add_labels_by_id([3, 1])
    r.detection.add_bboxes([core.BBox.from_xyxy(5, 5, 20, 20), core.BBox.from_xyxy(9, 9, 40, 40)])
    (ours,), class_map = from_records([r])
    assert class_map.names == ['background', 'cat', 'dog'] and ours.labels.tolist() == [2, 1]
