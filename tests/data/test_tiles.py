"Tiles of records: where they are, what they show, and that nothing but the crop is new."

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from backbones_nb.data.ready import content_groups, usable_images
from backbones_nb.data.records import ClassMap, Record, SkipReport
from backbones_nb.data.formats import read_data, write_data
from backbones_nb.data.tiles import TileRecord, tile_boxes, tile_records, visible_mask, visible_part

cm = ClassMap(['car', 'bus'])
plans = [(64, 0.2), (64, 0.0), ((40, 70), 0.33), (50, 0.9), (7, 0.29)]
sizes = [(1, 1), (64, 64), (63, 65), (200, 150), (129, 64), (5, 400)]


@pytest.fixture
def picture(tmp_path):
    "Random pixels, 90 x 130, so that no two crops are equal."
    rng = np.random.RandomState(0)
    Image.fromarray(rng.randint(0, 256, (90, 130, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


def record(path, boxes=(), labels=None, size=(90, 130), **kwargs):
    return Record('a', path, size, boxes, [1] * len(boxes) if labels is None else labels, class_map=cm, **kwargs)


def pair(o):
    return (o, o) if isinstance(o, int) else o


@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('tile,overlap', plans)
def test_tiles_cover_the_image_with_equal_sizes_and_enough_overlap(size, tile, overlap):
    boxes = tile_boxes(size, tile, overlap)
    seen = np.zeros(size, int)
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0]
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1
    assert {(y2 - y1, x2 - x1) for x1, y1, x2, y2 in boxes} == {tuple(np.minimum(size, pair(tile)))}
    for axis, side in ((0, pair(tile)[1]), (1, pair(tile)[0])):
        starts = np.unique(boxes[:, axis])
        assert (np.diff(starts) <= side - int(overlap * side)).all()
    assert len({tuple(o) for o in boxes}) == len(boxes)


@pytest.mark.parametrize('tile,overlap', plans)
def test_tiles_are_where_sahi_has_them(sahi, tile, overlap):
    from sahi.slicing import get_slice_bboxes

    h, w = pair(tile)
    for size in sizes:
        theirs = get_slice_bboxes(*size, h, w, False, overlap, overlap)
        assert tile_boxes(size, tile, overlap).tolist() == theirs, size


def test_an_object_of_the_size_of_the_overlap_is_whole_in_some_tile():
    size, tile, overlap = (101, 117), 40, 0.25
    tiles, side = tile_boxes(size, tile, overlap), int(tile * overlap)
    for y in range(size[0] - side + 1):
        for x in range(size[1] - side + 1):
            box = x, y, x + side, y + side
            assert ((tiles[:, :2] <= box[:2]) & (tiles[:, 2:] >= box[2:])).all(1).any(), box
    larger = 0, tile - side - 0.5, side, tile + 0.5  # a pixel more, and no row has all of it
    assert not ((tiles[:, :2] <= larger[:2]) & (tiles[:, 2:] >= larger[2:])).all(1).any()


@pytest.mark.parametrize('kwargs', [dict(overlap=1.0), dict(overlap=-0.1), dict(tile=0), dict(tile=(3, 0))])
def test_a_plan_that_cannot_be_is_refused(kwargs):
    with pytest.raises(ValueError, match='expected'):
        tile_boxes((50, 50), **dict(tile=20) | kwargs)


@pytest.mark.parametrize('kwargs', [dict(min_visibility=1.1), dict(empty=-0.1), dict(empty=2)])
def test_shares_are_shares(kwargs):
    with pytest.raises(ValueError, match='expected shares from 0 to 1'):
        tile_records([], 20, **kwargs)


def test_boxes_come_back_exactly(picture):
    rng = np.random.RandomState(1)
    corner = rng.rand(40, 2).astype(np.float32) * [100, 70]
    boxes = np.concatenate([corner, corner + rng.rand(40, 2) * 20 + 1], 1).astype(np.float32).clip(0, [130, 90] * 2)
    found = []
    for t in tile_records([record(picture, boxes)], 40, 0.5, min_visibility=1):
        found += (t.boxes + np.float32([*t.window[:2], *t.window[:2]])).tolist()
    assert {tuple(o) for o in found} == {tuple(o) for o in boxes.tolist()}


def test_the_share_of_a_box_is_that_of_its_area():
    cut, share = visible_part([[10, 10, 30, 20], [0, 0, 5, 5], [20, 0, 20, 50]], (20, 5, 60, 40))
    assert share.tolist() == [0.5, 0, 0]
    assert cut[0].tolist() == [0, 5, 10, 15]


def test_what_a_tile_shows_is_what_sahi_keeps(sahi, picture):
    from sahi.slicing import process_coco_annotations
    from sahi.utils.coco import CocoAnnotation

    rng = np.random.RandomState(2)
    corner = rng.randint(0, 70, (30, 2))
    boxes = np.concatenate([corner, corner + rng.randint(3, 60, (30, 2))], 1).clip(0, [130, 90] * 2)
    labels = rng.randint(1, 3, 30)
    anns = [
        CocoAnnotation(bbox=[int(v) for v in (x1, y1, x2 - x1, y2 - y1)], category_id=int(l), category_name='')
        for (x1, y1, x2, y2), l in zip(boxes, labels)
    ]
    for least in (0.1, 0.5, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            tiles = tile_records([record(picture, boxes, labels)], 40, 0.25, least)
        for t in tiles:
            theirs = process_coco_annotations(anns, list(t.window), least)
            got = {(*b, int(l)) for b, l in zip(t.boxes.tolist(), t.labels)}
            assert got == {(x, y, x + w, y + h, o.category_id) for o in theirs for x, y, w, h in [o.bbox]}


def test_a_tile_is_the_crop_of_the_upright_image(tmp_path):
    a = np.random.RandomState(0).randint(0, 256, (60, 100, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.fromarray(a).save(tmp_path / 'a.png', exif=exif)
    tiles = tile_records([record(tmp_path / 'a.png', size=(100, 60))], 40)
    upright = np.rot90(a, -1)
    for t in tiles:
        x1, y1, x2, y2 = t.window
        assert np.array_equal(np.asarray(t.image()), upright[y1:y2, x1:x2]) and t.size == (y2 - y1, x2 - x1)


def test_a_file_that_has_changed_is_read_again(picture):
    tile = tile_records([record(picture)], 40)[0]
    assert np.asarray(tile.image()).any()
    Image.new('RGB', (130, 90)).save(picture.with_name('b.png'))
    picture.with_name('b.png').replace(picture)
    assert not np.asarray(tile.image()).any()


def test_a_missing_file_is_named(tmp_path):
    tile = tile_records([record(tmp_path / 'gone.png')], 40)[0]
    with pytest.raises(FileNotFoundError, match='there is no image .*gone.png'):
        tile.image()


def test_a_cut_off_file_is_read_in_part_by_its_tiles(picture):
    Image.open(picture).convert('RGB').save(picture.with_suffix('.jpg'))
    whole = picture.with_suffix('.jpg').read_bytes()
    picture.with_suffix('.jpg').write_bytes(whole[: len(whole) * 2 // 3])
    tiles = tile_records([record(picture.with_suffix('.jpg'))], 60)
    with pytest.raises(ValueError, match='cannot be decoded'):
        usable_images(tiles, SkipReport(len(tiles)))
    assert len(usable_images(tiles, SkipReport(len(tiles)), 'read')) == len(tiles)


@pytest.mark.parametrize('tile', [130, (90, 130), 500])
def test_one_tile_changes_nothing(picture, tile):
    r = record(picture, [[3, 4, 50, 60]])
    for whole in (False, True):
        assert tile_records([r], tile, whole=whole) == [r]


def test_images_without_objects_and_tiny_ones_are_tiled_too(picture, tmp_path):
    Image.new('RGB', (1, 1)).save(tmp_path / 'dot.png')
    tiles = tile_records([record(picture), record(tmp_path / 'dot.png', size=(1, 1))], 64)
    assert len(tiles) == len(tile_boxes((90, 130), 64)) + 1
    assert all(t.target()['boxes'].shape == (0, 4) for t in tiles)
    assert tiles[-1].image().size == (1, 1)


def test_a_share_of_the_empty_tiles_is_kept_evenly(picture):
    r = record(picture, [[0, 0, 10, 10]])
    for share in (0, 0.25, 0.5, 1):
        tiles = tile_records([r] * 4, 30, 0.0, empty=share)
        n = 4 * (len(tile_boxes((90, 130), 30, 0.0)) - 1)
        assert len([t for t in tiles if not len(t.labels)]) == int(n * share)
        assert len([t for t in tiles if len(t.labels)]) == 4


def test_objects_in_no_tile_are_counted_by_class(picture):
    boxes, labels = [[5, 5, 125, 85], [60, 60, 66, 66]], [2, 1]
    with pytest.warns(UserWarning, match=r'1 of 2 objects \(1 of 1 bus\) are in no tile of size 40'):
        tile_records([record(picture, boxes, labels)], 40)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tiles = tile_records([record(picture, boxes, labels)], 40, whole=True)
    assert tiles[0].labels.tolist() == labels


def ring():
    "A frame around the image: its box is the whole image, its middle is empty."
    m = np.ones((1, 90, 130), np.uint8)
    m[:, 20:70, 20:110] = 0
    return m


def test_masks_decide_where_there_are_some(picture):
    r = record(picture, [[0, 0, 130, 90]], masks=ring())
    tiles = {t.window: t for t in tile_records([r], (30, 30), 0.0, min_visibility=0.01)}
    assert len(tiles[30, 30, 60, 60].labels) == 0
    corner = tiles[0, 0, 30, 30].target()
    assert corner['masks'].shape == (1, 30, 30) and corner['area'].tolist() == [30 * 30 - 10 * 10]
    top = tiles[30, 0, 60, 30].target()
    assert top['boxes'].tolist() == [[0, 0, 30, 20]] and top['area'].tolist() == [30 * 20]


def test_masks_of_a_tile_are_those_of_the_image_cut(picture):
    rng = np.random.RandomState(3)
    masks = np.zeros((6, 90, 130), np.uint8)
    for m in masks:
        y, x = rng.randint(0, 60), rng.randint(0, 100)
        m[y : y + rng.randint(5, 30), x : x + rng.randint(5, 30)] = 1
    ends = [np.flatnonzero(m.any(k))[[0, -1]] + [0, 1] for m in masks for k in (0, 1)]
    boxes = np.array([[x[0], y[0], x[1], y[1]] for x, y in zip(ends[::2], ends[1::2])])
    labels = np.arange(6) % 2 + 1
    asked = []

    def read():
        asked.append(1)
        return masks

    tiles = tile_records([record(picture, boxes, labels, masks=read)], 40, 0.5)
    assert len(asked) == 1
    for t in tiles:
        x1, y1, x2, y2 = t.window
        share = masks[:, y1:y2, x1:x2].sum((1, 2)) / masks.sum((1, 2))
        which = share >= 0.3
        assert t.labels.tolist() == labels[which].tolist()
        target = t.target()
        assert np.array_equal(target['masks'].numpy(), masks[which][:, y1:y2, x1:x2])
        assert np.array_equal(t.boxes, visible_mask(masks[which], t.window)[0])


def test_crowds_stay_as_long_as_they_are_visible(picture):
    r = record(picture, [[0, 0, 130, 90], [0, 0, 130, 90]], iscrowd=[1, 0])
    with pytest.warns(UserWarning, match='1 of 2 objects'):
        tiles = tile_records([r], 30)
    assert all(t.iscrowd.tolist() == [1] for t in tiles)


def test_areas_of_the_file_shrink_with_what_is_visible(picture):
    r = record(picture, [[0, 0, 40, 40], [60, 0, 100, 30]], area=[800, 600])
    shown = {t.window[:2]: t for t in tile_records([r], (90, 80), 0.0)}
    assert shown[0, 0].target()['area'].tolist() == [800, 300]
    assert shown[50, 0].target()['area'].tolist() == [600]


def test_a_tile_travels_and_can_be_relabeled(picture):
    tile = tile_records([record(picture, [[3, 4, 30, 35]], masks=np.ones((1, 90, 130), np.uint8))], 40, 0.1, 0.1)[0]
    for other in (pickle.loads(pickle.dumps(tile)), replace(tile, labels=[2])):
        assert isinstance(other, TileRecord) and other.window == tile.window
        assert np.array_equal(np.asarray(other.image()), np.asarray(tile.image()))
        assert other.target()['masks'].shape == tile.target()['masks'].shape


def test_tiles_of_a_file_belong_together(picture, tmp_path):
    Image.new('RGB', (130, 90)).save(tmp_path / 'b.png')
    tiles = tile_records([record(picture), record(tmp_path / 'b.png')], 64)
    groups = content_groups(tiles)
    assert len(set(groups)) == 2 and groups == sorted(groups, key=groups.index)


@pytest.mark.parametrize('format', ['coco', 'voc', 'yolo'])
def test_tiles_can_be_written(picture, tmp_path, format):
    tiles = tile_records([record(picture, [[3, 4, 30, 35], [60, 50, 100, 80]])], 64, whole=True)
    write_data(tiles, cm, tmp_path / 'out', format)
    parts, _, _ = read_data(tmp_path / 'out')
    back = {r.path.stem: r for rs in parts.values() for r in rs}
    assert len(back) == len(tiles)
    for t in tiles:
        name = '_'.join(map(str, ('a', *getattr(t, 'window', ()))))
        assert np.array_equal(np.asarray(back[name].image()), np.asarray(t.image()))
        assert np.allclose(back[name].boxes, t.boxes, atol=1e-3)
