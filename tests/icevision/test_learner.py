"IceVision's training on our data, its models wrapped to meet our contract, and both side by side on equal weights."

import inspect
import os
import sys
from functools import partial

import pytest

from backbones_nb.icevision.patches import has_icevision, icevision_module

if not has_icevision():
    pytest.skip('IceVision absent', allow_module_level=True)

import torch
from common import in_a_fork
from fastai.learner import load_learner
from torchvision.ops import box_area, MultiScaleRoIAlign

from backbones_nb.analysis.parity import map_weights
from backbones_nb.core.create import create_backbone
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.pets import pets_splits
from backbones_nb.detectors import efficientdet, faster_rcnn, mask_rcnn
from backbones_nb.learners.detection import NoValidation, detection_learner
from backbones_nb.icevision.backbone import model_modules as bridge
from backbones_nb.icevision.loaders import IceVisionBatches
from backbones_nb.icevision.compat import icevision_compat, losses_in_eval
from backbones_nb.icevision.learner import IceVisionDetector, icevision_learner, icevision_model, split_icevision_args
from backbones_nb.learners.metrics import coco_eval
from tools.proc import run

icevision_compat()
small = dict(
    rpn_post_nms_top_n_train=100,
    rpn_post_nms_top_n_test=50,
    box_batch_size_per_image=32,
    box_detections_per_img=10,
    box_score_thresh=1e-3,
)
thin = dict(neck_channels=32)
families = dict(
    faster_rcnn=small | thin,
    mask_rcnn=small | thin,
    efficientdet=dict(img_size=96),
    retinanet=dict(detections_per_img=10) | thin,
)
ours = dict(faster_rcnn=faster_rcnn, mask_rcnn=mask_rcnn, efficientdet=efficientdet)
body = 'vovnet19_slim_dw'


def some(toy, n_train, n_valid, bs):
    train, valid, class_map, _ = pets_splits(toy, masks=True)
    kw = dict(size=96, bs=bs, augment=None, seed=0, device='cpu')
    return detection_dls(train[:n_train], valid[:n_valid], class_map, **kw)


@pytest.fixture(scope='module')
def few(toy):
    return some(toy, 4, 2, 2)


@pytest.fixture(scope='module')
def dls(toy):
    "Enough to train models that find something."
    return some(toy, 12, 6, 3)


def quiet_fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)


@pytest.mark.parametrize('family', families)
def test_contract(family, few):
    torch.manual_seed(0)
    model = icevision_model(family, len(few.class_map), body, **families[family])
    x, y = few.valid.one_batch()
    parts = model.train()(x, list(y))
    assert set(parts) == set(model.loss_names) and all(v.isfinite() for v in parts.values())
    sum(parts.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    before = {k: v.clone() for k, v in model.named_buffers()}
    with torch.no_grad():
        losses, found = model.eval()(x, list(y), both=True)
    assert set(losses) == set(model.loss_names)
    for d in found:
        assert set(d) == {'boxes', 'labels', 'scores', *['masks'] * (family == 'mask_rcnn')}
        assert (
            d['boxes'].shape == (len(d['labels']), 4)
            and (d['labels'] >= 1).all()
            and (d['labels'] < len(few.class_map)).all()
        )
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    alone = model.eval()(x)
    for a, b in zip(found, alone):
        assert torch.equal(a['boxes'], b['boxes'])
    none = [dict(t, **{k: t[k][:0] for k in ('boxes', 'labels', 'masks', 'iscrowd', 'area')}) for t in y]
    assert all(v.isfinite() for v in model.train()(x, none).values())


@pytest.mark.parametrize('family', families)
def test_trains_by_either(family, few, tmp_path):
    torch.manual_seed(0)
    model = icevision_model(family, len(few.class_map), body, **families[family])
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for make in (icevision_learner, detection_learner):
        learn = make(few, model, path=tmp_path)
        assert all(p.requires_grad for p in model.parameters())
        quiet_fit(learn, 1, 1e-3, cbs=NoValidation())
        now = model.state_dict()
        assert not all(torch.equal(v, now[k]) for k, v in weights.items())
        weights = {k: v.clone() for k, v in now.items()}
    learn.freeze()
    convs = lambda m: [o.weight for o in m.modules() if isinstance(o, torch.nn.Conv2d)]  # norms continue to learn
    assert not any(
        p.requires_grad for p in convs(model.backbone if family == 'efficientdet' else model.backbone.body.body)
    )
    if family != 'efficientdet':
        assert all(p.requires_grad for p in convs(model.neck))


@pytest.fixture(scope='module', params=ours)
def pair(request, dls):
    "IceVision's model, a little trained, and ours with its weights."
    family, n = request.param, len(dls.class_map)
    torch.manual_seed(0)
    kw = {k: v for k, v in families[family].items() if k not in thin}  # a thin neck finds too little
    model = icevision_model(family, n, body, **kw)
    quiet_fit(icevision_learner(dls, model), 2, 1e-3, cbs=NoValidation())
    net = ours[family].model(num_classes=n, backbone=create_backbone(body), **kw)
    map_weights(model.net.model.state_dict() if family == 'efficientdet' else model.net, net)
    return model, net


def test_equal_losses(pair, dls):
    model, net = pair
    x, y = dls.valid.one_batch()
    batch, _ = next(iter(icevision_learner(dls, model).dls.valid))
    losses_in_eval(model.net)
    if model.family == 'efficientdet':
        model.net.eval()
    with torch.no_grad():
        torch.manual_seed(1)
        a = net.losses_and_detections(x, list(y))[0]
        torch.manual_seed(1)
        b = model.net(*batch)
    if model.family == 'efficientdet':
        assert float(sum(a.values())) == pytest.approx(float(b['loss']), rel=1e-4)
    else:
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, rel=1e-4)


def moved(pred, target, n=2):
    """Ground truth near the first detections, boxes a tenth to the right, masks a pixel:
    COCO's numbers of it are neither 0 nor 1."""
    boxes = pred['boxes'][:n]
    by = ((boxes[:, 2] - boxes[:, 0]) / 10).clamp(1)
    boxes = boxes + torch.stack([by, by * 0, by, by * 0], 1)
    res = dict(
        boxes=boxes,
        labels=pred['labels'][:n],
        iscrowd=torch.zeros(n, dtype=torch.int64),
        area=box_area(boxes),
        image_id=target['image_id'],
    )
    return res | ({'masks': pred['masks'][:n].tensor().roll(1, 2)} if 'masks' in pred else {})


def test_side_by_side(pair, dls):
    model, net = pair
    preds, targets = detection_learner(dls, net).get_preds()
    mt = icevision_module(f"models.{bridge[model.family]}")
    loader = dls.valid.new(cls=IceVisionBatches, collate=mt.build_infer_batch, stats=model.stats)
    found = mt.predict_from_dl(model.net.eval(), loader, show_pbar=False, detection_threshold=0.0)
    assert len(preds) == len(found)
    for p, q in zip(preds, (o.pred.detection for o in found)):
        real = [i for i, l in enumerate(q.label_ids) if l > 0]
        assert len(real) >= 2 and p['labels'].tolist() == [q.label_ids[i] for i in real]
        want = torch.tensor([q.bboxes[i].xyxy for i in real])
        torch.testing.assert_close(p['boxes'], want.float(), atol=1e-3, rtol=1e-5)
    truths = [moved(*o) for o in zip(preds, targets)]
    kind = 'segm' if model.family == 'mask_rcnn' else 'bbox'
    numbers = coco_eval(preds, truths, dls.class_map, kind)
    assert 0.05 < numbers['AP'] < 1
    through = coco_eval(
        detection_learner(dls, model).get_preds()[0], truths, dls.class_map, kind
    )  # IceVision's, wrapped
    assert list(numbers.values()) == pytest.approx(list(through.values()), abs=1e-6)
    for q, t in zip(found, truths):
        q.ground_truth = loader.ice_record(torch.zeros(3, 96, 96), t)
    metrics = icevision_module('metrics')
    metric = metrics.COCOMetric(metrics.COCOMetricType(kind))
    metric.accumulate(found)
    assert list(numbers.values()) == pytest.approx([float(v) for v in metric.finalize().values()], abs=1e-6)


def test_detections_alone_cost_no_losses(few):
    model = icevision_model('efficientdet', len(few.class_map), body, **families['efficientdet']).eval()
    x, y = few.valid.one_batch()
    calls = []
    model.net.loss_fn.register_forward_pre_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        (_, found), alone = model(x, list(y), both=True), model(x)
    assert len(calls) == 1
    for a, b in zip(found, alone):
        assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize(
    'family,args,error,match',
    [
        ('fcos', {}, ValueError, 'got model type'),
        ('keypoint_rcnn', {}, ValueError, 'keypoints'),
        ('faster_rcnn', dict(neck_chanels=9), TypeError, "Did you mean 'neck_channels'"),
    ],
)
def test_bad_args(family, args, error, match):
    with pytest.raises(error, match=match):
        split_icevision_args(family, args)


def test_args_are_split():
    args = dict(neck='pan', neck_channels=64, anchor_scale=4, box_detections_per_img=10)
    assert split_icevision_args('faster_rcnn', args) == (
        dict(neck='pan', channels=64),
        dict(anchor_scale=4),
        dict(box_detections_per_img=10),
    )


@pytest.mark.parametrize(
    'bad,error,match',
    [
        (dict(detector='fcos'), ValueError, 'got model type'),
        (dict(detector='keypoint_rcnn'), ValueError, 'keypoints'),
        (dict(detector='efficientdet'), ValueError, 'pass img_size'),
        (dict(detector='faster_rcnn', head_channels=9), TypeError, "takes no argument 'head_channels'"),
        (dict(detector='efficientdet', img_size=100), ValueError, 'cannot work at 100x100'),
        (dict(detector='efficientdet', img_size=96, neck='pan'), TypeError, "takes no argument 'neck'"),
        (dict(detector='retinanet', mask_head=1), TypeError, "takes no argument 'mask_head'"),
    ],
)
def test_bad_model(bad, error, match):
    with pytest.raises(error, match=match):
        icevision_model(num_classes=3, backbone=body, **bad)


@pytest.mark.parametrize('family', ['faster_rcnn', 'retinanet', 'efficientdet'])
def test_stock_models(family, few, tmp_path):
    mt = icevision_module(f"models.{'ross' if family == 'efficientdet' else 'torchvision'}.{family}")
    name, size = ('tf_lite0', dict(img_size=96)) if family == 'efficientdet' else ('resnet18_fpn', {})
    config = getattr(mt.backbones, name)(pretrained=False)
    kw = {k: v for k, v in families[family].items() if k not in thin}
    if family == 'faster_rcnn':
        kw |= dict(box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], 2, 1))  # a head of few weights follows
    net = mt.model(backbone=config, num_classes=len(few.class_map), **kw)
    learn = detection_learner(
        few, IceVisionDetector(net, mt, len(few.class_map), img_size=96 if size else None), path=tmp_path
    )
    quiet_fit(learn, 1, 1e-4, cbs=NoValidation())
    learn.export('learner.pkl')
    a, b = [o.predict(few.valid_ds.items[0], score_thr=0.0) for o in (learn, load_learner(tmp_path / 'learner.pkl'))]
    assert torch.equal(a['scores'], b['scores'])


foreign = 'icevision', 'albumentations', 'pytorch_lightning'


def import_ours():
    import backbones_nb.icevision.learner  # noqa: F401

    return [o for o in foreign if o in sys.modules]


def load_and_undo(file):
    "The class of a loaded learner's model, and what the patches have replaced, before and after they are undone."
    import requests

    def refuse(*a, **k):
        raise ConnectionError('no network')

    requests.get = refuse
    from fastai.learner import load_learner

    kind = type(load_learner(file).model).__name__
    from backbones_nb.icevision.compat import icevision_compat
    from backbones_nb.icevision.patches import PATCHES, icevision_module

    icevision_compat()
    callback = icevision_module('models.torchvision.fastai.callbacks').RCNNCallback
    dataset = icevision_module('data.dataset').Dataset
    models = icevision_module('models')

    def state():
        return (
            hasattr(callback.before_validate, 'patched_by'),
            hasattr(dataset, 'new_empty'),
            hasattr(models, 'model_from_checkpoint'),
            hasattr(models.torchvision.mask_rcnn, 'end2end_detect'),
        )

    a = state()
    PATCHES.undo()
    b = state()
    again = {o['done'] for o in icevision_compat()}
    c = state()
    PATCHES.clear()
    return kind, (a, b, c, 'patched' in again, len(PATCHES), len(PATCHES.replaced), state() == b)


def in_forks(file):
    "In forks where neither IceVision nor this package has been imported."
    imported = in_a_fork(import_ours, 'backbones_nb', 'icedata', *foreign)
    return imported, in_a_fork(partial(load_and_undo, file), 'backbones_nb', 'icedata', 'icevision', 'loguru')


def in_a_new_process(file):
    "The first fork imports ours alone, before the other has imported anything."
    code = '\n'.join(
        [
            'import os, sys, warnings',
            "warnings.simplefilter('ignore')",
            f'foreign = {foreign}',
            *map(inspect.getsource, (import_ours, load_and_undo)),
            'if not (child := os.fork()):',
            '    print(import_ours(), flush=True)',
            '    os._exit(0)',
            'os.waitpid(child, 0)',
            'print(load_and_undo(sys.argv[1]))',
        ]
    )
    env = os.environ | dict(HOME=str(file.parent / 'home'), HF_HUB_OFFLINE='1')
    done = run(sys.executable, '-W', 'ignore', '-c', code, file, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *_, last = done.stdout.strip().splitlines()
    return eval(first), eval(last)


@pytest.mark.parametrize('where', [in_forks, pytest.param(in_a_new_process, marks=pytest.mark.slow)])
def test_where_icevision_was_never_started(few, tmp_path, where):
    "An import changes nothing, a learner with IceVision's model loads, and patches can be undone."
    learn = detection_learner(
        few, icevision_model('efficientdet', len(few.class_map), body, img_size=96), path=tmp_path
    )
    learn.export('learner.pkl')
    imported, (kind, undone) = where(tmp_path / 'learner.pkl')
    assert imported == [] and kind == 'IceVisionDetector'
    yes, no = (True,) * 4, (False,) * 4
    assert undone == (yes, no, yes, True, 0, 0, True)


def test_both_leaves_the_mode(few):
    x, y = few.valid.one_batch()
    for family in ('faster_rcnn', 'efficientdet'):
        model = icevision_model(family, len(few.class_map), body, **families[family]).train()
        model(x, list(y), both=True)
        assert model.net.training and set(model(x, list(y))) == set(model.loss_names)


def test_bad_learner(few):
    with pytest.raises(ValueError, match='num_classes=9'):
        icevision_learner(few, icevision_model('faster_rcnn', 9, body))
    net = icevision_model('faster_rcnn', 3, body).net
    with pytest.raises(ValueError, match='keypoint'):
        IceVisionDetector(net, 'keypoint_rcnn', 3)
    with pytest.raises(TypeError, match="expected a model of IceVision's efficientdet"):
        IceVisionDetector(net, 'efficientdet', 3)
    with pytest.raises(ValueError, match='the model has 3 with background'):
        IceVisionDetector(net, 'faster_rcnn', 5)
    with pytest.raises(TypeError, match='wrap an IceVision model'):
        icevision_learner(few, net)
    small_net = icevision_model('efficientdet', len(few.class_map), body, img_size=128).eval()
    with pytest.raises(ValueError, match='an image of 96x96, but this efficientdet was built for 128x128'):
        small_net(few.valid.one_batch()[0])
