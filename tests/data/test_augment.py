import pickle

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from drawn import cm, draw, extent, seen
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.copy_paste import CopyPaste
from backbones_nb.data import images
from backbones_nb.data.images import load_image, load_pixels
from backbones_nb.data.jitter import large_scale_jitter, VisibilityFilter
from backbones_nb.data.mosaic import join_targets, Mosaic
from backbones_nb.data.multiscale import MultiScale
from backbones_nb.data.pipelines import Albumentations, as_augment
from backbones_nb.data.pixels import ColorJitter, Mirror, Part
from backbones_nb.data.transforms import as_tv, default_augment, Letterbox, open_image, RandomZoom, ToBatch


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    d = tmp_path_factory.mktemp('drawn')
    return [draw(i, d) for i in range(16)]


def item(r):
    return open_image(r), as_tv(r.target(), r.size)


def others(records):
    return lambda: item(records[int(torch.randint(len(records), ()))])


def drawn_items(records, tfm, n, size=96, **kw):
    "What `tfm` makes of one-object records, in the form of a batch."
    torch.manual_seed(0)
    rs = [r for r in records if len(r.labels) == 1]
    for i in range(n):
        yield ToBatch(size)(*tfm(*item(rs[i % len(rs)]), **kw), smallest=1)


def check_masks(x, t, least=0.6):
    "Each mask lies on pixels of its object's color."
    for m, l in zip(t['masks'].bool(), t['labels']):
        assert (seen(x, l) & m).sum() >= least * m.sum()


@pytest.mark.parametrize('scale', [(0.1, 0.4), (0.5, 2.0), (3.0, 3.0)])
def test_boxes_follow_the_pixels_at_any_scale(records, scale):
    n = 0
    for x, t in drawn_items(records, large_scale_jitter(96, scale), 24):
        for b, l in zip(t['boxes'], t['labels']):
            if (b[2:] - b[:2]).min() < 6:
                continue
            assert (extent(seen(x, l)) - b).abs().max() < 1.7
            n += 1
    assert n > 3


def test_a_zoom_with_a_size_is_a_zoom_and_a_letterbox(records):
    for i, r in enumerate(records):
        (img, t), zoom = item(r), RandomZoom((0.5, 2.0), p=0.7)
        torch.manual_seed(i)
        a, u = Letterbox(64)(*zoom(img, t))
        zoom.size = (64, 64)
        torch.manual_seed(i)
        b, w = zoom(img, t)
        assert a.shape == b.shape == (3, 64, 64)
        torch.testing.assert_close(u['boxes'].as_subclass(Tensor), w['boxes'].as_subclass(Tensor), atol=2, rtol=0)
        torch.testing.assert_close(a.float().mean(), b.float().mean(), atol=8, rtol=0)


def test_zooms_pickled_before_they_had_a_size_still_work(records):
    zoom = RandomZoom((2.0, 2.0), p=1.0)
    del zoom.__dict__['size']
    img, t = item(records[0])
    assert pickle.loads(pickle.dumps(zoom))(img, t)[0].shape[-1] < img.shape[-1] * 0.6


def test_colors_are_those_of_torchvision():
    img = tv_tensors.Image(torch.rand(3, 20, 30))
    ours, theirs = ColorJitter(0.4), v2.ColorJitter(0.4, 0.4, 0.4)
    for seed in range(10):
        torch.manual_seed(seed)
        a, t = ours(img, dict(a=1))
        torch.manual_seed(seed)
        torch.testing.assert_close(a, theirs(img), atol=1e-5, rtol=0)
        assert t == dict(a=1)
    assert torch.equal(ColorJitter(0.0)(img)[0], img)


def test_a_mirror_is_torchvisions_flip(records):
    for r in records[:4]:
        img, t = item(r)
        (a, u), (b, w) = Mirror(1.0)(img, t), v2.RandomHorizontalFlip(1.0)(img, t)
        assert torch.equal(a, b) and torch.equal(u['boxes'], w['boxes']) and torch.equal(u['masks'], w['masks'])


def test_a_part_of_a_float_image_lies_on_a_float_canvas():
    x = Part((0, 0, 2, 2), (1, 1, 3, 3), (4, 4)).image(torch.ones(3, 2, 2), (255, 0, 51))
    assert x[:, 0, 0].tolist() == pytest.approx([1, 0, 0.2]) and x[:, 1, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize('kind', ['plain', 'gray', 'cmyk', 'turned', 'progressive', 'png', 'cut', 'no decoder'])
def test_pixels_are_those_of_the_image(tmp_path, kind, monkeypatch):
    if kind == 'no decoder':
        monkeypatch.setattr(images, 'decode_jpeg', lambda o: torch.ops.image.missing(o))
    rng = np.random.RandomState(0)
    im = Image.fromarray(rng.randint(0, 255, (12, 17, 3), dtype=np.uint8)).resize((170, 120))
    f, kw = tmp_path / 'a.jpg', {}
    if kind == 'turned':
        kw['exif'] = Image.Exif()
        kw['exif'][274] = 6
    im = im.convert(dict(gray='L', cmyk='CMYK').get(kind, 'RGB'))
    im.save(f, 'PNG' if kind == 'png' else 'JPEG', progressive=kind == 'progressive', **kw)
    if kind == 'cut':
        f.write_bytes(f.read_bytes()[:2000])
        with pytest.raises(ValueError, match='cannot be read as an image'):
            load_pixels(f)
    want = np.asarray(load_image(f, truncated=True)).astype(int)
    got = load_pixels(f, truncated=True)
    assert got.shape == want.shape and got.dtype == np.uint8 and abs(got - want).max() <= 1


def test_a_filter_drops_what_a_crop_leaves_too_little_of(records):
    img = tv_tensors.Image(torch.zeros(3, 50, 100, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[10, 0, 30, 40], [45, 0, 75, 40], [80, 0, 90, 40]], format='XYXY',
                                     canvas_size=(50, 100))  # fmt: skip
    t = dict(boxes=boxes, labels=torch.tensor([1, 2, 3]))
    crop = v2.CenterCrop((50, 20))  # x from 40 to 60: half of the second box
    for least, want in ((0.4, [2]), (0.6, [])):
        out = VisibilityFilter(crop, min_visible=least)(img, t)
        assert out[1]['boxes'].canvas_size == (50, 20)
        assert ToBatch((50, 20))(*out)[1]['labels'].tolist() == want
    assert boxes.tolist()[0] == [10, 0, 30, 40]


def test_mosaic_boxes_and_masks_lie_on_the_drawn_pixels(records):
    rs, n = [r for r in records if len(r.labels)], 0
    for x, t in drawn_items(records, Mosaic(96, p=1.0), 12, other=others(rs)):
        check_masks(x, t)
        for b, m in zip(t['boxes'], t['masks']):
            assert (extent(m) - b).abs().max() < 2.5
        n += len(t['labels'])
        assert len(t['boxes']) == len(t['labels']) == len(t['masks']) == len(t['area']) == len(t['iscrowd'])
    assert n > 18


def test_join_drops_what_only_some_have(records):
    a, b = (item(r)[1] for r in records[:2])
    both = join_targets([a, {k: v for k, v in b.items() if k != 'masks'}])
    assert 'masks' not in both and len(both['boxes']) == len(both['labels']) == len(a['labels']) + len(b['labels'])


def test_pasted_objects_cover_and_are_counted_once(records):
    rs = [r for r in records if len(r.labels)]
    grown = 0
    for x, t in drawn_items(records, CopyPaste(take=1.0, p=1.0), 16, other=others(rs)):
        check_masks(x, t)
        assert len(t['masks']) == 0 or t['masks'].sum(0).max() <= 1
        for b, m in zip(t['boxes'], t['masks']):
            assert (extent(m) - b).abs().max() < 2.5
        grown += len(t['labels']) > 1
    assert grown > 4


def test_copy_paste_asks_for_masks(records, tmp_path):
    bare = draw(3, tmp_path, masks=False)
    with pytest.raises(ValueError, match="'im3' has none: read the data with masks=True"):
        CopyPaste(p=1.0)(*item(bare), lambda: item(records[0]))


@pytest.mark.parametrize('tfm', [Mosaic(32), CopyPaste()], ids=lambda o: type(o).__name__)
def test_mixing_alone_is_explained(records, tfm):
    with pytest.raises(ValueError, match='needs more images than one'):
        v2.Compose([tfm])(*item(records[0]))


def all_of_them():
    return [Mosaic(64), CopyPaste(), A.RandomRotate90(), default_augment(64)]


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_seed_gives_the_same_batches_with_any_mixture(records, workers):
    def batches(n):
        dls = detection_dls(records, [], cm, 64, bs=8, seed=5, device='cpu', num_workers=n, item_tfms=all_of_them(),
                            batch_tfms=MultiScale((0.5, 1.5)))  # fmt: skip
        torch.manual_seed(n)
        return [b for _ in range(2) for b in dls.train]

    for (x, ys), (z, zs) in zip(batches(0), batches(workers)):
        assert torch.equal(x, z) and all(torch.equal(a['boxes'], b['boxes']) for a, b in zip(ys, zs))


def test_epochs_and_seeds_differ(records):
    def first(seed, epoch):
        dl = detection_dls(records, [], cm, 64, bs=16, seed=seed, device='cpu', item_tfms=Mosaic(64, p=1.0)).train
        dl.epoch = epoch
        return dl.create_item(0)[0]

    assert torch.equal(first(1, 1), first(1, 1))
    assert not torch.equal(first(1, 1), first(2, 1)) and not torch.equal(first(1, 1), first(1, 2))


def test_batches_are_resized_with_their_targets(records):
    dls = detection_dls(records, records, cm, 64, bs=4, seed=0, device='cpu', batch_tfms=[MultiScale((0.5, 1.5))])
    sizes = set()
    for _ in range(4):
        for x, ys in dls.train:
            sizes.add(x.shape[-1])
            for img, t in zip(x, ys):
                assert t['masks'].shape[-2:] == img.shape[-2:] and t['masks'].dtype == torch.uint8
                check_masks(img, t, 0.5)
    assert sizes == {32, 64, 96} and {x.shape[-1] for x, _ in dls.valid} == {64}
    assert {x.shape[-1] for x, _ in dls.train.new(tfm=None)} == {64}


def test_albumentations_keep_rows_together(records):
    tfm = as_augment([A.HorizontalFlip(p=0.5), A.RandomCrop(40, 40, p=0.5)])
    assert len(tfm.tfms) == 1
    for x, t in drawn_items(records, tfm, 12):
        check_masks(x, t)
        assert len({len(t[k]) for k in ('boxes', 'labels', 'masks', 'area', 'iscrowd')}) == 1


def test_albumentations_without_objects(records):
    img, t = item(next(r for r in records if not len(r.labels)))
    x, u = Albumentations(A.HorizontalFlip(p=1))(img, t)
    assert torch.equal(x, img.flip(-1)) and len(u['boxes']) == 0 and u['masks'].shape[-2:] == x.shape[-2:]


def test_albumentations_endings_are_left_out_with_a_warning(records):
    with pytest.warns(UserWarning, match='left out Normalize, ToTensorV2'):
        tfm = Albumentations(A.Compose([A.OneOf([A.VerticalFlip(p=1)], p=1), A.Normalize(), ToTensorV2()]))
    img, t = item(records[0])
    assert torch.equal(tfm(img, t)[0], img.flip(-2))


def test_what_is_no_transform_is_named():
    assert as_augment([]) is None and as_augment(None) is None
    with pytest.raises(TypeError, match="got 'mosaic' among the transforms"):
        as_augment(['mosaic'])
