"Options of a run that change how it is computed: repeats, recomputing, accumulation, averages, logs."

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import cm, Colors, draw_record, make_dls, make_learner
from fastai.callback.core import Callback

from backbones_nb.core.create import create_backbone
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.ranked import draw_repeats
from backbones_nb.detectors import retinanet
from backbones_nb.learners import logs
from backbones_nb.learners.checkpoint import Checkpoint
from backbones_nb.learners.detection import detection_learner
from backbones_nb.learners.logs import loggers, TrackerLog
from backbones_nb.learners.recompute import RecomputeBackbone
from backbones_nb.learners.sampling import repeat_factors


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return [draw_record(i, folder, masks=False) for i in range(23)]


# --- repeats


@pytest.mark.parametrize('seed', range(20))
def test_repeats_are_factors_rounded_up_or_down(seed):
    g = np.random.default_rng(seed)
    f = 1 + g.exponential(1, g.integers(1, 30))
    drawn = np.array(draw_repeats(f, g.random()))
    counts = np.bincount(drawn % len(f), minlength=len(f))
    assert len(drawn) == np.ceil(f.sum() - 1e-9) and len(set(drawn)) == len(drawn)
    scale = len(drawn) / f.sum()
    assert (counts >= np.floor(f)).all() and (counts <= np.ceil(f * scale + 1e-9)).all() and counts.min() >= 1
    for i, n in enumerate(counts):
        assert sorted(drawn[drawn % len(f) == i]) == [i + k * len(f) for k in range(n)]


def test_factors_of_lvis():
    r = [SimpleNamespace(labels=o) for o in ([1], [1, 1], [1, 2], [1], [])]
    assert repeat_factors(r, 0.4) == pytest.approx([1, 1, 2**0.5, 1, 1])
    assert repeat_factors(r, 0.0) == pytest.approx(np.ones(5))
    with pytest.raises(ValueError, match='got threshold=2, expected a share'):
        repeat_factors(r, 2)


def read(dl):
    return [(t['image_id'], x.sum().item()) for xs, ts in dl for x, t in zip(xs, ts)]


def test_a_pass_with_repeats(drawn, tmp_path):
    dls = make_dls(drawn, tmp_path, drop_last=False)
    dl, other = dls.train, make_dls(drawn, tmp_path, drop_last=False, num_workers=1).train
    f = np.ones(16)
    f[3] = 4.5
    for o in (dl, other):
        o.repeat_items(f)
    passes = [read(dl) for _ in range(3)]
    assert [len(o) for o in passes] == [20] * 3 and len(dl) == 5
    for o in passes:
        ids = pd.Series([i for i, _ in o]).value_counts()
        assert ids['im3'] in (4, 5) and len(ids) == 16
        assert len({v for i, v in o if i == 'im3'}) == ids['im3']  # each augmented in its own way
    assert read(other) == passes[0]  # with a worker
    other.set_epoch(2, 3)
    assert read(other) == passes[2][12:]
    shares = []
    for rank in (0, 1):
        dl.set_epoch(1)
        dl.for_process(rank, 2)
        shares += read(dl)
    dl.for_process()
    assert sorted(shares) == sorted(passes[1])
    with pytest.raises(ValueError, match='expected one of at least 1 for each'):
        dl.repeat_items(f / 2)
    dl.repeat_items(None)
    assert len(read(dl)) == 16


# --- recomputing the backbone


small = dict(neck_channels=8, rpn_post_nms_top_n_train=20, box_batch_size_per_image=8, head_channels=16)
backbones = ('vovnet19_slim_dw', 'cspdarknet19', 'resnet18', 'timm/test_efficientnet', 'timm/test_convnext')


@pytest.mark.parametrize('name', backbones)
def test_recomputed_backbones_train_alike(drawn, tmp_path, name):
    kw = dict(size=64, bs=2, seed=1, device='cpu', path=tmp_path)

    def fit(*cbs):
        torch.manual_seed(0)
        dls = detection_dls(drawn[:4], drawn[4:5], cm, **kw)
        net = retinanet.model(3, create_backbone(name), neck_channels=8)
        learn = detection_learner(dls, net, metrics=[], cbs=cbs)
        learn.remove_cb(learn.progress)
        learn.logger = lambda *a: None
        learn.fit(1)
        return learn

    class Calls(Callback):
        n = 0

        def before_batch(self):
            if not hasattr(self, 'hook'):
                bb = self.learn.model.backbone.body
                first = bb.get_submodule(next(iter(bb.trunk.values()))[0])
                self.hook = first.register_forward_hook(lambda *a: setattr(self, 'n', self.n + self.training))

    calls = Calls()
    a, b = fit(), fit(RecomputeBackbone(), calls)
    assert all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert not any('forward' in vars(m) for m in b.model.modules())
    b.export('m.pkl')


# --- logs


class Fake:
    "A tracker that keeps what it gets."

    def __init__(self, *a, **kw):
        self.made, self.seen = (a, kw), []

    def start(self):
        from accelerate.logging import get_logger

        get_logger('fake').debug('as all trackers of accelerate do, which fails without its state')
        self.seen.append('start')

    def store_init_configuration(self, values):
        self.seen.append(values)

    def log(self, values, step):
        self.seen.append((step, values))


@pytest.mark.parametrize('name', ['mlflow', 'trackio'])
def test_trackers_of_accelerate(drawn, tmp_path, monkeypatch, name):
    from accelerate import PartialState, tracking

    PartialState._reset_state()

    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for o in ('MLflowTracker', 'TrackioTracker'):
        monkeypatch.setattr(tracking, o, Fake)
    csv, log = loggers(name, tmp_path, dict(bs=4))
    learn = detection_learner(make_dls(drawn, tmp_path), retinanet.model(3, 'timm/test_resnet', neck_channels=8))
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    learn.fit(1, cbs=[csv, log])
    start, options, (step, row) = log.tracker.seen
    assert start == 'start' and options == dict(bs='4') and step == 0
    table = pd.read_csv(tmp_path / 'history.csv')
    assert list(table)[1:] == list(row) and table.iloc[0, 1:].to_numpy() == pytest.approx(list(row.values()))


def test_a_tracker_that_cannot_start_is_one_sentence(records, tmp_path):
    tracker = Fake()
    tracker.store_init_configuration = lambda values: 1 / 0
    learn = make_learner(records, tmp_path, Colors())
    with pytest.raises(RuntimeError, match="Fake cannot start .ZeroDivisionError.* or use log='csv'"):
        learn.fit(1, cbs=TrackerLog(tracker))


class Interrupt(Callback):
    "In the second fit, at its third batch."

    fits = 0

    def before_batch(self):
        if self.fits and self.training and self.iter == 2:
            raise KeyboardInterrupt

    def after_fit(self):
        self.fits += 1


@pytest.mark.parametrize('keeps', [True, False])
def test_both_fits_of_fine_tune_are_one_log(records, tmp_path, keeps):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def train(out, *more):
        torch.manual_seed(0)
        csv, board = loggers('tensorboard', tmp_path / out, {})
        tracker, saver = TrackerLog(Fake()), [Checkpoint(tmp_path / f'{out}.pt', every=1)] * keeps
        learn = make_learner(records, tmp_path, Colors())
        with learn.added_cbs([csv, board, tracker, *saver, *more]):
            learn.fine_tune(2, 1e-3)  # three epochs of four steps
        return board.past, [step for step, _ in tracker.tracker.seen[2:]]

    assert train('whole') == (12, [0, 1, 2])
    files = (tmp_path / 'whole' / 'tensorboard').iterdir()
    seen = [(v.tag, e.step) for f in files for e in EventFileLoader(str(f)).Load() for v in e.summary.value]
    assert sorted(i for k, i in seen if k == 'train_loss') == list(range(1, 13))
    assert sorted(i for k, i in seen if k == 'valid_loss') == [4, 8, 12]
    assert len(pd.read_csv(tmp_path / 'whole' / 'history.csv')) == 3
    if keeps:
        with pytest.raises(KeyboardInterrupt):
            train('parts', Interrupt())
        steps, epochs = train('parts')
        assert steps == 12 and epochs[-1] == 2
        assert (tmp_path / 'parts' / 'history.csv').read_text() == (tmp_path / 'whole' / 'history.csv').read_text()


@pytest.mark.parametrize('name,module', [('wandb', 'wandb'), ('mlflow', 'mlflow'), ('trackio', 'trackio')])
def test_a_service_that_is_not_installed(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"log='{name}' needs .*pip install .*{name}"):
        loggers(name, tmp_path, {})


def test_other_processes_log_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, 'rank_distrib', lambda: 1)
    assert loggers('tensorboard', tmp_path, {}) == []
