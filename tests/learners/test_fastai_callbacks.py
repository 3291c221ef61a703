"""fastai's features on each family of detectors: what they are for has happened.

`to_distributed` is in test_distributed.py, where two processes run anyway."""

import csv
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from cases import at_once, DETECTORS, Tiny
from common import cm, draw_record
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.optimizer import SGD
from torch import nn

from backbones_nb.data.batches import detection_dls
from backbones_nb.learners.checkpoint import Accumulate
from backbones_nb.learners.detection import detection_learner

UP = -1e-2  # a learning rate that climbs: each epoch is worse than the one before
STEP = 1e-2


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    "Two batches of two images, the same ones for training and validation."
    folder = tmp_path_factory.mktemp('four')
    four = [draw_record(i, folder) for i in range(4)]
    return detection_dls(four, four, cm, size=64, bs=2, augment=None, seed=0, cache=True, device='cpu', path=folder)


@pytest.fixture(scope='module', params=DETECTORS)
def net(request, dls):
    "A detector and its state, with the statistics of the data."
    torch.manual_seed(0)
    kw = dict(img_size=64) if request.param == 'efficientdet' else {}
    res = at_once(DETECTORS[request.param](num_classes=3, backbone=Tiny(), **kw))
    x, y = dls.train.one_batch()
    with torch.no_grad():
        res.train()(x.as_subclass(torch.Tensor), list(y))
    return res, deepcopy(res.state_dict())


@pytest.fixture
def learn(net, dls, tmp_path):
    model, state = net
    model.load_state_dict(state)
    model.train().requires_grad_(True).zero_grad()
    dls.train.set_epoch(0)
    res = detection_learner(dls, model, opt_func=partial(SGD, mom=0.0), path=tmp_path)
    res.remove_cb(res.progress)
    res.logger = lambda *a: None
    return res


def state(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


class Keep(Callback):
    "States after each epoch, batches with the random numbers before them, validation batches."

    def before_fit(self):
        self.states, self.batches, self.valid = [], [], []

    def before_batch(self):
        if self.training:
            self.batches.append((torch.get_rng_state(), self.xb, self.yb))
        else:
            self.valid.append(self.yb)

    def after_epoch(self):
        self.states.append(state(self.learn))


def test_summary(learn):
    before = state(learn)
    table, params = learn.summary(), dict(learn.model.named_parameters())
    owners = {k.rpartition('.')[0] for k in params}
    rows = {r['layer']: r for r in table}
    assert owners <= rows.keys() <= dict(learn.model.named_modules()).keys() and len(rows) == len(table)
    assert sum(r['parameters'] for r in table) == sum(p.numel() for p in params.values()) == table.foot['parameters']
    stem = next(n for n in owners if n.endswith('stem.conv'))
    assert (rows[stem]['type'], rows[stem]['output'], rows[stem]['calls']) == ('Conv2d', '1 x 8 x 32 x 32', 1)
    levels = len(learn.model.backbone.strides)
    assert max(r['calls'] for r in table) >= levels  # a head that all levels share
    learn.freeze()
    free = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    frozen = learn.summary()
    assert 0 < free < frozen.foot['parameters'] and frozen.foot['trained'] == sum(r['trained'] for r in frozen) == free
    for word in ('SGD', 'first 3 of', 'LossMeans', *learn.model.loss_names):
        assert word in str(frozen), word
    assert (
        same(before, state(learn)) and learn.model.training and not any(m._forward_hooks for m in learn.model.modules())
    )


def test_lr_find(learn):
    before = state(learn)
    found = learn.lr_find(1e-5, 1e-1, num_it=12, show_plot=False)
    lrs = np.array(learn.recorder.lrs)
    assert 1e-5 <= found.valley <= lrs.max() <= 0.1 and len(lrs) > 6
    assert np.diff(np.log(lrs)) == pytest.approx(np.log(1e4) / 12, rel=1e-4)
    assert len(set(learn.recorder.losses)) > 6 and same(before, state(learn))


def test_fine_tune(learn):
    moved, body = [], next(m for m in learn.model.modules() if isinstance(m, Tiny))
    convs = {id(m.weight) for m in body.modules() if isinstance(m, nn.Conv2d)}

    class Moved(Callback):
        def before_fit(self):
            self.was = {id(p): p.detach().clone() for p in self.learn.model.parameters()}

        def after_fit(self):
            ps = self.learn.model.parameters()
            moved.append({id(p) for p in ps if not torch.equal(p, self.was[id(p)])})

    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p)  # as an earlier fit leaves them: weight decay needs no more to move a weight
    learn.wd = 0.1
    learn.fine_tune(1, STEP, cbs=Moved())
    groups = [{id(p) for p in g} for g in learn.model.param_groups()]
    first, second = moved
    assert not first & convs and all(first & g for g in groups[learn.n_backbone :])
    assert convs <= second and all(second & g for g in groups)


def test_show_results(learn):
    dl = learn.dls.valid
    fig = learn.show_results(score_thr=0.0, shuffle=False)
    preds, targets = learn.get_preds(dl=[dl.one_batch()], score_thr=0.0)
    boxes = [sum(p.get_gid() == 'box' for p in ax.patches) for ax in fig.axes]
    layers = [len(ax.images) - 1 for ax in fig.axes]  # besides the image, one for each mask
    want = [len(o['boxes']) for pair in zip(targets, preds) for o in pair]
    assert boxes == want and min(want) > 0
    assert layers[::2] == want[::2]  # targets have masks in any case
    assert layers[1::2] == [n * ('loss_mask' in learn.model.loss_names) for n in want[1::2]]


def test_csv_logger(learn, tmp_path):
    learn.fit(2, STEP, cbs=CSVLogger())
    head, *rows = csv.reader((tmp_path / 'history.csv').open())
    assert head == list(learn.recorder.metric_names)
    parts = [o.removeprefix('loss_') for o in learn.model.loss_names]
    assert {f'{o}_{p}' for o in ('train', 'valid') for p in parts} | {'AP', 'AP50', 'valid_loss'} <= set(head)
    assert [r[0] for r in rows] == ['0', '1']
    for r, want in zip(rows, learn.recorder.values):
        assert [float(o) for o in r[1:-1]] == pytest.approx(list(want))


def test_tensorboard(learn, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn.fit(1, STEP, cbs=TensorBoardCallback(log_dir=tmp_path))
    log = EventAccumulator(str(tmp_path)).Reload()
    names = list(learn.recorder.metric_names)[2:-1]
    seen = {k: [(o.step, o.value) for o in log.Scalars(k)] for k in log.Tags()['scalars']}
    want = learn.recorder.values[-1][1:]
    assert len(want) == len(names) > 6
    assert {k: seen[k] for k in names} == {k: [(2, pytest.approx(v, rel=1e-5))] for k, v in zip(names, want)}
    assert {o for o, _ in seen['train_loss']} == {1, 2}  # fastai repeats the last one in validation
    rates = [dict(seen[f'lr_{i}']) for i in range(len(learn.model.param_groups()))]
    assert rates == [pytest.approx({1: STEP, 2: STEP})] * len(learn.opt.hypers)
    assert log.Tags()['images'] == ['Sample results']


def test_save_model(learn):
    keep = Keep()
    learn.fit(2, UP, cbs=[SaveModelCallback(), keep])
    losses = [v[1] for v in learn.recorder.values]
    assert losses[0] < losses[1] and not same(*keep.states)
    assert same(keep.states[0], state(learn))


def test_early_stopping(learn):
    learn.fit(6, UP, cbs=EarlyStoppingCallback(patience=1))
    losses = [v[1] for v in learn.recorder.values]
    assert len(losses) == 2 and losses[0] < losses[1]


@pytest.mark.parametrize('make', [lambda: GradientAccumulation(4), lambda: Accumulate(2, 2)], ids=['fastai', 'ours'])
def test_accumulated_gradients_are_the_mean_over_batches(learn, net, make):
    "One step of two batches: the mean of their losses, each with its own normalization."
    keep, model = Keep(), learn.model
    learn.fit(1, STEP, cbs=[make(), keep])
    got = {k: p.detach().clone() for k, p in model.named_parameters()}
    model.load_state_dict(net[1])
    model.train().zero_grad()
    for rng, xb, yb in keep.batches:
        torch.set_rng_state(rng)
        (sum(model(*xb, list(yb[0])).values()) / 2).backward()
    assert len(keep.batches) == 2
    for k, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[k], p.detach() - STEP * p.grad, rtol=1e-4, atol=1e-6)
    assert sum(not torch.equal(v, net[1][k]) for k, v in got.items()) > len(got) / 2


@pytest.mark.parametrize('mode,dtype', [('fp16', torch.float16), ('bf16', torch.bfloat16)])
def test_mixed_precision(learn, mode, dtype):
    "fastai's own callback, whose autocast is for CUDA."
    seen, before = set(), state(learn)
    conv = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    hook = conv.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    learn.fit(1, STEP, cbs=MixedPrecision(mode))
    now = state(learn)
    assert seen == {dtype} and not same(before, now)
    assert all(v.dtype == before[k].dtype and v.isfinite().all() for k, v in now.items())
    seen.clear()
    learn.validate()
    assert seen == {torch.float32}  # it has gone with its fit
    hook.remove()


def test_short_epochs(learn):
    "As for a classifier, fastai's recorder has no row for a phase that was cut short."
    keep, before = Keep(), state(learn)
    for kw, n in (({}, (1, 1)), (dict(short_valid=False), (1, 2))):
        learn.fit(1, STEP, cbs=[keep, ShortEpochCallback(0.0, **kw)])
        assert (len(keep.batches), len(keep.valid)) == n
        row = dict(zip(reversed(learn.recorder.metric_names[:-1]), reversed(learn.recorder.values[-1])))
        assert set(row) == (set(learn.recorder.metric_names[2:-1]) if kw else set())
    assert not same(before, state(learn))
