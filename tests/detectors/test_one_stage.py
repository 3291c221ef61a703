"RetinaNet and FCOS: equal to torchvision's, and the detector contract on any backbone."

import pytest
import torch
from torch import nn
from torchvision.models import detection as D

from common import assert_same, buffers, copies

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import map_weights, randomize_
from backbones_nb.detectors import fcos, retinanet
from backbones_nb.core.contexts import training_flag
from backbones_nb.learners.metrics import coco_eval
from backbones_nb.necks.fpn import FPN
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta')
MODELS = dict(retinanet=retinanet.model, fcos=fcos.model)
LEAN = dict(neck_channels=32, detections_per_img=8, topk_candidates=50, score_thresh=0.0)
NONE = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
both_kinds = pytest.mark.parametrize('kind', MODELS)


def detector(kind, backbone='vovnet19_slim_dw', neck='auto', num_classes=3, **kw):
    return MODELS[kind](num_classes, backbone, neck, **LEAN | kw)


def data(bs=2, size=(64, 80), seed=0):
    t = dict(boxes=torch.tensor([[8.0, 8, 50, 56], [30, 4, 78, 40]]), labels=torch.tensor([1, 2]), image_id=7)
    return torch.rand(bs, 3, *size, generator=torch.Generator().manual_seed(seed)), [t] + [NONE] * (bs - 1)


def plain():
    def block(ni, nf):
        return nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1), nn.BatchNorm2d(nf), nn.ReLU())

    return nn.Sequential(block(3, 8), block(8, 16), block(16, 24), block(24, 24))


def body(*strides):
    return create_backbone('vovnet19_slim_dw', strides=strides or None)


# --- torchvision's own models on equal weights

SIZES = dict(num_classes=5, min_size=64, max_size=96)
PAIRS = {
    'v1': (D.retinanet_resnet50_fpn, retinanet.model, {}),
    'v2': (D.retinanet_resnet50_fpn_v2, retinanet.model, dict(head_norm='gn', from_c5=True, box_loss='giou')),
    'fcos': (D.fcos_resnet50_fpn, fcos.model, {}),
}
RENAMES = [
    (r'fpn\.inner_blocks', 'neck.lateral'),
    (r'fpn\.layer_blocks', 'neck.smooth'),
    (r'fpn\.extra_blocks', 'neck'),
]


@pytest.fixture(scope='module', params=PAIRS)
def pair(request):
    "torchvision's and ours with the same random weights."
    build, ours, config = PAIRS[request.param]
    tv = build(weights=None, weights_backbone=None, **SIZES)
    randomize_(tv.backbone)
    g, logits = torch.Generator().manual_seed(1), tv.head.classification_head.cls_logits.bias
    with torch.no_grad():
        for p in tv.head.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5)
        logits.copy_(torch.randn(logits.shape, generator=g) * 0.1 - 1)
    return tv.eval(), map_weights(tv, ours(**SIZES, **config), RENAMES).eval()


def with_background(m, bias):
    m.head.classification_head.cls_logits.bias.view(-1, 5)[:, 0] = bias
    return m


def two_images():
    g = torch.Generator().manual_seed(0)
    x = [torch.rand(3, *s, generator=g) for s in ((120, 101), (97, 141))]
    return x, [dict(boxes=torch.tensor([[8.0, 8, 50, 60], [30, 4, 78, 40]]), labels=torch.tensor([1, 4])), NONE]


@torch.no_grad()
def test_bit_equal_to_torchvision(pair):
    (tv, ours), (x, t) = [with_background(m, -1e4) for m in pair], two_images()
    want = tv(x)
    assert all(len(o['boxes']) > 50 for o in want)
    losses, dets = ours(x, t, both=True)
    assert_same(want, dets)
    with training_flag([tv], True):
        theirs = tv(x, t)  # the flag of the whole alone: batch norms stay in eval
    for k, v in theirs.items():
        assert v > 0 and torch.equal(losses.pop(ours.renames[k]), v), k
    assert not losses


@torch.no_grad()
def test_torchvision_finds_background_and_we_do_not(pair):
    (tv, ours), (x, _) = [with_background(m, -1.0) for m in pair], two_images()
    cut = max(float(o['scores'][50]) for o in tv(x))
    for m in tv, ours:
        m.score_thresh, m.topk_candidates, m.detections_per_img = cut, 10**6, 10**6  # nothing is cut off
    want = tv(x)
    assert all((o['labels'] == 0).any() and (o['labels'] > 0).any() for o in want)
    assert_same([{k: v[o['labels'] > 0] for k, v in o.items()} for o in want], ours(x))


@pytest.mark.parametrize('name, norms', [('v1', False), ('v2', True), ('fcos', False)])
def test_default_has_the_published_number_of_parameters(name, norms):
    enum = dict(
        v1=D.RetinaNet_ResNet50_FPN_Weights, v2=D.RetinaNet_ResNet50_FPN_V2_Weights, fcos=D.FCOS_ResNet50_FPN_Weights
    )[name]
    with torch.device('meta'):
        m = PAIRS[name][1](91, **PAIRS[name][2])
    frozen = {id(p) for o in m.modules() if isinstance(o, nn.BatchNorm2d) for p in o.parameters() if not norms}
    assert sum(p.numel() for p in m.parameters() if id(p) not in frozen) == enum.COCO_V1.meta['num_params']


# --- any backbone, any neck

CASES = {
    'FPN': lambda: (dict(), (8, 16, 32, 64, 128)),
    'PAN': lambda: (dict(neck='pan'), (8, 16, 32, 64, 128)),
    'BiFPN': lambda: (dict(neck='bifpn'), (8, 16, 32, 64, 128)),
    'a Backbone': lambda: (dict(backbone=body()), (8, 16, 32, 64, 128)),
    'its own strides': lambda: (dict(backbone=body(16, 32)), (16, 32, 64, 128)),
    'from stride 4': lambda: (dict(min_stride=4), (4, 8, 16, 32, 64, 128)),
    'from C5': lambda: (dict(from_c5=True), (8, 16, 32, 64, 128)),
    'a neck class': lambda: (dict(neck=FPN), (8, 16, 32)),
    'a built neck': lambda: (dict(backbone=body(), neck=FPN(body().channels, (4, 8, 16, 32), 16)), (4, 8, 16, 32)),
    'no neck': lambda: (dict(neck=None), (32,)),
    'fine map': lambda: (dict(backbone=body(4)), (4,)),
    'last map, fpn': lambda: (dict(backbone=body(16), neck='fpn'), (16,)),
    'carries a neck': lambda: (dict(backbone=attach_neck(body(), channels=24)), (4, 8, 16, 32)),
    'Sequential': lambda: (dict(backbone=plain()), (16,)),
}


@pytest.mark.parametrize(
    'kind,name',
    [  # they share all but their heads
        pytest.param(k, o, marks=[] if name_turn % 2 == kind_turn or o == 'FPN' else pytest.mark.slow)
        for name_turn, o in enumerate(CASES)
        for kind_turn, k in enumerate(MODELS)
    ],
)
def test_backbones_and_necks(kind, name):
    torch.manual_seed(0)
    config, strides = CASES[name]()
    m, (x, t), calls = detector(kind, **config), data(), []
    assert m.strides == strides and len(m.anchor_generator.sizes) == len(strides)
    losses = m(x, t)
    assert tuple(losses) == m.loss_names and all(o.isfinite() for o in losses.values())
    sum(losses.values()).backward()
    grads = [p.grad for p in [*m.head.parameters(), *m.backbone.param_groups()[0]]]
    assert all(o is not None and o.isfinite().all() for o in grads)
    m.backbone.register_forward_hook(lambda *_: calls.append(1))
    before, flags = buffers(m), {k: o.training for k, o in m.named_modules()}
    with torch.no_grad():
        losses, dets = m.losses_and_detections(x, t)
    assert len(calls) == 1 and all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    assert {k: o.training for k, o in m.named_modules()} == flags
    with torch.no_grad():
        assert_same(m.eval()(x), dets)
    for d in dets:
        assert 0 < len(d['boxes']) == len(d['scores']) == len(d['labels']) <= 8 and d['labels'].dtype == torch.int64
        assert (d['labels'] >= 1).all() and (d['labels'] < 3).all()
        assert (d['boxes'] >= 0).all() and (d['boxes'][:, 2] <= 80).all() and (d['boxes'][:, 3] <= 64).all()


@both_kinds
def test_a_given_backbone_keeps_its_selection(kind):
    bb = body()
    m = detector(kind, bb)
    assert bb.strides == (4, 8, 16, 32) and len(bb(torch.rand(2, 3, 64, 64))) == 4
    own = {id(p) for p in bb.parameters()}
    assert own <= {id(p) for p in m.parameters()}


@both_kinds
def test_anchors_follow_strides(kind):
    with torch.device('meta'):
        m = detector(kind, 'resnet18')
    first = {'retinanet': (32, 40, 50), 'fcos': (8,)}[kind]
    assert m.anchor_generator.sizes == tuple(
        tuple(int(first[0] * 2**l * 2 ** (i / 3)) for i in range(len(first))) for l in range(5)
    )
    single = detector(kind, body(16)).anchor_generator.sizes
    assert single == ({'retinanet': (sum(m.anchor_generator.sizes, ()),), 'fcos': ((16,),)}[kind])


def test_fewer_sizes_and_shapes():
    m = detector('retinanet', octaves=1, aspect_ratios=(1.0,), anchor_scale=2)
    assert (
        m.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
        and m.head.classification_head.num_anchors == 1
    )
    x, t = data()
    assert all(o.isfinite() for o in m(x, t).values())


# --- targets, sizes, settings


@both_kinds
@pytest.mark.parametrize(
    'empty',
    [
        NONE,
        dict(boxes=torch.tensor([]), labels=torch.tensor([])),
        dict(boxes=torch.tensor([[1.0, 1, 9, 9]]), labels=torch.tensor([1]), iscrowd=torch.tensor([1])),
    ],
)
def test_batches_without_boxes(kind, empty):
    m, (x, _) = detector(kind), data()
    losses = m(x, [empty, empty])
    assert losses['loss_classifier'] > 0 and all(v == 0 for k, v in losses.items() if k != 'loss_classifier')
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


@both_kinds
@pytest.mark.parametrize('img_size', [None, 64, (32, 48)])
def test_odd_sizes_in_pixels_of_the_input(kind, img_size):
    m = detector(kind, 'vovnet19_slim', img_size=img_size, score_thresh=0.0)
    sizes = (70, 51), (33, 91)
    x = [torch.rand(3, *s) for s in sizes]
    losses, dets = m(x, [dict(boxes=torch.tensor([[1.0, 2, 40, 30]]), labels=torch.tensor([2])), NONE], both=True)
    assert all(o.isfinite() for o in losses.values())
    for d, (h, w) in zip(dets, sizes):
        assert (
            len(d['boxes'])
            and (d['boxes'] >= 0).all()
            and (d['boxes'][:, 2] <= w).all()
            and (d['boxes'][:, 3] <= h).all()
        )
        assert d['boxes'][:, 2].max() > 0.5 * w  # not left at the smaller scale


@both_kinds
def test_one_tiny_image(kind):
    m, (x, t) = (
        detector(kind, head_norm='gn').eval(),
        data(1, (33, 20)),
    )  # the coarse maps have one cell, with 32 channels
    losses, dets = m(x, [t[0] | dict(boxes=t[0]['boxes'] / 4)], both=True)
    assert all(o.isfinite() for o in losses.values()) and len(dets[0]['boxes'])


@both_kinds
def test_settings(kind):
    torch.manual_seed(0)
    m, (x, _) = detector(kind, 'vovnet19_slim', detections_per_img=5, nms_thresh=0.95).eval(), data()
    with torch.no_grad():
        some = m(x)
        assert all(len(d['boxes']) == 5 for d in some)
        m.score_thresh = cut = float(some[0]['scores'][-1])
        above = m(x)[0]['scores']
        assert len(above) == (some[0]['scores'] > cut).sum() > 0 and (above > cut).all()
        m.score_thresh, m.topk_candidates, m.detections_per_img = 0.0, 1, 1000
        assert len(m(x)[0]['boxes']) <= len(m.strides)
        m.topk_candidates, counts = 50, []
        for m.nms_thresh in (0.95, 0.05):
            counts.append(len(m(x)[0]['boxes']))
        assert counts[0] > counts[1] > 0


@both_kinds
def test_bfloat16_autocast(kind):
    m, (x, t) = detector(kind), data()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, dets = m(x, t, both=True)
    sum(losses.values()).backward()
    assert {v.dtype for v in losses.values()} == {torch.float32} == {dets[0]['boxes'].dtype, dets[0]['scores'].dtype}
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


@both_kinds
@pytest.mark.parametrize('how', copies)
def test_copies(kind, how):
    m, (x, _) = detector(kind).eval(), data()
    assert_same(copies[how](m)(x), m(x))


@both_kinds
def test_state_dict(kind):
    a, b, (x, _) = detector(kind).eval(), detector(kind).eval(), data()
    b.load_state_dict(a.state_dict(), strict=True)
    assert_same(b(x), a(x))
    assert {k.split('.')[0] for k in a.state_dict()} == {'backbone', 'head'}


@both_kinds
def test_groups(kind):
    m = detector(kind, 'resnet18')
    ids = [id(p) for g in m.param_groups() for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    assert {id(p) for p in m.param_groups()[-1]} == {id(p) for p in m.head.parameters()}
    m.freeze_to(-1)
    assert all(p.requires_grad for p in m.head.parameters()) and not next(m.backbone.neck.parameters()).requires_grad


@both_kinds
def test_replace_heads(kind):
    m, (x, t) = detector(kind, num_classes=9), data()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    assert m.replace_heads(3) is m and m.num_classes == 3
    new = {k for k, v in m.state_dict().items() if v.shape != before[k].shape}
    assert new == {f'head.classification_head.cls_logits.{o}' for o in ('weight', 'bias')}
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items() if k not in new)
    last, fresh = [o.head.classification_head.cls_logits for o in (m, detector(kind))]
    assert torch.equal(last.bias, fresh.bias) and abs(last.weight.std() / fresh.weight.std() - 1) < 0.1
    losses, dets = m(x, t, both=True)
    assert all(o.isfinite() for o in losses.values()) and all((d['labels'] < 3).all() for d in dets)


X, T = data(1)
BAD = {
    "retinanet.model takes no argument 'nms_tresh'. Did you mean 'nms_thresh'": lambda: detector(
        'retinanet', nms_tresh=0.3
    ),
    "fcos.model takes no argument 'center_sampling'. Did you mean 'center_sampling_radius'": lambda: detector(
        'fcos', center_sampling=2.0
    ),
    "fcos.model takes no argument 'anchor_scale'": lambda: detector('fcos', anchor_scale=2),
    "'anchor_scal'. Did you mean 'anchor_scale'": lambda: detector('retinanet', anchor_scal=2),
    "box_loss='gio', expected one of l1": lambda: detector('retinanet', box_loss='gio'),
    "norm='qn', expected one of bn": lambda: detector('fcos', head_norm='qn'),
    'num_classes=1': lambda: detector('retinanet', num_classes=1),
    'img_size=(1, 2, 3)': lambda: detector('fcos', img_size=(1, 2, 3)),
    'together with min_size': lambda: detector('fcos', img_size=64, min_size=64),
    'pretrained_backbone=True': lambda: detector('fcos', plain(), pretrained_backbone=True),
    "no backbone 'vovnet19_slm'": lambda: detector('retinanet', 'vovnet19_slm'),
    "no neck 'fnp'": lambda: detector('fcos', neck='fnp'),
    'got num_classes=0': lambda: detector('fcos').replace_heads(0),
    'label 3, expected 1 to 2': lambda: detector('fcos')(X, [T[0] | dict(labels=torch.tensor([1, 3]))]),
}


@pytest.mark.parametrize('says', BAD)
def test_errors_say_what_to_do(says):
    with pytest.raises((TypeError, ValueError)) as e:
        BAD[says]()
    assert says in str(e.value) and '\n' not in str(e.value)


@both_kinds
def test_parts_may_be_replaced(kind):
    given = detector(kind)
    m = detector(kind, head=given.head, anchor_generator=given.anchor_generator)
    assert m.head is given.head and m.anchor_generator is given.anchor_generator


@both_kinds
def test_learns_two_images(kind):
    torch.manual_seed(0)
    m = detector(kind, 'vovnet19_slim', neck_norm='gn', head_norm='gn', score_thresh=0.05)
    x = torch.zeros(2, 3, 64, 64)
    x[0, :, 12:44, 8:40], x[1, 0, 20:60, 24:60] = 1.0, 1.0
    t = [
        dict(boxes=torch.tensor([b]), labels=torch.tensor([k]))
        for b, k in (([8.0, 12, 40, 44], 1), ([24.0, 20, 60, 60], 2))
    ]
    opt = torch.optim.AdamW(m.parameters(), 1e-3)
    for _ in range(25):
        opt.zero_grad()
        sum(m(x, t).values()).backward()
        opt.step()
    losses, dets = m(x, t, both=True)
    assert losses['loss_classifier'] < 0.2 and coco_eval(dets, t)['AP50'] > 0.9
