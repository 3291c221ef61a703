import inspect
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
import torchvision
from common import in_two_processes, noise, train_and_kill
from fastai.callback.core import Callback
from fastcore.docments import docments
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2

from backbones_nb.core.create import create_backbone
from backbones_nb.core.published import weight_records, WeightRecord
from backbones_nb.imagenet.folders import prepare_val, scan_classes, synset_names
from backbones_nb.imagenet.toy import toy_imagenet
from backbones_nb.data.records import load_image
from backbones_nb.imagenet.shards import write_shards
from backbones_nb.learners.ema import find_ema
from backbones_nb.imagenet.train import train_imagenet, TrainConfig
from backbones_nb.imagenet.evaluate import (
    _class_numbers,
    eval_tfm,
    evaluate_imagenet,
    _Evaluation,
    interpolation,
    published_classifier,
)
from tools.proc import run

torch.set_num_threads(1)
inner = Path('ILSVRC') / 'Data' / 'CLS-LOC'
small = dict(
    backbone='timm/test_efficientnet',
    recipe='vt_default',
    amp='off',
    epochs=3,
    warmup=0.5,
    bs=4,
    size=32,
    every=2,
    workers=0,
    ema=0.9,
    device='cpu',
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "33 images of training, 9 of validation, in folders and in shards."
    path = toy_imagenet(
        tmp_path_factory.mktemp('data') / 'imagenet', n_classes=3, per_class=11, val_per_class=3, test=1, size=40
    )
    prepare_val(path / 'LOC_val_solution.csv', path / inner / 'val')
    for o in ('train', 'val'):
        write_shards(path / inner / o, path / 'shards' / o, maxcount=7, progress=False)
    return path


def results(out):
    return {
        o.name: o.read_bytes()
        for o in (out / 'net.safetensors', out / 'average.safetensors', out / 'history.csv')
        if o.exists()
    }


def position(out):
    s = torch.load(out / 'checkpoint.pt', weights_only=True)
    return s['epoch'], s['batch']


class Stop(Callback):
    "Ctrl-C between two batches."

    order = -200

    def __init__(self, at):
        self.at = at

    def before_batch(self):
        if self.training and self.train_iter == self.at:
            raise KeyboardInterrupt


# --- resume

options = dict(
    fp16=dict(amp='fp16', erase=1.0, workers=1, every=1, epochs=1),
    bf16=dict(amp='bf16', ema=0),
    accumulate=dict(accum_steps=2, bs=3, clip=1.0, channels_last=True, every=1, ema_steps=2),
    repeated=dict(reps=3),
)


stops = dict(fp16=[5], bf16=[13], accumulate=[13], repeated=[13])  # inside the first epoch and inside the second


@pytest.mark.parametrize('name', options)
def test_interrupted_and_resumed(data, tmp_path, name, slow_run):
    kw = small | dict(epochs=2) | options[name]
    train_imagenet(data, tmp_path / 'whole', **kw)
    for at in (5, 13)[: kw['epochs']] if slow_run else stops[name]:
        with pytest.raises(KeyboardInterrupt):
            train_imagenet(data, tmp_path / 'parts', cbs=[Stop(at)], **kw)
        epoch, batch = position(tmp_path / 'parts')
        assert epoch == (at > 8) and batch, 'inside an epoch'
    train_imagenet(data, tmp_path / 'parts', **kw)
    assert results(tmp_path / 'parts') == results(tmp_path / 'whole')


def test_shards_are_resumed(data, tmp_path):
    kw = small | dict(epochs=1, workers=2)
    train_imagenet(data / 'shards', tmp_path / 'whole', **kw)
    with pytest.raises(KeyboardInterrupt):
        train_imagenet(data / 'shards', tmp_path / 'parts', cbs=[Stop(5)], **kw)
    assert position(tmp_path / 'parts') == (0, 4)
    with pytest.raises(ValueError, match='with data.workers=2, and this one has data.workers=1'):
        train_imagenet(data / 'shards', tmp_path / 'parts', **kw | dict(workers=1))
    train_imagenet(data / 'shards', tmp_path / 'parts', **kw)
    assert results(tmp_path / 'parts') == results(tmp_path / 'whole')


def test_every_batch_but_the_last_has_a_checkpoint_of_its_own(data, tmp_path):
    "The last one's is that of the epoch."
    n = 33 // 4
    for at, found in ((n - 1, (0, n - 1)), (n, (1, 0))):
        with pytest.raises(KeyboardInterrupt):
            train_imagenet(data, tmp_path / str(at), cbs=[Stop(at)], **small | dict(epochs=2, every=1))
        assert position(tmp_path / str(at)) == found


@pytest.mark.parametrize('epochs,kills', [(2, 2), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_killed_at_any_moment(data, tmp_path, epochs, kills):
    kw, rng, found = small | dict(epochs=epochs, workers=1, every=1), random.Random(0), []
    train_imagenet(data, tmp_path / 'whole', **kw)
    train = partial(train_imagenet, data, tmp_path / 'parts', **kw)
    for i in range(kills):
        code = train_and_kill(train, tmp_path / 'parts' / 'checkpoint.pt', 2, i == kills // 2, rng.uniform(0, 0.2))
        assert code == -signal.SIGKILL
        found.append(position(tmp_path / 'parts'))
    assert found == sorted(set(found)) and any(batch for _, batch in found)
    train_imagenet(data, tmp_path / 'parts', **kw)
    assert results(tmp_path / 'parts') == results(tmp_path / 'whole')


def test_a_finished_training_is_only_measured(data, tmp_path):
    first = train_imagenet(data, tmp_path, **small | dict(epochs=1))
    before = (tmp_path / 'checkpoint.pt').stat().st_mtime_ns
    again = train_imagenet(data, tmp_path, **small | dict(epochs=1))
    assert (
        all(first.results[k] == again.results[k] for k in ('net', 'average'))
        and (tmp_path / 'checkpoint.pt').stat().st_mtime_ns == before
    )


# --- what it writes


def test_results(data, tmp_path):
    learn = train_imagenet(data, tmp_path, **small | dict(epochs=2, log='tensorboard', weights='pth'))
    res, table = json.loads((tmp_path / 'metrics.json').read_text()), pd.read_csv(tmp_path / 'history.csv')
    assert (
        res == json.loads(json.dumps(learn.results)) and res['images'] == 9 and res['config']['recipe']['epochs'] == 2
    )
    assert list(table) == ['epoch', 'train_loss', 'valid_loss', 'top1', 'top5'] and table.epoch.tolist() == [0, 1]
    assert table.valid_loss.iloc[-1] == pytest.approx(res['average']['loss'])  # the fit validates with the average
    x, y = zip(*[(b[0], b[1]) for b in learn.dls.valid])
    pred = torch.cat([learn.model.eval()(o) for o in x])
    y = torch.cat(y)
    assert (
        res['net']['top1'] == pytest.approx(100 * float((pred.argmax(1) == y).float().mean()))
        and res['net']['top5'] == 100
    )
    assert res['net']['loss'] == pytest.approx(float(learn.loss_func(pred, y)), rel=1e-4)
    sd = torch.load(tmp_path / 'net.pth', weights_only=True)
    assert all(torch.equal(v, sd[k]) for k, v in learn.model.state_dict().items()) and list(
        (tmp_path / 'tensorboard').iterdir()
    )


# --- many processes


two = dict(backbone='timm/test_convnext', epochs=2, size=32, workers=0, device='cpu', amp='off', warmup=0.5)


def train_and_resume(rank, data, out):
    learn = train_imagenet(data, out / 'two', bs=2, **two)
    torch.save(learn.model.state_dict(), out / f'two-{rank}.pt')
    kw = small | dict(epochs=1, bs=2)
    train_imagenet(data, out / 'whole', **kw)
    with pytest.raises(KeyboardInterrupt):
        train_imagenet(data, out / 'parts', cbs=[Stop(5)], **kw)
    learn = train_imagenet(data, out / 'parts', **kw)
    torch.save(
        dict(net=learn.model.state_dict(), average=find_ema(learn).average.state_dict()), out / f'parts-{rank}.pt'
    )


def test_two_processes(data, tmp_path):
    in_two_processes(train_and_resume, data, tmp_path)
    one = train_imagenet(data, tmp_path / 'one', bs=4, **two)
    a, b = (torch.load(tmp_path / f'two-{i}.pt', weights_only=True) for i in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (
        max(float((v - a[k]).abs().max()) for k, v in one.model.state_dict().items()) < 1e-5
    )  # no batch norm in this net
    res = json.loads((tmp_path / 'two' / 'metrics.json').read_text())
    assert res['net'] == pytest.approx(one.results['net'], rel=1e-4)  # 9 images: 4 for one process, 5 for the other
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / o / 'history.csv') for o in ('one', 'two')), rtol=1e-4)
    a, b = (torch.load(tmp_path / f'parts-{i}.pt', weights_only=True) for i in (0, 1))
    for k in a:
        assert all(torch.equal(a[k][n], b[k][n]) for n in a[k])
    assert results(tmp_path / 'parts') == results(tmp_path / 'whole')
    assert all(torch.equal(v, a['net'][k]) for k, v in load_file(tmp_path / 'parts' / 'net.safetensors').items())


@pytest.mark.slow
@pytest.mark.parametrize(
    'launch',
    [
        'torch.distributed.run --standalone --nproc_per_node=2',
        'accelerate.commands.launch --multi_gpu --num_processes 2',
    ],
    ids=lambda o: o.split('.')[0],
)
def test_launched(data, tmp_path, launch):
    args = (
        f'-m {launch} -m backbones_nb.cli.imagenet train --data {data} --out {tmp_path}/run '
        '--backbone timm/test_efficientnet --recipe vt_default --amp off --epochs 1 --set warmup=.5 '
        '--bs 2 --size 32 --workers 0 --device cpu'
    )
    p = run(sys.executable, '-W', 'ignore', *args.split(), env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert p.returncode == 0, p.stderr[-3000:]
    res, one = (
        json.loads((tmp_path / 'run' / 'metrics.json').read_text()),
        train_imagenet(data, tmp_path / 'one', **small | dict(epochs=1, bs=4, ema=None)),
    )
    assert res['processes'] == 2 and res['images'] == 9 and res['lr'] == pytest.approx(one.results['lr'])


# --- published weights


@pytest.fixture
def record(data, tmp_path):
    "Weights in torchvision's form that take 2 of the 9 images for something else."
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    tfm = eval_tfm(WeightRecord('resnet18', 'IMAGENET1K_V1', 'torchvision', **sizes))
    classes, files, labels = scan_classes(data / inner / 'val')
    x = torch.stack([tfm(load_image(data / inner / 'val' / os.fsdecode(f))) for f in files])
    goal = torch.tensor([sorted(synset_names()).index(classes[i]) for i in labels])
    goal[[0, 4]] = 999
    with torch.no_grad():
        net.fc = nn.Identity()
        seen = net(x).double()
        net.fc = nn.Linear(512, 1000)
        net.fc.weight.copy_((torch.linalg.pinv(seen) @ (10 * nn.functional.one_hot(goal, 1000)).double()).T)
        net.fc.bias.zero_()
    torch.save(net.state_dict(), tmp_path / 'resnet18.pth')
    return WeightRecord(
        'resnet18',
        'IMAGENET1K_V1',
        'torchvision',
        url=(tmp_path / 'resnet18.pth').as_uri(),
        license='mit',
        metrics={'acc@1': 70.0},
        drop=(r'^fc\.',),
        **sizes,
    )


sizes = dict(input_size=32, resize_size=37, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))


@pytest.mark.parametrize('folder', ['', 'shards'])
def test_published_weights_are_measured(data, record, folder):
    res = evaluate_imagenet('resnet18', data / folder, record, bs=4, workers=0, device='cpu')
    assert (
        res
        == _Evaluation('resnet18', 'IMAGENET1K_V1', pytest.approx(700 / 9), res.top5, 70.0, None, 9, 32, 37, 'bilinear')
        and 77 < res.top5 <= 100
    )
    assert 'top-1 77.78 % (published: 70.00 %)' in str(res) and '(published: not stated)' in str(res)


def test_how_images_are_prepared():
    def tfm(*a, **kw):
        return [
            getattr(o, 'size', None) for o in eval_tfm(*a, **kw).transforms if isinstance(o, (v2.Resize, v2.CenterCrop))
        ]

    r = weight_records('darknet53')[0]
    assert (
        (r.publisher, interpolation(r)) == ('timm', 'bicubic')
        and tfm(r) == [[288], (256, 256)]
        and tfm(r, size=128) == [[144], (128, 128)]
        and tfm(r, 288, 300) == [[300], (288, 288)]
    )
    assert (
        interpolation(weight_records('efficientnet_b0')[0]) == 'bicubic'
        and interpolation(weight_records('resnet50')[0]) == 'bilinear'
    )
    assert [o for o in eval_tfm(r).transforms if isinstance(o, v2.Resize)][
        0
    ].interpolation == v2.InterpolationMode.BICUBIC


def test_classes_of_the_data_among_those_of_the_net():
    ids = sorted(synset_names())
    assert (
        _class_numbers(ids, 1000).tolist() == list(range(1000))
        and _class_numbers([ids[7], ids[900]], 1000).tolist() == [7, 900]
        and _class_numbers('ab', 2).tolist() == [0, 1]
    )
    for vocab, n in (('ab', 1000), (ids[:3], 5)):
        with pytest.raises(ValueError, match=f'data with {len(vocab)} classes and a model with {n}'):
            _class_numbers(vocab, n)


# --- what is refused

wrong = dict(
    recipe=(dict(recipe='vt_smal'), "got the recipe 'vt_smal'.*vt_small"),
    field=(dict(warmpu=1), "recipe has no field 'warmpu'.*warmup"),
    epochs=(dict(epochs=0), 'with epochs=0, expected a whole number'),
    log=(dict(log='csvs'), "got log='csvs'"),
    amp=(dict(amp='fp8'), "got amp='fp8'"),
    weights=(dict(weights='h5'), "got weights='h5'"),
    every=(dict(every=0), 'got every=0'),
    loader=(dict(accum_steps=0), "got .*accum_steps=0"),
    sync=(dict(sync_bn=True), 'sync_bn=True on cpu'),
    bs=(dict(bs=100), '33 training images.*at least one batch of 100'),
    short=(dict(epochs=1, warmup=5), 'warm-up of 5'),
    backbone=(dict(backbone='timm/test_efficientnt'), 'test_efficientnet'),
)


@pytest.mark.parametrize('name', wrong)
def test_wrong_arguments(data, tmp_path, name):
    kw, message = wrong[name]
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        train_imagenet(data, tmp_path, **small | kw)
    assert not (tmp_path / 'checkpoint.pt').exists()


def test_other_images_are_not_mixed_in(data, tmp_path):
    kw, mine = small | dict(epochs=1), tmp_path / 'imagenet'
    shutil.copytree(data / inner, mine)
    train_imagenet(mine, tmp_path / 'run', **kw)
    stem = max(o.name for o in (mine / 'train').iterdir())
    for o in ('train', 'val'):
        (mine / o / stem).rename(mine / o / 'n99999999')
    with pytest.raises(ValueError, match="data.classes=.*data.train.files='.*data.valid.files="):
        train_imagenet(mine, tmp_path / 'run', **kw)
    with pytest.raises(ValueError, match="data.train.kind='folders'.*this one has data.train.kind='shards'"):
        train_imagenet(data / 'shards', tmp_path / 'run', **kw)


def test_a_finished_run_keeps_its_figures(data, tmp_path):
    kw = small | dict(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train_imagenet(data, tmp_path, cbs=[Stop(13)], **kw)
    first = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)['seconds']
    train_imagenet(data, tmp_path, **kw)
    res = json.loads((tmp_path / 'metrics.json').read_text())
    assert (
        res['seconds'] >= first > 0
        and res['processes'] == 1
        and res['lr'] == pytest.approx(train_imagenet(data, tmp_path, **kw).lr)
    )
    assert json.loads((tmp_path / 'metrics.json').read_text()) == res


def test_tensorboard_after_an_interruption(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kw = small | dict(epochs=2, log='tensorboard', every=5)
    with pytest.raises(KeyboardInterrupt):
        train_imagenet(data, tmp_path, cbs=[Stop(13)], **kw)  # continues from step 10
    time.sleep(1.1)  # event files are sorted by the second in their names
    train_imagenet(data, tmp_path, **kw)
    seen = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [o.step for o in seen.Scalars('train_loss')] == list(range(1, 17)) and [
        o.step for o in seen.Scalars('top1')
    ] == [8, 16]


def test_wandb_that_is_absent(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ImportError, match="log='wandb' needs .*pip install wandb"):
        train_imagenet(data, tmp_path, **small | dict(log='wandb'))


def test_another_training_is_not_mixed_in(data, tmp_path):
    kw = small | dict(epochs=1)
    train_imagenet(data, tmp_path, **kw)
    for change, message in (
        (dict(seed=3), 'with seed=0, and this one has seed=3'),
        (dict(epochs=2), 'n_epoch=1'),
        (dict(bs=8), 'bs=4'),
    ):
        with pytest.raises(ValueError, match=message):
            train_imagenet(data, tmp_path, **kw | change)
    with pytest.raises(ValueError, match='contains a checkpoint: continue'):
        train_imagenet(data, tmp_path, resume=False, **kw)
    (tmp_path / 'checkpoint.pt').write_bytes((tmp_path / 'checkpoint.pt').read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        train_imagenet(data, tmp_path, **kw)


@pytest.mark.parametrize('name', ['metrics.json', 'history.csv', 'net.safetensors'])
def test_files_of_the_user_are_kept(data, tmp_path, name, capsys):
    from backbones_nb.cli.cli import main

    (tmp_path / name).write_text('mine')
    assert main(['imagenet', 'train', '--data', str(data), '--out', str(tmp_path), '--device', 'cpu']) == 1
    assert f'holds no run, but a file {name} that a run would overwrite' in capsys.readouterr().err
    assert (tmp_path / name).read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


def test_the_command(data, tmp_path, capsys):
    from backbones_nb.cli.cli import main

    out = tmp_path / 'out'
    args = f'imagenet train --out {out} --device cpu --workers 0 --size 32 --epochs 1 --bs 8'.split()
    for more, message in (
        (['--data', str(tmp_path / 'nothing')], 'there is no folder'),
        (['--data', str(data), '--set', 'warmup'], 'expected FIELD=VALUE'),
        (['--data', str(data)], 'warm-up of 5 epochs'),
    ):
        assert main(args + more) == 1
        err = capsys.readouterr().err
        assert 'error: ' in err and message in err
    more = f'--data {data} --backbone timm/test_efficientnet --set warmup=0.5 trivial=False'.split()
    more += '--channels-last --no-resume --no-sync-bn --acc 2'.split()
    assert not main(args + more)
    c = json.loads((out / 'metrics.json').read_text())['config']
    r = c['recipe']
    assert (r['warmup'], r['trivial'], r['channels_last']) == (0.5, False, True)
    assert (r['name'], c['acc']) == ('vt_small', 2) and '"top1"' in capsys.readouterr().out
    assert not main(args + [o for o in more if o != '--no-resume'] + ['--resume'])


def test_a_frozen_row_of_settings():
    names = list(inspect.signature(train_imagenet).parameters)
    assert (
        names[:5] == ['data', 'out', 'backbone', 'recipe', 'cbs']
        and {'bs', 'accum_steps', 'resume'} <= {*names}
        and 'bs' in docments(TrainConfig)
    )


def test_weights_without_a_head(data):
    with pytest.raises(
        ValueError, match="weights 'vt' of vovnet39 are of the backbone only, so there is no classifier"
    ):
        evaluate_imagenet('vovnet39', data, 'vt', device='cpu')


def test_heads_that_are_not_linear(tmp_path):
    net = torchvision.models.mobilenet_v3_small().eval()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    r = replace(weight_records('mobilenet_v3_small')[0], url=(tmp_path / 'net.pth').as_uri(), sha256=None)
    x = noise(32)
    assert torch.equal(published_classifier('mobilenet_v3_small', r)[0](x), net(x))
    net = timm.create_model('test_resnet').eval()
    torch.save(net.state_dict(), tmp_path / 'timm.pth')
    r = replace(
        weight_records('timm/test_resnet')[0],
        hub_id=None,
        url=(tmp_path / 'timm.pth').as_uri(),
        name='timm/test_resnet',
    )
    assert torch.equal(published_classifier('timm/test_resnet', r)[0](x), net(x))
    torch.save(create_backbone('darknet19', variant='vt').state_dict(), tmp_path / 'body.pth')
    r = WeightRecord(
        'darknet19', 'mine', 'us', url=(tmp_path / 'body.pth').as_uri(), license='mit', config=dict(variant='vt')
    )
    with pytest.raises(ValueError, match="'mine' of darknet19 are of the backbone only"):
        published_classifier('darknet19', r)


class FakeWandb(SimpleNamespace):
    run = None

    def init(self, **kw):
        self.given, self.run, self.seen = kw, SimpleNamespace(step=0, summary={}), {}

    def log(self, values, step=None):
        self.seen |= values


def test_wandb(data, tmp_path, monkeypatch):
    fake = FakeWandb(config=SimpleNamespace(update=lambda *a, **kw: None))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    learn = train_imagenet(data, tmp_path / 'run', **small | dict(epochs=1, log='wandb'))
    assert fake.given['config'] == learn.results['config'] and (fake.given['name'], fake.given['dir']) == (
        'run',
        tmp_path / 'run',
    )
    assert (
        fake.seen['valid_loss'] == pytest.approx(learn.results['average']['loss'])
        and {'top1', 'top5', 'train_loss', 'epoch'} <= fake.seen.keys()
    )
    first, fake.run = fake.given, None
    train_imagenet(data, tmp_path / 'run', **small | dict(epochs=1, log='wandb'))
    assert fake.given['id'] == first['id'] and fake.given['resume'] == 'allow', (
        'the same folder continues with the same run'
    )
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb')  # it holds the fake


def test_console_command(tmp_path, capsys):
    from backbones_nb.cli.cli import main as console

    args = f'imagenet train --data {tmp_path}/nothing --out {tmp_path}/run --epochs 1 --set warmup=0'
    assert console(args.split()) == 1
    assert 'error: there is no folder' in capsys.readouterr().err
    assert console(['imagenet', 'evaluate', 'vovnet38', '--data', str(tmp_path)]) == 1
    assert "Did you mean 'vovnet39'" in capsys.readouterr().err
