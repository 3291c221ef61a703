"""Times the training loader of detection against albumentations and torchvision v2, passes alternating in one process.

    python benchmarks/detection_loaders.py --pets DIR [--images 240] [--size 256] [--bs 16] [--repeats 7] [--seed 0]
                                           [--clock cpu|wall] [--target 1.0]

All read the same images of Oxford-IIIT Pets (those that are JPEGs) with the same boxes, one thread, no workers. All do
the same work for an image: decode, mirror in half of the cases, zoom between 0.7 and 1.4 and shift, letterbox to a
square with padding, vary brightness, contrast and saturation by up to a quarter, move and clip the boxes, drop those
that are gone, and give floats in [0,1] in a batch:
 - ours: `detection_dls` as it is;
 - albumentations: OpenCV's decoder, LongestMaxSize, Affine, PadIfNeeded, ColorJitter, ToFloat, ToTensorV2, and torch's
   DataLoader. Its resizing does not average (bilinear, its default), so it does less than the others;
 - albumentations, area: the same with INTER_AREA, which averages as antialiasing does;
 - torchvision: its decoder, ScaleJitter, RandomCrop with padding, ColorJitter, SanitizeBoundingBoxes, a DataLoader.

The first pass of a loader is not counted. Prints the medians of images a second and of the ratio of ours to each in the
same round; exits with 1 where a median ratio is below the target. `--clock cpu` (the default) counts processor time,
which other processes on a busy machine disturb less."""

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import albumentations as A
import cv2
import torch
import torchvision
from albumentations.pytorch import ToTensorV2
from loaders import compare
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import decode_image, ImageReadMode
from torchvision.transforms import v2

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.pets import pets_splits
from backbones_nb.data.transforms import pad_fill


def read(pets, n):
    "The first JPEGs, whatever their names say."
    train, valid, cm, _ = pets_splits(pets)
    records = [r for r in [*train, *valid] if Path(r.path).read_bytes()[:2] == b'\xff\xd8']
    if len(records) < n:
        sys.exit(f'{pets} holds {len(records)} JPEGs with boxes, expected {n} or more: give a smaller --images')
    return records[:n], cm


class Albu(Dataset):
    def __init__(self, records, size, interpolation):
        self.records = records
        factor = 0.75, 1.25
        self.tfm = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.LongestMaxSize(size, interpolation=interpolation),
                A.Affine(scale=(0.7, 1.4), translate_percent=(-0.2, 0.2), p=0.8, fill=pad_fill),
                A.PadIfNeeded(size, size, position='top_left', fill=pad_fill),
                A.ColorJitter(factor, factor, factor, (0, 0), p=1),
                A.ToFloat(255),
                ToTensorV2(),
            ],
            bbox_params=A.BboxParams('pascal_voc', label_fields=['labels'], min_visibility=0.3),
        )

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        r = self.records[i]
        image = cv2.cvtColor(cv2.imread(str(r.path)), cv2.COLOR_BGR2RGB)
        o = self.tfm(image=image, bboxes=r.boxes, labels=r.labels)
        boxes = torch.as_tensor(o['bboxes'], dtype=torch.float32).reshape(-1, 4)
        return o['image'], dict(boxes=boxes, labels=torch.as_tensor(o['labels'], dtype=torch.int64))


class Torchvision(Dataset):
    def __init__(self, records, size):
        self.records = records
        self.tfm = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.ScaleJitter((size, size), (0.7, 1.4)),
                v2.RandomCrop((size, size), pad_if_needed=True, fill={tv_tensors.Image: pad_fill, 'others': 0}),
                v2.ColorJitter(0.25, 0.25, 0.25),
                v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        r = self.records[i]
        boxes = tv_tensors.BoundingBoxes(r.boxes, format='XYXY', canvas_size=r.size)
        image = tv_tensors.Image(decode_image(str(r.path), ImageReadMode.RGB))
        return self.tfm(image, dict(boxes=boxes, labels=torch.from_numpy(r.labels)))


def collate(b):
    return torch.stack([o[0] for o in b]), tuple(o[1] for o in b)


def loaders(a):
    records, cm = read(a.pets, a.images)
    kw = dict(batch_size=a.bs, shuffle=True, drop_last=True, collate_fn=collate)
    return {
        'ours': detection_dls(records, [], cm, a.size, a.bs, seed=a.seed, device='cpu').train,
        'albumentations': DataLoader(Albu(records, a.size, cv2.INTER_LINEAR), **kw),
        'albumentations, area': DataLoader(Albu(records, a.size, cv2.INTER_AREA), **kw),
        'torchvision': DataLoader(Torchvision(records, a.size), **kw),
    }


def timed(dl, a, clock):
    "Seconds of a pass; refuses one that gave something else than `a` asks for."
    t, n = clock(), 0
    for x, y in dl:
        if x.shape != (a.bs, 3, a.size, a.size) or x.dtype != torch.float or not len(x) == len(y):
            sys.exit(f'got a batch of {tuple(x.shape)}, {x.dtype}, with {len(y)} targets')
        n += len(x)
    if n != a.images // a.bs * a.bs:
        sys.exit(f'got {n} of {a.images} images in batches of {a.bs}')
    return clock() - t


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pets', required=True, metavar='DIR')
    for k, v in dict(images=240, size=256, bs=16, repeats=7, seed=0).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--clock', choices=('cpu', 'wall'), default='cpu')
    p.add_argument('--target', type=float, default=1.0)
    a = p.parse_args(argv)
    if not 0 < a.bs <= a.images:
        p.error(f'got --images {a.images} and --bs {a.bs}, expected at least one batch')
    if a.repeats < 1:
        p.error(f'got --repeats {a.repeats}, expected 1 or more')
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(a.seed)
    times = compare(loaders(a), a, process_time if a.clock == 'cpu' else perf_counter, timed)
    print(
        f'torch {torch.__version__}, torchvision {torchvision.__version__}, albumentations {A.__version__}, '
        f'OpenCV {cv2.__version__}\n{a.images} images at {a.size} px, batch {a.bs}, {a.clock} time, '
        f'medians of {a.repeats} alternating passes'
    )
    slow = []
    for k, v in times.items():
        speed = median(a.images // a.bs * a.bs / t for t in v)
        ratio = median(t / o for o, t in zip(times['ours'], v))
        print(f'{k:22} {speed:7.1f} images/s   ours is {ratio:.2f} of it')
        if ratio < a.target:
            slow.append(k)
    if slow:
        sys.exit(f"below the target of {a.target}: {', '.join(slow)}")


if __name__ == '__main__':
    main()
