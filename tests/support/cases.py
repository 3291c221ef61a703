"Detectors small enough to train one step, data for them, and names of models, for several test files."

from functools import partial

import torch
from torch import nn

from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.detectors import efficientdet, faster_rcnn, fcos, mask_rcnn, retinanet

nine = (
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnext50_32x4d',
    'resnext101_32x8d',
    'wide_resnet50_2',
    'wide_resnet101_2',
)
icevision = dict(
    resnet=('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext101_32x8d'),
    mobilenet=('mobilenet',),
    vgg=('vgg11', 'vgg13', 'vgg16', 'vgg19'),
)

CLASSES, SIZE = 3, (96, 128)
RCNN = dict(
    neck_channels=16,
    head_channels=32,
    anchor_scale=4,
    sampling_ratio=1,
    rpn_pre_nms_top_n_train=60,
    rpn_post_nms_top_n_train=30,
    rpn_pre_nms_top_n_test=60,
    rpn_post_nms_top_n_test=20,
    box_batch_size_per_image=16,
    box_detections_per_img=8,
    box_score_thresh=0.0,
)
DENSE = dict(neck_channels=16, detections_per_img=8, topk_candidates=20, score_thresh=0.0)
LITE = dict(img_size=SIZE, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1, max_det_per_image=8)
DETECTORS = dict(  # (num_classes, backbone, neck, ...) -> detector that returns up to eight boxes an image
    faster_rcnn=partial(faster_rcnn.model, **RCNN),
    mask_rcnn=partial(mask_rcnn.model, mask_channels=8, **RCNN),
    retinanet=partial(retinanet.model, **DENSE),
    fcos=partial(fcos.model, **DENSE),
    efficientdet=partial(efficientdet.model, 'tf_efficientdet_lite0', **LITE),
)


class Tiny(Backbone):
    "Three convolutions with batch norm."

    def __init__(self, strides=(4, 8)):
        super().__init__()
        self.stem, self.a, self.b = (ConvNormAct(i, o, 3, 2) for i, o in ((3, 8), (8, 16), (16, 32)))
        self.set_trunk(
            dict(stem=['stem'], stage1=['a'], stage2=['b']), [feature_row(16, 4, 'a'), feature_row(32, 8, 'b')], strides
        )


def at_once(m):
    "After one step its statistics are those of that batch, so random weights give detections that are none too wild."
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d):
            o.momentum = None
    return m


def data(*sizes):
    "Images of these sizes; the first has two objects, the others none."
    g, boxes = torch.Generator().manual_seed(0), torch.tensor([[8.0, 8, 60, 70], [40, 20, 90, 60]])
    masks = torch.zeros(2, *sizes[0], dtype=torch.uint8)
    for m, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        m[y0:y1, x0:x1] = 1
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return [torch.rand(3, *s, generator=g) for s in sizes], [
        dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)
    ] + [none] * (len(sizes) - 1)


X, T = data(SIZE, (71, 93))


def step(m, x, t):
    "Losses of one training step, after its backward pass."
    m.zero_grad(set_to_none=True)
    losses = m.train()(x, t)
    sum(losses.values()).backward()
    assert set(losses) == set(m.loss_names) and all(o.isfinite() and o >= 0 for o in losses.values())
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    return losses


def check_detections(m, x, dets):
    assert len(dets) == len(x)
    for d, (h, w) in zip(dets, [o.shape[-2:] for o in x]):
        n, b = len(d['boxes']), d['boxes']
        assert (
            set(d) == {'boxes', 'labels', 'scores'} | ({'masks'} if 'loss_mask' in m.loss_names else set())
            and 0 < n <= 8
        )
        assert b.shape == (n, 4) and d['labels'].shape == d['scores'].shape == (n,)
        assert b.dtype == d['scores'].dtype == torch.float32 and d['labels'].dtype == torch.int64
        assert (b >= 0).all() and (b <= torch.tensor([w, h, w, h]) + 1e-4).all() and (b[:, 2:] >= b[:, :2]).all()
        assert d['labels'].min() >= 1 and d['labels'].max() < CLASSES
        assert (d['scores'] >= 0).all() and (d['scores'] <= 1).all() and (d['scores'].diff() <= 0).all()
        if 'masks' in d:
            assert d['masks'].shape == (n, 1, h, w) and d['masks'].min() >= 0 and d['masks'].max() <= 1
