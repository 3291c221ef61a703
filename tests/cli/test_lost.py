"What a user sees of data that would be lost, from the command line."

import io
import json
import locale
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from backbones_nb.cli.cli import main
from backbones_nb.learners.finetune import _find_images
from backbones_nb.learners.run import RunConfig, open_data

tiny = '--backbone vovnet19_slim_dw --size 64 --epochs 1 --bs 2 --cpu-preset --no-validate --no-augment'


def picture(path, seed=0, size=(60, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def coco(tmp_path):
    "Six images with a box each, as a COCO file; a function that writes it with changes."

    def write(change=None, name='ann.json', n=6):
        images, anns = [], []
        for i in range(1, n + 1):
            f = tmp_path / 'images' / f'{i}.jpg'
            if not f.exists():
                picture(f, i)
            images.append(dict(id=i, file_name=f.name, height=60, width=80))
            anns.append(dict(id=i, image_id=i, category_id=1, bbox=[10, 10, 30, 30], area=900, iscrowd=0))
        d = dict(images=images, annotations=anns, categories=[dict(id=1, name='cat')])
        if change:
            change(d)
        (tmp_path / name).write_text(json.dumps(d), encoding='utf-8')
        return tmp_path / name

    write.root = tmp_path
    return write


def finetune(data, out, more=''):
    return main(['finetune', '--data', str(data), '--out', str(out), *tiny.split(), *more.split()])


def relative(d):
    for a in d['annotations']:
        a['bbox'] = [0.1, 0.1, 0.3, 0.3]


def no_masks(d):
    d['annotations'].pop()
    for a in d['annotations']:
        a['segmentation'] = []


def no_objects(d):
    d['annotations'] = []


@pytest.mark.parametrize(
    'change,more,words',
    [
        (relative, '', 'look relative to the image (0 to 1)'),
        (no_masks, '--detector mask_rcnn', 'has a mask: train a detector without masks'),
        (no_objects, '', 'images to train on without a single object'),
        (None, '--valid-pct 0.01', 'valid_pct=0.01 of 6 images leaves none to validate on'),
        (None, '--bs 0', 'got bs=0, expected at least 1'),
        (None, '--workers -1', 'got workers=-1, expected at least 0'),
        (None, '--epochs 0', 'got epochs=0, expected at least 1'),
    ],
)
def test_refused_before_training_in_one_sentence(coco, change, more, words, capsys):
    f = coco(change)
    assert finetune(f, coco.root / 'run', more) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ') and words in err and err.count('\n') == 1 and not (coco.root / 'run').exists()


def test_a_single_image(coco, capsys):
    assert finetune(coco(n=1), coco.root / 'run') == 1
    assert 'of 1 images leaves none to validate on: pass more images' in capsys.readouterr().err


def test_an_image_that_was_cut_off(coco, capsys):
    f = coco()
    bad = coco.root / 'images' / '3.jpg'
    bad.write_bytes(bad.read_bytes()[:-1000])
    assert main(['check', str(f)]) == 1 and 'unreadable image' in capsys.readouterr().out
    for workers in ('', '--workers 2'):
        assert finetune(f, coco.root / 'run', workers) == 1
        err = capsys.readouterr().err
        assert '1 of ' in err and '3.jpg' in err and "broken='skip'" in err and 'Traceback' not in err
    for how, words in (
        ('skip', '1 with an image that cannot be fully decoded (3.jpg)'),
        ('read', '1 cut off, read as far as it goes (3.jpg)'),
    ):
        assert finetune(f, coco.root / how, f'--broken {how}') == 0
        assert words in capsys.readouterr().out


def test_small_objects_are_named_before_training(coco, capsys):
    def small(d):
        for i in range(1, 7):
            d['annotations'].append(dict(id=10 + i, image_id=i, category_id=2, bbox=[50, 50, 1.1, 1.1]))
        d['categories'].append(dict(id=2, name='fly'))

    f = coco(small)
    assert finetune(f, coco.root / 'run') == 0
    out = capsys.readouterr().out
    assert 'warning: 6 of 12 objects (6 of 6 fly) are smaller than a pixel at size 64, in ' in out
    assert 'size 96 keeps all' in out and out.index('warning') < out.index('AP')
    res = json.loads((coco.root / 'run' / 'metrics.json').read_text(encoding='utf-8'))
    assert res['metrics']['per_class']['fly'] >= 0  # there to be found: not -1
    assert main(['check', str(f), '--size', '64']) == 0 and 'vanishing object' in capsys.readouterr().out


def test_equal_images_on_both_sides(coco, capsys):
    f = coco()
    for a, b in ((1, 2), (3, 4), (5, 6)):
        (coco.root / 'images' / f'{b}.jpg').write_bytes((coco.root / 'images' / f'{a}.jpg').read_bytes())
    for seed in range(4):
        train, valid, *_ = open_data(f, valid_pct=0.34, seed=seed)
        assert {(int(r.image_id) + 1) // 2 for r in train}.isdisjoint({(int(r.image_id) + 1) // 2 for r in valid})
    other = coco(name='valid.json')
    assert finetune(f, coco.root / 'run', f'--valid {other}') == 0
    assert (
        '6 used for validation, though the same file is trained on (1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg, ...)'
        in capsys.readouterr().out
    )


def voc(root, lists, n=6):
    for i in range(n):
        picture(root / 'JPEGImages' / f'{i}.png', i)
        x = root / 'Annotations' / f'{i}.xml'
        x.parent.mkdir(exist_ok=True)
        x.write_text(
            '<annotation><object><name>cat</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>30</xmax>'
            '<ymax>30</ymax></bndbox></object></annotation>'
        )
    for k, v in lists.items():
        f = root / 'ImageSets' / 'Main' / f'{k}.txt'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('\n'.join(map(str, v)))
    return root


@pytest.mark.parametrize(
    'lists,want,note',
    [
        (dict(train=[0, 1], val=[2], test=[3]), ([0, 1], [2]), ''),
        (dict(train=[0, 1], valid=[2], test=[3]), ([0, 1], [2]), 'valid.txt'),
        (dict(train=[0, 1], test=[3]), ([0, 1], [3]), 'test.txt'),
        (dict(trainval=[0, 1], test=[3, 4]), ([0, 1], [3, 4]), 'test.txt'),
        (dict(train=[0, 1, 2]), 3, ''),
        (dict(test=[0]), 6, ''),
        ({}, 6, ''),
    ],
)
def test_lists_of_voc(tmp_path, lists, want, note):
    train, valid, _, report = open_data(voc(tmp_path, lists), valid_pct=0.4)
    got = [[int(r.image_id) for r in o] for o in (train, valid)]
    assert got == list(want) if isinstance(want, tuple) else len(sum(got, [])) == want
    assert (f'used for validation, since there is no val.txt ({note})' in str(report)) == bool(note)


# --- predict


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('trained')
    voc(root / 'data', {})
    assert finetune(root / 'data', root / 'run') == 0
    return root / 'run'


def test_the_others_are_done(run, tmp_path, capsys, monkeypatch):
    a, b = (picture(tmp_path / f'{o}.jpg', ord(o)) for o in 'ab')
    (tmp_path / 'broken.jpg').write_bytes(b'x')
    picture(tmp_path / 'big.png', size=(300, 300))
    monkeypatch.setenv('BACKBONES_NB_MAX_PIXELS', '20000')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    names = [str(tmp_path / o) for o in ('a.jpg', 'broken.jpg', 'big.png', 'gone.jpg', 'b.jpg')]
    assert main(['predict', str(run), *names, '--json', str(tmp_path / 'f.json'), '--score-thr', '0']) == 1
    assert list(json.loads((tmp_path / 'f.json').read_text(encoding='utf-8'))) == [str(a), str(b)]
    err = capsys.readouterr().err
    assert all(o in err for o in ('broken.jpg cannot be read', 'big.png has more pixels', 'no image', 'gone.jpg'))


def test_one_picture_for_each_image(run, tmp_path):
    for o in ('a/same.jpg', 'b/same.jpg', 'b/same.png', 'other.jpg'):
        picture(tmp_path / o, len(o))
    out = tmp_path / 'out'
    names = [str(tmp_path / o) for o in ('a', 'b', 'other.jpg', 'other.jpg')]
    assert main(['predict', str(run), *names, '--out', str(out)]) == 0
    assert sorted(o.name for o in out.iterdir()) == ['a_same.jpg.png', 'b_same.jpg.png', 'b_same.png.png', 'other.png']


def test_folders_and_patterns(tmp_path):
    for o in ('x/2.jpg', 'x/10.jpg', 'x/y/3.png', 'x/[1].jpg'):
        picture(tmp_path / o)
    (tmp_path / 'none').mkdir()
    look = lambda *names: [o.relative_to(tmp_path).as_posix() for o in _find_images([tmp_path / n for n in names])[0]]
    assert look('x') == ['x/2.jpg', 'x/10.jpg', 'x/[1].jpg'] or sorted(look('x')) == [
        'x/10.jpg',
        'x/2.jpg',
        'x/[1].jpg',
    ]
    assert look('x/[0-9]*.jpg') == ['x/2.jpg', 'x/10.jpg'] and look('x/**/*.png') == ['x/y/3.png']
    assert look('x/[1].jpg') == ['x/[1].jpg'] and look('gone.jpg') == ['gone.jpg']
    assert _find_images([tmp_path / 'none', tmp_path / '*.gif'])[1] == [
        f'{tmp_path}/none contains no image: check the path',
        f'{tmp_path}/*.gif contains no image: check the path',
    ]


# --- encodings


@pytest.fixture
def cyrillic(tmp_path):
    "Data whose every name is in letters that ASCII lacks."
    root = voc(tmp_path / 'данные', {}, 0)
    for i in range(6):
        picture(root / 'JPEGImages' / f'фото {i}.png', i)
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / 'Annotations' / f'фото {i}.xml').write_text(
            '<annotation><object><name>кот</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>30</xmax>'
            '<ymax>30</ymax></bndbox></object></annotation>',
            encoding='utf-8',
        )
    return root


def assert_whole(folder):
    assert 'фото' in (folder / 'run' / 'train.txt').read_text(encoding='utf-8')
    assert json.loads((folder / 'f.json').read_text(encoding='utf-8'))


def test_names_that_the_terminal_cannot_show(cyrillic, tmp_path, monkeypatch):
    "Nor can a file that is opened without an encoding hold them, unless Python is in its UTF-8 mode."
    monkeypatch.chdir(tmp_path)
    streams = {o: io.TextIOWrapper(io.BytesIO(), encoding='ascii') for o in ('stdout', 'stderr')}
    for k, v in streams.items():
        monkeypatch.setattr(sys, k, v)
    root, before = str(cyrillic), locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, 'C')
    try:
        if not sys.flags.utf8_mode:
            with pytest.raises(UnicodeEncodeError):
                (tmp_path / 'probe').write_text('фото')
        assert finetune(root, 'run') == 0
        assert main(['check', root, '--all']) == 0
        assert main(['predict', 'run', f'{root}/JPEGImages', '--json', 'f.json', '--score-thr', '0']) == 0
    finally:
        locale.setlocale(locale.LC_ALL, before)
    streams['stdout'].flush()
    assert b'\\u0444' in streams['stdout'].buffer.getvalue()
    assert_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_terminal_that_cannot_show_the_names(cyrillic, tmp_path, encoding):
    root = cyrillic
    env = os.environ | dict(PYTHONIOENCODING=encoding, PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LC_ALL='C')
    code = f"""
import sys
from backbones_nb.cli.cli import main
root = sys.argv[1]
assert main(['finetune', '--data', root, '--out', 'run', *{tiny.split()!r}]) == 0
assert main(['check', root, '--all']) == 0
assert main(['predict', 'run', root + '/JPEGImages', '--json', 'f.json', '--score-thr', '0']) == 0
"""
    (tmp_path / 'run.py').write_text(code, encoding='utf-8')
    p = subprocess.run(
        [sys.executable, 'run.py', str(root)], env=env, cwd=tmp_path, capture_output=True, text=True, encoding=encoding
    )
    assert p.returncode == 0, p.stderr
    assert_whole(tmp_path)


def test_options_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match='got size=8, expected at least 32'):
        RunConfig(size=8)
