"""Measures what each augmentation is worth: one detector, one change at a time, on two data sets.

    python benchmarks/ablation.py --pets DIR --bccd DIR --weights DIR [--out benchmarks/results/ablation.csv]
                                  [--seeds 0 1] [--arms NAME ...] [--data pets bccd] [--epochs 6] [--show]

The data, the weights, and where to get them are those of benchmarks/transfer.py. The detector is FCOS on
EfficientNet-Lite0 with the narrow heads of `--cpu-preset`: EfficientDet has one input size, so that multi-scale
training would change nothing. All runs of a data set take the same number of steps and differ in the augmentation:

    none        letterbox alone
    default     zoom from 0.7 to 1.4, mirror, colors: `default_augment`; the baseline
    no_filter   the default, with every remnant of an object left in the targets
    jitter      the default with large-scale jitter in place of its zoom
    mosaic      a mosaic in half of the images before the default
    closing     the same, the last fifth of the epochs without
    copy_paste  objects of another image in half of the images before the default; needs masks, which BCCD lacks
    multiscale  the default, each batch at 0.75 to 1.25 times the size
    all         closing, copy_paste where there are masks, jitter, and multiscale

Each run appends one row to the table; rows that are there are not repeated. `--show` prints the table and runs nothing.
"""

import argparse
import csv
import sys
import time
import warnings
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from fastai.torch_core import set_seed
from transfer import Data, Folders, Run, append_row as append, read_data, spread, train_ours, versions, weights

from backbones_nb.core.tables import Table
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.copy_paste import CopyPaste
from backbones_nb.data.jitter import large_scale_jitter
from backbones_nb.data.mosaic import ClosingEpochs, Mosaic
from backbones_nb.data.multiscale import MultiScale
from backbones_nb.data.pets import breed_of, pets_splits
from backbones_nb.data.pixels import ColorJitter, Mirror
from backbones_nb.data.transforms import RandomZoom, default_augment
from backbones_nb.learners.metrics import coco_eval

arms = 'default', 'none', 'mosaic', 'jitter', 'multiscale', 'copy_paste', 'closing', 'no_filter', 'all'
columns = (
    'data',
    'arm',
    'seed',
    'epochs',
    'size',
    'steps',
    'AP',
    'AP50',
    'AP75',
    'per_class',
    'seconds',
    'day',
    'versions',
)
needs_masks = ('copy_paste',)
append_row = partial(append, columns=columns)


def transforms(arm, size, masks):
    "item_tfms, batch_tfms and callbacks of an arm."
    default, end = default_augment(size), [Mirror(), ColorJitter()]
    wide = [large_scale_jitter(size), *end]
    return dict(
        none=(None, None, []),
        default=(default, None, []),
        no_filter=([RandomZoom(size=size, min_visible=0.0), *end], None, []),
        jitter=(wide, None, []),
        mosaic=([Mosaic(size), default], None, []),
        closing=([Mosaic(size), default], None, [ClosingEpochs(0.2)]),
        copy_paste=([CopyPaste(), default], None, []),
        multiscale=(default, MultiScale(), []),
        all=([Mosaic(size), *[CopyPaste()] * masks, *wide], MultiScale(), [ClosingEpochs(0.2)]),
    )[arm]


@dataclass(frozen=True)
class Mixed(Data):
    "Loaders with the transforms of an arm."

    arm: tuple = ()

    def loaders(self, run, augment=True):
        items, batches, _ = self.arm
        return detection_dls(
            self.train, self.valid, self.class_map, run.size, run.bs, seed=run.seed, device='cpu',
            item_tfms=items, batch_tfms=batches,
        )  # fmt: skip


def read(name, folders):
    "As `read_data`, with the masks of pets."
    if name != 'pets':
        return read_data(name, folders)
    train, valid, cm, _ = pets_splits(folders.pets, masks=True)
    return *([r for r in o if breed_of(r.image_id) in folders.breeds] for o in (train, valid)), cm


def score(run, arm, folders):
    "The row of a run."
    train, valid, cm = read(run.data, folders)
    masks = train[0].masks is not None
    arm_tfms = transforms(arm, run.size, masks)
    files = {k: Path(folders.weights) / f for k, f in weights.items()}
    data = Mixed(train, [replace(r, masks=None) for r in spread(valid, run.images)], cm, files, arm_tfms)
    set_seed(run.seed)
    clock = time.process_time()
    learn = train_ours(run, data, cbs=arm_tfms[2])
    took = time.process_time() - clock
    with learn.no_bar():
        res = coco_eval(*learn.get_preds(), cm, per_class=True)
    row = dict(data=run.data, arm=arm, seed=run.seed, epochs=run.epochs, size=run.size, steps=run.steps(len(train)))
    row |= {k: round(res[k], 4) for k in ('AP', 'AP50', 'AP75')}
    row['per_class'] = ' '.join(f'{k} {v:.3f}' for k, v in res['per_class'].items())
    return row | dict(seconds=round(took, 1), day=date.today().isoformat(), versions=versions())


def read_rows(path):
    if not path.exists():
        return []
    with open(path, newline='') as f:
        return [
            r
            | {k: int(r[k]) for k in ('seed', 'epochs', 'size', 'steps')}
            | {k: float(r[k]) for k in ('AP', 'AP50', 'AP75', 'seconds')}
            for r in csv.DictReader(f)
        ]


def summary(rows):
    "A row for each arm: means over its seeds, and the mean difference to the default of the same seeds."
    base = {(r['data'], r['seed'], r['epochs']): r['AP'] for r in rows if r['arm'] == 'default'}
    res = []
    for data in sorted({r['data'] for r in rows}):
        for arm in arms:
            rs = [r for r in rows if (r['data'], r['arm']) == (data, arm)]
            if not rs:
                continue
            diffs = [r['AP'] - base[k] for r in rs if (k := (r['data'], r['seed'], r['epochs'])) in base]
            one = {k: mean(r[k] for r in rs) for k in ('AP', 'AP50', 'AP75', 'seconds')}
            one |= dict(
                gain=mean(diffs) if diffs else None, least=min(diffs, default=None), most=max(diffs, default=None)
            )
            res.append(dict(data=data, arm=arm, seeds=len(rs), steps=rs[0]['steps']) | one)
    return res


def results_table(rows):
    signed = lambda o: '' if o is None else f'{o:+.3f}'
    heads = dict(data=('data', ''), arm=('augmentation', ''), steps=('steps', 'd'), seeds=('seeds', 'd'))
    heads |= {k: (k, '.3f') for k in ('AP', 'AP50', 'AP75')}
    heads |= dict(gain=('to default', signed), least=('least', signed), most=('most', signed), seconds=('CPU s', '.0f'))
    return Table(summary(rows), heads)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for o in ('pets', 'bccd', 'weights'):
        p.add_argument(f'--{o}', metavar='DIR')
    p.add_argument('--breeds', nargs='+', default=list(Folders.breeds), metavar='BREED')
    p.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'ablation.csv')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    p.add_argument('--arms', nargs='+', default=list(arms), choices=arms, metavar='NAME')
    p.add_argument('--data', nargs='+', default=['pets', 'bccd'], choices=('pets', 'bccd'))
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--show', action='store_true', help='print the table, run nothing')
    a = p.parse_args(argv)
    if not a.show and (lacking := [o for o in [*a.data, 'weights'] if not getattr(a, o)]):
        p.error(f"--{' and --'.join(lacking)} not given: say where they lie (see --help)")
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    folders = Folders(a.pets, a.bccd, a.weights, tuple(a.breeds))
    jobs = [(s, d, m) for s in a.seeds for d in a.data for m in a.arms if not (d == 'bccd' and m in needs_masks)]
    for seed, data, arm in [] if a.show else jobs:
        run = Run(data, 'fcos', seed=seed, epochs=a.epochs, bs=8)
        have = {(r['data'], r['arm'], r['seed'], r['epochs'], r['size']) for r in read_rows(a.out)}
        if (data, arm, seed, run.epochs, run.size) in have:
            continue
        row = score(run, arm, folders)
        append_row(a.out, row)
        print(f"{data} {arm} seed {seed}: AP {row['AP']:.3f} in {row['seconds']:.0f} s", flush=True)
    rows = [r for r in read_rows(a.out) if r['epochs'] == a.epochs]
    print(results_table(rows))


if __name__ == '__main__':
    sys.exit(main())
