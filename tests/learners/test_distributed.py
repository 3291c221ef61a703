import json
import os
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from project import root
from cases import DETECTORS
from common import cm, Colors, draw_record, in_two_processes, make_dls, make_learner, noise
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.metrics import F1Score, accuracy
from fastai.vision.data import ImageDataLoaders
from torch import nn

from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.core.create import create_backbone
from backbones_nb.data.coco import to_coco
from backbones_nb.imagenet.batches import folder_dls
from backbones_nb.imagenet.folders import prepare_val
from backbones_nb.imagenet.toy import toy_imagenet
from backbones_nb.detectors import retinanet
from backbones_nb.imagenet.classifier import backbone_learner
from backbones_nb.learners.distributed import Distributed, _plain_batchnorm, _sync_batchnorm
from backbones_nb.learners import training
from backbones_nb.learners.finetune import finetune
from backbones_nb.learners.metrics import TopK
from tools.proc import run

torch.set_num_threads(1)


# --- what one process and two of them do


class Tiny(Backbone):
    "Without batch norm, so that only the sum of the gradients matters; its last layer has no part in the maps."

    def __init__(self, strides=(4,)):
        super().__init__()
        self.stem, self.a, self.b = (ConvNormAct(i, o, 3, 2, norm=None) for i, o in ((3, 8), (8, 16), (16, 32)))
        self.set_trunk(
            dict(stem=['stem'], stage1=['a'], stage2=['b']), [feature_row(16, 4, 'a'), feature_row(32, 8, 'b')], strides
        )


class Wrong(Colors):
    "Takes every third image for the other color, so that AP lies between 0 and 1."

    def find(self, x):
        found = super().find(x)
        if int((x > 0.6).sum()) % 3 == 0:
            found['labels'] = 3 - found['labels']
        return found | dict(scores=found['scores'] * x.mean())


class Stop(Callback):
    def before_batch(self):
        if self.training:
            raise KeyboardInterrupt


def records(folder):
    "Drawn into a folder of this process's own: another one would read what is half written."
    own = folder / os.environ.get('RANK', 'one')
    own.mkdir(exist_ok=True)
    return [draw_record(i, own) for i in range(23)]


def detector():
    torch.manual_seed(0)
    return retinanet.model(3, Tiny(), neck_channels=8, score_thresh=0.0, detections_per_img=10)


def values(learn):
    return {k: float(v) for k, v in zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])}


def state(learn):
    return {k: v.cpu() for k, v in learn.model.state_dict().items()}


def train_detector(folder, bs=2, **kw):
    "Two fits, the first with a frozen backbone."
    learn = make_learner(records(folder), folder, detector(), opt_func=torch_sgd, lr=0.01, **kw)
    learn.dls = make_dls(records(folder), folder, bs=bs)
    with learn.distrib_ctx():
        learn.freeze()
        learn.fit(1)
        learn.unfreeze()
        learn.fit(1)
    return learn


def torch_sgd(params, lr, **kw):
    from fastai.optimizer import SGD

    return SGD(params, lr=lr, mom=0.0)


def measure(folder):
    learn = make_learner(records(folder), folder, Wrong(), metrics=['AP', 'mask_AP', 'AP50'])
    with learn.distrib_ctx():
        own, train = learn.validate(), learn.validate(0)
        preds, _ = learn.get_preds()
    shares = []
    for i in (0, 1):
        dl = learn.dls.valid.new(bs=3)
        dl.for_process(i, 2)
        shares.append([len(learn.get_preds(dl=dl)[0]), learn.evaluate(dl=dl)['AP']])
    return dict(
        shares=shares,
        valid=[float(o) for o in own],
        train=[float(o) for o in train],
        preds=len(preds),
        again=[float(o) for o in learn.validate()],
    )


def interrupted(folder):
    learn = make_learner(records(folder), folder, Wrong())
    with pytest.raises(KeyboardInterrupt):
        with learn.distrib_ctx():
            learn.fit(1, cbs=Stop())
    assert (
        type(learn.model) is Wrong
        and learn.dls.train.world_size == 1
        and not any(isinstance(o, Distributed) for o in learn.cbs)
    )


def too_few(folder):
    learn = make_learner(records(folder), folder, Wrong())
    learn.dls = make_dls(records(folder), folder, bs=9)
    with pytest.raises(
        ValueError, match='got 16 training images, expected at least one batch of 9 for each of 2 processes'
    ):
        with learn.distrib_ctx():
            learn.fit(1)


def classify(data, **kw):
    "Images of folders with fastai's metrics; 9 of validation in batches of 2."
    torch.manual_seed(0)
    dls = folder_dls(data, size=32, seed=0, val_bs=2, device='cpu', **kw)
    learn = backbone_learner(
        dls, 'timm/test_convnext', metrics=[accuracy, F1Score(average='macro'), TopK(2)], lr=0.05, opt_func=torch_sgd
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    with learn.distrib_ctx():
        learn.fit(2)
        seen = values(learn)
        preds, targs = learn.get_preds()
        found = learn.predict(learn.dls.valid.dataset.items[0][0])
    return learn, dict(values=seen, preds=preds, targs=targs, found=found[2])


class At(Callback):
    "Does something before an epoch."

    def __init__(self, epoch, f):
        self.at, self.f = epoch, f

    def before_epoch(self):
        if self.epoch == self.at:
            self.f()


def breaks_off(learn):
    class Early(Callback):
        def before_batch(self):
            if self.training and self.iter == 2:
                raise CancelFitException

    with learn.distrib_ctx():
        learn.fit(1, cbs=Early())
        kinds = [type(learn.model)]
        learn.validate()
        learn.fit(1)
        kinds.append(type(learn.model))
    assert kinds == [Wrong] * 2 and learn.dls.train.world_size == 1


def unfrozen_later(folder):
    learn = make_learner(records(folder), folder, detector(), opt_func=torch_sgd, lr=0.01)
    with learn.distrib_ctx():
        learn.freeze()
        learn.fit(3, cbs=At(1, learn.unfreeze))
        learn.export('inside.pkl')
        with pytest.raises(RuntimeError, match='lr_find searches in one process'):
            learn.lr_find()
        draw = float(torch.rand(()))
    return dict(net=state(learn), draw=draw)


def cut(data):
    "A backbone without its last map, metrics of training, and what each process measures after the sharing."
    torch.manual_seed(0)
    dls = folder_dls(data, size=32, seed=0, bs=2, val_bs=2, device='cpu')
    learn = backbone_learner(
        dls, create_backbone('timm/test_convnext', strides=(8,)), metrics=[accuracy, TopK(1)], lr=0.05
    )
    learn.recorder.train_metrics = True
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    with learn.distrib_ctx():
        if os.environ['RANK'] == '0':
            dls.train.one_batch()  # looks at a batch, and moves on its epoch
        learn.fit(2)
        seen, inside = values(learn), learn.validate()
    alone = learn.validate() if os.environ['RANK'] == '0' else inside  # nobody waits for the other
    return dict(
        net=state(learn),
        seen=seen,
        inside=list(map(float, inside)),
        alone=list(map(float, alone)),
        epoch=dls.train.epoch,
    )


def one_epoch(folder, family):
    "Weights and table of a family trained in processes that share the work, and what each then measures alone."
    torch.manual_seed(0)
    net, drawn = DETECTORS[family](num_classes=3, backbone=Tiny()), records(folder)[:20]
    before = deepcopy(net.state_dict())
    learn = make_learner(drawn, folder, net, opt_func=torch_sgd, lr=0.01)
    assert learn.to_distributed() is learn
    learn.fit(1)
    learn.detach_distributed()
    return dict(before=before, net=state(learn), values=values(learn), alone=list(map(float, learn.validate())))


def in_one_of_two(rank, folder, data):
    learn = train_detector(folder)
    res = dict(detector=state(learn), values=values(learn), measured=measure(folder))
    interrupted(folder)
    too_few(folder)
    learn, res['classes'] = classify(data, bs=2)
    res['classifier'] = state(learn)
    breaks_off(make_learner(records(folder), folder, Wrong()))
    res |= dict(later=unfrozen_later(folder), cut=cut(data))
    res['families'] = {o: one_epoch(folder, o) for o in DETECTORS}
    torch.save(res, folder / f'{rank}.pt')


# --- the tests


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes have found: data of classes, folder, results of each."
    folder = tmp_path_factory.mktemp('two')
    data = toy_imagenet(folder / 'imagenet', n_classes=3, per_class=11, val_per_class=3, test=1, size=40)
    prepare_val(data / 'LOC_val_solution.csv', data / 'ILSVRC' / 'Data' / 'CLS-LOC' / 'val')
    in_two_processes(in_one_of_two, folder, data)
    return data, folder, [torch.load(folder / f'{i}.pt', weights_only=False) for i in (0, 1)]


def gap(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def test_detector_as_one_process_with_the_doubled_batch(two):
    _, folder, (a, b) = two
    assert gap(a['detector'], b['detector']) == 0 and a['values'] == pytest.approx(b['values'], nan_ok=True)
    one = train_detector(folder, cbs=GradientAccumulation(4))
    assert gap(a['detector'], state(one)) < 1e-5 and gap(a['detector'], detector().state_dict()) > 1e-3
    mine = values(one)
    assert mine.keys() == a['values'].keys()
    for k in mine.keys() - {'train_loss'}:
        assert a['values'][k] == pytest.approx(mine[k], rel=1e-3, abs=1e-6), k  # a running mean: of 4 steps, not of 8


@pytest.mark.parametrize('family', DETECTORS)
def test_each_family_trains_and_measures_as_one(two, family):
    "Equal weights, statistics of batch norm included; what was measured by halves is that of all images."
    a, b = (o['families'][family] for o in two[2])
    assert gap(a['net'], b['net']) == 0 < gap(a['before'], a['net'])
    assert a['values'] == pytest.approx(b['values'], nan_ok=True)
    inside = [v for k, v in a['values'].items() if not k.startswith('train_')]
    assert a['alone'] == b['alone'] == pytest.approx(inside, rel=1e-4, abs=1e-6) and len(inside) > 4


def test_every_image_is_measured_once(two):
    _, folder, (a, b) = two
    one = measure(folder)
    assert a['measured'] == b['measured'] and a['measured']['preds'] == 7
    assert 0.05 < one['valid'][-1] < 0.95 and 0.05 < one['valid'][-2] < 0.95, 'AP would show nothing'
    for k in ('valid', 'train', 'again'):
        assert a['measured'][k] == pytest.approx(one[k], rel=1e-6), k
    for o in (one, a['measured']):  # a loader that was given keeps its share
        (n, ap), (m, other) = o['shares']
        assert (n, m) == (4, 3) and len({ap, other, one['valid'][-3]}) == 3


def test_classes_as_one_process(two):
    data, _, (a, b) = two
    learn, one = classify(data, bs=4)
    assert gap(a['classifier'], b['classifier']) == 0 and gap(a['classifier'], state(learn)) < 1e-5
    for r in (a, b):
        assert r['classes']['values'] == pytest.approx(one['values'], rel=1e-3)
        torch.testing.assert_close(r['classes']['preds'], one['preds'], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(r['classes']['found'], one['found'], rtol=1e-3, atol=1e-5)
        assert r['classes']['targs'].tolist() == one['targs'].tolist()


def test_what_is_unfrozen_later_is_averaged_too(two):
    _, folder, (a, b) = two
    assert gap(a['later']['net'], b['later']['net']) == 0 and a['later']['draw'] != b['later']['draw']
    learn = load_learner(folder / 'inside.pkl')  # exported while the processes shared the work
    assert gap(learn.model.state_dict(), a['later']['net']) == 0
    learn.dls = make_dls(records(folder), folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


def test_parts_of_a_backbone_and_metrics_of_training(two):
    a, b = (o['cut'] for o in two[2])
    assert gap(a['net'], b['net']) == 0 and a['epoch'] == b['epoch']
    assert a['seen'] == b['seen'] and 0 < a['seen']['train_accuracy'] < 1
    for r in (a, b):
        assert r['alone'] == pytest.approx(r['inside'], rel=1e-5)


def test_loaders_of_fastai(two, monkeypatch):
    dls = ImageDataLoaders.from_folder(
        two[0] / 'ILSVRC' / 'Data' / 'CLS-LOC', train='train', valid='val', bs=4, device='cpu'
    )
    learn = backbone_learner(dls, 'timm/test_convnext')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(
        ValueError,
        match='got a training loader TfmdDL on cpu, and fastai shards such loaders only on CUDA: '
        'create them with folder_dls',
    ):
        with learn.distrib_ctx():
            pass


@pytest.mark.parametrize('n,bs,world_size', [(13, 4, 2), (3, 4, 2), (16, 4, 4), (1, 1, 3), (0, 2, 2)])
def test_shards(tmp_path, n, bs, world_size):
    dl = make_dls(records(tmp_path), tmp_path, bs=bs).train.new(drop_last=False, shuffle=False)
    dl = dl.new(type(dl.dataset)(dl.dataset.items[:n]))
    got = {}
    for equal in (False, True):
        for rank in range(world_size):
            dl.for_process(rank, world_size, equal)
            got[equal, rank] = [o['image_id'] for _, t in dl for o in t] if n else []
            assert len(dl) == len(list(dl))
    whole = [f'im{i}' for i in range(n)]
    assert sorted(sum((got[False, r] for r in range(world_size)), [])) == sorted(whole)
    assert {len(got[True, r]) for r in range(world_size)} == {n // (bs * world_size) * bs} and sorted(
        sum((got[True, r] for r in range(world_size)), [])
    ) == sorted(whole[: n // (bs * world_size) * bs * world_size])
    with pytest.raises(ValueError, match=f'got rank {world_size} of {world_size} processes'):
        dl.for_process(world_size, world_size)


def test_batch_norm_there_and_back():
    net = timm.create_model('test_efficientnet').eval()
    x, want = noise(32), None
    with torch.no_grad():
        want = net(x)
    kinds, params = [type(m) for m in net.modules()], list(net.parameters())
    was = _sync_batchnorm(net)
    assert not any(type(m) in kinds and isinstance(m, nn.BatchNorm2d) for m in net.modules()) and any(
        isinstance(m, nn.SyncBatchNorm) for m in net.modules()
    )
    with torch.no_grad():
        assert torch.equal(net(x), want)
    for m in net.modules():
        if isinstance(m, nn.SyncBatchNorm):
            m.running_mean = m.running_mean + 1  # another tensor
    now = {k: v.clone() for k, v in net.state_dict().items()}
    _plain_batchnorm(net, was)
    assert [type(m) for m in net.modules()] == kinds and all(
        a is b for a, b in zip(net.parameters(), params, strict=True)
    )
    assert all(torch.equal(v, now[k]) for k, v in net.state_dict().items()) and not any(
        m.training for m in net.modules()
    )


def test_one_process_changes_nothing(tmp_path):
    learn = make_learner(records(tmp_path), tmp_path, Wrong())
    with learn.distrib_ctx() as same:
        assert same is learn and not any(isinstance(o, Distributed) for o in learn.cbs)
    with pytest.raises(
        ValueError, match='got sync_bn=True on cpu, where torch has no synchronized batch norm: leave it out'
    ):
        with learn.distrib_ctx(sync_bn=True):
            pass


# --- a run of `finetune`


class StopLater(Callback):
    order = -200

    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 2:
            raise KeyboardInterrupt


def run_options(folder, **kw):
    return dict(
        data=str(folder / 'ann.json'),
        images=str(folder),
        detector='retinanet',
        backbone='timm/test_convnext',
        size=64,
        epochs=2,
        lr=1e-3,
        device='cpu',
        model_args=dict(neck_channels=8, score_thresh=0.0, topk_candidates=20),
        **kw,
    )


def whole_and_in_parts(folder):
    kw, real = run_options(folder, bs=1, checkpoint_every=1), training.run_callbacks
    finetune(**kw, out=f'{folder}/two')
    training.run_callbacks = lambda *a: [*real(*a), StopLater()]
    try:
        finetune(**kw, out=f'{folder}/parts')
    except KeyboardInterrupt:
        pass
    training.run_callbacks = real
    finetune(**kw, out=f'{folder}/parts', resume=True)


def in_forks(folder):
    def f(rank):
        with open(folder / f'said{rank}.txt', 'w') as o, redirect_stdout(o):
            whole_and_in_parts(folder)

    in_two_processes(f)
    return ''.join((folder / f'said{o}.txt').read_text() for o in range(2))


def by_torchrun(folder):
    launch = '-W ignore -m torch.distributed.run --standalone --nproc_per_node=2'.split()
    path = os.pathsep.join(map(str, (root, root / 'tests' / 'support')))
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=path)
    p = run(sys.executable, *launch, __file__, folder, timeout=600, env=env)
    assert p.returncode == 0, p.stderr[-4000:]
    return p.stdout


if __name__ == '__main__':
    whole_and_in_parts(Path(sys.argv[1]))


@pytest.mark.parametrize('launch', [in_forks, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_finetune_on_two_processes_as_on_one_and_resumed(tmp_path, launch):
    drawn = [draw_record(i, tmp_path, masks=False) for i in range(12)]
    (tmp_path / 'ann.json').write_text(json.dumps(to_coco(drawn, cm, images=tmp_path)))
    said = launch(tmp_path)
    assert said.count('images to learn from') == 3 and said.count('finetune --resume --out') == 1
    for name in ('detector.safetensors', 'best.safetensors', 'history.csv'):
        assert (tmp_path / 'two' / name).read_bytes() == (tmp_path / 'parts' / name).read_bytes(), name
    one = finetune(**run_options(tmp_path, bs=2), out=str(tmp_path / 'one'))
    tables = [pd.read_csv(tmp_path / o / 'history.csv') for o in ('one', 'two')]
    assert tables[0].valid_loss.to_numpy() == pytest.approx(tables[1].valid_loss.to_numpy(), rel=1e-3)
    two = json.loads((tmp_path / 'two' / 'metrics.json').read_text())
    assert two['valid_images'] == one['valid_images'] and two['steps'] == one['steps'] * 2
