"What several test files need."

import copy
import gc
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import warnings
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.ops import masks_to_boxes

from backbones_nb.analysis.parity import rel_error
from backbones_nb.data.records import ClassMap, Record
from tools.proc import kill_group


def noise(h=64, w=None, n=1):
    return torch.randn(n, 3, h, w or h, generator=torch.Generator().manual_seed(1))


def out(m, x):
    with torch.no_grad():
        return m(x)


def maps_of(body, *size):
    return out(body.eval(), noise(*size))


def close(a, b, tol=0.0):
    "Maps of the same number, shapes and values; nan is never close."
    a, b = list(a), list(b)
    assert [o.shape for o in a] == [o.shape for o in b]
    errors = [rel_error(p, q) for p, q in zip(a, b)]
    assert errors and all(e <= tol for e in errors), errors


def through_file(m):
    f = io.BytesIO()
    torch.save(m, f)
    f.seek(0)
    return torch.load(f, weights_only=False)


copies = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)), file=through_file)


def leaves_of(tensor):
    "The ids of the parameters that it was computed from."
    todo, seen, res = [tensor.grad_fn], set(), set()
    while todo:
        f = todo.pop()
        if f is None or f in seen:
            continue
        seen.add(f)
        if hasattr(f, 'variable'):
            res.add(id(f.variable))
        todo += [n for n, _ in f.next_functions]
    return res


def buffers(m):
    return {k: v.clone() for k, v in m.named_buffers()}


def assert_same(a, b):
    "Lists of dicts of tensors, equal bit by bit."
    assert len(a) == len(b)
    for p, q in zip(a, b):
        assert p.keys() == q.keys()
        for k in p:
            assert torch.equal(p[k], q[k]), k


# --- what tests of detectors need

lean_rcnn = dict(
    neck_channels=32,
    head_channels=64,
    box_batch_size_per_image=32,
    rpn_pre_nms_top_n_train=100,
    rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=100,
    rpn_post_nms_top_n_test=30,
    box_detections_per_img=10,
    box_score_thresh=0.0,
)


def plain():
    "A model of somebody who knows nothing of this package: one map, stride 16."

    def block(ni, nf):
        return nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1), nn.BatchNorm2d(nf), nn.ReLU())

    return nn.Sequential(block(3, 8), block(8, 16), block(16, 24), block(24, 32))


# --- what tests of the learner need

cm = ClassMap(['red', 'blue'])


def draw_record(i, folder, masks=True):
    rng = np.random.RandomState(i)
    w, h = (int(o) for o in rng.randint(50, 100, 2))
    img, l, n = Image.new('RGB', (w, h), (90, 90, 90)), 1 + i % 2, int(i % 5 != 4)
    bw, bh = rng.randint(20, 40, 2)
    x, y = rng.randint(0, w - bw), rng.randint(0, h - bh)
    if n:
        ImageDraw.Draw(img).rectangle([x, y, x + bw - 1, y + bh - 1], fill=[(255, 0, 0), (0, 0, 255)][l - 1])
    img.save(folder / f'{i}.png')
    drawn = (np.asarray(img) != 90).any(-1)[None].astype(np.uint8)[:n]
    return Record(
        image_id=f'im{i}',
        path=folder / f'{i}.png',
        size=(h, w),
        boxes=torch.tensor([[x, y, x + bw, y + bh]] * n, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([l] * n, dtype=torch.int64),
        masks=drawn if masks else None,
        iscrowd=torch.zeros(n, dtype=torch.int64),
    )


def write_drawn(folder, masks=True, **splits):
    "Writes drawn images to `folder / 'data'` as a COCO data set; `splits`: the number of each. Returns their records."
    from backbones_nb.data.formats import write_data

    (folder / 'in').mkdir()
    records = (draw_record(i, folder / 'in', masks) for i in range(sum(splits.values())))
    parts = {k: list(islice(records, n)) for k, n in splits.items()}
    write_data(parts, cm, folder / 'data', 'coco')
    return parts


@contextmanager
def same_for_any_batch():
    "Without oneDNN, whose 3x3 convolutions of one image and of several differ in the last bits."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of TF32
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def as_found(learn, n, folder):
    "Images of random colors, whose ground truth is every second object that the model finds there, one by one."
    rng, res = np.random.RandomState(0), []
    for i in range(n):
        h, w = (int(o) for o in rng.randint(50, 100, 2))
        path = folder / f'colors{i}.png'
        Image.fromarray(rng.randint(0, 256, (5, 5, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC).save(path)
        det = learn.predict(path, score_thr=0)
        large = (det['boxes'][:, 2:] - det['boxes'][:, :2]).amin(1) > 4
        at = large.nonzero()[i % 2 :: 2, 0]
        masks = det['masks'].tensor().reshape(-1, h, w)[at].numpy() if 'masks' in det else np.zeros((len(at), h, w))
        res.append(Record(f'colors{i}', path, (h, w), det['boxes'][at], det['labels'][at], masks, class_map=cm))
    return res


def make_dls(records, path, **kw):
    from backbones_nb.data.batches import detection_dls

    return detection_dls(
        records[:16],
        records[16:],
        cm,
        **dict(size=64, bs=4, val_bs=3, seed=1, device='cpu', cache=True, path=path) | kw,
    )


def make_learner(records, path, net, **kw):
    from backbones_nb.learners.detection import detection_learner

    res = detection_learner(make_dls(records, path), net, **dict(lr=2e-3) | kw)
    res.remove_cb(res.progress)
    res.logger = lambda *a: None
    return res


class Colors(nn.Module):
    """A detector that needs no training: it finds the red and the blue pixels.
    Its loss counts objects and draws a random number."""

    target_keys, loss_names, num_classes = ('boxes', 'labels', 'masks'), ('loss_count', 'loss_chance'), 3

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm2d(3)

    def param_groups(self):
        return [list(self.parameters())]

    def find(self, x):
        masks = torch.stack([x[0] - x[2], x[2] - x[0]])
        labels = masks.flatten(1).gt(0.5).any(1).nonzero()[:, 0]
        return dict(
            boxes=masks_to_boxes(masks[labels] > 0.5) + torch.tensor([0.0, 0, 1, 1]),
            labels=labels + 1,
            scores=torch.full((len(labels),), 0.9),
            masks=masks[labels, None].clamp(0, 1),
        )

    def forward(self, images, targets=None, both=False):
        found = [self.find(o) for o in images]
        if not (self.training or both):
            return found
        self.norm(torch.stack([*images]))
        n = sum(len(t['labels']) for t in targets) / len(images)
        losses = dict(loss_count=self.weight * n, loss_chance=self.weight * torch.rand(()))
        return losses if self.training and not both else (losses, found)


def assert_runs_on_cuda(m, x, t, key):
    "Losses and detections on a GPU, in float32 and under autocast; `key` names a tensor of the detections."
    m, t = m.cuda(), [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in o.items()} for o in t]
    for amp in False, True:
        with torch.autocast('cuda', dtype=torch.bfloat16, enabled=amp):
            losses, dets = m(x.cuda(), t, both=True)
        assert (
            all(v.isfinite() for v in losses.values()) and dets[0][key].is_cuda and dets[0][key].dtype == torch.float32
        )


def train_and_kill(train, file, writes, torn=False, delay=0.0):
    """Calls `train` in a process of its own and kills it, with its loader workers: `delay` seconds after so many writes
    of the checkpoint `file`, or with `torn` in the middle of the second one. Returns the exit code."""

    def lead():
        os.setsid()
        real, calls = torch.save, []

        def deadly(state, f):
            calls.append(1)
            if len(calls) < 2:
                return real(state, f)
            f.write_bytes(b'half')
            os.killpg(0, signal.SIGKILL)

        if torn:
            torch.save = deadly
        train()

    def stamp():
        return file.stat().st_mtime_ns if file.exists() else 0

    last = stamp()
    p = multiprocessing.get_context('fork').Process(target=lead)
    p.start()
    until = time.monotonic() + 300
    try:
        while not torn and writes and p.is_alive():
            assert time.monotonic() < until
            now = stamp()
            writes, last = writes - (now != last), now
            time.sleep(0.005)
        if torn:
            p.join(300)  # it kills itself
        else:
            time.sleep(delay)
    finally:
        kill_group(p.pid)
    p.join(60)
    return p.exitcode


def in_two_processes(f, *args):
    "Calls `f` in two forks that the environment makes one training run, as torchrun does."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]

    def lead(rank):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
        os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        gc.freeze()  # no collection looks at the objects of the libraries
        f(rank, *args)
        torch.distributed.destroy_process_group()

    ps = [multiprocessing.get_context('fork').Process(target=lead, args=(i,)) for i in range(2)]
    for p in ps:
        p.start()
    until = time.monotonic() + 400
    while any(p.is_alive() for p in ps) and not any(p.exitcode for p in ps) and time.monotonic() < until:
        time.sleep(0.05)  # where one fails, the other waits for it
    codes = [p.exitcode for p in ps]
    for p in ps:
        p.kill()
    assert codes == [0, 0]


def in_a_fork(f, *forgotten):
    """What `f` returns in a fork of this process, where the modules of these packages are forgotten: there it sees
    what a new process would import, and the large libraries are loaded."""
    receive, send = multiprocessing.Pipe(False)

    def lead():
        for o in [o for o in sys.modules if o.partition('.')[0] in forgotten]:
            del sys.modules[o]
        gc.freeze()
        send.send(f())

    p = multiprocessing.get_context('fork').Process(target=lead)
    p.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise AssertionError('the process failed, see its output') from None
    finally:
        p.join(60)
