"`backbones-nb evaluate`: a run measured again, on its own images and on others."

import json
from dataclasses import replace

import pytest
from common import as_found, same_for_any_batch, write_drawn

from backbones_nb.cli.cli import main
from backbones_nb.data.formats import read_data, write_data
from backbones_nb.data.records import ClassMap
from backbones_nb.learners.finetune import load_run
from backbones_nb.learners.metrics import coco_keys

tiny = '--backbone vovnet19_slim_dw --size 64 --epochs 2 --bs 4 --cpu-preset --no-validate --no-augment --zoom 1 1'
keys = 'AP', 'AP50', 'APs', 'APm', 'AR100'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A run on drawn images, with a part to measure on."
    root = tmp_path_factory.mktemp('run')
    write_drawn(root, train=12, valid=4, test=2)
    line = ['finetune', '--report', '--data', str(root / 'data'), '--out', str(root / 'run'), '--lr', '5e-3']
    assert main([*line, *tiny.split(), '--set', 'score_thresh=0.0', '--detector', 'retinanet']) == 0
    return root


def measured(root, *args):
    "What the command writes."
    f = root / 'out.json'
    f.unlink(missing_ok=True)
    assert main(['evaluate', str(root / 'run'), *map(str, args), '--json', str(f)]) == 0
    return json.loads(f.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def own(root):
    "What it says of the run's own images."
    return measured(root)


def test_the_numbers_of_the_run_come_again(root, capsys):
    want = json.loads((root / 'run' / 'metrics.json').read_text(encoding='utf-8'))['metrics']
    assert main(['evaluate', str(root / 'run')]) == 0
    got = json.loads((root / 'run' / 'evaluation.json').read_text(encoding='utf-8'))
    assert want['AR100'] > 0 and got['images'] == 4 and got['per_class'] == pytest.approx(want.pop('per_class'))
    numbers = got['class_numbers']
    assert numbers.keys() == want['class_numbers'].keys() == {'red', 'blue'}
    assert all(numbers[k] == pytest.approx(v, abs=1e-6) for k, v in want.pop('class_numbers').items())
    assert {k: got[k] for k in want} == pytest.approx(want, abs=1e-6)
    out = capsys.readouterr().out
    assert 'AR100' in out and 'class  images  objects     AP   AP50' in out and 'red ' in out and 'warning' not in out
    assert measured(root, root / 'data')['AP'] == got['AP']  # its part to measure on


def test_the_numbers_do_not_depend_on_the_batch(root, tmp_path):
    with same_for_any_batch():
        valid = as_found(load_run(root / 'run'), 6, tmp_path)
        write_data(valid, ClassMap(['red', 'blue']), tmp_path / 'data', 'coco')
        want = measured(root, tmp_path / 'data', '--bs', 1)
        assert 0.05 < want['AP'] < 0.95
        for args in (('--bs', 3, '--workers', 1), ('--bs', 8)):
            got = measured(root, tmp_path / 'data', *args)
            assert {k: got[k] for k in coco_keys} == pytest.approx({k: want[k] for k in coco_keys}, abs=1e-6)
            assert got['per_class'] == pytest.approx(want['per_class'], abs=1e-6)


@pytest.mark.parametrize('name', ['yolo', 'csv', 'labelme'])
def test_other_data_of_any_format(root, own, tmp_path, name, capsys):
    parts, classes, _ = read_data(root / 'data')
    turned = ClassMap(['blue', 'red'])
    valid = [replace(r, labels=3 - r.labels, class_map=None) for r in parts['valid']]
    write_data(valid, turned, tmp_path / 'other', name)
    want, got = own, measured(root, tmp_path / 'other', *['--workers', 1] * (name == 'yolo'))
    assert {k: got[k] for k in keys} == pytest.approx({k: want[k] for k in keys}, abs=1e-3)
    assert got['per_class'].keys() == want['per_class'].keys() == {'red', 'blue'}


def test_a_report_comes_with_the_run_and_with_a_measurement(root, tmp_path, capsys):
    page = (root / 'run' / 'report.html').read_text(encoding='utf-8')
    assert 'retinanet' in page and page.count('<section') == 8 and '<th scope="row">' in page
    assert main(['evaluate', str(root / 'run'), '--report', str(tmp_path / 'data')]) == 1
    assert 'ends in .html' in capsys.readouterr().err


def test_which_images_are_measured(root, tmp_path, capsys):
    args = '--split', 'test', '--report', tmp_path / 'new' / 'a.html'
    assert measured(root, root / 'data', *args)['images'] == 2
    assert 'images</dt><dd>2<' in args[-1].read_text(encoding='utf-8')
    assert 'warning' not in capsys.readouterr().out
    assert measured(root, root / 'data', '--split', 'train')['images'] == 12
    assert 'warning: 12 of 12 images were learned from' in capsys.readouterr().out
    parts, classes, _ = read_data(root / 'data')
    write_data(parts['valid'], classes, tmp_path / 'flat', 'csv')
    for args, words in (
        ((tmp_path / 'flat', '--split', 'test'), 'flat has all: choose one of these'),
        (('--split', 'test'), 'where the run decides'),
        ((tmp_path / 'gone',), 'there is no'),
    ):
        assert main(['evaluate', str(root / 'run'), *map(str, args)]) == 1
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1


def test_a_class_that_the_run_does_not_know(root, tmp_path, capsys):
    parts, *_ = read_data(root / 'data')
    write_data(parts['valid'], ClassMap(['red', 'green']), tmp_path / 'other', 'coco')
    assert main(['evaluate', str(root / 'run'), str(tmp_path / 'other')]) == 1
    assert "there is no class 'green'" in capsys.readouterr().err
