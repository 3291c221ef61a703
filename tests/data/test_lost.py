"Data that would be lost without a word: each kind with an input of its own, and the sentence that a user sees."

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.check import check_data
from backbones_nb.data.coco import coco_categories, coco_records, to_coco
from backbones_nb.data.images import gray_range, image_size, load_image, orientation, to_rgb
from backbones_nb.data.ready import (
    content_groups,
    shared_images,
    shortest_sides,
    size_for,
    small_objects,
    usable_images,
)
from backbones_nb.data.records import ClassMap, Record, SkipReport, look_relative, refuse_relative, split_records
from backbones_nb.data.transforms import ToBatch, as_tv, open_image
from backbones_nb.data.voc import voc_folders, voc_records

ramp = np.linspace(0, 255, 60 * 80).round().astype(np.uint8).reshape(60, 80)
two = ClassMap(['field', 'car'])


def picture(path, seed=0, size=(60, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


def coco_file(root, images, anns, categories=(dict(id=1, name='cat'),), **kw):
    "Writes a COCO file of images (id, name) and annotations (image id, box)."
    d = dict(
        images=[dict(id=i, file_name=n) for i, n in images],
        annotations=[dict(id=k, image_id=i, category_id=1, bbox=list(b)) | kw for k, (i, b) in enumerate(anns, 1)],
        categories=list(categories),
    )
    (root / 'ann.json').write_text(json.dumps(d), encoding='utf-8')
    return root / 'ann.json'


def xml(path, boxes, name='cat'):
    path.parent.mkdir(parents=True, exist_ok=True)
    one = (
        '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
    )
    path.write_text(f'<annotation>{"".join(one.format(name, *b) for b in boxes)}</annotation>', encoding='utf-8')


# --- pixels


@pytest.mark.parametrize(
    'a,top',
    [
        (ramp.astype(np.uint16) * 257, 65535),
        (ramp.astype(np.int32), 255),
        (ramp.astype(np.int32) * 257, 65535),
        (ramp.astype(np.float32) / 255, 1),
        (ramp.astype(np.float32), 255),
        (ramp.astype(np.float32) * 257, 65535),
    ],
)
def test_gray_of_many_bits_is_the_same_by_path_and_by_image(tmp_path, a, top):
    im = Image.fromarray(a)
    im.save(tmp_path / 'a.tiff')
    assert gray_range(im)[1] == top
    for got in (to_rgb(im), load_image(tmp_path / 'a.tiff'), Image.fromarray(np.asarray(open_image(im))[0])):
        assert np.abs(np.asarray(got.convert('L')).astype(int) - ramp).max() <= 1
    if a.dtype == np.uint16:
        im.save(tmp_path / 'a.png')
        assert np.array_equal(load_image(tmp_path / 'a.png'), to_rgb(im))


def test_the_depth_that_a_file_states_counts(tmp_path):
    Image.fromarray(ramp.astype(np.uint16) * 16).save(tmp_path / 'a.tiff', tiffinfo={281: 4095})
    assert np.abs(np.asarray(load_image(tmp_path / 'a.tiff'))[..., 0].astype(int) - ramp).max() <= 1
    (tmp_path / 'a.pgm').write_bytes(b'P5 2 1 4095\n' + np.array([0, 4095], '>u2').tobytes())
    assert np.asarray(load_image(tmp_path / 'a.pgm'))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize('a', [ramp.astype(np.float32) - 300, ramp.astype(np.int32) * 1000, np.float32([[np.inf]])])
def test_numbers_without_a_range_are_named(tmp_path, a):
    Image.fromarray(a).save(tmp_path / 'a.tiff')
    with pytest.raises(ValueError, match='a.tiff cannot be read .*has values from .* expected 0 to .*255 or 65535'):
        load_image(tmp_path / 'a.tiff')


def test_a_hint_where_an_image_uses_little_of_its_range(tmp_path):
    for name, k in (('dark', 16), ('good', 257)):
        Image.fromarray(ramp.astype(np.uint16) * k).save(tmp_path / f'{name}.png')
    recs = [Record(o, tmp_path / f'{o}.png', (60, 80), [[9, 9, 40, 40]], [1]) for o in ('dark', 'good')]
    assert [str(p) for p in check_data(recs).problems] == ['dark (up to 4080 of 65535)']


def test_more_pixels_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    for i in (1, 2):
        picture(tmp_path / f'{i}.png', i)
    Image.new('L', (50, 60)).save(tmp_path / '1.png')
    f = coco_file(tmp_path, [(1, '1.png'), (2, '2.png')], [(1, (9, 9, 20, 20)), (2, (9, 9, 20, 20))])
    recs, _, report = coco_records(f, tmp_path)
    assert [r.image_id for r in recs] == ['1']
    assert dict(report.reasons) == {'with more pixels than BACKBONES_NB_MAX_PIXELS allows': ['2.png']}
    r = check_data(f, tmp_path)
    assert 'huge image' in r.counts and 'cut it into tiles, or raise the limit' in r.listing() and r.readable == 1
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match='2.png has more pixels than the limit of 0 million: cut it'):
            read(tmp_path / '2.png')
    monkeypatch.setenv('BACKBONES_NB_MAX_PIXELS', '1e4')
    assert load_image(tmp_path / '2.png').size == (80, 60)
    monkeypatch.setenv('BACKBONES_NB_MAX_PIXELS', 'many')
    with pytest.raises(ValueError, match="got BACKBONES_NB_MAX_PIXELS='many', expected a number"):
        load_image(tmp_path / '2.png')


def test_turned_by_half(tmp_path):
    exif = Image.Exif()
    for turn in range(1, 9):
        exif[274] = turn
        Image.fromarray(ramp).save(tmp_path / f'{turn}.jpg', exif=exif)
    recs = [Record(f'{o}', tmp_path / f'{o}.jpg', (60, 80), [[9, 9, 40, 40]], [1]) for o in (1, 2, 3, 4)]
    assert [orientation(r.path) for r in recs] == [1, 2, 3, 4]
    r = check_data(recs)
    assert [str(p) for p in r.problems if p.kind == 'turned image'] == [
        '2 (mirrored)',
        '3 (by 180 degrees)',
        '4 (mirrored)',
    ]
    assert r.ok


# --- files that end early


@pytest.mark.parametrize('kind,cut', [('jpg', 20), ('jpg', 1000), ('png', 3000), ('bmp', 3000), ('tiff', 3000)])
def test_a_file_that_was_cut_off(tmp_path, kind, cut):
    f = picture(tmp_path / f'a.{kind}')
    whole, data = np.asarray(load_image(f)), f.read_bytes()
    f.write_bytes(data[:-cut])
    good = Record('good', picture(tmp_path / 'b.png'), (60, 80), [[9, 9, 40, 40]], [1])
    recs = [good, Record('cut', f, (60, 80), [[9, 9, 40, 40]], [1])]
    assert 'unreadable image' in check_data(recs).counts
    with pytest.raises(
        ValueError, match=rf'1 of 2 images cannot be decoded: .*a.{kind} .*broken=.skip. leaves them out'
    ):
        usable_images(recs, SkipReport())
    report = SkipReport(2)
    assert usable_images(recs, report, 'skip') == [good]
    assert str(report) == f'skipped 1 of 2: 1 with an image that cannot be fully decoded (a.{kind})'
    report = SkipReport(2)
    got = usable_images(recs, report, 'read')
    assert str(report) == f'nothing skipped of 2; note: 1 cut off, read as far as it goes (a.{kind})'
    assert np.array_equal(np.asarray(got[1].image())[:8], whole[:8]) or kind == 'bmp'  # bmp begins at the bottom
    assert not recs[1].truncated and got[0] is good


def test_what_cannot_even_be_read_in_part(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='1 of 1 images cannot be decoded: .*a.jpg'):
        usable_images([Record('a', tmp_path / 'a.jpg', (6, 8), [], [])], SkipReport(), 'read')
    with pytest.raises(ValueError, match="got broken='ignore', expected 'stop', 'skip' or 'read'"):
        usable_images([], SkipReport(), 'ignore')


# --- boxes


def test_boxes_relative_to_the_image(tmp_path):
    picture(tmp_path / 'images' / 'a.png')
    f = coco_file(tmp_path, [(1, 'a.png')], [(1, (0.1, 0.2, 0.3, 0.4)), (1, (0.5, 0.2, 0.5, 0.8)), (1, (0, 0, 1, 1))])
    words = 'boxes of .* look relative to the image .*expected pixels: multiply x and width by the width of the image'
    with pytest.raises(ValueError, match=f'2 of 3 {words}'):
        coco_records(f)
    r = check_data(f)
    assert not r.ok and r.counts['relative box'] == 2 and 'multiply x by the width' in r._repr_markdown_()
    xml(tmp_path / 'Annotations' / 'a.xml', [(0.1, 0.2, 0.3, 0.4), (0, 0, 0.5, 1.0)])
    (tmp_path / 'images').rename(tmp_path / 'JPEGImages')
    with pytest.raises(ValueError, match=f'2 of 2 {words}'):
        voc_records(*voc_folders(tmp_path))
    (tmp_path / 'ann.json').unlink()
    assert check_data(tmp_path).counts['relative box'] == 2


def test_small_boxes_that_are_not_relative():
    assert (
        look_relative([[0, 0, 1, 1], [0.5, 0.5, 9, 9], [70.5, 50.5, 71, 51], [0, 0, 2.5, 2.5]]).tolist() == [False] * 4
    )
    refuse_relative([], 'none')
    refuse_relative([[0.1, 0.1, 0.2, 0.2], [5, 5, 20, 20]], 'a slip in one of two')


def field(tmp_path, n=2, cars=6):
    for i in range(n):
        picture(tmp_path / f'a{i}.png', i, (600, 800))
    boxes = [[200, 150, 280, 210], *([50 * k, 450, 50 * k + 5, 455] for k in range(cars))]
    return [
        Record(f'a{i}', tmp_path / f'a{i}.png', (600, 800), boxes, [1] + [2] * cars, class_map=two) for i in range(n)
    ]


def test_objects_that_the_letterbox_makes_vanish(tmp_path):
    recs = field(tmp_path)
    text = small_objects(recs, 128, two)
    assert text == (
        '12 of 14 objects (12 of 12 car) are smaller than a pixel at size 128, in a0.png, a1.png: '
        'they cannot be learned and count as misses; size 160 keeps all'
    )
    assert small_objects(recs, 160, two) == '' and 'class 2' in small_objects(recs, (96, 128))
    with pytest.warns(UserWarning, match='12 of 14 objects .12 of 12 car. are smaller than a pixel at size 128'):
        dls = detection_dls(recs[:1], recs[1:], two, size=128, bs=1, augment=None)
    assert [len(t['labels']) for dl in dls for _, ts in dl for t in ts] == [7, 7]  # none is dropped
    with pytest.warns(UserWarning):
        dls = detection_dls(recs[:1], recs[1:], two, size=128, bs=1, seed=0)
    assert [len(t['labels']) for _, ts in dls.valid for t in ts] == [7]
    assert all((t['boxes'][:, 2:] - t['boxes'][:, :2] >= 1).all() for _, ts in dls.train for t in ts)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        detection_dls(recs[:1], recs[1:], two, size=160, bs=1)
    r = check_data(recs, class_map=two, size=128)
    assert r.ok and r.counts['vanishing object'] == 12 and '0.8 pixels at size 128; 160 keeps it' in r.listing()
    r = check_data(recs, class_map=two)
    assert 'vanishing object' not in r.counts and 'every object keeps a pixel from size 160' in str(r)


@pytest.mark.parametrize('size', [64, (64, 96), (320, 64)])
def test_the_size_that_is_named_keeps_the_object(size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w = rng.integers(30, 3000, 2)
        box = [[0, 0, *rng.uniform(0.5, 20, 2)]]
        assert shortest_sides(box, (h, w), size_for(box, (h, w), size)) >= 1


def test_targets_of_part_of_a_pixel_keep_all_their_rows():
    t = dict(boxes=torch.tensor([[10.0, 10, 12, 11], [0, 0, 40, 40], [5, 5, 5, 9]]), labels=torch.tensor([1, 2, 3]))
    t |= dict(iscrowd=torch.tensor([0, 1, 0]), masks=torch.ones(3, 100, 100, dtype=torch.uint8), image_id='x')
    for smallest, want in ((0, [1, 2]), (1, [2])):
        _, o = ToBatch(50)(open_image(np.zeros((100, 100, 3), np.uint8)), as_tv(t, (100, 100)), smallest=smallest)
        assert o['labels'].tolist() == want and o['image_id'] == 'x'
        assert len(o['boxes']) == len(o['masks']) == len(o['iscrowd']) == len(want)


# --- COCO


@pytest.mark.parametrize(
    'name', ['/home/anna/data/a.png', 'C:\\data\\a.png', 'a.png', './a.png', 'images/a.png', 'data/sub/a.png']
)
def test_file_names_of_another_machine(tmp_path, name):
    picture(tmp_path / 'images' / 'a.png')
    f = coco_file(tmp_path, [(1, name)], [(1, (9, 9, 20, 20))])
    for where in (None, tmp_path / 'images'):
        recs, _, report = coco_records(f, where)
        assert recs[0].path.samefile(tmp_path / 'images' / 'a.png') and str(report) == 'nothing skipped of 1'
        assert check_data(f, where).ok


def test_two_names_that_lead_to_one_file(tmp_path):
    for o in ('train/a.png', 'a.png'):
        picture(tmp_path / o, len(o))
    f = coco_file(tmp_path, [(1, '/x/train/a.png'), (2, '/x/val/a.png'), (3, '/y/val/a.png')], [(1, (9, 9, 20, 20))])
    recs, _, report = coco_records(f, tmp_path)
    assert [r.path.relative_to(tmp_path).as_posix() for r in recs] == ['train/a.png', 'a.png']
    assert dict(report.reasons) == {'whose name leads to the file of another image': ['/y/val/a.png']}


@pytest.mark.parametrize(
    'ids', [(1, '1'), ('1', 1), ('1', '1'), ('0007', '0007'), ('a.png1234', 'a.png1234'), (1.0, 1)]
)
def test_ids_as_text(tmp_path, ids):
    picture(tmp_path / 'a.png')
    f = coco_file(tmp_path, [(ids[0], 'a.png')], [(ids[1], (9, 9, 20, 20))])
    (r,), _, report = coco_records(f)
    assert len(r.labels) == 1 and not report.notes and check_data(f).ok
    d = json.loads(f.read_text(encoding='utf-8'))
    d['categories'][0]['id'] = '1'
    assert len(coco_records(d, tmp_path)[0][0].labels) == 1


def test_classes_that_are_none(tmp_path):
    picture(tmp_path / 'a.png')
    cats = [
        dict(id=0, name='animals', supercategory='none'),
        dict(id=1, name='cat', supercategory='animals'),
        dict(id=2, name='dog', supercategory='animals'),
        dict(id=3, name='_background_'),
        dict(id=4, name='person', supercategory='person'),
    ]
    f = coco_file(tmp_path, [(1, 'a.png')], [(1, (9, 9, 20, 20))], cats)
    (r,), cm, report = coco_records(f)
    assert cm.names[1:] == ['cat', 'dog', 'person'] == list(coco_categories(f)) and r.labels.tolist() == [1]
    assert dict(report.notes) == {'category without objects above others, left out': ['animals']}
    r = check_data(f)
    assert r.ok and r.counts == {'parent class': 1} and [*r.classes] == ['cat', 'dog', 'person']
    f = coco_file(tmp_path, [(1, 'a.png')], [(1, (9, 9, 20, 20))], cats, category_id=0)
    assert 'animals' in coco_categories(f)  # it has an object


def test_masks_that_are_none_are_refused(tmp_path):
    for i in (1, 2):
        picture(tmp_path / f'{i}.png', i)
    f = coco_file(tmp_path, [(1, '1.png'), (2, '2.png')], [(1, (9, 9, 20, 20))], segmentation=[])
    with pytest.raises(ValueError, match='no object of .*ann.json has a mask: train a detector without masks'):
        coco_records(f, masks=True)
    assert len(coco_records(f)[0]) == 2


def test_pycocotools_takes_what_is_written(tmp_path, monkeypatch, capsys):
    from pycocotools.coco import COCO

    picture(tmp_path / 'a.png')
    r = Record('a', tmp_path / 'a.png', (60, 80), [[9, 9, 40, 40]], [1])
    (tmp_path / 'x.json').write_text(json.dumps(to_coco([r], ClassMap(['cat']))), encoding='utf-8')
    truth = COCO(tmp_path / 'x.json')
    assert truth.dataset['info'] and truth.loadRes([dict(image_id=1, category_id=1, bbox=[9, 9, 31, 31], score=1.0)])


# --- VOC


@pytest.mark.parametrize('folder', ['annots', 'labels', 'xml', 'Annotations'])
def test_annotations_in_any_folder(tmp_path, folder):
    picture(tmp_path / 'images' / 'a.png')
    xml(tmp_path / folder / 'a.xml', [(10, 10, 30, 30)])
    assert check_data(tmp_path).ok and voc_folders(tmp_path) == (tmp_path / 'images', tmp_path / folder)
    assert len(voc_records(*voc_folders(tmp_path))[0]) == 1


def test_xml_that_is_not_voc(tmp_path):
    picture(tmp_path / 'images' / 'a.png')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'a.xml').write_text('<annotations/>')
    assert voc_folders(tmp_path)[1] is None
    for o in 'ab':
        xml(tmp_path / o / 'a.xml', [(10, 10, 30, 30)])
    assert voc_folders(tmp_path)[1] is None  # which of both?


def test_pixels_that_count_from_0(tmp_path):
    for o in 'ab':
        picture(tmp_path / 'JPEGImages' / f'{o}.png', ord(o))
    xml(tmp_path / 'Annotations' / 'a.xml', [(0, 10, 30, 30), (40, 0, 80, 60)])
    xml(tmp_path / 'Annotations' / 'b.xml', [(5, 10, 30, 30)])
    recs, _, report = voc_records(*voc_folders(tmp_path))
    assert [r.boxes.tolist() for r in recs] == [[[0, 10, 30, 30], [40, 0, 80, 60]], [[5, 10, 30, 30]]]
    assert dict(report.notes) == {'with a box that begins at 0: this set counts from 0, not from 1': ['a']}
    r = check_data(tmp_path)
    assert r.ok and r.counts == {'counts from 0': 1}
    xml(tmp_path / 'Annotations' / 'a.xml', [(1, 10, 30, 30)])
    recs, _, report = voc_records(*voc_folders(tmp_path))
    assert [r.boxes.tolist() for r in recs] == [[[0, 9, 30, 30]], [[4, 9, 30, 30]]] and not report.notes


def test_labels_of_another_class_map(tmp_path):
    for o in 'ab':
        picture(tmp_path / o / f'{o}.png', ord(o))
        xml(tmp_path / o / f'{o}.xml', [(10, 10, 30, 30)], dict(a='cat', b='ape')[o])
        xml(tmp_path / o / f'{o}.xml', [(10, 10, 30, 30)], dict(a='cat', b='ape')[o])
    read = lambda o, cm=None: voc_records(tmp_path / o, tmp_path / o, cm)[:2]
    (train, cm), (test, _) = read('a', ClassMap(['cat', 'ape'])), read('b')
    with pytest.raises(
        ValueError, match="'b' was read with the classes ape, expected cat, ape, in this order: pass class_map="
    ):
        detection_dls(train, test, cm, size=64)
    dls = detection_dls(train, read('b', cm)[0], cm, size=64, bs=1)
    with pytest.raises(ValueError, match='pass class_map= to the reader'):
        dls.test_dl(test, with_labels=True)
    assert len(dls.test_dl(test)) == 1  # images alone
    detection_dls(read('a')[0], [], cm, size=64)  # the first classes are the same


# --- splits


def test_groups_stay_together():
    recs = [Record(f'{i}', f'{i}.jpg', (9, 9), [[0, 0, 5, 5]], [1 + i % 2]) for i in range(60)]
    for seed in range(5):
        for groups in (lambda r: int(r.image_id) // 6, [i // 6 for i in range(60)]):
            train, valid = split_records(recs, 0.3, seed, groups=groups)
            videos = [{int(r.image_id) // 6 for r in o} for o in (train, valid)]
            assert not videos[0] & videos[1] and len(valid) == 18 and len(train) == 42
    with pytest.raises(ValueError, match='got 2 groups for 60 records'):
        split_records(recs, groups=[1, 2])


@pytest.mark.parametrize(
    'n,pct,groups,words',
    [
        (1, 0.2, None, 'valid_pct=0.2 of 1 images leaves none to validate on: pass more images'),
        (2, 0.2, None, 'leaves none to validate on'),
        (30, 0.01, None, 'valid_pct=0.01 of 30 images leaves none to validate on'),
        (2, 0.9, None, 'leaves none to train on'),
        (0, 0.2, None, 'of 0 images leaves none'),
        (9, 0.2, lambda r: 0, 'of 9 images in 1 groups leaves none to train on'),
    ],
)
def test_a_part_without_an_image(n, pct, groups, words):
    recs = [Record(f'{i}', f'{i}.jpg', (9, 9), [], []) for i in range(n)]
    with pytest.raises(ValueError, match=words):
        split_records(recs, pct, groups=groups)


def test_equal_files_stay_on_one_side(tmp_path):
    recs = [Record(f'{i}', picture(tmp_path / f'{i}.png', i // 3), (60, 80), [], []) for i in range(30)]
    assert shared_images(*split_records(recs, 0.3, 0))
    train, valid = split_records(recs, 0.3, 0, groups=content_groups(recs))
    assert shared_images(train, valid) == [] and len(valid) == 9
    assert shared_images(recs[:1], recs[1:4]) == ['1.png', '2.png']
    assert content_groups([Record('a', 'none.jpg', (1, 1), [], [])] * 2) == [0, 1]


@pytest.mark.parametrize('kw', [dict(bs=0), dict(num_workers=-1)])
def test_batches_that_cannot_be(kw, tmp_path):
    r = Record('a', picture(tmp_path / 'a.png'), (60, 80), [[9, 9, 40, 40]], [1])
    with pytest.raises(ValueError, match='at least one image per batch and zero or more workers'):
        detection_dls([r], [], ClassMap(['a']), **kw)
