import copy
import pickle

import effdet
import pytest
import torch
from effdet.config import set_config_writeable
from torch import nn
from torch.testing import assert_close

from common import assert_same, buffers, plain

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import randomize_
from backbones_nb.detectors import efficientdet
from backbones_nb.detectors.effdet_levels import consecutive_levels, effdet_config, effdet_rows, _map_sizes, with_levels
from backbones_nb.detectors.effdet_neck import _SafeBatchNorm, safe_norms
from backbones_nb.necks.bifpn import BiFPN
from backbones_nb.necks.build import attach_neck

pytestmark = pytest.mark.usefixtures('quick_meta')
LEAN = dict(img_size=128, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1)
LOSSES = {'loss_classifier', 'loss_box_reg'}
NONE = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
QUICK = 'mobilenetv3_small_050 mnasnet_small mobilenetv2_035 mixnet_s convnext_atto'.split()
SLOW = """swin_tiny_patch4_window7_224 resnet18 regnetx_002 ghostnet_050 hardcorenas_a lcnet_035 tinynet_e fbnetc_100
    darknet17 cspresnet50 dla34 res2net50_26w_4s hrnet_w18_small edgenext_xx_small repvgg_a0 ese_vovnet19b_dw vgg11_bn
    densenet121 pvt_v2_b0 mobilevit_xxs fastvit_t8 vit_tiny_patch16_224 maxvit_rmlp_pico_rw_256""".split()


def slow_but(quick, names):
    return [pytest.param(o, marks=[] if o in quick else pytest.mark.slow) for o in names]


TIMM = slow_but(QUICK, QUICK + SLOW)
OURS = ['vovnet19_slim', 'darknet19', 'cspdarknet19', 'resnet18', 'mobilenet_v2']


class Gap(nn.Module):  # maps at strides 8 and 32, nothing in between
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 4, 4)

    def forward(self, x):
        return [a := self.a(x), self.b(a)]


class Floors(nn.Module):  # strides 8 and 16, sizes rounded down
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        return [a := self.a(x), self.b(a)]


def detector(num_classes=3, **kw):
    return efficientdet.model('tf_efficientdet_lite0', num_classes, **LEAN | kw)


def data(bs=2, size=(100, 128), seed=0):
    g = torch.Generator().manual_seed(seed)
    t = dict(boxes=torch.tensor([[8.0, 8, 60, 70], [40, 20, 100, 90]]), labels=torch.tensor([1, 2]), image_id=7)
    return torch.rand(bs, 3, *size, generator=g), [t] + [NONE] * (bs - 1)


def check_step(m):
    x, t = data()
    losses = m.train()(x, t)
    assert set(losses) == LOSSES and all(o.isfinite() for o in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.backbone.body.parameters())
    ids = [id(p) for g in m.param_groups() for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in m.parameters()}


def check(m):
    check_step(m)
    x, t = data()
    m.eval()
    before = buffers(m)
    with torch.no_grad():
        alone, (losses, dets) = m(x), m.losses_and_detections(x, t)
    assert_same(alone, dets)
    assert set(losses) == LOSSES and all(o.isfinite() for o in losses.values())
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    for d in dets:
        assert (
            set(d) == {'boxes', 'labels', 'scores'} and len(d['boxes']) == len(d['labels']) == len(d['scores']) <= 100
        )
        assert d['boxes'].dtype == torch.float32 and d['labels'].dtype == torch.int64
        assert (
            (d['labels'] >= 1).all()
            and (d['labels'] < m.num_classes).all()
            and (d['boxes'][:, 2:] > d['boxes'][:, :2]).all()
        )
        assert (d['boxes'] >= 0).all() and (d['boxes'][:, 2] <= 128).all() and (d['boxes'][:, 3] <= 100).all()


@pytest.mark.parametrize('name', TIMM)
def test_timm_families_train(name, slow_run):
    m = detector(backbone=f'timm/{name}')
    assert m.strides[-1] == 128 and m.backbone.body.name == f'timm/{name}'
    whole = 'mobilenetv3_small_050', 'convnext_atto'  # with and without batch norms
    if name in whole or slow_run:
        check(m)
    else:
        check_step(m)


@pytest.mark.parametrize('name', OURS)
def test_levels_of_our_families(name):
    with torch.device('meta'):
        m = detector(backbone=name)
    assert m.strides == (8, 16, 32, 64, 128) and m.backbone.body.name == name


@pytest.mark.parametrize('name', slow_but(['vovnet19_slim', 'mobilenet_v2'], OURS))
def test_our_families_train(name):
    check(detector(backbone=name))


MODULES = {
    'module': (plain, {}, (16, 32, 64, 128)),
    'built': (lambda: create_backbone('vovnet19_slim_dw'), {}, (8, 16, 32, 64, 128)),
    'last map': (lambda: create_backbone('vovnet19_slim_dw', strides=32), {}, (32, 64, 128)),
    'five maps': (lambda: create_backbone('resnet18', strides=(2, 4, 8, 16, 32)), {}, (8, 16, 32, 64, 128)),
    'from stride 4': (lambda: create_backbone('vovnet19_slim_dw'), dict(min_level=2), (4, 8, 16, 32, 64, 128)),
    'neck bifpn': (lambda: 'vovnet19_slim_dw', dict(neck='bifpn'), (8, 16, 32, 64, 128)),
    'neck fpn': (lambda: 'vovnet19_slim_dw', dict(neck='fpn'), (8, 16, 32, 64, 128)),
    'neck pan': (lambda: 'vovnet19_slim_dw', dict(neck='pan'), (8, 16, 32, 64, 128)),
    'a Neck': (
        lambda: create_backbone('vovnet19_slim_dw'),
        dict(neck=lambda c, s: BiFPN(c, s, 24, 1)),
        (4, 8, 16, 32, 64),
    ),
    'carries a neck': (lambda: attach_neck(create_backbone('vovnet19_slim_dw'), channels=24), {}, (4, 8, 16, 32)),
}


@pytest.mark.parametrize('name', MODULES)
def test_modules_and_necks(name):
    backbone, kw, strides = MODULES[name]
    m = detector(backbone=backbone(), **kw)
    assert m.strides == strides
    check(m)


def test_a_module_keeps_its_own_selection():
    bb = create_backbone('vovnet19_slim')
    m = detector(backbone=bb)
    assert m.backbone.body is bb and bb.strides == (4, 8, 16, 32)


# loaded strictly below: lite0, d0 and tf_d0
QUICK = 'tf_efficientdet_lite0', 'tf_efficientdet_d7x', 'cspresdext50pan', 'efficientdetv2_dt'


@pytest.mark.parametrize('name', slow_but(QUICK, effdet_rows))
def test_every_name_builds_with_effdets_keys_and_shapes(name):
    with torch.device('meta'):
        ours, ref = efficientdet.model(name, 91), effdet.create_model(name, pretrained_backbone=False)
    want = {renamed(k): v.shape for k, v in ref.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == want
    assert ours.img_size == tuple(effdet_rows[name]['image_size'])


def test_all_names_are_listed():
    assert efficientdet.list_models() == list(effdet_rows) and set(QUICK) <= set(effdet_rows)
    assert efficientdet.list_models('*lite*', pretrained=True) == [
        f'tf_efficientdet_lite{o}' for o in ('0', '1', '2', '3', '3x', '4')
    ]


WHOLE = 'tf_efficientdet_lite0 tf_efficientdet_lite1 tf_efficientdet_lite2'.split()
WHOLE += [f'{o}efficientdet_d{i}' for o in ('', 'tf_') for i in range(3)]


@pytest.mark.parametrize('name', slow_but(['tf_efficientdet_lite0'], WHOLE))
def test_whole_nets_train_a_step(name):
    m, (x, t) = efficientdet.model(name, 3, 128), data()
    sum((losses := m(x, t)).values()).backward()
    assert set(losses) == LOSSES and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    before = m.class_net.predict.conv_pw.weight.clone()
    torch.optim.SGD(m.parameters(), 1e-3).step()
    assert not torch.equal(before, m.class_net.predict.conv_pw.weight)


@pytest.mark.parametrize('name', slow_but(['d6', 'd7x'], ['d6', 'd7', 'd7x']))
def test_names_that_exist_only_under_tf(name):
    with torch.device('meta'), pytest.warns(UserWarning, match=f'only as tf_efficientdet_{name}'):
        m = efficientdet.model(f'efficientdet_{name}', 3)
    assert m.name == f'tf_efficientdet_{name}' in repr(m)
    assert (m.strides[-1] == 256) == (name == 'd7x')


def renamed(k):
    return (
        k.replace('backbone.', 'backbone.body.body.', 1)
        if k.startswith('backbone.')
        else k.replace('fpn.', 'backbone.neck.fpn.', 1)
        if k.startswith('fpn.')
        else k
    )


def pair(name='tf_efficientdet_lite0', size=(128, 128), classes=3, **kw):
    ref = effdet.create_model(name, pretrained_backbone=False, num_classes=classes, image_size=size)
    randomize_(ref)
    with torch.no_grad():
        for p in ref.box_net.predict.parameters():
            p.mul_(0.05)  # boxes near their anchors
    set_config_writeable(ref.config)
    ref.config.max_detection_points = 1000
    ours = efficientdet.model(name, classes + 1, size, max_detection_points=1000, **kw)
    ours.load_state_dict({renamed(k): v for k, v in ref.state_dict().items()}, strict=True)
    return ref, ours


@pytest.mark.parametrize(
    'name,size,classes',
    [
        ('tf_efficientdet_lite0', (128, 128), 3),
        ('efficientdet_d0', (128, 192), 1),
        ('tf_efficientdet_d0', (130, 150), 2),
        pytest.param('cspdarkdet53m', (128, 128), 2, marks=pytest.mark.slow),
        pytest.param('cspresdext50pan', (128, 128), 2, marks=pytest.mark.slow),
    ],
)
def test_detections_and_losses_equal_effdets(name, size, classes):
    torch.manual_seed(0)
    ref, ours = pair(name, size, classes, normalize=False)
    x = torch.rand(2, 3, *size)
    boxes, labels = torch.tensor([[8.0, 8, 60, 70], [40, 20, 100, 90]]), torch.tensor([1, classes])
    targets = [dict(boxes=boxes, labels=labels), NONE]
    info = dict(img_scale=torch.ones(2), img_size=torch.tensor([size[::-1]] * 2).float())
    with torch.no_grad():
        want = effdet.DetBenchPredict(ref).eval()(x, info)
        got, (both, dets) = ours.eval()(x), ours.losses_and_detections(x, targets)
    assert_same(got, dets)
    for w, g in zip(want, got):
        w = w[(w[:, 5] > 0) & (w[:, 2] > w[:, 0]) & (w[:, 3] > w[:, 1])]
        assert len(w) > 20
        assert torch.equal(w, torch.cat([g['boxes'], g['scores'][:, None], g['labels'][:, None].float()], 1))
    bench = effdet.DetBenchTrain(ref, create_labeler=True)
    pad = torch.full((2, 2), -1)
    pad[0] = labels
    target = dict(bbox=torch.stack([boxes, boxes])[:, :, [1, 0, 3, 2]], cls=pad, **info)
    for mode in False, True:
        torch.manual_seed(1)  # of stochastic depth
        want = bench.train(mode)(x, target)
        torch.manual_seed(1)
        mine = ours.train(mode)(x, targets) if mode else both
        assert torch.equal(want['class_loss'], mine['loss_classifier'])
        assert torch.equal(want['box_loss'] * 50, mine['loss_box_reg'])
        assert torch.equal(want['loss'], sum(mine.values()))


def test_normalized_as_effdet_does():
    ref, ours = pair()
    x = torch.rand(1, 3, 128, 128)
    info = dict(img_scale=torch.ones(1), img_size=torch.tensor([[128.0, 128]]))
    with torch.no_grad():
        want, got = (
            effdet.DetBenchPredict(ref).eval()((x - 0.5) / 0.5, info),
            ours.eval()(x)[0],
        )  # lite: mean and std 0.5
    assert_close(got['scores'], want[0, : len(got['scores']), 4])
    with torch.device('meta'):
        other = efficientdet.model('efficientdet_d0', 3, 128)
    assert_close(other.transform.image_mean, [0.485, 0.456, 0.406])


def test_predictions_are_in_pixels_of_the_input():
    m = detector().eval()
    small = torch.rand(3, 32, 64)
    big = nn.functional.interpolate(small[None], scale_factor=2, mode='nearest')[
        0
    ]  # 64x128 after resizing: just as large
    with torch.no_grad():
        direct = m([big])[0]
        seen = m.transform([small])[0]
        assert seen.tensors.shape[-2:] == (128, 128) and seen.image_sizes == [(64, 128)]
        wide = m([small, big, torch.rand(3, 300, 200)])
    assert_close(wide[1]['boxes'], direct['boxes'], rtol=1e-4, atol=1e-3)
    for d, (h, w) in zip(wide, [(32, 64), (64, 128), (300, 200)]):
        assert len(d['boxes']) and (d['boxes'] <= torch.tensor([w, h, w, h]) + 1e-4).all()
    assert wide[2]['boxes'][:, 3].max() > 200


@pytest.mark.parametrize('bs', [1, 2])
def test_batches_without_boxes_train(bs):
    m, x = detector(), data(bs)[0]
    losses = m(x, [NONE] * bs)
    assert losses['loss_box_reg'] == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize('bs', [1, 3])
def test_one_class_at_128_px(bs):
    m = efficientdet.model(num_classes=2, img_size=128)  # 3069 anchors, less than effdet's 5000 points
    x, t = data(bs)
    t[0] = dict(t[0], labels=torch.ones(2, dtype=torch.int64))
    sum(m(x, t).values()).backward()  # and the coarsest map has one cell: batch norm of one image
    with torch.no_grad():
        dets = m.eval()(x)
    assert all(0 < len(d['boxes']) <= 100 and (d['labels'] == 1).all() for d in dets)


def test_settings_of_effdet():
    m = detector(
        anchor_scale=2.0, max_det_per_image=5, aspect_ratios=[1.0, 2.0], num_scales=1, score_thr=0.005, soft_nms=True
    ).eval()
    with torch.no_grad():
        d = m(data()[0])[0]
    assert (
        len(m.anchors.boxes) == 2 * (16**2 + 8**2 + 4**2 + 2**2 + 1)
        and len(d['boxes']) <= 5
        and (d['scores'] >= 0.005).all()
    )
    a = m.anchors.boxes[0]
    assert_close((a[2] - a[0]) * (a[3] - a[1]), torch.tensor(16.0) ** 2)
    assert not any('anchors' in k for k in m.state_dict())


def test_a_hundred_steps_forget_the_initial_statistics():
    own = {m.momentum for k, m in detector().named_modules() if isinstance(m, nn.BatchNorm2d) and 'body' not in k}
    assert own == {0.1} and (1 - 0.1) ** 100 < 1e-4 < 0.1 < (1 - 0.01) ** 100
    kept = detector(norm_kwargs=dict(eps=0.001, momentum=0.01)).class_net
    assert {m.momentum for m in kept.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def test_new_layers_learn_faster_than_published_ones():
    net = detector()
    assert net.lr == 4e-3
    net.pretrained = 'coco'
    assert net.lr == 1e-3


def test_flags_and_statistics_survive():
    m, (x, t) = detector(), data()
    flags, before = {k: o.training for k, o in m.named_modules()}, buffers(m)
    calls = []
    m.backbone.register_forward_hook(lambda *_: calls.append(1))
    losses, _ = m(x, t, both=True)
    assert len(calls) == 1 and {k: o.training for k, o in m.named_modules()} == flags
    assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    sum(losses.values()).backward()


@pytest.mark.parametrize('make', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make):
    m, x = detector(backbone='vovnet19_slim').eval(), data()[0]
    with torch.no_grad():
        assert_same(m(x), make(m)(x))


def test_freezing():
    m = detector(backbone='vovnet19_slim')
    n = len(m.param_groups())
    m.freeze_to(-1)
    heads = {id(p) for k in (m.class_net, m.box_net) for p in k.parameters()}
    norms = {id(p) for o in m.modules() if isinstance(o, nn.BatchNorm2d) for p in o.parameters()}
    assert all(p.requires_grad == (id(p) in heads | norms) for p in m.parameters())
    assert (
        set(map(id, m.param_groups()[-2])) == {id(p) for p in m.backbone.neck.parameters()}
        and n == len(m.backbone.body.param_groups()) + 2
    )


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(
        ValueError,
        match=r'cannot work at 140x128 \(its map at stride 8 is 17x16, expected 18x16\): '
        r'pass img_size=\(128, 128\) or \(144, 128\)',
    ):
        detector(backbone=Floors(), img_size=(140, 128))
    for size in (128, 128), (144, 128):
        check_works(detector(backbone=Floors(), img_size=size))
    with pytest.raises(ValueError, match='cannot be halved on both sides'):
        detector(img_size=(32, 256))
    check_works(detector(img_size=(96, 256)))


def check_works(m):
    with torch.no_grad():
        m.eval()(torch.rand(1, 3, *m.img_size))


SIZES = 64, 100, 130, 200, (96, 160), (65, 300)
SIZED = {  # backbone -> sizes of the quick run: maps rounded up or down, refused by the levels or by the net
    'timm/mobilenetv3_small_050': [(65, 300)],
    'vovnet19_slim_dw': [64, 130, (65, 300)],
    'resnet18': [100, (96, 160)],
    'timm/swin_tiny_patch4_window7_224': [200],
}


@pytest.mark.parametrize(
    'backbone,size',
    [pytest.param(b, o, marks=[] if o in some else pytest.mark.slow) for b, some in SIZED.items() for o in SIZES],
)
def test_a_size_is_refused_or_works(backbone, size):
    try:
        m = detector(backbone=backbone, img_size=size)
    except ValueError as e:
        near = str(e).partition('img_size=')[2].partition(', the')[0]
        m = detector(backbone=backbone, img_size=eval(near.partition(' or ')[0]))
    check_works(m)


def test_sizes_of_maps_need_no_computation():
    bb = create_backbone('vovnet19_slim')
    before = buffers(bb)
    assert _map_sizes(bb, (4096, 2048)) == [(4096 // s, 2048 // s) for s in (4, 8, 16, 32)]
    assert all(torch.equal(v, before[k]) for k, v in bb.named_buffers()) and bb.training


def test_levels():
    assert (
        consecutive_levels((4, 8, 16, 32)) == [1, 2, 3]
        and consecutive_levels((2, 4)) == [1]
        and consecutive_levels((4, 8), min_level=2) == [0, 1]
    )
    with pytest.raises(ValueError, match=r'strides \(8, 32\)'):
        consecutive_levels((8, 32))


def test_configurations_are_copied_not_changed():
    cfg = effdet_config('efficientdet_d0')
    was = dict(cfg)
    assert with_levels(cfg, (16,)).min_level == 4 and dict(cfg) == was
    row = copy.deepcopy(effdet_rows['tf_efficientdet_lite0'])
    m = detector(min_level=2)
    m.replace_heads(9)
    assert effdet_rows['tf_efficientdet_lite0'] == row and m.cfg.num_classes == 8


def test_safe_norms_keep_tensors_and_names():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.01).eval(), nn.Sequential(nn.BatchNorm2d(4))
    )
    before = dict(net.state_dict(keep_vars=True))
    same = safe_norms(net)
    now = same.state_dict(keep_vars=True)
    assert same is net and list(now) == list(before) and all(now[k] is v for k, v in before.items())
    assert isinstance(net[1], _SafeBatchNorm) and (net[1].eps, net[1].momentum, net[1].training) == (1e-3, 0.01, False)
    norm = net[2][0].train()
    norm(torch.rand(2, 4, 2, 2))
    assert norm.num_batches_tracked == 1 and norm(torch.rand(1, 4, 1, 1)).isfinite().all()


BAD = {
    "'tf_efficientdet_lite00'. Did you mean 'tf_efficientdet_lite0'": dict(model_name='tf_efficientdet_lite00'),
    'num_classes=': dict(model_name=3),
    'num_classes=None': dict(num_classes=None),
    'num_classes=1,': dict(num_classes=1),
    'img_size=(1, 2, 3)': dict(img_size=(1, 2, 3)),
    "'max_det_per_imag'. Did you mean 'max_det_per_image'": dict(max_det_per_imag=3),
    "argument 'url'": dict(url='x'),
    "neither ours nor timm's. Did you mean 'vovnet19_slim": dict(backbone='vovnet19_slm'),
    "'mobilenetv3_large_100": dict(backbone='timm/mobilenetv3_larg_100'),
    'pretrained_backbone=True': dict(backbone=plain(), pretrained_backbone=True),
    'a gap': dict(backbone=Gap()),
    'those of the whole detector': dict(backbone='resnet18', pretrained=True),
    "'voc'": dict(pretrained='voc'),
    "Did you mean 'efficientdet_q2'": dict(model_name='efficientdet_d2', pretrained=True),
    "no neck 'bifnp'": dict(neck='bifnp'),
    'expected one number for all': dict(backbone='resnet18', neck=None),
}


@pytest.mark.parametrize('says', BAD)
def test_errors_say_what_to_do(says):
    with pytest.raises((TypeError, ValueError)) as e:
        efficientdet.model(**dict(model_name='tf_efficientdet_lite0', num_classes=3, img_size=128) | BAD[says])
    assert says in str(e.value) and '\n' not in str(e.value) and not str(e.value).endswith('.')


@pytest.fixture(scope='module')
def lite0():
    "Weights of effdet's own net."
    ref = effdet.create_model('tf_efficientdet_lite0', pretrained_backbone=False)
    return randomize_(ref).state_dict()


def served(sd, tmp_path, monkeypatch):
    "These weights in a file, as their publisher would serve it."
    torch.save(sd, path := tmp_path / 'tf_efficientdet_lite0.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setitem(
        effdet_rows, 'tf_efficientdet_lite0', effdet_rows['tf_efficientdet_lite0'] | dict(url=path.as_uri())
    )


def test_published_weights(lite0, tmp_path, monkeypatch):
    served(lite0, tmp_path, monkeypatch)
    m = efficientdet.model('tf_efficientdet_lite0', img_size=128, pretrained='coco')
    assert (
        m.num_classes == 91
        and m.pretrained == 'coco'
        and m.backbone.body.pretrained == 'coco'
        and m.transform.image_mean == [0.5] * 3
    )
    now = m.state_dict()
    for k, v in lite0.items():
        assert torch.equal(now[renamed(k)], v), k
    few = efficientdet.model('tf_efficientdet_lite0', 3, 128, pretrained=True)
    now = few.state_dict()
    for k, v in lite0.items():
        if not k.startswith('class_net.predict.conv_pw'):
            assert torch.equal(now[renamed(k)], v), k
    check(few)


def test_published_weights_that_do_not_fit(lite0, tmp_path, monkeypatch):
    served({k: v for k, v in lite0.items() if k != 'box_net.predict.conv_pw.bias'}, tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match='1 missing .*box_net.predict.conv_pw.bias'):
        efficientdet.model('tf_efficientdet_lite0', 91, 128, pretrained=True)


def test_published_weights_cannot_be_reached(tmp_path, monkeypatch):
    served({}, tmp_path, monkeypatch)
    (tmp_path / 'tf_efficientdet_lite0.pth').unlink()
    with pytest.raises(RuntimeError, match='tf_efficientdet_lite0'):
        efficientdet.model('tf_efficientdet_lite0', 3, 128, pretrained='coco')
