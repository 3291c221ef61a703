"""Trains every detector on Oxford-IIIT Pets under one budget and prints their results side by side.

    python benchmarks/pets.py [DETECTOR ...] [--data pets|PATH] [--breeds BREED ...] [--out runs/pets] [--epochs 60]
                              [--seed 0] [--jobs 1]

All start from random weights, with one backbone, one schedule and the same number of images; each is a run of
`backbones-nb finetune` in a folder of its own. A run that is finished with the same settings is not repeated.
`--breeds` takes a part of the data set by the names of breeds, with the official lists cut to them.
`--jobs` runs that many at once and gives each its share of the cores."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbones_nb.learners.finetune import finetune
from backbones_nb.learners.run import cpu_preset, detectors
from backbones_nb.core.tables import Table
from backbones_nb.data.pets import breed_of, untar_pets

backbone = dict(
    backbone='vovnet19_slim', backbone_args=dict(stem=[32, 32, 64], mids=[32, 40, 48, 56], outs=[64, 128, 192, 256])
)
common = dict(size=160, bs=8, lr=1e-3, classes='species', boxes='body', validate=False, cache=True) | backbone
rcnn = (
    dict(strides=[8, 16]),
    dict(
        neck_norm='gn',
        anchor_scale=4,
        box_batch_size_per_image=32,
        rpn_post_nms_top_n_train=60,
        rpn_pre_nms_top_n_train=200,
    ),
    dict(loss_classifier=3),
)
one_stage = dict(strides=[8, 16, 32]), dict(), {}
rows = dict(
    faster_rcnn=rcnn, mask_rcnn=rcnn, efficientdet=one_stage, retinanet=one_stage, fcos=one_stage
)  # of the backbone, of the detector, of the losses


def cut(data, breeds, dest):
    "A folder with the lists of some breeds, and links to all files; `data` itself where no breeds are given."
    path = untar_pets() if data == 'pets' else Path(data).resolve()
    if not breeds:
        return path
    (dest / 'annotations').mkdir(parents=True, exist_ok=True)
    for o in ('images', 'annotations/trimaps', 'annotations/xmls'):
        (dest / o).unlink(missing_ok=True)
        (dest / o).symlink_to(path / o)
    for o in ('list', 'trainval', 'test'):
        lines = (path / 'annotations' / f'{o}.txt').read_text().splitlines()
        kept = [l for l in lines if breed_of(l.split()[0]) in breeds]
        if not kept:
            raise ValueError(
                f"there is none of {', '.join(breeds)} in {path}: "
                'give names as they are in list.txt, such as american_bulldog'
            )
        (dest / 'annotations' / f'{o}.txt').write_text('\n'.join(kept) + '\n')
    return dest


def settings(detector, **kwargs):
    "The arguments of `finetune`."
    body, args, weights = rows[detector]
    res = (
        common | dict(detector=detector, model_args=cpu_preset[detector] | args, loss_weights=weights or None) | kwargs
    )
    return res | dict(backbone_args=common['backbone_args'] | body)


def finished(out, config):
    "The results in a folder, where they are of just these settings."
    try:
        res = json.loads((out / 'metrics.json').read_text())
    except (FileNotFoundError, ValueError):
        return None
    return res if {k: res['config'].get(k) for k in config} == json.loads(json.dumps(config)) else None


def run(out, config, threads):
    "Runs in a process of its own, which leaves a log."
    if res := finished(out, config):
        return res
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'log.txt', 'w') as log:
        done = subprocess.run(
            [sys.executable, __file__, '--one', str(out), json.dumps(config)],
            stdout=log,
            stderr=log,
            env=os.environ | dict(OMP_NUM_THREADS=str(threads), MPLBACKEND='Agg'),
        )
    if done.returncode:
        raise RuntimeError(f"{config['detector']} ended with an error: read {out / 'log.txt'}")
    return finished(out, config)


def row(name, numbers):
    return dict(name=name) | {k: numbers[k] for k in ('AP', 'AP50', 'AP75')}


def table(results):
    "A row for each detector, by boxes and where there are some by masks, and the mean-box detector's."
    shown = []
    for k, r in results.items():
        cost = dict(params=r['parameters'] / 1e6, steps=r['steps'], cpu=r['train_cpu_seconds'] / 60)
        shown.append(row(k, r['metrics']) | cost)
        if 'mask_metrics' in r:
            shown.append(row(f'{k}: masks', r['mask_metrics']))
    shown.append(row('mean box, most frequent class', r['mean_box']))
    heads = dict(
        name=('detector', ''),
        AP=('AP', '.3f'),
        AP50=('AP50', '.3f'),
        AP75=('AP75', '.3f'),
        params=('parameters, M', '.2f'),
        steps=('steps', 'd'),
        cpu=('CPU minutes', '.1f'),
    )
    machine = ', '.join(f'{k} {v}' for k, v in r['machine'].items())
    return Table(
        shown, heads, note=f"{r['train_images']} images to train on, {r['valid_images']} to validate on; {machine}"
    )


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('detectors', nargs='*', metavar='DETECTOR', help=f"of {', '.join(detectors)}; all without")
    p.add_argument('--data', default='pets')
    p.add_argument('--breeds', nargs='+', metavar='BREED')
    p.add_argument('--out', type=Path, default=Path('runs/pets'))
    p.add_argument('--epochs', type=int, default=60)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--jobs', type=int, default=1)
    p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.one:
        return finetune(out=a.one[0], force=True, **json.loads(a.one[1]))
    names = a.detectors or detectors
    if odd := set(names) - set(detectors):
        p.error(f"there is no detector {', '.join(sorted(odd))}: choose of {', '.join(detectors)}")
    a.out = a.out.resolve()
    data = cut(a.data, a.breeds, a.out / 'data')
    configs = {k: settings(k, data=str(data), epochs=a.epochs, seed=a.seed) for k in names}
    with ThreadPoolExecutor(a.jobs) as pool:
        done = pool.map(lambda k: run(a.out / k, configs[k], max(1, os.cpu_count() // a.jobs)), names)
        print(table(dict(zip(names, done))))


if __name__ == '__main__':
    main()
