"""Measures what tiles do for small objects: the recall of one class, and AP by class, before and after.

    python benchmarks/tiles.py --data DIR [--small NAME] [--size 128] [--tiles 320] [--overlap 0.2] [--steps 510]
                               [--pretrained TAG] [--out runs/tiles] [--seed 0]

Trains one detector (RetinaNet on MobileNetV2) twice with an equal number of steps and an equal size of the network's
input: on whole images, and on tiles together with whole images. Both predict from whole images, from tiles, and from
both with several rules of merging.

`DIR` is a data set in VOC's layout with the lists train and test, such as BCCD. `--small` names the class whose recall
is shown (without it, the one with the smallest boxes). `--pretrained` loads weights of the backbone, as
`create_backbone` does; they stay as they are, unless they are `--unfrozen`. Where there are more tiles than the steps
can see, chance takes some. Weights of detectors that a run has left in `--out` are used again."""

import argparse
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fastai.torch_core import set_seed

from backbones_nb.core.create import create_backbone
from backbones_nb.core.tables import Table
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.tiles import tile_boxes, tile_records
from backbones_nb.data.transforms import open_image
from backbones_nb.data.voc import voc_split
from backbones_nb.detectors import retinanet
from backbones_nb.learners.detection import NoValidation, detection_learner
from backbones_nb.learners.metrics import coco_eval, confusion
from backbones_nb.learners.tiled import merge_detections, shift_detections

least = 0.05  # lowest score that is ranked


def smallest_class(records, class_map):
    "The name of the class whose boxes have the smallest median side."
    sides = {i: [] for i in range(1, len(class_map))}
    for r in records:
        for b, l in zip(r.boxes, r.labels):
            sides[int(l)].append(min(b[2:] - b[:2]))
    return class_map.get_name(min((i for i in sides if sides[i]), key=lambda i: np.median(sides[i])))


def only(dets, label):
    "The detections or targets of one class."
    return [{k: d[k][d['labels'] == label] for k in ('boxes', 'labels', 'scores') if k in d} for d in dets]


def recall(preds, targets, label, score_thr):
    "The share of a class's objects that a detection of the class meets with an IoU of 0.5."
    found = confusion(only(preds, label), only(targets, label), label + 1, score_thr=score_thr)[label]
    return float(found[label] / found.sum())


def trained(name, train, class_map, a):
    "A learner after about `--steps` batches; with the weights of an earlier run where there are some."
    set_seed(a.seed)
    backbone = create_backbone('mobilenet_v2', a.pretrained, strides=(8, 16, 32))
    model = retinanet.model(len(class_map), backbone, neck_channels=64, neck_norm='gn', head_norm='gn', anchor_scale=2)
    seen = a.steps * a.bs
    if len(train) > seen:
        train = random.Random(a.seed).sample(train, seen)
    dls = detection_dls(train, train[:1], class_map, size=a.size, bs=a.bs, seed=a.seed, path=a.out)
    learn = detection_learner(dls, model)
    file = a.out / f'{name}_{a.size}_{a.tiles}_{a.steps}x{a.bs}_{a.seed}.pth'
    if file.exists():
        learn.model.load_state_dict(torch.load(file, weights_only=True))
        return learn
    start, epochs = time.process_time(), max(1, round(seen / len(train)))
    if not a.unfrozen:
        learn.freeze()
    with learn.no_bar():
        learn.fit_one_cycle(epochs, slice(a.lr / 10, a.lr) if a.unfrozen else a.lr, cbs=NoValidation())
    a.out.mkdir(parents=True, exist_ok=True)
    torch.save(learn.model.state_dict(), file)
    minutes = (time.process_time() - start) / 60
    print(f'{name}: {len(train)} images, {epochs * len(dls.train)} steps, {minutes:.1f} CPU minutes', flush=True)
    return learn


# what is compared: name, use of the tiles, use of the whole image, arguments of `merge_detections`
rules = (
    ('whole image', False, True, dict(how='nms', metric='iou')),
    ('tiles', True, False, dict(how='nms', metric='iou')),
    ('tiles and whole image, NMS by IoU', True, True, dict(how='nms', metric='iou')),
    ('tiles and whole image, NMS by IoS', True, True, dict(how='nms', metric='ios')),
    ('tiles and whole image, merged by IoU', True, True, dict(how='nmm', metric='iou')),
    ('tiles and whole image, merged by IoS', True, True, dict(how='nmm', metric='ios')),
)


def found(learn, record, a):
    "What is found in each tile and in the whole image, the last, in the image's pixels, before merging."
    image = open_image(record)
    windows = [*tile_boxes(record.size, a.tiles, a.overlap).tolist(), [0, 0, *record.size[::-1]]]
    dets = learn.predict([image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in windows], score_thr=least)
    return [shift_detections(d, w, record.size) for d, w in zip(dets, windows)]


def merged(parts, tiles, whole, rule):
    "The detections of an image by one of the rules."
    parts = parts[:-1] * tiles + parts[-1:] * whole
    det = {k: torch.cat([o[k] for o in parts]) for k in ('boxes', 'labels', 'scores')}
    return merge_detections(det, **rule) if tiles else det


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--small')
    for k, v in dict(size=128, tiles=320, overlap=0.2, steps=510, bs=4, lr=2e-3, seed=0).items():
        p.add_argument(f'--{k}', type=type(v), default=v)
    p.add_argument('--pretrained', default=False)
    p.add_argument('--unfrozen', action='store_true')
    p.add_argument('--out', type=Path, default=Path('runs/tiles'))
    a = p.parse_args(argv)
    train, class_map, report = voc_split(a.data, 'train')
    test, _, more = voc_split(a.data, 'test', class_map)
    small = a.small or smallest_class(train, class_map)
    targets = [r.target() for r in test]
    print(f'{len(train)} images to learn from, {len(test)} to measure on; {report.add(more)}', flush=True)
    tiled = tile_records(train, a.tiles, a.overlap, whole=True)
    rows = []
    label = class_map.get_id(small)
    for name, records in (('whole images', train), ('tiles and whole images', tiled)):
        learn = trained(name.split()[0], records, class_map, a)
        with learn.no_bar():
            parts = [found(learn, r, a) for r in test]
        for rule, *how in rules:
            preds = [merged(o, *how) for o in parts]
            res = coco_eval(preds, targets, class_map, per_class=True)
            row = dict(train=name, test=rule, AP=res['AP'], AP50=res['AP50'], **res['per_class'])
            rows.append(row | {f'recall at {t}': recall(preds, targets, label, t) for t in (least, 0.3, 0.5)})
    heads = dict(train=('learned from', ''), test=('predicted from', ''), AP=('AP', '.3f'), AP50=('AP50', '.3f'))
    heads |= {k: (f'AP {k}', '.3f') for k in list(class_map)[1:]}
    heads |= {k: (f'{small} {k}', '.3f') for k in rows[0] if k.startswith('recall')}
    versions = ', '.join(f'{k} {version(k)}' for k in ('torch', 'torchvision', 'fastai'))
    note = (
        f'{a.size} px, tiles of {a.tiles} px, seed {a.seed}, {a.steps} steps of {a.bs} images, weights {a.pretrained}'
    )
    print(Table(rows, heads, note=f'{note}; {platform.machine()}, {torch.get_num_threads()} thread, {versions}'))


if __name__ == '__main__':
    main()
