import hashlib
import pickle
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from backbones_nb.data.pets import download, instances_of, is_pets, pets_records, pets_splits, split_stratified, untar_pets
from backbones_nb.data.records import ClassMap, Record, clean_boxes, load_image, read_voc, voc_records
from backbones_nb.data.toy import breeds, toy_pets
from backbones_nb.learners.metrics import coco_eval, mean_box_detector


def test_class_map():
    cm = ClassMap(['cat','dog'])
    assert (len(cm), list(cm), cm.get_id('dog'), cm.get_name(1))==(3, ['background','cat','dog'], 2, 'cat')
    for bad in (lambda: cm.get_id('dgo'), lambda: cm.get_name(3), lambda: ClassMap(['a','a']), lambda: ClassMap(['background'])):
        with pytest.raises(ValueError): bad()
    with pytest.raises(ValueError, match="Did you mean 'dog'"): cm.get_id('dgo')


def test_records_check_and_pickle(toy):
    recs,_ = pets_records(toy, 'test', masks=True)
    r = pickle.loads(pickle.dumps(recs[0]))
    t = r.target()
    assert t['masks'].shape[0]==len(t['boxes'])==len(t['labels']) and t['masks'].shape[1:]==r.size
    with pytest.raises(ValueError): Record('x', 'x.jpg', (4,4), np.zeros((2,4)), [1])


def test_clean_boxes():
    b,ok = clean_boxes([[-5,-5,3,3],[2,2,2,9],[90,90,200,200]], (100,100))
    assert ok.tolist()==[True,False,True] and b[2].tolist()==[90,90,100,100]


@pytest.mark.parametrize('mode,fmt', [('P','GIF'), ('RGBA','PNG'), ('L','PNG'), ('CMYK','JPEG'), ('LA','PNG'), ('I;16','PNG')])
def test_images_of_any_kind(mode, fmt, tmp_path):
    f = tmp_path/'x.jpg'
    (Image.fromarray(np.full((6,8), 300, np.uint16)) if mode=='I;16' else Image.new('RGB', (8,6), 'red').convert(mode)).save(f, format=fmt)
    im = load_image(f)
    assert (im.mode, im.size)==('RGB', (8,6))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path/'x.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='x.jpg'): load_image(tmp_path/'x.jpg')
    with pytest.raises(FileNotFoundError, match='y.jpg'): load_image(tmp_path/'y.jpg')


def test_voc_reader(toy, tmp_path):
    recs,cm,report = voc_records(toy/'images', toy/'annotations'/'xmls')
    assert len(recs)==len(list((toy/'annotations'/'xmls').glob('*.xml'))) and len(report)==len(list((toy/'images').glob('*.jpg')))-len(recs)
    size,objs = read_voc(toy/'annotations'/'xmls'/f'{recs[0].image_id}.xml')
    text = (toy/'annotations'/'xmls'/f'{recs[0].image_id}.xml').read_text()
    x1,x2 = (int(re.search(f'<{k}>(\\d+)<', text)[1]) for k in ('xmin','xmax'))
    assert (objs[0][1][0], objs[0][1][2])==(x1-1, x2) and tuple(size)==recs[0].size


def test_toy_layout_and_truth(toy):
    lists = {k:[l.split() for l in (toy/'annotations'/f'{k}.txt').read_text().splitlines() if l[0]!='#'] for k in ('list','trainval','test')}
    assert {o[0] for o in lists['list']}=={o[0] for o in lists['trainval']} | {o[0] for o in lists['test']}
    assert not {o[0] for o in lists['trainval']} & {o[0] for o in lists['test']}
    for name,cid,sid,_ in lists['list']:
        b = breeds[name.rsplit('_', 1)[0]]
        assert (int(cid), int(sid))==(b['id'], b['species']) and name[0].isupper()==(sid=='1')
        tri = np.asarray(Image.open(toy/'annotations'/'trimaps'/f'{name}.png'))
        assert set(np.unique(tri))=={1,2,3} and Image.open(toy/'images'/f'{name}.jpg').size==tri.shape[::-1]
        assert 1<=ndimage.label(tri!=2, np.ones((3,3)))[1]<=3
    xmls = {o.stem for o in (toy/'annotations'/'xmls').iterdir()}
    assert xmls < {o[0] for o in lists['trainval']} # the gap of the original: none of test, not all of trainval


def test_toy_is_deterministic_and_resumes(tmp_path):
    a,b = toy_pets(tmp_path/'a', n=6, seed=1),toy_pets(tmp_path/'b', n=6, seed=1)
    files = sorted(o.relative_to(a) for o in a.rglob('*') if o.is_file())
    assert all((a/o).read_bytes()==(b/o).read_bytes() for o in files)
    c = toy_pets(tmp_path/'c', n=6, seed=2)
    assert all((c/o).read_bytes()!=(a/o).read_bytes() for o in files if o.suffix=='.jpg')
    with pytest.raises(ValueError): toy_pets(tmp_path/'a', n=7, seed=1)


def test_toy_is_no_giveaway(tmp_path):
    train,valid,cm,_ = pets_splits(toy_pets(tmp_path/'toy', n=160, seed=5))
    assert coco_eval(mean_box_detector(train)(valid), [r.target() for r in valid], cm)['AP50']<.2
    sizes = [max(b[2]-b[0], b[3]-b[1])/min(r.size) for r in train+valid for b in r.boxes]
    assert .19<=min(sizes)<.3 and .65<max(sizes)<=.82


def test_pets_requests_that_cannot_be_met(toy):
    for kw in (dict(split='test', boxes='head'), dict(boxes='head', masks=True), dict(split='val'), dict(boxes='tail'), dict(classes='colour')):
        with pytest.raises(ValueError) as e: pets_records(toy, **kw)
        assert '\n' not in str(e.value)


def test_quirks_are_read_and_gaps_are_named(tmp_path):
    path = toy_pets(tmp_path/'toy', n=24, seed=0, quirks=True)
    recs,report = pets_records(path, 'trainval', 'head')
    assert len(report)>=1 and len(recs)+len(report)==report.total and 'head' in str(report)
    for r in pets_records(path, 'all')[0]: assert r.image().size==r.size[::-1]


def test_instances():
    tri = np.full((9,9), 2, np.uint8)
    tri[1:3,1:3],tri[6:8,6:8],tri[3,1] = 1,1,3
    assert instances_of(tri, 'whole').shape[0]==1 and instances_of(tri, 'components').shape[0]==2
    assert instances_of(tri, 'components')[0].sum()==5 and instances_of(np.full((3,3), 2), 'whole').shape==(0,3,3)


def test_stratified_split(toy):
    recs,_ = pets_records(toy, 'trainval')
    a,b = split_stratified(recs, .25, seed=1)
    count = lambda rs: {k:sum(r.image_id.startswith(k) for r in rs) for k in breeds}
    assert all(count(b)[k]==round(.25*v) for k,v in count(recs).items()) and len(a)+len(b)==len(recs)
    assert [r.image_id for r in b]==[r.image_id for r in split_stratified(recs, .25, seed=1)[1]]


class Server(BaseHTTPRequestHandler):
    files,breaks,ranges,asked = {},0,True,[]
    def log_message(self, *a): pass
    def do_GET(self):
        cls = type(self)
        data,start = cls.files.get(self.path.lstrip('/')),0
        if data is None: return self.send_error(404)
        m = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        cls.asked.append(self.headers.get('Range'))
        if m and cls.ranges: start = int(m[1])
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
        self.send_header('Content-Length', str(len(data)-start))
        self.end_headers()
        part = data[start:]
        if cls.breaks:
            cls.breaks -= 1
            part = part[:len(part)//2]
        self.wfile.write(part)


@pytest.fixture
def server(toy, tmp_path):
    for name,folder in (('images.tar.gz','images'), ('annotations.tar.gz','annotations')):
        with tarfile.open(tmp_path/name, 'w:gz') as t: t.add(toy/folder, folder)
    class S(Server): files,breaks,ranges,asked = {o:(tmp_path/o).read_bytes() for o in ('images.tar.gz','annotations.tar.gz')},0,True,[]
    s = ThreadingHTTPServer(('127.0.0.1', 0), S)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield S,f'http://127.0.0.1:{s.server_port}',{k:hashlib.md5(v).hexdigest() for k,v in S.files.items()}
    s.shutdown()


@pytest.mark.parametrize('ranges', [True, False])
def test_download_goes_on_after_a_break(server, ranges, tmp_path):
    S,url,sums = server
    S.breaks,S.ranges = 1,ranges
    f = download(f'{url}/images.tar.gz', tmp_path/'got', sums['images.tar.gz'])
    assert f.read_bytes()==S.files['images.tar.gz'] and not list(tmp_path.glob('*.part'))
    assert S.asked[0] is None and S.asked[1].startswith('bytes=')


def test_wrong_content_is_refused(server, tmp_path):
    S,url,_ = server
    with pytest.raises(RuntimeError, match='md5'): download(f'{url}/images.tar.gz', tmp_path/'got', '0'*32)
    assert not list(tmp_path.glob('got*'))
    with pytest.raises(RuntimeError, match='404'): download(f'{url}/nothing', tmp_path/'got')


def test_untar_pets(server, toy, tmp_path):
    S,url,sums = server
    path = untar_pets(tmp_path/'pets', url, sums)
    assert is_pets(path) and len(list((path/'images').iterdir()))==len(list((toy/'images').iterdir()))
    n = len(S.asked)
    assert untar_pets(tmp_path/'pets', url, sums)==path and len(S.asked)==n # nothing is asked for twice
    assert untar_pets(source=toy)==toy
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError): untar_pets(tmp_path/'other', source=tmp_path/'empty')
    with pytest.raises(RuntimeError, match='md5'): untar_pets(tmp_path/'other', source=tmp_path) # archives, but not the original ones


def test_the_real_ones(shared_pets):
    assert len(pets_records(shared_pets, 'all')[0])==489
    train,valid,cm,report = pets_splits(shared_pets, boxes='head')
    assert (len(train)+len(valid), len(valid), len(report), report.total)==(241, 48, 4, 245)
    assert set(next(iter(report.reasons.values())))=={'Abyssinian_104','Bengal_111','Bengal_175','american_bulldog_202'}
    train,valid,cm,_ = pets_splits(shared_pets, classes='breed', masks=True)
    assert (len(train), len(valid), list(cm))==(245, 244, ['background','Abyssinian','american_bulldog','Bengal'])
    for k in ('Abyssinian_34','Abyssinian_5'): assert load_image(shared_pets/'images'/f'{k}.jpg').mode=='RGB'
    t = valid[0].target()
    assert t['masks'].shape==(1,*valid[0].size)


def test_head_boxes_lie_in_bodies(shared_pets):
    heads = {r.image_id:r.boxes[0] for r in pets_records(shared_pets, 'trainval', 'head')[0]}
    bodies = {r.image_id:r.boxes[0] for r in pets_records(shared_pets, 'trainval')[0]}
    inside = [((h[:2]>=bodies[k][:2]-15).all() and (h[2:]<=bodies[k][2:]+15).all()) for k,h in heads.items()]
    assert np.mean(inside)>.95
