import pickle
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from backbones_nb.data.records import (
    ClassMap,
    clean_boxes,
    image_size,
    load_image,
    read_names,
    Record,
    show_records,
    SkipReport,
    split_listed,
    split_records,
)
from backbones_nb.data.voc import read_voc, voc_records, voc_split


def write_xml(path, objects, size=(60, 80)):
    one = ''.join(
        f'<object><name>{n}</name><difficult>{d}</difficult><bndbox>'
        + ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), b))
        + '</bndbox></object>'
        for n, b, d in objects
    )
    path.write_text(
        '<annotation>'
        + (f'<size><width>{size[1]}</width><height>{size[0]}</height></size>' if size else '')
        + one
        + '</annotation>'
    )


@pytest.fixture
def voc(tmp_path):
    for o in ('images', 'xmls'):
        (tmp_path / o).mkdir()

    def add(name, objects=None, size=(60, 80), image=True):
        if image:
            Image.new('RGB', (80, 60), 'gray').save(tmp_path / 'images' / f'{name}.jpg')
        if objects is not None:
            write_xml(tmp_path / 'xmls' / f'{name}.xml', objects, size)

    return tmp_path / 'images', tmp_path / 'xmls', add


def test_class_map():
    cm = ClassMap(['cat', 'dog'])
    assert (len(cm), list(cm), cm.get_id('dog'), cm.get_name(1)) == (3, ['background', 'cat', 'dog'], 2, 'cat')
    for bad in (
        lambda: cm.get_name(3),
        lambda: cm.get_name(-1),
        lambda: ClassMap(['a', 'a']),
        lambda: ClassMap(['background']),
    ):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ValueError, match="Did you mean 'dog'"):
        cm.get_id('dgo')


def test_clean_boxes():
    b, ok = clean_boxes([[-5, -5, 3, 3], [2, 2, 2, 9], [90, 90, 200, 200]], (100, 100))
    assert ok.tolist() == [True, False, True] and b[0].tolist() == [0, 0, 3, 3] and b[2].tolist() == [90, 90, 100, 100]


@pytest.mark.parametrize(
    'mode,fmt', [('P', 'GIF'), ('RGBA', 'PNG'), ('L', 'PNG'), ('CMYK', 'JPEG'), ('LA', 'PNG'), ('I;16', 'PNG')]
)
def test_images_of_any_kind_under_any_name(mode, fmt, tmp_path):
    im = (
        Image.fromarray(np.full((6, 8), 300, np.uint16))
        if mode == 'I;16'
        else Image.new('RGB', (8, 6), 'red').convert(mode)
    )
    im.save(tmp_path / 'x.jpg', format=fmt)
    got = load_image(tmp_path / 'x.jpg')
    assert (got.mode, got.size, image_size(tmp_path / 'x.jpg')) == ('RGB', (8, 6), (6, 8))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    "Each of the eight ways to store an image gives the same image and the same size."
    want = Image.new('RGB', (40, 24), 'white')
    want.paste('red', (0, 0, 20, 12))
    want.paste('blue', (20, 12, 40, 24))
    T = Image.Transpose  # how a viewer's turn is undone
    undo = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }
    stored, exif = want.transpose(undo[orientation]) if orientation > 1 else want, Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / 'x.png', exif=exif)
    assert np.array_equal(load_image(tmp_path / 'x.png'), want) and image_size(tmp_path / 'x.png') == (24, 40)


def test_values_of_unusual_images(tmp_path):
    a = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    a.save(tmp_path / 'clear.png')
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / 'gray16.png')
    p = Image.new('P', (4, 4), 1)
    p.putpalette([0, 0, 0, 10, 20, 30])
    p.save(tmp_path / 'p.png')
    for name, want in (('clear', (255,) * 3), ('gray16', (128,) * 3), ('p', (10, 20, 30))):
        assert load_image(tmp_path / f'{name}.png').getpixel((0, 0)) == want


def test_truncated_unreadable_and_missing_images_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / 'x.jpg')
    (tmp_path / 'x.jpg').write_bytes((tmp_path / 'x.jpg').read_bytes()[:2000])
    assert image_size(tmp_path / 'x.jpg') == (64, 64)
    with pytest.raises(ValueError, match='x.jpg'):
        load_image(tmp_path / 'x.jpg')
    (tmp_path / 'no.jpg').write_bytes(b'no image')
    for f in (load_image, image_size):
        with pytest.raises(ValueError, match='no.jpg'):
            f(tmp_path / 'no.jpg')
        with pytest.raises(FileNotFoundError, match='y.jpg'):
            f(tmp_path / 'y.jpg')


def test_voc_pixels_count_from_one_and_include_the_last(voc):
    images, xmls, add = voc
    add('a', [('cat', (1, 1, 80, 60), 0), ('cat', (11, 21, 11, 21), 0)])
    (r,), _, report = voc_records(images, xmls)
    assert r.boxes.tolist() == [[0, 0, 80, 60], [10, 20, 11, 21]] and str(report) == 'nothing skipped of 1'


def test_the_toys_heads_as_voc(toy):
    "The toy's xml files, read as any VOC folder: one record each, numbers as they stand in the file."
    xmls = toy / 'annotations' / 'xmls'
    recs, _, report = voc_records(toy / 'images', xmls)
    assert len(recs) == len(list(xmls.glob('*.xml'))) and len(report) == len(
        list((toy / 'images').glob('*.jpg'))
    ) - len(recs)
    for r in recs:
        size, objs = read_voc(xmls / f'{r.image_id}.xml')
        text = (xmls / f'{r.image_id}.xml').read_text()
        x1, x2 = ([int(o) for o in re.findall(f'<{k}>(\\d+)<', text)] for k in ('xmin', 'xmax'))
        assert [(o[1][0], o[1][2]) for o in objs] == [(a - 1, b) for a, b in zip(x1, x2)] and tuple(size) == r.size


def test_boxes_are_fixed_and_noted(voc):
    images, xmls, add = voc
    add(
        'a',
        [
            ('cat', (-4, 5, 100, 30), 0),
            ('dog', (90, 5, 120, 30), 0),
            ('dog', (30, 30, 10, 10), 0),
            ('dog', ('nan', 5, 20, 30), 0),
            ('dog', (5, 5, 20, 30), 0),
        ],
    )
    (r,), cm, report = voc_records(images, xmls)
    assert r.boxes.tolist() == [[0, 4, 80, 30], [4, 4, 20, 30]] and r.labels.tolist() == [1, 2]
    assert len(report) == 0 and 'without area' in str(report) and 'clipped' in str(report)


@pytest.mark.parametrize(
    'difficult,labels,crowd', [('crowd', [1, 2], [0, 1]), ('keep', [1, 2], [0, 0]), ('skip', [1], [0])]
)
def test_difficult(voc, difficult, labels, crowd):
    images, xmls, add = voc
    add('a', [('cat', (1, 1, 20, 20), 0), ('dog', (30, 30, 50, 50), 1)])
    (r,), _, _ = voc_records(images, xmls, ClassMap(['cat', 'dog']), difficult=difficult)
    assert (r.labels.tolist(), r.target()['iscrowd'].tolist()) == (labels, crowd)


def test_whatever_is_left_out_is_named(voc):
    images, xmls, add = voc
    good = [('cat', (1, 1, 20, 20), 0)]
    for name in ('x_10', 'x_9'):
        add(name, good)
    add('empty', [])
    add('nosize', good, size=None)
    add('zero', good, size=(0, 0))
    add('other', good, size=(120, 160))
    add('bare')
    add('gone', good, image=False)
    add('bad', good)
    (xmls / 'bad.xml').write_text('<annotation><object>')
    add('broken', good)
    (images / 'broken.jpg').write_bytes(b'x')
    Image.new('RGB', (80, 60)).save(images / 'x_9.png')
    (images / 'notes.txt').write_text('stray')
    (images / '._x_9.jpg').write_bytes(b'x')
    recs, cm, report = voc_records(images, xmls)
    assert [r.image_id for r in recs] == ['empty', 'nosize', 'x_9', 'x_10', 'zero'] and list(cm) == [
        'background',
        'cat',
    ]
    assert recs[0].target()['boxes'].shape == (0, 4)
    assert {o for v in report.reasons.values() for o in v} == {
        'other',
        'bare',
        'bad',
        'broken',
        'x_9.png',
    } and report.total == len(recs) + len(report)
    assert 'gone' in str(report) and all(o in str(report) for o in ('bare', 'broken', 'x_9.png'))


def test_errors_say_what_to_do(voc, tmp_path):
    images, xmls, add = voc
    add('a', [('cat', (1, 1, 20, 20), 0)])
    with pytest.raises(ValueError, match="no class 'cat'.*Did you mean 'cats'"):
        voc_records(images, xmls, ClassMap(['cats']))
    with pytest.raises(ValueError, match='difficult'):
        voc_records(images, xmls, difficult='maybe')
    with pytest.raises(FileNotFoundError, match='none'):
        voc_records(tmp_path / 'none', xmls)
    (tmp_path / 'e').mkdir()
    with pytest.raises(ValueError, match='1 without annotation'):
        voc_records(images, tmp_path / 'e')
    for text in (
        '',
        '<annotation><object><name>cat</name></object></annotation>',
        '<annotation><object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>',
    ):
        (tmp_path / 'x.xml').write_text(text)
        with pytest.raises(ValueError, match='x.xml'):
            read_voc(tmp_path / 'x.xml')


def test_records_are_cheap_and_compare_by_identity(tmp_path):
    a, b = (
        Record('a', tmp_path / 'absent.jpg', (4, 4), [[0, 0, 1, 1]], [1], masks=np.ones((1, 4, 4), np.uint8))
        for _ in range(2)
    )
    assert a in [b, a] and a != b  # no file is opened, and arrays are not compared
    t = a.target()
    t['boxes'] += 1
    t['masks'] *= 0
    assert a.boxes.tolist() == [[0, 0, 1, 1]] and a.masks.sum() == 16
    with pytest.raises(FileNotFoundError, match='absent.jpg'):
        a.image()
    with pytest.raises(ValueError, match="'x' has 2 boxes, 1 labels"):
        Record('x', 'x.jpg', (4, 4), np.zeros((2, 4)), [1])


def test_skip_report_adds_up():
    a, b = SkipReport(5), SkipReport(3)
    for o in 'abcdefg':
        a.skip(o, 'odd')
    b.skip('h', 'odd')
    b.note('i', 'fixed')
    a.add(b)
    assert (len(a), a.total, a.reasons['odd'][-1]) == (8, 8, 'h')
    assert str(a) == 'skipped 8 of 8: 8 odd (a, b, c, d, e, ...); note: 1 fixed (i)'


@pytest.fixture
def year(voc, tmp_path):
    "Six images in VOC's own layout, with lists; two of them with masks."
    images, xmls, add = voc
    for i in range(6):
        add(f'p{i}', [('cat' if i < 4 else 'dog', (11, 21, 30, 40), 0), ('cat', (51, 1, 70, 10), i % 2)])
    root = tmp_path / 'VOC2050'
    root.mkdir()
    images.rename(root / 'JPEGImages')
    xmls.rename(root / 'Annotations')
    lists = {
        'Main/train': 'p0\np1\np9\n',
        'Main/val': 'p4\np5',
        'Main/cat_val': 'p4  1\np5 -1\n',
        'Segmentation/train': 'p2\np3\n',
    }
    for k, v in lists.items():
        (root / 'ImageSets' / k).parent.mkdir(parents=True, exist_ok=True)
        (root / 'ImageSets' / f'{k}.txt').write_text(v)
    numbers = np.zeros((60, 80), np.uint8)
    numbers[20:40, 10:30], numbers[0:10, 50:70], numbers[19, 10:30] = 1, 2, 255
    (root / 'SegmentationObject').mkdir()
    for o in ('p2', 'p3'):
        Image.fromarray(numbers).save(root / 'SegmentationObject' / f'{o}.png')
    return root


@pytest.mark.parametrize(
    'split,want',
    [('train', ['p0', 'p1']), ('val', ['p4', 'p5']), ('cat_val', ['p4']), (None, [f'p{i}' for i in range(6)])],
)
def test_splits_of_vocs_own_layout(year, split, want):
    for path in (year, year.parent):  # the year itself, or what holds it
        recs, cm, report = voc_split(path, split)
        assert [r.image_id for r in recs] == want and list(cm) == ['background', 'cat', 'dog'] and len(report) == 0
    assert ('p9' in str(report)) == (split == 'train')  # listed, and there is no image


def test_masks_of_vocs_own_layout(year):
    recs, _, report = voc_split(year, 'train', masks=True)
    assert [r.image_id for r in recs] == ['p2', 'p3'] and len(report) == 0
    m = pickle.loads(pickle.dumps(recs[0])).target()['masks'].numpy()
    assert (
        m.shape == (2, 60, 80)
        and m.sum((1, 2)).tolist() == [400, 200]
        and m[0, 20:40, 10:30].all()
        and m.dtype == np.uint8
    )
    (easy,), _, _ = voc_records(
        year / 'JPEGImages', year / 'Annotations', difficult='skip', names=['p3'], masks=year / 'SegmentationObject'
    )
    assert easy.target()['masks'].numpy().sum((1, 2)).tolist() == [400]


def test_masks_of_other_objects_are_not_taken(year):
    seg = year / 'SegmentationObject'
    Image.fromarray(np.ones((60, 80), np.uint8)).save(seg / 'p0.png')
    Image.fromarray(np.ones((30, 80), np.uint8)).save(seg / 'p1.png')
    Image.new('RGB', (80, 60)).save(seg / 'p4.png')
    recs, _, report = voc_split(year, None, masks=True)
    assert [r.image_id for r in recs] == ['p2', 'p3']
    assert dict(report.reasons) == {
        'with masks of other objects': ['p0'],
        'with masks of another size': ['p1'],
        'with unreadable masks': ['p4'],
        'without masks': ['p5'],
    }


def test_layouts_and_lists_that_are_not_there(year, tmp_path):
    with pytest.raises(FileNotFoundError, match='test.txt.*has cat_val, train, val'):
        voc_split(year, 'test')
    with pytest.raises(ValueError, match='no folders'):
        voc_split(year / 'JPEGImages')
    (tmp_path / 'VOC2051' / 'JPEGImages').mkdir(parents=True)
    (tmp_path / 'VOC2051' / 'Annotations').mkdir()
    with pytest.raises(ValueError, match='2 folders'):
        voc_split(tmp_path)


@pytest.mark.parametrize(
    'text,names',
    [
        ('a\nb 1\n\n', ['a', 'b 1']),
        ('a  1\nb -1\nc  0\n', ['a', 'c']),
        ('my cat 7  1\nmy cat 8 -1', ['my cat 7']),
        ('IMG 1\nIMG 2', ['IMG 1', 'IMG 2']),
        ('', []),
    ],
)
def test_names_with_flags_and_with_spaces(tmp_path, text, names):
    (tmp_path / 'x.txt').write_text(text)
    assert read_names(tmp_path / 'x.txt', flags=True) == names  # a mark of the byte order is no part of a name
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8-sig')
    assert read_names(tmp_path / 'x.txt', flags=True) == names and read_names(tmp_path / 'x.txt') == [
        l for l in text.split('\n') if l
    ]


def flat(n=100):
    return [
        Record(f'r{i}', f'data/{i % 2}/{i}.jpg', (9, 9), [[0, 0, 5, 5]], [2 if i % 10 == 0 else 1]) for i in range(n)
    ]


def ids(rs):
    return [r.image_id for r in rs]


@pytest.mark.parametrize('key', [None, lambda r: int(r.labels[0])])
def test_random_and_stratified_splits(key):
    recs = flat()
    train, valid = split_records(recs, 0.2, seed=1, key=key)
    assert (
        (len(train), len(valid)) == (80, 20)
        and sorted(ids(train) + ids(valid)) == sorted(ids(recs))
        and ids(train) == [o for o in ids(recs) if o in set(ids(train))]
    )
    assert (
        ids(split_records(recs, 0.2, seed=1, key=key)[1])
        == ids(valid)
        != ids(split_records(recs, 0.2, seed=2, key=key)[1])
    )
    counts = [Counter(int(r.labels[0]) for r in split_records(recs, 0.2, seed=s, key=key)[1])[2] for s in range(5)]
    assert (set(counts) == {2}) == (key is not None)
    for bad in (0, 1, -0.2, 20):
        with pytest.raises(ValueError, match='valid_pct'):
            split_records(recs, bad)


@pytest.mark.parametrize(
    'names', [['r1', 'r3'], ['1.jpg', '3.jpg'], ['1', '3'], ['1/1.jpg', './1/3.jpg'], ['data/1/1', 'data/1/3.jpg']]
)
def test_splits_by_names(names, tmp_path):
    recs = flat(6)
    (tmp_path / 'valid.txt').write_text('\n'.join(names) + '\n\n')
    for valid in (names, tmp_path / 'valid.txt', str(tmp_path / 'valid.txt')):
        assert [ids(o) for o in split_listed(recs, valid)] == [['r0', 'r2', 'r4', 'r5'], ['r1', 'r3']]
    assert [ids(o) for o in split_listed(recs, names, train=['r0'])] == [['r0'], ['r1', 'r3']]


def test_lists_that_do_not_fit(tmp_path):
    recs = flat(6)
    with pytest.raises(ValueError, match='no record is called r10, x: fix'):
        split_listed(recs, ['x', 'r1', 'r10'])
    assert ids(split_listed(recs, ['x', 'r1'], strict=False)[1]) == ['r1']
    with pytest.raises(ValueError, match='got r1 in both lists'):
        split_listed(recs, ['r1'], train=['r0', '1.jpg'])
    with pytest.raises(FileNotFoundError, match='none.txt'):
        split_listed(recs, tmp_path / 'none.txt')


def test_records_are_shown(toy):
    recs, cm, _ = voc_records(toy / 'images', toy / 'annotations' / 'xmls')
    fig = show_records(recs, cm, n=4, ncols=2)
    texts = {t.get_text() for ax in fig.axes for t in ax.findobj() if hasattr(t, 'get_text')}
    assert len(fig.axes) == 4 and texts >= {cm.get_name(l) for r in recs[:4] for l in r.labels}
