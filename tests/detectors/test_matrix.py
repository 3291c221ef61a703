"Every detector x families of backbones x necks: what all of them promise, whatever stands below."

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cases import CLASSES, DETECTORS, T, X, at_once, check_detections, data, step
from common import assert_same, buffers, plain

from backbones_nb import create_backbone
from backbones_nb.necks.build import attach_neck


pytestmark = pytest.mark.usefixtures('quick_meta')
BACKBONES = {  # a name, or what builds a module
    'darknet19': 'darknet19',
    'cspdarknet19 convs': 'cspdarknet19',
    'cspdarknet19 slice': partial(create_backbone, 'cspdarknet19', split='slice'),
    'vovnet19_slim': 'vovnet19_slim',
    'vovnet19_slim_dw': 'vovnet19_slim_dw',
    'resnet18': 'resnet18',
    'mobilenet_v3_small': 'mobilenet_v3_small',
    'efficientnet_b0': 'efficientnet_b0',
    'regnet_y_400mf': 'regnet_y_400mf',
    'convnext_tiny': 'convnext_tiny',
    'timm': 'timm/mobilenetv3_small_050',
    'timm NHWC': 'timm/test_mambaout',
    'swin': 'timm/swin_tiny_patch4_window7_224',
    'Sequential': plain,
    'last map': partial(create_backbone, 'vovnet19_slim_dw', strides=(32,)),
    'middle map': partial(create_backbone, 'vovnet19_slim_dw', strides=(16,)),
    'has a neck': lambda: attach_neck(create_backbone('vovnet19_slim_dw'), channels=16),
    'name with a neck': 'resnet18_fpn',
}
NECKS = 'auto', 'fpn', 'pan', 'bifpn', None
SINGLE = {'Sequential', 'last map', 'middle map'}  # one map
EVEN = {'has a neck', 'name with a neck'}  # maps of equal channels
UNUSED = {'middle map': 'stages.3.'}  # parameters beyond the last map


def refused(name, body, neck):
    "What stands against a combination, '' for those that work."
    if neck == 'bifpn' and body in SINGLE and name != 'efficientdet':
        return 'at least two levels'  # EfficientDet adds its own
    if neck is None and name == 'efficientdet' and body not in SINGLE | EVEN:
        return 'expected one number for all'
    return ''


def build(name, body, neck='auto', **kw):
    torch.manual_seed(0)
    b = BACKBONES[body]
    return at_once(DETECTORS[name](num_classes=CLASSES, backbone=b if isinstance(b, str) else b(), neck=neck, **kw))


LARGE = 'convnext_tiny', 'swin'  # these with one neck only: a neck sees no more of them than channels and strides
UNLIKE = SINGLE | {'has a neck', 'timm NHWC', 'vovnet19_slim_dw'}  # one of each kind of backbone


ALIKE = ('faster_rcnn', 'mask_rcnn'), ('retinanet', 'fcos'), ('efficientdet',)  # they share all but their heads


def turn(name, among):
    "Which of `among` this detector takes; the next detector takes the next."
    return among[list(DETECTORS).index(name) % len(among)]


def in_turn(name, i):
    "Is it this detector's turn among those that are alike?"
    return any(name == o[i % len(o)] for o in ALIKE)


def quick(name, body, neck):
    "Each kind of backbone and each neck meets each kind of detector; the other backbones meet one detector, in turn."
    if neck == 'auto' and body in UNLIKE:
        return in_turn(name, list(BACKBONES).index(body))
    if neck == 'auto':
        return [o for o in BACKBONES if o not in UNLIKE].index(body) % 5 == list(DETECTORS).index(name)
    i = NECKS.index(neck)
    two = [o for o in ('timm NHWC', 'last map') if not refused(name, o, neck)]
    return body == two[(i + list(DETECTORS).index(name)) % len(two)] and in_turn(name, i)


EVERY = [(d, b, n) for d in DETECTORS for b in BACKBONES for n in NECKS if n == 'auto' or b not in LARGE]


def cases(quick):
    "Decorates a test of `case`, slow for the combinations that are not `quick`."
    rows = [
        pytest.param(o, marks=[] if quick(*o) else pytest.mark.slow, id='-'.join(map(str, o)))
        for o in EVERY
        if not refused(*o)
    ]
    return pytest.mark.parametrize('case', rows, indirect=True, scope='module')


@pytest.fixture(scope='module')
def case(request):
    "A detector after one training step, its losses, and which parameters and groups the gradients missed."
    name, body, neck = request.param
    m = build(name, body, neck)
    losses, groups = step(m, X, T), [[p for p in g if p.grad is not None] for g in m.param_groups()]
    return SimpleNamespace(
        m=m,
        losses=losses,
        unused=UNUSED.get(body),
        missed=[n for n, p in m.named_parameters() if p.grad is None],
        zero=[i for i, g in enumerate(groups) if g and all(p.grad.abs().max() == 0 for p in g)],
    )


@cases(quick)
def test_a_step_reaches_every_parameter(case):
    assert all(o > 0 for o in case.losses.values())
    assert (
        case.missed == [n for n, _ in case.m.named_parameters() if case.unused and case.unused in n] and not case.zero
    )


@cases(quick)
def test_detections_and_losses_from_one_pass(case):
    m = case.m
    before, flags, calls = buffers(m.train()), {k: o.training for k, o in m.named_modules()}, []
    hook = m.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        losses, dets = m.losses_and_detections(X, T)
    hook.remove()
    assert len(calls) == 1 and {k: o.training for k, o in m.named_modules()} == flags
    assert set(losses) == set(m.loss_names) and all(o.isfinite() for o in losses.values())
    check_detections(m, X, dets)
    with torch.no_grad():
        assert_same(m.eval()(X), dets)
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())


@cases(
    lambda name, body, neck: neck == 'auto' and body in UNLIKE and quick(name, body, neck)
)  # a matter of the detector and of the levels
def test_a_batch_without_objects(case):
    m = case.m
    x, t = [X[1], X[1].flip(-1)], [T[1]] * 2
    losses = step(m, x, t)
    assert all(v == 0 for k, v in losses.items() if 'reg' in k or 'mask' in k) and sum(losses.values()) > 0
    with torch.no_grad():
        losses, _ = m.losses_and_detections(x, t)
    assert all(o.isfinite() for o in losses.values())


@pytest.mark.parametrize(
    'combination', [o for o in EVERY if refused(*o) and o[1] in ('timm NHWC', 'Sequential')], ids=str
)
def test_what_cannot_be_is_said(combination):
    with pytest.raises(ValueError, match=refused(*combination)):
        build(*combination)


ODD = dict(efficientdet=dict(img_size=(75, 109)))


def detectors_with_necks(left_out=lambda name, neck: False):
    "Decorates a test of every detector with every neck, slow but for one neck of each detector, in turn."
    some = {name: [n for n in NECKS if n and not left_out(name, n)] for name in DETECTORS}
    rows = [
        pytest.param(
            d, n, marks=[] if n == turn(d, some[d]) or (d, n) == ('efficientdet', 'bifpn') else pytest.mark.slow
        )
        for d in DETECTORS
        for n in some[d]
    ]
    return pytest.mark.parametrize('name,neck', rows)


@detectors_with_necks()
def test_the_net_itself_may_see_odd_sizes(name, neck):
    m, (x, t), seen = (
        build(name, 'mobilenet_v3_small', neck, **ODD.get(name, dict(size_divisible=1))),
        data((75, 109), (75, 109)),
        [],
    )
    m.backbone.register_forward_pre_hook(lambda _, a: seen.append(tuple(a[0].shape[-2:])))
    assert all(o > 0 for o in step(m, x, t).values())
    with torch.no_grad():
        check_detections(m, x, m.eval()(x))
    assert seen == [(75, 109)] * 2


@detectors_with_necks(lambda name, neck: neck == 'bifpn' and name != 'efficientdet')
def test_one_image_whose_last_map_has_one_cell(
    name, neck
):  # a BiFPN's batch norms have no variance there; EfficientDet's do without
    m = build(name, 'mobilenet_v3_small', neck, **dict(img_size=64) if name == 'efficientdet' else {})
    x, t = data((64, 64))
    t[0] |= dict(boxes=t[0]['boxes'].clip(max=64), masks=t[0]['masks'])
    step(m, x, t)
