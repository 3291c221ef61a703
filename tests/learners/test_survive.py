"A run of `finetune` that is killed, stopped, started twice, or goes wrong."

import json
import random
import signal
from functools import partial

import pandas as pd
import pytest
import torch
from common import cm, draw_record, train_and_kill
from fastai.callback.core import Callback
from safetensors.torch import load_file

from backbones_nb.cli.cli import main
from backbones_nb.data.coco import to_coco
from backbones_nb.learners import finetune as module, training
from backbones_nb.learners.finetune import finetune, load_run, predict
from backbones_nb.learners.finite import NonFiniteLoss

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    records = [draw_record(i, folder, masks=False) for i in range(14)]
    (folder / 'ann.json').write_text(json.dumps(to_coco(records, cm, images=folder)))
    return folder / 'ann.json'


def options(coco, out, **kw):
    return (
        dict(
            data=str(coco),
            images=str(coco.parent),
            out=str(out),
            detector='retinanet',
            backbone='timm/test_resnet',
            size=64,
            bs=2,
            epochs=2,
            lr=2e-3,
            checkpoint_every=1,
            model_args=dict(neck_channels=8, score_thresh=0.0, topk_candidates=20, detections_per_img=5),
        )
        | kw
    )


def results(out):
    res = json.loads((out / 'metrics.json').read_text())
    weights = {k: (out / f'{k}.safetensors').read_bytes() for k in ('detector', 'best')}
    return (
        weights | {k: res[k] for k in ('metrics', 'mean_box', 'best')} | dict(history=(out / 'history.csv').read_text())
    )


def position(out):
    f = out / 'checkpoint.pt'
    s = torch.load(f, weights_only=True) if f.exists() else dict(fit=0, epoch=0, batch=0)
    return s['fit'], s['epoch'], s['batch']


@pytest.fixture(scope='module')
def whole(coco, tmp_path_factory):
    "The folder of a run of two epochs that nothing stopped, without workers."
    out = tmp_path_factory.mktemp('whole') / 'run'
    finetune(**options(coco, out, workers=0))
    return out


# --- kill -9


@pytest.mark.parametrize('kills,epochs', [(2, 2), pytest.param(20, 5, marks=pytest.mark.slow)])
def test_killed_at_any_moment(coco, tmp_path, kills, epochs, request):
    "The same command continues, bit by bit, with workers and augmentation."
    kw = dict(workers=1, resume=True, epochs=epochs)
    if epochs == 2:
        whole = request.getfixturevalue('whole')
    else:
        whole = tmp_path / 'whole'
        finetune(**options(coco, whole, **kw))
    parts, rng, found = options(coco, tmp_path / 'parts', **kw), random.Random(0), []
    train = partial(finetune, **parts)
    for i in range(kills):
        torn = i == 1 or i == kills // 2
        code = train_and_kill(train, tmp_path / 'parts' / 'checkpoint.pt', 1, torn, rng.uniform(0, 0.3))
        assert code in (0, -signal.SIGKILL)
        found.append(position(tmp_path / 'parts'))
        assert not (tmp_path / 'parts' / 'metrics.json').exists() or i > 2
    finetune(**parts)
    assert results(tmp_path / 'parts') == results(whole)
    assert found == sorted(found) and len(set(found)) > 1 and any(batch for *_, batch in found)
    assert {o.name for o in (tmp_path / 'parts').iterdir()} == {o.name for o in whole.iterdir()}


# --- Ctrl-C, NaN


class At(Callback):
    "Does something before a batch of training."

    order = -200

    def __init__(self, step, f):
        self.step, self.then = step, f

    def before_batch(self):
        if self.training and self.train_iter == self.step:
            self.then(self.learn)


@pytest.fixture
def at(monkeypatch):
    "A function that makes the next runs do something before a step."
    real = training.run_callbacks

    def set_(step, f):
        monkeypatch.setattr(training, 'run_callbacks', lambda *a: [*real(*a), At(step, f)])

    set_.off = lambda: monkeypatch.setattr(training, 'run_callbacks', real)
    return set_


def ctrl_c(learn):
    raise KeyboardInterrupt


def command(kw):
    line = [f'--{k.replace("_", "-")}={v}' for k, v in kw.items() if k != 'model_args']
    return ['finetune', *line, '--set', *(f'{k}={v}' for k, v in kw['model_args'].items())]


def test_ctrl_c_leaves_a_learner_and_says_how_to_continue(coco, whole, tmp_path, at, capsys):
    kw = options(coco, tmp_path / 'run')
    at(8, ctrl_c)
    assert main(command(kw)) == 130
    said = capsys.readouterr()
    line = next(o.strip() for o in said.out.splitlines() if o.strip().startswith('backbones-nb finetune'))
    assert line == f'backbones-nb finetune --resume --out {tmp_path / "run"}' and 'stopped' in said.err
    image = next(coco.parent.glob('*.png'))
    assert main(['predict', str(tmp_path / 'run'), str(image)]) == 0
    sd = load_file(tmp_path / 'run' / 'detector.safetensors')
    assert all(torch.equal(v, sd[k]) for k, v in load_run(tmp_path / 'run').model.state_dict().items())
    assert len(pd.read_csv(tmp_path / 'run' / 'history.csv')) == 1
    assert not (tmp_path / 'run' / 'metrics.json').exists()
    at.off()
    for change, words in ((['--bs=4'], 'bs=4'), (['--force'], 'got force together with resume')):
        assert main(line.split()[1:] + change) == 1 and words in capsys.readouterr().err
    assert main(line.split()[1:]) == 0
    assert results(tmp_path / 'run') == results(whole)
    before = (tmp_path / 'run' / 'learner.pkl').stat().st_mtime_ns
    assert main(line.split()[1:]) == 0 and 'AP50' in capsys.readouterr().out  # a finished run is only reported
    assert (tmp_path / 'run' / 'learner.pkl').stat().st_mtime_ns == before


def test_nan_stops_the_run_and_keeps_finite_weights(coco, tmp_path, capsys):
    kw = options(coco, tmp_path / 'run', lr=1e6, epochs=30, checkpoint_every=100)
    assert main(command(kw)) == 1
    err = capsys.readouterr().err
    assert 'error: the loss is ' in err and ' in step ' in err and '.png' in err and '(epoch ' in err
    sd = load_file(tmp_path / 'run' / 'detector.safetensors')
    assert all(v.isfinite().all() for v in sd.values()) and not (tmp_path / 'run' / 'metrics.json').exists()
    assert all(v.isfinite().all() for v in load_run(tmp_path / 'run').model.state_dict().values())


def test_weights_that_are_not_finite_any_more(coco, tmp_path, at):
    def spoil(learn):
        with torch.no_grad():
            next(iter(learn.model.parameters())).fill_(float('inf'))

    at(3, spoil)
    with pytest.raises(NonFiniteLoss, match=r'in step 4 \(epoch 0, batch 4 of 5\)'):
        finetune(**options(coco, tmp_path / 'run', force=True))
    assert all(v.isfinite().all() for v in load_file(tmp_path / 'run' / 'detector.safetensors').values())


# --- one folder


def test_an_older_run_never_answers_for_a_new_one(coco, tmp_path, monkeypatch, at):
    kw = options(coco, tmp_path / 'run', epochs=1)
    finetune(**kw)
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='--resume, or overwrite it with --force'):
        finetune(**kw)
    with pytest.raises(ValueError, match='does not exist|there is no'):
        finetune(**kw | dict(force=True, backbone='timm/nothing'))
    old = {o.name: o.read_bytes() for o in (tmp_path / 'run').iterdir()}
    assert {'learner.pkl', 'metrics.json', 'predictions.png', 'notes.txt'} <= old.keys()  # a refusal costs nothing
    monkeypatch.setattr(module, 'train_run', lambda *a: ctrl_c(a))
    with pytest.raises(KeyboardInterrupt):
        finetune(**kw | dict(force=True, seed=1))
    assert {o.name for o in (tmp_path / 'run').iterdir()} == {'config.json', 'train.txt', 'valid.txt', 'notes.txt'}
    with pytest.raises(FileNotFoundError, match='finished run'):
        predict(tmp_path / 'run', [next(coco.parent.glob('*.png'))])


def test_two_runs_in_one_folder(coco, tmp_path, at):
    kw = options(coco, tmp_path / 'run', epochs=1)
    said = []

    def second(learn):
        with pytest.raises(FileExistsError, match='another run is writing') as e:
            finetune(**kw)
        said.append(e)

    at(2, second)
    finetune(**kw)
    assert said and not (tmp_path / 'run' / '.lock').exists()


@pytest.mark.parametrize('name', ['train.txt', 'metrics.json', 'predictions.png', 'config.json'])
def test_files_of_the_user_are_not_overwritten(coco, tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    for force in (False, True):
        with pytest.raises(FileExistsError, match=f'holds no run, but a file {name}'):
            finetune(**options(coco, tmp_path, force=force))
    assert (tmp_path / name).read_text() == '{"mine": 1}' and [o.name for o in tmp_path.iterdir()] == [name]


def test_an_error_after_training_costs_no_weights(coco, tmp_path, monkeypatch, capsys):
    def broken(*a, **kw):
        raise RuntimeError('no ink')

    kw = options(coco, tmp_path / 'run', epochs=1)
    monkeypatch.setattr(module, '_evaluate_run', broken)
    assert main(command(kw)) == 1 and 'no ink' in capsys.readouterr().err
    assert load_run(tmp_path / 'run') and (tmp_path / 'run' / 'detector.safetensors').exists()
    monkeypatch.undo()
    monkeypatch.setattr(module, 'show_side_by_side', broken)
    assert main([*command(kw), '--resume']) == 0 and (tmp_path / 'run' / 'metrics.json').exists()
    assert 'warning: there is no picture (RuntimeError: no ink); the run is complete' in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*command(kw), '--resume']) == 0


class Numbered:
    def __init__(self, i):
        self.i = i

    def image(self):
        return self.i


@pytest.mark.parametrize('n', [1, 2, 6, 8, 9, 348])
def test_the_picture_shows_each_image_once_from_the_first_to_the_last(n, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, 'show_side_by_side', lambda images, *rest: drawn.extend(images))
    module._save_picture(cm, [Numbered(i) for i in range(n)], [None] * n, [None] * n, tmp_path / 'p.png')
    assert len(drawn) == len(set(drawn)) == min(8, n) and (drawn[0], drawn[-1]) == (0, n - 1)


def test_early_stopping_and_the_best_epoch(coco, tmp_path):
    kw = options(coco, tmp_path / 'run', epochs=6, patience=2, lr=1e-9)  # nothing gets better
    res = finetune(**kw)
    rows = pd.read_csv(tmp_path / 'run' / 'history.csv')
    assert len(rows) == res['best']['epoch'] + 2 < 6 and res['best']['AP'] == pytest.approx(rows.AP.max())


def test_a_broken_checkpoint_is_refused(coco, tmp_path, at):
    kw = options(coco, tmp_path / 'run', epochs=1)
    at(2, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        finetune(**kw)
    file = tmp_path / 'run' / 'checkpoint.pt'
    state = torch.load(file, weights_only=True)
    nan = {k: v * float('nan') if v.is_floating_point() else v for k, v in state['model'].items()}
    changes = dict(epoch=-1), dict(epoch=99), dict(batch=-3), dict(rng=[{}]), dict(model={}), dict(model=nan), None
    at.off()
    for o in changes:
        torch.save({} if o is None else state | o, file)
        with pytest.raises(ValueError, match='cannot be read as a checkpoint .*remove it to start over'):
            finetune(**kw, resume=True)
