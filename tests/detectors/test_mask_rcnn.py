import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image

from common import assert_runs_on_cuda, assert_same, buffers, lean_rcnn, plain

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import map_weights, randomize_
from backbones_nb.detectors import faster_rcnn, mask_rcnn
from backbones_nb.learners.metrics import coco_eval
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta')
LEAN = lean_rcnn | dict(mask_channels=16, box_detections_per_img=5)
NONE = dict(
    boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 64, 80, dtype=torch.uint8)
)
LOSSES = {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg', 'loss_mask'}


CASES = {
    'FPN': lambda: ('vovnet19_slim_dw', 'auto', (4, 8, 16, 32)),
    'PAN': lambda: ('vovnet19_slim_dw', 'pan', (4, 8, 16, 32)),
    'BiFPN': lambda: ('vovnet19_slim_dw', 'bifpn', (4, 8, 16, 32)),
    'darknet19': lambda: ('darknet19', 'auto', None),
    'no neck': lambda: ('vovnet19_slim_dw', None, (32,)),
    'last map': lambda: (create_backbone('vovnet19_slim_dw', strides=(16,)), 'fpn', (16,)),
    'strides 8-32': lambda: (create_backbone('vovnet19_slim_dw', strides=(8, 16, 32)), 'auto', (8, 16, 32)),
    'carries a neck': lambda: (
        attach_neck(create_backbone('vovnet19_slim_dw'), channels=24, extra='p6p7'),
        'auto',
        (4, 8, 16, 32),
    ),
    'Sequential': lambda: (plain(), 'auto', (16,)),
}


def detector(backbone='vovnet19_slim_dw', neck='auto', num_classes=3, **kw):
    return mask_rcnn.model(num_classes, backbone, neck, **LEAN | kw)


def rectangles(boxes, size):
    m = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for o, (x0, y0, x1, y1) in zip(m, boxes.int().tolist()):
        o[y0:y1, x0:x1] = 1
    return m


def data(bs=2, size=(64, 80), seed=0):
    b = torch.tensor([[8.0, 8, 50, 56], [30, 4, 78, 40]])
    t = dict(boxes=b, labels=torch.tensor([1, 2]), masks=rectangles(b, size), image_id=7)
    return torch.rand(bs, 3, *size, generator=torch.Generator().manual_seed(seed)), [t] + [NONE] * (bs - 1)


@pytest.mark.parametrize('name', CASES)
def test_backbones_and_necks(name):
    torch.manual_seed(0)
    backbone, neck, strides = CASES[name]()
    m, (x, t), calls = detector(backbone, neck), data(), []
    pools = m.roi_heads.box_roi_pool, m.roi_heads.mask_roi_pool
    if strides:
        assert pools[1].scales == [1 / s for s in strides]
    assert (
        pools[0].scales == pools[1].scales
        and pools[0].featmap_names == pools[1].featmap_names
        and pools[1].output_size == (14, 14)
    )
    losses = m(x, t)
    assert (
        set(losses) == LOSSES == set(m.loss_names)
        and all(o.isfinite() for o in losses.values())
        and losses['loss_mask'] > 0
    )
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    assert all(
        p.grad is not None for p in [*m.roi_heads.mask_head.parameters(), *m.roi_heads.mask_predictor.parameters()]
    )
    m.backbone.register_forward_hook(lambda *_: calls.append(1))
    before, flags = buffers(m), {k: o.training for k, o in m.named_modules()}
    with torch.no_grad():
        losses, dets = m.losses_and_detections(x, t)
    assert len(calls) == 1 and set(losses) == LOSSES and all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    assert {k: o.training for k, o in m.named_modules()} == flags
    with torch.no_grad():
        assert_same(m.eval()(x), dets)
    for d in dets:
        n = len(d['boxes'])
        assert 0 < n <= 5 and d['masks'].shape == (n, 1, 64, 80) and d['masks'].dtype == torch.float32
        assert d['masks'].min() >= 0 and d['masks'].max() <= 1


def test_groups_are_complete():
    m = detector()
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    assert {id(p) for p in m.roi_heads.mask_head.parameters()} <= {id(p) for p in groups[-1]}
    m.freeze_to(-1)
    assert (
        all(p.requires_grad for p in m.roi_heads.parameters()) and not next(m.backbone.neck.parameters()).requires_grad
    )


@pytest.mark.parametrize(
    'empty',
    [
        NONE,
        {k: v for k, v in NONE.items() if k != 'masks'},
        NONE | dict(boxes=torch.tensor([]), labels=torch.tensor([])),
    ],
)
@pytest.mark.parametrize('img_size', [None, 48])
def test_batches_without_boxes(empty, img_size):
    m, (x, _) = detector(img_size=img_size), data()
    losses, dets = m.losses_and_detections(x, [empty, empty])
    assert losses['loss_mask'] == 0 and set(losses) == LOSSES
    losses = m(x, [empty, empty])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    m.roi_heads.score_thresh = 2.0
    dets = m.eval()(x)
    assert all(d['masks'].shape == (0, 1, 64, 80) and d['boxes'].shape == (0, 4) for d in dets)


def test_crowds_and_bool_masks():
    m, (x, t) = detector(), data(1)

    def run(t):
        torch.manual_seed(0)
        return m(x, [t], both=True)[0]

    want = run(t[0])
    assert run(t[0] | dict(masks=t[0]['masks'].bool())) == want
    crowd = dict(
        boxes=torch.cat([t[0]['boxes'], torch.tensor([[1.0, 1, 9, 9]])]),
        labels=torch.tensor([1, 2, 1]),
        iscrowd=torch.tensor([0, 0, 1]),
        masks=torch.cat([t[0]['masks'], torch.ones(1, 64, 80, dtype=torch.uint8)]),
    )
    assert run(crowd) == want


X, T = data(1)
BAD = {
    'image 7 has 2 boxes and no masks, expected masks (2, 64, 80)': lambda m: m(
        X, [{k: v for k, v in T[0].items() if k != 'masks'}]
    ),
    'masks (2, 60, 80) of torch.uint8, expected (2, 64, 80)': lambda m: m(
        X, [T[0] | dict(masks=T[0]['masks'][:, :60])]
    ),
    'masks (1, 64, 80)': lambda m: m(X, [T[0] | dict(masks=T[0]['masks'][:1])]),
    'of torch.float32': lambda m: m(X, [T[0] | dict(masks=T[0]['masks'].float())]),
    'masks of type ndarray': lambda m: m(X, [T[0] | dict(masks=T[0]['masks'].numpy())]),
    'without targets': lambda m: m(X),
    '2 targets for 1': lambda m: m(X, T * 2),
    'targets of type dict': lambda m: m(X, T[0]),
    'list of tensors': lambda m: m('image', T),
    'image 0 is of type str': lambda m: m(['image'], T),
    "mask_rcnn.model takes no argument 'mask_hed'. Did you mean 'mask_head'": lambda m: detector(mask_hed=1),
}


@pytest.fixture(scope='module')
def net():
    return detector()


@pytest.mark.parametrize('says', BAD)
def test_errors_say_what_to_do(says, net):
    with pytest.raises((TypeError, ValueError)) as e:
        BAD[says](net)
    assert says in str(e.value) and '\n' not in str(e.value) and not str(e.value).endswith('.')
    assert net.training


def test_parts_may_be_replaced():
    head = nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU())
    m, (x, t) = detector(mask_head=head), data()
    assert m.roi_heads.mask_head is head and m(x, t)['loss_mask'].isfinite()


def pair(**kw):
    tv = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, **kw)
    ours = mask_rcnn.model(4, **kw)
    randomize_(tv.backbone)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*tv.rpn.parameters(), *tv.roi_heads.parameters()]:
            p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))
    map_weights(tv, ours, [(r'fpn\.inner_blocks', 'neck.lateral'), (r'fpn\.layer_blocks', 'neck.smooth')])
    return tv, ours


def test_equal_to_torchvision():
    tv, ours = pair(
        min_size=64,
        max_size=96,
        box_score_thresh=0.3,
        rpn_post_nms_top_n_test=40,
        rpn_post_nms_top_n_train=60,
        box_detections_per_img=20,
    )
    assert sum(p.numel() for p in tv.parameters()) == sum(p.numel() for p in ours.parameters())
    g = torch.Generator().manual_seed(0)
    x = [torch.rand(3, *s, generator=g) for s in ((64, 80), (97, 61))]
    b = torch.tensor([[8.0, 8, 50, 60], [30, 4, 78, 40]])
    t = [
        dict(boxes=b, labels=torch.tensor([1, 3]), masks=rectangles(b, (64, 80))),
        NONE | dict(masks=torch.zeros(0, 97, 61, dtype=torch.uint8)),
    ]
    with torch.no_grad():
        a, b = tv.eval()(x), ours.eval()(x)
    assert sum(len(o['boxes']) for o in a) > 5 and max(o['masks'].max() for o in a) > 0.5
    assert_same(a, b)
    res = []
    for m in tv, ours:
        m.train()
        for o in m.modules():
            if isinstance(o, nn.BatchNorm2d):
                o.eval()
        torch.manual_seed(5)
        with torch.no_grad():
            res.append(m(x, t))
    assert res[0].keys() == res[1].keys() and res[0]['loss_mask'] > 0
    for k in res[0]:
        assert_close(res[1][k], res[0][k], rtol=1e-6, atol=1e-6)


def test_default_has_torchvisions_parameters():
    with torch.device('meta'):
        tv = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
        m = mask_rcnn.model(91)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in tv.parameters())


def bilinear(mask, y, x):  # one point; pixels stand at whole coordinates, as in RoIAlign
    h, w = mask.shape
    if not (-1 <= y <= h and -1 <= x <= w):
        return 0.0
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1, v, u = min(y0 + 1, h - 1), min(x0 + 1, w - 1), y - y0, x - x0
    return float(
        (1 - v) * ((1 - u) * mask[y0, x0] + u * mask[y0, x1]) + v * ((1 - u) * mask[y1, x0] + u * mask[y1, x1])
    )


def test_mask_loss_is_the_naive_loop():
    g, M = torch.Generator().manual_seed(0), 6
    masks = (torch.rand(2, 20, 24, generator=g) > 0.5).byte()
    boxes = torch.tensor([[1.3, 2.2, 12.9, 15.0], [0.0, 0, 24, 20], [10.5, 3.1, 22.0, 19.7]])
    labels, which = torch.tensor([2, 1]), torch.tensor([0, 1, 1])
    logits = torch.randn(3, 3, M, M, generator=g)
    total, n = 0.0, 0
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        w, h = max(x1 - x0, 1.0), max(y1 - y0, 1.0)
        ny, nx = -(-h // M), -(-w // M)  # as many points a bin as it has pixels
        for i in range(M):
            for j in range(M):
                ps = [
                    bilinear(
                        masks[which[k]].float(), y0 + h / M * (i + (a + 0.5) / ny), x0 + w / M * (j + (b + 0.5) / nx)
                    )
                    for a in range(int(ny))
                    for b in range(int(nx))
                ]
                target, z = sum(ps) / len(ps), logits[k, labels[which[k]], i, j]
                p = z.sigmoid()
                total, n = total - (target * p.log() + (1 - target) * (1 - p).log()), n + 1
    assert_close(maskrcnn_loss(logits, [boxes], [masks], [labels], [which]), total / n, rtol=1e-4, atol=1e-5)


def naive_paste(mask, box, size):
    M, (H, W) = mask.shape[-1], size
    cx, cy, hw, hh = (
        (box[0] + box[2]) / 2,
        (box[1] + box[3]) / 2,
        (box[2] - box[0]) / 2 * (M + 2) / M,
        (box[3] - box[1]) / 2 * (M + 2) / M,
    )
    x0, y0, x1, y1 = [
        int(o) for o in (cx - hw, cy - hh, cx + hw, cy + hh)
    ]  # a rim of zeros is added, the box grows along
    w, h, p, res = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1), F.pad(mask, (1,) * 4), torch.zeros(size)
    for y in range(max(y0, 0), min(y1 + 1, H)):
        for x in range(max(x0, 0), min(x1 + 1, W)):
            v, u = [max((o + 0.5) * (M + 2) / n - 0.5, 0) for o, n in ((y - y0, h), (x - x0, w))]
            res[y, x] = bilinear(p, v, u)
    return res


def test_pasting_is_the_naive_loop():
    g = torch.Generator().manual_seed(0)
    masks, boxes = (
        torch.rand(4, 1, 7, 7, generator=g),
        torch.tensor([[3.2, 4.1, 15.7, 18.0], [-2.0, 5, 9, 30], [0.0, 0, 24, 20], [20.0, 18, 23.9, 19.9]]),
    )
    got = paste_masks_in_image(masks, boxes, (20, 24))
    for a, m, b in zip(got, masks, boxes):
        assert_close(a[0], naive_paste(m[0], b, (20, 24)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('img_size', [None, 64, (32, 48)])
def test_masks_are_in_pixels_of_the_input(img_size):
    m = detector('vovnet19_slim', img_size=img_size).eval()
    with torch.no_grad():
        dets = m([torch.rand(3, 70, 50), torch.rand(3, 33, 91)])
    for d, s in zip(dets, ((70, 50), (33, 91))):
        assert d['masks'].shape[1:] == (1, *s)
        x0, y0, x1, y1 = d['boxes'].unbind(1)
        for mask, a, b, c, e in zip(
            d['masks'][:, 0], x0, y0, x1, y1
        ):  # the paste reaches at most its rim beyond the box
            ys, xs = mask.nonzero().unbind(1)
            if len(ys):
                assert (
                    xs.min() >= a - (c - a) / 14 - 2
                    and xs.max() <= c + (c - a) / 14 + 2
                    and ys.min() >= b - (e - b) / 14 - 2
                    and ys.max() <= e + (e - b) / 14 + 2
                )


def test_pickle_deepcopy_state_dict(tmp_path):
    m, (x, _) = detector().eval(), data()
    want = m(x)
    torch.save(m.state_dict(), tmp_path / 'm.pth')
    other = detector().eval()
    other.load_state_dict(torch.load(tmp_path / 'm.pth', weights_only=True), strict=True)
    for o in [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), other]:
        assert_same(o(x), want)


def test_bfloat16_autocast():
    m, (x, t) = detector(), data()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, dets = m(x, t, both=True)
    sum(losses.values()).backward()
    assert {v.dtype for v in losses.values()} == {torch.float32} and dets[0]['masks'].dtype == torch.float32


def test_boxes_equal_those_without_masks():
    a = detector().eval()
    b = faster_rcnn.model(3, 'vovnet19_slim_dw', **{k: v for k, v in LEAN.items() if k != 'mask_channels'}).eval()
    b.load_state_dict({k: v for k, v in a.state_dict().items() if 'mask_' not in k}, strict=True)
    x, _ = data()
    for p, q in zip(a(x), b(x)):
        assert all(torch.equal(p[k], q[k]) for k in q)


def test_learns_a_mask():
    torch.manual_seed(0)
    m, x = detector('vovnet19_slim', neck_norm='gn', anchor_scale=4, mask_channels=32), torch.zeros(1, 3, 64, 64)
    yy, xx = torch.meshgrid(torch.arange(64), torch.arange(64), indexing='ij')
    mask = (yy - 32) ** 2 + (xx - 32) ** 2 < 20**2
    x[:, :, mask] = 1.0
    t = [dict(boxes=torch.tensor([[12.0, 12, 53, 53]]), labels=torch.tensor([2]), masks=mask[None].byte())]
    opt = torch.optim.AdamW(m.parameters(), 3e-3)
    for _ in range(50):
        opt.zero_grad()
        sum(m(x, t).values()).backward()
        opt.step()
    losses, dets = m(x, t, both=True)
    assert losses['loss_mask'] < 0.35
    assert coco_eval(dets, t, iou_type='segm')['AP50'] > 0.5


@pytest.mark.cuda
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    assert_runs_on_cuda(detector(), *data(), 'masks')


def test_learner_and_metrics_take_it(tmp_path):
    from backbones_nb.data.batches import detection_dls
    from backbones_nb.data.pets import pets_splits
    from backbones_nb.data.toy import toy_pets
    from backbones_nb.learners.detection import detection_learner
    from backbones_nb.learners.metrics import COCOMetric

    train, valid, cm, _ = pets_splits(toy_pets(tmp_path / 'pets', n=24, side=64), masks=True)
    dls = detection_dls(train[:4], valid[:2], cm, size=64, bs=2, seed=0, device='cpu')
    learn = detection_learner(
        dls, detector(num_classes=len(cm)), metrics=['AP', COCOMetric('AP', iou_type='segm')], path=tmp_path
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_mask'] > 0 and row['valid_mask'] > 0 and 0 <= row['mask_AP'] <= 1
    with learn.no_bar():
        assert 0 <= learn.evaluate(iou_type='segm')['AP'] <= 1
    p = learn.predict(valid[0], score_thr=0.0)
    assert 0 < len(p['boxes']) <= 5 and p['masks'].shape == (len(p['boxes']), *valid[0].size)
    assert learn.show_results(score_thr=0.0).axes
