import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback import progress  # noqa: F401, adds no_bar to Learner
from fastai.data.transforms import Normalize
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import nn
from torchvision.datasets import ImageFolder, ImageNet
from torchvision.models import resnet18
from torchvision.transforms import v2

from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD
from backbones_nb.core.contexts import write_whole
from backbones_nb.core.published import weight_records
from backbones_nb.imagenet import folders, streams, toy
from backbones_nb.imagenet.batches import class_dls, folder_dls, FolderDL, ImageSet, plain_tfms
from backbones_nb.imagenet.shard_batches import shard_dls, ShardSet
from backbones_nb.imagenet.folders import (
    broken_images,
    find_names,
    imagenet_folders,
    prepare_val,
    _read_solution,
    scan_classes,
    synset_names,
)
from backbones_nb.imagenet.toy import toy_imagenet, toy_synsets
from backbones_nb.data.records import load_image
from backbones_nb.imagenet.shards import plan_shards, write_shards
from backbones_nb.imagenet.streams import (
    as_url_or_path,
    has_shards,
    join_url,
    read_index,
    read_samples,
    read_shard,
)

arguments = dict(n_classes=4, per_class=13, val_per_class=5, size=40)
inner = Path('ILSVRC') / 'Data' / 'CLS-LOC'


def content(path):
    return {str(o.relative_to(path)): o.read_bytes() for o in path.rglob('*') if o.is_file()}


def one_sentence(e, *parts):
    assert '\n' not in str(e.value) and all(o in str(e.value) for o in parts), str(e.value)


def killed(step, steps, f, *args, **kw):
    "Runs `f` in a process that kills itself with -9 when it calls `os.step` once more than `steps` times."

    def run():
        real, calls = getattr(os, step), []

        def deadly(*a):
            if len(calls) == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(a)
            return real(*a)

        setattr(os, step, deadly)
        f(*args, **kw)

    p = multiprocessing.get_context('fork').Process(target=run)
    p.start()
    p.join(60)
    assert p.exitcode == -signal.SIGKILL


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    return toy_imagenet(tmp_path_factory.mktemp('fresh') / 'imagenet', **arguments)


@pytest.fixture
def kaggle(fresh, tmp_path):
    return Path(shutil.copytree(fresh, tmp_path / 'imagenet'))


@pytest.fixture
def csv(kaggle):
    return kaggle / 'LOC_val_solution.csv'


@pytest.fixture
def val(kaggle):
    return kaggle / inner / 'val'


@pytest.fixture(scope='module')
def ready(fresh, tmp_path_factory):
    path = Path(shutil.copytree(fresh, tmp_path_factory.mktemp('ready') / 'imagenet'))
    prepare_val(path / 'LOC_val_solution.csv', path / inner / 'val')
    for o in ('train', 'val'):
        write_shards(path / inner / o, path / 'shards' / o, maxcount=7, progress=False)
    return path


# --- the validation images


def test_every_image_is_moved_once(csv, val):
    before = content(val)
    assert str(prepare_val(csv, val, dry_run=True)) == '20 to move, 0 already there, 0 missing, 0 foreign files'
    assert content(val) == before
    report = prepare_val(csv, val)
    assert (report.moved, report.there, report.missing, report.foreign) == (20, 0, [], [])
    solution = {l.split(',')[0]: l.split(',')[1].split()[0] for l in csv.read_text().splitlines()[1:]}
    assert content(val) == {f'{solution[k[:-5]]}/{k}': v for k, v in before.items()}
    times = {o: o.stat().st_mtime_ns for o in val.rglob('*')}
    assert str(prepare_val(csv, val)) == '0 moved, 20 already there, 0 missing, 0 foreign files'
    assert times == {o: o.stat().st_mtime_ns for o in val.rglob('*')}


@pytest.mark.parametrize('moves', [0, 1, 7, 19])
def test_killed_and_resumed(csv, val, moves):
    before = sorted(content(val).values())
    killed('rename', moves, prepare_val, csv, val)
    assert sorted(content(val).values()) == before
    report = prepare_val(csv, val)
    assert (report.moved, report.there) == (20 - moves, moves) and not any(o.is_file() for o in val.iterdir())
    assert sorted(content(val).values()) == before


def test_another_process_is_quicker(csv, val, monkeypatch):
    before, real, n = sorted(content(val).values()), os.rename, []

    def twice(a, b):  # the other one moves each file just before this one
        n.append(a)
        real(a, b)
        real(a, b)

    monkeypatch.setattr(os, 'rename', twice)
    prepare_val(csv, val)
    assert len(n) == 20 and sorted(content(val).values()) == before


def test_a_file_that_vanishes_is_an_error(csv, val, monkeypatch):
    monkeypatch.setattr(os, 'rename', lambda a, b: os.remove(a) or os.stat(a))
    with pytest.raises(FileNotFoundError):
        prepare_val(csv, val)


def test_a_file_that_appears_is_not_overwritten(csv, val, monkeypatch):
    def late(places=folders._places):
        def look(d):
            res = places(d)
            for s in toy_synsets:
                (val / s).mkdir(exist_ok=True)
                for o in val.glob('*.JPEG'):
                    (val / s / o.name).write_text('precious')
            return res

        return look

    monkeypatch.setattr(folders, '_places', late())
    with pytest.raises(FileExistsError, match='exist: remove one of them'):
        prepare_val(csv, val)
    assert len(list(val.glob('*.JPEG'))) == 20 and {o.read_text() for o in val.glob('n*/*')} == {'precious'}


def lines(csv):
    return csv.read_text().splitlines()


wrong = dict(
    columns=(
        lambda c, v: c.write_text(c.read_text().replace('PredictionString', 'label')),
        'expected ImageId and PredictionString',
    ),
    empty=(lambda c, v: c.write_text(''), '0 rows'),
    header=(lambda c, v: c.write_text('ImageId,PredictionString\n'), '0 rows'),
    binary=(lambda c, v: c.write_bytes(b'\xff\xfe\x00\x81' * 9), 'cannot be read as a table'),
    classes=(
        lambda c, v: c.write_text('\n'.join([lines(c)[0], *(l.replace(',n', ',x') for l in lines(c)[1:])])),
        'has no synset for 20 images',
    ),
    short=(lambda c, v: c.write_text('\n'.join(lines(c) + ['ILSVRC2012_val_00000077'])), 'ILSVRC2012_val_00000077'),
    twice=(lambda c, v: c.write_text('\n'.join(lines(c) + lines(c)[-1:])), 'has 21 rows, and ILSVRC2012_val'),
    fewer=(lambda c, v: c.write_text('\n'.join(lines(c)[:-2])), 'has 2 images, such as'),
    more=(
        lambda c, v: c.write_text('\n'.join(lines(c) + ['ILSVRC2012_val_00000077,n01440764 1 2 3 4'])),
        'lists 21 images',
    ),
    training=(lambda c, v: shutil.copy(c.with_name('LOC_train_solution.csv'), c), 'has 20 images, such as'),
    stray=(lambda c, v: (v / 'photo.jpg').write_text('x'), 'such as photo'),
    both=(
        lambda c, v: (
            (v / lines(c)[1].split(',')[1][:9]).mkdir()
            or shutil.copy(v / f"{lines(c)[1].split(',')[0]}.JPEG", v / lines(c)[1].split(',')[1][:9])
        ),
        'two files each for 1 images',
    ),
    sorted=(
        lambda c, v: (v / 'n09999999').mkdir() or shutil.move(v / 'ILSVRC2012_val_00000003.JPEG', v / 'n09999999'),
        'states another class than the folder',
    ),
    nothing=(lambda c, v: [o.unlink() for o in v.iterdir()], 'contains none of them'),
)


@pytest.mark.parametrize('spoil,says', wrong.values(), ids=wrong)
@pytest.mark.parametrize('dry_run', [False, True])
def test_a_wrong_csv_is_refused_before_anything_moves(csv, val, spoil, says, dry_run):
    spoil(csv, val)
    before = content(val)
    with pytest.raises(ValueError) as e:
        prepare_val(csv, val, dry_run=dry_run)
    one_sentence(e, says)
    assert content(val) == before


def test_missing_images_may_be_allowed_and_foreign_files_stay(csv, val):
    for o in ('ILSVRC2012_val_00000002.JPEG', 'ILSVRC2012_val_00000005.JPEG'):
        (val / o).unlink()
    (val / 'README.txt').write_text('read me')
    (val / '._ILSVRC2012_val_00000001.JPEG').write_text('a Mac was here')
    (val / 'old').mkdir()
    with pytest.raises(ValueError) as e:
        prepare_val(csv, val)
    one_sentence(e, 'is missing 2 images, such as ILSVRC2012_val_00000002', 'allow missing images')
    report = prepare_val(csv, val, allow_missing=True)
    assert (report.moved, report.there, report.missing) == (
        18,
        0,
        ['ILSVRC2012_val_00000002', 'ILSVRC2012_val_00000005'],
    )
    assert report.foreign == sorted(['README.txt', '._ILSVRC2012_val_00000001.JPEG', 'old'])
    assert {o.name for o in val.iterdir()} == {*report.foreign, *sorted(toy_synsets)[:4]}
    assert str(report) == (
        '18 moved, 0 already there, 2 missing (ILSVRC2012_val_00000002, ILSVRC2012_val_00000005), '
        '3 foreign files (._ILSVRC2012_val_00000001.JPEG, README.txt, old)'
    )


def test_what_is_not_there(tmp_path, csv, val):
    with pytest.raises(FileNotFoundError, match='no folder'):
        prepare_val(csv, tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='no file'):
        prepare_val(tmp_path / 'none.csv', val)
    for allow in (False, True):  # the folder above
        with pytest.raises(ValueError, match='contains none of them: pass the folder they are in'):
            prepare_val(csv, val.parent, allow_missing=allow)


# --- names, the toy, folders


def test_names(fresh, tmp_path):
    names = synset_names(fresh)
    assert names == synset_names(fresh / 'LOC_synset_mapping.txt') and list(names) == sorted(toy_synsets)[:4]
    everything = synset_names()
    assert (
        len(everything) == 1000
        and list(everything) == sorted(everything) == ImageNetInfo().label_names()
        and everything['n01440764'] == 'tench, Tinca tinca'
    )
    assert {k: v for k, (v, _) in toy_synsets.items()}.items() <= everything.items() and len(toy_synsets) >= 20
    torch.save(({k: tuple(v.split(', ')) for k, v in names.items()}, []), tmp_path / 'meta.bin')
    assert synset_names(tmp_path) == names and find_names(tmp_path / 'none') == everything
    with pytest.raises(FileNotFoundError, match='neither'):
        synset_names(tmp_path / 'none')
    (tmp_path / 'LOC_synset_mapping.txt').write_text('n01440764 tench\ntench n01440764\n')
    with pytest.raises(ValueError, match="'tench n01440764'"):
        synset_names(tmp_path)


def test_the_toy_has_the_layout_of_kaggle(fresh):
    assert {o.name for o in fresh.iterdir()} == {
        'ILSVRC',
        'LOC_sample_submission.csv',
        'LOC_synset_mapping.txt',
        'LOC_train_solution.csv',
        'LOC_val_solution.csv',
        'toy.json',
    }
    data = fresh / inner
    classes, files, labels = scan_classes(data / 'train')
    assert classes == sorted(toy_synsets)[:4] and np.bincount(labels).tolist() == [13] * 4
    assert _read_solution(fresh / 'LOC_train_solution.csv') == {
        Path(f.decode()).stem: classes[y] for f, y in zip(files, labels)
    }
    solution = _read_solution(fresh / 'LOC_val_solution.csv')
    assert (
        sorted(solution)
        == sorted(o.stem for o in (data / 'val').iterdir())
        == [f'ILSVRC2012_val_{i:08d}' for i in range(1, 21)]
    )
    assert list(solution) != sorted(solution) and set(Counter(solution.values()).items()) == {(c, 5) for c in classes}
    assert all(o.suffix == '.JPEG' and Image.open(o).format == 'JPEG' for o in data.rglob('*') if o.is_file())
    assert len(list((data / 'test').iterdir())) == 10


def test_the_toy_depends_on_its_arguments_alone(fresh, tmp_path):
    again = toy_imagenet(tmp_path / 'a', **arguments)
    assert content(again) == content(fresh)
    other = content(toy_imagenet(tmp_path / 'b', **arguments, seed=1))
    assert all(other[k] != v for k, v in content(fresh).items() if k.endswith('JPEG'))
    for bad in (dict(n_classes=1), dict(n_classes=99), dict(per_class=0)):
        with pytest.raises(ValueError, match='expected 2 to'):
            toy_imagenet(tmp_path / 'c', **bad)
    with pytest.raises(ValueError, match='holds other files'):
        toy_imagenet(again, **arguments, seed=2)


def test_a_toy_is_whole_or_absent(tmp_path, monkeypatch):
    def stop(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(toy, '_csv', stop)
        with pytest.raises(KeyboardInterrupt):
            toy_imagenet(tmp_path / 'a', **arguments)
    assert not (tmp_path / 'a').exists()
    path = toy_imagenet(tmp_path / 'a', **arguments)
    prepare_val(path / 'LOC_val_solution.csv', path / inner / 'val')
    prepared = content(path)
    assert content(toy_imagenet(path, **arguments)) == prepared


def test_the_scan_agrees_with_torchvision(ready):
    train, _ = imagenet_folders(ready)
    (train / 'notes.txt').write_text('not a class')
    classes, files, labels = scan_classes(train)
    theirs = ImageFolder(train)
    assert theirs.classes == classes and theirs.samples == [
        (str(train / os.fsdecode(f)), y) for f, y in zip(files, labels)
    ]


def test_torchvisions_layout(ready, tmp_path):
    for o in ('train', 'val'):
        shutil.copytree(ready / inner / o, tmp_path / o)
    torch.save(({k: tuple(v.split(', ')) for k, v in synset_names(ready).items()}, []), tmp_path / 'meta.bin')
    dls, theirs = folder_dls(tmp_path, 16, bs=4, num_workers=0), ImageNet(tmp_path, 'val')
    assert [*dls.vocab] == theirs.wnids and dls.valid.dataset.items == theirs.samples
    assert [dls.valid.dataset.name(i) for i in range(4)] == [o[0] for o in theirs.classes]
    (tmp_path / 'meta.bin').unlink()
    assert [*folder_dls(tmp_path, 16, bs=4, num_workers=0).vocab] == theirs.wnids


def test_folders_that_do_not_fit(fresh, ready, tmp_path):
    with pytest.raises(ValueError) as e:
        folder_dls(fresh, 16, bs=4)
    one_sentence(e, 'run prepare_val first')
    with pytest.raises(FileNotFoundError, match='no folder .*train'):
        folder_dls(tmp_path, 16)
    copy = Path(shutil.copytree(ready / inner, tmp_path / 'data'))
    shutil.rmtree(copy / 'val' / 'n02782093')
    with pytest.raises(ValueError) as e:
        folder_dls(copy, 16, bs=4)
    one_sentence(e, "only in training: ['n02782093']", 'validation 3')
    (copy / 'val' / 'n02782093').mkdir()
    with pytest.raises(ValueError, match='n02782093 has no images'):
        folder_dls(copy, 16, bs=4)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='unpack'):
        scan_classes(tmp_path / 'empty')


def test_broken_images_are_named(ready, tmp_path):
    copy = Path(shutil.copytree(ready / inner, tmp_path / 'data'))
    assert broken_images(copy / 'train') == []
    a, b = sorted((copy / 'train' / 'n01443537').iterdir())[:2]
    a.write_bytes(a.read_bytes()[:300])
    b.write_text('<html>')
    found = broken_images(copy / 'train', workers=2)
    assert len(found) == 2 and a.name in found[0] and b.name in found[1]
    dls = folder_dls(copy, 16, bs=52, num_workers=0)
    with pytest.raises(ValueError, match='cannot be read as an image'):
        dls.train.one_batch()
    shutil.copy(ready / inner / 'train' / 'n01443537' / b.name, b)
    with pytest.raises(ValueError) as e:
        write_shards(copy / 'train', tmp_path / 's', progress=False)  # its head can be read
    one_sentence(e, a.name, 'replace it')


# --- shards


def test_the_plan():
    sizes = np.array([5, 1, 1, 9, 1, 1, 1])
    assert [o.tolist() for o in plan_shards(sizes, np.arange(7), 3, 99)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [o.tolist() for o in plan_shards(sizes, np.arange(7)[::-1], 99, 4)] == [[6, 5, 4], [3], [2, 1], [0]]


def test_shards_hold_every_file_once(ready):
    folder, out = ready / inner / 'train', ready / 'shards' / 'train'
    index = read_index(out)
    classes, files, labels = scan_classes(folder)
    assert (
        index['count'] == 52 and index['classes'] == classes and [o['count'] for o in index['shards']] == [7] * 7 + [3]
    )
    assert sorted(o.name for o in out.iterdir()) == ['index.json', *(f'shard-{i:06d}.tar' for i in range(8))]
    got = list(read_samples(out, index, 0, 52))
    assert len({o['__key__'] for o in got}) == 52
    about = [json.loads(o['json']) for o in got]
    assert all(
        (folder / a['file']).read_bytes() == o['jpg'] and classes[int(o['cls'])] == a['synset'] == a['file'][:9]
        for a, o in zip(about, got)
    )
    assert sorted(a['file'] for a in about) == [f.decode() for f in files] and [int(o['cls']) for o in got] != sorted(
        labels.tolist()
    )


def test_any_stretch_in_any_order(ready):
    out = ready / 'shards' / 'train'
    index = read_index(out)
    everything = [o['__key__'] for o in read_samples(out, index, 0, 52)]
    for a, b in ((0, 1), (6, 8), (3, 31), (50, 52), (9, 9)):
        assert [o['__key__'] for o in read_samples(out, index, a, b)] == everything[a:b]
    turned = [o['__key__'] for o in read_samples(out, index, 2, 11, range(7, -1, -1))]
    assert turned == (everything[49:] + everything[42:49] + everything[35:42])[2:11]


def test_webdatasets_own_loader_reads_them(ready):
    import webdataset as wds

    urls = [str(o) for o in sorted((ready / 'shards' / 'val').glob('*.tar'))]
    got = list(wds.WebDataset(urls, shardshuffle=False).decode('pil').to_tuple('jpg', 'cls', 'json'))
    assert len(got) == 20 and all(
        np.array_equal(img, load_image(ready / inner / 'val' / about['file'])) for img, _, about in got
    )
    assert Counter(c for _, c, _ in got) == {i: 5 for i in range(4)}


@pytest.mark.parametrize('steps', [0, 1, 4, 8])
def test_packing_is_killed_and_resumed(ready, tmp_path, steps):
    folder, kw = ready / inner / 'train', dict(maxcount=7, progress=False)
    killed('replace', steps, write_shards, folder, tmp_path / 's', **kw)
    assert len([o for o in (tmp_path / 's').glob('*.tar')]) == max(steps - 1, 0)
    with pytest.raises((ValueError, FileNotFoundError)):
        read_index(tmp_path / 's')
    done = {o: o.stat().st_mtime_ns for o in (tmp_path / 's').glob('*.tar')}
    write_shards(folder, tmp_path / 's', workers=2, **kw)
    assert content(tmp_path / 's') == content(ready / 'shards' / 'train')
    assert done.items() <= {o: o.stat().st_mtime_ns for o in (tmp_path / 's').glob('*.tar')}.items()
    assert write_shards(folder, tmp_path / 's', **kw) == read_index(ready / 'shards' / 'train')


def test_limits_and_seeds_of_shards(ready, tmp_path):
    folder = ready / inner / 'val'
    index = write_shards(folder, tmp_path / 'a', maxsize=4000, seed=1, progress=False)
    for o in index['shards']:
        size = sum(len(s['jpg']) for s in read_samples(tmp_path / 'a', dict(shards=[o]), 0, o['count']))
        assert size <= 4000 or o['count'] == 1
    assert len(index['shards']) > 2
    order = lambda k, i: [s['jpg'] for s in read_samples(tmp_path / k, i, 0, 20)]
    assert (
        order('a', index)
        == order('b', write_shards(folder, tmp_path / 'b', seed=1, progress=False))
        != order('c', write_shards(folder, tmp_path / 'c', seed=2, progress=False))
    )
    for bad in (dict(maxcount=0), dict(maxsize=0)):
        with pytest.raises(ValueError, match='expected at least 1'):
            write_shards(folder, tmp_path / 'd', **bad)
    with pytest.raises(ValueError, match='other images or with other arguments'):
        write_shards(folder, tmp_path / 'a', maxsize=5000, progress=False)
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters' / 'hello.txt').write_text('x')
    with pytest.raises(ValueError, match='holds other files'):
        write_shards(folder, tmp_path / 'letters', progress=False)


def test_broken_shards_are_named(ready, tmp_path):
    out = Path(shutil.copytree(ready / 'shards', tmp_path / 'shards'))
    tar = out / 'val' / 'shard-000001.tar'
    whole = tar.read_bytes()
    index = read_index(out / 'val')
    for n in (700, 3000):  # within a header, within a file
        tar.write_bytes(whole[:n])
        with pytest.raises(ValueError) as e:
            shard_dls(out, 16, bs=4)
        one_sentence(e, str(tar), f'has {n} bytes')
        with pytest.raises(ValueError) as e:
            list(read_samples(out / 'val', index, 0, 20))
        one_sentence(e, str(tar), 'run write_shards again')
    assert write_shards(ready / inner / 'val', out / 'val', maxcount=7, progress=False) == index and content(
        out
    ) == content(ready / 'shards')  # fixed
    with tarfile.open(tar, 'w') as f:
        for name, b in (('0.jpg', b'no image'), ('0.cls', b'1')):
            info = tarfile.TarInfo(name)
            info.size = len(b)
            f.addfile(info, io.BytesIO(b))
    with pytest.raises(ValueError) as e:
        list(read_samples(out / 'val', index, 7, 14))
    one_sentence(e, 'holds 1 samples, expected 7')
    index['shards'][1] |= dict(count=1, bytes=tar.stat().st_size)
    index['count'] -= 6
    (out / 'val' / 'index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError) as e:
        list(shard_dls(out, 16, bs=4, num_workers=0).valid)
    one_sentence(e, 'sample 0 of', str(tar), 'fix its image')
    tar.unlink()
    with pytest.raises(ValueError, match='has 0 bytes'):
        shard_dls(out, 16, bs=4)
    with pytest.raises(FileNotFoundError, match='write_shards'):
        shard_dls(tmp_path, 16, bs=4)


def test_without_the_library(ready, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(ImportError) as e:
        shard_dls(ready / 'shards', 16, bs=4)
    one_sentence(e, 'pip install webdataset')
    with pytest.raises(ImportError, match='pip install webdataset'):
        write_shards(ready / inner / 'val', tmp_path / 's')
    assert not (tmp_path / 's').exists() and len(folder_dls(ready, 16, bs=4, num_workers=0).valid) == 5


# --- what is written is whole or absent


@pytest.mark.parametrize('shared', [False, True])
def test_a_write_that_fails_leaves_the_old_one(tmp_path, shared):
    a, b = tmp_path / 'new' / 'a.pt', tmp_path / 'new' / 'b.pt'
    with write_whole(a, shared) as part:
        torch.save(torch.ones(3), part)
    with pytest.raises(ZeroDivisionError), write_whole(a, shared) as part:
        part.write_text('half')
        1 / 0
    assert torch.equal(torch.load(a), torch.ones(3)) and list(a.parent.iterdir()) == [a]
    with write_whole(a, shared) as one, write_whole(b, shared) as two:  # at the same time, in one folder
        two.write_text('b')
        one.write_text('a')
        assert one.name == 'a.pt' and not b.exists()
    assert (a.read_text(), b.read_text()) == ('a', 'b') and sorted(a.parent.iterdir()) == [a, b]
    with pytest.raises(FileNotFoundError), write_whole(a, shared):
        pass  # nothing was written
    assert a.read_text() == 'a' and sorted(a.parent.iterdir()) == [a, b]


def test_two_writers_of_one_file(tmp_path):
    f = tmp_path / 'f'
    with write_whole(f, shared=True) as one, write_whole(f, shared=True) as two:
        one.write_text('1')
        two.write_text('2')
    assert f.read_text() == '1' and list(tmp_path.iterdir()) == [f]


def test_a_writer_that_was_killed(tmp_path):
    f = tmp_path / 'f'

    def save(text):
        with write_whole(f) as part:
            part.write_text(text)

    save('first')
    killed('replace', 0, save, 'second')
    assert f.read_text() == 'first' and len(list(tmp_path.iterdir())) == 2
    save('third')
    assert f.read_text() == 'third' and list(tmp_path.iterdir()) == [f]


def test_a_folder_is_written_whole(tmp_path):
    def make(folder):
        (folder / 'deep').mkdir(parents=True)
        (folder / 'deep' / 'file').write_text('x')

    with write_whole(tmp_path / 'd') as part:
        make(part)
    with pytest.raises(OSError), write_whole(tmp_path / 'd') as part:
        make(part)  # one with something in it is not replaced
    assert content(tmp_path) == {'d/deep/file': b'x'} and [o.name for o in tmp_path.iterdir()] == ['d']


writers = dict(
    torch=lambda f: torch.save(torch.ones(99_999), f),
    stream=lambda f: torch.save(torch.ones(99_999), open(f, 'wb')),
    safetensors=lambda f: save_file(dict(a=torch.ones(99_999)), f),
    text=lambda f: f.write_text('x' * 99_999),
)


@pytest.mark.parametrize('name', writers)
def test_a_full_disk(tmp_path, name):
    f = tmp_path / 'f'
    f.write_text('old')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError) as e, write_whole(f) as part:
            writers[name](part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_sentence(e, f'could not write {f}', 'free some space', 'the previous file is unchanged')
    assert f.read_text() == 'old' and list(tmp_path.iterdir()) == [f]


# --- shards elsewhere


class Server(SimpleHTTPRequestHandler):
    """Gives out files; `cut` bytes of a tar file in one answer at most, `says` whether their number is reported,
    `ranges` whether it can begin anywhere."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        o, f = self.server, Path(self.translate_path(self.path))
        o.asked.append((self.path, self.headers.get('Range')))
        if o.busy:
            o.busy -= 1
            return self.send_error(503)
        if not f.is_file():
            return self.send_error(404)
        body = f.read_bytes()
        at = int(self.headers['Range'][6:-1]) if o.ranges and self.headers.get('Range') else 0
        self.send_response(206 if at else 200)
        if at:
            self.send_header('Content-Range', f'bytes {at}-{len(body) - 1}/{len(body)}')
        if o.says:
            self.send_header('Content-Length', str(len(body) - at))
        self.end_headers()
        self.wfile.write(body[at:][: o.cut if f.suffix == '.tar' else None])


@pytest.fixture
def server(ready, tmp_path, monkeypatch):
    shutil.copytree(ready / 'shards', tmp_path / 'shards')
    s = ThreadingHTTPServer(('127.0.0.1', 0), partial(Server, directory=tmp_path))
    s.asked, s.busy, s.cut, s.says, s.ranges = [], 0, None, True, True
    s.waits, s.folder, s.url = [], tmp_path / 'shards', f'http://127.0.0.1:{s.server_port}/shards'
    monkeypatch.setattr(streams, 'sleep', s.waits.append)
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def addresses(server):
    return [server.url, server.url + '/', server.folder.as_uri(), f'pipe:cat {server.folder}/{{}}']


def test_places():
    assert as_url_or_path('a/b') == as_url_or_path(Path('a/b')) == Path('a/b') and as_url_or_path(
        'file:///a%20b/c'
    ) == Path('/a b/c')
    for o in ('https://host/a', 'HTTP://host/a', 'gs://bucket/a', 'hf://datasets/me/a', 'pipe:cat /x/{}'):
        assert as_url_or_path(o) == o
    assert join_url('https://host/a/', 'b') == 'https://host/a/b' and join_url('file:///a', 'b') == Path('/a/b')
    assert join_url(join_url('https://host/a/{}?key=1', 'train'), 'x.tar') == 'https://host/a/train/x.tar/{}?key=1'
    for bad in ('s3://bucket/a', 'pipe:cat /x'):
        with pytest.raises(ValueError) as e:
            shard_dls(bad, 16)
        one_sentence(e, f"got '{bad}'", 'pipe:aws s3 cp')
    for bad in ('https://host/a', 'pipe:cat s3://x/{}'):
        with pytest.raises(ValueError) as e:
            shard_dls(Path(bad), 16)
        one_sentence(e, 'expected a string')


def test_which_places_hold_shards(ready):
    assert [
        has_shards(o)
        for o in (ready / 'shards' / 'train', (ready / 'shards' / 'val').as_uri(), ready, 'https://host/a')
    ] == [True, True, False, True]


def test_samples_from_elsewhere_are_those_of_the_folder(server):
    index = read_index(server.folder / 'train')
    for o in addresses(server):
        at = join_url(o, 'train')
        assert read_index(at) == index
        for a, b in ((0, 52), (3, 31)):
            far, near = (list(read_samples(p, index, a, b, range(7, -1, -1))) for p in (at, server.folder / 'train'))
            drop = lambda rows: [{k: v for k, v in r.items() if k != '__url__'} for r in rows]
            assert drop(far) == drop(near) and len(far) == b - a
    server.asked.clear()
    list(read_samples(server.url + '/train', index, 8, 15))
    assert (
        server.asked == [('/shards/train/shard-000001.tar', None), ('/shards/train/shard-000002.tar', None)]
        and not server.waits
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_from_elsewhere_are_those_of_the_folder(server, ready, workers):
    kw = dict(
        bs=4,
        tfms=(v2.RandomResizedCrop(8), v2.Resize((8, 8))),
        mean=None,
        num_workers=workers,
        device='cpu',
        seed=3,
        buffer=10,
        world_size=1,
    )
    near = shard_dls(ready / 'shards', **kw)
    want = passed(near.train), passed(near.valid)
    for o in addresses(server)[::2] if workers else addresses(server):
        far = shard_dls(o, **kw)
        assert (passed(far.train), passed(far.valid)) == want
        local = o.startswith('file')
        assert far.path == (server.folder if local else Path('.')) and [
            far.valid.dataset.name(i) for i in range(4)
        ] == [near.valid.dataset.name(i) for i in range(4)]
    assert find_names(server.url) == synset_names()


@pytest.mark.parametrize('says', [True, False])
@pytest.mark.parametrize('ranges', [True, False])
def test_a_connection_that_breaks_is_made_again(server, says, ranges):
    index = read_index(server.folder / 'train')
    size = index['shards'][0]['bytes']
    server.says, server.ranges, server.cut, server.busy = says, ranges, (size // 3 if ranges else None), 2
    got = list(read_samples(server.url + '/train', index, 0, 7))
    assert [o['jpg'] for o in got] == [o['jpg'] for o in read_samples(server.folder / 'train', index, 0, 7)]
    assert server.waits[:2] == [1, 2] and [r for _, r in server.asked[:3]] == [None] * 3
    if ranges:
        assert [r for _, r in server.asked[3:]][0] == f'bytes={size // 3}-'


def test_a_server_that_cannot_begin_in_the_middle(server, monkeypatch):
    index = read_index(server.folder / 'train')
    server.ranges, server.cut = False, 5000
    monkeypatch.setattr(streams, 'sleep', lambda s: setattr(server, 'cut', None))  # it is well again
    got = list(read_samples(server.url + '/train', index, 0, 7))
    assert [o['jpg'] for o in got] == [o['jpg'] for o in read_samples(server.folder / 'train', index, 0, 7)] and len(
        server.asked
    ) == 2


@pytest.mark.parametrize('says', [True, False])
@pytest.mark.parametrize('cut', ['header', 'file', 'between'])
def test_a_cut_shard_elsewhere_is_named(server, says, cut):
    index, tar = read_index(server.folder / 'val'), server.folder / 'val' / 'shard-000001.tar'
    with tarfile.open(tar) as f:
        at = f.getmembers()[9].offset  # the fourth sample begins there
    n = at + dict(header=100, file=700, between=0)[cut]
    tar.write_bytes(tar.read_bytes()[:n])
    server.says = says
    for o in (server.url, f'pipe:cat {server.folder}/{{}}'):
        dl = shard_dls(o, 16, bs=4, val_bs=20, num_workers=0).valid
        with pytest.raises(ValueError) as e:
            list(dl)
        one_sentence(e, 'shard-000001.tar', str(n), str(index['shards'][1]['bytes']), 'copy it again')


def test_a_worker_names_the_cut_shard(server):
    tar = server.folder / 'val' / 'shard-000001.tar'
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError) as e:
        list(shard_dls(server.url, 16, bs=4, num_workers=1).valid)
    assert f'{server.url}/val/shard-000001.tar cannot be read (it has 3000 bytes' in str(e.value).splitlines()[-1]


def test_a_server_that_always_hangs_up(server):
    index = read_index(server.folder / 'val')
    server.cut, server.ranges = 5000, False
    with pytest.raises(ValueError) as e:
        list(read_samples(server.url + '/val', index, 0, 20))
    one_sentence(e, 'val/shard-000000.tar cannot be read', 'it ends after 5000 of')
    assert server.waits == [1, 2, 3] and len(server.asked) == 4
    server.cut = None
    whole = list(read_shard(server.url + '/val/shard-000000.tar', 0, 7))
    assert len(whole) == 7
    with pytest.raises(ValueError, match='holds 7 samples, expected 8'):
        list(read_shard(server.url + '/val/shard-000000.tar', 0, 8))


def test_a_shard_that_is_away_or_another(server):
    index = read_index(server.folder / 'val')
    (server.folder / 'val' / 'shard-000000.tar').unlink()
    for o, says in (
        (server.url, '404'),
        (server.folder.as_uri(), 'No such file'),
        (f'pipe:cat {server.folder}/{{}}', 'exit 1'),
    ):
        with pytest.raises(ValueError) as e:
            list(read_samples(join_url(o, 'val'), index, 0, 20))
        one_sentence(e, 'shard-000000.tar cannot be read', says)
    assert server.waits == [1, 2, 3]  # of the command alone
    (server.folder / 'val' / 'shard-000000.tar').write_text('<html>')
    with pytest.raises(ValueError) as e:
        list(read_samples(server.url + '/val', index, 0, 20))
    one_sentence(e, 'shard-000000.tar cannot be read (it has 6 bytes, expected')


def test_wrong_addresses(server, monkeypatch):
    with pytest.raises(FileNotFoundError) as e:
        shard_dls(server.url + '/none', 16)
    one_sentence(e, f'there is no {server.url}/none/train/index.json')
    for bad in ('http://127.0.0.1:1/x', 'http://nowhere.invalid/x', 'http://host:port/x', 'http:///x', 'pipe:false {}'):
        with pytest.raises(ConnectionError) as e:
            shard_dls(bad, 16)
        one_sentence(e, 'train/index.json', 'cannot be fetched', 'check the URL and the network')
    server.busy = 1
    with pytest.raises(ConnectionError) as e:
        shard_dls(server.url, 16)
    one_sentence(e, '503')
    monkeypatch.setattr(streams, 'TIMEOUT_S', 0.2)
    monkeypatch.setattr(Server, 'do_GET', lambda self: threading.Event().wait(1))  # silent
    with pytest.raises(ConnectionError) as e:
        shard_dls(server.url, 16)
    one_sentence(e, 'timed out')


one = dict(name='a.tar', count=1, bytes=9)
whole = dict(complete=True, count=1, classes=['a'], shards=[one])
others = [
    b'<html>',
    b'\xff\xfe',
    b'[]',
    b'3',
    b'{}',
    *(
        json.dumps(whole | o).encode()
        for o in (
            dict(count=2),
            dict(classes=[]),
            dict(shards=['a.tar']),
            dict(shards=[one | dict(name='../a.tar')]),
            dict(shards=[one | dict(name='a; rm x')]),
            dict(shards=[one | dict(name=3)]),
            dict(shards=[one | dict(bytes='9')]),
            dict(shards=3),
        )
    ),
]


@pytest.mark.parametrize('where', ['url', 'folder'])
def test_what_is_no_index_is_refused(server, where):
    o = getattr(server, where)
    for data in others:
        (server.folder / 'train' / 'index.json').write_bytes(data)
        with pytest.raises(ValueError) as e:
            shard_dls(o, 16)
        one_sentence(e, f'{o}/train/index.json is not an index of shards')


def test_shards_that_are_not_complete_elsewhere(server):
    (server.folder / 'train' / 'index.json').write_text(json.dumps(dict(fingerprint='', complete=False)))
    with pytest.raises(ValueError) as e:
        ShardSet(server.url + '/train', v2.Resize(8))
    one_sentence(e, f'the shards of {server.url}/train are not complete')


# --- loaders


def loaders(ready, kind, **kw):
    "Images of 8x8 without chance, so that each can be recognized."
    plain = v2.Resize((8, 8))
    make, path = dict(folder=(folder_dls, ready), shard=(shard_dls, ready / 'shards'))[kind]
    return make(
        path,
        **dict(bs=4, tfms=(plain, plain), mean=None, num_workers=0, device='cpu')
        | (dict(buffer=10) if kind == 'shard' else {})
        | kw,
    )


def seen(batch):
    return [(x.numpy().tobytes(), int(y)) for x, y in zip(*batch)]


def flat(batches):
    return [o for b in batches for o in b]


def passed(dl):
    return [seen(b) for b in dl]


@pytest.fixture(scope='module')
def truth(ready):
    def read(split):
        classes, files, labels = scan_classes(ready / inner / split)
        ds = ImageSet(files, labels, classes, v2.Resize((8, 8)), folder=ready / inner / split)
        return Counter((x.float().div(255).numpy().tobytes(), y) for x, y in (ds[i] for i in range(len(ds))))

    return {o: read(o) for o in ('train', 'val')}


both = pytest.mark.parametrize('kind', ['folder', 'shard'])


def slow_but(quick, rows):
    return [pytest.param(*o, marks=[] if o in quick else pytest.mark.slow) for o in rows]


@both
@pytest.mark.parametrize(
    'world_size,workers,bs',
    slow_but(
        [(1, 0, 4), (3, 0, 4), (2, 2, 3), (30, 0, 4)],
        [(1, 0, 4), (2, 0, 3), (3, 0, 4), (2, 2, 3), (1, 3, 4), (30, 0, 4)],
    ),
)
def test_validation_sees_each_sample_once(ready, truth, kind, world_size, workers, bs):
    ranks = [
        loaders(ready, kind, bs=1, val_bs=bs, rank=r, world_size=world_size, num_workers=workers).valid
        for r in range(world_size)
    ]
    batches = [passed(dl) for dl in ranks]
    assert [len(o) for o in batches] == [len(dl) for dl in ranks]
    assert Counter(flat(flat(batches))) == truth['val']
    sizes = [len(flat(o)) for o in batches]
    assert max(sizes) - min(sizes) <= 1


@both
@pytest.mark.parametrize('world_size,workers', slow_but([(3, 0), (2, 2)], [(1, 0), (2, 0), (3, 0), (2, 2), (1, 3)]))
def test_training_gives_each_rank_as_many_batches(ready, truth, kind, world_size, workers):
    ranks = [
        loaders(ready, kind, rank=r, world_size=world_size, num_workers=workers, seed=3).train
        for r in range(world_size)
    ]
    epochs = [[passed(dl) for dl in ranks] for _ in range(2)]
    for e in epochs:
        assert [len(o) for o in e] == [len(dl) for dl in ranks] == [52 // (4 * world_size)] * world_size and {
            len(b) for b in flat(e)
        } == {4}
        assert (
            Counter(flat(flat(e))) <= truth['train']
            and len(set(flat(flat(e)))) == 52 // (4 * world_size) * 4 * world_size
        )
    assert epochs[0] != epochs[1]
    again = [
        passed(loaders(ready, kind, rank=r, world_size=world_size, num_workers=workers, seed=3).train)
        for r in range(world_size)
    ]
    assert again == epochs[0]
    assert (
        passed(loaders(ready, kind, rank=0, world_size=world_size, num_workers=workers, seed=4).train) != epochs[0][0]
    )


def test_what_is_dropped_differs_between_epochs(ready, truth):
    for kind in ('folder', 'shard'):
        dl = loaders(ready, kind, bs=17).train  # one of 52 is left out
        left = {next(iter(truth['train'] - Counter(flat(passed(dl))))) for _ in range(6)}
        assert len(left) > 1


@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_share_the_batches_of_one_process(ready, world_size):
    kw = dict(tfms=(v2.RandomResizedCrop(8), v2.Resize((8, 8))), seed=5)
    ranks = [passed(loaders(ready, 'folder', rank=r, world_size=world_size, **kw).train) for r in range(world_size)]
    alone = passed(loaders(ready, 'folder', bs=4 * world_size, **kw).train)
    assert [Counter(flat(o)) for o in zip(*ranks)] == [Counter(o) for o in alone]
    assert alone == passed(
        loaders(ready, 'folder', bs=4 * world_size, num_workers=2, **kw).train
    )  # chance does not depend on workers


@both
@pytest.mark.parametrize('workers,start', slow_but([(0, 4), (2, 1)], [(w, s) for w in (0, 2, 3) for s in (1, 4)]))
def test_an_epoch_goes_on_in_its_middle(ready, kind, workers, start):
    kw = dict(tfms=(v2.RandomResizedCrop(8), v2.Resize((8, 8))), num_workers=workers, rank=1, world_size=2)
    dl = loaders(ready, kind, **kw).train
    epochs = [passed(dl) for _ in range(3)]
    resumed = loaders(ready, kind, **kw).train
    resumed.set_epoch(1, start)
    assert passed(resumed) == epochs[1][start:] and passed(resumed) == epochs[2]


def test_copies_of_an_image_go_to_different_ranks(ready):
    def ranks(tfm, world_size):
        for r in range(world_size):
            dl = loaders(ready, 'folder', rank=r, world_size=world_size, tfms=(tfm, tfm)).train
            dl.shuffle_fn = lambda idxs: [i // 2 for i in idxs]  # each image twice in a row
            yield passed(dl)

    a, b = ranks(v2.Resize((8, 8)), 2)
    assert a == b
    a, b = ranks(v2.RandomResizedCrop(8), 2)
    assert a != b


@both
def test_rank_and_world_come_from_the_environment(ready, kind, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '3')
    dls = loaders(ready, kind)
    assert [(o.rank, o.world_size, o.new().rank, o.new().world_size) for o in dls] == [(1, 3, 1, 3)] * 2
    assert (dls.test_dl([]).rank, dls.test_dl([]).world_size) == (0, 1)
    with pytest.raises(RuntimeError, match='do not wrap it'):
        next(dls.train.create_batches([0, 1]))  # as a wrapper calls it
    with pytest.raises(ValueError, match='rank 3 of 3'):
        loaders(ready, kind, rank=3)
    with pytest.raises(ValueError) as e:
        loaders(ready, kind, bs=18)
    one_sentence(e, 'got 52 training images', '18 for each of 3')


@both
def test_pixels_and_their_undoing(ready, kind):
    dls = loaders(ready, kind, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    raw = loaders(ready, kind).valid.one_batch()[0]
    assert raw.dtype == torch.float32 and 0 <= raw.min() < 0.2 < 0.8 < raw.max() <= 1
    x, y = dls.valid.one_batch()
    m, s = (torch.tensor(o).view(3, 1, 1) for o in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(x.as_subclass(torch.Tensor), (raw.as_subclass(torch.Tensor) - m) / s, atol=1e-6)
    assert torch.allclose(dls.valid.decode((x, y))[0], raw, atol=1e-6)
    both = v2.Compose(
        [
            v2.Resize((8, 8)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    done = loaders(ready, kind, mean=IMAGENET_MEAN, std=IMAGENET_STD, tfms=(both, both), normalized=True)
    z, _ = done.valid.one_batch()
    assert torch.allclose(z, x, atol=1e-6) and torch.allclose(done.valid.decode((z, y))[0], raw, atol=1e-6)
    assert any(isinstance(o, Normalize) for o in done.train.after_batch.fs)


@both
@pytest.mark.cuda
def test_batches_on_a_gpu(ready, kind):
    x, y = loaders(ready, kind, mean=IMAGENET_MEAN, std=IMAGENET_STD, device='cuda', pin_memory=True).valid.one_batch()
    assert x.is_cuda and y.is_cuda
    assert torch.allclose(
        x.cpu(), loaders(ready, kind, mean=IMAGENET_MEAN, std=IMAGENET_STD).valid.one_batch()[0], atol=1e-5
    )


def test_plain_tfms():
    train, valid = plain_tfms(32)
    img = Image.fromarray(np.arange(60 * 100 * 3).reshape(60, 100, 3).astype(np.uint8))
    assert train(img).size == valid(img).size == (32, 32) and np.array_equal(
        valid(img), v2.CenterCrop(32)(v2.Resize(37)(img))
    )
    assert np.array_equal(plain_tfms(32, resize=32)[1](img), v2.CenterCrop(32)(v2.Resize(32)(img)))


class Mean(nn.Module):
    "Colors alone."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, x):
        return self.net(x)


@both
def test_a_learner_works_on_both(ready, kind, tmp_path):
    torch.manual_seed(0)
    dls = loaders(ready, kind, mean=IMAGENET_MEAN)
    learn = Learner(dls, Mean(), metrics=accuracy, path=tmp_path)
    classes = sorted(toy_synsets)[:4]
    assert dls.c == 4 and [*dls.vocab] == classes and dls.n_inp == 1
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.fit(3, 1e-2)
        assert learn.validate()[0] < before
        preds, y = learn.get_preds()
        assert preds.shape == (20, 4) and torch.allclose(preds.sum(1), torch.ones(20), atol=1e-5)
        assert accuracy(preds, y) == pytest.approx(learn.validate()[1]) and Counter(y.tolist()) == {
            i: 5 for i in range(4)
        }
        assert len(learn.get_preds(ds_idx=0)[1]) == 52
        files = sorted((ready / inner / 'val' / classes[2]).iterdir())
        name, i, p = learn.predict(files[0])
        assert name == toy_synsets[classes[int(i)]][0].partition(',')[0] and p.argmax() == i
        assert torch.allclose(learn.predict(load_image(files[0]))[2], p) and torch.allclose(
            learn.predict(np.asarray(load_image(files[0])))[2], p
        )
        alone, _ = learn.get_preds(dl=dls.test_dl(files))
        assert torch.allclose(alone[0], p, atol=1e-6) and len(alone) == 5
        with_labels, y = learn.get_preds(dl=dls.test_dl([(f, 2) for f in files], with_labels=True))
        assert torch.equal(with_labels, alone) and y.tolist() == [2] * 5
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 20
        learn.export(tmp_path / 'l.pkl')
        assert (tmp_path / 'l.pkl').stat().st_size < 200_000
        loaded = load_learner(tmp_path / 'l.pkl')
        with loaded.no_bar():
            assert torch.allclose(loaded.predict(files[0])[2], p)


def test_pictures_show_names(ready, monkeypatch):
    import matplotlib.pyplot as plt

    for kind in ('folder', 'shard'):
        dls = loaders(ready, kind)
        dls.show_batch(max_n=4)
        names = {toy_synsets[o][0].partition(',')[0] for o in sorted(toy_synsets)[:4]}
        assert {o.get_title() for o in plt.gcf().axes} <= names
        plt.close('all')
        dls.test_dl(list((ready / inner / 'test').iterdir())[:2]).show_batch()
        assert len(plt.gcf().axes) == 2
        plt.close('all')


def test_top_losses_show_the_right_files(ready):
    learn = Learner(loaders(ready, 'folder'), Mean())
    with learn.no_bar():
        interp = ClassificationInterpretation.from_learner(learn)
        losses, idx = interp.top_losses(3)
        again = nn.functional.cross_entropy(learn.model(interp[idx][0]), interp[idx][2], reduction='none')
    assert torch.allclose(losses, again.detach(), atol=1e-5)
    assert interp.top_losses(3, items=True)[2] == [learn.dls.valid.dataset.items[i] for i in idx]


def test_classes_can_be_told_apart(tmp_path):
    path = toy_imagenet(tmp_path / 'toy', n_classes=6, per_class=24, val_per_class=8, test=1, size=40)
    prepare_val(path / 'LOC_val_solution.csv', path / inner / 'val')
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    net = nn.Sequential(
        *conv(3, 16), *conv(16, 32), *conv(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 6)
    )
    learn = Learner(
        folder_dls(path, 32, bs=16, num_workers=0, device='cpu', tfms=(v2.Resize((32, 32)),) * 2), net, metrics=accuracy
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(8, 3e-3)
        assert learn.validate()[1] > 0.6


def test_data_sets_of_other_classes(ready):
    _, files, labels = scan_classes(ready / inner / 'val')
    a, b = (ImageSet(files, labels, v, v2.Resize((8, 8)), folder=ready / inner / 'val') for v in ('abcd', 'abdc'))
    with pytest.raises(ValueError, match='same classes'):
        class_dls(FolderDL, a, b, 4, None, None)


@pytest.fixture
def command(capsys):
    def run(text):
        "Exit code and what was printed."
        from backbones_nb.cli.cli import main

        code = main(['imagenet', *text.split()])
        return code, ''.join(capsys.readouterr())

    return run


def test_command(tmp_path, command):
    data, shards = (
        toy_imagenet(tmp_path / 'data', n_classes=3, per_class=4, val_per_class=2, test=1, size=32),
        tmp_path / 'shards',
    )
    val = data / inner / 'val'
    theirs = f"prepare --val_solution_path {data / 'LOC_val_solution.csv'} --val_image_dir {val}"
    assert command(f'shard --data {data} --out {shards}') == (
        1,
        f"error: {val} has no class folders, only images: run prepare_val first\n",
    )
    assert not shards.exists()
    assert '6 to move' in command(f'{theirs} --dry-run')[1] and len(list(val.glob('*.JPEG'))) == 6
    lost = val / 'ILSVRC2012_val_00000001.JPEG'
    kept = lost.read_bytes()
    lost.unlink()
    assert (o := command(theirs))[0] == 1 and o[1].endswith('unpack the archive again, or allow missing images\n')
    lost.write_bytes(kept)
    assert '6 moved' in command(theirs)[1] and not list(val.glob('*.JPEG'))
    assert command(theirs) == (0, '0 moved, 6 already there, 0 missing, 0 foreign files\n')
    assert command(f'shard --data {data} --out {shards} --maxcount 5') == (
        0,
        'train: 12 images of 3 classes in 3 shards\nval: 6 images of 3 classes in 2 shards\n',
    )
    shutil.copytree(data / inner / 'train', tmp_path / 'less' / 'train')
    shutil.copytree(val / 'n01443537', tmp_path / 'less' / 'val' / 'n01443537')
    assert (
        'training has 3 classes and validation 1'
        in command(f"shard --data {tmp_path / 'less'} --out {tmp_path / 's'}")[1]
        and not (tmp_path / 's').exists()
    )
    (val / 'n01443537' / 'stranger.JPEG').write_bytes(b'')
    assert (o := command(theirs))[0] == 1 and 'stranger' in o[1]
    assert command(f"shard --data {tmp_path / 'none'} --out {tmp_path / 's'}")[0] == 1


def test_command_that_checks(ready, tmp_path, command):
    data = Path(shutil.copytree(ready / inner, tmp_path / 'data'))
    assert command(f'check --data {data}') == (0, 'broken images in train: none\nbroken images in val: none\n')
    assert 'holds shards, expected images' in command(f"check --data {ready / 'shards'}")[1]
    file = min((data / 'val').glob('*/*'))
    file.write_bytes(file.read_bytes()[:300])
    code, out = command(f'check --data {data} --workers 2')
    assert code == 1 and out.count(str(file)) == 1 and out.endswith('broken images in val: 1\n')


def test_what_commands_say(ready, tmp_path, command, monkeypatch):
    train = (
        f"train --data {ready / 'shards'} --out {tmp_path} "
        '--backbone vovnet19_slim_dw --device cpu --workers 0 --size 32 --bs 8'
    )
    assert (
        (o := command(f'{train} --recipe torchvision'))[0] == 1
        and 'error: ' in o[1]
        and o[1].endswith('pass shuffle=True, or reps=1\n')
        and '█' not in o[1]
    )
    assert (o := command(f'{train} --pretrained'))[0] == 1 and o[1].startswith('error: vovnet19_slim_dw has no')
    assert (o := command(f'evaluate resnet18 --data {ready}'))[0] == 1 and 'IMAGENET1K_V1' in o[1]
    with pytest.raises(SystemExit) as e:
        command('train --data')
    assert e.value.code == 2
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    assert 'pip install webdataset' in command(f"shard --data {ready} --out {tmp_path / 's'}")[1]
    monkeypatch.setenv('BACKBONES_NB_DEBUG', '1')
    with pytest.raises(ImportError):
        command(f"shard --data {ready} --out {tmp_path / 's'}")


def test_command_that_evaluates(ready, command, monkeypatch, tmp_path):
    net = resnet18()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    record = replace(weight_records('resnet18')[0], url=(tmp_path / 'net.pth').as_uri(), sha256=None)
    monkeypatch.setattr('backbones_nb.imagenet.evaluate.pick_weights', lambda *a: record)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    args = f'evaluate resnet18 --data {ready} --size 32 --bs 4 --device cpu --workers'
    assert (
        (o := command(f'{args} 0'))[0] == 0 and '20 images, shorter side 37 px, crop 32 px' in o[1] and '█' not in o[1]
    )
    broken = Path(shutil.copytree(ready / inner, tmp_path / 'data'))
    file = min((broken / 'val').glob('*/*'))
    file.write_bytes(file.read_bytes()[:300])
    code, out = command(f'{args} 1'.replace(str(ready), str(broken)))
    assert (
        code == 1 and 'error: ' in out and f'{file} cannot be read' in out.strip().splitlines()[-1]
    )  # from another process, with its history
