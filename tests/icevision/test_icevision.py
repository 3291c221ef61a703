"IceVision's own user path for three of its models, on toy pets, after `icevision_compat`."

import pytest

from backbones_nb.icevision.patches import _patch_font, has_icevision, icevision_module, PATCHES

if not has_icevision():
    pytest.skip('IceVision absent', allow_module_level=True)

import copy
import importlib.util
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from backbones_nb.icevision.compat import icevision_compat

icevision_compat()
import icedata  # noqa: E402
from fastai.learner import load_learner  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402
from icevision.all import (
    BBox,
    ClassMap,
    COCOMetric,
    COCOMetricType,
    Dataset,
    ImgSize,
    models,
    ObjectDetectionRecord,
    show_preds,  # noqa: E402
    show_records,
    show_samples,
    tfms,
)

size = 64
small = dict(
    rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32, box_detections_per_img=10
)
kinds = dict(
    faster_rcnn=models.torchvision.faster_rcnn,
    mask_rcnn=models.torchvision.mask_rcnn,
    efficientdet=models.ross.efficientdet,
)


def make_model(kind, num_classes, narrow=True, **kwargs):
    mt = kinds[kind]
    if kind == 'efficientdet':
        return mt.model(mt.backbones.tf_lite0(pretrained=False), num_classes, size)
    pool = lambda size: MultiScaleRoIAlign(['0', '1', '2', '3'], size, 1)  # heads of few weights follow
    pools = dict(box_roi_pool=pool(2)) | (dict(mask_roi_pool=pool(4)) if kind == 'mask_rcnn' else {}) if narrow else {}
    return mt.model(
        num_classes=num_classes, backbone=mt.backbones.resnet18_fpn(pretrained=False, **kwargs), **small, **pools
    )


def quiet(learn):
    return learn.no_bar(), learn.no_logging()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


class Work:
    "One model's data, loaders and learner."

    def __init__(self, kind, path, dest):
        self.kind, self.mt, self.path, self.dest = kind, kinds[kind], path, dest
        breeds = sorted({o.stem.rsplit('_', 1)[0] for o in (path / 'images').glob('*.jpg')})
        self.class_map = ClassMap(breeds)
        where = dict(
            annotations_dir=path / 'annotations' / 'xmls', images_dir=path / 'images', class_map=self.class_map
        )
        masks = kind == 'mask_rcnn'
        if masks:
            self.parser = icedata.pets.PetsMaskParser(masks_dir=path / 'annotations' / 'trimaps', **where)
        else:
            self.parser = icedata.pets.PetsBBoxParser(**where)
        found = self.parser.parse(show_pbar=False)
        one = [r for r in found[0] + found[1] if len(r.detection.bboxes) == 1]  # its trimap is one mask
        self.records = sorted(one, key=lambda r: r.filepath)[:5]
        self.tfms = tfms.A.Adapter([*tfms.A.resize_and_pad(size), tfms.A.Normalize()])
        augment = tfms.A.Adapter([*tfms.A.aug_tfms(size=size, presize=72), tfms.A.Normalize()])
        self.train, self.valid = Dataset(self.records[:2], augment), Dataset(self.records[2:], self.tfms)
        self.dls = [
            self.mt.train_dl(self.train, batch_size=2, shuffle=True),
            self.mt.valid_dl(self.valid, batch_size=2),
        ]
        metric = COCOMetric(COCOMetricType.mask if masks else COCOMetricType.bbox)
        torch.manual_seed(0)
        self.learn = self.mt.fastai.learner(
            dls=self.dls, model=make_model(kind, len(self.class_map)), metrics=[metric], device='cpu', path=dest
        )


@pytest.fixture(scope='module', params=kinds)
def work(request, toy, tmp_path_factory):
    return Work(request.param, toy, tmp_path_factory.mktemp(request.param))


def weights(m):
    return {k: v.clone() for k, v in m.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_shows(work):
    show_records(work.records[:2], ncols=2)
    show_samples([work.train[i] for i in range(2)])
    work.mt.show_batch(next(iter(work.dls[1])), ncols=2)
    assert len(plt.get_fignums()) == 3


def test_lr_find(work):
    with work.learn.no_logging():
        found = work.learn.lr_find(num_it=5, show_plot=False)
    assert 0 < found.valley < 1


def test_fine_tune(work):
    learn, before = work.learn, weights(work.learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3, freeze_epochs=1)
    assert not equal(weights(learn.model), before)
    train, valid, ap = learn.recorder.values[-1]
    assert train > 0 and valid > 0 and 0 <= ap <= 1


def test_freeze_means_all_but_the_last_group(work):
    learn = work.learn
    learn.freeze()
    groups = learn.model.param_groups()
    norms = {
        id(p)
        for m in learn.model.modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
        for p in m.parameters()
    }
    assert all(p.requires_grad for p in groups[-1])
    assert not any(p.requires_grad for g in groups[:-1] for p in g if id(p) not in norms)
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


def test_save_and_load(work):
    learn, before = work.learn, weights(work.learn.model)
    learn.save('weights')
    with torch.no_grad():
        next(learn.model.parameters()).add_(1)
    assert not equal(weights(learn.model), before)
    learn.load('weights')
    assert equal(weights(learn.model), before)


def test_export(work):
    work.learn.export('learner.pkl')
    again = load_learner(work.dest / 'learner.pkl')
    assert equal(weights(again.model), weights(work.learn.model))
    a, b = [
        work.mt.predict(m, work.valid, detection_threshold=0.0) for m in (again.model.eval(), work.learn.model.eval())
    ]
    assert [p.pred.detection.scores.tolist() for p in a] == [p.pred.detection.scores.tolist() for p in b]


def test_predicts(work):
    model = work.learn.model.eval()
    whole = work.mt.predict(model, work.valid, detection_threshold=0.0, keep_images=True)
    loader = work.mt.infer_dl(work.valid, batch_size=2)
    parts = work.mt.predict_from_dl(model, loader, show_pbar=False, keep_images=True, detection_threshold=0.0)
    assert len(whole) == len(parts) == len(work.valid)
    for a, b in zip(whole, parts):
        assert len(a.pred.detection.bboxes) == len(a.pred.detection.label_ids) == len(a.pred.detection.scores)
        np.testing.assert_allclose(a.pred.detection.scores, b.pred.detection.scores, atol=1e-4)
        if work.kind == 'mask_rcnn':
            assert a.pred.detection.mask_array.data.shape[1:] == (size, size)
    show_preds(parts[:2])
    work.mt.show_results(model, work.valid, detection_threshold=0.0, num_samples=2)
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize('shape', [(90, 50), (50, 90), (64, 64)])
def test_end2end_detect(work, shape, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (shape[1], shape[0], 3), np.uint8))
    image.save(tmp_path / 'a.png')
    for img in (image, tmp_path / 'a.png'):
        res = work.mt.end2end_detect(
            img, work.tfms, work.learn.model, class_map=work.class_map, detection_threshold=0.0
        )
        assert (res['width'], res['height']) == shape and res['img'].size == shape
        for b in res['detection']['bboxes']:
            assert 0 <= b.xmin <= b.xmax <= shape[0] and 0 <= b.ymin <= b.ymax <= shape[1]


def test_top_losses(work):
    before = weights(work.learn.model)
    samples, preds, stats = work.mt.interp.plot_top_losses(work.learn.model, work.valid, n_samples=2)
    totals = [s.losses['loss_total'] for s in samples]
    assert (
        totals == sorted(totals, reverse=True)
        and len(preds) == len(work.valid)
        and stats['loss_total']['max'] >= totals[-1]
    )
    assert equal(weights(work.learn.model), before)


def test_lightning(work):
    import pytorch_lightning as pl

    class Net(work.mt.lightning.ModelAdapter):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-4)

    net = Net(copy.deepcopy(work.learn.model).train(), metrics=[COCOMetric()])  # Lightning keeps the mode it finds
    before = weights(net.model)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator='cpu',
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, *work.dls)
    assert 'COCOMetric' in trainer.callback_metrics and not equal(weights(net.model), before)
    after = weights(net.model)
    trainer.validate(net, work.dls[1], verbose=False)
    assert equal(weights(net.model), after)


def test_checkpoint(work):
    name = 'ross.efficientdet' if work.kind == 'efficientdet' else f'torchvision.{work.kind}'
    said = dict(model_name=name, backbone_name='tf_lite0' if work.kind == 'efficientdet' else 'resnet18_fpn')
    model = make_model(work.kind, len(work.class_map), narrow=False)  # a checkpoint names no heads
    models.save_icevision_checkpoint(
        model, work.dest / 'new' / 'c.pth', classes=work.class_map.get_classes(), img_size=size, **said
    )
    back = models.model_from_checkpoint(work.dest / 'new' / 'c.pth')
    assert equal(weights(back['model']), weights(model))
    assert back['class_map'] == work.class_map and back['img_size'] == size


def test_validation_moves_no_statistics(toy, tmp_path):
    work = Work('faster_rcnn', toy, tmp_path)
    model = make_model('faster_rcnn', len(work.class_map), norm_layer=torch.nn.BatchNorm2d)
    learn = work.mt.fastai.learner(dls=work.dls, model=model, metrics=[COCOMetric()], device='cpu')
    before = weights(model)
    with learn.no_bar(), learn.no_logging():
        first = learn.validate()
        assert equal(weights(model), before) and first[0] > 0
        learn.fit(1, 1e-3)
    moved = [k for k, v in model.state_dict().items() if 'running_mean' in k and not torch.equal(v, before[k])]
    assert len(moved) == 20  # training still does


def test_tile_by_tile_with_a_current_sahi(sahi):
    "With sahi installed, this file imports IceVision at all only by the patch."
    from icevision.models.inference_sahi import IceSahiModel
    from sahi.models.base import DetectionModel

    assert 'sahi.model' not in sys.modules and issubclass(IceSahiModel, DetectionModel)
    boxes = [BBox.from_xyxy(3, 4, 20, 24), BBox.from_xyxy(30, 30, 50, 44)]
    found = dict(labels=['b', 'a'], label_ids=[2, 1], scores=np.array([0.9, 0.6]), bboxes=boxes)
    kind = SimpleNamespace(end2end_detect=lambda img, **kwargs: dict(detection=found))
    model = IceSahiModel(kind, torch.nn.Identity(), ClassMap(['a', 'b']), None)
    tiles = dict(slice_height=64, slice_width=64, overlap_height_ratio=0, overlap_width_ratio=0)
    image = Image.new('RGB', (128, 64))
    res = model.get_sliced_prediction(image, keep_sahi_format=True, perform_standard_pred=False, verbose=0, **tiles)
    got = sorted((o.category.name, *o.bbox.to_xyxy()) for o in res.object_prediction_list)
    assert got == [('a', 30 + x, 30, 50 + x, 44) for x in (0, 64)] + [('b', 3 + x, 4, 20 + x, 24) for x in (0, 64)]


# --- a fault that has been repaired by somebody else is left alone: stand-ins with the repaired line in their source


def repaired_model(backbone, num_classes):
    return dict(pretrained_backbone=False, max_detection_points=1)


def repaired_groups(model):
    return model


def repaired_validate(self):
    return self.model.eval()


def repaired_eval(records, preds, metric_type):
    return dict(area=1)


def repaired_detect(img):
    return img.size


@pytest.mark.parametrize(
    'name,module,attr,fixed',
    [
        ('offline', 'models.ross.efficientdet', 'model', repaired_model),
        ('anchors', 'models.ross.efficientdet', 'model', repaired_model),
        ('groups', 'models.torchvision.utils', 'patch_rcnn_param_groups', repaired_groups),
        ('validation', 'models.torchvision.fastai.callbacks', 'RCNNCallback.before_validate', repaired_validate),
        ('areas', 'metrics.coco_metric.coco_metric', 'create_coco_eval', repaired_eval),
        ('size', 'models.inference', '_end2end_detect', repaired_detect),
    ],
)
def test_repaired_is_left_alone(name, module, attr, fixed, monkeypatch):
    owner = icevision_module(module)
    if module == 'models.ross.efficientdet':
        owner = sys.modules[owner.model.__module__]
    *path, last = attr.split('.')
    for o in path:
        owner = getattr(owner, o)
    monkeypatch.setattr(owner, last, fixed)
    assert PATCHES[name][0]() is False and getattr(owner, last) is fixed


def test_repaired_configurations_are_left_alone(monkeypatch):
    for module, name in (
        ('models.torchvision.backbones.backbone_config', 'TorchvisionBackboneConfig'),
        ('models.ross.efficientdet.backbones', 'EfficientDetBackboneConfig'),
    ):
        monkeypatch.setattr(
            getattr(icevision_module(module), name), '__call__', lambda self, pretrained=True: copy.copy(self)
        )
    assert PATCHES['shared'][0]() is False


def test_own_lightning_hook_stays():
    class Mine(kinds['faster_rcnn'].lightning.ModelAdapter):
        def validation_epoch_end(self, outs):
            pass

    icevision_compat()
    assert 'validation_epoch_end' in Mine.__dict__


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA'])
def test_end2end_detect_of_other_pictures(mode):
    net, model_type = make_model('efficientdet', 3), kinds['efficientdet']
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)).convert(mode)
    t = tfms.A.Adapter([*tfms.A.resize_and_pad(size), tfms.A.Normalize()])
    res = model_type.end2end_detect(
        image, t, net, class_map=ClassMap(['a', 'b']), detection_threshold=0.0, return_img=False
    )
    assert (res['width'], res['height']) == (90, 50)


@pytest.mark.parametrize('given', [64, (64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize('shape', [(90, 50), (50, 90), (70, 70)])
def test_boxes_come_back_to_the_picture(given, shape):
    image, box = Image.new('RGB', shape), (10, 12, 40, 44)
    r = ObjectDetectionRecord()
    r.set_record_id(1)
    r.set_img_size(ImgSize(*shape))
    r.set_img(np.array(image))
    r.detection.set_class_map(ClassMap(['a']))
    r.detection.add_labels(['a'])
    r.detection.add_bboxes([BBox.from_xyxy(*box)])
    steps = tfms.A.resize_and_pad(given)
    moved = tfms.A.Adapter(steps).apply(r)
    h, w = moved.img.shape[:2]
    back = icevision_module('models.inference').postprocess_bbox(image, moved.detection.bboxes[0], steps, h, w)
    assert all(abs(a - b) <= 2 for a, b in zip(back, box)), back


def test_statistics_of_top_losses_start_again(work):
    samples, stats = zip(*(work.mt.interp.get_losses(work.learn.model, work.valid)[:2] for _ in range(2)))
    stats = [o['loss_total']['mean'] for o in stats]
    assert [len(o) for o in samples] == [len(work.valid)] * 2 and stats[0] == pytest.approx(stats[1], rel=1e-5)
    assert not any(len(v) > 0 for v in work.mt.interp.losses_dict.values())


def test_patches_are_applied_once():
    assert {o['done'] for o in icevision_compat()} == {'nothing to do'}
    assert {o['name'] for o in icevision_compat()} == set(PATCHES)


def test_a_new_machine_gets_the_font_once(tmp_path):
    assert [_patch_font(tmp_path / '.icevision') for _ in range(2)] == [True, False]
    assert list((tmp_path / '.icevision' / 'fonts').glob('*.ttf'))


@pytest.mark.parametrize('bad', ['fonts', '', 3])
def test_unknown_patch(bad):
    with pytest.raises(ValueError, match='expected names of patches: choose from font, sahi, labels'):
        icevision_compat(skip=[bad])


def test_absent(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'icevision' else find(n, *a))
    with pytest.raises(ImportError) as e:
        icevision_compat()
    assert 'pip install "backbones-nb[icevision]"' in str(
        e.value
    ) and '--no-deps icevision==0.12.0 icedata==0.5.1' in str(e.value)


def test_effdet_is_left_alone():
    "Nothing that the patches replace belongs to effdet, fastai, torch or timm."
    owners = [getattr(o, '__module__', None) or getattr(o, '__name__', '') for o, _, _ in PATCHES.replaced]
    assert owners and {o.split('.')[0] for o in owners} == {'icevision'}


def test_configurations_go_in_place_of_names():
    from effdet import get_efficientdet_config

    build = sys.modules[kinds['efficientdet'].model.__module__].get_efficientdet_config
    cfg = get_efficientdet_config('tf_efficientdet_lite0')
    cfg.fpn_cell_repeats = 1
    other = build(model_name=cfg)
    other.image_size = (64, 64)
    assert (
        other.fpn_cell_repeats == 1
        and tuple(cfg.image_size) != (64, 64)
        and build('tf_efficientdet_d0').name == 'tf_efficientdet_d0'
    )
    with pytest.raises(KeyError):
        build('efficientdet_none')
