import copy
import pickle

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from drawn import cm, draw, extent, seen

from backbones_nb.data.batches import detection_dls, DetectionDataLoaders
from backbones_nb.data.transforms import (
    as_tv,
    default_augment,
    fit_size,
    Letterbox,
    open_image,
    pad_fill,
    RandomZoom,
    ToBatch,
    unletterbox,
    unletterbox_masks,
)
from backbones_nb.data.records import Record


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    d = tmp_path_factory.mktemp('drawn')
    return [draw(i, d) for i in range(20)]


def make(records, n=16, **kw):
    return detection_dls(records[:n], records[n:], cm, **dict(size=64, bs=4, seed=1, device='cpu') | kw)


def check_drawn(img, t, tol=1.6, boxes=True):
    "Boxes and masks lie on the drawn pixels; an image side holds at most one object of a color."
    for j, (b, l) in enumerate(zip(t['boxes'], t['labels'])):
        px = seen(img, l)
        assert px.any()
        if boxes:
            assert (extent(px) - b).abs().max() < tol, (extent(px), b)
        if 'masks' in t:
            m = t['masks'][j].bool()
            assert ((m & px).sum() / (m | px).sum()) > 0.6


def one_color(r):
    return len(set(r.labels.tolist())) == len(r.labels)


def test_batch_is_what_detectors_take(records):
    x, y = make(records).one_batch()
    assert (
        type(x) is TensorImage
        and x.shape == (4, 3, 64, 64)
        and x.dtype == torch.float32
        and 0 <= x.min()
        and x.max() <= 1
    )
    assert isinstance(y, tuple) and len(y) == 4
    for t in y:
        n = len(t['labels'])
        assert all(type(v) in (Tensor, str) for v in t.values())
        assert t['boxes'].shape == (n, 4) and t['boxes'].dtype == torch.float32 and t['labels'].dtype == torch.int64
        assert (
            t['masks'].shape == (n, 64, 64)
            and t['masks'].dtype == torch.uint8
            and t['area'].shape == t['iscrowd'].shape == (n,)
        )
        assert n == 0 or (
            t['boxes'].min() >= 0 and t['boxes'].max() <= 64 and (t['boxes'][:, 2:] - t['boxes'][:, :2]).min() >= 1
        )


@pytest.mark.parametrize('size', [64, (48, 80)])
def test_augmented_boxes_and_masks_lie_on_the_drawn_pixels(records, size):
    rs = [r for r in records if one_color(r)]
    dls, n, moved = make(rs, len(rs) - 2, size=size, bs=2), 0, set()
    for _ in range(12):
        for x, ys in dls.train:
            for img, t in zip(x, ys):
                check_drawn(img, t)
                n += len(t['labels'])
                moved |= {(t['image_id'], *t['boxes'].round().flatten().tolist())}
    assert n > 80 and len(moved) > n * 0.5


@pytest.mark.parametrize(
    'tfm',
    [
        v2.RandomHorizontalFlip(1.0),
        v2.RandomVerticalFlip(1.0),
        v2.RandomZoomOut(p=1.0),
        v2.RandomAffine(0, (0.1, 0.1)),
        v2.ScaleJitter((80, 80), (0.6, 1.2)),
        v2.ColorJitter(0.2, 0.2),
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomIoUCrop()]),
    ],
    ids=lambda o: type(o).__name__,
)
def test_transforms_of_torchvision(records, tfm):
    rs = [
        r for r in records if len(r.labels) == 1 and r.labels[0] == 1
    ]  # rectangles: a cropped one still fills its box
    dls = make(rs, len(rs), augment=tfm, bs=1)
    for _ in range(5):
        for x, (t,) in dls.train:
            check_drawn(x[0], t, tol=2.1)


@pytest.mark.parametrize('seed', range(30))
def test_zoom_keeps_boxes_on_objects_and_drops_hidden_ones(records, seed):
    torch.manual_seed(seed)
    r = records[seed % 20]
    if not one_color(r):
        return
    img = open_image(r)
    x, t = RandomZoom((0.4, 3.0), p=1.0, min_visible=0.5)(img, as_tv(r.target(), img.shape[-2:]))
    x, t = ToBatch(96)(x, t)
    check_drawn(x, t, tol=2.5)
    scale = (t['boxes'][:, 2:] - t['boxes'][:, :2]).prod(1) if len(t['boxes']) else torch.zeros(0)
    assert len(t['labels']) <= len(r.labels) and (scale >= 1).all()


def test_an_image_flipped_alone_is_caught(records):
    "The check above can fail: with the image mirrored and the boxes left, it does."
    r = next(r for r in records if len(r.labels) == 1 and abs(r.boxes[0, 0] + r.boxes[0, 2] - r.size[1]) > 12)
    img = open_image(r)
    x, t = ToBatch(64)(tv_tensors.Image(img.flip(-1)), as_tv(r.target(), img.shape[-2:]))
    with pytest.raises(AssertionError):
        check_drawn(x, t)


@pytest.mark.parametrize(
    'size,box,want',
    [
        ((100, 50), (64, 64), (64, 32)),
        ((50, 100), (64, 64), (32, 64)),
        ((30, 30), (64, 64), (64, 64)),
        ((375, 500), (128, 128), (96, 128)),
        ((100, 100), (40, 80), (40, 40)),
        ((1, 1000), (64, 64), (1, 64)),
    ],
)
def test_letterbox(size, box, want):
    assert fit_size(size, box) == want
    img = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    out = Letterbox(box)(img)
    assert out.shape[-2:] == box and (out[:, : want[0], : want[1]] == 0).all()
    if want != box:
        assert out[:, -1, -1].tolist() == list(pad_fill)


def test_unletterbox_undoes_it(records):
    for r in records[:10]:
        x, t = ToBatch((96, 64))(open_image(r), as_tv(r.target(), r.size))
        back = unletterbox(t | dict(masks=t['masks'][:, None].float()), r.size, (96, 64))
        torch.testing.assert_close(back['boxes'], torch.tensor(r.boxes), atol=0.02, rtol=1e-3)
        assert back['masks'].shape == (len(r.labels), 1, *r.size)
        if len(r.labels):
            a, b = back['masks'][:, 0] > 0.5, r.target()['masks'].bool()
            assert ((a & b).sum() / (a | b).sum()) > 0.85


@pytest.mark.parametrize(
    'size,box', [((60, 90), (64, 64)), ((90, 60), (64, 64)), ((32, 32), (64, 48)), ((200, 64), (64, 64))]
)
def test_masks_fill_the_original_and_nothing_of_the_padding_is_left(size, box):
    nh, nw = fit_size(size, box)
    m = torch.zeros(2, 1, *box)
    m[0, :, :nh, :nw], m[1] = 1, 1 - m[1]
    m[1, :, :nh, :nw] = 0  # the padding alone
    back = unletterbox_masks(m, size, box)
    assert back.shape == (2, 1, *size) and (back[0] > 0.99).all() and back[1].max() == 0
    assert unletterbox_masks(m[:0], size, box).shape == (0, 1, *size)


def test_every_row_follows_its_box():
    img = tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8))
    masks = torch.zeros(4, 40, 40, dtype=torch.uint8)
    for i in range(4):
        masks[i, i] = i + 1
    t = dict(
        boxes=[[0, 0, 10, 10], [20, 20, 20.2, 30], [0, 5, 30, 15], [50, 50, 60, 60]],
        labels=torch.tensor([1, 2, 3, 4]),
        masks=masks,
        image_id=7,
        iscrowd=torch.tensor([0, 1, 1, 0]),
        area=torch.tensor([50.0, 1, 300, 1]),
        attr=torch.tensor([[0.1], [0.2], [0.3], [0.4]]),
        note='x',
    )
    _, o = ToBatch(80)(img, as_tv(t, (40, 40)), smallest=1)
    assert (
        o['labels'].tolist() == [1, 3]
        and o['iscrowd'].tolist() == [0, 1]
        and o['attr'][:, 0].tolist() == pytest.approx([0.1, 0.3])
    )
    assert o['area'].tolist() == pytest.approx([200, 1200]) and 'filled' not in o  # twice the size, four times the area
    assert [int(m.max()) for m in o['masks']] == [1, 3] and o['image_id'] == 7 and o['note'] == 'x'


def test_no_boxes_anywhere(tmp_path):
    dls = make([draw(i, tmp_path, n=0) for i in range(8)], 4)
    for x, ys in list(dls.train) + list(dls.valid):
        assert all(
            t['boxes'].shape == (0, 4) and t['masks'].shape == (0, 64, 64) and t['labels'].dtype == torch.int64
            for t in ys
        )


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u)
        and all(
            torch.equal(s['boxes'], t['boxes'])
            and s['image_id'] == t['image_id']
            and torch.equal(s['masks'], t['masks'])
            for s, t in zip(y, v)
        )
        for (x, y), (u, v) in zip(a, b)
    )


def epochs(records, n=2, **kw):
    dls = make(records, **kw)
    return [b for _ in range(n) for b in dls.train]


@pytest.mark.parametrize('cache', [False, True])
def test_seed_fixes_batches_with_any_number_of_workers(records, cache):
    a = epochs(records, cache=cache)
    assert same(a, epochs(records, cache=cache, num_workers=2)) and same(a, epochs(records, cache=not cache))
    assert not same(a, epochs(records, seed=2)) and not same(a[:4], a[4:])
    assert len({t['image_id'] for _, y in a[:4] for t in y}) == 16


def test_seed_leaves_the_global_generator_alone(records):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    create = make(records).train.create_item
    for i in range(4):
        create(i)
    assert torch.equal(torch.rand(3), want)


def test_without_seed_batches_differ(records):
    assert not same(epochs(records, seed=None), epochs(records, seed=None))


def test_validation_is_in_order_and_not_augmented(records):
    dls = make(records)
    a, b = list(dls.valid), list(dls.valid)
    assert same(a, b) and [t['image_id'] for _, y in a for t in y] == [r.image_id for r in records[16:]]


def test_cache_reads_each_image_once(records, monkeypatch):
    reads, real = [], Record.target
    monkeypatch.setattr(Record, 'target', lambda self: reads.append(self.image_id) or real(self))
    dls = make(records, cache=True)
    for _ in range(3):
        list(dls.train)
    assert sorted(reads) == sorted(r.image_id for r in records[:16])
    boxes = dls.train_ds[0][1]['boxes'].clone()
    dls.train_ds[0][1]['boxes'] = None
    assert torch.equal(dls.train_ds[0][1]['boxes'], boxes)


def test_properties(records):
    dls = make(records)
    assert (
        isinstance(dls, DetectionDataLoaders)
        and dls.n_inp == 1
        and dls.c == 3
        and dls.class_map is cm
        and len(dls.train_ds) == 16
    )
    img, t = dls.train_ds[0]
    assert (
        isinstance(img, tv_tensors.Image)
        and isinstance(t['boxes'], tv_tensors.BoundingBoxes)
        and isinstance(t['masks'], tv_tensors.Mask)
    )
    assert (
        len(make(records, n=2).train) == 1
        and len(make(records, bs=5).train) == 3
        and len(make(records, bs=5, drop_last=False).train) == 4
    )
    assert len(make(records[:16]).valid) == 0 and make(records, val_bs=2).valid.bs == 2


def test_device_moves_images_and_targets(records):
    x, y = make(records).to(torch.device('meta')).one_batch()
    assert x.device.type == 'meta' and {v.device.type for t in y for v in t.values() if isinstance(v, Tensor)} == {
        'meta'
    }


@pytest.mark.cuda
def test_cuda(records):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    x, y = make(records).cuda().one_batch()
    assert x.is_cuda and all(t['boxes'].is_cuda for t in y)


def test_empty_loaders_pickle_and_take_new_images(records):
    dls = pickle.loads(pickle.dumps(make(records, cache=True).new_empty()))
    assert len(dls.train) == 0 and dls.c == 3 and list(dls.class_map) == list(cm) and len(pickle.dumps(dls)) < 20_000
    r = records[0]
    a = np.asarray(r.image().convert('RGB'))
    items = [
        r,
        r.path,
        str(r.path),
        r.image(),
        a,
        a / 255,
        torch.tensor(a).permute(2, 0, 1),
        torch.tensor(a).permute(2, 0, 1) / 255,
    ]
    dl = dls.test_dl(items)
    xs = torch.cat([b[0] for b in dl])
    assert len(xs) == 8 and all(len(b) == 1 for b in dl) and (xs - xs[0]).abs().max() < 1e-6
    assert torch.equal(xs[0], make(records[:1] * 17).valid.one_batch()[0][0])


def test_test_dl_with_labels(records):
    x, y = make(records).test_dl(records[:3], with_labels=True).one_batch()
    assert [t['image_id'] for t in y] == ['im0', 'im1', 'im2'] and len(x) == 3


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', '1', 'LA', 'CMYK'])
def test_modes_of_images(mode):
    img = Image.new('RGB', (20, 10), (200, 30, 30)).convert(mode)
    assert open_image(img).shape == (3, 10, 20) and open_image(np.asarray(Image.new('L', (20, 10)))).shape == (
        3,
        10,
        20,
    )


@pytest.mark.parametrize(
    'bad,words',
    [
        (np.zeros((2, 3, 4, 5)), 'expected one image'),
        (torch.zeros(2, 3, 4, 4), 'expected one image'),
        (np.full((4, 4, 3), 200.0), r'floats in \[0,1\]'),
        (np.full((4, 4, 3), -1.0), 'normalization'),
    ],
)
def test_what_is_no_image(bad, words):
    with pytest.raises(ValueError, match=words):
        open_image(bad)


def test_errors(records, tmp_path):
    r = copy.copy(records[0])
    r.labels = r.labels + 5
    with pytest.raises(ValueError, match="im0.*label"):
        detection_dls([r], [], cm)
    for size in (0, (1, 2, 3), (-1, 4)):
        with pytest.raises(ValueError, match='size'):
            make(records, size=size)


def test_default_augment_takes_boxes_with_it(records):
    "Mirrored half of the time, and the mean box moves with the pixels."
    r = next(r for r in records if len(r.labels) == 1)
    img = open_image(r)
    tfm, left = default_augment(64, scale=(1, 1), color=0.0), 0
    for s in range(20):
        torch.manual_seed(s)
        x, t = tfm(img, as_tv(r.target(), r.size))
        x, t = ToBatch(64)(x, t)
        check_drawn(x, t)
        left += int(box_iou(t['boxes'], ToBatch(64)(img, as_tv(r.target(), r.size))[1]['boxes'])[0, 0] > 0.9)
    assert 2 < left < 18


def test_learners_exported_earlier_find_their_transforms():
    "Pickles hold names: these were in `batches` before they had a module of their own."
    from backbones_nb.data import batches, transforms

    for old, new in (
        ('ToBatch', 'ToBatch'),
        ('Letterbox', 'Letterbox'),
        ('RandomZoom', 'RandomZoom'),
        ('_rows', 'box_rows'),
    ):
        assert getattr(batches, old) is getattr(transforms, new)
