"Images that show their objects, so that boxes and masks can be checked against the pixels."

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from backbones_nb.data.records import ClassMap, Record

cm = ClassMap(['rect', 'oval'])
gray, colors = (90, 90, 90), [(255, 0, 0), (0, 0, 255)]


def draw(i, folder, masks=True, rng=None, n=None):
    "A record whose image shows its objects: red rectangles and blue ellipses on gray, never overlapping."
    rng = rng or np.random.RandomState(i)
    h, w = (int(o) for o in rng.randint(50, 130, 2))
    img = Image.new('RGB', (w, h), gray)
    d, B, L, M = ImageDraw.Draw(img), [], [], []
    for k in range((0 if i % 5 == 4 else 1 + i % 2) if n is None else n):
        x0, x1 = (0, w // 2) if k == 0 else (w // 2, w)
        bw, bh = rng.randint((x1 - x0) // 2, x1 - x0), rng.randint(h // 3, h)
        x, y, l = x0 + rng.randint(0, x1 - x0 - bw), rng.randint(0, h - bh), 1 + (i + k) % 2
        before = np.asarray(img).copy()
        (d.rectangle if l == 1 else d.ellipse)([x, y, x + bw - 1, y + bh - 1], fill=colors[l - 1])
        B.append([x, y, x + bw, y + bh])
        L.append(l)
        M.append((np.asarray(img) != before).any(-1).astype(np.uint8))
    path = folder / f'{i}.png'
    img.save(path)
    m = np.stack(M) if M else np.zeros((0, h, w), np.uint8)
    return Record(
        image_id=f'im{i}',
        path=path,
        size=(h, w),
        boxes=torch.tensor(B, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(L, dtype=torch.int64),
        masks=m if masks else None,
        iscrowd=torch.zeros(len(L), dtype=torch.int64),
    )


def seen(img, label):
    "Pixels of the drawn color, whatever the color jitter did."
    r, _, b = img.as_subclass(Tensor)
    return (r - b if label == 1 else b - r) > 0.3


def extent(m):
    y, x = m.nonzero(as_tuple=True)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
