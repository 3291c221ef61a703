"Detections of tiles, merged: equal to sahi's at equal settings, and right by themselves."

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from common import Colors, cm, draw_record, make_learner, write_drawn

from backbones_nb.data.run_lengths import run_lengths
from backbones_nb.data.tiles import tile_boxes
from backbones_nb.learners.metrics import coco_eval, coco_keys
from backbones_nb.learners.tiled import merge_detections, shift_detections

rules = [(how, metric, agnostic) for how in ('nms', 'nmm') for metric in ('iou', 'ios') for agnostic in (False, True)]
theirs = dict(nms='NMS', nmm='GREEDYNMM', iou='IOU', ios='IOS')


def clusters(seed, n=60, ties=False):
    "Boxes around a few centers, in two classes, some without an area."
    rng = np.random.RandomState(seed)
    middle = rng.rand(8, 2)[rng.randint(8, size=n)] * 80 + 10 + rng.randn(n, 2) * 3
    side = rng.rand(n, 2) * 10 + 12
    boxes = np.concatenate([middle - side / 2, middle + side / 2], 1).clip(0)
    boxes[::11, 2] = boxes[::11, 0]
    scores = rng.rand(n).round(1) if ties else rng.rand(n)
    return dict(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(rng.randint(1, 3, n)),
        scores=torch.tensor(scores, dtype=torch.float32),
    )


def rows(boxes, labels, scores):
    "Comparable in any order: sorted by score, class and corners."
    res = np.concatenate([np.array(boxes).reshape(-1, 4), np.array(labels)[:, None], np.array(scores)[:, None]], 1)
    return res[np.lexsort((*res.T[:4], res[:, 4], -res[:, 5]))]


def of_sahi(found):
    return rows(
        [o.bbox.to_xyxy() for o in found], [o.category.id for o in found], [float(o.score.value) for o in found]
    )


def of_ours(det):
    assert (det['scores'].diff() <= 0).all()
    return rows(*(det[k].numpy() for k in ('boxes', 'labels', 'scores')))


def to_sahi(det, **kwargs):
    from sahi.prediction import ObjectPrediction
    from sahi.utils.cv import get_coco_segmentation_from_bool_mask

    res = []
    for i, (b, l, s) in enumerate(zip(*(det[k].tolist() for k in ('boxes', 'labels', 'scores')))):
        segm = get_coco_segmentation_from_bool_mask(det['masks'][i].numpy() > 0) if 'masks' in det else None
        res.append(ObjectPrediction(b, l, str(l), segm, s, **kwargs))
    return res


@pytest.mark.parametrize('how,metric,agnostic', rules)
def test_merging_is_that_of_sahi(sahi, how, metric, agnostic):
    from sahi.postprocess.combine import GreedyNMMPostprocess, NMSPostprocess

    kind = dict(nms=NMSPostprocess, nmm=GreedyNMMPostprocess)[how]
    for seed in range(6):
        for thr in (0.2, 0.4, 0.6):
            det = clusters(seed, ties=seed % 2 == 1)
            got = of_ours(merge_detections(det, how, metric, thr, agnostic))
            want = of_sahi(kind(thr, theirs[metric], agnostic)(to_sahi(det)))
            assert got.shape == want.shape and 5 < len(got) < 60
            assert np.abs(got - want).max() < 1e-4


class Noise(nn.Module):
    "A detector whose boxes and scores are a function of the pixels: many, in two classes, that overlap."

    num_classes, loss_names, target_keys = 3, ('loss_none',), ('boxes', 'labels')

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def param_groups(self):
        return [list(self.parameters())]

    def forward(self, images, targets=None, both=False):
        res = []
        for x in images:
            rng = np.random.RandomState(int(x.double().sum() * 1e3) % 2**31)
            h, w = x.shape[-2:]
            n = rng.randint(0, 12)
            corner, side = rng.rand(n, 2) * [w * 0.7, h * 0.7], rng.rand(n, 2) * [w / 2, h / 2] + 3
            boxes = np.concatenate([corner, corner + side], 1).clip(0, [w, h] * 2)
            det = dict(boxes=boxes, scores=rng.rand(n))
            det = {k: torch.tensor(v, dtype=torch.float32) for k, v in det.items()}
            res.append(det | dict(labels=torch.tensor(rng.randint(1, 3, n), dtype=torch.int64)))
        return res


def sahi_model(learn, score_thr):
    "Our learner as a detection model of sahi's."
    from sahi.models.base import DetectionModel

    class Ours(DetectionModel):
        def set_model(self, model):
            self.model = model

        def perform_inference(self, image):
            self._original_predictions = self.model.predict(image, score_thr=self.confidence_threshold)

        def _create_object_prediction_list_from_original_predictions(self, shift_amount_list, full_shape_list):
            first = lambda o: o[0] if isinstance(o[0], (list, tuple)) else o
            where = dict(shift_amount=first(shift_amount_list), full_shape=first(full_shape_list))
            self._object_prediction_list_per_image = [to_sahi(self._original_predictions, **where)]

    return Ours(model=learn, device='cpu', confidence_threshold=score_thr)


def sliced(sahi_detector, image, tiles, overlap, whole, how, metric, agnostic, thr=0.5):
    from sahi.predict import get_sliced_prediction

    return get_sliced_prediction(
        image,
        sahi_detector,
        *tiles,
        *overlap,
        perform_standard_pred=whole,
        postprocess_type=theirs[how],
        postprocess_match_metric=theirs[metric],
        postprocess_match_threshold=thr,
        postprocess_class_agnostic=agnostic,
        force_postprocess_type=True,
        verbose=0,
    ).object_prediction_list


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp('noise')
    records = [draw_record(i, folder, masks=False) for i in range(20)]
    pixels = np.random.RandomState(5).randint(0, 256, (150, 210, 3), dtype=np.uint8)
    return make_learner(records, folder, Noise()), pixels


@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('how,metric,agnostic', rules)
def test_a_prediction_is_that_of_sahi(sahi, noise, how, metric, agnostic, whole):
    learn, image = noise
    want = of_sahi(sliced(sahi_model(learn, 0.2), image, (64, 80), (0.25, 0.25), whole, how, metric, agnostic))
    det = learn.predict_tiled(
        image, (64, 80), 0.25, whole, 0.2, how=how, metric=metric, class_agnostic=agnostic, thr=0.5
    )
    got = of_ours(det)
    assert got.shape == want.shape and len(got) > 10
    assert np.abs(got - want).max() < 1e-4
    assert det['names'] == [learn.dls.class_map.get_name(int(l)) for l in det['labels']]


def test_low_scores_are_suppressed_as_sahi_does_by_default(sahi, noise):
    from sahi.predict import get_sliced_prediction

    learn, image = noise
    for score_thr in (0.05, 0.2):
        want = get_sliced_prediction(image, sahi_model(learn, score_thr), 64, 64, verbose=0).object_prediction_list
        got = of_ours(learn.predict_tiled(image, 64, score_thr=score_thr))
        assert got.shape == of_sahi(want).shape
        assert np.abs(got - of_sahi(want)).max() < 1e-4


@pytest.fixture(scope='module')
def scene():
    "A red and a blue object that no tile of 40 pixels shows in one piece, and the masks."
    im = Image.new('RGB', (120, 90), (90, 90, 90))
    d = ImageDraw.Draw(im)
    d.rectangle([10, 10, 79, 29], fill=(255, 0, 0))
    d.polygon([(30, 80), (100, 80), (65, 45)], fill=(0, 0, 255))
    a = np.asarray(im).astype(int)
    return im, np.stack([a[..., 0] - a[..., 2], a[..., 2] - a[..., 0]]) > 100


class Painter(Colors):
    "Less sure of what an edge of the image cuts."

    def find(self, x):
        det = super().find(x)
        m = det['masks'][:, 0] > 0.5
        cut = m[:, [0, -1]].flatten(1).any(1) | m[..., [0, -1]].flatten(1).any(1)
        return det | dict(scores=torch.where(cut, 0.6, 0.9))


@pytest.fixture(scope='module')
def painter(tmp_path_factory):
    folder = tmp_path_factory.mktemp('painter')
    return make_learner([draw_record(i, folder) for i in range(20)], folder, Painter())


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_parts_and_their_masks_are_joined(painter, scene):
    im, masks = scene
    det = painter.predict_tiled(im, 64, 0.5, size=120)  # the pixels of the image are those that the detector sees
    assert det['labels'].tolist() == [1, 2] and det['masks'].shape == (2, 90, 120)
    assert (det['boxes'] - torch.tensor([[10, 10, 80, 30], [30, 45, 101, 81]])).abs().max() <= 1
    assert all(iou(m.numpy() > 0, t) > 0.9 for m, t in zip(det['masks'], masks))


def test_masks_are_those_of_sahi(sahi, painter, scene):
    im, _ = scene
    found = sliced(sahi_model(painter, 0.5), np.asarray(im), (64, 64), (0.5, 0.5), True, 'nmm', 'ios', False)
    det = painter.predict_tiled(im, 64, 0.5)
    assert np.array_equal(of_ours(det)[:, 4:], of_sahi(found)[:, 4:]) and len(found) == 2
    assert (
        np.abs(of_ours(det) - of_sahi(found)).max() < 2
    )  # where there are masks, sahi takes the boxes of their outlines
    want = {o.category.id: o.mask.bool_mask for o in found}
    for l, m in zip(det['labels'].tolist(), det['masks']):
        assert iou(m.numpy() > 0, want[l]) > 0.9  # polygons lose half a pixel of the outline


def test_suppression_keeps_a_part_where_merging_joins(painter, scene):
    im, _ = scene
    nms = painter.predict_tiled(im, 64, 0.5, whole=False, how='nms', metric='ios', thr=0.2)
    nmm = painter.predict_tiled(im, 64, 0.5, whole=False, how='nmm', thr=0.2)
    widths = [d['boxes'][d['labels'] == 1, 2] - d['boxes'][d['labels'] == 1, 0] for d in (nms, nmm)]
    assert widths[0].max() < 60 and abs(float(widths[1].max()) - 70) <= 2


def test_one_tile_is_a_prediction(painter, scene):
    im, _ = scene
    a, b = painter.predict(im), painter.predict_tiled(im, 200)
    assert len(a['labels']) == 2
    assert a.keys() == b.keys() and a['names'] == b['names']
    for k in ('boxes', 'labels', 'scores'):
        assert torch.equal(a[k], b[k])
    assert all(torch.equal(p, q) for p, q in zip(a['masks'], b['masks']))


def test_nothing_found_is_a_result(painter, noise):
    for learn, keys in ((painter, {'boxes', 'labels', 'scores', 'names', 'masks'}), (noise[0], None)):
        det = learn.predict_tiled(np.full((90, 70, 3), 90, np.uint8), 32, score_thr=1.0)
        assert det['boxes'].shape == (0, 4) and det['names'] == [] and len(det['labels']) == 0
        assert not keys or det.keys() == keys and det['masks'].shape == (0, 90, 70)


def test_a_list_gives_a_list_in_order(painter, scene):
    im, _ = scene
    dot = np.zeros((1, 1, 3), np.uint8)
    res = painter.predict_tiled([im, dot, im], 64)
    assert [len(o['labels']) for o in res] == [2, 0, 2]
    assert torch.equal(res[0]['boxes'], painter.predict_tiled(im, 64)['boxes'])


def test_a_tile_moves_boxes_and_masks_together():
    masks = torch.zeros(2, 30, 40)
    masks[0, 2:10, 3:20], masks[1, 20:30, 30:40] = 1, 1
    det = dict(boxes=torch.tensor([[3.25, 2, 20, 10], [30, 20, 40, 30]]), masks=masks, labels=torch.tensor([1, 2]))
    for given in (det, det | dict(masks=run_lengths(masks))):
        got = shift_detections(given, (50, 60, 90, 90), (100, 120))
        assert got['boxes'].tolist() == [[53.25, 62, 70, 70], [80, 80, 90, 90]]
        assert torch.equal(got['masks'].tensor()[:, 60:90, 50:90], masks.byte())
        assert int(got['masks'].tensor().sum()) == int(masks.sum()) and got['labels'] is det['labels']


@pytest.mark.parametrize('kwargs', [dict(how='soft'), dict(metric='giou')])
def test_an_unknown_rule_is_refused(kwargs):
    with pytest.raises(ValueError, match="expected 'nmm' or 'nms', and 'ios' or 'iou'"):
        merge_detections(clusters(0), **kwargs)


def test_the_order_of_the_tiles_does_not_matter():
    det = clusters(1, ties=True)
    p = torch.randperm(len(det['labels']), generator=torch.Generator().manual_seed(0))
    for how, metric, _ in rules:
        a, b = (merge_detections(o, how, metric) for o in (det, {k: v[p] for k, v in det.items()}))
        assert np.array_equal(of_ours(a), of_ours(b))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run with tiles on eight drawn images; most of them are larger than a tile."
    from backbones_nb.learners.finetune import finetune

    folder = tmp_path_factory.mktemp('tiled')
    parts = write_drawn(folder, masks=False, train=5, valid=3)
    res = finetune(
        data=str(folder / 'data'),
        out=str(folder / 'run'),
        size=32,
        tiles=48,
        overlap=0.25,
        epochs=1,
        bs=2,
        detector='retinanet',
        backbone='vovnet19_slim_dw',
        cpu_preset=True,
        model_args=dict(score_thresh=0.0, detections_per_img=10),
        validate=False,
        device='cpu',
    )
    return folder / 'run', parts['valid'], res


def test_a_run_learns_from_tiles_and_is_measured_on_whole_images(run):
    from backbones_nb.learners.finetune import load_run

    path, held_out, res = run
    learn = load_run(path)
    assert learn.tiles == (48, 0.25) and res['config']['tiles'] == 48
    assert (res['train_images'], res['valid_images']) == (5, 3)
    assert res['steps'] > 5 // 2  # more than whole images alone would give
    assert len((path / 'valid.txt').read_text().split()) == 3
    assert max(len(tile_boxes(r.size, 48, 0.25)) for r in held_out) > 1
    preds, targets = learn.get_results(held_out)
    assert [len(t['labels']) for t in targets] == [len(r.labels) for r in held_out]
    assert coco_eval(preds, targets, cm)['AR100'] == pytest.approx(res['metrics']['AR100'])


def test_a_run_is_measured_again_with_its_tiles(run, capsys):
    from backbones_nb.learners.evaluation import measure

    path, _, res = run
    again = measure(path)
    assert {k: again[k] for k in coco_keys} == pytest.approx({k: res['metrics'][k] for k in coco_keys})


def test_a_run_predicts_with_its_tiles_unless_told_otherwise(run, monkeypatch, capsys):
    from backbones_nb.cli.cli import main
    from backbones_nb.learners.detection import DetectionLearner

    path, held_out, _ = run
    asked = []
    own = DetectionLearner.predict

    def predict(self, item, *args, **kwargs):
        asked.append(len(item) if isinstance(item, list) else 0)
        return own(self, item, *args, **kwargs)

    monkeypatch.setattr(DetectionLearner, 'predict', predict)
    for args in ([], ['--tiles', '0'], ['--tiles', '500'], ['--tiles', '32', '--overlap', '0']):
        assert main(['predict', str(path), str(held_out[0].path), *args]) == 0
    h, w = held_out[0].size
    count = lambda t, o: len(tile_boxes((h, w), t, o))
    assert asked == [count(48, 0.25) + 1, 0, 1, count(32, 0.0) + 1]
