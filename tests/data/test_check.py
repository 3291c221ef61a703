import copy
import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from backbones_nb.data.check import check_data
from backbones_nb.data.check_formats import find_format
from backbones_nb.data.problems import DataReport, Problem, problem_kinds
from backbones_nb.data.coco import coco_records, to_coco
from backbones_nb.data.pets import pets_class_map, pets_records
from backbones_nb.data.records import ClassMap, Record

size = (60, 80)
square = np.zeros(size, np.uint8)
square[20:40, 10:30] = 1
polygon = [[10, 20, 30, 20, 30, 40, 10, 40]]


def picture(path, seed=0, size=size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)


def ann(i, image_id=1, bbox=(10, 20, 20, 20), **kw):
    return dict(id=i, image_id=image_id, category_id=1, bbox=list(bbox)) | kw


@pytest.fixture
def coco(tmp_path):
    "A sound COCO set of two images, and a function that checks it after changes."
    for i in (1, 2):
        picture(tmp_path / 'images' / f'{i}.jpg', i)
    data = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=60, width=80) for i in (1, 2)],
        annotations=[ann(1), ann(2, 2, segmentation=polygon)],
        categories=[dict(id=1, name='cat'), dict(id=7, name='dog')],
    )
    data['annotations'][0]['segmentation'] = polygon

    def look(change=None, **kw):
        d = copy.deepcopy(data)
        if change:
            change(d)
        (tmp_path / 'set.json').write_text(json.dumps(d))
        return check_data(tmp_path / 'set.json', **kw)

    look.root = tmp_path
    return look


def test_a_sound_set_is_ok_and_says_what_is_fine(coco):
    r = coco()
    assert r.ok and len(r) == 0 and r.counts == {} and bool(r) and r.listing() == ''
    assert (
        (r.images, r.readable, r.boxes, r.classes) == (2, 2, 2, dict(cat=2, dog=0))
        and r.facts() in str(r)
        and 'no problems found' in str(r)
    )


def first(d):
    return d['annotations'][0]


@pytest.mark.parametrize(
    'change,kind',
    [
        (lambda d: first(d).update(bbox=[60, 20, 30, 20], segmentation=None), 'box outside image'),
        (lambda d: first(d).update(bbox=[90, 20, 30, 20], segmentation=None), 'box outside image'),
        (lambda d: first(d).update(bbox=[10, 20, 0, 20]), 'box without area'),
        (lambda d: first(d).update(bbox=[10, 20, 20, -20]), 'box without area'),
        (lambda d: first(d).update(bbox=[10, 20, float('nan'), 20]), 'box not finite'),
        (lambda d: first(d).update(bbox=[10, 20, float('inf'), 20]), 'box not finite'),
        (lambda d: first(d).update(bbox=[10, 20, 20]), 'no box'),
        (lambda d: first(d).pop('bbox'), 'no box'),
        (lambda d: first(d).update(bbox='none'), 'no box'),
        (lambda d: first(d).update(bbox=[10, 20, 2, 20], segmentation=None), 'tiny box'),
        (lambda d: first(d).update(category_id=3), 'unknown class'),
        (lambda d: d['annotations'].append(ann(9, segmentation=polygon)), 'box twice'),
        (lambda d: d['annotations'].append(ann(9, 55)), 'annotation without image'),
        (lambda d: first(d).update(id=2), 'broken entry'),
        (lambda d: d['annotations'].append('x'), 'broken entry'),
        (lambda d: d['images'].append({}), 'broken entry'),
        (lambda d: d['categories'].append(dict(id=8)), 'broken entry'),
        (lambda d: d['categories'].append(dict(id=1, name='cow')), 'broken entry'),
        (lambda d: d['images'].append(dict(d['images'][0])), 'image twice'),
        (lambda d: d['images'].append(dict(d['images'][0], id=3)), 'image twice'),
        (lambda d: d['images'].append(dict(id=3, file_name='3.jpg')), 'missing image'),
        (lambda d: d['images'][0].update(height=80, width=60), 'size disagrees'),
        (lambda d: d['annotations'].pop(), 'image without objects'),
        (lambda d: d['images'].pop(), 'image not annotated'),
        (lambda d: d['categories'].append(dict(id=8, name='Do_g')), 'class spelled twice'),
        (lambda d: first(d).pop('segmentation'), 'object without mask'),
        (lambda d: first(d).update(segmentation=[[1, 2, 3, 4]]), 'broken mask'),
        (lambda d: first(d).update(segmentation=polygon + [[1, 2]]), 'broken mask'),
        (lambda d: first(d).update(segmentation=dict(size=[80, 60], counts=[4800])), 'broken mask'),
        (lambda d: first(d).update(segmentation=dict(size=[60, 80], counts=[4800])), 'broken mask'),
        (lambda d: first(d).update(segmentation=dict(size=[60, 80], counts='~~~')), 'broken mask'),
        (lambda d: first(d).update(segmentation=[[40, 0, 60, 0, 60, 9]]), 'mask disagrees with box'),
    ],
)
def test_every_fault_of_a_coco_file_is_found(coco, change, kind):
    r = coco(change)
    assert (
        kind in r.counts
        and r.ok == all(problem_kinds[k][0] == 'hint' for k in r.counts)
        and kind in str(r)
        and kind in r._repr_markdown_()
    )
    assert len(r) == sum(r.counts.values()) == len(r.listing().splitlines())


@pytest.mark.parametrize(
    'spoil,kind',
    [
        (lambda f: f.unlink(), 'missing image'),
        (lambda f: f.write_bytes(b'no image'), 'unreadable image'),
        (lambda f: f.write_bytes(f.read_bytes()[: len(f.read_bytes()) // 2]), 'unreadable image'),
        (lambda f: f.write_bytes(b''), 'unreadable image'),
        (lambda f: picture(f, 1, (30, 40)), 'size disagrees'),
        (lambda f: shutil.copy(f.parent / '2.jpg', f), 'same content'),
    ],
)
@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_every_fault_of_a_file_is_found(coco, spoil, kind, suffix):
    if suffix == 'png' and kind != 'same content':  # a PNG under that name
        picture(coco.root / 'x.png', 1)
        shutil.move(coco.root / 'x.png', coco.root / 'images' / '1.jpg')
    spoil(coco.root / 'images' / '1.jpg')
    r = coco()
    assert (
        r.counts.get(kind) == 1
        and r.ok == (kind == 'same content')
        and r.readable == 1 + (kind in ('size disagrees', 'same content'))
    )


def test_only_boxes_are_counted_as_boxes(coco):
    r = coco(lambda d: (first(d).pop('bbox'), d['annotations'].append(ann(9, 55))))
    assert r.boxes == 1 and r.classes == dict(cat=1, dog=0) and '1 box;' in r.facts()


def test_the_background_is_no_class(coco):
    r = coco(lambda d: (d['categories'].append(dict(id=0, name='background')), first(d).update(category_id=0)))
    assert r.counts == {'unknown class': 1} and r.classes == dict(cat=1, dog=0)


def test_a_photograph_on_its_side_is_recognized(coco):
    f, exif = coco.root / 'images' / '1.jpg', Image.Exif()
    exif[274] = 6
    Image.open(f).save(f, exif=exif)
    assert 'EXIF' in coco().listing()


def test_thresholds_and_class_maps(coco):
    small = lambda d: first(d).update(bbox=[10, 20, 20, 8])
    assert (
        coco(small).counts == {'mask disagrees with box': 1}
        and coco(small, min_iou=0.3).ok
        and coco(small, min_iou=0.3, small=9).counts == {'tiny box': 1}
    )
    r = coco(class_map=ClassMap(['dog']))
    assert r.counts == {'unknown class': 2} and 'cat' in r.listing() and r.classes['cat'] == 0


def places(o, path=()):
    "All paths in nested dicts and lists, below the lists of the file."
    for k in o.keys() if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
        if path:
            yield *path, k
        yield from places(o[k], (*path, k))


def test_rubbish_stops_neither_check_nor_reader(coco):
    "Whatever stands in a file: there is a report, and there are records or a sentence that says why not."
    rng = random.Random(0)
    junk = [None, -1, 0, 2**70, 1e30, float('nan'), '', 'x', [], {}, [[]], {'a': 1}, True]
    junk += [[1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]], 'background']
    found, read = 0, 0

    def spoil(d):
        d['annotations'].append(ann(3, 2, segmentation=dict(size=[60, 80], counts=[1590, 1, 3209])))
        for _ in range(rng.randint(1, 2)):
            *path, last = rng.choice(list(places(d)))
            t = d
            for k in path:
                t = t[k]
            t[last] = copy.deepcopy(rng.choice(junk))

    for i in range(150):
        found += not coco(spoil, images=coco.root / 'images').ok
        try:
            read += (
                len(
                    [
                        r.target()
                        for r in coco_records(coco.root / 'set.json', coco.root / 'images', masks=bool(i % 2))[0]
                    ]
                )
                > 0
            )
        except (ValueError, FileNotFoundError) as e:
            assert '\n' not in str(e)
    assert found > 75 and read > 75


def test_the_report_is_the_same_each_time(toy, tmp_path):
    data = to_coco(pets_records(toy, 'all', masks=True)[0], pets_class_map(toy))
    for a in data['annotations'][::3]:
        a['bbox'][0] += 100
    (tmp_path / 'x.json').write_text(json.dumps(data))
    a, b = (check_data(tmp_path / 'x.json', toy / 'images', workers=n) for n in (1, 4))
    assert a.problems == b.problems and str(a) == str(b) and not a.ok


def test_progress_is_shown_when_asked_for(coco, capsys):
    coco()
    assert capsys.readouterr().err == ''
    coco(progress=True)
    assert '2/2' in capsys.readouterr().err


def write_xml(path, boxes, size=size, name='cat'):
    one = ''.join(
        f'<object><name>{name}</name><bndbox>'
        + ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), b))
        + '</bndbox></object>'
        for b in boxes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{one}</annotation>')


@pytest.fixture
def voc(tmp_path):
    for i in 'ab':
        picture(tmp_path / 'JPEGImages' / f'{i}.jpg', ord(i))
        write_xml(tmp_path / 'Annotations' / f'{i}.xml', [(11, 21, 30, 40)])
        (tmp_path / 'SegmentationObject').mkdir(exist_ok=True)
        Image.fromarray(square).save(tmp_path / 'SegmentationObject' / f'{i}.png')
    (tmp_path / 'ImageSets' / 'Main').mkdir(parents=True)
    for k, v in dict(train='a', val='b', trainval='a\nb').items():
        (tmp_path / 'ImageSets' / 'Main' / f'{k}.txt').write_text(v)
    return tmp_path


def test_voc(voc):
    r = check_data(voc)
    assert r.ok and len(r) == 0 and r.classes == dict(cat=2) and 'VOC' in str(r)


@pytest.mark.parametrize(
    'spoil,counts',
    [
        (
            lambda p: write_xml(p / 'Annotations' / 'a.xml', [(11, 21, 30, 40)] * 2),
            {'box twice': 1, 'broken mask': 1},
        ),  # the second has no mask
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [(0, 21, 30, 40)]), {'counts from 0': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [(30, 21, 11, 40)]), {'box without area': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [('nan', 21, 11, 40)]), {'box not finite': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [(61, 21, 80, 40)]), {'mask disagrees with box': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [(11, 21, 30, 40)], (600, 800)), {'size disagrees': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', []), {'image without objects': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'a.xml', [(11, 21, 30, 40)], name='Cat'), {'class spelled twice': 1}),
        (lambda p: write_xml(p / 'Annotations' / 'c.xml', [(11, 21, 30, 40)]), {'annotation without image': 1}),
        (lambda p: (p / 'Annotations' / 'a.xml').write_text('<x>'), {'broken entry': 1}),
        (lambda p: (p / 'Annotations' / 'a.xml').unlink(), {'image not annotated': 1}),
        (lambda p: (p / 'JPEGImages' / 'a.jpg').unlink(), {'annotation without image': 1, 'missing image': 2}),
        (lambda p: picture(p / 'JPEGImages' / 'a.png'), {'image twice': 1}),
        (lambda p: (p / 'ImageSets' / 'Main' / 'val.txt').write_text('a\nb'), {'in two splits': 1}),
        (lambda p: (p / 'SegmentationObject' / 'a.png').write_bytes(b'x'), {'broken mask': 1}),
        (lambda p: Image.fromarray(square * 2).save(p / 'SegmentationObject' / 'a.png'), {'broken mask': 2}),
        (lambda p: Image.fromarray(square.T).save(p / 'SegmentationObject' / 'a.png'), {'broken mask': 1}),
    ],
)
def test_every_fault_of_a_voc_folder_is_found(voc, spoil, counts):
    spoil(voc)
    assert check_data(voc).counts == counts


def test_images_beside_their_annotations(tmp_path):
    picture(tmp_path / 'a.jpg')
    write_xml(tmp_path / 'a.xml', [(11, 21, 30, 40)])
    assert find_format(tmp_path)[0] == 'voc' and check_data(tmp_path).ok


@pytest.fixture
def pets(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / 'pets')


def test_pets(pets):
    r = check_data(pets)
    assert (
        r.ok
        and 'Pets' in r.title
        and r.images == 48
        and set(r.counts) == {'image without objects'}
        and list(r.classes) == ['cat', 'dog']
    )
    ann, name = pets / 'annotations', sorted(o.stem for o in (pets / 'annotations' / 'xmls').glob('*.xml'))[0]
    tri = ann / 'trimaps' / f'{name}.png'
    before = tri.read_bytes()
    for spoil in (
        lambda: tri.write_bytes(b'x'),
        lambda: Image.new('L', Image.open(tri).size, 2).save(tri),
        lambda: Image.new('L', (9, 9), 1).save(tri),
        tri.unlink,
    ):
        spoil()
        assert check_data(pets).counts['broken mask'] == 1
        tri.write_bytes(before)
    a = np.full(Image.open(tri).size[::-1], 2, np.uint8)
    a[-4:, -4:] = 1
    Image.fromarray(a).save(tri)
    assert check_data(pets).counts['mask disagrees with box'] >= 1
    line = (ann / 'test.txt').read_text().splitlines()[-1]
    (ann / 'trainval.txt').write_text((ann / 'trainval.txt').read_text() + line + '\nnonsense\n')
    assert check_data(pets).counts['broken entry'] == 1  # the list that has no sense in a line
    (ann / 'trainval.txt').write_text((ann / 'trainval.txt').read_text().replace('nonsense\n', ''))
    assert check_data(pets).counts['in two splits'] == 1


def test_records(tmp_path):
    for i in (1, 2):
        picture(tmp_path / f'{i}.jpg', i)

    def r(i=1, boxes=((10, 20, 30, 40),), labels=(1,), masks=None, file=None):
        return Record(i, tmp_path / (file or f'{i}.jpg'), size, boxes, labels, masks)

    cm = ClassMap(['cat'])
    assert check_data([r(), r(2, masks=square[None])], class_map=cm).classes == dict(cat=2)
    for bad, kind in (
        (r(2, labels=(2,)), 'unknown class'),
        (r(2, boxes=((10, 20, 30, np.nan),)), 'box not finite'),
        (r(), 'image twice'),
        (r(2, (), ()), 'image without objects'),
        (r(2, masks=square), 'broken mask'),
        (r(2, masks=1 - square[None]), 'mask disagrees with box'),
        (r(3), 'missing image'),
        (r(2, file='1.jpg'), 'image twice'),
        (r(2, masks=broken), 'broken mask'),
    ):
        assert kind in check_data([r(), bad], class_map=cm).counts, kind
    assert check_data([r(1, labels=(5,))]).classes == {'5': 1} and check_data([r(1, labels=(0,))]).counts == {
        'unknown class': 1
    }  # 0 is the background


def broken():
    raise ValueError('gone')


def test_which_format_it_is(coco, voc, toy, tmp_path):
    assert find_format(toy) == ('pets', toy) and check_data(toy, format='voc').title.startswith('VOC')
    coco()
    assert find_format(coco.root / 'set.json')[0] == 'coco'
    (tmp_path / 'e').mkdir()
    with pytest.raises(ValueError, match='does not look like a data set'):
        check_data(tmp_path / 'e')
    for o in 'xy':
        (tmp_path / 'e' / f'{o}.json').write_text('{}')
    with pytest.raises(ValueError, match='2 json files'):
        check_data(tmp_path / 'e')
    (tmp_path / 'e' / 'y.json').unlink()
    with pytest.raises(ValueError, match='no list of images'):
        check_data(tmp_path / 'e')
    for bad, err, words in (
        (dict(data=tmp_path / 'none'), FileNotFoundError, 'none'),
        (dict(data=tmp_path / 'none', format='voc'), FileNotFoundError, 'none'),
        (dict(data=toy, format='yolo'), ValueError, 'yolo'),
        (dict(data=toy, images=tmp_path / 'none'), FileNotFoundError, 'none'),
        (dict(data=toy, format='coco'), ValueError, "of format 'pets'"),
        (dict(data=tmp_path / 'e', format='voc'), FileNotFoundError, 'no images'),
        (dict(data=[]), ValueError, 'no image'),
    ):
        with pytest.raises(err, match=words) as e:
            check_data(**bad)
        assert '\n' not in str(e.value)


def test_a_report_sorts_counts_and_shortens():
    r = DataReport(
        'x',
        9,
        9,
        0,
        {},
        [Problem('tiny box', f'i{k}', 'w' * 200) for k in (10, 9, 1)] + [Problem('missing image', 'z')],
    )
    assert (
        [p.where for p in r.problems] == ['z', 'i1', 'i9', 'i10']
        and r.counts == {'missing image': 1, 'tiny box': 3}
        and not r.ok
    )
    assert (
        max(map(len, str(r).splitlines())) < 200
        and str(r).splitlines()[-1] == 'not ok: 1 error, 3 hints'
        and 'w' * 200 in r.listing()
    )
    assert [row['where'].count('www') > 0 for row in r.table()] == [False, True] and [
        row['n'] for row in r.table(show=1)
    ] == [1, 3]


def test_real_records_are_sound(shared_pets):
    recs = pets_records(shared_pets, boxes='head')[0][::12]
    r = check_data(recs, class_map=pets_class_map(shared_pets))
    assert len(r) == 0 and r.readable == len(recs) > 15


@pytest.mark.slow
def test_the_real_folder(shared_pets):
    r = check_data(shared_pets)
    assert r.ok and r.readable == r.images == 489 and r.counts == {'image without objects': 4, 'image not annotated': 2}
