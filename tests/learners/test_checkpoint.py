"A detector's training run, interrupted anywhere and resumed bit by bit."

import pytest
import torch
from common import draw_record, make_dls
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from backbones_nb.detectors import faster_rcnn, retinanet
from backbones_nb.learners.checkpoint import Checkpoint
from backbones_nb.learners.detection import detection_learner
from backbones_nb.learners.ema import ModelEMA

rcnn = dict(
    neck_channels=8,
    head_channels=16,
    rpn_pre_nms_top_n_train=40,
    rpn_post_nms_top_n_train=20,
    rpn_pre_nms_top_n_test=20,
    rpn_post_nms_top_n_test=10,
    box_batch_size_per_image=8,
    sampling_ratio=1,
)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return [draw_record(i, folder, masks=False) for i in range(19)]


def learner(records, path, family=faster_rcnn, cbs=(), **kw):
    torch.manual_seed(0)
    args = rcnn if family is faster_rcnn else dict(neck_channels=8)
    learn = detection_learner(
        make_dls(records, path, cache=False, **kw),
        family.model(3, 'timm/test_resnet', **args),
        lr=1e-3,
        path=path,
        cbs=list(cbs),
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


class Stop(Callback):
    order = -200

    def __init__(self, *at):
        self.at, self.seen = set(at), 0

    def before_batch(self):
        if not self.training:
            return
        self.seen += 1
        if self.seen in self.at:
            raise KeyboardInterrupt


def state(learn):
    rec = [[float(o) for o in row] for row in learn.checkpoint.past] if hasattr(learn, 'checkpoint') else []
    return {k: v.clone() for k, v in learn.model.state_dict().items()}, rec


def fit(learn, file, how, *stops, epochs=2, every=1, **kw):
    saver = Checkpoint(file, every)
    cbs = [saver] + [Stop(*stops)] * bool(stops)
    f = learn.fine_tune if how == 'fine_tune' else learn.fit_one_cycle
    try:
        f(epochs, 1e-3, cbs=cbs, **kw)
    except KeyboardInterrupt:
        return None
    return {k: v.clone() for k, v in learn.model.state_dict().items()}, saver.past


ways = dict(
    workers=dict(num_workers=1),
    accumulate=dict(cbs=lambda: [GradientAccumulation(8)]),
    average=dict(cbs=lambda: [ModelEMA(0.9)], family=retinanet),
    fine_tune=dict(how='fine_tune'),
)


def same(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    assert [[float(o) for o in r] for r in a[1]] == [[float(o) for o in r] for r in b[1]]


@pytest.mark.parametrize('way', ways)
def test_interrupted_anywhere_and_resumed(drawn, tmp_path, way, slow_run):
    "Stops inside the first and the second epoch, whose data differ from those of a fit's first batches."
    kw = dict(ways[way])
    how, make = kw.pop('how', 'fit_one_cycle'), kw.pop('cbs', tuple)
    stops, n = ((3, 4, 6), 3) if slow_run else ((3, 4), 2 - (how == 'fine_tune'))  # the frozen epoch is one more
    run = lambda file, *stop: fit(learner(drawn, tmp_path, cbs=make(), **kw), tmp_path / file, how, *stop, epochs=n)
    whole = run('whole.pt')
    for stop in stops:
        assert run('parts.pt', stop) is None
    same(run('parts.pt'), whole)
