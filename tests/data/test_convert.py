"From any format to any other, and what is lost between them."

import json

import numpy as np
import pytest
from PIL import Image

from backbones_nb.cli.cli import main
from backbones_nb.data.check import check_data
from backbones_nb.data.convert import convert, read_all
from backbones_nb.data.formats import find_format, find_splits, formats, read_data, write_data
from backbones_nb.data.records import ClassMap, Record
from backbones_nb.data.voc import read_instances
from backbones_nb.learners.run import open_data

cm = ClassMap(['zebra', 'apple pie'])
written = [o.name for o in formats if o.write]


def draw(folder, name, labels=(1, 2), masks=True, crowd=(), shift=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, name)))
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / f'{name}.png')
    m, boxes = np.zeros((len(labels), 40, 60), np.uint8), []
    for k in range(len(labels)):
        x = 2 + k * (20 - shift)
        m[k, 5:30, x : x + 15] = 1
        m[k, 5:10, x : x + 4] = 0
        boxes.append([x, 5, x + 15, 30])
    iscrowd = [int(k in crowd) for k in range(len(labels))]
    return Record(name, folder / f'{name}.png', (40, 60), boxes, labels, m if masks else None, iscrowd)


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / 'in'
    return dict(
        train=[draw(folder, 'a'), draw(folder, 'b', (2,)), draw(folder, 'e', ())], valid=[draw(folder, 'c', (1, 1))]
    )


def contents(path, masks=False):
    got, classes, report = read_data(path, masks=masks)
    rows = {}
    for k, rs in got.items():
        for r in rs:
            shapes = r.target()['masks'].flatten(1).sum(1).tolist() if masks else [0] * len(r.labels)
            names = [classes.get_name(o) for o in r.labels.tolist()]
            rows[k, r.path.stem] = sorted(zip(names, np.round(r.boxes, 2).tolist(), shapes))
    return rows


@pytest.mark.parametrize('target', written)
@pytest.mark.parametrize('source', ['coco', 'yolo', 'voc'])
def test_objects_and_masks_arrive(tmp_path, parts, source, target):
    write_data(parts, cm, tmp_path / 'src', source)
    path, got, lost = convert(tmp_path / 'src', tmp_path / 'out', target)
    assert find_format(tmp_path / 'out')[0] == target and set(find_splits(tmp_path / 'out')) == {'train', 'valid'}
    assert contents(tmp_path / 'out') == contents(tmp_path / 'src')
    masks = formats[target].masks
    assert contents(tmp_path / 'out', masks) == contents(tmp_path / 'src', masks)
    assert ('boxes alone' in str(lost)) == (not masks) and check_data(tmp_path / 'out').ok


@pytest.mark.parametrize('target', written)
def test_crowds_are_kept_or_named(tmp_path, parts, target):
    parts['train'].append(draw(tmp_path / 'in', 'd', (1, 2), crowd=(1,)))
    write_data(parts, cm, tmp_path / 'src', 'coco')
    _, _, lost = convert(tmp_path / 'src', tmp_path / 'out', target)
    n = len(contents(tmp_path / 'out')['train', 'd'])
    kept = target in ('coco', 'voc')
    assert n == 1 + kept and ('d.png' in str(lost) and f'{target} cannot mark it' in str(lost)) == (not kept)
    if kept:
        (r,) = [o for o in read_data(tmp_path / 'out')[0]['train'] if o.path.stem == 'd']
        assert sorted(r.iscrowd.tolist()) == [0, 1]


def test_an_image_with_an_object_without_a_mask_is_not_lost(tmp_path, parts):
    write_data(parts, cm, tmp_path / 'src', 'coco')
    f = tmp_path / 'src' / 'train' / '_annotations.coco.json'
    data = json.loads(f.read_text())
    data['annotations'][0]['segmentation'] = []
    f.write_text(json.dumps(data))
    convert(tmp_path / 'src', tmp_path / 'out', 'labelme')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'src')
    got = {r.path.stem: r.masks is None for rs in read_all(tmp_path / 'src')[0].values() for r in rs}
    assert got == dict(a=True, b=False, c=False, e=False)


def test_pixels_of_voc(tmp_path, parts):
    write_data(parts['train'], cm, tmp_path, 'voc')
    numbers, classes = (read_instances(tmp_path / f'Segmentation{o}' / 'a.png') for o in ('Object', 'Class'))
    m = parts['train'][0].masks
    assert np.array_equal(numbers, m[0] + 2 * m[1]) and np.array_equal(classes, numbers)
    assert np.array_equal(read_instances(tmp_path / 'SegmentationClass' / 'b.png'), 2 * parts['train'][1].masks[0])
    im = Image.open(tmp_path / 'SegmentationObject' / 'a.png')
    assert im.mode == 'P' and im.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # VOC's colors


def test_masks_that_overlap_are_named(tmp_path, parts):
    parts['train'].append(draw(tmp_path / 'in', 'o', shift=10))
    write_data(parts, cm, tmp_path / 'src', 'coco')
    _, _, lost = convert(tmp_path / 'src', tmp_path / 'out', 'voc')
    assert '1 with masks that overlap, which voc cannot hold (o.png)' in str(lost)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'src')
    assert ('train', 'o') not in contents(tmp_path / 'out', masks=True)


def test_the_command(tmp_path, parts, capsys):
    write_data(parts, cm, tmp_path / 'src', 'coco')
    assert main(['convert', str(tmp_path / 'src'), str(tmp_path / 'out'), '--to', 'csv']) == 0
    out = capsys.readouterr().out
    assert 'train: 3 images, 3 objects\nvalid: 1 images, 2 objects\nwritten as csv to' in out and 'boxes alone' in out
    for line, words in (
        ('out2 --to pets', 'cannot be written'),
        ('out2 --to yolov8', "Did you mean 'yolo'"),
        ('out --to yolo', 'which is in use: give a new one'),
    ):
        out, *more = line.split()
        assert main(['convert', str(tmp_path / 'src'), str(tmp_path / out), *more]) == 1
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1 and not (tmp_path / 'out2').exists()
    assert main(['convert', str(tmp_path / 'gone'), str(tmp_path / 'out2')]) == 1


# --- COCO's own layout, and whose notes are shown


@pytest.mark.parametrize(
    'names', [('instances_train2017', 'instances_val2017'), ('train', 'valid'), ('my_train', 'my_test')]
)
@pytest.mark.parametrize('folder', ['.', 'annotations'])
def test_files_of_splits_in_one_folder(tmp_path, parts, names, folder):
    root = tmp_path / 'set'
    for name, rs in zip(names, parts.values()):
        write_data(rs, cm, root / name.split('_')[-1], 'coco')
        at = root / folder / f'{name}.json'
        at.parent.mkdir(exist_ok=True)
        (root / name.split('_')[-1] / '_annotations.coco.json').rename(at)
    if 'instances' in names[0]:
        (root / folder / 'captions_val2017.json').write_text('{"images": [], "annotations": []}')
        keypoints = (root / folder / f'{names[0]}.json').read_text()
        for o in ('train', 'val'):
            (root / folder / f'person_keypoints_{o}2017.json').write_text(keypoints)
    assert find_format(root) == ('coco', root)
    train, valid, classes, _ = open_data(root)
    assert [sorted(r.path.stem for r in o) for o in (train, valid)] == [['a', 'b', 'e'], ['c']]
    report = check_data(root)
    assert report.ok and report.images == 4


def test_other_files_side_by_side_are_still_a_question(tmp_path, parts):
    for o in ('one', 'two_train'):
        write_data(parts['train'], cm, tmp_path, 'coco')
        (tmp_path / '_annotations.coco.json').rename(tmp_path / f'{o}.json')
    with pytest.raises(ValueError, match='has 2 json files .*: give one of them'):
        find_format(tmp_path)


def test_no_word_about_a_split_that_is_not_used(tmp_path, parts):
    both = dict(train=parts['train'], valid=parts['train'][:1])
    write_data(both, cm, tmp_path / 'src', 'coco')
    write_data(parts['valid'], cm, tmp_path / 'other', 'coco')
    same = tmp_path / 'src' / 'valid' / 'a.png'
    same.unlink()
    same.symlink_to(tmp_path / 'src' / 'train' / 'a.png')
    assert 'in train and valid' in str(open_data(tmp_path / 'src')[3])
    train, valid, _, report = open_data(tmp_path / 'src', valid=tmp_path / 'other')
    assert len(train) == 3 and [r.path.stem for r in valid] == ['c'] and 'valid' not in str(report)
    held = open_data(tmp_path / 'other', valid=tmp_path / 'src')
    assert [r.path.stem for r in held[1]] == ['a'] and 'in train and valid' not in str(held[3])


def test_a_split_without_images_leaves_no_folder(tmp_path):
    from backbones_nb.data.toy import toy_pets

    pets = toy_pets(tmp_path / 'pets', n=4, side=48, seed=0)
    _, parts, _ = convert(pets, tmp_path / 'out', 'voc')
    assert (
        sorted(o.name for o in (tmp_path / 'out').iterdir()) == [*parts]
        and len(read_data(tmp_path / 'out')[0]['train']) == 4
    )
