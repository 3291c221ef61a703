import json
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from backbones_nb.data.pets import pets_records, pets_splits, read_trimap
from backbones_nb.data.toy import _write_one, draw_scene, toy_pets
from backbones_nb.data.toy_draw import breeds, draw_pet
from backbones_nb.learners.baseline import mean_box_detector
from backbones_nb.learners.metrics import coco_eval
from tools.proc import run


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    return pets_splits(toy_pets(tmp_path_factory.mktemp('toy') / 'p', n=150, seed=11), masks=True)


def coco_api(ids, records, dets):
    "pycocotools' own evaluation, from plain lists."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    anns = [
        dict(
            id=i + 1,
            image_id=k,
            category_id=int(c),
            bbox=[*map(float, (b[0], b[1], b[2] - b[0], b[3] - b[1]))],
            area=float((b[2] - b[0]) * (b[3] - b[1])),
            iscrowd=0,
        )
        for i, (k, b, c) in enumerate((k, b, c) for k, r in zip(ids, records) for b, c in zip(r.boxes, r.labels))
    ]
    gt = COCO()
    gt.dataset = dict(images=[dict(id=i) for i in ids], annotations=anns, categories=[dict(id=i) for i in (1, 2)])
    gt.createIndex()
    e = COCOeval(gt, gt.loadRes(dets), 'bbox')
    e.evaluate()
    e.accumulate()
    e.summarize()
    return e.stats[1]


def test_mean_box_stays_below_a_fifth(splits):
    train, valid, cm, _ = splits
    preds = mean_box_detector(train)(valid)
    dets = [
        dict(image_id=i, category_id=int(c), bbox=[*map(float, (b[0], b[1], b[2] - b[0], b[3] - b[1]))], score=float(s))
        for i, p in enumerate(preds)
        for b, c, s in zip(p['boxes'], p['labels'], p['scores'])
    ]
    ap50 = coco_api(range(len(valid)), valid, dets)
    assert ap50 < 0.2 and coco_eval(preds, [r.target() for r in valid], cm)['AP50'] == pytest.approx(ap50, abs=1e-6)
    perfect = [
        dict(image_id=i, category_id=int(c), bbox=[*map(float, (b[0], b[1], b[2] - b[0], b[3] - b[1]))], score=1.0)
        for i, r in enumerate(valid)
        for b, c in zip(r.boxes, r.labels)
    ]
    assert coco_api(range(len(valid)), valid, perfect) > 0.999


def test_color_does_not_tell_the_species(splits):
    "A classifier that sees the histogram of exactly the pet's pixels, and nothing else."
    from sklearn.ensemble import RandomForestClassifier

    def features(recs):
        X = []
        for r in recs:
            q = (np.asarray(r.image()) // 32)[r.masks().any(0)] @ np.array([64, 8, 1])
            X.append(np.sqrt(np.bincount(q, minlength=512) / len(q)))
        return np.array(X), np.array([r.labels[0] for r in recs])

    train, valid, _, _ = splits
    (x, y), (xv, yv) = features(train), features(valid)
    assert RandomForestClassifier(200, random_state=0).fit(x, y).score(xv, yv) < 0.72


def test_layout_and_truth(toy):
    lists = {
        k: [l.split() for l in (toy / 'annotations' / f'{k}.txt').read_text().splitlines() if l[0] != '#']
        for k in ('list', 'trainval', 'test')
    }
    everything, trainval, test = ({o[0] for o in v} for v in lists.values())
    assert everything == trainval | test and not trainval & test
    for name, cid, sid, _ in lists['list']:
        b = breeds[name.rsplit('_', 1)[0]]
        assert (int(cid), int(sid)) == (b['id'], b['species']) and name[0].isupper() == (sid == '1')
        tri = np.asarray(Image.open(toy / 'annotations' / 'trimaps' / f'{name}.png'))
        assert set(np.unique(tri)) == {1, 2, 3} and Image.open(toy / 'images' / f'{name}.jpg').size == tri.shape[::-1]
        assert 1 <= ndimage.label(tri != 2, np.ones((3, 3)))[1] <= 3
    assert {
        o.stem for o in (toy / 'annotations' / 'xmls').iterdir()
    } < trainval  # the gap of the original: none of test, not all of trainval


def test_pets_vary(splits):
    recs = splits[0] + splits[1]
    sizes = np.array([max(b[2] - b[0], b[3] - b[1]) / min(r.size) for r in recs for b in r.boxes])
    center = np.array([[(b[0] + b[2]) / 2 / r.size[1], (b[1] + b[3]) / 2 / r.size[0]] for r in recs for b in r.boxes])
    assert 0.2 <= sizes.min() < 0.3 and 0.65 < sizes.max() <= 0.81 and sizes.std() > 0.1
    assert np.ptp(center, 0).min() > 0.6 and center.std(0).min() > 0.12
    assert set(np.bincount([len(r.labels) for r in recs]).nonzero()[0]) == {1, 2, 3}
    for c in (1, 2):
        assert abs(np.mean([r.labels[0] == c for r in recs]) - 0.5) < 0.05
    assert (
        abs(
            sizes[[r.labels[0] == 1 for r in recs for _ in r.boxes]].mean()
            - sizes[[r.labels[0] == 2 for r in recs for _ in r.boxes]].mean()
        )
        < 0.08
    )


def test_the_trimap_gives_back_what_was_drawn(monkeypatch, tmp_path):
    from backbones_nb.data import toy

    drawn, scene = [], toy.draw_scene
    monkeypatch.setattr(toy, 'draw_scene', lambda *a, **kw: (drawn.append(scene(*a, **kw)), drawn[-1])[1])
    recs, _ = pets_records(toy_pets(tmp_path / 'p', n=24, seed=6), 'all', masks=True)
    heads = {r.image_id: r.boxes for r in pets_records(tmp_path / 'p', boxes='head')[0]}
    truth = {frozenset(p['seen'].tobytes() for p in pets): pets for _, pets in drawn}
    for r in recs:
        pets = truth[frozenset(m.astype(bool).tobytes() for m in r.masks())]  # the very pixels of each pet
        for b in heads.get(r.image_id, []):  # each head lies in the pet that it belongs to
            x1, y1, x2, y2 = b.astype(int)
            assert any(
                p['head'][y1:y2, x1:x2].any(0).all() and p['head'].sum() == p['head'][y1:y2, x1:x2].sum() for p in pets
            )
        assert all((p['seen'] | ~p['head']).all() for p in pets)


def test_occlusion_hides_a_third_at_most():
    share = []
    for i in range(30):
        free, hid = (
            draw_scene(np.random.default_rng([3, i]), 'beagle', (120, 120), max_hidden=o)[1] for o in (0.0, 0.35)
        )
        assert len(free) == len(hid)
        share += [b['seen'].sum() / a['seen'].sum() for a, b in zip(free, hid)]
    assert min(share) >= 0.6 and np.mean(np.array(share) < 0.97) > 0.15  # it does happen


def test_images_do_not_depend_on_their_order(tmp_path):
    a = toy_pets(tmp_path / 'a', n=14, seed=4)
    b = tmp_path / 'b'
    for o in ('images', 'annotations/trimaps', 'annotations/xmls'):
        (b / o).mkdir(parents=True)
    _write_one((b, 9, 4, 144, 'beagle', 2, True))
    for o in ('images/beagle_2.jpg', 'annotations/trimaps/beagle_2.png'):
        assert (a / o).read_bytes() == (b / o).read_bytes()


def content(path):
    return {o.relative_to(path): o.read_bytes() for o in path.rglob('*') if o.is_file()}


@pytest.mark.parametrize('quirks', [False, True])
def test_an_unfinished_folder_is_completed_and_a_finished_one_left_alone(quirks, tmp_path):
    kw = dict(n=12, seed=1, side=96, quirks=quirks)
    a, b = toy_pets(tmp_path / 'a', **kw), toy_pets(tmp_path / 'b', **kw)
    mark = json.loads((b / 'toy.json').read_text())
    assert mark.pop('complete')
    (b / 'toy.json').write_text(json.dumps(mark))
    for o in ('images/terrier_1.jpg', 'images/Siamese_2.jpg', 'annotations/test.txt'):
        (b / o).unlink()
    assert content(toy_pets(tmp_path / 'b', **kw)) == content(a)
    before = {o: o.stat().st_mtime_ns for o in a.rglob('*')}
    toy_pets(tmp_path / 'a', **kw)
    assert before == {o: o.stat().st_mtime_ns for o in a.rglob('*')}


def test_the_seed_decides(tmp_path):
    a, b, c = (toy_pets(tmp_path / k, n=6, seed=s) for k, s in (('a', 1), ('b', 1), ('c', 2)))
    assert content(a) == content(b)
    one, other = ({k: v for k, v in content(o).items() if k.suffix == '.jpg'} for o in (a, c))
    assert one.keys() == other.keys() and all(one[k] != other[k] for k in one)
    with pytest.raises(ValueError, match='holds toy pets drawn with'):
        toy_pets(tmp_path / 'a', n=7, seed=1)


def test_an_older_drawing_is_drawn_again(tmp_path):
    a = toy_pets(tmp_path / 'a', n=6, side=96)
    want = content(a)
    (a / 'toy.json').write_text(json.dumps(json.loads((a / 'toy.json').read_text()) | dict(version=0)))
    (a / 'images' / 'Tabby_1.jpg').write_bytes(b'old')
    assert content(toy_pets(a, n=6, side=96)) == want


def test_refused_arguments(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'letter.txt').write_text('hello')
    with pytest.raises(ValueError, match='holds other files'):
        toy_pets(tmp_path / 'a', n=6)
    with pytest.raises(ValueError, match='n=0'):
        toy_pets(tmp_path / 'b', n=0)
    assert not (tmp_path / 'b').exists()
    toy_pets(tmp_path / 'c', n=2, side=96)
    with pytest.raises(ValueError, match='holds toy pets drawn with') as e:
        toy_pets(tmp_path / 'c', n=2, side=96, seed=3)
    assert '\n' not in str(e.value)


def test_pets_are_drawn_whole_with_a_head():
    rng = np.random.default_rng(0)
    for b in breeds:
        for _ in range(5):
            img, head = draw_pet(rng, b)
            a = np.asarray(img.getchannel('A')) > 127
            assert ndimage.label(a, np.ones((3, 3)))[1] == 1 and img.size == head.size
            assert 0.05 < (np.asarray(head) > 127).sum() / a.sum() < 0.7


def test_quirks_are_those_of_the_original(tmp_path):
    p = toy_pets(tmp_path / 'q', n=12, side=96, quirks=True)
    kinds = [(Image.open(o).format, Image.open(o).mode) for o in sorted((p / 'images').glob('*.jpg'))]
    assert kinds.count(('GIF', 'P')) == 1 and kinds.count(('PNG', 'RGBA')) == 1 and kinds.count(('JPEG', 'RGB')) == 10
    recs, report = pets_records(p, 'all')
    assert len(recs) == 12 and '.mat' in str(report)
    for r in recs:
        assert (
            r.image().size
            == r.size[::-1]
            == read_trimap(p / 'annotations' / 'trimaps' / f'{r.image_id}.png').shape[::-1]
        )


def test_drawing_loads_neither_torch_nor_fastai():
    code = 'import sys, backbones_nb.data.toy; print([o for o in ("torch","fastai") if o in sys.modules])'
    assert run(sys.executable, '-c', code, check=True).stdout.strip() == '[]'
