import copy
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from backbones_nb.analysis.sample import sample_image
from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD
from backbones_nb.imagenet.augment import (
    CutMixUp,
    RepeatedAugmentation,
    _RepeatedSampler,
    smooth_loss,
    train_tfm,
    valid_tfm,
)
from backbones_nb.learners.ema import ema_decay, ModelEMA
from backbones_nb.imagenet.recipe import (
    apply_recipe,
    recipe,
    Recipe,
    recipe_cbs,
    recipe_table,
    recipe_tfms,
    recipes,
    _RecipeTransform,
)
from backbones_nb.imagenet.schedule import (
    no_decay_params,
    NoDecay,
    scale_lr,
    sgd,
    warmup_cosine,
    WarmupCosine,
)
from backbones_nb.learners.checkpoint import Accumulate
from backbones_nb.learners.precision import DetectionPrecision
from backbones_nb.imagenet.batches import folder_dls
from backbones_nb.imagenet.classifier import backbone_learner
from common import out


class Rows(list):
    def new_empty(self):
        return Rows()


def data(n=24, c=3, size=8):
    g = torch.Generator().manual_seed(0)
    return Rows((torch.randn(3, size, size, generator=g), torch.tensor(i % c)) for i in range(n))


def loaders(n=24, bs=4, shuffle=False, **kw):
    ds = data(n, **kw)
    res = DataLoaders(DataLoader(ds, bs=bs, shuffle=shuffle), DataLoader(Rows(ds[:9]), bs=bs), device='cpu')
    res.c = kw.get('c', 3)
    return res


def small(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def flat(c):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, c))


def halves(m):
    return [list(o.parameters()) for o in (m[:2], m[2:])]


def learner(path, cbs=(), dls=None, net=None, **kw):
    kw = dict(loss_func=smooth_loss(0.0), opt_func=sgd(), lr=0.1, wd_bn_bias=True, path=path) | kw
    res = Learner(dls or loaders(), net or small(), cbs=list(cbs), **kw)
    res.remove_cb(res.progress)
    res.logger = lambda *a: None
    return res


class Watch(Callback):
    "Keeps what a test wants to know of each training batch, and a copy of the weights after each step."

    order, run_valid = 99, False

    def before_fit(self):
        self.lrs, self.labels, self.weights, self.norms, self.grads = [], [], [], [], []

    def after_pred(self):
        self.labels.append(self.y.clone())

    def before_step(self):
        self.lrs.append(self.opt.hypers[-1]['lr'])
        self.grads.append([p.grad.clone() for p in self.model.parameters()])
        self.norms.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm().item())

    def after_step(self):
        self.weights.append({k: v.clone() for k, v in self.model.state_dict().items()})


class Seeds(Callback):
    "The same random numbers for the same epoch, whether the fit began with it or not."

    order = -5

    def before_train(self):
        torch.manual_seed(self.epoch)


def params(learn, state=None):
    state = state or learn.model.state_dict()
    return torch.cat([state[k].flatten() for k, _ in learn.model.named_parameters()]).clone()


# --- schedule and learning rate


@pytest.mark.parametrize('warmup', [0, 1, 2.5])
def test_schedule_in_closed_form(tmp_path, warmup):
    l = learner(tmp_path, [WarmupCosine(warmup=warmup, start=0.02), Watch()])
    l.fit(4)
    n, w = 6, 6 * warmup
    want = [
        0.1 * (0.02 + 0.98 * t / w) if t < w else 0.05 * (1 + math.cos(math.pi * (t - w) / (4 * n - w)))
        for t in range(4 * n)
    ]
    assert l.watch.lrs == pytest.approx(want, rel=1e-5, abs=1e-8) and len(want) == 24
    assert l.recorder.hps['lr'] == pytest.approx(want, rel=1e-5, abs=1e-8)
    l.validate()
    assert len(l.recorder.hps['lr']) == 24  # still there


def test_schedule_is_torchs_at_the_beginning_of_every_epoch():
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = SequentialLR(opt, [LinearLR(opt, 0.01, total_iters=5), CosineAnnealingLR(opt, 95)], [5])
    f = warmup_cosine(0.5, 5 / 100)
    for e in range(100):
        assert f(e / 100) == pytest.approx(opt.param_groups[0]['lr'], rel=1e-4, abs=1e-7)
        opt.step()
        theirs.step()


def test_schedule_with_several_groups_and_lr_find(tmp_path):
    l = learner(tmp_path, [WarmupCosine(np.array([0.01, 0.1]), warmup=1)], splitter=halves)
    l.fit(2)
    assert l.opt.hypers[0]['lr'] == pytest.approx(l.opt.hypers[1]['lr'] / 10)
    l = learner(tmp_path, [WarmupCosine(warmup=5), ema := ModelEMA()])
    l.lr_find(num_it=6, show_plot=False)
    assert ema.average is None and l.recorder.lrs[0] < 1e-5  # a search is not averaged, and sets its own learning rate


def test_schedule_takes_the_rate_of_the_fit(tmp_path):
    l = learner(tmp_path, [WarmupCosine(warmup=1), Watch()], splitter=halves)
    l.fit(2, lr=slice(0.3))
    assert l.watch.lrs[6] == pytest.approx(0.3) and l.opt.hypers[0]['lr'] == pytest.approx(l.opt.hypers[1]['lr'] / 10)
    l.fit(2)
    assert l.watch.lrs[6] == pytest.approx(0.1)


def test_schedule_resumed(tmp_path):
    l = learner(tmp_path, [WarmupCosine(warmup=1), Watch()])
    l.fit(4)
    whole = l.watch.lrs
    l.fit(4, start_epoch=2)
    assert l.watch.lrs == pytest.approx(whole[12:])


@pytest.mark.parametrize('warmup,epochs', [(2, 2), (5, 3)])
def test_warmup_longer_than_the_fit(tmp_path, warmup, epochs):
    with pytest.raises(ValueError, match=f'warm-up of {warmup} epochs and a fit of {epochs}'):
        learner(tmp_path, [WarmupCosine(warmup=warmup)]).fit(epochs)


@pytest.mark.parametrize(
    'fit',
    [
        lambda l: l.fit_one_cycle(2, 1e-2),
        lambda l: l.fine_tune(2, freeze_epochs=2),
        lambda l: l.fit(2, cbs=WarmupCosine(warmup=1)),
    ],
)
def test_two_schedules(tmp_path, fit):
    l = learner(tmp_path, [WarmupCosine(warmup=1)], splitter=halves)
    with pytest.raises(ValueError, match='WarmupCosine and another schedule.*expected one: call fit'):
        fit(l)
    l.remove_cb(WarmupCosine)
    fit(l)


@pytest.mark.parametrize('warmup', [-0.1, 1, 5])
def test_wrong_warmup(warmup):
    with pytest.raises(ValueError, match='expected a fraction of training'):
        warmup_cosine(0.1, warmup)


def test_linear_scaling():
    assert scale_lr(0.5, 1024, 1024) == 0.5 and scale_lr(0.5, 1024, 64, world_size=4, accum_steps=2) == 0.25
    with pytest.raises(ValueError, match='world_size=0'):
        scale_lr(0.5, 1024, 64, world_size=0)


# --- loss


@pytest.mark.parametrize('s', [0.0, 0.1, 0.5])
def test_smoothing_by_hand(s):
    logits, y = torch.randn(5, 4), torch.tensor([0, 3, 2, 2, 1])
    spread = (1 - s) * F.one_hot(y, 4) + s / 4
    want = -(spread * logits.log_softmax(1)).sum(1).mean()
    loss = smooth_loss(s)
    assert float(loss(logits, y)) == pytest.approx(float(want), rel=1e-5)
    assert float(loss(logits, F.one_hot(y, 4).float())) == pytest.approx(float(want), rel=1e-5)
    assert loss.decodes(logits).tolist() == logits.argmax(1).tolist()
    assert loss.activation(logits).sum(1).tolist() == pytest.approx([1.0] * 5)


def test_smoothing_of_mixed_labels():
    logits, s = torch.randn(2, 3), 0.1
    mixed = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.5, 0.5]])
    want = -(((1 - s) * mixed + s / 3) * logits.log_softmax(1)).sum(1)
    loss = smooth_loss(s)
    assert float(loss(logits, mixed)) == pytest.approx(float(want.mean()), rel=1e-5)
    loss.reduction = 'none'
    assert loss(logits, mixed).tolist() == pytest.approx(want.tolist(), rel=1e-5)


@pytest.mark.parametrize('s', [-0.1, 1.0])
def test_wrong_smoothing(s):
    with pytest.raises(ValueError, match='expected a fraction of the label'):
        smooth_loss(s)


# --- pictures


def pictures():
    img = sample_image(64)
    return dict(
        pil=img,
        gray=img.convert('L'),
        cmyk=img.convert('CMYK'),
        palette=img.convert('P'),
        tensor=torch.from_numpy(np.array(img)).permute(2, 0, 1),
        wide=img.resize((90, 40)),
    )


@pytest.mark.parametrize('name', pictures())
def test_sizes_of_train_and_valid(name):
    train, valid = train_tfm(24, erase=1.0), valid_tfm(40, 32)
    for f, size in (train, 24), (valid, 32):
        x = f(pictures()[name])
        assert (
            x.shape == (3, size, size) and x.dtype == torch.float32 and type(x) is torch.Tensor and x.isfinite().all()
        )


def test_valid_is_the_middle_normalized():
    img = sample_image(64)
    x = valid_tfm(64, 32)(img)
    want = torch.from_numpy(np.array(img)).permute(2, 0, 1)[:, 16:48, 16:48] / 255
    want = (want - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    assert torch.allclose(x, want, atol=1e-6)


@pytest.mark.parametrize('value,test', [(0, lambda v: bool((v == 0).all())), ('random', lambda v: v.std() > 0.5)])
def test_erasing(value, test):
    torch.manual_seed(0)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    f = lambda p: train_tfm(32, trivial=False, erase=p, erase_value=value)(white)
    kept = f(0.0)
    assert kept.flatten(1).unique(dim=1).shape[1] == 1
    changed = [(f(1.0) != kept).any(0) for _ in range(20)]
    shares = [float(o.float().mean()) for o in changed]
    assert 0.01 < min(shares) and max(shares) < 0.4  # torchvision's scale, 0.02 to 0.33
    x = f(1.0)
    where = (x != kept).any(0)
    assert test(x[:, where])
    rows, cols = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
    assert where[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1].all()  # one rectangle
    many = [bool((f(0.1) != kept).any()) for _ in range(300)]
    assert 10 < sum(many) < 60


def test_trivial_augment_is_switched():
    full = lambda on: [o for o in train_tfm(24, trivial=on).transforms if isinstance(o, v2.TrivialAugmentWide)]
    assert len(full(True)) == 1 and not full(False)
    torch.manual_seed(0)
    gray = torch.full((3, 24, 24), 100, dtype=torch.uint8)
    plain = train_tfm(24, trivial=False, erase=0, mean=(0, 0, 0), std=(1, 1, 1))
    assert len({float(plain(gray).mean()) for _ in range(20)}) == 1  # a crop of one color is that color
    assert len({float(train_tfm(24, erase=0, mean=(0, 0, 0), std=(1, 1, 1))(gray).mean()) for _ in range(40)}) > 3


@pytest.mark.parametrize('f', [train_tfm(16), valid_tfm(16, 16)])
def test_floats_are_refused(f):
    with pytest.raises(TypeError, match='torch.float32, expected a PIL'):
        f(torch.rand(3, 20, 20))


def test_crop_larger_than_image():
    with pytest.raises(ValueError, match='resize=300 or more'):
        valid_tfm(232, 300)


# --- mixing


class Mixed(Callback):
    order, run_valid = 1, False

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        self.seen.append((self.x.clone(), self.y.clone()))


@pytest.mark.parametrize('cutmix,mixup', [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixed_labels_and_pixels(tmp_path, cutmix, mixup):
    "Every image holds its class as its value, so that labels can be read off the pixels."
    ds = Rows((torch.full((3, 8, 8), float(i % 4)), torch.tensor(i % 4)) for i in range(32))
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8), device='cpu')
    l = learner(tmp_path, [CutMixUp(cutmix, mixup, 4), Mixed()], dls, flat(4), loss_func=smooth_loss(0.1))
    torch.manual_seed(0)
    l.fit(3)
    kinds = set()
    for x, y in l.mixed.seen:
        assert y.shape == (8, 4) and y.sum(1).tolist() == pytest.approx([1.0] * 8, abs=1e-6)
        assert torch.allclose(x.mean((1, 2, 3)), y @ torch.arange(4.0), atol=1e-5)
        values = {round(v, 4) for v in x.unique().tolist()}
        kinds.add('cutmix' if values <= {0.0, 1.0, 2.0, 3.0} else 'mixup')
    assert kinds == {k for k, a in (('cutmix', cutmix), ('mixup', mixup)) if a}


def test_metrics_and_validation_see_plain_labels(tmp_path):
    ds = data(32, c=4)
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8), device='cpu')
    l = learner(tmp_path, [CutMixUp(num_classes=4), Mixed()], dls, flat(4), lr=0.0, metrics=accuracy)
    l.recorder.train_metrics = True
    torch.manual_seed(0)
    l.fit(1)
    want = np.mean([float((l.model(x).argmax(1) == y.argmax(1)).float().mean()) for x, y in l.mixed.seen])
    got = dict(zip(l.recorder.metric_names[1:], l.recorder.values[0]))
    preds, targs = l.get_preds()
    assert targs.dtype == torch.int64 and targs.tolist() == [int(y) for _, y in ds]
    assert got['train_accuracy'] == pytest.approx(want, abs=1e-6)
    assert got['valid_accuracy'] == pytest.approx(float((preds.argmax(1) == targs).float().mean()))


def test_mixing_partners_differ_in_a_batch_of_copies(tmp_path):
    ds = Rows((torch.full((3, 8, 8), float(i // 4)), torch.tensor(i // 4)) for i in range(32))  # four copies in a row
    dls = DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32), device='cpu')
    l = learner(tmp_path, [CutMixUp(0.0, 1.0, 8), Mixed()], dls, flat(8))
    torch.manual_seed(0)
    l.fit(1)
    ((x, y),) = l.mixed.seen
    assert (y > 0).sum(1).float().mean() > 1.6  # by neighbors it would be 1.25


@pytest.mark.parametrize('cutmix,mixup', [(0, 0), (-1, 0.2)])
def test_wrong_mixing(cutmix, mixup):
    with pytest.raises(ValueError, match='expected two alphas'):
        CutMixUp(cutmix, mixup)


def test_mixing_needs_the_number_of_classes(tmp_path):
    ds = data()
    l = learner(tmp_path, [CutMixUp()], DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8), device='cpu'))
    with pytest.raises(ValueError, match='pass num_classes'):
        l.fit(1)


def test_several_labels_are_not_mixed(tmp_path):
    ds = Rows((x, F.one_hot(y, 3).float()) for x, y in data())
    l = learner(
        tmp_path, [CutMixUp(num_classes=3)], DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8), device='cpu')
    )
    with pytest.raises(ValueError, match=r'labels of shape \(8, 3\), expected one class'):
        l.fit(1)


# --- repeated augmentation


@pytest.mark.parametrize(
    'n,reps,world_size', [(12, 4, 1), (12, 4, 2), (13, 4, 3), (5, 1, 1), (7, 1, 2), (3, 8, 1), (100, 3, 8), (1, 4, 2)]
)
def test_counts_of_repeats(n, reps, world_size):
    ranks = [_RepeatedSampler(n, reps, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    got = [list(o) for o in ranks]
    assert [len(o) for o in got] == [len(ranks[0])] * world_size == [math.ceil(n / world_size)] * world_size
    total = len(ranks[0]) * world_size
    counts = torch.bincount(torch.tensor(sum(got, [])), minlength=n)
    drawn = math.ceil(total / reps)
    if drawn <= n:
        assert (counts > 0).sum() == drawn and (counts == reps).sum() >= drawn - 1
        assert counts.max() == min(reps, total) and counts.sum() == total


def test_copies_go_to_different_processes():
    got = torch.tensor([list(_RepeatedSampler(64, 4, rank=r, world_size=4)) for r in range(4)])
    assert (got == got[:1]).all()  # the same image, at the same step, on each of four


def test_epochs_differ_and_repeat():
    s = _RepeatedSampler(40, 2, seed=3, rank=0, world_size=1)
    first = list(s)
    s.set_epoch(1)
    second = list(s)
    s.set_epoch(0)
    assert first != second and first == list(s) and first != list(_RepeatedSampler(40, 2, seed=4, rank=0, world_size=1))


def test_repeats_in_fastais_loader(tmp_path):
    l = learner(tmp_path, [RepeatedAugmentation(3, seed=1), Mixed()], loaders(24, shuffle=True, c=24), flat(24))
    l.fit(2)
    first, second = (torch.cat([y for _, y in l.mixed.seen[i : i + 6]]) for i in (0, 6))
    for o in first, second:
        assert sorted(o.bincount()[o.bincount() > 0].tolist()) == [3] * 8
    assert first.tolist() == list(_RepeatedSampler(24, 3, 1, 0, 1)) and first.tolist() != second.tolist()
    assert 'shuffle_fn' not in vars(l.dls.train) and sorted(l.dls.train.get_idxs()) == list(range(24))
    assert l.get_preds(ds_idx=1)[1].tolist() == list(range(9))  # validation is left alone


def test_a_loaders_own_order_comes_back(tmp_path):
    dls = loaders(shuffle=True)
    own = dls.train.shuffle_fn = lambda idxs: idxs[::-1]
    l = learner(tmp_path, [RepeatedAugmentation(2)], dls)
    l.fit(1)
    assert l.dls.train.shuffle_fn is own


def test_validation_needs_no_order(tmp_path):
    l = learner(tmp_path, [RepeatedAugmentation()])
    l.validate()
    assert len(l.get_preds()[0]) == 9 and 'shuffle_fn' not in vars(l.dls.train)


def test_repeats_after_a_fit_that_broke_off(tmp_path):
    l = learner(tmp_path, [RepeatedAugmentation(2), brk := Break('validate')], loaders(shuffle=True))
    with pytest.raises(KeyboardInterrupt):
        l.fit(2)
    l.remove_cb(brk)
    l.fit(1)
    assert 'shuffle_fn' not in vars(l.dls.train)


def test_repeats_need_an_order(tmp_path):
    with pytest.raises(ValueError, match='does not shuffle'):
        learner(tmp_path, [RepeatedAugmentation()]).fit(1)
    with pytest.raises(ValueError, match='reps=0'):
        _RepeatedSampler(10, 0)


# --- average


@pytest.mark.parametrize('steps,warmup', [(1, 0), (3, 0), (1, 1), (2, 2)])
def test_average_by_hand(tmp_path, steps, warmup):
    l = learner(tmp_path, [ModelEMA(0.8, steps, warmup), Watch()])
    l.fit(4)
    states, n = l.watch.weights[steps - 1 :: steps], 6 * warmup // steps
    avg = {k: v.double() for k, v in states[0].items()}
    for i, w in enumerate(states[1:], 1):
        avg = {k: w[k].double() if i <= n else 0.8 * avg[k] + 0.2 * w[k].double() for k in w}
    for k, v in l.model.state_dict().items():  # swapped in
        if v.is_floating_point():
            assert torch.allclose(v.double(), avg[k], atol=1e-6), k
        else:
            assert v == l.watch.weights[-1][k] == 24, k  # counted, not averaged
    assert not torch.allclose(params(l), params(l, l.watch.weights[-1]))


def test_validation_by_the_average_training_by_the_net(tmp_path):
    on, off = (learner(tmp_path, [ModelEMA(0.9, evaluate=e, swap=False), Watch()]) for e in (True, False))
    seen = []
    for l in on, off:
        l.fit(2)
        seen.append([r[1] for r in l.recorder.values])
    assert torch.equal(params(on), params(off)) and seen[0] != pytest.approx(seen[1], rel=1e-4)
    assert off.validate()[0] == pytest.approx(seen[1][-1]) and on.validate()[0] == pytest.approx(seen[1][-1])
    with on.model_ema.averaged():
        assert on.validate()[0] == pytest.approx(seen[0][-1])
    assert torch.equal(params(on), params(off))


def test_the_average_of_too_few_steps_is_not_put_in(tmp_path):
    l = learner(tmp_path, [ModelEMA(0.9, steps=100), Watch()])
    l.fit(1)
    assert all(torch.equal(v, l.watch.weights[-1][k]) for k, v in l.model.state_dict().items())


def test_validating_first_starts_no_average(tmp_path):
    l = learner(tmp_path, [ema := ModelEMA()])
    before = params(l)
    l.validate()
    l.get_preds()
    assert ema.average is None and torch.equal(params(l), before)


def averages(l):
    return all(torch.equal(v, l.model.state_dict()[k]) for k, v in l.model_ema.average.module.state_dict().items())


@pytest.mark.parametrize('swap', [True, False])
def test_what_is_saved_after_an_epoch_was_measured(tmp_path, swap):
    l = learner(tmp_path, [ModelEMA(0.9, swap=swap), Watch()])
    l.fit(3, cbs=SaveModelCallback(fname='best'))
    losses, raw = [r[1] for r in l.recorder.values], params(l, l.watch.weights[-1])
    assert min(losses) == losses[-1] == pytest.approx(l.validate()[0], rel=1e-5) and averages(l)
    assert not torch.allclose(params(l), raw)


class Nested(Callback):
    "Predicts and measures inside of a fit, as loggers do."

    order = 70

    def after_epoch(self):
        if hasattr(self, 'gather_preds'):
            return
        self.learn.get_preds(dl=self.dls.valid, inner=True)
        self.own = {k: v.clone() for k, v in self.model_ema.backup.items()}


def test_predicting_after_an_epoch(tmp_path):
    a, b = (learner(tmp_path, [ModelEMA(0.9), Watch()] + cbs) for cbs in ([], [Nested()]))
    for l in a, b:
        l.fit(3)
    assert torch.equal(params(a), params(b)) and torch.equal(params(b, b.nested.own), params(b, b.watch.weights[-1]))


def test_a_new_fit_begins_a_new_average(tmp_path):
    l = learner(tmp_path, [ema := ModelEMA(0.99)])
    l.save('start')
    l.fit(3)
    l.load('start')
    before = params(l)
    l.fit(1, lr=1e-9)
    assert torch.allclose(params(l), before, atol=1e-6) and ema.count == 6 == ema.average.n_averaged
    l.fit(2, start_epoch=1)
    assert ema.count == 12  # continues
    ema.load_state_dict(ema.state_dict())
    l.fit(1)
    assert ema.count == 18
    l.fit(1)
    assert ema.count == 6
    l.model = small(False)  # another net
    l.fit(1, reset_opt=True)
    assert ema.count == 6 and averages(l)


class Break(Callback):
    order = 90

    def __init__(self, event):
        self.event = event

    def before_validate(self):
        if self.event == 'validate' and self.epoch == 1:
            raise KeyboardInterrupt()


def test_broken_off_in_validation(tmp_path):
    l = learner(tmp_path, [ema := ModelEMA(0.9), Watch(), brk := Break('validate')])
    with pytest.raises(KeyboardInterrupt):
        l.fit(2)
    raw = params(l, l.watch.weights[-1])
    l.remove_cb(brk)
    l.validate()
    assert torch.equal(params(l), raw) and ema.backup is None


def test_weights_loaded_after_a_fit_that_broke_off_stay(tmp_path):
    l = learner(tmp_path, [ema := ModelEMA(0.9), brk := Break('validate')])
    l.save('start')
    before = params(l)
    with pytest.raises(KeyboardInterrupt):
        l.fit(2)
    l.remove_cb(brk)
    l.load('start')
    l.validate()
    assert torch.equal(params(l), before) and ema.backup is None


def test_resumed_state_may_be_measured_first(tmp_path):
    run(tmp_path, 4)
    l = learner(tmp_path, [ema := ModelEMA(0.8)], loaders(shuffle=True))
    l.load('half')
    ema.load_state_dict(torch.load(tmp_path / 'ema.pth', weights_only=True))
    with ema.averaged():
        assert averages(l) and l.validate() and averages(l)
    assert not averages(l)  # its own weights


def run(path, epochs, start=0, before=None):
    cbs = [WarmupCosine(warmup=1), CutMixUp(), RepeatedAugmentation(2), ModelEMA(0.8, steps=4, warmup=1)]
    l = learner(path, cbs + [Seeds(), Stop()], loaders(shuffle=True))
    if before:
        before(l)
    l.fit(epochs, start_epoch=start)
    return l


class Stop(Callback):
    "Saves after the second epoch, as a checkpoint would."

    order = 95

    def after_epoch(self):
        if self.epoch != 1:
            return
        self.learn.save('half')
        torch.save(self.learn.model_ema.state_dict(), self.path / 'ema.pth')


def test_resumed_average_is_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path, 4)

    def load(l):
        l.load('half')
        l.model_ema.load_state_dict(torch.load(tmp_path / 'ema.pth', weights_only=True))

    half = run(tmp_path, 4, start=2, before=load)
    for k, v in whole.model.state_dict().items():
        assert torch.equal(v, half.model.state_dict()[k]), k
    a, b = whole.model_ema.state_dict(), half.model_ema.state_dict()
    assert a['count'] == b['count'] == 24 and a['average'].keys() == b['average'].keys()
    assert all(torch.equal(v, b['average'][k]) for k, v in a['average'].items())


def test_the_wrong_average_is_refused(tmp_path):
    state = learner(tmp_path, [ema := ModelEMA()]) and ema.state_dict()
    other = learner(tmp_path, [ModelEMA()], net=flat(3))
    with pytest.raises(RuntimeError, match='size mismatch'):
        other.model_ema.load_state_dict(state)


@pytest.mark.parametrize('kw', [dict(decay=1.0), dict(decay=-0.1), dict(steps=0)])
def test_wrong_average(kw):
    with pytest.raises(ValueError, match='expected a decay from 0|expected at least 1 step per update'):
        ModelEMA(**kw)


def test_decay_for_the_length_of_a_training():
    assert ema_decay(0.99998, 32, 1024, 600) == pytest.approx(1 - 2e-5 * 1024 * 32 / 600)
    assert ema_decay(0.9, 32, 1024, 1) == 0.0


def test_export_with_an_average(tmp_path):
    l = learner(tmp_path, [ModelEMA(0.9), WarmupCosine(warmup=0.5)])
    l.fit(1)
    l.export('x.pkl')
    x = torch.randn(2, 3, 8, 8)
    again = load_learner(tmp_path / 'x.pkl')
    assert torch.equal(out(l.model.eval(), x), out(again.model.eval(), x))
    assert again.model_ema.average is None and l.model_ema.average.n_averaged == 6  # one net in the file


def same_average(rank, port, queue):
    import os

    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    ds = data()[12 * rank : 12 * rank + 12]
    dls = DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4), device='cpu')
    l = learner('.', [ModelEMA(0.8, steps=2)], dls, nn.parallel.DistributedDataParallel(small()))
    l.fit(2)
    queue.put((rank, {k: v.numpy().copy() for k, v in l.model_ema.average.state_dict().items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_same_average():
    import socket
    import torch.multiprocessing as mp

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    queue = mp.get_context('spawn').Queue()
    ctx = mp.spawn(same_average, (port, queue), nprocs=2, join=False)
    got = dict(queue.get(timeout=120) for _ in range(2))
    while not ctx.join():
        pass
    assert got[0]['n_averaged'] == 3
    for k, v in got[0].items():
        if 'running' not in k:
            assert np.array_equal(v, got[1][k]), k


# --- optimizer


@pytest.mark.parametrize('bias', [True, False])
def test_decay_is_absent_where_it_should_be(tmp_path, bias):
    "With gradients of zero a step changes what decays, and nothing else."
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.Linear(4, 3),
    )
    for p in net.parameters():
        nn.init.constant_(p, 1.0)
    l = learner('.', [NoDecay(bias)], net=net, loss_func=lambda p, y: (p * 0).sum(), wd=0.5)
    l.fit(1)
    decayed = {n for n, p in net.named_parameters() if (p != 1).any()}
    assert decayed == {'0.weight', '8.weight'} | (set() if bias else {'0.bias', '8.bias'})
    free = {id(p) for p in no_decay_params(net, bias)}
    assert {n for n, p in net.named_parameters() if id(p) not in free} == decayed


def test_fastai_decays_group_norm():
    "The reason for NoDecay; if fastai fixes this, the chapter must say so."
    from fastai.torch_core import norm_bias_params

    gn = nn.GroupNorm(2, 4)
    assert [id(p) for p in norm_bias_params(gn)] == [id(gn.bias)]


@pytest.mark.parametrize('name', ['vovnet19_slim_dw', 'cspdarknet19', 'mobilenet_v3_small', 'timm/convnext_atto'])
def test_what_decays_in_a_backbone_has_two_axes_or_more(name):
    from backbones_nb.core.create import create_backbone

    net = create_backbone(name)
    free = {id(p) for p in no_decay_params(net)}
    rest = {n: p.ndim for n, p in net.named_parameters() if id(p) not in free}
    assert rest and all(d > 1 or n.endswith('gamma') for n, d in rest.items())


@pytest.mark.parametrize('mom', [0.0, 0.9])
def test_sgd_is_torchs(tmp_path, mom):
    ours, net = learner(tmp_path, opt_func=sgd(mom), wd=0.05), small()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=mom, weight_decay=0.05)
    ours.fit(2)
    for _ in range(2):
        for x, y in loaders().train:
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    theirs = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.allclose(params(ours), theirs, atol=1e-5)
    other = learner(tmp_path, opt_func=partial(SGD, mom=mom), wd=0.05)
    other.fit(2)
    assert mom == 0.0 or not torch.allclose(params(other), theirs, atol=1e-3)  # fastai's own default decays otherwise


# --- accumulation, clipping, precision


def test_accumulated_is_one_large_batch(tmp_path):
    a = learner(tmp_path, [Accumulate(3, 4), Watch()], net=small(False))
    b = learner(tmp_path, [Watch()], loaders(bs=12), small(False))
    for l in a, b:
        l.fit(2)
    assert len(a.watch.weights) == len(b.watch.weights) == 4 and torch.allclose(params(a), params(b), atol=1e-6)


def test_accumulated_leftovers_are_dropped(tmp_path):
    "Six batches, four to a step: the last two of an epoch join no step of the next."
    a, b = (learner(tmp_path, [f, Watch()], net=small(False)) for f in (Accumulate(4, 4), GradientAccumulation(16)))
    for l in a, b:
        l.fit(2)
    assert len(a.watch.weights) == 2 and len(b.watch.weights) == 3
    assert all((p.grad == 0).all() for p in a.model.parameters())


def test_accumulation_with_schedule_and_average(tmp_path):
    l = learner(tmp_path, [Accumulate(2, 4), WarmupCosine(warmup=1), ema := ModelEMA(0.8, swap=False), Watch()])
    l.fit(4)
    f = warmup_cosine(0.1, 0.25)
    assert l.watch.lrs == pytest.approx(
        [f((2 * t + 1) / 24) for t in range(12)], rel=1e-5
    )  # that of a step's last batch
    assert ema.count == 12 == ema.average.n_averaged and len(l.watch.weights) == 12


@pytest.mark.parametrize('acc', [1, 2])
def test_clipping(tmp_path, acc):
    l = learner(tmp_path, [GradientClip(0.05), Watch()] + [Accumulate(acc, 4)] * (acc > 1))
    l.fit(1)
    assert len(l.watch.norms) == 6 // acc and l.watch.norms == pytest.approx([0.05] * (6 // acc), rel=1e-3)


class Overflow(Callback):
    "Spoils the gradients of one step."

    order, run_valid = 5, False

    def before_step(self):
        if self.train_iter == 2:
            next(self.model.parameters()).grad.fill_(float('inf'))


def test_a_step_that_overflows_is_not_averaged(tmp_path):
    cbs = [DetectionPrecision(amp_mode='fp16'), Overflow(), ema := ModelEMA(0.8, swap=False), GradientClip(0.05)]
    l = learner(tmp_path, cbs + [Watch()])
    l.fit(1)
    assert ema.count == 5 and len(l.watch.norms) == 5 and params(l).isfinite().all()
    assert l.watch.norms == pytest.approx([0.05] * 5, rel=1e-2)  # clipped after the scale was taken out


@pytest.mark.parametrize('amp', ['fp16', 'bf16'])
def test_half_precision(tmp_path, amp):
    r = recipe('vt_default', epochs=2, warmup=0.5, lr=0.5 * 1024 / 4, amp=amp)
    l = apply_recipe(learner(tmp_path, [Kinds()]), r)
    l.fit(2)
    assert l.kinds.seen == {dict(fp16=torch.float16, bf16=torch.bfloat16)[amp]} and params(l).dtype == torch.float32
    assert all(np.isfinite(v).all() for v in l.recorder.values)


class Kinds(Callback):
    "The types of what the first convolution gives."

    run_valid = False

    def before_fit(self):
        def note(m, x, y):
            if m.training:
                self.seen.add(y.dtype)

        self.seen, self.hook = set(), self.model[0].register_forward_hook(note)

    def after_fit(self):
        self.hook.remove()


def test_channels_last(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    r = recipe('vt_small', epochs=2, warmup=0.5, amp=None, ema_decay=0.9, no_decay='')
    nets = []
    for cl in True, False:
        torch.manual_seed(0)
        l = apply_recipe(learner(tmp_path, net=copy.deepcopy(net)), replace(r, channels_last=cl))
        l.fit(2)
        nets.append(l)
    a, b = nets
    last = lambda m: m[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert last(a.model) and last(a.model_ema.average.module) and not last(b.model)
    assert torch.allclose(params(a), params(b), atol=1e-5)


# --- rows


def test_rows():
    vt, small, large, tv = (recipes[k] for k in ('vt_default', 'vt_small', 'vt_large', 'torchvision'))
    assert (vt.epochs, vt.bs, vt.lr, vt.wd, vt.warmup, vt.smoothing) == (100, 1024, 0.5, 2e-5, 5, 0.1)
    assert (vt.train_size, vt.valid_resize, vt.valid_size) == (176, 232, 224)
    assert (small.erase, small.cutmix, small.mixup, small.smoothing, small.trivial) == (0, 0, 0, 0, True)
    assert large.train_size == 224 and large.lr / large.bs == vt.lr / vt.bs and large.smoothing == 0.1
    assert (tv.epochs, tv.reps, tv.ema_decay, tv.ema_steps, tv.no_decay, tv.amp) == (600, 4, 0.99998, 32, 'norm', None)
    assert all(r.source and r.name == k for k, r in recipes.items())


def test_recipe_by_name():
    r = recipe('vt_default', epochs=300)
    assert r.epochs == 300 and recipes['vt_default'].epochs == 100
    with pytest.raises(ValueError, match="'torchvision'"):
        recipe('torchvison')
    with pytest.raises(TypeError, match="'epochs'"):
        recipe('vt_default', epoch=3)


def test_table_has_all_fields():
    t = recipe_table()
    assert list(t.columns) == list(recipes) and set(t.index) == set(Recipe.__dataclass_fields__) - {'name'}
    assert t.loc['ema_decay', 'vt_default'] is None and t.loc['epochs', 'torchvision'] == 600
    assert list(recipe_table(recipe('vt_default', epochs=7)).loc['epochs']) == [7]


def test_recipes_of_one_name_stay_apart():
    t = recipe_table(recipe('vt_default'), recipe('vt_default', epochs=7), recipe('vt_small'))
    assert list(t.columns) == ['vt_default', 'vt_default', 'vt_small'] and list(t.loc['epochs']) == [100, 7, 100]
    assert list(t.loc['amp']) == ['fp16', 'fp16', 'fp16'] and t.loc['ema_decay'].isna().all()


def names(cbs):
    return sorted(type(o).__name__ for o in cbs)


def test_callbacks_of_the_rows():
    get = lambda name, **kw: names(recipe_cbs(recipe(name), 128, **kw))
    assert get('vt_small') == ['DetectionPrecision', 'NoDecay', 'WarmupCosine']
    assert get('vt_default') == get('vt_large') == ['CutMixUp', 'DetectionPrecision', 'NoDecay', 'WarmupCosine']
    assert get('torchvision', world_size=8) == [
        'CutMixUp',
        'ModelEMA',
        'NoDecay',
        'RepeatedAugmentation',
        'WarmupCosine',
    ]
    assert 'Accumulate' in get('vt_default', accum_steps=2)
    ema = next(o for o in recipe_cbs(recipe('torchvision'), 128, world_size=8) if isinstance(o, ModelEMA))
    assert ema.decay == pytest.approx(1 - 2e-5 * 1024 * 32 / 600) and (ema.steps, ema.warmup) == (32, 5)
    assert {o.bias for o in recipe_cbs(recipe('torchvision'), 8) if isinstance(o, NoDecay)} == {False}


other = dict(
    epochs=7,
    bs=24,
    lr=0.3,
    mom=0.7,
    wd=0.03,
    no_decay='norm',
    warmup=2,
    warmup_start=0.1,
    smoothing=0.2,
    trivial=False,
    erase=1.0,
    erase_value=9.0,
    cutmix=0.5,
    mixup=0.6,
    train_size=20,
    valid_resize=30,
    valid_size=24,
    reps=3,
    ema_decay=0.99,
    ema_steps=2,
    amp='bf16',
    channels_last=True,
    clip=0.5,
)


def test_every_field_reaches_its_place(tmp_path):
    r = Recipe('other', 'here', **other)
    default = Recipe('', '')
    assert set(other) == set(Recipe.__dataclass_fields__) - {'name', 'source'} and all(
        getattr(default, k) != v for k, v in other.items()
    )
    l = apply_recipe(learner(tmp_path, dls=loaders(shuffle=True)), r, accum_steps=2, seed=5)
    got = {type(o).__name__: o for o in l.cbs}
    assert (l.lr, l.wd, l.wd_bn_bias) == (pytest.approx(0.3 * 4 * 2 / 24), 0.03, True)
    assert l.loss_func.func.label_smoothing == 0.2 and l.opt_func.keywords == dict(mom=0.7, decouple_wd=False)
    assert (got['WarmupCosine'].warmup, got['WarmupCosine'].start, got['WarmupCosine'].peak) == (2, 0.1, None)
    assert not got['NoDecay'].bias and (got['CutMixUp'].cutmix, got['CutMixUp'].mixup) == (0.5, 0.6)
    assert (got['RepeatedAugmentation'].reps, got['RepeatedAugmentation'].seed) == (3, 5) and got[
        'Accumulate'
    ].n_acc == 2 * 4
    assert (
        got['DetectionPrecision'].amp_mode.value == 'bf16'
        and got['GradientClip'].max_norm == 0.5
        and 'ChannelsLast' in got
    )
    ema = got['ModelEMA']
    assert ema.decay == pytest.approx(1 - 0.01 * 8 * 2 / 7) and (ema.steps, ema.warmup, ema.swap, ema.evaluate) == (
        2,
        2,
        True,
        True,
    )
    assert recipe_cbs(r, 4, world_size=3, accum_steps=2)[-1].decay == pytest.approx(1 - 0.01 * 24 * 2 / 7)
    l.fit(7)
    assert l.recorder.hps['lr'][0] == pytest.approx(0.1 * 0.1) and all(
        h['mom'] == 0.7 and h['wd'] == 0.03 for h in l.opt.hypers
    )


def test_every_field_reaches_the_transforms():
    train, valid = recipe_tfms(Recipe('other', 'here', **other), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    gray = torch.full((3, 40, 60), 51, dtype=torch.uint8)  # 0.2
    want = [(0.2 - m) / s for m, s in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))]
    torch.manual_seed(0)
    x = train(gray)
    assert x.shape == (3, 20, 20) and {tuple(round(v, 4) for v in o) for o in x.flatten(1).T.tolist()} == {
        tuple(round(v, 4) for v in want),
        (9.0, 9.0, 9.0),
    }
    assert valid(gray).shape == (3, 24, 24) and valid(gray).mean((1, 2)).tolist() == pytest.approx(want, abs=1e-5)
    find = lambda kind: next(o for o in train.transforms if isinstance(o, kind))
    assert find(v2.RandomErasing).p == 1.0 and not any(isinstance(o, v2.TrivialAugmentWide) for o in train.transforms)
    assert next(o for o in valid.transforms if isinstance(o, v2.Resize)).size == [30]
    ramp = torch.arange(40, dtype=torch.uint8).expand(3, 40, 40) * 6  # from left to right
    falls = [bool((o[0, :, -1] < o[0, :, 0]).all()) for o in (train_tfm(20, False, 0.0)(ramp) for _ in range(60))]
    assert 15 < sum(falls) < 45  # mirrored as often as not


bad = dict(
    epochs=[0, 2.5, True, '3'],
    bs=[0],
    lr=[0, -1, '0.1', float('nan')],
    mom=[1, 2, -0.1],
    wd=[-1],
    no_decay=['bn', None],
    warmup=[-1],
    warmup_start=[-1, 2],
    smoothing=[1, 2],
    trivial=['no', 1],
    erase=[2, -1],
    erase_value=['noise', None, ('a',), (1, 2)],
    cutmix=[-1, True],
    mixup=[-1],
    train_size=[0, (20, 20)],
    valid_resize=[0],
    valid_size=[-5],
    reps=[0],
    ema_decay=[1, 2, -1],
    ema_steps=[0],
    amp=['fp17', True, ''],
    channels_last=['yes'],
    clip=[0, -1],
)


@pytest.mark.parametrize('field', other)
def test_rows_that_cannot_be(field):
    for v in bad[field]:
        with pytest.raises(ValueError, match=rf'got a recipe with {field}={re.escape(repr(v))}, expected '):
            recipe('vt_default', **{field: v})
    good = dict(ema_decay=None, amp=None, clip=None, erase_value=(1, 2, 3))
    if field in good:
        assert getattr(recipe('torchvision', **{field: good[field]}), field) == good[field]


@pytest.mark.parametrize('name', [None, 3, 'tv', []])
def test_no_recipe(name):
    with pytest.raises(ValueError, match=r'got the recipe .* expected one of vt_default, .*, torchvision, or a Recipe'):
        recipe(name)


def test_transforms_of_the_rows():
    for r in recipes.values():
        train, valid = recipe_tfms(r)
        img = sample_image(256)
        assert train(img).shape[-1] == r.train_size and valid(img).shape[-1] == 224
        assert sum(isinstance(o, v2.RandomErasing) for o in train.transforms) == (r.erase > 0)


@pytest.mark.parametrize('name', recipes)
def test_a_row_trains(tmp_path, name):
    r = recipe(name, epochs=3, warmup=0.5, ema_steps=2)
    l = apply_recipe(learner(tmp_path, dls=loaders(shuffle=True), metrics=accuracy), r, accum_steps=2)
    assert l.lr == pytest.approx(r.lr * 8 / r.bs) and l.wd == r.wd
    before = params(l)
    l.fit(3)
    assert not torch.equal(params(l), before) and np.isfinite(np.array(l.recorder.values)).all()


def test_a_recipe_takes_the_place_of_another(tmp_path):
    l = apply_recipe(learner(tmp_path, dls=loaders(shuffle=True)), 'torchvision')
    n = len(l.cbs)
    apply_recipe(l, 'torchvision')
    assert len(l.cbs) == n
    apply_recipe(l, 'vt_small')
    assert not hasattr(l, 'model_ema') and not hasattr(l, 'cut_mix_up')


def test_a_recipe_for_a_frozen_learner(tmp_path):
    l = learner(tmp_path, splitter=halves, opt_func=SGD)
    l.freeze()
    apply_recipe(l, recipe('vt_small', epochs=2, warmup=0.5, lr=10.0))
    assert l.opt.frozen_idx == 1 and 'mom' in l.opt.hypers[0]
    first, last = l.model[0].weight.clone(), l.model[-1].weight.clone()
    l.fit(2)
    assert torch.equal(l.model[0].weight, first) and not torch.equal(l.model[-1].weight, last)


# --- with real images


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "18 noisy images of training and 6 of validation, red, green or blue."
    path, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for part, n in dict(train=6, val=2).items():
        for c, name in enumerate('bgr'):  # in alphabetical order
            (path / part / name).mkdir(parents=True)
            for i in range(n):
                a = rng.integers(0, 100, (40, 48, 3))
                a[..., 2 - c] += 120
                Image.fromarray(a.astype(np.uint8)).save(path / part / name / f'{i}.png')
    return path


tiny = dict(epochs=2, warmup=0.5, train_size=32, valid_resize=40, valid_size=32, amp=None, ema_steps=1)


def quiet(l, path):
    l.remove_cb(l.progress)
    l.logger, l.path = lambda *a: None, path
    return l


def image_learner(path, dls, r, **kw):
    torch.manual_seed(0)
    return apply_recipe(quiet(backbone_learner(dls, 'vovnet19_slim_dw', strides=4, normalize=False), path), r, **kw)


@pytest.mark.parametrize('name', recipes)
def test_exported_and_predicting(tmp_path, folder, name):
    r = recipe(name, **tiny)
    l = image_learner(
        tmp_path, folder_dls(folder, bs=6, tfms=recipe_tfms(r), normalized=True, num_workers=0, device='cpu'), r
    )
    l.fit(2)
    image = folder / 'val' / 'r' / '0.png'
    want = l.predict(image)[2]
    l.export('x.pkl')
    assert torch.equal(load_learner(tmp_path / 'x.pkl').predict(image)[2], want)
    size = sum(o.numel() * o.element_size() for o in l.model.state_dict().values())
    assert (tmp_path / 'x.pkl').stat().st_size < 1.2 * size  # one net, no data


@pytest.mark.parametrize('given', [None, 3])
def test_the_seed_reaches_repeated_augmentation(tmp_path, folder, given):
    r = recipe('torchvision', **tiny)
    dls = folder_dls(folder, bs=6, tfms=recipe_tfms(r), normalized=True, seed=7, num_workers=0, device='cpu')
    l, orders = image_learner(tmp_path, dls, r, seed=given), []
    l.add_cb(Callback(after_train=lambda _: orders.append(dls.train.order.tolist())))
    l.fit(2)
    sampler = _RepeatedSampler(18, 4, 7 if given is None else given, 0, 1)
    assert orders[0] == list(sampler)


def block_dls(folder, target=CategoryBlock, get_y=lambda o: o.parent.name):
    items = sorted(folder.rglob('*.png'))
    db = DataBlock(
        (ImageBlock, target),
        get_items=lambda _: items,
        get_y=get_y,
        splitter=IndexSplitter([i for i, o in enumerate(items) if 'val' in str(o)]),
        item_tfms=_RecipeTransform(recipe('vt_small', **tiny)),
    )
    return db.dataloaders(folder, bs=6, num_workers=0, device='cpu')


def test_fastais_loaders_take_a_recipes_transforms(tmp_path, folder):
    import matplotlib.pyplot as plt

    plt.switch_backend('agg')
    r = recipe('torchvision', **tiny)
    dls = ImageDataLoaders.from_folder(
        folder, train='train', valid='val', item_tfms=_RecipeTransform(r), bs=6, num_workers=0, device='cpu'
    )
    valid, image = recipe_tfms(r)[1], Image.open(dls.valid_ds.items[0])
    x, y = dls.valid.one_batch()
    assert torch.equal(x[0].as_subclass(torch.Tensor), valid(image)) and y.tolist() == [0, 0, 1, 1, 2, 2]
    torch.manual_seed(0)
    a, b = (dls.train.one_batch()[0] for _ in range(2))
    assert a.shape == (6, 3, 32, 32) and not torch.equal(a, b)
    shown = dls.valid.decode_batch((x, y))[0][0]
    assert torch.allclose(
        shown.as_subclass(torch.Tensor),
        v2.functional.to_dtype(v2.CenterCrop(32)(v2.functional.pil_to_tensor(image)), torch.float32, scale=True),
        atol=1e-5,
    )
    l = image_learner(tmp_path, dls, r)
    l.fit(2)
    dls.show_batch(max_n=2)
    l.show_results(max_n=2)
    plt.close('all')
    want = l.predict(dls.valid_ds.items[0])[2]
    assert torch.allclose(want, l.get_preds()[0][0], atol=1e-5)
    l.export('x.pkl')
    assert torch.equal(load_learner(tmp_path / 'x.pkl').predict(dls.valid_ds.items[0])[2], want)


@pytest.mark.parametrize(
    'kw,message',
    [
        (dict(target=MultiCategoryBlock, get_y=lambda o: [o.parent.name]), 'BCEWithLogitsLoss'),
        (dict(target=RegressionBlock, get_y=lambda o: 1.0), 'MSELoss'),
    ],
)
def test_recipes_are_for_one_label(tmp_path, folder, kw, message):
    dls = block_dls(folder, **kw)
    for loss in None, nn.SmoothL1Loss():
        l = quiet(backbone_learner(dls, 'resnet18', strides=4, loss_func=loss), tmp_path)
        with pytest.raises(
            ValueError, match=f'got a learner with {message}, expected cross-entropy with one label per image'
        ):
            apply_recipe(l, 'vt_small')
        assert not hasattr(l, 'warmup_cosine')


def test_two_precisions(tmp_path):
    l = learner(tmp_path).to_fp16()
    with pytest.raises(ValueError, match=r"MixedPrecision and a recipe with amp='fp16'.*to_fp32\(\)"):
        apply_recipe(l, 'vt_default')
    assert names(apply_recipe(l.to_fp32(), 'vt_default').cbs).count('DetectionPrecision') == 1


def test_loaders_of_torch(tmp_path):
    ds, r = list(data()), recipe('vt_default', epochs=2, warmup=0.5, amp=None)
    plain = torch.utils.data.DataLoader(ds, batch_size=4)
    l = apply_recipe(learner(tmp_path, dls=DataLoaders(plain, plain)), replace(r, cutmix=0, mixup=0))
    assert l.lr == pytest.approx(0.5 * 4 / 1024)
    l.fit(2)
    odd = torch.utils.data.DataLoader(ds, batch_sampler=[[0, 1], [2, 3, 4]])
    with pytest.raises(ValueError, match=r'batch size of the training loader \(DataLoader\) is unknown.*pass bs'):
        apply_recipe(learner(tmp_path, dls=DataLoaders(odd, odd)), r)
    assert apply_recipe(learner(tmp_path, dls=DataLoaders(odd, odd)), r, bs=2).lr == pytest.approx(0.5 * 2 / 1024)
