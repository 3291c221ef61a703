"""Random detections, and tidecv's numbers for them.

Writes the numbers that the tests compare with: pip install tidecv; python tests/support/tide.py"""

import json
from pathlib import Path

import numpy as np
import torch

stored = Path(__file__).parent / 'tide.json'


def random_case(seed, images=8, classes=3):
    "Objects and detections that hit, miss, and err in every way; some of equal score, some in crowds."
    rng = np.random.default_rng(seed)

    def boxes(n, lo=8, hi=60):
        xy, wh = rng.uniform(0, 100, (n, 2)), rng.uniform(lo, hi, (n, 2))
        return np.concatenate([xy, xy + wh], 1).round(1)

    preds, targets = [], []
    for i in range(images):
        n = int(rng.integers(0, 6))
        truth, labels = boxes(n), rng.integers(1, classes + 1, n)
        again = np.repeat(np.arange(n), rng.integers(0, 4, n))
        near = truth[again] + rng.normal(0, 6, (len(again), 4)) * rng.choice([0.1, 1, 2], (len(again), 1))
        near = np.concatenate([near[:, :2], np.maximum(near[:, 2:], near[:, :2] + 1)], 1)
        other = np.where(rng.random(len(again)) < 0.7, labels[again], rng.integers(1, classes + 2, len(again)))
        far = boxes(int(rng.integers(0, 4)))
        found = np.concatenate([near, far])
        preds.append(
            dict(
                boxes=torch.tensor(found).reshape(-1, 4),
                labels=torch.tensor(np.concatenate([other, rng.integers(1, classes + 2, len(far))]), dtype=torch.long),
                scores=torch.tensor(rng.random(len(found)).round(1 + seed % 3)),
            )
        )
        targets.append(
            dict(
                boxes=torch.tensor(truth).reshape(-1, 4),
                labels=torch.tensor(labels, dtype=torch.long),
                iscrowd=torch.tensor(rng.random(n) < 0.15),
            )
        )
    return preds, targets


def tidecv_numbers(preds, targets):
    "AP, counts and dAP of tidecv, in its own units of 0 to 100."
    from tidecv import Data, TIDE

    def xywh(b):
        return [*b[:2], *(b[2:] - b[:2])]

    gt, dt = Data('objects'), Data('detections')
    for i, (p, t) in enumerate(zip(preds, targets)):
        gt.add_image(i, str(i))
        for b, label, crowd in zip(t['boxes'].numpy(), t['labels'].tolist(), t['iscrowd'].tolist()):
            (gt.add_ignore_region if crowd else gt.add_ground_truth)(i, label, xywh(b))
        for b, label, score in zip(p['boxes'].numpy(), p['labels'].tolist(), p['scores'].tolist()):
            dt.add_detection(i, label, score, xywh(b))
    run = TIDE().evaluate(gt, dt, mode=TIDE.BOX)
    gains = run.fix_main_errors() | run.fix_special_errors()
    return dict(
        AP=run.ap,
        count={k.short_name: v for k, v in run.count_errors().items()},
        dAP={k.short_name: float(v) for k, v in gains.items()},
    )


if __name__ == '__main__':
    stored.write_text(json.dumps([tidecv_numbers(*random_case(i)) for i in range(12)], indent=1) + '\n')
