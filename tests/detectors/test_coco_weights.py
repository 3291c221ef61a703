import hashlib
import inspect
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import effdet
import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from common import assert_same, in_a_fork, out

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import randomize_
from backbones_nb.core.weights import fit_weights
from backbones_nb.detectors import coco_weights, efficientdet, faster_rcnn, mask_rcnn
from backbones_nb.detectors.coco_weights import (
    _TORCHVISION_DETECTORS,
    _CocoFamilies,
    coco_families,
    detector_records,
    list_coco,
    pick_coco,
    _torchvision_record,
)
from backbones_nb.detectors.effdet_levels import effdet_rows
from tools.proc import run

SMALL = dict(min_size=96, max_size=128)
FEW = dict(rpn_post_nms_top_n_test=30, box_detections_per_img=20, box_score_thresh=0.0)
DENSE = dict(score_thresh=0.0, topk_candidates=100, detections_per_img=50)
QUICK = 'fasterrcnn_mobilenet_v3_large_320_fpn', 'maskrcnn_resnet50_fpn', 'retinanet_resnet50_fpn', 'fcos_resnet50_fpn'
NAMES = [pytest.param(o, marks=[] if o in QUICK else pytest.mark.slow) for o in _TORCHVISION_DETECTORS]
NONE = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


def settings(name):
    return SMALL | (FEW if 'rcnn' in name else DENSE)


def model_of(name):
    return import_module(f'backbones_nb.detectors.{_TORCHVISION_DETECTORS[name][0]}').model


def weights_of(name):
    return get_model_weights(name).COCO_V1


def random_weights(name):
    "A state dict with the keys and shapes of these weights; signals neither vanish nor explode."
    with torch.device('meta'):
        net = get_model(name, weights=None, weights_backbone=None)
    net, g = net.to_empty(device='cpu'), torch.Generator().manual_seed(1)
    for k, b in net.named_buffers():
        b.zero_()
    randomize_(net.backbone)
    with torch.no_grad():
        for k, p in net.named_parameters():
            if not k.startswith('backbone.'):
                p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))
    frozen = _torchvision_record(weights_of(name)).frozen_eps is not None
    sd = {
        k: v
        for k, v in net.state_dict().items()
        if not (frozen and k.startswith('backbone.body') and k.endswith('num_batches_tracked'))
    }
    for k, v in sd.items():  # no norm of a head is settled, and nobody wants the background among detections
        if k.endswith('running_var'):
            v.clamp_(min=0.5)
        if k.endswith('cls_logits.bias') and 'classification' in k:
            v.view(-1, 91)[:, 0] = -100.0
    return sd


def old_keys(sd):
    "The keys that torchvision's blocks had before they were blocks."

    def old(k):
        for a, b in (('inner_blocks.', '.0.'), ('layer_blocks.', '.0.')):
            if a in k:
                head, _, tail = k.partition(a)
                k = head + a + tail.replace(b, '.', 1)
        k = k.replace('rpn.head.conv.0.0.', 'rpn.head.conv.')
        for i in range(4):
            k = k.replace(f'mask_head.{i}.0.', f'mask_head.mask_fcn{i + 1}.')
            k = k.replace(f'n_head.conv.{i}.0.', f'n_head.conv.{2 * i}.')
        return k

    return {old(k): v for k, v in sd.items()}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    "Puts a state dict where the weights of a name are published; returns its path."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    files = []

    def f(name, sd, url=lambda path: path.as_uri()):
        torch.save(sd, path := tmp_path / 'weights.pth')
        path = path.rename(tmp_path / f'{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth')
        files.append(path)
        if name in effdet_rows:
            monkeypatch.setitem(effdet_rows, name, effdet_rows[name] | dict(url=url(path)))
        else:
            monkeypatch.setattr(weights_of(name).value, 'url', url(path))
        return path

    yield f
    for o in [*files, *tmp_path.glob('hub/checkpoints/*')]:
        o.unlink(missing_ok=True)  # 170 MB each


@pytest.fixture
def server(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    s = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_address[1]}'
    s.shutdown()
    s.server_close()


def head_keys(net):  # what may change with the classes
    return {
        k
        for k in net.state_dict()
        if 'box_predictor' in k
        or 'mask_fcn_logits' in k
        or 'cls_logits' in k
        and 'rpn' not in k
        or k.startswith(('class_net.predict.conv_pw', 'class_net.predict.conv.'))
    }


def check_new_heads(net, sd, num_classes=3):
    "`replace_heads` changes exactly the layers whose shape depends on the classes."
    was = {k: v.clone() for k, v in sd.items()}
    assert net.replace_heads(num_classes) is net and net.num_classes == num_classes
    now = net.state_dict()
    assert now.keys() == was.keys() and head_keys(net)
    new = head_keys(net)
    for k, v in was.items():
        if k in new:
            assert now[k].shape != v.shape, k
        else:
            assert torch.equal(now[k], v), k


# --- torchvision's enums


@pytest.mark.parametrize('name', NAMES)
def test_detections_are_torchvisions_own(name, publish):
    sd = random_weights(name)
    publish(name, sd if name.endswith('_v2') else old_keys(sd))  # as they are published
    w = weights_of(name)
    ours = model_of(name)(pretrained=w, **settings(name)).eval()
    theirs = get_model(name, weights=w, **settings(name)).eval()
    x = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(2))]
    a, b = out(theirs, x), out(ours, x)
    assert len(a[0]['boxes']) >= 10 and len(a[0]['scores'].unique()) > 5
    assert_same(a, b)
    assert ours.num_classes == 91 == len(w.meta['categories'])
    assert sum(p.numel() for p in ours.parameters()) == ours.record.num_params == w.meta['num_params']
    assert (ours.pretrained, ours.backbone.body.pretrained) == (str(w),) * 2 and str(w) in repr(ours)
    check_new_heads(ours, ours.state_dict())


RCNN = [o for o in _TORCHVISION_DETECTORS if 'rcnn' in o]


def on_meta(name, *args, **kw):
    with torch.device('meta'):
        return get_model(name, weights=None, weights_backbone=None, **kw) if not args else model_of(name)(*args, **kw)


@pytest.mark.parametrize('name', _TORCHVISION_DETECTORS)
def test_the_records_configuration_rebuilds_the_architecture(name):
    r, ref = _torchvision_record(weights_of(name)), on_meta(name).state_dict()
    ours = (
        coco_weights._freeze_norms(on_meta(name, 91, **r.config), 0.0)
        if r.frozen_eps is not None
        else on_meta(name, 91, **r.config)
    )
    want = {k: v.shape for k, v in ours.state_dict().items()}
    for sd in ref, old_keys(ref):
        assert {k: v.shape for k, v in fit_weights(sd, r).items() if k in want or 'num_batches' not in k} == want
    assert {k for k in old_keys(ref)} != set(ref) or name.endswith('_v2')


@pytest.mark.parametrize('name', RCNN)
def test_sizes_anchors_and_thresholds_are_torchvisions(name):
    ours, theirs = on_meta(name, 91, **_torchvision_record(weights_of(name)).config), on_meta(name)
    for get in (
        lambda m: m.transform.min_size,
        lambda m: m.transform.max_size,
        lambda m: m.transform.size_divisible,
        lambda m: m.transform.image_mean,
        lambda m: m.rpn._pre_nms_top_n,
        lambda m: m.rpn._post_nms_top_n,
        lambda m: m.rpn.score_thresh,
        lambda m: m.rpn.nms_thresh,
        lambda m: m.rpn.anchor_generator.sizes,
        lambda m: m.rpn.anchor_generator.aspect_ratios,
        lambda m: m.roi_heads.score_thresh,
        lambda m: m.roi_heads.detections_per_img,
        lambda m: m.roi_heads.box_roi_pool.output_size,
    ):
        assert get(ours) == get(theirs)


def mobile():
    return 'fasterrcnn_mobilenet_v3_large_fpn'


def test_from_a_server_with_heads_for_other_classes(publish, server):
    sd = random_weights(mobile())
    path = publish(mobile(), sd, lambda path: f'{server}/{path.name}')
    m = faster_rcnn.model(3, 'mobilenet_v3_large', pretrained='coco', img_size=96, **FEW)
    path.unlink()  # from now on there is the cache only
    assert m.num_classes == 3 and m.training and m.img_size == 96 and not m.transform.torchvision_rule
    now, new = m.state_dict(), head_keys(m)
    for k, v in fit_weights(sd, m.record).items():
        if k not in new:
            assert torch.equal(now[k], v), k
    norms = {k: [b.clone() for b in o.buffers()] for k, o in m.named_modules() if isinstance(o, FrozenBatchNorm2d)}
    assert norms and not any(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    losses = m(torch.rand(2, 3, 64, 96), [dict(boxes=torch.tensor([[8.0, 8, 60, 50]]), labels=torch.tensor([2])), NONE])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    for k, v in norms.items():
        assert all(torch.equal(a, b) for a, b in zip(m.get_submodule(k).buffers(), v))
    assert len(faster_rcnn.model(pretrained=weights_of(mobile())).param_groups()) == len(m.param_groups())


def test_norms_that_were_trained_are_frozen_by_freeze_to(publish):
    publish(mobile(), random_weights(mobile()))
    r = replace(_torchvision_record(weights_of(mobile())), frozen_eps=None)
    m = faster_rcnn.model(pretrained=r).freeze_to(-1).train()
    norms = [o for o in m.backbone.body.modules() if isinstance(o, nn.BatchNorm2d)]
    assert len(norms) == 46 and not any(o.training or o.weight.requires_grad for o in norms)
    m.freeze_to(0).train()
    assert all(o.weight.requires_grad and not o.training for o in norms)  # see `norm_eval`
    assert not any(p.requires_grad for p in m.freeze_to(-1).backbone.body.parameters())


def lean(kind=faster_rcnn, backbone='vovnet19_slim_dw', **kw):
    return kind.model(5, backbone, neck_channels=16, head_channels=16, **kw)


def test_a_file_that_is_not_the_one_meant(publish):
    publish(mobile(), dict(a=torch.zeros(1))).write_bytes(b'something else')
    r = _torchvision_record(weights_of(mobile()))
    with pytest.raises(RuntimeError, match=f'{r.sha256}') as e:
        coco_weights.load_detector(lean(), r)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('classes,says', [(5, 'missing'), (21, 'of another shape')])
def test_weights_of_another_net(publish, classes, says):
    net = lean()
    sd = net.state_dict()
    if classes == 5:
        del sd['rpn.head.cls_logits.bias']
    else:
        sd |= {k: v.new_zeros(21 * (len(v) // 5), *v.shape[1:]) for k, v in sd.items() if 'box_predictor' in k}
    publish(mobile(), sd)
    r = replace(_torchvision_record(weights_of(mobile())), frozen_eps=None, renames=(), drop=())
    with pytest.raises(RuntimeError, match=says) as e:
        coco_weights.load_detector(net, r)
    assert 'box_predictor' in str(e.value) or 'rpn.head.cls_logits.bias' in str(e.value)


V2 = get_model_weights('fasterrcnn_resnet50_fpn_v2').COCO_V1
BAD = {
    "pretrained=True together with the backbone 'vovnet39'": dict(backbone='vovnet39'),
    'an existing VoVNet': dict(backbone=lambda: create_backbone('vovnet19_slim')),
    "choose from 'FasterRCNN_ResNet50_FPN_Weights.COCO_V1' (resnet50)": dict(
        pretrained=V2, backbone='mobilenet_v3_large'
    ),
    "no weights 'voc': pass True, 'coco' or one of 'FasterRCNN": dict(pretrained='voc'),
    "no weights 'FCOS_ResNet50": dict(pretrained=weights_of('fcos_resnet50_fpn')),
    'pretrained_backbone, but': dict(pretrained_backbone=True),
    "neck='pan'": dict(neck='pan'),
    'neck_channels=64': dict(neck_channels=64),
    "head_norm='gn'": dict(pretrained=V2, head_norm='gn'),
    'num_classes=1,': dict(num_classes=1),
    'for fcos, expected one for faster_rcnn': dict(pretrained=_torchvision_record(weights_of('fcos_resnet50_fpn'))),
    "Did you mean 'box_detections_per_img'": dict(box_detection_per_img=3),
    "'anchor_scal'. Did you mean 'anchor_scale'": dict(anchor_scal=4),
}


@pytest.mark.parametrize('says', BAD)
def test_contradictions_are_one_sentence(says):
    kw = {k: v() if k == 'backbone' and callable(v) else v for k, v in (dict(pretrained=True) | BAD[says]).items()}
    with pytest.raises((TypeError, ValueError)) as e:
        faster_rcnn.model(**kw)
    assert says in str(e.value) and '\n' not in str(e.value) and not str(e.value).endswith('.')


def test_which_weights_are_meant():
    tag = lambda *a: pick_coco(*a).tag
    assert (
        tag('faster_rcnn')
        == tag('faster_rcnn', 'coco', 'resnet50')
        == tag('faster_rcnn', V2)
        == tag('faster_rcnn', str(V2))
        == str(V2)
    )
    assert tag('faster_rcnn', True, 'mobilenet_v3_large') == str(weights_of(mobile()))
    assert tag('mask_rcnn', 'MaskRCNN_ResNet50_FPN_Weights.COCO_V1') == 'MaskRCNN_ResNet50_FPN_Weights.COCO_V1'
    r = replace(pick_coco('fcos'), url='file:///mine.pth')
    assert pick_coco('fcos', r) is r and pick_coco('efficientdet', True, 'efficientdet_d0').name == 'efficientdet_d0'
    with pytest.raises(ValueError, match="no family 'fastrcnn'. Did you mean 'faster_rcnn'"):
        pick_coco('fastrcnn')
    with pytest.raises(ValueError, match="no family 'yolo'"):
        detector_records('yolo')


def test_families_register_and_can_be_cleared():
    assert set(coco_families) == {'faster_rcnn', 'mask_rcnn', 'retinanet', 'fcos', 'efficientdet'}
    mine = _CocoFamilies(coco_families)
    mine.clear()
    with pytest.raises(ValueError, match='import the module that registers it'):
        mine['efficientdet']
    assert coco_families['efficientdet'].records()


def imported_alone():
    "Imports what needs neither effdet nor a family of detectors; what they imported all the same."
    import backbones_nb

    backbones_nb.create_backbone('timm/resnet18')
    backbones_nb.create_backbone('vovnet19_slim')
    found = [o for o in sys.modules if o == 'effdet']
    import backbones_nb.detectors.coco_weights  # noqa: F401

    families = ('faster_rcnn', 'retinanet', 'fcos', 'efficientdet', 'assemble')
    return found + [o for o in families if f'backbones_nb.detectors.{o}' in sys.modules]


def in_a_new_process(f):
    code = f'import sys\n{inspect.getsource(f)}\nprint({f.__name__}())'
    return eval(run(sys.executable, '-c', code, check=True).stdout)


def in_a_fork_without(f):
    return in_a_fork(f, 'backbones_nb', 'effdet')


@pytest.mark.parametrize('where', [in_a_fork_without, pytest.param(in_a_new_process, marks=pytest.mark.slow)])
def test_a_backbone_loads_no_effdet_and_coco_weights_import_no_family(where):
    assert where(imported_alone) == []


# --- records


def test_records_say_what_torchvision_says():
    rows = {r.tag: r for r in detector_records() if r.publisher == 'torchvision'}
    assert len(rows) == len(_TORCHVISION_DETECTORS) == 9
    for name in _TORCHVISION_DETECTORS:
        w = weights_of(name)
        r = rows[str(w)]
        assert (r.url, r.num_params, r.recipe, r.metrics, r.license) == (
            w.url,
            w.meta['num_params'],
            w.meta['recipe'],
            w.meta['_metrics']['COCO-val2017'],
            None,
        )
        assert len(r.sha256) == 8 and f'-{r.sha256}.pth' in w.url


def test_records_say_what_effdet_says():
    rows = {r.name: r for r in detector_records('efficientdet')}
    assert list(rows) == [k for k, v in effdet_rows.items() if v.get('url')] and len(rows) >= 32
    assert all(
        r.url == effdet_rows[k]['url'] and len(r.sha256) == 8 and r.sha256 in r.url and r.license is None
        for k, r in rows.items()
    )
    assert rows['tf_efficientdet_d0'].metrics == dict(box_map=34.2) and rows['tf_efficientdet_d7x'].metrics == dict(
        box_map=54.3
    )


def test_the_table_lists_every_record():
    t = list_coco()
    assert [(r['name'], r['tag'], r['box']) for r in t] == [
        (r.name, r.tag, r.metrics.get('box_map')) for r in detector_records()
    ]
    assert 'none stated' in str(t) and '47.4     41.8         46.359' in str(t) and len(list_coco('mask_rcnn')) == 2


# --- heads for other classes

DETECTORS = dict(
    faster_rcnn=lambda: lean(),
    mask_rcnn=lambda: lean(mask_rcnn, mask_channels=16),
    efficientdet=lambda: efficientdet.model(
        'tf_efficientdet_lite0', 5, 64, 'vovnet19_slim_dw', fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1
    ),
    efficientdet_plain=lambda: efficientdet.model(
        'tf_efficientdet_lite0', 5, 64, 'vovnet19_slim_dw', fpn_channels=16, fpn_cell_repeats=1, separable_conv=False
    ),
)


@pytest.mark.parametrize('name', DETECTORS)
def test_replace_heads(name):
    m = DETECTORS[name]().double()
    for classes in 9, 2:
        check_new_heads(m, m.state_dict(), classes)
    assert {p.dtype for p in m.parameters()} == {torch.float64}
    m.float()
    t = dict(
        boxes=torch.tensor([[8.0, 8, 60, 50]]), labels=torch.tensor([1]), masks=torch.ones(1, 64, 64, dtype=torch.uint8)
    )
    losses, dets = m.losses_and_detections(torch.rand(1, 3, 64, 64), [t])
    assert all(v.isfinite() for v in losses.values()) and all((d['labels'] == 1).all() for d in dets)
    with pytest.raises(ValueError, match='num_classes=1,'):
        m.replace_heads(1)


def test_new_heads_start_as_the_libraries_draw_them():
    m = DETECTORS['efficientdet']().replace_heads(3)
    assert torch.allclose(m.class_net.predict.conv_pw.bias, torch.tensor(-4.5951), atol=1e-4)  # a score of 0.01
    same = lean()
    old = same.roi_heads.box_predictor
    new = same.replace_heads(5).roi_heads.box_predictor  # as many classes, drawn again all the same
    for k, v in new.state_dict().items():
        assert v.shape == old.state_dict()[k].shape and not torch.equal(v, old.state_dict()[k]), k
    assert abs(new.bbox_pred.weight.std() / old.bbox_pred.weight.std() - 1) < 0.1


# --- effdet


@pytest.mark.parametrize('name', ['tf_efficientdet_lite0', pytest.param('efficientdet_d0', marks=pytest.mark.slow)])
def test_detections_are_effdets_own(name, publish):
    sd = randomize_(effdet.create_model(name, pretrained_backbone=False)).state_dict()
    for k in sd:
        if k.startswith('box_net.predict'):
            sd[k] = sd[k] * 0.05  # boxes near their anchors
    publish(name, sd)
    theirs = effdet.create_model(name, bench_task='predict', pretrained=True, image_size=(128, 128)).eval()
    ours = efficientdet.model(name, img_size=128, pretrained='coco', normalize=False).eval()
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(x, dict(img_scale=torch.ones(1), img_size=torch.tensor([[128.0, 128]])))[0]
    got = out(ours, x)[0]
    want = want[(want[:, 5] > 0) & (want[:, 2] > want[:, 0]) & (want[:, 3] > want[:, 1])]
    assert len(want) > 20 and ours.num_classes == 91
    assert torch.equal(want, torch.cat([got['boxes'], got['scores'][:, None], got['labels'][:, None].float()], 1))
    check_new_heads(ours, ours.state_dict())


def test_a_record_of_ones_own_for_effdet(publish):
    sd = effdet.create_model('tf_efficientdet_lite0', pretrained_backbone=False).state_dict()
    path = publish('tf_efficientdet_lite0', sd)
    r = replace(pick_coco('efficientdet', True, 'tf_efficientdet_lite0'), url=path.as_uri(), tag='mine')
    assert efficientdet.model('tf_efficientdet_lite0', 3, 128, pretrained=r).pretrained == 'mine'
    with pytest.raises(ValueError, match='for tf_efficientdet_lite0, expected one for efficientdet_d0'):
        efficientdet.model('efficientdet_d0', 3, 128, pretrained=r)
