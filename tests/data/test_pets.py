import hashlib
import io
import pickle
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from backbones_nb.data.downloads import download
from backbones_nb.data.pets import (
    breed_of,
    instances_of,
    is_pets,
    mask_boxes,
    pets_class_map,
    pets_records,
    pets_splits,
    read_list,
    read_trimap,
    split_stratified,
    untar_pets,
)
from backbones_nb.data.records import load_image
from backbones_nb.data.toy import toy_pets


@pytest.fixture
def copy(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / 'copy')


def names(path, split='trainval'):
    return list(read_list(path, split))


def test_what_is_missing_is_skipped_and_named(copy):
    ann, (a, b, c, d, e, *_) = copy / 'annotations', names(copy, 'test')
    (copy / 'images' / f'{a}.jpg').unlink()
    (copy / 'images' / f'{b}.jpg').write_bytes(b'x')
    (ann / 'trimaps' / f'{c}.png').unlink()
    (ann / 'trimaps' / f'{d}.png').write_bytes(b'x')
    Image.new('L', (3, 3), 1).save(ann / 'trimaps' / f'{e}.png')
    recs, report = pets_records(copy, 'test')
    assert {o for v in report.reasons.values() for o in v} == {a, b, c, d, e} and len(report.reasons) == 5
    assert len(recs) + len(report) == report.total == len(names(copy, 'test'))


@pytest.mark.parametrize('fill', [2, 7])
def test_trimaps_without_a_pet_or_with_other_values(copy, fill):
    name = names(copy)[0]
    f = copy / 'annotations' / 'trimaps' / f'{name}.png'
    Image.new('L', Image.open(f).size, fill).save(f)
    recs, report = pets_records(copy)
    assert sum(report.reasons.values(), []) == [name] and name not in {r.image_id for r in recs}


def test_unlisted_images_and_stray_files_are_named(copy):
    shutil.copy(copy / 'images' / f'{names(copy)[0]}.jpg', copy / 'images' / 'Tabby_999.jpg')
    (copy / 'images' / 'Tabby_1.mat').write_bytes(b'x')
    (copy / 'annotations' / 'trimaps' / '._Tabby_1.png').write_bytes(b'x')
    for report in (pets_records(copy, 'all')[1], pets_splits(copy)[3]):
        assert (
            dict(report.reasons) == {'in no list': ['Tabby_999']}
            and 'Tabby_1.mat' in str(report)
            and report.total == 49
        )


def test_xml_without_trimap_and_trimap_without_xml(copy):
    heads = {r.image_id for r in pets_records(copy, boxes='head')[0]}
    name = sorted(heads)[0]
    (copy / 'annotations' / 'trimaps' / f'{name}.png').unlink()
    assert name in {r.image_id for r in pets_records(copy, boxes='head')[0]} and name not in {
        r.image_id for r in pets_records(copy)[0]
    }
    (copy / 'annotations' / 'xmls' / f'{name}.xml').unlink()
    assert name in sum(pets_records(copy, boxes='head')[1].reasons.values(), [])


def test_no_image_left_is_an_error(copy):
    shutil.rmtree(copy / 'annotations' / 'xmls')
    with pytest.raises(ValueError, match='without head box'):
        pets_records(copy, boxes='head')
    (copy / 'annotations' / 'test.txt').write_text('Tabby_1 1 3 1\n')
    with pytest.raises(ValueError, match='test.txt, line 1'):
        pets_records(copy, 'test')
    with pytest.raises(FileNotFoundError, match='trainval.txt'):
        pets_records(copy / 'images')


@pytest.mark.parametrize(
    'kw,words',
    [
        (dict(split='test', boxes='head'), 'head boxes exist in trainval only'),
        (dict(split='val'), 'split'),
        (dict(boxes='head', masks=True), 'masks are of whole bodies'),
        (dict(boxes='tail'), 'boxes'),
        (dict(classes='color'), 'classes'),
    ],
)
def test_requests_that_cannot_be_met(toy, kw, words):
    with pytest.raises(ValueError, match=words) as e:
        pets_records(toy, **kw)
    assert '\n' not in str(e.value)


def test_the_gap_of_head_boxes_is_named(tmp_path):
    path = toy_pets(tmp_path / 'toy', n=24, seed=0, quirks=True)
    recs, report = pets_records(path, 'trainval', 'head')
    assert len(report) >= 1 and len(recs) + len(report) == report.total and 'head' in str(report)


def test_records_with_masks_travel(toy):
    r = pets_records(toy, 'test', masks=True)[0][0]
    a, b = r.target(), pickle.loads(pickle.dumps(r)).target()
    assert (
        b['masks'].shape == (len(b['boxes']), *r.size)
        and len(b['boxes']) == len(b['labels'])
        and (a['masks'] == b['masks']).all()
    )


def test_instances():
    tri = np.full((9, 9), 2, np.uint8)
    tri[1:3, 1:3], tri[6:8, 6:8], tri[3, 1] = 1, 1, 3
    assert instances_of(tri, 'whole').shape[0] == 1 and instances_of(tri, 'components').shape[0] == 2
    assert instances_of(tri, 'components')[0].sum() == 5 and instances_of(tri, 'components', border=False)[0].sum() == 4
    assert instances_of(np.full((3, 3), 2), 'whole').shape == (0, 3, 3)


@pytest.mark.parametrize('classes', ['species', 'breed'])
def test_labels_follow_the_lists(toy, classes):
    cm = pets_class_map(toy, classes)
    for r in pets_records(toy, 'all', classes=classes)[0]:
        cid, sid = (read_list(toy, 'trainval') | read_list(toy, 'test'))[r.image_id]
        assert set(r.labels.tolist()) == {sid if classes == 'species' else cid}
        assert cm.get_name(r.labels[0]) == (
            breed_of(r.image_id) if classes == 'breed' else ('cat' if r.image_id[0].isupper() else 'dog')
        )


@pytest.mark.parametrize('instances', ['whole', 'components'])
@pytest.mark.parametrize('border', [True, False])
def test_masks_and_boxes_are_one_truth(toy, instances, border):
    for r in pets_records(toy, 'test', masks=True, instances=instances, border=border)[0]:
        t, tri = r.target(), read_trimap(toy / 'annotations' / 'trimaps' / f'{r.image_id}.png')
        assert np.array_equal(mask_boxes(t['masks'].numpy()), r.boxes) and t['masks'].shape[1:] == tri.shape == r.size
        assert t['area'].tolist() == t['masks'].flatten(1).sum(1).tolist()
        if instances == 'whole':
            assert np.array_equal(t['masks'][0] > 0, tri != 2 if border else tri == 1)


def test_heads_are_cut_by_breed_with_a_seed(toy):
    split = lambda **kw: [[r.image_id for r in o] for o in pets_splits(toy, boxes='head', **kw)[:2]]
    (a, b), (c, d) = split(), split(seed=7)
    assert not set(a) & set(b) and set(a) | set(b) == set(c) | set(d) and b != d and split() == [a, b]
    assert {breed_of(o) for o in b} == {breed_of(o) for o in a}
    train, valid = ([r.image_id for r in o] for o in pets_splits(toy)[:2])
    assert (set(train), set(valid)) == (set(names(toy)), set(names(toy, 'test')))  # bodies: the official lists


def test_stratified_split(toy):
    recs, _ = pets_records(toy, 'trainval')
    a, b = split_stratified(recs, 0.25, seed=1)

    def count(rs):
        return {k: sum(breed_of(r.image_id) == k for r in rs) for k in {breed_of(r.image_id) for r in recs}}

    assert all(count(b)[k] == round(0.25 * v) for k, v in count(recs).items()) and len(a) + len(b) == len(recs)
    assert [r.image_id for r in b] == [r.image_id for r in split_stratified(recs, 0.25, seed=1)[1]]
    for bad in (0, 1, -0.5):
        with pytest.raises(ValueError, match='valid_pct'):
            split_stratified(recs, bad)


class Server(BaseHTTPRequestHandler):
    files, asked, cuts, mode = {}, [], 0, 'range'

    def log_message(self, *a):
        pass

    def do_GET(self):
        cls, start, want = type(self), 0, self.headers.get('Range')
        cls.asked.append(want)
        blob = cls.files.get(self.path.lstrip('/'))
        if blob is None:
            return self.send_error(404)
        if want and cls.mode != 'plain':
            start = int(want[6:-1])
        n = len(blob)
        if start >= n:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{n}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        self.send_response(206 if want and cls.mode != 'plain' else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start + (cls.mode == "liar")}-{n - 1}/{n}')
        self.send_header('Content-Length', str(n - start))
        self.end_headers()
        cls.cuts -= 1
        self.wfile.write(blob[start : (start + n) // 2] if cls.cuts >= 0 else blob[start:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr('backbones_nb.data.downloads.time.sleep', lambda s: None)

    class S(Server):
        blob, asked, cuts, mode = np.random.default_rng(0).bytes(300_000), [], 0, 'range'

    S.files = {'x.tar.gz': S.blob}
    s = ThreadingHTTPServer(('127.0.0.1', 0), S)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield S, f'http://127.0.0.1:{s.server_port}/x.tar.gz', hashlib.md5(S.blob).hexdigest()
    s.shutdown()


@pytest.mark.parametrize('mode', ['range', 'plain'])
def test_a_download_goes_on_after_a_break(server, mode, tmp_path):
    S, url, md5 = server
    S.cuts, S.mode = 1, mode
    assert download(url, tmp_path / 'x', md5).read_bytes() == S.blob and S.asked == [None, 'bytes=150000-']
    assert not list(tmp_path.glob('*.part'))


def test_wrong_content_and_wrong_addresses(server, tmp_path):
    S, url, _ = server
    with pytest.raises(RuntimeError, match='md5'):
        download(url, tmp_path / 'x', '0' * 32)
    assert not list(tmp_path.glob('x*'))  # nothing wrong is kept
    S.asked.clear()
    with pytest.raises(RuntimeError, match='404'):
        download(url.replace('x.tar', 'y.tar'), tmp_path / 'x')
    assert len(S.asked) == 1  # a second try would not help


def test_many_breaks_are_no_failure_while_there_is_progress(server, tmp_path):
    S, url, md5 = server
    S.cuts = 7  # more than the three tries
    assert download(url, tmp_path / 'x', md5).read_bytes() == S.blob
    starts = [int(o[6:-1]) for o in S.asked[1:]]
    assert starts == sorted(set(starts)) and len(starts) == 7  # nothing was asked for twice


def test_a_server_that_always_breaks_and_knows_no_ranges(server, tmp_path):
    S, url, md5 = server
    S.cuts, S.mode = 99, 'plain'
    with pytest.raises(RuntimeError, match='150000 bytes are kept') as e:
        download(url, tmp_path / 'x', md5)
    assert '\n' not in str(e.value) and not (tmp_path / 'x').exists()
    S.cuts, S.mode = 0, 'range'  # a later call continues
    assert download(url, tmp_path / 'x', md5).read_bytes() == S.blob and S.asked[-1] == 'bytes=150000-'


@pytest.mark.parametrize('have', [300_000, 300_001])
def test_nothing_left_to_ask_for(server, have, tmp_path):
    S, url, md5 = server
    (tmp_path / 'x.part').write_bytes((S.blob + b'?')[:have])
    assert download(url, tmp_path / 'x', md5).read_bytes() == S.blob


def test_another_part_than_asked_for_is_not_appended(server, tmp_path):
    S, url, md5 = server
    S.mode = 'liar'
    (tmp_path / 'x.part').write_bytes(S.blob[:1000])
    with pytest.raises(RuntimeError, match='a different range from the requested one'):
        download(url, tmp_path / 'x', md5)
    assert (tmp_path / 'x.part').read_bytes() == S.blob[:1000]


def test_a_file_that_is_there_is_checked(server, tmp_path):
    S, url, md5 = server
    (tmp_path / 'x').write_bytes(S.blob)
    download(url, tmp_path / 'x', md5)
    assert not S.asked
    (tmp_path / 'x').write_bytes(b'old')
    assert download(url, tmp_path / 'x', md5).read_bytes() == S.blob


def archives(folder, toy, extra=None):
    folder.mkdir(exist_ok=True)
    for o in ('images', 'annotations'):
        with tarfile.open(folder / f'{o}.tar.gz', 'w:gz') as t:
            t.add(toy / o, o)
            if extra and o == 'images':
                t.addfile(tarfile.TarInfo(extra), io.BytesIO())
    return {o.name: hashlib.md5(o.read_bytes()).hexdigest() for o in folder.glob('*.gz')}


def test_local_archives(toy, tmp_path):
    sums = archives(tmp_path / 'a', toy)
    path = untar_pets(source=tmp_path / 'a', files=sums)
    assert (
        path == tmp_path / 'a' / 'oxford-iiit-pet'
        and is_pets(path)
        and len(pets_records(path, 'all', instances='components')[0]) == 48
    )
    assert sorted(o.name for o in (tmp_path / 'a').iterdir()) == [
        'annotations.tar.gz',
        'images.tar.gz',
        'oxford-iiit-pet',
    ]  # no litter, archives kept
    assert untar_pets(source=tmp_path / 'a', files=sums) == path


def test_archives_from_a_server(server, toy, tmp_path):
    S, url, _ = server
    sums = archives(tmp_path / 'a', toy)
    S.files = {k: (tmp_path / 'a' / k).read_bytes() for k in sums}
    kw = dict(source=url.rsplit('/', 1)[0], files=sums, progress=False)
    path = untar_pets(tmp_path / 'pets', **kw)
    assert is_pets(path) and sorted(o.name for o in (path / 'images').iterdir()) == sorted(
        o.name for o in (toy / 'images').iterdir()
    )
    n = len(S.asked)
    assert untar_pets(tmp_path / 'pets', **kw) == path and len(S.asked) == n == 2  # nothing is asked for twice


def test_sources_that_are_there_or_are_not(toy, tmp_path):
    assert untar_pets(source=toy) == toy
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='images.tar.gz'):
        untar_pets(tmp_path / 'other', source=tmp_path / 'empty')
    archives(tmp_path / 'a', toy)
    with pytest.raises(RuntimeError, match='md5'):
        untar_pets(tmp_path / 'other', source=tmp_path / 'a')  # not the original ones
    assert not (tmp_path / 'other').exists()


def test_archives_cannot_write_outside(toy, tmp_path):
    sums = archives(tmp_path / 'a', toy, extra='../../../evil')
    with pytest.raises(tarfile.FilterError):
        untar_pets(tmp_path / 'deep' / 'er' / 'p', tmp_path / 'a', sums)
    assert not list(tmp_path.rglob('evil')) and not (tmp_path / 'deep' / 'er' / 'p').exists()


def test_a_folder_of_something_else_is_left_alone(toy, tmp_path):
    sums = archives(tmp_path / 'a', toy)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'images').write_text('precious')
    with pytest.raises(ValueError, match='holds other files'):
        untar_pets(tmp_path / 'mine', tmp_path / 'a', sums)
    assert (tmp_path / 'mine' / 'images').read_text() == 'precious'


def test_real_images_in_no_list(shared_pets):
    recs, report = pets_records(shared_pets, 'all')
    assert str(report) == 'skipped 2 of 491: 2 in no list (Abyssinian_34, Abyssinian_82)' and len(recs) == 489
    for r in recs[::40]:
        assert r.image().size == r.size[::-1]


def test_real_splits(shared_pets):
    train, valid, cm, report = pets_splits(shared_pets, boxes='head')
    assert (len(train) + len(valid), len(valid), len(report), report.total) == (241, 48, 4, 245)
    assert set(next(iter(report.reasons.values()))) == {
        'Abyssinian_104',
        'Bengal_111',
        'Bengal_175',
        'american_bulldog_202',
    }
    train, valid, cm, _ = pets_splits(shared_pets, classes='breed', masks=True)
    assert (len(train), len(valid), list(cm)) == (245, 244, ['background', 'Abyssinian', 'american_bulldog', 'Bengal'])
    assert valid[0].target()['masks'].shape == (1, *valid[0].size)
    for k in ('Abyssinian_34', 'Abyssinian_5'):
        assert load_image(shared_pets / 'images' / f'{k}.jpg').mode == 'RGB'


def test_real_borders_belong_to_the_pet(shared_pets):
    def inside(border):
        bodies = {r.image_id: r.boxes[0] for r in pets_records(shared_pets, border=border)[0]}
        heads = [(h, bodies[r.image_id]) for r in pets_records(shared_pets, boxes='head')[0] for h in r.boxes]
        return np.mean([(h[:2] >= b[:2] - 2).all() and (h[2:] <= b[2:] + 2).all() for h, b in heads])

    assert inside(True) > 0.97 and inside(False) < 0.2
