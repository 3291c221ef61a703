import csv
import io
import json
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from backbones_nb.cli.cli import main
from backbones_nb.data.check import check_data
from backbones_nb.data.coco import coco_categories
from backbones_nb.data.formats import (
    _Format,
    Formats,
    find_format,
    find_splits,
    formats,
    read_data,
    write_data,
)
from backbones_nb.data.records import ClassMap, Record
from backbones_nb.data.servers import brush_values
from backbones_nb.data.sheets import Sheet, _mask_polygon, sheet_records
from backbones_nb.data.run_lengths import decode_mask
from backbones_nb.data.outlines import write_via_csv
from backbones_nb.data.tables import write_retinanet
from backbones_nb.learners.run import open_data

cm = ClassMap(['zebra', 'apple pie', 'Käfer'])
written = [o.name for o in formats if o.write]
with_masks = [o.name for o in formats if o.write and o.masks]


def draw(folder, name='a', size=(61, 83), boxes=((3.25, 4.5, 30.125, 41.0),), labels=(1,), masks=None):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, name)))
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f'{name}.png')
    return Record(name, folder / f'{name}.png', size, boxes, labels, masks)


@pytest.fixture
def boxed(tmp_path):
    two = ((0, 0, 10.333333, 20), (50.1, 10.7, 83, 61))
    return [
        draw(tmp_path / 'in', 'a'),
        draw(tmp_path / 'in', 'é 2', (40, 90), ((0, 0, 90, 40),), (3,)),
        draw(tmp_path / 'in', 'c', boxes=two, labels=(2, 3)),
        draw(tmp_path / 'in', 'd', (32, 32), (), ()),
    ]


@pytest.fixture
def masked(tmp_path):
    "Masks with two parts, with a hole, of one pixel, and at the border."
    m = np.zeros((3, 61, 83), np.uint8)
    m[0, 3:30, 5:25], m[0, 10:20, 9:15], m[0, 40:50, 60:70] = 1, 0, 1
    m[1, 60, 82] = 1
    m[2, 0:9, 30:83] = np.triu(np.ones((9, 53)))
    boxes = [[c.min(1)[1], c.min(1)[0], c.max(1)[1] + 1, c.max(1)[0] + 1] for c in (np.array(o.nonzero()) for o in m)]
    return [
        draw(tmp_path / 'in', 'm', boxes=boxes, labels=(1, 2, 1), masks=m),
        draw(tmp_path / 'in', 'n', boxes=boxes[:1], labels=(3,), masks=m[:1]),
    ]


def by_name(records):
    return {r.path.stem: r for r in records}


def objects(r, class_map):
    t = r.target()
    masks = t.get('masks')
    rows = zip(
        [class_map.get_name(o) for o in r.labels], r.boxes.tolist(), [None] * len(r.labels) if masks is None else masks
    )
    return sorted(rows, key=lambda o: (o[0], *np.round(o[1])))


def assert_same(records, again, class_map):
    again = by_name(again)
    assert set(again) == set(by_name(records))
    for r in records:
        for a, b in zip(objects(r, cm), objects(again[r.path.stem], class_map), strict=True):
            assert a[0] == b[0]
            assert np.abs(np.array(a[1]) - b[1]).max() < 1e-3
            if a[2] is not None:
                assert ((a[2] & b[2]).sum() / (a[2] | b[2]).sum()).item() > 0.99


# --- round trips


@pytest.mark.parametrize('name', [o for o in written if o != 'instances'])
def test_boxes_come_back(tmp_path, boxed, name):
    write_data(boxed, cm, tmp_path / 'out', name)
    assert find_format(tmp_path / 'out')[0] == name
    parts, classes, report = read_data(tmp_path / 'out')
    (again,) = parts.values()
    assert_same(boxed, again, classes)
    assert not len(report) and set(classes) == set(cm)
    assert check_data(tmp_path / 'out').ok and check_data(tmp_path / 'out', format=name).boxes == 4


@pytest.mark.parametrize('name', with_masks)
def test_masks_come_back(tmp_path, masked, name):
    write_data(masked, cm, tmp_path / 'out', name)
    parts, classes, report = read_data(tmp_path / 'out', masks=True)
    (again,) = parts.values()
    assert_same(masked, again, classes)
    assert not len(report) and callable(again[0].masks)  # not decoded yet
    assert check_data(tmp_path / 'out').ok


@pytest.mark.parametrize('write', [write_retinanet, write_via_csv])
def test_other_spellings_come_back(tmp_path, boxed, write):
    write(boxed, cm, tmp_path / 'out')
    parts, classes, _ = read_data(tmp_path / 'out')
    assert_same(boxed, parts['all'], classes)


@pytest.mark.parametrize('name', written)
def test_splits_of_the_root(tmp_path, masked, name):
    write_data(dict(train=masked[:1], valid=masked[1:]), cm, tmp_path / 'out', name)
    assert find_format(tmp_path / 'out')[0] == name
    train, valid, classes, _ = open_data(tmp_path / 'out')
    assert_same([replace(r, masks=None) for r in masked[:1]], train, classes)
    assert_same([replace(r, masks=None) for r in masked[1:]], valid, classes)
    report = check_data(tmp_path / 'out')
    assert report.ok and report.images == 2 and report.boxes == 4


@pytest.mark.parametrize('name', written)
def test_valid_takes_what_data_takes(tmp_path, masked, name):
    write_data(masked[:1], cm, tmp_path / 'out', name)
    write_data(masked[1:], cm, tmp_path / 'coco', 'coco')
    path = find_format(tmp_path / 'out')[1]
    assert_same_ids = lambda rs, stems: sorted(r.path.stem for r in rs) == stems
    train, valid, classes, _ = open_data(tmp_path / 'coco', valid=path)
    assert assert_same_ids(train, ['n']) and assert_same_ids(valid, ['m'])
    assert [classes.get_name(o) for o in sorted(valid[0].labels)] == ['zebra', 'zebra', 'apple pie']


def test_valid_with_its_own_order_of_classes(tmp_path, boxed):
    write_data(boxed, cm, tmp_path / 'coco', 'coco')
    write_data(boxed, cm, tmp_path / 'csv', 'csv')  # sorted names
    train, valid, classes, _ = open_data(tmp_path / 'coco', valid=tmp_path / 'csv')
    assert classes == cm
    assert_same(boxed, train, classes)
    assert_same(boxed, valid, classes)
    few = [replace(boxed[0], labels=[1])]
    write_data(few, ClassMap(['zebra']), tmp_path / 'few', 'coco')
    with pytest.raises(ValueError, match='there is no class'):
        open_data(tmp_path / 'few', valid=tmp_path / 'csv')


def test_mask_polygon_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(60):
        m = (rng.random((rng.integers(1, 14), rng.integers(1, 14))) < rng.random()).astype(np.uint8)
        if m.any():
            assert (decode_mask([_mask_polygon(m)], m.shape) == m).all()
    with pytest.raises(ValueError, match='got an empty mask'):
        _mask_polygon(np.zeros((3, 3)))


# --- files as other tools write them


def png(folder, name='a.png', size=(60, 80)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size[::-1], (90, 20, len(list(folder.rglob('*.png'))))).save(folder / name)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
    return path


def read_one(path, **kw):
    parts, classes, report = read_data(path, **kw)
    (r,) = [o for rs in parts.values() for o in rs]
    return [(classes.get_name(k), [round(v, 3) for v in b]) for k, b in zip(r.labels, r.boxes.tolist())], report, r


def test_yolo_of_roboflow(tmp_path):
    png(tmp_path / 'train' / 'images')
    put(tmp_path / 'train' / 'labels' / 'a.txt', '1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.5\n\n')
    put(
        tmp_path / 'data.yaml',
        'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: [x, y]',
    )
    with pytest.raises(FileNotFoundError, match='valid'):
        read_data(tmp_path)
    png(tmp_path / 'valid' / 'images', 'b.png')
    assert list(find_splits(tmp_path)) == ['train', 'valid']  # a test without images is no loss
    parts, classes, _ = read_data(tmp_path)
    assert classes.names[1:] == ['x', 'y'] and parts['train'][0].boxes.tolist() == [[30, 15, 50, 45], [8, 6, 40, 30]]
    assert len(parts['valid'][0].labels) == 0  # no labels: no objects


@pytest.mark.parametrize(
    'yaml,match',
    [
        ('names: {0: a, 2: b}\ntrain: images', 'consecutively'),
        ('train: images', 'no names'),
        ('names: []\ntrain: images', 'no names'),
        ('a: [', 'cannot be read as YAML'),
        ('names: [a]\ntrain: nowhere', "names 'nowhere' as train"),
    ],
)
def test_broken_data_yaml(tmp_path, yaml, match):
    png(tmp_path / 'images')
    file = put(tmp_path / 'data.yaml', yaml)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as e:
        read_data(file)
    assert '\n' not in str(e.value)


def test_yolo_lists_dicts_and_lines(tmp_path):
    png(tmp_path / 'images')
    put(tmp_path / 'list.txt', './images/a.png\n')
    put(tmp_path / 'data.yaml', f'path: {tmp_path}\ntrain: list.txt\nnames: {{1: y, 0: x}}')
    put(
        tmp_path / 'labels' / 'a.txt',
        '0.0 .5 .5 .5 .5\n0 .5 .5\nx .5 .5 .1 .1\n0 40 30 10 10\n7 .5 .5 .1 .1\n0 nan 0 0 0',
    )
    rows, report, _ = read_one(tmp_path)
    assert rows == [('x', [20, 15, 60, 45])]
    for o in ('line 2', 'line 3', 'line 4', 'line 6', 'unknown category'):
        assert o in str(report), o
    counts = check_data(tmp_path).counts
    assert counts['broken entry'] == 4 and counts['unknown class'] == 1


def test_yolo_without_yaml(tmp_path):
    png(tmp_path / 'images')
    put(tmp_path / 'labels' / 'a.txt', '1 .5 .5 .5 .5')
    assert read_one(tmp_path)[0] == [('1', [20, 15, 60, 45])]
    put(tmp_path / 'classes.txt', 'x\ny')
    assert read_one(tmp_path)[0] == [('y', [20, 15, 60, 45])]


def test_yolo_trains_on_what_it_measures(tmp_path):
    png(tmp_path / 'images')
    png(tmp_path / 'images', 'b.png')
    put(tmp_path / 'labels' / 'a.txt', '0 .5 .5 .5 .5')
    put(tmp_path / 'data.yaml', 'train: images\nval: images\nnames: [x]')
    assert 'in train and valid' in str(open_data(tmp_path)[3])
    report = check_data(tmp_path)
    assert report.ok and report.images == 2 and 'the same 2 images' in report.listing()
    put(tmp_path / 'list.txt', 'images/a.png')
    put(tmp_path / 'data.yaml', 'train: images\nval: list.txt\nnames: [x]')
    assert check_data(tmp_path).counts['in two splits'] == 1


def test_roboflow_coco_root_is_no_class(tmp_path):
    png(tmp_path / 'train')
    cats = [('cells', 'none'), ('RBC', 'cells'), ('WBC', 'cells')]
    ann = dict(id=0, image_id=0, category_id=1, bbox=[1, 2, 3, 4], iscrowd=0, segmentation=[])
    data = dict(images=[dict(id=0, file_name='a.png', width=80, height=60)], annotations=[ann])
    data['categories'] = [dict(id=i, name=n, supercategory=s) for i, (n, s) in enumerate(cats)]
    put(tmp_path / 'train' / '_annotations.coco.json', data)
    parts, classes, _ = read_data(tmp_path)
    assert classes.names[1:] == ['RBC', 'WBC'] and parts['train'][0].labels.tolist() == [1]
    assert list(check_data(tmp_path).classes) == ['RBC', 'WBC']
    ann['category_id'] = 0  # then it is one
    assert list(coco_categories(data)) == ['cells', 'RBC', 'WBC']
    data['categories'] = [
        dict(id=0, name='cat'),
        dict(id=1, name='cat', supercategory='cat'),
        dict(id=2, name='dog', supercategory='cat'),
    ]
    ann['category_id'] = 1  # an unused parent has the name of a class that is used
    assert coco_categories(data) == dict(cat=1, dog=2)


def test_voc_of_roboflow_and_devkit(tmp_path, boxed):
    for k, rs in dict(train=boxed[:2], valid=boxed[2:3], test=boxed[3:]).items():
        write_data(rs, cm, tmp_path / k, 'voc')
        for f in [*(tmp_path / k).glob('*/*')]:
            f.rename(tmp_path / k / f.name)
        for d in ('JPEGImages', 'Annotations'):
            (tmp_path / k / d).rmdir()
    parts, classes, _ = read_data(tmp_path)
    assert {k: len(v) for k, v in parts.items()} == dict(train=2, valid=1, test=1)
    assert_same(boxed, sum(parts.values(), []), classes)
    write_data(boxed, cm, tmp_path / 'kit' / 'VOC2007', 'voc')
    put(tmp_path / 'kit' / 'package.json', '{}')
    assert find_format(tmp_path / 'kit') == ('voc', tmp_path / 'kit' / 'VOC2007')
    lists = tmp_path / 'kit' / 'VOC2007' / 'ImageSets' / 'Main'
    put(lists / 'train.txt', 'a\nc')
    put(lists / 'test.txt', 'd')
    assert [len(o) for o in open_data(tmp_path / 'kit')[:2]] == [2, 1]  # no val: test


@pytest.mark.parametrize(
    'text,rows,words',
    [
        ('filename,width,height,class,xmin,ymin,xmax,ymax\na.png,80,60,x,1,2,30,40', [('x', [1, 2, 30, 40])], []),
        ('image;label;x1;y1;x2;y2\nC:\\me\\a.png;x;1.5;2;30;40\n', [('x', [1.5, 2, 30, 40])], []),
        ('a.png,1,2,30,40,x\na.png,,,,,', [('x', [1, 2, 30, 40])], []),
        ('filename,class,xmin,ymin,xmax,ymax\na.png,x,1,2,30,40\na.png,x,1,,30,40\na.png,,1,2,3,4\na.png,x',
         [('x', [1, 2, 30, 40])], ['row 3', 'row 4', 'without a class', 'row 5', '2 columns']),
        ('filename,width,height,class,xmin,ymin,xmax,ymax\na.png,80,61,x,1,2,30,40', None, ['another size']),
        ('filename,class,xmin,ymin,xmax,ymax\nb.png,x,1,2,30,40', None, ['without image file']),
        ('name,age\nBo,3', None, ['starts with name,age', 'expected filename']),
        ('', None, ['starts with nothing']),
    ],
)  # fmt: skip
def test_csv(tmp_path, text, rows, words):
    png(tmp_path / 'images')
    file = put(tmp_path / 'labels.csv', text)
    assert find_format(tmp_path) == ('csv', file)
    if rows is None:
        with pytest.raises(ValueError) as e:
            read_data(tmp_path)
        report = e.value
    else:
        got, report, _ = read_one(tmp_path)
        assert got == rows
    for o in words:
        assert o in str(report), o


@pytest.mark.parametrize(
    'objects,rows',
    [
        (dict(bbox=[[1, 2, 3, 4]], categories=[7]), [('7', [1, 2, 4, 6])]),
        (dict(bbox=[[1, 2, 3, 4], [1, 2, 3]], category=['x', 'y']), [('x', [1, 2, 4, 6])]),
        ([dict(bbox=[1, 2, 3, 4], label='x')], [('x', [1, 2, 4, 6])]),
        (dict(bbox=[], categories=[]), []),
    ],
)
def test_jsonl(tmp_path, objects, rows):
    png(tmp_path)
    put(tmp_path / 'metadata.jsonl', json.dumps(dict(file_name='a.png', objects=objects)) + '\n{"file_name": \n')
    got, report, _ = read_one(tmp_path)
    assert got == rows and 'metadata.jsonl line 2' in str(report)


def test_createml_of_apple(tmp_path):
    png(tmp_path)
    box = dict(label='x', coordinates=dict(x=20, y=30, width=10, height=20))
    rows = [dict(imagefilename='a.png', annotation=[box, dict(label='x')]), dict(annotations=[])]
    put(tmp_path / 'train.json', rows)
    got, report, _ = read_one(tmp_path)
    assert got == [('x', [15, 20, 25, 40])] and "without 'coordinates'" in str(report)


def test_labelme_shapes(tmp_path):
    png(tmp_path)
    buffer = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1]], np.uint8) * 255).save(buffer, 'PNG')
    square = [[1, 1], [5, 1], [5, 5], [1, 5]]
    shapes = [
        dict(label='x', points=[[30, 40], [10, 20]], shape_type='rectangle'),
        dict(label='x', points=square, group_id=1),
        dict(label='x', points=(np.array(square) + 20).tolist(), group_id=1),
        dict(label='y', points=[[40, 30], [40, 40]], shape_type='circle'),
        dict(label='y', points=[[70, 50], [71, 51]], shape_type='mask', mask=b64encode(buffer.getvalue()).decode()),
        dict(label='_background_', points=square),
        dict(label='y', points=[[1, 1]], shape_type='point'),
        dict(label='y', points=[[1, 1], [2, 2]]),
        dict(points=square),
    ]
    data = dict(shapes=shapes, imagePath='..\\x\\a.png', imageHeight=60, imageWidth=80, imageData=None)
    put(tmp_path / 'a.json', data)
    got, report, r = read_one(tmp_path, masks=False)
    assert [o[0] for o in got] == ['x', 'x', 'y', 'y']
    assert got[0][1] == [10, 20, 30, 40] and got[1][1] == [1, 1, 25, 25] and got[3][1] == [70, 50, 72, 52]
    assert np.abs(np.array(got[2][1]) - [30, 20, 50, 40]).max() < 0.05
    assert 'kind point' in str(report) and 'three corners' in str(report) and "'label'" in str(report)
    data['shapes'] = shapes[1:5]
    put(tmp_path / 'a.json', data)
    masks = read_one(tmp_path, masks=True)[2].masks()
    assert masks.shape == (3, 60, 80) and masks[2].sum() == 3 and masks[0].sum() == 32
    assert abs(masks[1].sum() / (np.pi * 100) - 1) < 0.03


def test_labelme_names_and_broken_files(tmp_path):
    png(tmp_path)
    shape = dict(label='x', points=[[1, 1], [5, 1], [5, 5]])
    put(tmp_path / 'a.json', dict(shapes=[shape], imagePath='renamed.jpg'))  # found by its own name
    put(tmp_path / 'b.json', '{"shapes": [')
    put(tmp_path / 'c.json', dict(shapes=[shape], imagePath='c.jpg'))
    got, report, _ = read_one(tmp_path)
    assert got == [('x', [1, 1, 5, 5])]
    assert 'b.json' in str(report) and '1 without image file (c.jpg)' in str(report)


def test_via_shapes_and_attributes(tmp_path):
    png(tmp_path)
    rect = dict(name='rect', x=1, y=2, width=3, height=4)
    shapes = [
        (rect, dict(color='red', species='cat')),
        (dict(name='polygon', all_points_x=[1, 5, 5], all_points_y=[1, 1, 5]), dict(species={'cat': True})),
        (dict(name='circle', cx=40, cy=30, r=10), dict(species='cat')),
        (dict(name='ellipse', cx=40, cy=30, rx=20, ry=10, theta=np.pi / 2), dict(species='cat')),
        (dict(name='polyline', all_points_x=[1, 5], all_points_y=[1, 1]), dict(species='cat')),
        (rect, {}),
        (dict(name='rect', x=1), dict(species='cat')),
    ]
    regions = [dict(shape_attributes=s, region_attributes=a) for s, a in shapes]
    row = dict(filename='a.png', size=1, regions=regions, file_attributes={})
    project = dict(_via_settings={}, _via_img_metadata={'a.png1': row}, _via_attributes={})
    old = {'a.png1': row | dict(regions={str(k): r for k, r in enumerate(regions)})}
    for data in (project, old):
        put(tmp_path / 'via.json', data)
        got, report, _ = read_one(tmp_path)
        assert [o[0] for o in got] == ['cat'] * 4 and got[0][1] == [1, 2, 4, 6] and got[1][1] == [1, 1, 5, 5]
        assert np.abs(np.array(got[3][1]) - [30, 10, 50, 50]).max() < 0.05
        assert 'kind polyline' in str(report) and 'without a class' in str(report) and "without 'y'" in str(report)
    (tmp_path / 'via.json').unlink()
    with open(tmp_path / 'via.csv', 'w', newline='') as f:
        out = csv.writer(f)
        out.writerow(['filename', 'region_shape_attributes', 'region_attributes'])
        out.writerow(['a.png', json.dumps(rect), '{"kind": "cat"}'])
        out.writerow(['a.png', '{broken', '{}'])
    got, report, _ = read_one(tmp_path)
    assert got == [('cat', [1, 2, 4, 6])] and 'unreadable, row 3' in str(report)


def test_cvat_shapes(tmp_path):
    png(tmp_path / 'images')
    objects = """<box label="y" xtl="10" ytl="20" xbr="30" ybr="40" occluded="0"/>
        <box label="y" xtl="10" ytl="20" xbr="30" ybr="30" rotation="90"/>
        <polygon label="x" points="1,1;5,1;5,5"/><ellipse label="x" cx="40" cy="30" rx="10" ry="5"/>
        <mask label="x" left="70" top="50" width="3" height="2" rle="1, 4, 1"/>
        <mask label="x" left="70" top="50" width="3" height="2" rle="1, 4"/>
        <points label="x" points="1,1"/><box label="x" xtl="1"/><tag label="z"/>"""
    labels = '<label><name>y</name></label><label><name>x</name></label>'
    image = f'<image id="0" name="sub/a.png" width="80" height="60">{objects}</image>'
    text = f'<annotations><meta><task><labels>{labels}</labels></task></meta>{image}</annotations>'
    put(tmp_path / 'annotations.xml', text.replace('<tag label="z"/>', ''))
    got, report, r = read_one(tmp_path)
    assert [o[0] for o in got] == ['y', 'y', 'x', 'x', 'x'] and r.labels.tolist() == [1, 1, 2, 2, 2]
    assert got[1][1] == [15, 15, 25, 35] and got[2][1] == [1, 1, 5, 5] and got[4][1] == [70, 50, 73, 52]
    assert 'kind points' in str(report) and 'run lengths of 5 pixels' in str(report)
    put(tmp_path / 'annotations.xml', '<annotations><track id="0"/></annotations>')
    with pytest.raises(ValueError, match='CVAT for images'):
        read_data(tmp_path)
    put(tmp_path / 'annotations.xml', '<annotations><image>')
    with pytest.raises(ValueError, match='cannot be read as XML'):
        read_data(tmp_path)


def test_label_studio(tmp_path):
    png(tmp_path / 'images', 'my a.png')
    size = dict(original_width=80, original_height=60)
    rect = dict(x=25, y=50, width=25, height=25, rotation=0, rectanglelabels=['x'])
    poly = dict(points=[[10, 10], [20, 10], [20, 20]], polygonlabels=['y'])
    brush = dict(format='rle', rle=[1], brushlabels=['y'])
    result = [dict(type=k, value=v) | size for k, v in
              zip(('rectanglelabels', 'polygonlabels', 'brushlabels'), (rect, poly, brush))]  # fmt: skip
    done = dict(result=[*result, dict(type='choices', value={})])
    task = dict(
        id=5, data=dict(image='/data/upload/1/0123abcd-my%20a.png'), annotations=[dict(was_cancelled=True), done]
    )
    put(tmp_path / 'p.json', [task, dict(id=6, data=dict(image='b.png'), annotations=[])])
    got, report, _ = read_one(tmp_path)
    assert got == [('x', [20, 30, 40, 45]), ('y', [8, 6, 16, 12])] and 'a brush mask that ends early' in str(report)
    local = task | dict(data=dict(image='/data/local-files/?d=images/my a.png'), annotations=[done, done])
    put(tmp_path / 'p.json', [local])
    assert 'of which the first counts' in str(read_one(tmp_path)[1])
    put(tmp_path / 'p.json', [dict(id=1, image='my a.png', label=[rect | size])])  # JSON-MIN
    assert read_one(tmp_path)[0] == [('x', [20, 30, 40, 45])]
    put(tmp_path / 'p.json', [dict(id=1, data=dict(text='a'), annotations=[done])])
    with pytest.raises(ValueError, match='without an image'):
        read_data(tmp_path)


def test_instance_pngs(tmp_path):
    for o in 'abc':
        png(tmp_path / 'PNGImages', f'{o}.png')
    a = np.zeros((60, 80), np.uint16)
    a[5:10, 5:20], a[30:40, 30:35] = 3, 700
    (tmp_path / 'PedMasks').mkdir()
    Image.fromarray(a).save(tmp_path / 'PedMasks' / 'a_mask.png')
    Image.new('RGB', (80, 60)).save(tmp_path / 'PedMasks' / 'b_mask.png')
    parts, classes, report = read_data(tmp_path, masks=True)
    r = by_name(parts['all'])['a']
    assert r.boxes.tolist() == [[5, 5, 20, 10], [30, 30, 35, 40]] and r.masks().sum() == 125
    assert classes.names[1:] == ['Ped']
    assert 'b_mask.png' in str(report) and '3 channels' in str(report)
    assert 'c.png' in str(report) and 'no mask' in str(report)
    Image.fromarray(a[:50]).save(tmp_path / 'PedMasks' / 'a_mask.png')
    assert 'annotated at another size' in str(read_data(tmp_path)[2])


def test_what_writers_refuse(tmp_path, boxed, masked):
    with pytest.raises(ValueError, match='no masks'):
        write_data(boxed, cm, tmp_path / 'a', 'instances')
    m = np.ones((2, 61, 83), np.uint8)
    both = replace(masked[0], boxes=[[0, 0, 83, 61]] * 2, labels=[1, 1], masks=m, iscrowd=None)
    with pytest.raises(ValueError, match='overlap'):
        write_data([both], cm, tmp_path / 'b', 'instances')
    crowd = replace(boxed[0], iscrowd=[1])
    for name in set(written) - {'coco', 'voc', 'instances'}:
        with pytest.raises(ValueError, match='crowd'):
            write_data([crowd], cm, tmp_path / name, name)
    for name in ('coco', 'voc'):
        write_data([crowd], cm, tmp_path / name, name)
        assert read_data(tmp_path / name)[0]['all'][0].iscrowd.tolist() == [1]
    with pytest.raises(ValueError, match="Did you mean 'yolo'"):
        write_data(boxed, cm, tmp_path / 'c', 'yolov8')
    with pytest.raises(ValueError, match='is read-only'):
        write_data(boxed, cm, tmp_path / 'c', 'pets')


def test_same_names_in_two_folders(tmp_path):
    rs = [draw(tmp_path / o, 'a', boxes=((1, 1, 9, 5 + k),)) for k, o in enumerate('xy')]
    write_data(rs, cm, tmp_path / 'out', 'yolo')
    again = read_data(tmp_path / 'out')[0]['train']
    assert [r.boxes[0, 3] for r in again] == [5, 6] and len({r.path for r in again}) == 2


# --- the table


def test_unknown_things(tmp_path, capsys):
    put(tmp_path / 'd' / 'data.zip', '')
    for path in (tmp_path / 'd', tmp_path / 'd' / 'data.zip'):
        with pytest.raises(ValueError, match='unpack it'):
            find_format(path)
    with pytest.raises(ValueError, match='not a known annotation file'):
        find_format(put(tmp_path / 'a.docx', ''))
    with pytest.raises(FileNotFoundError, match='there is no'):
        find_format(tmp_path / 'none')
    put(tmp_path / 't' / 'train' / 'a.txt', '')
    with pytest.raises(ValueError, match='not look like a data set'):
        find_format(tmp_path / 't')
    assert main(['check', str(tmp_path / 'd')]) == 1 and 'unpack it' in capsys.readouterr().err


def test_table_is_a_registry(tmp_path):
    own = Formats()
    own.add(_Format('x', 'x.x', lambda p: [p], lambda p, i, k: Sheet(p)))
    assert len(own) == 1 and own['x'].parts('any') == {} and 'x.x' in str(own.table())
    own.clear()
    with pytest.raises(ValueError, match="got format='x'"):
        own['x']
    with pytest.raises(ValueError, match='no image'):
        sheet_records(Sheet(tmp_path))


def test_check_by_the_command(tmp_path, boxed, capsys):
    file = write_data(dict(train=boxed[:2], valid=boxed[2:]), cm, tmp_path / 'out', 'yolo')
    assert main(['check', str(file)]) == 0
    out = capsys.readouterr().out
    assert 'yolo data' in out and '4 images, all readable; 4 boxes' in out
    assert main(['check', str(file), '--format', 'voc']) == 1


# --- VIA 3, and brushes of Label Studio


def via3(shapes, kind=2, options=None):
    options = {'0': 'cat', '1': 'dog'} if options is None else options
    return dict(
        project=dict(pid='x', data_format_version='3.1.1', vid_list=['1', '2']),
        config={},
        attribute={'1': dict(aname='Class', anchor_id='FILE1_Z0_XY1', type=3, options=options)},
        file={
            '1': dict(fid=1, fname='a.png', type=kind, loc=1, src=''),
            '2': dict(fid='2', fname='http://x.org/b.png'),
        },
        view={'1': dict(fid_list=['1']), '2': dict(fid_list=[2])},
        metadata={f'1_{i}': dict(vid='1', flg=0, z=[], xy=xy, av={'1': a}) for i, (xy, a) in enumerate(shapes)},
    )


def test_via_3(tmp_path):
    png(tmp_path)
    png(tmp_path, 'b.png')
    data = via3(
        [
            ([2, 10, 20, 30, 15.5], '1'),
            ([3, 40, 30, 10], '0'),
            ([4, 40, 30, 20, 10], '0'),
            ([7, 1, 1, 5, 1, 5, 5], '0,1'),
            ([8, 10, 25, 20, 12, 30, 28, 22, 40], '1'),
            ([1, 5, 5], '0'),
            ([9, 1, 1, 2, 2, 3, 1], '0'),
            ([], '0'),  # about the whole image
        ]
    )
    data['metadata']['v'] = dict(vid='1', z=[1.5], xy=[2, 1, 2, 3, 4], av={'1': '0'})
    f = put(tmp_path / 'project.json', data)
    assert find_format(tmp_path) == ('via', f)
    parts, classes, report = read_data(tmp_path, masks=False)
    a, b = sorted(parts['all'], key=lambda r: r.path.name)
    rows = sorted((classes.get_name(l), [round(v) for v in o]) for l, o in zip(a.labels, a.boxes.tolist()))
    assert rows == [
        ('cat', [1, 1, 5, 5]),
        ('cat', [20, 20, 60, 40]),
        ('cat', [30, 20, 50, 40]),
        ('dog', [10, 12, 30, 40]),
        ('dog', [10, 20, 40, 36]),
    ]
    assert len(b.labels) == 0 and all(o in str(report) for o in ('number 1', 'number 9', 'frame of a video'))
    put(f, via3([([2, 1, 2, 10, 20], 'bird')], options={}))  # a text
    assert read_data(tmp_path)[1].names[1:] == ['bird']
    put(f, data | dict(view={'1': {}}))
    with pytest.raises(ValueError, match='project.json is no project of VIA 3 that can be read') as e:
        read_data(tmp_path)
    assert '\n' not in str(e.value)


# made by `encode_rle` of label-studio-sdk 2.1.2 from 7x9 pixels of red, green, blue and alpha
stroke = [
    0, 0, 0, 252, 57, 27, 254, 43, 0, 3, 254, 16, 8, 127, 225, 0, 135, 254, 16, 8, 127, 225, 0, 135,
    254, 16, 8, 127, 225, 0, 3, 254, 216, 0, 31, 240, 128, 1, 255, 24, 0, 31, 240, 128, 67, 255, 8, 0,
    31, 224, 3, 128, 18, 0, 88, 25, 0, 127, 194, 0, 7, 253, 176, 0, 63, 225, 0, 135, 254, 16, 8, 127,
    225, 0, 135, 254, 16, 8, 127, 225, 0, 135, 254, 16, 0, 63, 237, 128, 1, 255, 8, 4, 63, 240, 128, 67,
    255, 8, 4, 63, 240, 128, 67, 255, 8, 4, 63, 240, 128, 1, 255, 132, 192, 0, 130, 132, 0, 8, 44, 94,
    0, 3, 36, 32, 0, 50, 0,
]  # fmt: skip
alpha = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 255, 255, 255, 255, 255, 255, 0],
        [0, 0, 255, 0, 255, 255, 200, 255, 0],
        [0, 0, 255, 255, 255, 255, 255, 255, 0],
        [0, 0, 255, 255, 255, 255, 255, 255, 0],
        [0, 0, 0, 0, 130, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 100],
    ]
)


@pytest.mark.parametrize('minimal', [False, True])
def test_brushes_of_label_studio(tmp_path, minimal):
    png(tmp_path, size=(7, 9))
    region = dict(format='rle', rle=stroke, brushlabels=['leaf'])
    size = dict(original_width=9, original_height=7)
    broken = region | dict(rle=stroke[:60]), region | dict(rle=[0, 0, 0, 4, 57, 27, 254, 16, 0])
    if minimal:
        task = dict(id=1, image='/data/upload/1/0a1b2c3d-a.png', tag=[o | size for o in (region, *broken)])
    else:
        rows = [dict(type='brushlabels', value=o) | size for o in (region, *broken)]
        task = dict(id=1, data=dict(image='/data/upload/1/0a1b2c3d-a.png'), annotations=[dict(result=rows)])
    put(tmp_path / 'tasks.json', [task])
    (r,), classes, report = (lambda p, c, t: (p['all'], c, t))(*read_data(tmp_path, masks=True))
    assert np.array_equal(r.target()['masks'][0].numpy(), alpha >= 128) and classes.names[1:] == ['leaf']
    assert r.boxes.tolist() == [[2, 1, 8, 6]] and 'ends early' in str(report) and 'pixels, expected 63' in str(report)
    values = brush_values(stroke).reshape(7, 9, 4)
    assert np.array_equal(values[..., 3], alpha) and values[2, 6].tolist() == [7, 9, 11, 200]
    assert check_data(tmp_path).counts['broken entry'] == 2
