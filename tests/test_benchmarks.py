import re
import runpy
import sys

import pytest

from project import root

from backbones_nb.imagenet.toy import toy_imagenet

bench = str(root / 'benchmarks' / 'loaders.py')
tiny = '--images 16 --size 32 --bs 5 --workers 0 --repeats 1'.split()
row = re.compile(r"^(plain|recipe) +(\w+) +([\d.]+) images/s +([\d.]+) of torchvision's$", re.M)


@pytest.fixture
def run(monkeypatch, capsys):
    "Runs the script; returns its output and why it exited."

    def f(*args):
        monkeypatch.setattr(sys, 'argv', [bench, *tiny, *map(str, args)])
        why = None
        try:
            runpy.run_path(bench, run_name='__main__')
        except SystemExit as e:
            why = e.code
        got = capsys.readouterr()
        return got.out, got.err if why == 2 else why

    return f


def test_loaders_rows(run):
    out, why = run('--target', 0)
    assert why is None
    loaders = 'torchvision', 'fastai', 'folder_dls', 'shard_dls'
    found = row.findall(out)
    assert [o[:2] for o in found] == [
        (b, l) for b in ('plain', 'recipe') for l in loaders if (b, l) != ('recipe', 'fastai')
    ]
    assert all(float(o[2]) > 0 for o in found)
    assert [float(o[3]) for o in found if o[1] == 'torchvision'] == [1, 1]
    (size,) = re.findall(r'16 JPEGs of (\d+) kB', out)
    assert 80 < int(size) < 130


def test_loaders_data(run, tmp_path):
    data = toy_imagenet(tmp_path / 'toy', n_classes=4, per_class=5, val_per_class=1, test=0, size=32)
    out, why = run('--data', data, '--clock', 'cpu', '--images', 20, '--target', 1e6)
    assert len(row.findall(out)) == 7 and '20 JPEGs' in out
    assert (
        why == 'below the target of 1000000.0: plain folder_dls, plain shard_dls, recipe folder_dls, recipe shard_dls'
    )
    assert 'holds 20 images, expected 21 or more' in run('--data', data, '--images', 21)[1]


@pytest.mark.parametrize(
    'args,message',
    [
        (('--bs', 17), 'got --images 16 and --bs 17, expected at least one batch'),
        (('--repeats', 0), 'got --repeats 0, expected 1 or more'),
        (('--workers', -1), 'got --workers -1, expected 0 or more'),
    ],
)
def test_loaders_refuses(run, args, message):
    assert message in run(*args)[1]
