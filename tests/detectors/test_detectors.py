import copy
import inspect
import pickle

import pytest
import torch
import torchvision
import torchvision.tv_tensors
from fastcore.docments import docments
from torch import nn
from torch.testing import assert_close

from common import assert_runs_on_cuda, assert_same, buffers, lean_rcnn, plain

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import map_weights, randomize_
from backbones_nb.detectors import faster_rcnn
from backbones_nb.detectors.detector import Detector
from backbones_nb.detectors.targets import check_images, check_targets
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta')
LEAN = lean_rcnn
NONE = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
LOSSES = {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}


class TwoMaps(nn.Module):  # maps with equal channels, strides 8 and 32: nothing in between
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 4, 4)

    def forward(self, x):
        a = self.a(x)
        return dict(fine=a, coarse=self.b(a))


BACKBONES = {
    'vovnet19_slim_dw': lambda: ('vovnet19_slim_dw', 'auto', (4, 8, 16, 32, 64)),
    'resnet18': lambda: ('resnet18', 'auto', (4, 8, 16, 32, 64)),
    'last map': lambda: (create_backbone('vovnet19_slim_dw', strides=(32,)), 'auto', (32,)),
    'strides 8-32': lambda: (create_backbone('vovnet19_slim_dw', strides=(8, 16, 32)), 'auto', (8, 16, 32, 64)),
    'no neck': lambda: ('vovnet19_slim_dw', None, (32,)),
    'resnet50 no neck': lambda: ('resnet50', None, (32,)),  # airctic/icevision#916
    'one map, fpn': lambda: (create_backbone('vovnet19_slim_dw', strides=(16,)), 'fpn', (16,)),
    'carries a neck': lambda: (attach_neck(create_backbone('vovnet19_slim_dw'), channels=24), 'auto', (4, 8, 16, 32)),
    'carries p6p7': lambda: (
        attach_neck(create_backbone('vovnet19_slim_dw'), channels=24, extra='p6p7'),
        'auto',
        (4, 8, 16, 32, 64, 128),
    ),
    'Sequential': lambda: (plain(), 'auto', (16,)),
    'equal channels, a gap': lambda: (TwoMaps(), None, (8, 32)),
    'vgg11': lambda: (torchvision.models.vgg11(weights=None).features, 'auto', (32,)),
    'torchvision FPN': lambda: (
        create_backbone(
            torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
                backbone_name='resnet18', weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
            ),
            strides=(4, 8, 16, 32, 64),
        ),
        None,
        (4, 8, 16, 32, 64),
    ),
}


def detector(backbone='vovnet19_slim_dw', neck='auto', num_classes=3, **kw):
    return faster_rcnn.model(num_classes, backbone, neck, **LEAN | kw)


def data(bs=2, size=(64, 80), seed=0):
    g = torch.Generator().manual_seed(seed)
    t = dict(boxes=torch.tensor([[8.0, 8, 50, 56], [30, 4, 78, 40]]), labels=torch.tensor([1, 2]), image_id=7)
    return torch.rand(bs, 3, *size, generator=g), [t] + [NONE] * (bs - 1)


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones(name):
    torch.manual_seed(0)
    backbone, neck, strides = BACKBONES[name]()
    m, (x, t) = detector(backbone, neck), data()
    assert m.strides == strides
    assert len(m.rpn.anchor_generator.sizes) == len(strides)
    losses = m(x, t)
    assert set(losses) == LOSSES and all(o.isfinite() for o in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    unused = 'stages.3.' if name == 'one map, fpn' else 'none'  # beyond the selected stride
    assert all(unused in n for n, p in m.named_parameters() if p.grad is None)
    m.eval()
    before = buffers(m)
    with torch.no_grad():
        alone, (losses, dets) = m(x), m.losses_and_detections(x, t)
    assert_same(alone, dets)
    assert set(losses) == LOSSES and all(o.isfinite() for o in losses.values())
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    for d in dets:
        assert (
            d['boxes'].dtype == torch.float32
            and d['labels'].dtype == torch.int64
            and len(d['boxes']) == len(d['scores']) <= 10
        )
        assert (d['labels'] >= 1).all() and (d['labels'] < 3).all()
        assert (d['boxes'] >= 0).all() and (d['boxes'][:, 2] <= 80).all() and (d['boxes'][:, 3] <= 64).all()


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('name', ['vovnet19_slim_dw', 'last map'])
def test_both_from_one_pass(name, mode):
    backbone, neck, _ = BACKBONES[name]()
    m, (x, t), calls = detector(backbone, neck).train(mode), data(), []
    m.backbone.register_forward_hook(lambda *_: calls.append(1))
    flags, before = {k: o.training for k, o in m.named_modules()}, buffers(m)
    torch.manual_seed(3)
    losses, dets = m(x, t, both=True)
    assert len(calls) == 1
    assert {k: o.training for k, o in m.named_modules()} == flags
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    sum(losses.values()).backward()  # both may train, too
    assert_same(copy.deepcopy(m).eval()(x), dets)
    m.train()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d):
            o.eval()
    torch.manual_seed(3)
    for k, v in m(x, t).items():
        assert torch.equal(v, losses[k]), k


def test_both_leaves_the_heads_children_in_eval():
    m, (x, t) = detector(), data()
    m.roi_heads.box_head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 49, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))
    before = buffers(m)
    torch.manual_seed(0)
    a, _ = m(x, t, both=True)
    torch.manual_seed(0)
    b, _ = m.eval()(x, t, both=True)
    assert a == b
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())


def test_flags_come_back_after_an_error():
    m, (x, t) = detector(), data()
    with pytest.raises(ValueError):
        m(x, t[:1], both=True)
    assert all(o.training for o in m.modules())


@pytest.mark.parametrize(
    'empty',
    [
        NONE,
        dict(boxes=torch.tensor([]), labels=torch.tensor([])),
        dict(boxes=torch.tensor([[1.0, 1, 9, 9]]), labels=torch.tensor([1]), iscrowd=torch.tensor([1])),
    ],
)
def test_batches_without_boxes_train(empty):
    m, (x, _) = detector(), data()
    losses = m(x, [empty, empty])
    assert losses['loss_box_reg'] == losses['loss_rpn_box_reg'] == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    assert any(p.grad.abs().sum() > 0 for p in m.backbone.param_groups()[0])


def test_losses_per_image_are_those_of_the_image_alone():
    m, (x, t) = detector(), data(3)
    state, before = torch.random.get_rng_state(), buffers(m)
    losses, dets = m.losses_per_image(x, t)
    assert torch.equal(torch.random.get_rng_state(), state) and m.training
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    assert (
        set(losses) == LOSSES
        and all(v.shape == (3,) and not v.requires_grad for v in losses.values())
        and len(dets) == 3
    )
    turned, _ = m.losses_per_image(x.flip(0), t[::-1])
    for k, v in losses.items():
        assert_close(turned[k].flip(0), v)
    with torch.no_grad():
        for a, b in zip(m.eval()(x[:1]), dets[:1]):
            assert a.keys() == b.keys()
            for k in a:
                assert_close(a[k], b[k])


def test_shared_arguments_are_keywords_and_documented():
    params = inspect.signature(faster_rcnn.model).parameters
    assert list(params)[:3] == ['num_classes', 'backbone', 'neck']
    assert all(p.kind == p.KEYWORD_ONLY for p in list(params.values())[3:])
    assert {'img_size', 'neck_channels', 'pretrained', 'normalize', 'anchor_scale'} <= set(params)
    assert all(docments(faster_rcnn.model).values())


def test_crowds_are_left_out():
    x, (t, _) = data(1), data()[1]
    crowd = t | dict(iscrowd=torch.tensor([0, 1]), masks=torch.zeros(2, 64, 80, dtype=torch.uint8), area=torch.ones(2))
    res = check_targets([crowd], list(x[0]), 3, ('boxes', 'labels', 'masks'))[0]
    assert (
        res['boxes'].tolist() == t['boxes'][:1].tolist()
        and res['labels'].tolist() == [1]
        and res['masks'].shape == (1, 64, 80)
    )


X, T = data(1)


def bad(**kw):
    return [T[0] | kw]


BAD = {
    'shape (3': lambda m: m(X[0], T),
    'PIL': lambda m: m('image', T),
    'an empty batch': lambda m: m([], []),
    'image 1 is of type ndarray': lambda m: m([X[0], X[0].numpy()], T * 2),
    '(1, 64, 80)': lambda m: m([X[0][:1]], T),
    'torch.uint8': lambda m: m((X * 255).byte(), T),
    'divide bytes by 255': lambda m: m(X * 255, T),
    'NaN': lambda m: m(X / 0, T),
    'without targets': lambda m: m(X),
    'targets of type dict': lambda m: m(X, T[0]),
    '2 targets for 1': lambda m: m(X, T * 2),
    'a dict with boxes': lambda m: m(X, [dict(boxes=T[0]['boxes'])]),
    'list': lambda m: m(X, bad(labels=[1, 2])),
    'image 7 has the box [9.0': lambda m: m(X, bad(boxes=torch.tensor([[1.0, 1, 5, 5], [9, 9, 9, 20]]))),
    '[1.0, 1.0, nan': lambda m: m(X, bad(boxes=torch.tensor([[1.0, 1, float('nan'), 5], [9, 9, 19, 20]]))),
    'label 3, expected 1 to 2': lambda m: m(X, bad(labels=torch.tensor([1, 3]))),
    'label 0': lambda m: m(X, bad(labels=torch.tensor([0, 1]))),
    'boxes (2, 5)': lambda m: m(X, bad(boxes=torch.rand(2, 5))),
    'labels (1,)': lambda m: m(X, bad(labels=torch.tensor([1]))),
    'torch.int32': lambda m: m(X, bad(labels=torch.tensor([1, 2]).int())),
    'of torch.int64 and': lambda m: m(X, bad(boxes=T[0]['boxes'].long())),
    'on meta': lambda m: m(X, bad(boxes=T[0]['boxes'].to('meta'))),
    'XYWH': lambda m: m(
        X, bad(boxes=torchvision.tv_tensors.BoundingBoxes(T[0]['boxes'], format='XYWH', canvas_size=(64, 80)))
    ),
    'freeze_to(99)': lambda m: m.freeze_to(99),
    "'box_detection_per_img'. Did you mean 'box_detections_per_img'": lambda m: detector(box_detection_per_img=3),
    'num_classes=1': lambda m: detector(num_classes=1),
    'img_size=(1, 2, 3)': lambda m: detector(img_size=(1, 2, 3)),
    'together with min_size': lambda m: detector(img_size=64, min_size=64),
    'pretrained_backbone=True': lambda m: detector(plain(), pretrained_backbone=True),
    "no backbone 'vovnet19_slm'": lambda m: detector('vovnet19_slm'),
    "no neck 'fnp'": lambda m: detector(neck='fnp'),
}
MESSAGES = {'shape (3': 'images[None]', 'PIL': 'list of tensors'}


@pytest.fixture(scope='module')
def net():
    return detector()


@pytest.mark.parametrize('says', BAD)
def test_errors_say_what_to_do(says, net):
    with pytest.raises((TypeError, ValueError)) as e:
        BAD[says](net)
    assert MESSAGES.get(says, says) in str(e.value)
    assert '\n' not in str(e.value) and not str(e.value).endswith('.')  # one sentence
    assert net.training


def test_masks_are_checked():
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r'masks \(2, 60, 80\)'):
        check_targets(bad(masks=masks), list(X), 3, ('boxes', 'labels', 'masks'))
    with pytest.raises(TypeError, match='masks of type NoneType'):
        check_targets(T, list(X), 3, ('boxes', 'labels', 'masks'))


def test_foreign_tensor_types_become_plain():
    class Mine(torch.Tensor):
        pass

    assert all(type(o) is torch.Tensor for o in check_images(X.as_subclass(Mine)))
    box = torchvision.tv_tensors.BoundingBoxes(T[0]['boxes'], format='XYXY', canvas_size=(64, 80))
    assert type(check_targets(bad(boxes=box), list(X), 3)[0]['boxes']) is torch.Tensor


@pytest.mark.parametrize('norm', [None, 'bn'])
@pytest.mark.parametrize('n', [0, 1, 3, -2, -1, 7])
def test_groups_and_freezing(norm, n):
    m = detector(neck_norm=norm)
    groups = m.param_groups()
    ids = [id(p) for g in groups for p in g]
    assert len(groups) == 7 and len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}
    assert set(map(id, groups[-1])) == {id(p) for k in (m.rpn, m.roi_heads) for p in k.parameters()}
    assert set(map(id, groups[-2])) == {id(p) for p in m.backbone.neck.parameters()}
    norms = [o for o in m.modules() if isinstance(o, nn.BatchNorm2d)]
    bn = {id(p) for o in norms for p in o.parameters()}
    m.freeze_to(n).train()
    assert all(o.training for o in norms)  # random statistics mean nothing, so they continue
    for i, g in enumerate(groups):
        assert all(p.requires_grad == (i >= (n if n >= 0 else n + 7) or id(p) in bn) for p in g)


def test_pretrained_parts_freeze_with_their_norms_and_no_others():
    m = detector(neck_norm='bn')
    m.backbone.body.pretrained = m.backbone.pretrained = 'tag'
    m.freeze_to(-1).train()
    body = [o for o in m.backbone.body.modules() if isinstance(o, nn.BatchNorm2d)]
    neck = [o for o in m.backbone.neck.modules() if isinstance(o, nn.BatchNorm2d)]
    assert not any(o.training or o.weight.requires_grad for o in body)
    assert neck and all(o.training and o.weight.requires_grad for o in neck)
    x, t = data()
    before = buffers(m.backbone.body)
    sum(m(x, t).values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in m.backbone.body.named_buffers())
    m.freeze_to(0).train()
    rest = [o for o in m.modules() if not any(o is p for p in body)]
    assert not any(o.training for o in body) and all(o.training for o in rest)  # their statistics stay
    assert all(p.requires_grad for p in m.parameters())
    m.norm_eval = False
    assert all(o.training for o in m.train().modules())


def test_batch_norms_of_random_backbones_learn_unless_norm_eval():
    m = detector(neck_norm='bn').train()
    body = [o for o in m.backbone.body.modules() if isinstance(o, nn.BatchNorm2d)]
    assert body and all(o.training for o in m.modules())
    m.norm_eval = True
    m.train()
    assert not any(o.training for o in body) and m.backbone.neck.training


def torchvision_pair(min_size=128, max_size=192, num_classes=4, **kw):
    tv = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=min_size, max_size=max_size, **kw
    )
    ours = faster_rcnn.model(num_classes, min_size=min_size, max_size=max_size, **kw)
    randomize_(tv.backbone)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*tv.rpn.parameters(), *tv.roi_heads.parameters()]:
            p.copy_(torch.randn(p.shape, generator=gen) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))
    map_weights(tv, ours, [(r'fpn\.inner_blocks', 'neck.lateral'), (r'fpn\.layer_blocks', 'neck.smooth')])
    return tv, ours


@pytest.fixture(scope='module')
def equal_nets():
    nets = torchvision_pair(box_score_thresh=0.3, rpn_post_nms_top_n_test=60, rpn_post_nms_top_n_train=100)
    return [(m, copy.deepcopy(m.state_dict())) for m in nets]


@pytest.mark.parametrize('sizes', [[(128, 160), (150, 110)], [(97, 203)]])
def test_equal_to_torchvision(equal_nets, sizes):
    for m, state in equal_nets:
        m.load_state_dict(state)  # without what another test has trained
    (tv, _), (ours, _) = equal_nets
    assert sum(p.numel() for p in tv.parameters()) == sum(p.numel() for p in ours.parameters())
    g = torch.Generator().manual_seed(0)
    x = [torch.rand(3, *s, generator=g) for s in sizes]
    t = [dict(boxes=torch.tensor([[8.0, 8, 60, 70], [40, 20, 100, 90]]), labels=torch.tensor([1, 3])), NONE][: len(x)]
    with torch.no_grad():
        a, b = tv.eval()(x), ours.eval()(x)
    assert len(a[0]['boxes']) > 5
    assert_same(a, b)
    for train_norms in False, True:
        res = []
        for m in tv, ours:
            m.train()
            if not train_norms:
                for o in m.modules():
                    if isinstance(o, nn.BatchNorm2d):
                        o.eval()
            torch.manual_seed(5)
            res.append(m(x, t))
        assert res[0].keys() == res[1].keys()
        for k in res[0]:
            assert_close(res[1][k], res[0][k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('classes', [2, 91])
def test_default_has_torchvisions_parameters(classes):
    with torch.device('meta'):
        tv = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=classes
        )
        m = faster_rcnn.model(num_classes=classes)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in tv.parameters())
    assert 'resnet50 (random weights), FPN' in repr(m) and f'num_classes={classes}' in repr(m)


@pytest.mark.parametrize(
    'img_size,given,batch',
    [
        (None, (50, 70), (64, 96)),
        (64, (100, 200), (32, 64)),
        (64, (20, 10), (64, 32)),
        ((64, 96), (100, 100), (64, 64)),
        ((64, 96), (50, 300), (32, 96)),
        ((96, 64), (300, 50), (96, 32)),
        (128, (375, 500), (96, 128)),
    ],
)
def test_img_size(img_size, given, batch):
    m, seen = detector(img_size=img_size).eval(), []
    m.backbone.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
    x = torch.rand(3, *given)
    whole = dict(boxes=torch.tensor([[0.0, 0, given[1], given[0]]]), labels=torch.tensor([1]))
    images, targets = m.transform([x], [whole])
    h, w = images.image_sizes[0]
    assert_close(targets[0]['boxes'][0], torch.tensor([0.0, 0, w, h]))
    assert abs(h / w - given[0] / given[1]) < 0.06 * given[0] / given[1]
    with torch.no_grad():
        d = m([x])[0]
    assert tuple(seen[0][-2:]) == batch
    assert (d['boxes'][:, 2] <= given[1]).all() and (d['boxes'][:, 3] <= given[0]).all()
    assert d['boxes'][:, 2].max() > 0.5 * given[1]  # pixels of the input, not of the batch


def test_torchvisions_own_size_rule():
    m = detector(min_size=48, max_size=64)
    assert tuple(m.transform([torch.rand(3, 100, 200)])[0].image_sizes[0]) == (32, 64)


def test_normalization():
    bb = create_backbone('vovnet19_slim_dw')
    assert detector(bb).transform.image_mean == [0.485, 0.456, 0.406]
    bb.record = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    m = detector(bb).eval()
    n = faster_rcnn.model(3, bb, normalize=False, **LEAN).eval()
    n.load_state_dict(m.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert_same(m(x), n((x - 0.5) / 0.5))


def test_list_and_batch_agree_whatever_the_neighbors():
    m, (x, _) = detector().eval(), data()
    with torch.no_grad():
        assert_same(m(x), m(list(x)))
    with torch.no_grad():
        a, b = m([x[0]])[0], m([x[0], torch.rand(3, 30, 40)])[0]
    assert_close(a['boxes'], b['boxes'], rtol=1e-4, atol=1e-3)


def test_small_first_image_leaves_scales_alone():  # torchvision infers them from the first image and keeps them
    m = detector().eval()
    with torch.no_grad():
        m([torch.rand(3, 33, 33)])
    assert m.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize(
    'strides,scale,sides,levels',
    [
        ((4, 8, 16, 32), 8, (20, 111, 113, 225, 460, 900), (0, 0, 1, 2, 3, 3)),
        ((4, 8, 16, 32), 4, (20, 57, 113, 230), (0, 1, 2, 3)),
        ((8, 16, 32), 8, (20, 200, 230, 460), (0, 0, 1, 2)),
        ((8, 32), 8, (20, 230, 460), (0, 0, 1)),
    ],
)
def test_roi_levels(strides, scale, sides, levels):
    boxes = torch.tensor([[0.0, 0, s, s] for s in sides])
    assert tuple(faster_rcnn.StrideLevelMapper(strides, scale)([boxes]).tolist()) == levels


def test_boxes_of_all_sizes_are_pooled_across_a_gap():
    m = detector(TwoMaps(), None)
    maps = {'0': torch.ones(1, 16, 16, 16), '1': torch.ones(1, 16, 4, 4)}
    boxes = torch.tensor([[10.0, 10, 10 + s, 10 + s] for s in (16, 60, 100, 117)])
    m.roi_heads.box_roi_pool.map_levels = faster_rcnn.StrideLevelMapper((8, 32), 1)  # levels change at 28 and 112 px
    pooled = m.roi_heads.box_roi_pool(maps, [boxes], [(128, 128)])
    assert (pooled.flatten(1).mean(1) > 0.8).all()


@pytest.mark.parametrize(
    'scale,ratios,sizes',
    [(8, (0.5, 1, 2), ((32,), (64,), (128,), (256,), (512,))), (4, (1,), ((16,), (32,), (64,), (128,), (256,)))],
)
def test_anchors(scale, ratios, sizes):
    g = detector(anchor_scale=scale, aspect_ratios=ratios).rpn.anchor_generator
    assert g.sizes == sizes and g.num_anchors_per_location() == [len(ratios)] * 5


@pytest.mark.parametrize('name', ['vovnet19_slim_dw', 'last map', 'Sequential', 'equal channels, a gap'])
def test_pickle_deepcopy_state_dict(name, tmp_path):
    backbone, neck, _ = BACKBONES[name]()
    m, (x, _) = detector(backbone, neck).eval(), data()
    want = m(x)
    twins = [copy.deepcopy(m), pickle.loads(pickle.dumps(m))]
    torch.save(m.state_dict(), tmp_path / 'm.pth')
    other = detector(*BACKBONES[name]()[:2]).eval()
    other.load_state_dict(torch.load(tmp_path / 'm.pth', weights_only=True), strict=True)
    for o in [*twins, other]:
        assert_same(o(x), want)
        assert not {id(p) for p in o.parameters()} & {id(p) for p in m.parameters()}
        assert {id(p) for g in o.param_groups() for p in g} == {id(p) for p in o.parameters()}


@pytest.mark.parametrize('norm', ['bn', 'gn'])
def test_neck_norm(norm):
    m, (x, t) = detector(neck_norm=norm), data()
    kind = nn.BatchNorm2d if norm == 'bn' else nn.GroupNorm
    assert sum(isinstance(o, kind) for o in m.backbone.neck.modules()) == 8
    assert all(v.isfinite() for v in m(x, t).values())


@pytest.mark.parametrize('neck', [lambda c, s: attach_neck(create_backbone('vovnet19_slim_dw'), channels=16).neck])
def test_a_neck_of_ones_own(neck):
    assert detector(neck=neck).strides == (4, 8, 16, 32)
    assert detector(neck=neck(None, None)).backbone.channels == (16,) * 4


def test_torchvisions_parts_may_be_replaced():
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

    head = FastRCNNConvFCHead((32, 7, 7), [32], [64], norm_layer=nn.BatchNorm2d)
    m, (x, t) = detector(box_head=head), data()
    assert m.roi_heads.box_head is head and all(v.isfinite() for v in m(x, t).values())


def test_bfloat16_autocast_keeps_geometry_in_float32():
    m, (x, t) = detector(), data()
    kinds = set()
    m.rpn.register_forward_hook(lambda _, a, o: kinds.update(b.dtype for b in o[0]))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = m(x, t)
        dets = m.eval()(x)
    sum(losses.values()).backward()
    assert kinds == {torch.float32} and {v.dtype for v in losses.values()} == {torch.float32}
    assert all(d['boxes'].dtype == d['scores'].dtype == torch.float32 for d in dets)


def test_overfits_one_image():
    torch.manual_seed(0)
    m = detector('vovnet19_slim', neck_norm='gn', anchor_scale=4)
    x = torch.zeros(1, 3, 64, 64)
    x[:, 0, 16:48, 8:40] = 1.0
    t = [dict(boxes=torch.tensor([[8.0, 16, 40, 48]]), labels=torch.tensor([2]))]
    opt = torch.optim.AdamW(m.parameters(), 2e-3)
    seen = []
    for _ in range(40):
        loss = sum(m(x, t).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])


def test_base_says_what_is_missing():
    with pytest.raises(NotImplementedError):
        Detector(create_backbone('vovnet19_slim_dw'), 2)(torch.rand(1, 3, 64, 64), [NONE])


def test_backbone_with_neck_exports():
    m = detector().eval()
    x = torch.rand(1, 3, 64, 64)
    ep = torch.export.export(m.backbone, (x,))
    for a, b in zip(ep.module()(x), m.backbone(x)):
        assert_close(a, b)


@pytest.mark.cuda
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    assert_runs_on_cuda(detector(), *data(), 'boxes')
