import io
import json
import pickle
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools import mask as oracle

from backbones_nb.data.coco import (
    coco_categories,
    coco_records,
    coco_results,
    read_coco,
    to_coco,
)
from backbones_nb.data.run_lengths import CocoMasks, decode_mask, polygons, read_segmentation
from backbones_nb.data.pets import pets_class_map, pets_records
from backbones_nb.data.records import ClassMap, Record
from backbones_nb.learners.metrics import coco_eval

size = (60, 80)
cats = [dict(id=90, name='dog'), dict(id=1, name='cat'), dict(id=13, name='cow')]
square = np.zeros(size, np.uint8)
square[20:40, 10:30] = 1


def pack(m):
    r = oracle.encode(np.asfortranarray(m))
    return dict(size=list(m.shape), counts=r['counts'].decode())


def unpacked(m):
    flat = m.T.ravel()
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    return dict(size=list(m.shape), counts=([0] if flat[0] else []) + counts)


shapes = dict(polygon=[[10, 20, 30, 20, 30, 40, 10, 40]], packed=pack(square), unpacked=unpacked(square))


@pytest.fixture
def folder(tmp_path):
    for o in ('a.jpg', 'sub/b.jpg', 'c.jpg'):
        (tmp_path / 'images' / o).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size[::-1], 'gray').save(tmp_path / 'images' / o)
    return tmp_path


def image(i, name='a.jpg', **kw):
    return dict(id=i, file_name=name, height=size[0], width=size[1]) | kw


def ann(image_id=5, category_id=1, bbox=(10, 20, 20, 20), **kw):
    return dict(image_id=image_id, category_id=category_id, bbox=list(bbox)) | kw


def data(anns, images=None, categories=cats):
    return dict(
        images=images or [image(5)], annotations=[dict(id=i, **a) for i, a in enumerate(anns)], categories=categories
    )


def read(folder, anns, images=None, categories=cats, **kw):
    return coco_records(data(anns, images, categories), folder / 'images', **kw)


def test_ids_with_holes_in_any_order_and_sub_folders(folder):
    recs, cm, report = read(
        folder, [ann(9, 90), ann(2, 13), ann(9, 1)], [image(9, 'sub/b.jpg'), image(2), image(4, 'sub\\b.jpg')]
    )
    assert list(cm) == ['background', 'cat', 'cow', 'dog'] and coco_categories(data([])) == {
        'cat': 1,
        'cow': 13,
        'dog': 90,
    }
    assert [(r.image_id, r.path.name, r.labels.tolist()) for r in recs] == [
        ('9', 'b.jpg', [3, 1]),
        ('2', 'a.jpg', [2]),
        ('4', 'b.jpg', []),
    ]
    assert recs[0].boxes.tolist() == [[10, 20, 30, 40]] * 2 and str(report) == 'nothing skipped of 3'


def test_a_class_map_of_another_file_gives_the_numbers(folder):
    recs, cm, _ = read(folder, [ann(5, 90), ann(5, 1)], class_map=ClassMap(['dog', 'cat']))
    assert recs[0].labels.tolist() == [1, 2] and list(cm)[1] == 'dog'
    with pytest.raises(ValueError, match="no class 'dog'.*Did you mean 'dogs'"):
        read(folder, [ann(5, 90)], class_map=ClassMap(['dogs']))


def test_background_among_the_categories(folder):
    _, cm, _ = read(folder, [ann()], categories=[dict(id=0, name='background'), *cats])
    assert list(cm) == ['background', 'cat', 'cow', 'dog']
    (r,), _, report = read(folder, [ann(), ann(5, 0)], categories=[dict(id=0, name='background'), *cats])
    assert r.labels.tolist() == [1] and list(report.notes) == ['with an object of an unknown category, left out']
    _, cm, _ = read(folder, [ann(5, 1), ann(5, 2)], categories=[dict(id=1, name='cat'), dict(id=2, name='cat')])
    assert list(cm) == ['background', 'cat']


@pytest.mark.parametrize('form', shapes)
def test_masks_of_every_form(folder, form):
    (r,), _, report = read(folder, [ann(segmentation=shapes[form])], masks=True)
    assert not report.reasons and not report.notes
    assert np.array_equal(pickle.loads(pickle.dumps(r)).target()['masks'][0].numpy(), square)


def test_polygons_agree_with_pycocotools():
    rng = np.random.default_rng(0)
    for n in range(20):
        parts = [rng.uniform(-10, 90, 2 * k).round(1).tolist() for k in rng.integers(3, 9, 1 + n % 3)]
        want = oracle.decode(oracle.merge(oracle.frPyObjects(parts, *size)))
        assert np.array_equal(decode_mask(parts, size), want)


def test_random_masks_survive_packing():
    rng = np.random.default_rng(0)
    for h, w in ((1, 1), (3, 7), (40, 31)):
        for p in (0, 0.1, 0.5, 1):
            m = (rng.random((h, w)) < p).astype(np.uint8)
            for seg in (pack(m), unpacked(m)):
                assert np.array_equal(decode_mask(seg, (h, w)), m)


@pytest.mark.parametrize(
    'seg,words',
    [
        (None, 'no segmentation'),
        ([], 'no segmentation'),
        ([[1, 2, 3, 4]], 'three corners'),
        ([[1, 2, 3, 4, 5, float('nan')]], 'three corners'),
        ([[0, 0, 1e12, 0, 1e12, 1e12]], 'three corners'),
        ('rubbish', 'three corners'),
        (dict(size=[80, 60], counts=[4800]), 'size'),
        (dict(size=[60, 80], counts=[4801]), 'fill'),
        (dict(size=[60, 80], counts=[-1, 4801]), 'fill'),
        (dict(size=[60, 80], counts='zzzz'), 'invalid compressed'),
        (dict(size=[60, 80], counts=''), 'invalid compressed'),
        (dict(size=[60, 80]), 'invalid compressed'),
        (dict(counts=[4800]), 'size'),
        (dict(size=60, counts=[4800]), 'size'),
    ],
)
def test_segmentations_that_are_none(folder, seg, words):
    with pytest.raises(ValueError, match=words):
        read_segmentation(seg, size)
    recs, _, report = read(
        folder, [ann(segmentation=seg), ann(6, segmentation=shapes['packed'])], [image(5), image(6)], masks=True
    )
    assert [r.image_id for r in recs] == ['6'] and dict(report.reasons) == {
        'with an object without a usable mask': ['a.jpg']
    }
    assert len(read(folder, [ann(segmentation=seg)])[0][0].labels) == 1  # boxes alone need no mask


def test_a_bad_piece_beside_a_good_one():
    assert polygons([[1, 2, 3, 4], *shapes['polygon'], ['x'] * 6]) == shapes['polygon']


@pytest.mark.parametrize(
    'crowd,labels,flags', [('crowd', [1, 3], [0, 1]), ('keep', [1, 3], [0, 0]), ('skip', [1], [0])]
)
def test_crowds(folder, crowd, labels, flags):
    anns = [
        ann(segmentation=shapes['polygon']),
        ann(5, 90, (0, 0, 80, 60), iscrowd=1, segmentation=unpacked(1 - square)),
    ]
    (r,), _, _ = read(folder, anns, crowd=crowd, masks=True)
    t = r.target()
    assert (t['labels'].tolist(), t['iscrowd'].tolist(), len(t['masks'])) == (labels, flags, len(labels))
    if len(labels) > 1:
        assert torch.equal(t['masks'][1], 1 - t['masks'][0])


def test_images_without_annotations(folder):
    imgs = [image(5), image(6, 'c.jpg')]
    assert [len(r.labels) for r in read(folder, [ann()], imgs)[0]] == [1, 0]
    recs, _, report = read(folder, [ann()], imgs, empty=False)
    assert len(recs) == 1 and dict(report.reasons) == {'without objects': ['c.jpg']}
    assert read(folder, [ann()], imgs[1:], masks=True)[0][0].target()['masks'].shape == (0, *size)


def test_whatever_is_left_out_is_named(folder):
    (folder / 'images' / 'broken.jpg').write_bytes(b'x')
    imgs = [
        image(1),
        image(2, 'gone.jpg'),
        image(3, 'broken.jpg'),
        image(4, 'c.jpg', width=81),
        image(1, 'sub/b.jpg'),
        dict(id=7),
        dict(file_name='c.jpg'),
        image(8, 'sub/b.jpg', width=None),
    ]
    anns = [
        ann(1),
        ann(1, 5),
        ann(1, bbox=[70, 50, 20, 5]),
        ann(1, bbox=[5, 5, 0, 9]),
        ann(1, bbox=[5, 5]),
        ann(99),
        dict(category_id=1, bbox=[0, 0, 1, 1]),
    ]
    recs, _, report = read(folder, anns, imgs)
    assert (
        [r.image_id for r in recs] == ['1', '8']
        and recs[0].boxes.tolist() == [[10, 20, 30, 40], [70, 50, 80, 55]]
        and report.total == len(recs) + len(report)
    )
    assert dict(report.reasons) == {
        'without image file': ['gone.jpg'],
        'with an unreadable image': ['broken.jpg'],
        'annotated at another size': ['c.jpg'],
        'with the id of another image': ['sub/b.jpg'],
        'without id or file name': ['7', 'c.jpg'],
    }
    assert {k: len(v) for k, v in report.notes.items()} == {
        'with an object of an unknown category, left out': 1,
        'with a box without area, left out': 1,
        'with a box clipped to the image': 1,
        'with an object without a box, left out': 1,
        'annotated, but not in the list of images': 2,
    }


def test_a_box_from_its_mask_and_rounding_that_is_none(folder):
    (r,), _, report = read(
        folder, [dict(image_id=5, category_id=1, segmentation=shapes['packed']), ann(bbox=[40, 20, 40.03, 20])]
    )
    assert r.boxes.tolist() == [[10, 20, 30, 40], [40, 20, 80, 40]] and not report.notes


@pytest.mark.parametrize(
    'place', ['annotations/instances_val.json', 'annotations/pets.json', 'images/pets.json', 'pets.json']
)
def test_the_folder_of_images_is_found(folder, place):
    f = folder / place
    f.parent.mkdir(exist_ok=True)
    f.write_text(json.dumps(data([ann()])))
    assert coco_records(f)[0][0].path == folder / 'images' / 'a.jpg'
    if 'val' in place:
        (folder / 'images').rename(folder / 'val')
        assert coco_records(f)[0][0].path == folder / 'val' / 'a.jpg'


@pytest.mark.parametrize(
    'wrong', [dict(height=0, width=0), dict(height=None), dict(width='80'), dict(height=float('nan')), dict(height=-60)]
)
def test_an_image_listed_without_a_size_is_used(folder, wrong):
    recs, _, report = read(folder, [ann()], [image(5, **wrong)])
    assert recs[0].size == size and len(report) == 0


def test_a_file_that_windows_wrote(folder):
    (folder / 'x.json').write_text(json.dumps(data([ann()])), encoding='utf-8-sig')
    assert len(coco_records(folder / 'x.json')[0]) == 1


def test_errors_say_what_to_do(folder):
    f = folder / 'x.json'
    for text, words in (
        ('{', 'cannot be read as JSON'),
        ('[]', 'no list of images and annotations and categories'),
        ('{"images": [], "annotations": []}', 'categories'),
    ):
        f.write_text(text)
        with pytest.raises(ValueError, match=words) as e:
            read_coco(f)
        assert 'x.json' in str(e.value)
    with pytest.raises(FileNotFoundError, match='y.json'):
        coco_records(folder / 'y.json')
    f.write_text(json.dumps(data([ann()], [image(5, 'nowhere.jpg')])))
    with pytest.raises(FileNotFoundError, match='nowhere.jpg'):
        coco_records(f)
    with pytest.raises(FileNotFoundError, match='none'):
        coco_records(f, folder / 'none')
    with pytest.raises(ValueError, match='1 without image file'):
        coco_records(f, folder / 'images')
    with pytest.raises(ValueError, match='images='):
        coco_records(data([ann()]))
    with pytest.raises(ValueError, match='crowd'):
        read(folder, [ann()], crowd='maybe')
    with pytest.raises(ValueError, match='id and a name'):
        read(folder, [ann()], categories=[dict(id=1)])


def test_there_and_back(toy):
    recs, _ = pets_records(toy, 'test', masks=True)
    cm = pets_class_map(toy)
    recs[0].iscrowd[:] = 1
    ids = dict(dog=3, cat=70)
    written = json.loads(json.dumps(to_coco(recs, cm, ids)))
    again, cm2, report = coco_records(written, toy / 'images', masks=True)
    assert (
        list(cm2) == ['background', 'dog', 'cat'] and not report.reasons and not report.notes
    )  # in the order of the ids
    for a, b in zip(recs, again, strict=True):
        assert a.path == b.path and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.iscrowd, b.iscrowd)
        assert [cm.get_name(l) for l in a.labels] == [cm2.get_name(l) for l in b.labels] and np.array_equal(
            a.masks(), b.masks()
        )
        assert torch.equal(a.target()['area'], b.target()['area'])
    assert [o['file_name'] for o in to_coco(recs, cm, images=toy)['images']] == [f'images/{r.path.name}' for r in recs]
    assert [o['id'] for o in written['images']] == list(range(1, len(recs) + 1)) and [
        o['id'] for o in to_coco(again, cm2)['images']
    ] == [int(r.image_id) for r in again]
    with pytest.raises(ValueError, match="no category id for 'cat'"):
        to_coco(recs, cm, dict(dog=1))
    with pytest.raises(ValueError, match='is not in the folder .*annotations: pass one'):
        to_coco(recs, cm, images=toy / 'annotations')


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_results_are_evaluated_elsewhere_as_here(toy, kind):
    recs, _ = pets_records(toy, 'test', masks=True)
    cm, targets, g = pets_class_map(toy), [r.target() for r in recs], torch.Generator().manual_seed(0)
    preds = []
    for t in targets:  # moved, some with the wrong class
        n = len(t['labels'])
        wrong = torch.rand(n, generator=g) < 0.3
        preds.append(
            dict(
                boxes=t['boxes'] + torch.randint(-6, 7, (n, 4), generator=g),
                labels=torch.where(wrong, 3 - t['labels'], t['labels']),
                scores=torch.rand(n, generator=g),
                masks=t['masks'].roll(3, -1)[:, None].float(),
            )
        )
    ids = dict(dog=3, cat=70)
    with redirect_stdout(io.StringIO()):
        truth = COCO(to_coco(recs, cm, ids))
        e = COCOeval_faster(
            truth, truth.loadRes(json.loads(json.dumps(coco_results(preds, recs, cm, ids, kind)))), kind
        )
        e.run()
    want = coco_eval(preds, targets, cm, kind)
    assert 0 < want['AP'] < 0.9 and np.allclose(e.stats[:12], list(want.values())[:12], atol=1e-6)
    with pytest.raises(ValueError, match='one for each'):
        coco_results(preds[1:], recs, cm)
    with pytest.raises(ValueError, match='without masks'):
        coco_results([{k: v for k, v in p.items() if k != 'masks'} for p in preds], recs, cm, iou_type='segm')
    with pytest.raises(ValueError, match='iou_type'):
        coco_results(preds, recs, cm, iou_type='mask')


def test_masks_of_no_object():
    assert CocoMasks([], (3, 4))().shape == (0, 3, 4)


def test_numbers_of_records_that_are_ids():
    r = [Record(i, 'x.jpg', (4, 4), [], []) for i in ('7', '3', '3')]
    first = lambda rs: [o['id'] for o in to_coco(rs, ClassMap(['a']))['images']]
    assert first(r[:2]) == [7, 3] and first(r) == [1, 2, 3] and first([Record('007', 'x.jpg', (4, 4), [], [])]) == [1]
