"""The peers of `transfer.py`: torchvision's detectors in its reference loop, effdet's bench, IceVision's learner.

Each is a function of the run and its data that trains and returns detections and ground truth. All of them
get the narrow necks and heads that our detectors get on a CPU, with the same numbers of samples and detections."""

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms import v2

from backbones_nb.core.create import create_backbone
from backbones_nb.data.batches import DetectionDataset
from backbones_nb.detectors.efficientdet import effdet_config, with_changes
from backbones_nb.icevision.learner import icevision_args, icevision_learner, icevision_model
from backbones_nb.learners.detection import NoValidation, detection_learner

trained_stages = 3  # of six: what torchvision trains of a MobileNet that comes with weights


def mobilenet_maps(file, channels, levels, extra):
    "torchvision's MobileNetV2 with its FPN on the maps where its stages begin, batch norm frozen, half of it trained."
    net = models.mobilenet_v2(norm_layer=FrozenBatchNorm2d)
    net.load_state_dict(torch.load(file, weights_only=True))
    body = net.features
    at = [0, *(i for i, b in enumerate(body) if getattr(b, '_is_cn', False)), len(body) - 1]
    for o in body[: at[len(at) - trained_stages]]:
        o.requires_grad_(False)
    taps = dict(zip((4, 8, 16, 32), (at[1], at[2], at[3], at[5])))
    names = {str(taps[s]): str(i) for i, s in enumerate(levels)}
    return BackboneWithFPN(body, names, [body[taps[s]].out_channels for s in levels], channels, extra)


class TimmMaps(nn.Module):
    "A timm model with torchvision's FPN, its batch norm frozen and its later half trained, as torchvision would."

    def __init__(self, body, channels, levels, extra):
        super().__init__()
        self.body, self.picked, self.out_channels = body, [(4, 8, 16, 32).index(s) for s in levels], channels
        own = [body.feature_info.channels()[i] for i in self.picked]
        self.fpn = FeaturePyramidNetwork(own, channels, extra)
        first = len(body.blocks) - 1 - trained_stages
        for o in (body.conv_stem, body.bn1, *list(body.blocks.children())[:first]):
            o.requires_grad_(False)
        self.norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in self.norms:
            m.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for m in self.norms:
            m.eval()
        return self

    def forward(self, x):
        maps = self.body(x)
        return self.fpn(OrderedDict((str(k), maps[i]) for k, i in enumerate(self.picked)))


def torchvision_model(run, data):
    "torchvision's detector, of its own anchors, on its own FPN."
    preset = dict(run.preset)
    channels, head = preset.pop('neck_channels'), preset.pop('head_channels', None)
    ratio = preset.pop('sampling_ratio', 2)
    two = run.family == 'faster_rcnn'
    extra = LastLevelMaxPool() if two else LastLevelP6P7(channels, channels)
    levels = (4, 8, 16, 32) if two else (8, 16, 32)
    stats = {}
    if run.backbone == 'mobilenet_v2':
        body = mobilenet_maps(data.files[run.backbone], channels, levels, extra)
    else:
        ours = create_backbone(run.backbone_name, data.files[run.backbone])
        body = TimmMaps(ours.body, channels, levels, extra)
        stats = dict(image_mean=list(ours.record.mean), image_std=list(ours.record.std))
    size = dict(min_size=run.size, max_size=run.size, **stats)
    n = len(data.class_map)
    if not two:
        kind = dict(retinanet=detection.RetinaNet, fcos=detection.FCOS)[run.family]
        if run.family == 'retinanet':  # the anchors of retinanet_resnet50_fpn
            sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
            ratios = ((0.5, 1.0, 2.0),) * len(sizes)
            preset['anchor_generator'] = detection.anchor_utils.AnchorGenerator(sizes, ratios)
        return kind(body, n, **preset, **size)
    pool = models.detection.faster_rcnn.MultiScaleRoIAlign(['0', '1', '2', '3'], 7, ratio)
    parts = dict(box_head=TwoMLPHead(channels * 49, head), box_predictor=FastRCNNPredictor(head, n), box_roi_pool=pool)
    return detection.FasterRCNN(body, **parts, **preset, **size)


class Pairs(DetectionDataset):
    "Images and targets as torchvision's references have them: crowds left out, flipped at random in training."

    def __init__(self, records, train):
        super().__init__(records)
        tfms = [v2.RandomHorizontalFlip(0.5)] if train else []
        self.tfm, self.train = v2.Compose([*tfms, v2.ToDtype(torch.float32, scale=True)]), train

    def __getitem__(self, i):
        image, target = self.tfm(*super().__getitem__(i))
        keep = target['iscrowd'] == 0 if self.train else slice(None)
        return image, {k: target[k][keep] for k in ('boxes', 'labels', 'iscrowd')}


def batches(dataset, run):
    "Shuffled batches without end of pass: as many steps as a run has, pass by pass."
    shuffled = torch.Generator().manual_seed(run.seed)
    dl = DataLoader(
        dataset, run.bs, shuffle=True, drop_last=True, generator=shuffled, collate_fn=lambda o: tuple(zip(*o))
    )
    for _ in range(run.epochs):
        yield from dl


def warm(step, steps, least):
    "Factor of the learning rate in a linear warmup."
    return least + (1 - least) * min(step / max(steps, 1), 1)


def train_torchvision(run, data):
    """The recipe of references/detection: SGD, momentum 0.9, weight decay 1e-4, a learning rate of 0.02 for 16 images
    (one-stage: 0.01) scaled to the batch, warmup in the first pass, divided by 10 after 16/26 and 22/26 of the run."""
    net = torchvision_model(run, data).train()
    lr = (0.02 if run.family == 'faster_rcnn' else 0.01) * run.bs / 16
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-4)
    total = run.steps(len(data.train))
    per = total // run.epochs

    def factor(i):
        drops = (i >= total * 16 / 26) + (i >= total * 22 / 26)
        return 0.1**drops * warm(i, min(1000, per - 1), 0.001)

    sched = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    for images, targets in batches(Pairs(data.train, True), run):
        loss = sum(net(images, targets).values())
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"torchvision's loss is {loss.item()}: the run has diverged")
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
    return net


@torch.no_grad()
def measure_torchvision(net, run, data):
    net.eval()
    pairs = Pairs(data.valid, False)
    found = [net([pairs[i][0]])[0] for i in range(len(pairs))]
    real = [d['labels'] > 0 for d in found]  # RetinaNet may find the background
    return [{k: v[o] for k, v in d.items()} for d, o in zip(found, real)], [r.target() for r in data.valid]


def effdet_model(run, data):
    from effdet import EfficientDet

    ours = create_backbone(run.backbone_name, data.files[run.backbone])
    name = dict(mobilenet_v2='mobilenetv2_100').get(run.backbone, 'tf_efficientnet_lite0')
    cfg = with_changes(
        effdet_config('tf_efficientdet_lite0', **run.preset),
        backbone_name=name,
        backbone_args={},
        image_size=(run.size, run.size),
        num_classes=len(data.class_map) - 1,
    )
    net = EfficientDet(cfg, pretrained_backbone=False)
    copy_by_order(ours, net.backbone)
    return net, ours.record


def copy_by_order(src, dst):
    "Copies tensors between two ways to write the same model; raises ValueError where they do not pair up."
    a, b = ([(k, v) for k, v in m.state_dict().items() if 'num_batches' not in k] for m in (src, dst))
    wrong = [(k, n) for (k, v), (n, w) in zip(a, b) if v.shape != w.shape]
    if wrong or len(a) < len(b):
        raise ValueError(f'{len(a)} tensors do not fit {len(b)}: the first that differ are {wrong[:1]}')
    with torch.no_grad():
        for (_, v), (_, w) in zip(a, b):
            w.copy_(v)


class Annotated:
    "PIL images and annotations as effdet's transforms take them: boxes yxyx, classes from 1."

    def __init__(self, records, tfm):
        self.records, self.tfm = records, tfm

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        r = self.records[i]
        keep = r.iscrowd == 0
        notes = dict(bbox=r.boxes[keep][:, [1, 0, 3, 2]].copy(), cls=r.labels[keep].astype(np.float32))
        image = r.image()
        notes['img_size'] = image.size
        return self.tfm(image, notes)


def train_effdet(run, data):
    """effdet's bench, transforms and configuration of training: SGD with momentum 0.9, weight decay 4e-5, a learning
    rate of 0.08 for 64 images scaled to the batch, a pass of warmup, a cosine, gradients clipped at 10. Its moving
    average of the weights, with a decay of 0.9998, is left out: it would still hold the initial weights."""
    from effdet import DetBenchTrain
    from effdet.config.train_config import default_detection_train_config
    from effdet.data.loader import DetectionFastCollate
    from effdet.data.transforms import transforms_coco_train

    net, record = effdet_model(run, data)
    bench = DetBenchTrain(net).train()
    mean, std = (torch.tensor(o).view(3, 1, 1) * 255 for o in (record.mean, record.std))
    tfm = transforms_coco_train(run.size, use_prefetcher=True, mean=record.mean, std=record.std)
    c = default_detection_train_config()
    lr = c.learning_rate * run.bs / 64
    opt = torch.optim.SGD(net.parameters(), lr, momentum=c.momentum, weight_decay=c.weight_decay)
    total = run.steps(len(data.train))
    per = total // run.epochs

    def factor(i):
        return warm(i, per, c.lr_warmup_init / c.learning_rate) * (1 + math.cos(math.pi * i / total)) / 2

    sched = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    collate = DetectionFastCollate()
    for images, notes in batches(Annotated(data.train, tfm), run):
        x, target = collate(list(zip(images, notes)))
        loss = bench((x - mean) / std, target)['loss']
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), c.clip_gradients_norm)
        opt.step()
        sched.step()
    return net, record


@torch.no_grad()
def measure_effdet(trained, run, data):
    from effdet import DetBenchPredict
    from effdet.data.transforms import transforms_coco_eval

    net, record = trained
    bench = DetBenchPredict(net).eval()
    bench.max_detection_points = min(bench.max_detection_points, len(bench.anchors.boxes) * bench.num_classes)
    mean, std = (torch.tensor(o).view(3, 1, 1) * 255 for o in (record.mean, record.std))
    tfm = transforms_coco_eval(run.size, use_prefetcher=True, mean=record.mean, std=record.std)
    found = []
    for image, notes in Annotated(data.valid, tfm):
        size = torch.tensor([notes['img_size']], dtype=torch.float32)
        info = dict(img_scale=torch.tensor([notes['img_scale']], dtype=torch.float32), img_size=size)
        d = bench((torch.from_numpy(image)[None] - mean) / std, info)[0]
        d = d[(d[:, 5] > 0) & (d[:, 4] > 0)]
        found.append(dict(boxes=d[:, :4], scores=d[:, 4], labels=d[:, 5].long()))
    return found, [r.target() for r in data.valid]


def train_icevision(run, data):
    "IceVision's model on our backbone and data, its learner, and fastai's `fine_tune` as its documentation calls it."
    known = icevision_args(run.family)
    args = {k: v for k, v in run.preset.items() if k in known}
    body = create_backbone(run.backbone_name, data.files[run.backbone])
    net = icevision_model(run.family, len(data.class_map), backbone=body, img_size=run.size, **args)
    dls = data.loaders(run)
    learn = icevision_learner(dls, net, metrics=[])
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(run.epochs - 1, 1e-3, cbs=NoValidation())
    return dls, net


def measure_icevision(trained, run, data):
    learn = detection_learner(*trained, parts=False)
    with learn.no_bar():
        return learn.get_preds()


train_and_measure = dict(
    torchvision=(train_torchvision, measure_torchvision),
    effdet=(train_effdet, measure_effdet),
    icevision=(train_icevision, measure_icevision),
)
