import contextlib
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backbones_nb.data.run_lengths import run_lengths, RunLengths, to_cpu_rle
from backbones_nb.learners.baseline import mean_box_detector
from backbones_nb.learners.metrics import coco_eval, coco_keys, coco_table, COCOMetric, confusion


def boxes(n, size, g, small=False):
    xy = torch.rand(n, 2, generator=g) * size * 0.6
    wh = torch.rand(n, 2, generator=g) ** (4 if small else 1) * size * 0.4 + 2
    return torch.cat([xy, xy + wh], 1)


def random_case(n=30, seed=0, classes=3, size=300, masks=False):
    "Targets of many sizes and predictions that hit, miss and repeat them."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g)
    preds, targs = [], []
    for i in range(n):
        k, m = int(6 * rand(1)), int(8 * rand(1))
        b = boxes(k, size, g, small=i % 2 == 0)
        l = torch.randint(1, classes + 1, (k,), generator=g)
        pb = torch.cat(
            [b + torch.randn(k, 4, generator=g) * 0.04 * (b[:, 2:] - b[:, :2]).repeat(1, 2), boxes(m, size, g)]
        )
        t = dict(
            boxes=b,
            labels=l,
            iscrowd=(rand(k) < 0.15).long(),
            area=(b[:, 2:] - b[:, :2]).prod(1) * (0.5 + 0.5 * rand(k)),
        )
        p = dict(boxes=pb, labels=torch.cat([l, torch.randint(1, classes + 1, (m,), generator=g)]), scores=rand(k + m))
        if masks:
            grid = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing='ij'), -1) * size / 64
            inside = lambda b: ((grid >= b[[1, 0]]) & (grid < b[[3, 2]])).all(-1)
            t['masks'] = (
                torch.stack([inside(o) for o in b]).to(torch.uint8) if k else torch.zeros(0, 64, 64, dtype=torch.uint8)
            )
            p['masks'] = (
                torch.stack([inside(o) for o in pb])[:, None].float() * 0.9 if k + m else torch.zeros(0, 1, 64, 64)
            )
        preds.append(p)
        targs.append(t)
    return preds, targs


def anns(dicts, masks=False):
    "COCO annotations, written independently of the module under test."
    from pycocotools import mask as mu

    res = []
    for i, d in enumerate(dicts, 1):
        for j, (x0, y0, x1, y1) in enumerate(d['boxes'].tolist()):
            a = dict(
                id=len(res) + 1,
                image_id=i,
                category_id=d['labels'][j].item(),
                bbox=[x0, y0, x1 - x0, y1 - y0],
                area=d['area'][j].item() if 'area' in d else (x1 - x0) * (y1 - y0),
                iscrowd=d['iscrowd'][j].item() if 'iscrowd' in d else 0,
            )
            if 'scores' in d:
                a['score'] = d['scores'][j].item()
            if masks:
                m = (d['masks'][j].reshape(64, 64) >= 0.5).numpy().astype(np.uint8)
                a['segmentation'] = mu.encode(np.asfortranarray(m))
                if 'scores' in d:
                    a['area'] = float(m.sum())
            res.append(a)
    return res


def oracle(preds, targs, iou_type='bbox', cats=None):
    coco = pytest.importorskip('pycocotools.coco')
    from pycocotools.cocoeval import COCOeval

    cats = cats or sorted({int(l) for d in preds + targs for l in d['labels']})

    def make(a):
        c = coco.COCO()
        c.dataset = dict(
            images=[dict(id=i + 1, height=64, width=64) for i in range(len(targs))],
            annotations=a,
            categories=[dict(id=i, name=str(i)) for i in cats],
        )
        c.createIndex()
        return c

    with contextlib.redirect_stdout(io.StringIO()):
        e = COCOeval(*[make(anns(o, iou_type == 'segm')) for o in (targs, preds)], iou_type)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e


def check(preds, targs, **kw):
    got, e = coco_eval(preds, targs, per_class=True, **kw), oracle(preds, targs, **kw)
    assert tuple(got)[:12] == coco_keys
    np.testing.assert_allclose([got[k] for k in coco_keys], e.stats, rtol=0, atol=1e-9)
    for ap, p in zip(got['per_class'].values(), np.moveaxis(e.eval['precision'][:, :, :, 0, -1], 2, 0)):
        assert ap == pytest.approx(p[p > -1].mean() if (p > -1).any() else -1, abs=1e-9)
    return got


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('classes', [1, 3, 20])
def test_boxes_equal_pycocotools(seed, classes):
    got = check(*random_case(seed=seed, classes=classes))
    assert 0.2 < got['AP50'] < 1 and got['APs'] > 0 and got['APm'] > 0


@pytest.mark.parametrize('seed', range(3))
def test_masks_equal_pycocotools(seed):
    assert 0.1 < check(*random_case(n=15, seed=seed, masks=True), iou_type='segm')['AP50'] < 1


kinds = dict(
    float=lambda m: m.float() * 0.9,
    soft=lambda m: m[:, None].float() * 0.45 + 0.05,
    byte=lambda m: m,
    bool=lambda m: m.bool(),
    array=lambda m: m.numpy(),
    run_lengths=run_lengths,
)


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('n,h,w', [(3, 5, 7), (1, 1, 1), (0, 4, 6), (2, 64, 1)])
def test_run_lengths(kind, n, h, w):
    m = (torch.rand(n, h, w, generator=torch.Generator().manual_seed(n)) > 0.5).byte()
    r = run_lengths(kinds[kind](m))
    assert r.shape == m.shape and len(r) == n and r.tensor().dtype == torch.uint8 and torch.equal(r.tensor(), m)
    assert all(torch.equal(a, b) for a, b in zip(r, m)) and torch.equal(pickle.loads(pickle.dumps(r)).tensor(), m)
    for at in (slice(1, None), [n - 1] * (n > 0), torch.arange(n) % 2 == 0, np.arange(n)[::-1]):
        assert isinstance(r[at], RunLengths) and torch.equal(
            r[at].tensor(), m[at.copy() if isinstance(at, np.ndarray) else at]
        )


def test_run_lengths_know_the_evaluators_form():
    mu = pytest.importorskip('pycocotools.mask')
    m = torch.zeros(2, 9, 11, dtype=torch.uint8)
    m[0, 2:5, 3:9], m[1, :, 4] = 1, 1
    assert run_lengths(m).rles() == [mu.encode(np.asfortranarray(o.numpy())) for o in m]


@pytest.mark.parametrize('kind', ['byte', 'bool', 'run_lengths'])
def test_forms_of_masks_give_the_same_numbers(kind):
    p, t = random_case(10, masks=True)
    to = lambda ds: [
        d | dict(masks=kinds[kind](d['masks'].reshape(len(d['labels']), 64, 64).ge(0.5).byte())) for d in ds
    ]
    want = coco_eval(p, t, iou_type='segm', per_class=True)
    assert coco_eval(to(p), to(t), iou_type='segm', per_class=True) == want
    both = coco_eval([to_cpu_rle(o) for o in p], [to_cpu_rle(o) for o in t], iou_type='both', per_class=True)
    assert both == coco_eval(p, t, per_class=True) | {f'mask_{k}': v for k, v in want.items()} and len(both) == 26


def test_compact():
    t = dict(boxes=torch.zeros(1, 4), masks=torch.ones(1, 4, 4), image_id='a')
    assert set(to_cpu_rle(t, False)) == {'boxes', 'image_id'} and torch.equal(
        to_cpu_rle(t)['masks'].tensor(), torch.ones(1, 4, 4).byte()
    )
    assert 'masks' not in to_cpu_rle(t | dict(masks=None))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_boxes(dtype):
    p, t = random_case(10)
    p = [d | dict(boxes=d['boxes'].to(dtype), scores=d['scores'].to(dtype)) for d in p]
    check([d | dict(boxes=d['boxes'].double(), scores=d['scores'].double()) for d in p], t)
    assert coco_eval(p, t) == coco_eval(
        [d | dict(boxes=d['boxes'].double(), scores=d['scores'].double()) for d in p], t
    )


def test_more_than_100_detections():
    p, t = random_case(4)
    g = torch.Generator().manual_seed(9)
    p[0] = dict(
        boxes=boxes(300, 300, g), labels=torch.randint(1, 4, (300,), generator=g), scores=torch.rand(300, generator=g)
    )
    check(p, t)


none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
one = dict(boxes=torch.tensor([[10.0, 10, 60, 60]]), labels=torch.tensor([1]), scores=torch.tensor([0.9]))


def test_empty_sides():
    assert set(coco_eval([], []).values()) == {-1.0}
    assert set(coco_eval([none, one], [none, none]).values()) == {-1.0}
    assert coco_eval([none, none], [one, none])['AP'] == 0
    assert coco_eval([one, none], [one, none])['AP'] == pytest.approx(1)
    p, t = random_case(12)
    check(p[:6] + [none] * 6, t)
    check(p, [none if i % 3 == 0 else o for i, o in enumerate(t)])


def test_false_positive_on_an_image_without_boxes_counts():
    sure = one | dict(scores=torch.tensor([0.99]))
    assert coco_eval([one, none], [one, none])['AP'] > coco_eval([one, sure], [one, none])['AP']


class CM(list):
    def get_name(self, i):
        return self[i]


def test_class_map_names_and_classes_without_objects():
    cm = CM(['background', 'cat', 'dog', 'cow'])
    both = dict(boxes=one['boxes'].repeat(2, 1), labels=torch.tensor([1, 2]), scores=torch.tensor([0.9, 0.95]))
    got = coco_eval([both], [one], cm, per_class=True)
    assert got['per_class'] == dict(cat=pytest.approx(1), dog=-1, cow=-1) and got['AP'] == pytest.approx(1)


def test_nothing_is_printed(capfd):
    coco_eval(*random_case(5))
    assert capfd.readouterr() == ('', '')


def test_inputs_stay_as_they_are():
    p, t = random_case(5)
    before = [{k: v.clone() for k, v in d.items()} for d in p + t]
    coco_eval(p, t)
    assert all(d.keys() == b.keys() and all(torch.equal(d[k], b[k]) for k in d) for d, b in zip(p + t, before))


@pytest.mark.parametrize(
    'preds,targs,words',
    [
        ([none], [none, none], '1 predictions and 2 targets'),
        ([{k: v for k, v in one.items() if k != 'scores'}], [one], 'prediction 0 has no scores'),
        ([one | dict(labels=torch.tensor([1, 1]))], [one], '1 boxes and 2 labels'),
        ([one | dict(boxes=torch.full((1, 4), float('nan')))], [one], 'not finite'),
        ([one], [one | dict(labels=torch.tensor([0]))], '0 is background'),
    ],
)
def test_errors(preds, targs, words):
    with pytest.raises(ValueError, match=words):
        coco_eval(preds, targs)
    with pytest.raises(ValueError, match='iou_type'):
        coco_eval([one], [one], iou_type='keypoints')
    for key in ('AP51', 'mask_AP51'):
        with pytest.raises(ValueError, match='AP50.*mask_'):
            COCOMetric(key)
    with pytest.raises(ValueError, match='iou_type'):
        COCOMetric('AP', iou_type='both')


full = torch.ones(1, 8, 8)


@pytest.mark.parametrize(
    'preds,targs,words',
    [
        ([one], [one | dict(masks=full)], 'prediction 0 has no masks'),
        ([one | dict(masks=full)], [one], 'target 0 has no masks'),
        ([one | dict(masks=full[[0, 0]])], [one | dict(masks=full)], '1 boxes and 2 masks'),
        ([one | dict(masks=full)], [one | dict(masks=torch.ones(1, 9, 8))], 'image 0 .* 8x8 .* 9x8'),
    ],
)
def test_masks_that_cannot_be_evaluated(preds, targs, words):
    with pytest.raises(ValueError, match=words) as e:
        coco_eval(preds, targs, iou_type='segm')
    assert '\n' not in str(e.value) and coco_eval(preds, targs)['AP50'] == pytest.approx(1)


def test_images_without_objects_need_no_masks():
    hit = one | dict(masks=full)
    assert coco_eval([none, hit], [none, hit], iou_type='segm')['AP'] == pytest.approx(1)


def learner(metrics, preds, targs, training=False):
    return SimpleNamespace(
        metrics=metrics,
        pred=preds,
        xb=(torch.zeros(1, 3, 64, 64),),
        yb=(targs,),
        dls=SimpleNamespace(class_map=None),
        training=training,
    )


def test_metrics_share_one_evaluation(monkeypatch):
    from backbones_nb.learners import metrics as m

    calls, real = [], m.coco_eval
    monkeypatch.setattr(m, 'coco_eval', lambda *a, **k: calls.append(1) or real(*a, **k))
    p, t = random_case(12)
    ms = [COCOMetric(), COCOMetric('AP50'), COCOMetric('AR100')]
    for _ in range(2):
        for o in ms:
            o.reset()
        for i in range(0, 12, 5):
            for o in ms:
                o.accumulate(learner(ms, p[i : i + 5], t[i : i + 5]))
        assert [o.value for o in ms] == [real(p, t)[k] for k in ('AP', 'AP50', 'AR100')]
    assert len(calls) == 2 and [o.name for o in ms] == ['AP', 'AP50', 'AR100']
    assert len(pickle.dumps(ms)) < 500  # the export holds no predictions


def test_metrics_of_boxes_and_masks_gather_once(monkeypatch):
    from backbones_nb.learners import metrics as m

    calls, real = [], m.coco_eval
    monkeypatch.setattr(m, 'coco_eval', lambda *a, **k: calls.append(a[3]) or real(*a, **k))
    p, t = random_case(12, masks=True)
    ms = [
        COCOMetric('AP50'),
        COCOMetric('mask_AP50'),
        COCOMetric('AP', iou_type='segm'),
        COCOMetric('mask_AP', name='m'),
    ]
    for i in range(0, 12, 5):
        for o in ms:
            o.accumulate(learner(ms, p[i : i + 5], t[i : i + 5]))
    box, mask = real(p, t), real(p, t, iou_type='segm')
    assert [o.value for o in ms] == [box['AP50'], mask['AP50'], mask['AP'], mask['AP']] and sorted(calls) == [
        'bbox',
        'segm',
    ]
    assert [o.name for o in ms] == ['AP50', 'mask_AP50', 'mask_AP', 'm'] and [len(o.preds) for o in ms] == [12, 0, 0, 0]
    assert all(isinstance(d['masks'], RunLengths) for d in ms[0].preds + ms[0].targets)


def test_metric_skips_training_batches_and_may_be_empty():
    m = COCOMetric()
    m.accumulate(learner([m], dict(loss=torch.ones(())), [one]))
    assert m.value == -1


def test_table():
    r = coco_eval(*random_case(8))
    t = coco_table(dict(net=r, mean=dict.fromkeys(coco_keys, -1)), keys=('AP', 'AP50'))
    text = str(t).splitlines()
    assert text[2].split() == ['net', f"{r['AP']:.3f}", f"{r['AP50']:.3f}"] and text[3].split() == ['mean', '-', '-']
    assert t._repr_markdown_().splitlines()[2] == f"| net | {r['AP']:.3f} | {r['AP50']:.3f} |"
    assert len(str(coco_table(r)).splitlines()) == 3 and str(
        coco_table(dict(a=dict(AP=0.5), b={}), ('AP',), 1)
    ).split()[-4:] == ['a', '0.5', 'b', '-']


def record(h, w, b, l):
    return SimpleNamespace(
        size=(h, w), boxes=torch.tensor(b, dtype=torch.float32).reshape(-1, 4), labels=torch.tensor(l)
    )


def test_mean_box_detector():
    d = mean_box_detector(
        [
            record(100, 200, [[0, 0, 100, 50]], [2]),
            record(10, 10, [[5, 5, 10, 10], [0, 0, 10, 10]], [2, 1]),
            record(9, 9, [], []),
        ]
    )
    want = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]).mean(0)
    for arg in ([torch.zeros(3, 60, 90)], torch.zeros(1, 3, 60, 90), [(60, 90)], [record(60, 90, [], [])]):
        (out,) = d(arg)
        torch.testing.assert_close(out['boxes'], (want * torch.tensor([90, 60, 90, 60]))[None])
        assert out['labels'].tolist() == [2] and out['scores'].tolist() == [1]
    with pytest.raises(ValueError, match='without a single box'):
        mean_box_detector([record(9, 9, [], [])])


def fates(preds, targs, **kw):
    return confusion(preds, targs, 4, **kw).nonzero().tolist()


def test_confusion_by_hand():
    b = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    t = dict(boxes=b, labels=torch.tensor([1, 2, 3]))
    p = dict(
        boxes=torch.cat([b[:2], b[:1], torch.tensor([[70.0, 0, 80, 10]])]),
        labels=torch.tensor([1, 3, 1, 2]),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
    )
    m = confusion([p], [t], 4)
    assert m.sum() == 5 and {tuple(o) for o in m.nonzero().tolist()} == {
        (1, 1),
        (2, 3),
        (0, 1),
        (0, 2),
        (3, 0),
    }  # right, mistaken, repeated, on nothing, missed
    assert confusion([p], [t], 4, score_thr=0.85).nonzero().tolist() == [[1, 1], [2, 0], [3, 0]]
    assert confusion([p] * 3, [t] * 3, 4).equal(3 * m) and confusion([], [], 4).sum() == 0


def test_confusion_takes_the_surest_first_and_asks_for_overlap():
    t = one | dict(labels=torch.tensor([2]))
    p = dict(boxes=one['boxes'].repeat(2, 1), labels=torch.tensor([1, 2]), scores=torch.tensor([0.6, 0.9]))
    assert fates([p], [t]) == [[0, 1], [2, 2]] and fates([p | dict(scores=p['scores'].flip(0))], [t]) == [
        [0, 2],
        [2, 1],
    ]
    near = one | dict(boxes=one['boxes'] + torch.tensor([25.0, 0, 25, 0]))  # IoU 1/3
    assert fates([near], [one]) == [[0, 1], [1, 0]] and fates([near], [one], iou_thr=0.3) == [[1, 1]]
    assert fates([none], [none]) == [] and fates([one], [none]) == [[0, 1]] and fates([none], [one]) == [[1, 0]]


def test_confusion_leaves_crowds_out():
    crowd = dict(boxes=torch.tensor([[0.0, 0, 100, 100]]), labels=torch.tensor([1]), iscrowd=torch.tensor([1]))
    assert (
        fates([one], [crowd]) == []
        and fates([one | dict(boxes=one['boxes'] + 90)], [crowd]) == [[0, 1]]
        and fates([none], [crowd]) == []
    )
