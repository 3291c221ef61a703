"""Times the training loaders of ours against fastai's and torchvision's reference, passes alternating in one run.

    python benchmarks/loaders.py [--data DIR] [--images 512] [--size 176] [--bs 32] [--workers 1] [--repeats 5]
                                 [--seed 0] [--clock wall|cpu] [--target 0.95]

All read the same JPEGs: drawings of the extent and the bytes that ImageNet's photographs have, or as many of DIR,
drawn by lot. All do the same to an image: decode, random crop scaled to a square, random flip, float tensor,
normalize; then once more with TrivialAugment and random erasing. Loader by loader that is
 - ours: `folder_dls` and `shard_dls`; plain, the division by 255 and the normalization run on the batch, in the main
   process; with the augmentation of the recipe they run on the image, in the worker;
 - fastai: `ImageDataLoaders.from_folder` with its own RandomResizedCrop and flip; floats and normalization on the
   batch;
 - torchvision: `ImageFolder`, torch's DataLoader and the list of transforms of its reference training (the preset of
   references/classification), all of them on the image, in the worker.

A pass is timed from the call of `iter` to the end of its last batch, the start of the workers included, as every epoch
of a training run begins with it; nothing is copied to a device. The first pass of a loader is not counted: it fills the
page cache. Which loader begins changes from round to round. Prints the medians of images a second and of the ratio to
torchvision's pass of the same round; exits with 1 where a ratio of ours is below the target.
`--clock cpu` counts processor time of the main process and of the workers together, which other processes on a busy
machine disturb less; it says what the work costs, not how fast it is."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import fastai
import numpy as np
import PIL
import torch
import torchvision
from fastai.torch_core import set_seed
from fastai.vision.augment import FlipItem, RandomResizedCrop
from fastai.vision.data import ImageDataLoaders, Normalize
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from backbones_nb.core.features import IMAGENET_MEAN, IMAGENET_STD
from backbones_nb.imagenet.batches import folder_dls
from backbones_nb.imagenet.shard_batches import shard_dls
from backbones_nb.imagenet.folders import imagenet_folders, scan_classes
from backbones_nb.imagenet.toy import _draw_synset, toy_synsets
from backbones_nb.imagenet.shards import write_shards
from backbones_nb.imagenet.recipe import recipe, recipe_tfms


def draw(folder, n, seed):
    "Drawings of about 184,000 pixels (as 500x375 has) and 100 kB; ImageNet's training images have 110 kB on average."
    synsets = sorted(toy_synsets)
    for i in range(n):
        s = synsets[i % len(synsets)]
        (folder / s).mkdir(parents=True, exist_ok=True)
        _draw_synset(s, np.random.default_rng([seed, i]), 390).save(folder / s / f'{s}_{i}.JPEG', quality=97)


def sample(data, folder, n, seed):
    "Copies of `n` training images."
    src = imagenet_folders(data)[0]
    files = [os.fsdecode(o) for o in scan_classes(src)[1]]
    if len(files) < n:
        sys.exit(f'{src} holds {len(files)} images, expected {n} or more: give a smaller --images')
    for i in np.random.default_rng(seed).permutation(len(files))[:n]:
        dest = folder / files[i]
        dest.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(src / files[i], dest)


def prepare(root, data, n, seed):
    "Images in folders and in shards; validation, which nobody times, is the same images."
    if data:
        sample(data, root / 'folders' / 'train', n, seed)
    else:
        draw(root / 'folders' / 'train', n, seed)
    write_shards(root / 'folders' / 'train', root / 'shards' / 'train', progress=False)
    for o in ('folders', 'shards'):
        (root / o / 'val').symlink_to('train')
    sizes = [o.stat().st_size for o in (root / 'folders' / 'train').glob('*/*')]
    return sum(sizes) / len(sizes) / 1e3


def preset(size, augment):
    tfms = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()] + [
        T.TrivialAugmentWide(interpolation=T.InterpolationMode.BILINEAR)
    ] * augment
    tfms += [T.PILToTensor(), T.ConvertImageDtype(torch.float), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return T.Compose(tfms + [T.RandomErasing(0.1)] * augment)


def torchvision_dl(root, a, augment):
    ds = ImageFolder(root / 'folders' / 'train', preset(a.size, augment))
    return DataLoader(ds, a.bs, shuffle=True, drop_last=True, num_workers=a.workers)


def our_dl(dls, root, a, augment):
    kw = dict(tfms=recipe_tfms(recipe('torchvision', train_size=a.size)), normalized=True) if augment else {}
    return dls(root, a.size, a.bs, seed=a.seed, num_workers=a.workers, device='cpu', **kw).train


def folders_dl(root, a, augment):
    return our_dl(folder_dls, root / 'folders', a, augment)


def shards_dl(root, a, augment):
    return our_dl(shard_dls, root / 'shards', a, augment)


def fastai_dl(root, a, augment):
    flip = FlipItem()
    flip.order = RandomResizedCrop.order  # as the others: not before the crop, where there is more to flip
    return ImageDataLoaders.from_folder(
        root / 'folders',
        valid='val',
        item_tfms=[RandomResizedCrop(a.size), flip],
        batch_tfms=Normalize.from_stats(IMAGENET_MEAN, IMAGENET_STD, cuda=False),
        bs=a.bs,
        num_workers=a.workers,
        device='cpu',
    ).train


plain = dict(torchvision=torchvision_dl, fastai=fastai_dl, folder_dls=folders_dl, shard_dls=shards_dl)
blocks = dict(plain=plain, recipe={k: v for k, v in plain.items() if k != 'fastai'})  # fastai has no TrivialAugment


def cpu_clock():
    return sum(os.times()[:4])  # of this process and of its children that have ended


def timed(dl, a, clock):
    "Seconds of a pass; refuses one that gave something else than `a` asks for."
    t, n = clock(), 0
    for x, y in dl:
        if x.shape != (a.bs, 3, a.size, a.size) or x.dtype != torch.float or y.shape != (a.bs,):
            sys.exit(f'got a batch of {tuple(x.shape)}, {x.dtype}')
        n += len(x)
    t = max(clock() - t, 1e-3)  # the clock of processor time has steps of some milliseconds
    if n != a.images // a.bs * a.bs:
        sys.exit(f'got {n} of {a.images} images in batches of {a.bs}')
    return t


def compare(loaders, a, clock, timed=timed):
    "Seconds of each loader, a list with one number for each round; `timed(loader, a, clock)` times a pass."
    names, times = list(loaders), {k: [] for k in loaders}
    for r in range(a.repeats + 1):  # the first round warms up
        i = r % len(names)
        for k in names[i:] + names[:i]:
            times[k].append(timed(loaders[k], a, clock))
    return {k: v[1:] for k, v in times.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data')
    for k, v in dict(images=512, size=176, bs=32, workers=1, repeats=5, seed=0).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    p.add_argument('--target', type=float, default=0.95)
    a, slow = p.parse_args(), []
    if not 0 < a.bs <= a.images:
        p.error(f'got --images {a.images} and --bs {a.bs}, expected at least one batch')
    if a.workers < 0:
        p.error(f'got --workers {a.workers}, expected 0 or more')
    if a.repeats < 1:
        p.error(f'got --repeats {a.repeats}, expected 1 or more')
    torch.set_num_threads(1)
    set_seed(a.seed)
    with TemporaryDirectory() as root:
        kb = prepare(Path(root), a.data, a.images, a.seed)
        print(
            f'torch {torch.__version__}, torchvision {torchvision.__version__}, fastai {fastai.__version__}, '
            f'Pillow {PIL.__version__}, {a.workers} workers, batch {a.bs}, {a.size} px, seed {a.seed}\n'
            f'{a.images} JPEGs of {kb:.0f} kB on average, {a.clock} time, medians of {a.repeats} alternating passes'
        )
        for block, makers in blocks.items():
            times = compare(
                {k: f(Path(root), a, block == 'recipe') for k, f in makers.items()},
                a,
                perf_counter if a.clock == 'wall' else cpu_clock,
            )
            for k, v in times.items():
                speed, ratio = (
                    median(a.images // a.bs * a.bs / t for t in v),
                    median(q / t for q, t in zip(times['torchvision'], v)),
                )
                if k.endswith('_dls') and ratio < a.target:
                    slow.append((block, k))
                print(f"{block:7} {k:12} {speed:8.1f} images/s   {ratio:.3f} of torchvision's", flush=True)
    if slow:
        sys.exit(f"below the target of {a.target}: " + ', '.join(map(' '.join, slow)))


if __name__ == '__main__':
    main()
