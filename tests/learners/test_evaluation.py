"What a number of an evaluation means: original pixels, the file's areas, and no influence of batches."

import contextlib
import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from cases import at_once, CLASSES, DETECTORS, SIZE, Tiny
from common import Colors, as_found, cm, same_for_any_batch

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.coco import coco_records, coco_results, to_coco
from backbones_nb.data.formats import formats, read_data, write_data
from backbones_nb.data.records import Record
from backbones_nb.learners.detection import detection_learner
from backbones_nb.learners.metrics import coco_keys

small_medium_large = [(20, 24), (60, 50), (150, 130)]  # of objects, px


class Blobs(Colors):
    "Finds red and blue pixels, off by a little that depends on the image, so that AP lies between 0 and 1."

    def find(self, x):
        found = super().find(x)
        shift = float(x.mean()) * 8 % 1
        found['boxes'] = found['boxes'] + torch.tensor([shift, 0, shift, 0])
        return found | dict(scores=found['scores'] * x.mean() * (1 + 0.1 * (found['labels'] - 1)))


def draw(i, folder):
    "A picture with a red and a blue rectangle, of sizes that a letterbox would put into another bucket."
    rng = np.random.default_rng(i)
    h, w = (int(o) for o in rng.integers(200, 500, 2))
    img, boxes = Image.new('RGB', (w, h), (90, 90, 90)), []
    for k in range(2 if i % 4 else 0):
        bw, bh = small_medium_large[(i + k) % 3]
        x = int(rng.integers(k * w // 2, (k + 1) * w // 2 - min(bw, w // 2 - 1)))
        y = int(rng.integers(0, h - bh))
        bw = min(bw, w // 2 - 1)
        ImageDraw.Draw(img).rectangle([x, y, x + bw - 1, y + bh - 1], fill=[(255, 0, 0), (0, 0, 255)][k])
        boxes.append([x, y, x + bw, y + bh])
    img.save(folder / f'{i}.png')
    masks = np.zeros((len(boxes), h, w), np.uint8)
    for m, (x1, y1, x2, y2) in zip(masks, boxes):
        m[y1:y2, x1:x2] = 1
    return Record(str(i), folder / f'{i}.png', (h, w), boxes, range(1, len(boxes) + 1), masks, class_map=cm)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return [draw(i, folder) for i in range(12)]


def learner(train, valid, path, net=None, bs=4, size=96, **kw):
    dls = detection_dls(train, valid, cm, size=size, bs=bs, seed=0, device='cpu', path=path, augment=None, **kw)
    learn = detection_learner(dls, net or Blobs(), metrics=[*coco_keys, *(f'mask_{k}' for k in coco_keys)])
    return quiet(learn)


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


def validated(learn):
    return dict(zip(['valid_loss', *learn.metrics.attrgot('name')[2:]], map(float, learn.validate())))


def pycoco(truth, results, iou_type):
    "The twelve numbers of pycocotools for a COCO file's content and a list of results."
    coco = pytest.importorskip('pycocotools.coco')
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = truth
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(results), iou_type)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return dict(zip(coco_keys, e.stats))


def pycoco_of_predictions(learn, records, truth, iou_type='bbox'):
    preds = learn.predict(list(records), score_thr=0)
    preds = [o | dict(masks=o['masks'].tensor()) for o in preds]
    return pycoco(truth, coco_results(preds, records, cm, iou_type=iou_type), iou_type)


def assert_close(got, want, prefix='', tol=1e-6):
    assert {k: got[prefix + k] for k in want} == pytest.approx(want, abs=tol)


# --- original pixels and stated areas


@pytest.mark.parametrize('size', [64, 256])
def test_numbers_are_those_of_pycocotools_on_the_original_images(drawn, tmp_path, size):
    learn = learner(drawn, drawn, tmp_path, size=size)
    seen = validated(learn)
    for kind, prefix in (('bbox', ''), ('segm', 'mask_')):
        want = pycoco_of_predictions(learn, drawn, to_coco(drawn, cm), kind)
        assert min(want[k] for k in ('APs', 'APm', 'APl')) > 0 and 0.05 < want['AP'] < 0.999 + (kind == 'segm')
        assert_close(seen, want, prefix)
        assert_close(learn.evaluate(), want, prefix)


@pytest.mark.parametrize('factor', [1.0, 0.2, 6.0])
def test_sizes_are_judged_by_the_area_in_the_file(drawn, tmp_path, factor):
    truth = to_coco(drawn, cm)
    for a in truth['annotations']:
        a['area'] *= factor
    (tmp_path / 'ann.json').write_text(json.dumps(truth))
    records, *_ = coco_records(tmp_path / 'ann.json', drawn[0].path.parent, masks=True)
    records = [replace(r, class_map=None) for r in records]
    learn = learner(records, records, tmp_path)
    want = pycoco_of_predictions(learn, records, truth)
    assert_close(validated(learn), want)
    again = to_coco(records, cm)
    assert [a['area'] for a in again['annotations']] == [a['area'] for a in truth['annotations']]
    (tmp_path / 'boxes').mkdir()
    boxes, *_ = coco_records(tmp_path / 'ann.json', drawn[0].path.parent)  # the same without masks
    assert all(np.array_equal(a.area, b.area) for a, b in zip(boxes, records) if len(a.labels))


def test_an_object_at_the_border_counts_on_both_sides(tmp_path):
    "1024 square pixels are small and medium; a letterbox there and back would round."
    img = Image.new('RGB', (301, 211), (90, 90, 90))
    ImageDraw.Draw(img).rectangle([11, 13, 42, 44], fill=(255, 0, 0))
    img.save(tmp_path / 'a.png')
    r = Record('a', tmp_path / 'a.png', (211, 301), [[11, 13, 43, 45]], [1], area=[1024], masks=np.zeros((1, 211, 301)))
    r.masks[0, 13:45, 11:43] = 1
    learn = learner([r], [r], tmp_path, bs=1, size=100)
    seen = validated(learn)
    assert seen['APs'] == seen['APm'] == seen['AP'] > 0 and seen['APl'] == -1
    assert Record('b', 'b.png', (9, 9), [[0, 0, 3, 3]] * 2, [1, 1], area=[np.nan, 4]).target()['area'].tolist() == [
        9,
        4,
    ]
    with pytest.raises(ValueError, match='1 boxes, 1 labels, 1 crowd flags and 2 areas'):
        replace(r, area=[1, 2])


@pytest.mark.parametrize('name', [o.name for o in formats if o.write])
def test_every_format_is_measured_in_its_own_pixels(drawn, tmp_path, name):
    write_data(drawn, cm, tmp_path / 'out', name)
    parts, classes, _ = read_data(tmp_path / 'out', class_map=cm, masks=formats[name].masks)
    (records,) = parts.values()
    without = [replace(r, masks=None) for r in records]
    learn = learner(without, without, tmp_path, net=BoxBlobs())
    learn.metrics = learn.metrics[:12]
    seen = learn.evaluate(iou_type='bbox')
    want = pycoco_of_predictions(learn, without, to_coco(without, cm))
    assert_close(seen, want)
    by_name = {r.path.name: r for r in without}
    known = [by_name[r.path.name] for r in drawn if r.path.name in by_name]
    assert len(known) == len(drawn)


class BoxBlobs(Blobs):
    target_keys = ('boxes', 'labels')


# --- batches, order, workers, processes


def numbers(learn, dl=None):
    "Validation loss with its parts, AP of boxes and of masks."
    return dict(
        zip(['valid_loss', *(o for o in learn.metrics.attrgot('name') if 'train' not in o)], learn.validate(dl=dl))
    )


@pytest.mark.parametrize('family', DETECTORS)
def test_loss_and_ap_do_not_depend_on_the_batch(records, tmp_path, family):
    torch.manual_seed(0)
    net = at_once(DETECTORS[family](num_classes=CLASSES, backbone=Tiny()))
    make = partial(detection_dls, records[:8], class_map=cm, size=SIZE, seed=0, device='cpu', path=tmp_path)
    learn = quiet(detection_learner(make(valid=records[16:], bs=8), net, lr=3e-3))
    learn.fit(1)  # statistics of the data
    more = dict(num_workers=2) if family == 'fcos' else {}
    with same_for_any_batch():
        valid = as_found(learn, 6, tmp_path)
        want = numbers(learn, make(valid=valid, bs=1).valid)
        assert want['valid_loss'] > 0 and 0.05 < want['AP'] < 0.95 and 0.05 < want.get('mask_AP', 0.5) < 0.95
        for part, bs in ((valid[::-1], 2), (valid, 3), (valid[::-1], 8)):
            assert numbers(learn, make(valid=part, bs=bs, **more).valid) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_ap_of_masks_and_boxes_in_any_batch_and_order(drawn, tmp_path):
    "Equal scores everywhere: then it counts in which order images come."
    learn = learner(drawn, drawn, tmp_path, net=SameScore())
    want = numbers(learn)
    assert 0.05 < want['AP'] < 0.95 and 0.05 < want['mask_AP'] < 0.95
    for order, bs in ((slice(None), 1), (slice(None), 5), (slice(None, None, -1), 2), (slice(None, None, -1), 12)):
        other = learner(drawn, drawn[order], tmp_path, net=SameScore(), bs=bs)
        assert numbers(other) == pytest.approx(want, rel=1e-6, abs=1e-9)


class SameScore(Blobs):
    "Right on every second image, as sure everywhere."

    def find(self, x):
        found = super().find(x)
        if float(x.mean()) * 1000 % 2 > 1:
            found = {k: v.flip(0) if k in ('labels',) else v for k, v in found.items()}
        return found | dict(scores=torch.full((len(found['labels']),), 0.5))
