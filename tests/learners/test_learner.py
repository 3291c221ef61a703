import csv
import math
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.torch_core import find_bs
from PIL import Image
from torch import nn

from cases import Tiny
from common import Colors, buffers, cm, draw_record, make_dls, make_learner

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.transforms import open_image
from backbones_nb.detectors import efficientdet, faster_rcnn, fcos, mask_rcnn, retinanet
from backbones_nb.learners.detection import detection_learner, DetectionLearner, NoValidation, Targets
from backbones_nb.learners.prediction import add_class_names, filter_by_score
from backbones_nb.learners.interpret import DetectionInterpretation
from backbones_nb.data.run_lengths import RunLengths
from backbones_nb.learners.metrics import coco_eval, COCOMetric

parts = ['classifier', 'box_reg', 'objectness', 'rpn_box_reg']


lean = dict(
    neck_channels=16,
    head_channels=32,
    box_batch_size_per_image=16,
    rpn_post_nms_top_n_train=50,
    rpn_post_nms_top_n_test=30,
    box_detections_per_img=10,
)


def model(num_classes=3, family='faster_rcnn', **kw):
    torch.manual_seed(0)
    if family == 'faster_rcnn':
        return faster_rcnn.model(num_classes, Tiny(), **lean | kw)
    if family == 'mask_rcnn':
        return mask_rcnn.model(num_classes, Tiny(), mask_channels=16, box_score_thresh=0.0, **lean | kw)
    if family == 'efficientdet':
        small = dict(fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1, max_det_per_image=10)
        kw = small | dict(img_size=64, backbone=Tiny()) | kw
        return efficientdet.model('tf_efficientdet_lite0', num_classes, **kw)
    return dict(retinanet=retinanet, fcos=fcos)[family].model(
        num_classes, Tiny(), **dict(neck_channels=16, score_thresh=0.0, detections_per_img=10) | kw
    )


families = ['faster_rcnn', 'mask_rcnn', 'efficientdet', 'retinanet', 'fcos']


@pytest.fixture
def learn(records, tmp_path):
    return make(records, tmp_path)


def make(records, path, net=None, **kw):
    return make_learner(records, path, net or model(), **kw)


def named(learn, row=-1):
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[row]))


def test_one_table_of_losses_parts_and_ap(learn):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit_one_cycle(2)
    r = named(learn)
    assert list(learn.recorder.metric_names) == [
        'epoch',
        'train_loss',
        'valid_loss',
        *[f'train_{p}' for p in parts],
        *[f'valid_{p}' for p in parts],
        'AP',
        'AP50',
        'time',
    ]
    assert r['valid_loss'] == pytest.approx(sum(r[f'valid_{p}'] for p in parts), rel=1e-5)
    assert all(math.isfinite(v) for v in r.values()) and 0 <= r['AP'] <= r['AP50'] <= 1


def test_validation_loss_is_the_mean_over_images(learn):
    "7 images in batches of 3, 3, 1: fastai's own count would weigh each batch by the boxes of its first image."
    from backbones_nb.core.contexts import fixed_rng

    got, total = learn.validate()[0], 0.0
    learn.model.eval()
    for x, y in learn.dls.valid.new(bs=1):
        with torch.no_grad(), fixed_rng(x.device, 0):
            total += sum(learn.model(x.as_subclass(torch.Tensor), list(y), both=True)[0].values()).item()
    assert got == pytest.approx(total / 7, rel=1e-5)


def test_validation_repeats_and_leaves_the_model_alone(learn):
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    a, b = learn.validate(), learn.validate()
    assert a == b and len(a) == 7
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())


def test_targets_count_images():
    t = Targets([dict(boxes=torch.zeros(5, 4)), dict(boxes=torch.zeros(0, 4))])
    assert find_bs((t,)) == 2 and len(t) == 2 and [len(o['boxes']) for o in t] == [5, 0]


@pytest.fixture(scope='module')
def trained(records, tmp_path_factory):
    "A learner that finds something, and what it measured before and after."
    learn = make(records, tmp_path_factory.mktemp('trained'))
    before = learn.validate()
    learn.fit_one_cycle(12, 5e-3, cbs=NoValidation())
    return learn, before, learn.validate()


def test_it_learns(trained):
    _, before, after = trained
    assert after[0] < before[0] * 0.7 and after[-1] > before[-1] + 0.1


def test_metrics_equal_a_separate_evaluation(trained):
    learn = trained[0]
    preds, targs = learn.get_preds(original=True)
    assert [t['image_id'] for t in targs] == [f'im{i}' for i in range(16, 23)] and len(preds) == 7
    want = coco_eval(preds, targs, cm)
    assert learn.validate()[-2:] == [want['AP'], want['AP50']] and learn.evaluate(per_class=True)[
        'per_class'
    ].keys() == {'red', 'blue'}


def test_metrics_by_key_weights_and_no_parts(records, tmp_path):
    learn = make(
        records,
        tmp_path,
        metrics=['AP75', COCOMetric('AR10', name='recall')],
        parts=False,
        loss_weights=dict(loss_classifier=0.0),
    )
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'AP75', 'recall', 'time']
    full = make(records, tmp_path)
    v = dict(zip(['valid_loss', *parts], full.validate()))
    light = make(records, tmp_path, loss_weights=dict(loss_classifier=0.0, loss_box_reg=2.0)).validate()[0]
    assert light == pytest.approx(v['valid_loss'] - v['classifier'] + v['box_reg'], rel=1e-4)


def test_groups_freeze_and_discriminative_rates(learn):
    n = len(learn.model.param_groups())
    learn.create_opt()
    assert learn.n_backbone == 3 and len(learn.opt.param_lists) == n > 3
    assert sum(len(g) for g in learn.opt.param_lists) == len([*learn.model.parameters()])
    learn.freeze()
    own = {id(p) for g in learn.model.param_groups()[:3] for p in g}
    for k, m in learn.model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert m.weight.requires_grad != (id(m.weight) in own), k
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fit(1, slice(1e-5, 1e-3))
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert lrs[0] == pytest.approx(1e-5) and lrs[-1] == pytest.approx(1e-3) and lrs == sorted(lrs)


def test_fine_tune_trains_heads_first(learn):
    seen = []
    before = {k: v.clone() for k, v in learn.model.named_parameters()}

    def after_first():
        seen.append({k for k, v in learn.model.named_parameters() if not torch.equal(v, before[k])})

    unfreeze = learn.unfreeze
    learn.unfreeze = lambda: (after_first(), unfreeze())
    learn.fine_tune(1, 1e-3, cbs=NoValidation())
    frozen = {id(p) for g in learn.model.param_groups()[:3] for p in g}
    conv = {k for k, m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    changed = {k.rsplit('.', 1)[0] for k in seen[0]} & conv
    by_id = dict(learn.model.named_modules())
    assert changed and all(id(by_id[k].weight) not in frozen for k in changed)
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters() if id(v) in frozen)


def test_fine_tune_trains_a_new_neck_as_fast_as_the_heads(learn):
    peaks = []
    fit = learn.fit_one_cycle
    learn.fit_one_cycle = lambda n, rates, **kw: (fit(n, rates, **kw), peaks.append((n, rates)))
    learn.fine_tune(1, 1e-3, freeze_epochs=2)
    (frozen, first), (free, rates) = peaks
    assert (frozen, first, free) == (2, 1e-3, 1)
    neck_and_heads = len(rates) - learn.n_backbone
    assert neck_and_heads == 2 and rates[-2:] == [1e-3, 1e-3]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates) and rates[2] < 1e-3
    learn.fine_tune(1, 1e-3, freeze_epochs=0, lr_mult=1)
    assert len(peaks) == 3 and peaks[-1][1] == pytest.approx([1e-3] * len(rates))


def test_lr_find_puts_everything_back(learn):
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    lr = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < lr.valley < 10 and all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())


def image_kinds(r):
    img = r.image().convert('RGB')
    a = np.asarray(img)
    return dict(
        record=r,
        path=r.path,
        str=str(r.path),
        pil=img,
        array=a,
        float=(a / 255).astype(np.float32),
        tensor=torch.tensor(a).permute(2, 0, 1),
        float_tensor=torch.tensor(a).permute(2, 0, 1) / 255,
    )


def test_predict_is_in_pixels_of_the_original(records, trained):
    learn, r = trained[0], records[0]
    big = r.image().convert('RGB').resize((r.size[1] * 4, r.size[0] * 4), Image.NEAREST)
    outs = {k: learn.predict(v, score_thr=0.05) for k, v in image_kinds(r).items()}
    one = outs['record']
    assert len(one['boxes']) > 0 and set(one['names']) <= {'red', 'blue'} and len(one['names']) == len(one['labels'])
    for o in outs.values():
        torch.testing.assert_close(o['boxes'], one['boxes'], atol=1e-3, rtol=1e-3)
        assert o['labels'].tolist() == one['labels'].tolist()
    best = learn.predict(big, score_thr=0.05)['boxes'][0]
    assert (best / 4 - one['boxes'][0]).abs().max() < 6
    assert best[0::2].max() <= r.size[1] * 4 and best[1::2].max() <= r.size[0] * 4
    many = learn.predict([r.path, big], score_thr=0.05)
    assert len(many) == 2
    torch.testing.assert_close(many[0]['boxes'], one['boxes'], atol=1e-2, rtol=1e-3)
    assert (learn.predict(r, score_thr=0.3)['scores'] >= 0.3).all() and learn.predict([]) == []


def test_get_preds_of_training_is_in_order_and_not_augmented(learn):
    (xs, _, t), (xs2, _, _) = learn.get_preds(0, with_input=True), learn.get_preds(0, with_input=True)
    assert [o['image_id'] for o in t] == [f'im{i}' for i in range(16)] and all(
        torch.equal(a, b) for a, b in zip(xs, xs2)
    )
    preds, targs = learn.get_preds(dl=learn.dls.test_dl([f'{r.path}' for r in learn.dls.valid_ds.items]))
    assert len(preds) == 7 and targs == []


def test_save_load_and_export(learn, records, tmp_path):
    learn.fit(1, 1e-3)
    learn.save('m')
    want = learn.predict(records[0], score_thr=0.0)
    for p in learn.model.parameters():
        p.data.zero_()
    learn.load('m')
    assert torch.equal(learn.predict(records[0], score_thr=0.0)['boxes'], want['boxes'])
    learn.validate()
    learn.export('x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path / 'x.pkl')
    got = new.predict(records[0].path, score_thr=0.0)
    assert all(torch.equal(got[k], want[k]) for k in ('boxes', 'labels', 'scores')) and got['names'] == want['names']
    assert isinstance(new, DetectionLearner) and new.dls.class_map.get_name(1) == 'red' and len(new.dls.train) == 0
    assert new.metrics[-1].preds == [] and learn.validate()[-1] == pytest.approx(learn.validate()[-1])
    new.dls = learn.dls
    new.fit(1, 1e-4)  # a loaded learner trains on


@pytest.mark.parametrize('half,dtype', [('to_bf16', torch.bfloat16), ('to_fp16', torch.float16)])
def test_mixed_precision_on_cpu(learn, half, dtype):
    seen = set()
    hook = next(m for m in learn.model.backbone.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda m, i, o: seen.add(o.dtype)
    )
    getattr(learn, half)()
    learn.fit(1, 1e-3)
    assert seen == {dtype} and all(math.isfinite(v) for v in named(learn).values())
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    preds, _ = learn.get_preds()
    assert {d['boxes'].dtype for d in preds} == {torch.float32} and not hasattr(learn, 'autocast')
    learn.to_fp32()
    seen.clear()
    learn.fit(1, 1e-3)
    assert seen == {torch.float32}
    hook.remove()


def test_bf16_boxes_keep_their_precision(learn):
    "Coordinates of bfloat16 lie on a coarse grid; those of a net that hands them on in float32 do not."
    learn.to_bf16()
    boxes = torch.cat([d['boxes'] for d in learn.get_preds()[0]])
    assert len(boxes) and (boxes != boxes.to(torch.bfloat16).float()).float().mean() > 0.3


@pytest.mark.cuda
@pytest.mark.parametrize('half', ['to_bf16', 'to_fp16', None])
def test_cuda(records, tmp_path, half):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    learn = make(records, tmp_path)
    learn.dls.to(torch.device('cuda'))
    if half:
        getattr(learn, half)()
    learn.fit(1, 1e-3)
    assert (
        all(math.isfinite(v) for v in named(learn).values())
        and learn.predict(records[0], score_thr=0.0)['boxes'].device.type == 'cpu'
    )


def test_gradient_accumulation_is_one_big_batch(records, tmp_path):
    "Two batches of four with n_acc=8 give one step; fastai's count of images decides that."
    steps = []
    learn = make(records, tmp_path)

    class Count(GradientClip):
        def after_step(self):
            steps.append(self.iter)

    learn.fit(1, 1e-3, cbs=[GradientAccumulation(8), Count(0.1)])
    assert steps == [1, 3]


def test_trackers_and_csv(learn, tmp_path):
    learn.fit(
        3,
        1e-3,
        cbs=[SaveModelCallback('AP50', fname='best'), EarlyStoppingCallback('valid_loss', patience=3), CSVLogger()],
    )
    rows = list(csv.DictReader((tmp_path / 'history.csv').open()))
    assert (tmp_path / 'models/best.pth').exists() and len(rows) == 3
    assert learn.validate()[-1] == pytest.approx(max(float(r['AP50']) for r in rows))
    learn.fit(9, 0.0, cbs=EarlyStoppingCallback('AP50', patience=2))
    assert len(learn.recorder.values) < 9


def test_tensorboard(learn, tmp_path):
    from fastai.callback import tensorboard

    before = dict(vars(tensorboard)), len(tensorboard.tensorboard_log.methods)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn.fit(1, 1e-3, cbs=TensorBoardCallback(log_dir=tmp_path / 'tb'))
    acc = EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert {'train_loss', 'valid_loss', 'AP', 'AP50', 'valid_box_reg'} <= set(acc.Tags()['scalars']) and acc.Tags()[
        'images'
    ] == ['Sample results']
    assert (vars(tensorboard), len(tensorboard.tensorboard_log.methods)) == before  # fastai's module stays as it is


def test_figures(learn):
    import matplotlib.pyplot as plt

    plt.switch_backend('agg')
    assert len(learn.dls.show_batch(max_n=3).axes) == 3
    assert len(learn.show_results(max_n=2, score_thr=0.0).axes) == 4
    dl = learn.dls.test_dl([r.path for r in learn.dls.valid_ds.items[:2]])
    assert len(learn.show_results(dl=dl, max_n=2, shuffle=False).axes) == 2
    plt.close('all')


def test_progress_bar(records, tmp_path, capsys):
    learn = detection_learner(make_dls(records, tmp_path), model())
    learn.fit(1, 1e-3)
    out = capsys.readouterr().out
    assert 'train_objectness' in out and 'AP50' in out and '100.00%' in out


def test_nothing_to_find(records, tmp_path):
    none = [r for r in records if not len(r.labels)]
    learn = detection_learner(detection_dls(none, none, cm, size=64, bs=2, device='cpu', path=tmp_path), model())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    r = named(learn)
    assert math.isfinite(r['valid_loss']) and r['AP'] == -1
    learn = detection_learner(detection_dls(records[:4], [], cm, size=64, bs=4, device='cpu', path=tmp_path), model())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert named(learn)['valid_loss'] is None


def test_what_does_not_fit(records, tmp_path):
    dls = make_dls(records, tmp_path)
    with pytest.raises(ValueError, match='num_classes=5.*class map has 3'):
        detection_learner(dls, model(5))
    with pytest.raises(TypeError, match='Linear.*detector'):
        detection_learner(dls, nn.Linear(1, 1))
    with pytest.raises(ValueError, match='without a class_map'):
        detection_learner(DataLoaders([1], [2]), model())
    with pytest.raises(ValueError, match='AP51'):
        detection_learner(dls, model(), metrics='AP51')
    with pytest.raises(ValueError, match='loss_x'):
        make(records, tmp_path, loss_weights=dict(loss_x=1)).fit(1)


# --- every detector


@pytest.fixture(params=families)
def family(request):
    return request.param


def test_every_detector_in_the_same_table(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    learn.fit(1, 1e-3)
    r, masks = named(learn), family == 'mask_rcnn'
    names = [o.removeprefix('loss_') for o in learn.model.loss_names]
    assert list(r) == [
        'train_loss',
        'valid_loss',
        *[f'{p}_{n}' for p in ('train', 'valid') for n in names],
        'AP',
        'AP50',
        *['mask_AP', 'mask_AP50'] * masks,
    ]
    assert all(math.isfinite(v) for v in r.values()) and r['valid_loss'] == pytest.approx(
        sum(r[f'valid_{n}'] for n in names), rel=1e-5
    )
    state = buffers(learn.model)
    assert learn.validate() == learn.validate() and all(
        torch.equal(v, state[k]) for k, v in learn.model.named_buffers()
    )
    res = learn.evaluate(per_class=True)
    numbers = learn.report(tmp_path / 'report.html', worst=1, labels=1).coco
    assert {k: numbers[k] for k in res} == res and (tmp_path / 'report.html').stat().st_size > 10_000
    assert (
        len(res) == 13 * (1 + masks)
        and [res[o.name] for o in learn.metrics if isinstance(o, COCOMetric)] == learn.validate()[1 + len(names) :]
    )


def test_predictions_of_every_detector(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    r = records[0]
    big = r.image().resize((r.size[1] * 3, r.size[0] * 3))
    one, many = learn.predict(r.path, score_thr=0.0), learn.predict([r, big], score_thr=0.0)
    assert len(one['boxes']) > 0 and set(one['names']) <= {'red', 'blue'} and one.keys() == many[1].keys()
    assert learn.predict(r, score_thr=2.0)['names'] == [] and len(
        learn.predict(r, score_thr=float(one['scores'].median()))['scores']
    ) < len(one['scores'])
    for p, (h, w) in zip((one, *many), (r.size, r.size, (r.size[0] * 3, r.size[1] * 3))):
        assert (p['boxes'].min() >= 0) and p['boxes'][:, 2].max() <= w and p['boxes'][:, 3].max() <= h
        if family == 'mask_rcnn':
            assert p['masks'].shape == (len(p['boxes']), h, w) and pickle.loads(pickle.dumps(p))['masks'][0].shape == (
                h,
                w,
            )
    assert ('masks' in one) == (family == 'mask_rcnn')


def test_loss_of_each_image(records, tmp_path, family):
    "It does not depend on the batch, on the order, on chance or on what ran before; nothing of the model changes."
    learn = make(records, tmp_path, model(family=family))
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    xs, preds, targs, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    assert (
        len(xs) == len(preds) == len(targs) == len(decoded) == len(losses) == 7
        and losses.shape == (7,)
        and losses.isfinite().all()
    )
    back = learn.dls.test_dl(records[:15:-1], with_labels=True, bs=2)
    torch.testing.assert_close(learn.get_preds(dl=back, with_loss=True)[-1].flip(0), losses, atol=1e-4, rtol=1e-4)
    plain = learn.get_preds()[0]
    for a, b, c in zip(preds, plain, decoded):
        torch.testing.assert_close(a['scores'], b['scores'], atol=1e-4, rtol=1e-3)
        assert c['names'] == [cm.get_name(int(l)) for l in a['labels']]
    assert learn.loss_func.reduction == 'mean'


def test_groups_of_every_detector(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    groups, n = learn.model.param_groups(), learn.n_backbone
    body = {id(p) for m in learn.model.modules() if isinstance(m, Tiny) for p in m.parameters()}
    assert n == 3 and {id(p) for g in groups[:n] for p in g} == body and len(groups) > n
    learn.freeze()
    learn.create_opt()
    conv = [m.weight for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))]
    assert all(w.requires_grad != (id(w) in body) for w in conv)
    before = {k: p.clone() for k, p in learn.model.named_parameters()}
    learn.fit(1, 1e-2, cbs=NoValidation())
    moved = {id(p) for k, p in learn.model.named_parameters() if not torch.equal(p, before[k])}
    assert all(moved & {id(p) for p in g} for g in groups[n:]) and not moved & body & {id(w) for w in conv}
    learn.fine_tune(1, 1e-3, cbs=NoValidation())
    assert all(p.requires_grad for p in learn.model.parameters()) and [h['lr'] for h in learn.opt.hypers] == sorted(
        h['lr'] for h in learn.opt.hypers
    )


def test_half_precision_of_every_detector(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    learn.to_fp16()
    learn.fit(1, 1e-3)
    assert all(math.isfinite(v) for v in named(learn).values())
    assert {p['boxes'].dtype for p in learn.get_preds()[0]} == {torch.float32}


def test_export_of_every_detector(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    want = learn.predict(records[0], score_thr=0.0)
    learn.validate()
    learn.export('x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = load_learner(tmp_path / 'x.pkl').predict(records[0].path, score_thr=0.0)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in ('boxes', 'labels', 'scores'))
    if 'masks' in want:
        assert torch.equal(got['masks'].tensor(), want['masks'].tensor())


# --- size at the time of the test


@pytest.mark.parametrize('family', [o for o in families if o != 'efficientdet'])
def test_another_size(records, tmp_path, family):
    learn = make(records, tmp_path, model(family=family))
    xs, preds, targs = learn.get_preds(size=(96, 128), with_input=True)
    assert {x.shape for x in xs} == {(3, 96, 128)} and [t['image_id'] for t in targs] == [
        r.image_id for r in records[16:]
    ]
    pair = learn.get_preds(size=(96, 128), original=True)
    assert coco_eval(*pair, cm) == learn.evaluate(size=(96, 128), iou_type='bbox')
    if family == 'mask_rcnn':
        assert {p['masks'].shape[1:] for p in preds} == {t['masks'].shape[1:] for t in targs} == {(96, 128)}
    same = learn.predict(records[0], score_thr=0.0)
    assert torch.equal(learn.predict(records[0], score_thr=0.0, size=64)['boxes'], same['boxes'])
    other = learn.predict(records[0], score_thr=0.0, size=128)
    assert not torch.equal(other['scores'], same['scores']) and other['boxes'][:, 2].max() <= records[0].size[1]
    assert learn.dls.valid.size == (64, 64)
    assert len(DetectionInterpretation.from_learner(learn, size=96)) == 7


@pytest.mark.parametrize(
    'make_model,words',
    [
        (partial(model, family='efficientdet'), '64x64'),
        (partial(model, img_size=80), '80x80'),
        (partial(model, min_size=80, max_size=100), 'min_size'),
    ],
)
def test_a_size_that_the_model_undoes(records, tmp_path, make_model, words):
    learn = make(records, tmp_path, make_model())
    interpret = partial(DetectionInterpretation.from_learner, learn)
    for f in (learn.predict, learn.get_preds, learn.evaluate, learn.show_results, interpret):
        with pytest.raises(ValueError, match=f'^got size=128, but this .* scales every image .*{words}.*: ') as e:
            f(*[records[0]][: f == learn.predict], size=128)
        assert '\n' not in str(e.value)
    assert learn.get_preds(size=64)[0]  # the loader's own is none


# --- what leaves the learner


def test_masks_count_in_the_table(colors):
    r = dict(zip(['valid_loss', 'count', 'chance', 'AP', 'AP50', 'mask_AP', 'mask_AP50'], colors.validate()))
    assert r['AP50'] == r['mask_AP50'] == pytest.approx(1) and 0.8 < r['mask_AP'] <= 1
    colors.model.find = lambda x, find=colors.model.find: (d := find(x)) | dict(masks=d['masks'].roll(20, -1))
    off = colors.evaluate()
    assert off['AP'] == r['AP'] and off['mask_AP50'] < 0.2 and colors.validate()[-1] == off['mask_AP50']


def test_masks_have_the_size_of_the_original(colors, records):
    for r in records[:4]:
        for k in (1, 4):
            img = r.image().resize((r.size[1] * k, r.size[0] * k), Image.NEAREST)
            p = pickle.loads(pickle.dumps(colors.predict(img)))
            truth = open_image(img).float()[[0, 2]].diff(dim=0)[0].abs() > 100
            assert p['masks'].shape == (1, *truth.shape) and p['names'] == [cm.get_name(int(r.labels[0]))]
            m = p['masks'][0].bool()
            assert ((m & truth).sum() / (m | truth).sum()) > 0.9 and m.dtype == torch.bool


def test_what_get_preds_gives(colors):
    xs, preds, targs, decoded, losses = colors.get_preds(with_input=True, with_decoded=True, with_loss=True)
    want = torch.tensor([len(t['labels']) for t in targs]).float()
    assert torch.equal(
        (losses - want).round(decimals=5).unique(), (losses[:1] - want[:1]).round(decimals=5)
    )  # chance is the same for all
    assert [set(o) - set(p) for o, p in zip(decoded, preds)] == [{'names'}] * 7 and xs[0].shape == (3, 64, 64)
    assert colors.get_preds(with_preds=False)[0] is None and colors.get_preds(with_targs=False)[1] is None
    assert len(colors.get_preds(score_thr=0.95)[0][0]['masks']) == 0 and colors.get_preds(1, None, True)[0][
        0
    ].shape == (3, 64, 64)
    assert all(isinstance(o['masks'], RunLengths) for o in preds + targs)
    assert filter_by_score(decoded[0], 0.95)['names'] == [] and add_class_names(decoded[0], cm, 0.95)['names'] == []


def test_a_shuffled_loader_comes_back_in_order(colors, records):
    dl = colors.dls.test_dl(records, with_labels=True, shuffle=True, bs=3)
    ids = lambda **kw: [t['image_id'] for t in colors.get_preds(dl=dl, **kw)[1]]
    assert ids() == [r.image_id for r in records] != ids(reorder=False)


@pytest.mark.parametrize(
    'kw,error,words',
    [
        (dict(act=torch.sigmoid), ValueError, 'no activation'),
        (dict(save_preds='x'), ValueError, 'torch.save'),
        (dict(concat_dim=1), ValueError, 'never concatenated'),
        (dict(with_los=True), TypeError, 'with_loss'),
        (dict(dl=[1], size=32), ValueError, 'pass a loader'),
    ],
)
def test_what_get_preds_refuses(colors, kw, error, words):
    with pytest.raises(error, match=words) as e:
        colors.get_preds(**kw)
    assert '\n' not in str(e.value)


def test_losses_need_targets(colors, records):
    dl = colors.dls.test_dl([r.path for r in records[:3]])
    with pytest.raises(ValueError, match='images without targets.*with_labels=True'):
        colors.get_preds(dl=dl, with_loss=True)
    assert colors.validate()[-1] == pytest.approx(1)  # the learner still works


def test_masks_of_a_data_set_fit_into_memory(colors, records):
    "3,000 images of 512 px with 100 detections each are 315 GB as floats."
    g = torch.Generator().manual_seed(0)
    yx = torch.stack(torch.meshgrid(torch.arange(512.0), torch.arange(512.0), indexing='ij'))[:, None]
    at, r = torch.rand(2, 100, 1, 1, generator=g) * 512, torch.rand(2, 100, 1, 1, generator=g) * 120 + 10
    wave = 8 * torch.sin(yx[0] / 5) * torch.cos(yx[1] / 7)  # frayed outlines
    masks = torch.sigmoid(10 - ((yx - at) / r).square().sum(0) * 10 + wave)[:, None]
    found = dict(
        boxes=torch.rand(100, 4, generator=g).cumsum(1),
        labels=torch.ones(100).long(),
        scores=torch.ones(100),
        masks=masks,
    )
    colors.model.find = lambda x: found
    dl = colors.dls.test_dl(records[:1], with_labels=True, size=512)
    preds, _ = colors.get_preds(dl=dl)
    colors.validate(dl=dl)
    per_image = [len(pickle.dumps(o)) for o in (preds, colors.metrics[-2].leader.preds)]
    assert max(per_image) * 3000 < 1e9 and torch.equal(preds[-1]['masks'].tensor(), masks[:, 0].ge(0.5).byte())
    boxes_only = make_learner(records, colors.path, Colors(), metrics=['AP'])
    boxes_only.validate(dl=dl)
    assert 'masks' not in boxes_only.metrics[-1].preds[0]


def test_a_detector_of_masks_wants_masks(tmp_path):
    dls = make_dls([draw_record(i, tmp_path, masks=False) for i in range(5)], tmp_path)
    with pytest.raises(ValueError, match="MaskRCNN trains on masks, but record 'im0' has none"):
        detection_learner(dls, model(family='mask_rcnn'))


def test_masks_are_drawn(colors, records, tmp_path):
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plt.switch_backend('agg')
    layers = lambda fig: [len(a.images) for a in fig.axes]  # the image, and one layer for each mask
    few = colors.dls.test_dl(records[:2], with_labels=True)
    assert (
        layers(colors.show_results(dl=few, max_n=2, shuffle=False))
        == [2] * 4
        == layers(colors.show_results(dl=few, size=96, shuffle=False))
    )
    assert (
        layers(colors.show_results(dl=few, shuffle=False, masks=False)) == [1] * 4
        and layers(few.show_batch()) == [2] * 2
    )
    plt.close('all')
    colors.fit(1, cbs=TensorBoardCallback(log_dir=tmp_path / 'tb'))
    acc = EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert {'mask_AP', 'mask_AP50'} <= set(acc.Tags()['scalars']) and acc.Tags()['images'] == ['Sample results']
