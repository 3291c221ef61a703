import inspect

import numpy as np
import pytest
import timm
import torch
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, Normalize, using_attr
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy, accuracy_multi
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from PIL import Image
from torch import nn
from torchvision import models

from common import buffers, copies, noise, out
from common import make_dls as box_dls

from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD
from backbones_nb.analysis.parity import randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones
from backbones_nb.core.published import WeightRecord
from backbones_nb.data.pets import breed_of, read_list
from backbones_nb.detectors import faster_rcnn
from backbones_nb.imagenet.classifier import backbone_learner, classifier, pools

small = 'vovnet19_slim_dw'
some = [
    small,
    'resnet18',
    'resnet18_fpn',
    'mobilenet_v3_small',
    'darknet19',
    'regnet_y_400mf',
    'timm/resnet10t',
    'timm/vit_tiny_patch16_224',
]


def ids(params):
    return [id(p) for p in params]


def stats(dls):
    return [
        (f.mean.flatten().tolist(), f.std.flatten().tolist()) for f in dls.after_batch.fs if isinstance(f, Normalize)
    ]


def near(*pairs):
    return [tuple(pytest.approx(list(o), abs=1e-6) for o in pair) for pair in pairs]


# --- the model


@pytest.mark.parametrize('name', some)
def test_any_backbone(name):
    m = classifier(name, 7)
    logits = m(noise(64, n=2))
    assert logits.shape == (2, 7) and m.head.fc.in_features == m.backbone.channels[-1]
    logits.sum().backward()
    assert all(p.grad is not None for g in m.param_groups()[-1:] for p in g) and m.param_groups()[0][0].grad is not None
    groups = m.param_groups()
    assert sorted(ids(sum(groups, []))) == sorted(ids(m.parameters())) and ids(groups[-1]) == ids(m.head.parameters())
    assert [ids(g) for g in groups[:-1]] == [ids(g) for g in m.backbone.param_groups()]


@pytest.mark.slow
@pytest.mark.parametrize('name', list_backbones())
def test_every_backbone(name):
    with torch.device('meta'):
        m = classifier(name, 7)
    assert m(torch.zeros(2, 3, 64, 96, device='meta')).shape == (2, 7)
    assert sorted(ids(sum(m.param_groups(), []))) == sorted(ids(m.parameters()))


@pytest.mark.parametrize('pool', pools)
def test_pools(pool):
    m, x = classifier(small, 3, pool=pool).eval(), noise(64)
    o = out(m.backbone, x)[-1]
    avg, most = o.mean((2, 3)), o.amax((2, 3))
    want = dict(avg=avg, max=most, avgmax=(avg + most) / 2, catavgmax=torch.cat([avg, most], 1))[pool]
    torch.testing.assert_close(out(m, x), out(m.head.fc, want))
    assert f'pool {pool}' in repr(m)


def test_dropout():
    m, x = classifier(small, 3, dropout=0.5), noise(64)
    assert m.eval() and torch.equal(out(m, x), out(m, x))
    m.head.train()
    assert not torch.equal(out(m, x), out(m, x))


def test_the_same_numbers_as_timm_and_torchvision():
    x = noise(64)
    theirs = randomize_(timm.create_model('resnet10t', num_classes=5), x=x).eval()
    m = classifier('timm/resnet10t', 5).eval()
    m.backbone.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')})
    m.head.fc.load_state_dict(theirs.fc.state_dict())
    torch.testing.assert_close(out(m, x), out(theirs, x))
    theirs = randomize_(models.resnet18(num_classes=5), x=x).eval()
    m = classifier('resnet18', 5).eval()
    m.load_state_dict(dict(zip(m.state_dict(), theirs.state_dict().values())))
    torch.testing.assert_close(out(m, x), out(theirs, x))


def test_what_is_built():
    bb = create_backbone(small, strides=(8, 16))
    m = classifier(bb, 4)
    assert (
        m.backbone is bb and bb.strides == (8, 16) and m.head.fc.in_features == bb.channels[1]
    )  # a given net is left as it is
    assert (
        repr(m).splitlines()[0]
        == f'Classifier: {small} (random weights), map at stride 16 with {bb.channels[1]} channels'
    )
    assert classifier('vovnet39', 4, ese=False, residual=False).backbone.config['ese'] is False
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    assert classifier(body, 4)(noise(32)).shape == (1, 4)
    assert classifier(create_backbone(small).double(), 4).eval()(noise(32).double()).dtype == torch.float64


def test_freeze_to():
    m = classifier(small, 3)
    n = len(m.param_groups())
    assert m.freeze_to(-1) is m and all(p.requires_grad for p in m.head.parameters())
    assert not any(p.requires_grad for p in m.backbone.parameters() if p.dim() > 1)
    was = buffers(m)
    m.train()(noise(64, n=2))
    assert any(
        not torch.equal(v, was[k]) for k, v in m.named_buffers()
    )  # batch norm of random weights continues learning
    m.freeze_to(n)
    assert not any(p.requires_grad for p in m.head.parameters())
    assert all(p.requires_grad for p in m.freeze_to(0).parameters())
    with pytest.raises(ValueError, match=rf'got freeze_to\({n + 1}\), but there are {n} groups'):
        m.freeze_to(n + 1)


@pytest.mark.parametrize('how', copies)
def test_copies(how):
    m = classifier(small, 3, pool='max').eval()
    assert torch.equal(out(copies[how](m), noise(64)), out(m, noise(64)))


def test_one_channel():
    m = classifier(small, 3).eval()
    x = noise(64)[:, :1]
    assert torch.equal(out(m, x), out(m, x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    'args, kw, error, message',
    [
        (('vovnet_39', 3), {}, ValueError, "no backbone 'vovnet_39'.*Did you mean"),
        ((3, 3), {}, TypeError, 'got int, expected a name'),
        ((small, 0), {}, ValueError, 'got num_classes=0, expected'),
        ((small, True), {}, ValueError, 'got num_classes=True'),
        ((small, '3'), {}, ValueError, "got num_classes='3'"),
        ((small, 3), dict(pool='mean'), ValueError, "got pool='mean', expected one of avg, max, avgmax, catavgmax"),
        ((small, 3), dict(pool='avgmx'), ValueError, "Did you mean 'avgmax'"),
        ((small, 3), dict(pool=None), ValueError, 'got pool=None'),
        ((small, 3), dict(dropout=1), ValueError, 'got dropout=1, expected'),
        ((small, 3), dict(dropout=-0.1), ValueError, 'got dropout=-0.1'),
        ((small, 3), dict(droput=0.1), TypeError, "takes no argument 'droput'"),
        ((small, 3), dict(pretrained='nobody'), ValueError, small),
        ((small, 3), dict(pretrained=''), ValueError, "got pretrained=''"),
        ((models.resnet18(), 3), {}, ValueError, 'expected feature maps.*without its classifier head'),
        (
            (classifier(small, 3), 3),
            {},
            ValueError,
            'got a whole Classifier, expected a backbone: pass its `.backbone`',
        ),
        ((faster_rcnn.model(3, small), 3), {}, ValueError, 'got a whole .*pass its `.backbone`'),
    ],
)
def test_what_is_refused(args, kw, error, message):
    with pytest.raises(error, match=message):
        classifier(*args, **kw)


@pytest.mark.parametrize(
    'kw, message',
    [
        (dict(pretrained=True), 'pretrained=True, expected a name'),
        (dict(ese=False, residual=True), 'ese=False, residual=True, expected a name'),
    ],
)
def test_a_built_net_takes_no_more(kw, message):
    with pytest.raises(ValueError, match=message):
        classifier(create_backbone(small), 3, **kw)


@pytest.mark.parametrize(
    'x, message',
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'got images of torch.uint8, expected normalized float'),
        (torch.zeros(1, 4, 32, 32), 'got images with 4 channels, expected 3'),
        (torch.zeros(3, 32, 32), 'add the batch dimension'),
    ],
)
def test_wrong_images(x, message):
    with pytest.raises(ValueError, match=message):
        classifier(small, 3)(x)


# --- the learner


@pytest.fixture(scope='module')
def colors(tmp_path_factory):
    "24 noisy images that are red, green or blue."
    path, rng = tmp_path_factory.mktemp('colors'), np.random.RandomState(0)
    for i in range(24):
        a = rng.randint(0, 100, (40, 48, 3))
        a[..., i % 3] += 120
        Image.fromarray(a.astype(np.uint8)).save(path / f'{("red", "green", "blue")[i % 3]}_{i}.png')
    return sorted(path.glob('*.png'), key=lambda o: int(o.stem.split('_')[1]))


def get_items(items):
    return items


def both(name):
    return ['warm', 'red'] if name.startswith('red') else [breed_of(name)]  # two labels an image may have


def often(items):
    return items[:18] * 5 + items[18:], range(90, 96)  # items, and which are for validation


def make_dls(items, valid=range(18, 24), path=None, block=ImageBlock, target=CategoryBlock, get_y=breed_of):
    db = DataBlock(
        (block, target),
        get_items=get_items,
        get_y=using_attr(get_y, 'stem'),
        splitter=IndexSplitter(valid),
        item_tfms=Resize(32),
    )
    return db.dataloaders(items, path=path, bs=6, num_workers=0, device='cpu')


def shallow():
    return create_backbone('resnet18', strides=4)  # enough for colors


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


@pytest.fixture
def dls(colors, tmp_path):
    return make_dls(colors, path=tmp_path)


def make(dls, backbone=small, **kw):
    set_seed(0)
    dls.rng.seed(0)
    return quiet(backbone_learner(dls, backbone, **dict(metrics=accuracy) | kw))


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A record of weights that were trained with mean and std 0.5."
    torch.manual_seed(1)
    f = tmp_path_factory.mktemp('weights') / 'half.pth'
    torch.save(randomize_(create_backbone(small), x=noise(64, n=2)).state_dict(), f)
    return WeightRecord(small, 'half', 'us', url=f.as_uri(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_it_learns(colors, tmp_path):
    learn = make(make_dls(*often(colors), path=tmp_path), shallow())
    learn.fit_one_cycle(3, 1e-2)
    loss, acc = learn.validate()
    assert acc == 1 and loss < 0.1, (loss, acc)


def test_as_vision_learner_does(dls):
    ours, theirs = make(dls), vision_learner(dls, models.resnet18, pretrained=False)
    takes = [inspect.signature(f).parameters for f in (backbone_learner, vision_learner)]
    assert {k for k in takes[0] if k in takes[1] and takes[0][k].default != takes[1][k].default} == {
        'pretrained',
        'pool',
        'splitter',
    }
    for k in ('lr', 'wd', 'moms', 'train_bn', 'wd_bn_bias', 'opt_func', 'path', 'model_dir', 'n_out', 'normalize'):
        assert getattr(ours, k) == getattr(theirs, k), k
    assert (
        isinstance(ours, Learner)
        and type(ours.loss_func) is type(theirs.loss_func)
        and ours.n_out == ours.model.num_classes == 3
    )
    assert (ours.arch, ours.pretrained) == (small, None)


def test_normalization(colors, tmp_path, half):
    def new():
        return make_dls(colors, path=tmp_path)

    imagenet, own = (IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3,) * 2
    dls = new()
    for _ in range(2):
        make(dls)  # once, however many learners
    assert stats(dls.train) == stats(dls.valid) == near(imagenet)
    x = dls.valid.one_batch()[0]
    assert stats(make(new(), pretrained=half).dls) == near(own)
    assert stats(make(new(), create_backbone(small, pretrained=half)).dls) == near(own)
    assert stats(make(new(), normalize=False).dls) == []
    plain = new()
    torch.testing.assert_close(
        x,
        (plain.valid.one_batch()[0] - torch.tensor(IMAGENET_MEAN)[:, None, None])
        / torch.tensor(IMAGENET_STD)[:, None, None],
    )
    kept = new()
    kept.add_tfms([Normalize.from_stats(*own, cuda=False)], 'after_batch')
    for kw in ({}, dict(pretrained=half)):
        assert stats(make(kept, **kw).dls) == near(own)
    with pytest.raises(
        ValueError,
        match=r'other values than mean \[0.5, 0.5, 0.5\].*weights half of vovnet19_slim_dw.*normalize=False',
    ):
        make(dls, pretrained=half)
    assert stats(make(dls, pretrained=half, normalize=False).dls) == near(imagenet)


def test_what_it_passes_on(dls):
    learn = make(
        dls,
        pool='max',
        dropout=0.3,
        strides=(4, 16),
        n_out=5,
        splitter=lambda m: [[*m.backbone.parameters()], [*m.head.parameters()]],
    )
    head = learn.model.head
    assert (head.global_pool.pool_type, head.drop.p, head.fc.out_features, learn.model.backbone.strides) == (
        'max',
        0.3,
        5,
        (4, 16),
    )
    assert 'pool max, dropout 0.3' in repr(learn.model)
    learn.create_opt()
    assert [len(o) for o in learn.opt.param_lists] == [len([*o.parameters()]) for o in (learn.model.backbone, head)]


def test_another_head(dls, half):
    learn = make(dls, pretrained=half)
    learn.model.head, learn.opt = (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(learn.model.backbone.channels[-1], 3)),
        None,
    )
    learn.freeze()
    first, was = learn.model.head[2].weight.detach().clone(), learn.model.backbone.stem[0].conv.weight.clone()
    learn.fit(1, 1e-2)
    assert not torch.equal(learn.model.head[2].weight, first) and torch.equal(
        learn.model.backbone.stem[0].conv.weight, was
    )
    assert 'head Sequential' in repr(learn.model)


def test_pretrained_is_frozen(dls, half):
    learn = make(dls, pretrained=half)
    assert learn.pretrained == 'half' and learn.opt.frozen_idx == len(learn.model.param_groups()) - 1
    was = {k: v.clone() for k, v in learn.model.named_parameters()}
    learn.fit(1, 1e-2)
    moved = {k for k, v in learn.model.named_parameters() if not torch.equal(v, was[k])}
    norms = {k for k, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {'head.fc.weight', 'head.fc.bias'} <= moved and all(
        k.startswith('head.') or k.rpartition('.')[0] in norms for k in moved
    )
    learn.unfreeze()
    learn.fit(1, slice(1e-4, 1e-2))
    assert len({h['lr'] for h in learn.opt.hypers}) == len(learn.model.param_groups())
    assert any(
        k.startswith('backbone.') and v.dim() == 4 and not torch.equal(v, was[k])
        for k, v in learn.model.named_parameters()
    )
    assert make(dls, normalize=False).opt is None  # random weights are free from the start


def test_fine_tune(dls, half):
    learn, seen = make(dls, pretrained=half), []
    fit = learn.fit_one_cycle
    learn.fit_one_cycle = lambda *a, **kw: (seen.append(learn.opt.frozen_idx), fit(*a, **kw))
    learn.fine_tune(1, 1e-3)
    assert seen == [len(learn.model.param_groups()) - 1, 0]


def test_using_it(dls, colors):
    learn = make(dls, 'timm/resnet10t')
    learn.fit_one_cycle(1, 1e-3)
    assert learn.lr_find(show_plot=False, num_it=5).valley > 0
    preds, targs = learn.get_preds()
    assert preds.shape == (6, 3) and targs.tolist() == [dls.vocab.o2i[breed_of(o.stem)] for o in dls.valid_ds.items]
    torch.testing.assert_close(preds.sum(1), torch.ones(6))
    name, i, probs = learn.predict(colors[-1])
    assert name == dls.vocab[i] and torch.allclose(probs, preds[-1], atol=1e-5)
    learn.export('m.pkl')
    assert torch.equal(load_learner(learn.path / 'm.pkl').predict(colors[-1])[2], probs)
    learn.save('w')
    other = make(dls, 'timm/resnet10t').load('w')
    assert torch.equal(other.get_preds()[0], preds)
    loaded = load_learner(learn.path / 'm.pkl')
    assert stats(loaded.dls) == stats(dls)


def test_looking_at_it(dls, tmp_path):
    import matplotlib.pyplot as plt

    plt.switch_backend('agg')
    learn = make(dls)
    interp = ClassificationInterpretation.from_learner(learn)
    preds, targs, losses = learn.get_preds(with_loss=True)
    m = interp.confusion_matrix()
    want = np.zeros((3, 3), int)
    for t, p in zip(targs, preds.argmax(1)):
        want[t, p] += 1
    assert (m == want).all() and torch.equal(interp.top_losses(2)[0], losses.topk(2)[0])
    assert sum(n for *_, n in interp.most_confused()) == m.sum() - m.trace()
    plt.close('all')
    interp.plot_top_losses(2)
    assert len([a for a in plt.gcf().axes if a.images]) == 2
    interp.plot_confusion_matrix()
    learn.show_results(max_n=4)
    assert len([a for a in plt.gcf().axes if a.images]) == 4
    plt.close('all')
    learn.add_cb(TensorBoardCallback(log_dir=tmp_path / 'log', trace_model=True, log_preds=True))
    learn.fit(1)
    assert list((tmp_path / 'log').iterdir())


@pytest.mark.parametrize('switch', ['to_fp16', 'to_bf16', 'to_channelslast'])
def test_switches(dls, switch):
    learn = getattr(make(dls), switch)()
    learn.fit_one_cycle(1, 1e-3)
    assert all(np.isfinite(o) for o in learn.recorder.values[-1]) and learn.get_preds()[0].shape == (6, 3)


def test_more_than_one_label(colors, tmp_path):
    dls = make_dls(*often(colors), path=tmp_path, target=MultiCategoryBlock, get_y=both)
    learn = make(dls, shallow(), metrics=accuracy_multi)
    assert learn.model.num_classes == 4 == len(dls.vocab)
    learn.fit_one_cycle(3, 1e-2)
    preds, targs = learn.get_preds()
    assert preds.shape == targs.shape == (6, 4) and targs.sum(1).tolist() == [
        1 + o.stem.startswith('red') for o in dls.valid_ds.items
    ]
    assert learn.validate()[1] == 1
    names, flags, probs = learn.predict(colors[0])
    assert (
        set(names)
        == {dls.vocab[i] for i in flags.nonzero()[:, 0]}
        == {dls.vocab[i] for i in (probs > 0.5).nonzero()[:, 0]}
    )
    learn.show_results(max_n=2)


def test_images_of_one_channel(colors, tmp_path):
    dls = make_dls(colors, path=tmp_path, block=ImageBlock(cls=PILImageBW))
    learn = make(dls)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.get_preds()[0].shape == (6, 3)
    assert learn.predict(colors[0])[0] in dls.vocab
    learn.show_results(max_n=2)
    raw = make(make_dls(colors, path=tmp_path, block=ImageBlock(cls=PILImageBW)), normalize=False)
    assert raw.dls.one_batch()[0].shape[1] == 1 and raw.get_preds()[0].shape == (6, 3)


@pytest.mark.parametrize(
    'kw, error, message',
    [
        (dict(ps=0.5), TypeError, "takes no argument 'ps': call it dropout"),
        (dict(concat_pool=True), TypeError, "pass pool='catavgmax'"),
        (dict(num_classes=3), TypeError, 'call it n_out'),
        (dict(cut=-1), TypeError, 'pass strides'),
        (dict(n_in=4), TypeError, 'only 1 and 3 channels'),
        *[
            (dict([o]), TypeError, f'{o[0]!r}: it belongs to a head that does not exist here.*learn.model.head')
            for o in dict(custom_head=3, lin_ftrs=[512], y_range=(0, 1)).items()
        ],
        (dict(ese=False), TypeError, "takes no argument 'ese'.*create_backbone"),
        (dict(droput=0.1), TypeError, "Did you mean 'dropout'"),
        (dict(backbone=create_backbone(small), strides=8), ValueError, 'got an existing .*strides=8, expected a name'),
        (dict(metric=accuracy), TypeError, "Did you mean 'metrics'"),
        (dict(model=3), TypeError, "takes no argument 'model'"),
        (dict(n_out=-1), ValueError, 'got num_classes=-1'),
        (dict(backbone='resnt18'), ValueError, "no backbone 'resnt18'.*'resnet18'"),
        (dict(pool='none'), ValueError, "got pool='none'"),
    ],
)
def test_what_the_learner_refuses(dls, kw, error, message):
    with pytest.raises(error, match=message):
        make(dls, **kw)
    assert stats(dls) == []  # nothing was changed


def test_other_loaders(dls, records, tmp_path):
    with pytest.raises(ValueError, match='DataLoaders of boxes.*detection_learner'):
        backbone_learner(box_dls(records, tmp_path), small)
    data = torch.utils.data.DataLoader([(torch.rand(3, 32, 32), 0), (torch.rand(3, 32, 32), 1)] * 2, batch_size=2)
    plain = DataLoaders(data, data)
    with pytest.raises(ValueError, match='got a DataLoaders without a number of classes.*pass n_out'):
        backbone_learner(plain, small)
    kw = dict(n_out=2, loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='that accepts no batch transforms.*normalize=False'):
        backbone_learner(plain, small, **kw)
    learn = quiet(backbone_learner(plain, small, normalize=False, **kw))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


# --- pets


def pets_dls(path, every=1):
    train, valid = [
        [path / 'images' / f'{o}.jpg' for o in list(read_list(path, name))[::every]] for name in ('trainval', 'test')
    ]
    return make_dls(train + valid, range(len(train), len(train + valid)), path)


def test_toy_breeds(toy, tmp_path):
    dls = pets_dls(toy)
    assert len(dls.vocab) == 6 and len(dls.train_ds) + len(dls.valid_ds) == 48
    learn = make(dls, path=tmp_path)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.get_preds()[0].shape == (len(dls.valid_ds), 6)


def test_real_breeds(shared_pets, tmp_path):
    dls = pets_dls(shared_pets, 40)
    n = len({breed_of(o) for o in read_list(shared_pets, 'trainval')})
    assert 1 < len(dls.vocab) <= n
    learn = make(dls, path=tmp_path)
    learn.fit_one_cycle(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.cuda
@pytest.mark.parametrize('switch', ['to_fp32', 'to_fp16', 'to_bf16'])
def test_on_cuda(colors, tmp_path, switch):
    learn = getattr(make(make_dls(colors, path=tmp_path).to('cuda')), switch)()
    learn.fit_one_cycle(2, 1e-3)
    assert next(learn.model.parameters()).is_cuda and np.isfinite(learn.recorder.values[-1]).all()
