import copy
import hashlib
import json
import os
import pickle
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from meta import constant_init
from project import run_script_quickly

from backbones_nb import create_backbone, from_pretrained
from backbones_nb.core import config, hub, published, registry, weights as W
from backbones_nb.core.create import register
from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.analysis.parity import randomize_, rel_error
from backbones_nb.core.published import (
    add_weights,
    list_weights,
    pick_weights,
    weight_records,
    WeightRecord,
)
from backbones_nb.core.weights import fetch_weights, read_weights
from backbones_nb.necks.build import attach_neck

torch.set_num_threads(1)


def noise(size=32, n=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


def one_sentence(e):
    return '\n' not in str(e.value)


class Mini(Backbone):
    "A family small enough to publish weights of, with two variants and an exact conversion."

    conversions = {}

    def __init__(self, width=4, act='relu', gate=False, split='two', strides=None, out_indices=None):
        super().__init__()
        self.gate, self.split = gate, split
        self.stem, self.stage = (
            ConvNormAct(3, width, stride=2, act=act),
            ConvNormAct(width, 2 * width, stride=2, act=act),
        )
        if gate:
            self.scale = nn.Conv2d(2 * width, 2 * width, 1)
        self.set_trunk(
            dict(stem=['stem'], stage=['stage']),
            [feature_row(width, 2, 'stem'), feature_row(2 * width, 4, 'stage')],
            strides,
            out_indices,
        )

    @staticmethod
    def canonical(config):
        return config | dict(gate={'all': True}.get(config['gate'], config['gate']))


def split_to(model, value):
    model = copy.deepcopy(model)
    model.split = value
    return model


mini = partial(WeightRecord, 'mini', publisher='us')
renames = (r'\.bn\.', '.norm.'), (r'^first\.', 'stem.'), (r'^second\.', 'stage.')


@pytest.fixture
def rows(monkeypatch):
    "A registry with the family `mini` in it, without records."
    registry.list_backbones()  # what is found while the registry is patched would be lost afterwards
    monkeypatch.setattr(registry.REGISTRY, 'entries', dict(registry.REGISTRY.entries))
    monkeypatch.setattr(registry.REGISTRY, 'callbacks', [])
    monkeypatch.setattr(published.WEIGHTS, 'records', dict(published.WEIGHTS.records))
    monkeypatch.setattr(Mini, 'conversions', dict(split=split_to))
    register('mini', Mini, dict(plain={}, theirs=dict(act='silu')))
    return published.WEIGHTS.records


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "torch.hub's cache, empty."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


def publish(net):
    "The state dict of a `Mini` as its publisher keeps it, with a classifier."
    keys = lambda k: k.replace('.norm.', '.bn.').replace('stem.', 'first.').replace('stage.', 'second.')
    return {keys(k): v for k, v in net.state_dict().items()} | {
        'fc.weight': torch.randn(10, 8),
        'fc.bias': torch.randn(10),
    }


def write(sd, path):
    (save_file if path.suffix == '.safetensors' else torch.save)(sd, path)
    return path


@pytest.fixture
def net(rows):
    return randomize_(create_backbone('mini', variant='theirs')).eval()


@pytest.fixture
def record(net, tmp_path):
    f = write(publish(net), tmp_path / 'mini-w.pth')
    return mini(
        'w1',
        url=f.as_uri(),
        sha256=sha(f),
        license='MIT',
        metrics={'acc@1': 70.0},
        config=dict(variant='theirs'),
        renames=renames,
        drop=(r'^fc\.',),
    )


# --- a server


class Handler(SimpleHTTPRequestHandler):
    asked = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        if not self.path.startswith('/cut/'):
            return super().do_GET()
        body = Path(
            self.translate_path(self.path.removeprefix('/cut'))
        ).read_bytes()  # a connection that breaks half-way
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True


@pytest.fixture
def server(tmp_path):
    asked = []
    s = ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(type('H', (Handler,), dict(asked=asked)), directory=str(tmp_path))
    )
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url, s.asked = f'http://127.0.0.1:{s.server_address[1]}', asked
    yield s
    s.shutdown()
    s.server_close()


# --- the path of a file


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('scheme', ['file', 'http'])
@pytest.mark.parametrize('digits', [8, 64, 0])
def test_a_file_from_its_publisher_to_the_maps(record, net, cache, server, tmp_path, suffix, scheme, digits):
    f = write(publish(net), tmp_path / f'w{suffix}')
    r = replace(
        record, url=f.as_uri() if scheme == 'file' else f'{server.url}/{f.name}', sha256=sha(f)[:digits] or None
    )
    m = create_backbone('mini', pretrained=r)
    assert (
        same(m.eval()(noise()), net(noise()))
        and list(cache.iterdir()) == [W.weights_path(r)]
        and W.weights_path(r).name.endswith(f.name)
    )
    assert (m.pretrained, m.record, m.config['act']) == ('w1', r, 'silu') and 'weights=w1' in repr(m)
    f.unlink()  # from now on there is the cache only
    n = len(server.asked)
    assert same(create_backbone('mini', pretrained=r).eval()(noise()), net(noise())) and len(server.asked) == n


@pytest.mark.parametrize('digits', [8, 64])
def test_wrong_hash(record, cache, digits):
    r = replace(record, sha256='0' * digits)
    with pytest.raises(
        RuntimeError, match=r"could not get the weights 'w1' of mini from file:.*invalid hash value.*pretrained=False"
    ) as e:
        fetch_weights(r)
    assert one_sentence(e) and not list(cache.iterdir())


def test_wrong_hash_in_the_cache(record, cache):
    path = fetch_weights(record)
    path.write_bytes(b'something else')
    with pytest.raises(RuntimeError, match=f'{path} has the hash .*, expected {record.sha256}.*delete it') as e:
        fetch_weights(record)
    assert one_sentence(e) and path.exists()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('hashed', [True, False])
def test_interrupted_download(record, net, cache, server, tmp_path, suffix, hashed):
    f = write(publish(net), tmp_path / f'w{suffix}')
    r = replace(record, url=f'{server.url}/cut/{f.name}', sha256=sha(f) if hashed else None)
    with pytest.raises(RuntimeError, match="could not get the weights 'w1' of mini from http:") as e:
        fetch_weights(r)
    assert one_sentence(e) and not list(cache.iterdir())
    assert fetch_weights(replace(r, url=f'{server.url}/{f.name}')).exists()  # the next try is not hurt by the first


def test_two_files_of_one_name(record, net, cache, tmp_path):
    files = [
        write(publish(o), (tmp_path / d).mkdir() or tmp_path / d / 'model.pth')
        for d, o in (('a', net), ('b', randomize_(copy.deepcopy(net), 1)))
    ]
    a, b = [create_backbone('mini', pretrained=replace(record, url=f.as_uri(), sha256=None)) for f in files]
    assert not torch.equal(a.stem.conv.weight, b.stem.conv.weight)


def test_no_such_file_and_no_network(record, cache, server):
    for url in (f'{server.url}/nothing.pth', 'http://127.0.0.1:9/w.pth', 'file:///nowhere/w.pth'):
        with pytest.raises(
            RuntimeError,
            match=f'from {url} .*check the {"path" if url[0] == "f" else "network"}, '
            f'or put that file at {cache}/.*pth, or build with pretrained=False',
        ) as e:
            create_backbone('mini', pretrained=replace(record, url=url))
        assert one_sentence(e) and not list(cache.iterdir())


def test_other_processes_load_a_folder_and_fetch_the_same_file(tmp_path, server):
    m = randomize_(create_backbone('vovnet19_slim_dw', strides=(4, 16))).eval()
    m.save_pretrained(tmp_path / 'm')
    torch.save(noise(), tmp_path / 'x.pt')
    f = write({str(i): torch.randn(100_000) for i in range(8)}, tmp_path / 'big.pth')
    code = f"""import os, torch; torch.hub.get_dir = lambda: {str(tmp_path / 'hub')!r}
from backbones_nb import from_pretrained
from backbones_nb.core.published import WeightRecord
from backbones_nb.core.weights import fetch_weights, read_weights
folder = {str(tmp_path)!r}
maps = from_pretrained(folder + '/m')(torch.load(folder + '/x.pt'))
torch.save([o.detach() for o in maps], folder + '/y.pt')
record = WeightRecord('x', 't', 'us', url='{server.url}/big.pth', sha256='{sha(f)}')
child = os.fork()
n = len(read_weights(fetch_weights(record)))
if not child: os._exit(n)
print(n, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)"""
    ok, out = run_script_quickly(code, tmp_path / 'log', timeout=120)
    assert ok and '\n8 8\n' in f'\n{out}' and same(torch.load(tmp_path / 'y.pt'), m(noise()))
    assert [o.name for o in (tmp_path / 'hub' / 'checkpoints').iterdir()] == ['big.pth'] and sha(
        tmp_path / 'hub' / 'checkpoints' / 'big.pth'
    ) == sha(f)


# --- what is in a file


def touch(path):
    Path(path).touch()


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return touch, (self.path,)


@pytest.mark.parametrize(
    'what,message',
    [
        (lambda p: dict(a=Evil(p)), 'contains the Python object .*touch.*unpickling objects can run arbitrary code'),
        (lambda p: nn.Conv2d(3, 3, 1), 'contains the Python object'),
        (lambda p: dict(a=torch.zeros(1), epoch=3), 'holds epoch, expected a state dict'),
        (lambda p: [torch.zeros(1)], 'holds list'),
        (lambda p: {}, 'holds nothing'),
        (lambda p: torch.zeros(3), 'holds Tensor'),
    ],
)
def test_files_that_are_refused(tmp_path, cache, record, what, message):
    torch.save(what(tmp_path / 'ran'), tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=message) as e:
        read_weights(tmp_path / 'w.pth')
    assert one_sentence(e)
    for hashed in (sha(tmp_path / 'w.pth'), None):
        with pytest.raises((ValueError, RuntimeError), match=message) as e:
            create_backbone('mini', pretrained=replace(record, url=(tmp_path / 'w.pth').as_uri(), sha256=hashed))
        assert one_sentence(e)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'w.bin'])
@pytest.mark.parametrize('body', [b'', b'<html>not found</html>', bytes(range(256)) * 10])
def test_files_that_are_none(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ValueError, match=f'{name} cannot be read as weights') as e:
        read_weights(tmp_path / name)
    assert one_sentence(e) and 'weights_only' not in str(e.value) and len(str(e.value)) < 250


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_state_dict_beside_other_things(tmp_path, key):
    sd = {'a': torch.arange(3.0)}
    torch.save({key: sd, 'epoch': 7} if key else sd, tmp_path / 'w.pth')
    assert torch.equal(read_weights(tmp_path / 'w.pth')['a'], sd['a'])


# --- from their keys to ours


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda sd: sd.pop('second.conv.weight'), r'1 missing \(stage.conv.weight\)'),
        (lambda sd: sd.update(extra=torch.zeros(1)), r'1 unexpected \(extra\)'),
        (
            lambda sd: sd.update({'first.conv.weight': torch.zeros(5, 3, 3, 3)}),
            r'1 of another shape \(stem.conv.weight\)',
        ),
    ],
)
def test_nothing_is_left_random(record, net, cache, tmp_path, change, message):
    sd = publish(net)
    change(sd)
    f = write(sd, tmp_path / 'w.pth')
    with pytest.raises(
        RuntimeError, match=f"the weights 'w1' of mini do not fit the model, with .*{message}.*variant='theirs'"
    ) as e:
        create_backbone('mini', pretrained=replace(record, url=f.as_uri(), sha256=None))
    assert one_sentence(e)


def test_counters_of_batches_may_be_missing(record, net, cache, tmp_path):
    f = write({k: v for k, v in publish(net).items() if 'num_batches' not in k}, tmp_path / 'w.pth')
    assert same(
        create_backbone('mini', pretrained=replace(record, url=f.as_uri(), sha256=None)).eval()(noise()), net(noise())
    )


def turned(sd):
    return {k: -v if k == 'stem.conv.weight' else v for k, v in sd.items()}


def test_conversion_and_colliding_renames(record, net, cache):
    m = create_backbone('mini', pretrained=replace(record, convert=turned))
    assert torch.equal(m.stem.conv.weight, -net.stem.conv.weight) and torch.equal(
        m.stage.conv.weight, net.stage.conv.weight
    )
    with pytest.raises(ValueError, match="give two tensors the name 'x.weight'"):
        W.fit_weights({'a.weight': 0, 'b.weight': 0}, replace(record, renames=((r'^\w', 'x'),)))


# --- which weights


def test_true_takes_the_best_with_a_license(rows, record):
    add_weights(
        replace(record, tag='low', metrics={'acc@1': 60.0}),
        replace(record, tag='unknown', metrics={}),
        replace(record, tag='free', license=None, metrics={'acc@1': 90.0}),
        record,
    )
    assert (
        pick_weights('mini').tag == 'w1'
        and pick_weights('mini', 'free').tag == 'free'
        and [r.tag for r in weight_records('mini')] == ['low', 'unknown', 'free', 'w1']
    )


def test_adding_again_replaces(rows, record):
    add_weights(record, replace(record, license=None), replace(record, config={}))
    assert [(r.license, r.config) for r in weight_records('mini')] == [(None, record.config), ('MIT', {})]


@pytest.mark.parametrize(
    'pretrained,error,message',
    [
        (True, ValueError, "mini has no weights with a stated license.*pass the tag: pretrained='a' or 'b'"),
        (
            'c',
            ValueError,
            r"mini has no weights 'c', only 'a' \(us, license not stated\), 'b' \(us, license not stated\): choose one",
        ),
        (3, TypeError, 'got pretrained=3, expected True'),
        (['a'], TypeError, 'pretrained='),
        (
            WeightRecord('other', 'a', 'us', url='file:///w'),
            ValueError,
            "record for other, expected one for mini: weight_records",
        ),
    ],
)
def test_requests_that_cannot_be_met(rows, net, pretrained, error, message):
    add_weights(
        mini('a', url='file:///a'), mini('b', url='file:///b'), mini('b', url='file:///b2', config=dict(gate=True))
    )
    with pytest.raises(error, match=message) as e:
        create_backbone('mini', pretrained=pretrained)
    assert one_sentence(e)


def test_no_weights_at_all(rows):
    for pretrained in (True, 'vt'):
        with pytest.raises(ValueError, match='mini has no published weights.*pretrained=False'):
            create_backbone('mini', pretrained=pretrained)
    with pytest.raises(ValueError, match='have neither a url nor a hub_id'):
        fetch_weights(mini('a'))


def test_arguments_that_repeat_and_those_that_contradict(record, net, cache):
    for kw in (
        {},
        dict(variant='theirs'),
        dict(act='silu'),
        dict(variant='theirs', width=4, gate=False),
        dict(strides=4),
        dict(out_indices=1),
    ):
        m = create_backbone('mini', pretrained=record, **kw)
        m.select((2, 4))
        net.select((2, 4))
        assert same(m.eval()(noise()), net(noise()))
    for kw, args in (
        (dict(variant='plain'), "variant='plain'"),
        (dict(act='relu'), "act='relu'"),
        (dict(variant='theirs', width=8), 'width=8'),
        (dict(gate='all', act='silu'), "gate='all'"),
    ):
        with pytest.raises(
            ValueError, match=f"mini has no weights 'w1' for {args}, they were made for variant='theirs': leave .* out"
        ) as e:
            create_backbone('mini', pretrained=record, **kw)
        assert one_sentence(e)
    with pytest.raises(TypeError, match="takes no argument 'acts'"):
        create_backbone('mini', pretrained=record, acts='relu')
    with pytest.raises(ValueError, match="has no variant 'thiers'"):
        create_backbone('mini', pretrained=record, variant='thiers')


def test_several_records_with_one_tag(rows, record):
    gated = replace(record, config=dict(variant='theirs', gate=True))
    add_weights(record, gated)
    pick = lambda **kw: pick_weights('mini', 'w1', kw)
    assert (
        pick() == record
        and pick(gate=False) == record
        and pick(gate=True) == gated
        and pick(gate='all') == gated
        and pick(variant='theirs') == record
        and pick(variant='theirs', gate='all') == gated
    )
    with pytest.raises(
        ValueError, match="for gate=3, they were made for variant='theirs' or variant='theirs', gate=True"
    ):
        pick(gate=3)


def test_exact_conversion(rows, record, net, cache):
    m = create_backbone('mini', pretrained=record, split='one')
    assert (
        m.split == 'one'
        and m.config['split'] == 'one'
        and (m.name, m.pretrained, m.record) == ('mini', 'w1', record)
        and same(m.eval()(noise()), net(noise()))
    )
    add_weights(replace(record, tag='a'), replace(record, tag='a', config=dict(variant='theirs', split='one')))
    assert (
        pick_weights('mini', 'a', dict(split='one')).config['split'] == 'one'
    )  # no conversion where there is one that agrees
    with pytest.raises(ValueError, match="for width=8"):
        pick_weights('mini', 'a', dict(split='one', width=8))


# --- records


@pytest.mark.parametrize(
    'kw,message',
    [
        (dict(url='a', hub_id='b'), 'got both a url and a hub_id'),
        (dict(url='a', sha256='123'), "got sha256='123'"),
        (dict(url='a', sha256='ABCDEF01'), 'lower case'),
        (dict(url='/home/w.pth'), "got url='/home/w.pth' .*as_uri"),
    ],
)
def test_records_that_are_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        mini('a', **kw)


def test_unknown_is_shown_as_unknown(rows, record):
    add_weights(record, mini('x', url='file:///x'))
    t = list_weights('mini')
    assert [(r['license'], r['input_size'], r['sha256']) for r in t] == [
        ('MIT', None, record.sha256),
        (None, None, None),
    ]
    assert repr(t).splitlines()[3].split() == ['mini', 'x', 'us', 'none', 'stated', 'unknown', 'unknown', 'unknown']


def test_every_record_belongs_to_a_row_that_it_can_build():
    names = {o['name'] for o in list_weights()}
    assert names
    for n in names:
        for r in weight_records(n):
            entry = registry.REGISTRY.entries[n]
            assert (
                r.name == n
                and r.source
                and published.config_conflicts(r, {}) == {}
                and set(r.config) <= {'variant', *entry.full_config()}
            )
            assert r.license is None or isinstance(r.license, str)
            pickle.loads(pickle.dumps(r))
            if 'pretrained' not in registry.inspect.signature(entry.build).parameters:
                assert pick_weights(n, r.tag, r.config).config == r.config


def test_timm_records():
    t = list_weights('timm/resnet18')
    assert 'a1_in1k' in [r['tag'] for r in t] and all(r['name'].startswith('timm/resnet18.') for r in t)
    assert not [r for r in list_weights('*resnet18*') if r['publisher'] == 'timm' and r['name'].startswith('timm/')]


def test_a_record_for_a_net_of_timm(cache, tmp_path):
    from backbones_nb.backbones.timm_weights import timm_record

    ref = randomize_(timm.create_model('resnet10t')).eval()
    f = write(ref.state_dict(), tmp_path / 'w.safetensors')
    r = replace(timm_record('resnet10t.c3_in1k'), hub_id=None, url=f.as_uri(), sha256=sha(f))
    m = create_backbone('timm/resnet10t', pretrained=r, strides=32).eval()
    assert torch.equal(m(noise(64))[0], ref.forward_features(noise(64))) and (m.pretrained, m.record) == ('c3_in1k', r)
    with pytest.raises(RuntimeError, match='invalid hash value|has the hash'):
        create_backbone('timm/resnet10t', pretrained=replace(r, sha256='0' * 64))
    with pytest.raises(ValueError, match='record for timm/resnet10t.c3_in1k, expected one for timm/resnet18'):
        create_backbone('timm/resnet18', pretrained=r)


# --- a published net of ours, through the real path


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_cspdarknet53_as_timm_publishes_it(cache, tmp_path, suffix, slow_run):
    with constant_init():
        ref = timm.create_model('cspdarknet53')
    randomize_(ref, x=noise(64, 2)).eval()
    f = write(ref.state_dict(), tmp_path / f'w{suffix}')
    r = replace(pick_weights('cspdarknet53'), hub_id=None, url=f.as_uri(), sha256=sha(f))
    with torch.no_grad():
        want = ref.forward_features(noise(64))
        for kw in ({}, dict(split='convs')) if suffix == '.pth' or slow_run else ({},):
            m = create_backbone('cspdarknet53', pretrained=r, strides=32, **kw).eval()
            assert rel_error(m(noise(64))[0], want) <= 1e-5
        split = kw.get('split', 'slice')
    assert (m.name, m.config['split'], m.pretrained, m.record) == ('cspdarknet53', split, r.tag, r)


# --- Hugging Face's hub, imitated by a server here


class FakeHub(Handler):
    "GET and HEAD of /USER/REPO/resolve/main/FILE, with the headers that the hub's client needs."

    commit = 'a' * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append((self.command, self.path))
        repo, _, name = self.path.partition('/resolve/main/')
        f = Path(self.directory) / repo.strip('/') / name
        if not f.is_file():
            self.send_response(404)
            self.send_header('X-Error-Code', 'EntryNotFound' if f.parent.is_dir() else 'RepoNotFound')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        body = f.read_bytes()
        etag = (f.parent / 'etag').read_text() if (f.parent / 'etag').exists() else hashlib.sha256(body).hexdigest()
        self.send_response(200)
        for k, v in {
            'Content-Length': len(body),
            'ETag': f'"{etag}"',
            'X-Repo-Commit': self.commit,
            'X-Linked-Size': len(body),
        }.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    "A folder that is served as the hub; the hub's cache is empty and the network on."
    from huggingface_hub import constants

    (tmp_path / 'hf').mkdir()
    asked = []
    s = ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(type('H', (FakeHub,), dict(asked=asked)), directory=str(tmp_path / 'hf'))
    )
    threading.Thread(target=s.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{s.server_address[1]}'
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hfcache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'is_offline_mode', lambda: False)
    yield type('Hub', (), dict(folder=tmp_path / 'hf', cache=tmp_path / 'hfcache', asked=asked, constants=constants))
    s.shutdown()
    s.server_close()


@pytest.fixture
def hubrecord(record, net, hf):
    (hf.folder / 'us' / 'mini.w1').mkdir(parents=True)
    write(publish(net), hf.folder / 'us' / 'mini.w1' / 'model.safetensors')
    return replace(record, url=None, sha256=None, hub_id='us/mini.w1')


def test_from_the_hub_and_from_its_cache(hubrecord, net, hf, monkeypatch):
    assert same(create_backbone('mini', pretrained=hubrecord).eval()(noise()), net(noise()))
    path = fetch_weights(hubrecord)
    assert path.is_relative_to(hf.cache) and Path(os.readlink(path)).name == sha(path)
    n = len(hf.asked)
    monkeypatch.setattr(hf.constants, 'is_offline_mode', lambda: True)
    assert (
        same(create_backbone('mini', pretrained=replace(hubrecord, sha256=sha(path))).eval()(noise()), net(noise()))
        and len(hf.asked) == n
    )


def test_the_hash_that_the_hub_states(hubrecord, hf):
    (hf.folder / 'us' / 'mini.w1' / 'etag').write_text('0' * 64)
    with pytest.raises(
        RuntimeError,
        match="weights 'w1' of mini from https://huggingface.co/us/mini.w1/.*model.safetensors "
        'has the hash .*, but the hub states 00000000: it was deleted',
    ) as e:
        fetch_weights(hubrecord)
    assert one_sentence(e) and not list(hf.cache.rglob('*.safetensors')) and not list(hf.cache.rglob('0' * 64))


def test_the_hash_of_the_record_and_a_damaged_cache(hubrecord, hf):
    with pytest.raises(RuntimeError, match='expected 11111111'):
        fetch_weights(replace(hubrecord, sha256='1' * 64))
    assert not list(hf.cache.rglob('*.safetensors'))
    path = fetch_weights(hubrecord)
    with pytest.raises(RuntimeError, match='expected 11111111'):
        fetch_weights(replace(hubrecord, sha256='1' * 64))
    assert path.exists()  # it was there before, and it is what the hub states
    path.resolve().write_bytes(b'damaged')
    with pytest.raises(RuntimeError, match='was deleted'):
        fetch_weights(hubrecord)
    assert len(read_weights(fetch_weights(hubrecord))) > 3  # and it is fetched again


@pytest.mark.parametrize('change', [dict(hub_id='us/nothing'), dict(filename='nothing.safetensors')])
def test_not_on_the_hub(hubrecord, change):
    with pytest.raises(
        RuntimeError,
        match="could not get the weights 'w1' of mini from https://huggingface.co/us/.*nothing.*"
        'hf download us/.*pretrained=False',
    ) as e:
        fetch_weights(replace(hubrecord, **change))
    assert one_sentence(e)


def test_offline(hubrecord, hf, monkeypatch):
    monkeypatch.setattr(hf.constants, 'is_offline_mode', lambda: True)
    with pytest.raises(
        RuntimeError, match=r'\(it is not cached and the hub cannot be reached\): check the network'
    ) as e:
        create_backbone('mini', pretrained=hubrecord)
    assert one_sentence(e) and not hf.asked


# --- save_pretrained and from_pretrained

slim = dict(outs=(8, 16, 24, 32, 40), stem=8)
saved = {
    'darknet19': slim,
    'darknet53': dict(variant='timm', blocks=(1, 1, 1, 1, 1), strides=(1, 32)) | slim,
    'cspdarknet53': dict(variant='timm', split='convs', blocks=(1, 1, 1, 1, 1)) | slim,
    'cspdarknet19': dict(split='slice') | slim,
    'vovnet19_slim_dw': dict(strides=(8, 16)),
    'vovnet27_slim': dict(variant='vt', act=nn.SiLU),
    'resnet18': dict(strides=(2, 4)),
    'resnet18_fpn': dict(channels=32, norm='bn', strides=(8, 64)),
    'timm/resnet10t': dict(out_indices=(2, 3)),
    'timm/vit_tiny_patch16_224': dict(img_size=64, depth=2),
    'timm/test_resnet.r160_in1k': {},
}


@pytest.mark.parametrize('name', saved)
def test_round_trip(tmp_path, name):
    m = randomize_(create_backbone(name, **saved[name]), x=noise(64)).eval()
    want = m(noise(64))
    m.save_pretrained(tmp_path / 'a')
    assert {o.name for o in (tmp_path / 'a').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    for n in (
        from_pretrained(tmp_path / 'a'),
        type(m).from_pretrained(tmp_path / 'a'),
        Backbone.from_pretrained(str(tmp_path / 'a')),
    ):
        assert (
            type(n) is type(m)
            and (n.name, n.strides, n.channels, n.pretrained, n.record) == (m.name, m.strides, m.channels, None, None)
            and not n.training
        )
        assert same(n(noise(64)), want) and hub.hub_config(n) == hub.hub_config(m)
    n.save_pretrained(tmp_path / 'b')
    assert all(
        (tmp_path / 'a' / o).read_bytes() == (tmp_path / 'b' / o).read_bytes()
        for o in ('config.json', 'README.md', 'model.safetensors')
    )
    s = n.strides[0]
    assert from_pretrained(tmp_path / 'a', strides=s).strides == (s,)


def test_weights_are_remembered(record, net, cache, tmp_path):
    create_backbone('mini', pretrained=record, strides=4).save_pretrained(tmp_path / 'm')
    n = from_pretrained(tmp_path / 'm')
    assert (n.pretrained, n.record, n.strides) == ('w1', record, (4,)) and 'weights=w1' in repr(n)
    n.freeze_to(1).train()
    assert not n.stem.norm.training  # what freezing does depends on it
    b = attach_neck(n, channels=8)
    assert (b.pretrained, b.record) == ('w1', record)


def test_both_parts_of_a_body_with_a_neck_remember_their_weights(tmp_path):
    m = create_backbone('resnet18_fpn', channels=8)
    m.pretrained = m.body.pretrained = 'pets'
    m.save_pretrained(tmp_path / 'm')
    n = from_pretrained(tmp_path / 'm')
    assert (n.pretrained, n.body.pretrained, n.record) == ('pets', 'pets', None)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_tensors(rows, tmp_path, dtype):
    m = randomize_(create_backbone('mini')).to(dtype).eval()
    copy.deepcopy(m).to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    n = from_pretrained(tmp_path)
    assert (
        n.stem.conv.weight.dtype == dtype
        and n.stem.norm.num_batches_tracked.dtype == torch.int64
        and same(m(noise().to(dtype)), n(noise().to(dtype)))
    )


def test_a_class_without_a_name(tmp_path):
    m = randomize_(Mini(6, act=partial(nn.LeakyReLU, 0.2), strides=2)).eval()
    assert m.name is None and m.config['width'] == 6
    m.save_pretrained(tmp_path)
    for n in (Mini.from_pretrained(tmp_path), from_pretrained(tmp_path)):
        assert type(n) is Mini and same(n(noise()), m(noise())) and n.config['act'].args == (0.2,)


def test_copies_keep_what_is_needed(tmp_path):
    m = randomize_(create_backbone('darknet19', variant='cfg', strides=8, **slim)).eval()
    odd = pickle.loads(
        pickle.dumps(Mini(act=partial(lambda: nn.ReLU())))
    )  # a lambda does not stop a copy, only the saving
    with pytest.raises(ValueError, match='got act=.*lambda.*cannot be written'):
        odd.save_pretrained(tmp_path / 'odd')
    for i, o in enumerate((copy.deepcopy(m), pickle.loads(pickle.dumps(m)), copy.copy(m))):
        assert o.config == m.config
        o.save_pretrained(tmp_path / str(i))
        assert same(from_pretrained(tmp_path / str(i))(noise()), m(noise()))
    assert same(torch.export.export(from_pretrained(tmp_path / '0'), (noise(),)).module()(noise()), m(noise()))


class Odd(nn.Module):
    pass


@pytest.mark.parametrize(
    'make,message',
    [
        (
            lambda: create_backbone('darknet19', act=lambda: nn.ReLU()),
            'got act=<function .*cannot be written to config.json',
        ),
        (
            lambda: create_backbone('darknet19', norm=partial(lambda n: nn.BatchNorm2d(n))),
            'got norm=.*cannot be written to config.json',
        ),
        (lambda: Mini(act=Odd), 'got act=.*Odd.*cannot be written'),
        (
            lambda: attach_neck(create_backbone('resnet18'), channels=8),
            'got a WithNeck that was built from modules.*register a function',
        ),
        (lambda: create_backbone(nn.Conv2d(3, 4, 3, 2, 1)), 'got a WrappedBackbone that was built from modules'),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as e:
        make().save_pretrained(tmp_path / 'm')
    assert one_sentence(e) and not (tmp_path / 'm').exists()


@pytest.mark.parametrize(
    'value',
    [
        None,
        True,
        3,
        0.5,
        'relu',
        (1, 2, (3,)),
        dict(a=(1, 2)),
        nn.SiLU,
        partial(nn.GELU, approximate='tanh'),
        partial(nn.GroupNorm, 8),
    ],
)
def test_arguments_through_json(value):
    back = config.decode(json.loads(json.dumps(config.encode(value))))
    assert config.comparable(back) == config.comparable(value) and type(back) is type(value)


@pytest.mark.parametrize(
    'layer', ['os.system', 'functional', 'Parameter', '__builtins__', 'NoSuchLayer', 'init', '__import__', 3]
)
def test_a_file_cannot_name_other_code(layer):
    with pytest.raises(ValueError, match='expected the name of a class in torch.nn'):
        config.decode({'torch.nn': layer, 'args': ['touch /tmp/x'], 'kwargs': {}})


@pytest.mark.parametrize(
    'spec,error,message',
    [
        (None, ValueError, 'without a config.json'),
        ('{', RuntimeError, 'JSONDecodeError'),
        (
            dict(architecture='resnet18'),
            ValueError,
            r"another library for resnet18.*create_backbone\('timm/resnet18'\)",
        ),
        (dict(hidden=3), ValueError, 'another library'),
        (dict(name='nothing19', kind='a.B'), ValueError, 'config.json for nothing19, which is not registered'),
        (dict(name=None, kind='os.system'), ValueError, 'config.json for os.system, which is not registered'),
        (dict(arguments=dict(depth=3)), ValueError, "could not build darknet19 as version .*depth.*: use that version"),
        (dict(channels=[1]), ValueError, 'with channels .*use version'),
        (
            dict(name='darknet53', arguments={}),
            RuntimeError,
            'model.safetensors does not hold the weights of darknet53',
        ),
    ],
)
def test_folders_that_are_wrong(tmp_path, spec, error, message):
    create_backbone('darknet19', strides=4, **slim).save_pretrained(tmp_path)
    f = tmp_path / 'config.json'
    if spec is None:
        f.unlink()
    elif isinstance(spec, str):
        f.write_text(spec)
    else:
        f.write_text(
            json.dumps((json.loads(f.read_text()) if set(spec) & {'name', 'arguments', 'channels'} else {}) | spec)
        )
    with pytest.raises(error, match=message) as e:
        from_pretrained(tmp_path)
    assert one_sentence(e)


def test_other_mistakes(tmp_path):
    create_backbone('darknet19', strides=4, **slim).save_pretrained(tmp_path / 'm')
    with pytest.raises(ValueError, match='got a Darknet, expected a Mini'):
        Mini.from_pretrained(tmp_path / 'm')
    with pytest.raises(TypeError, match='takes no argument act'):
        from_pretrained(tmp_path / 'm', act='relu')
    with pytest.raises(ValueError, match='has no map at stride 64'):
        from_pretrained(tmp_path / 'm', strides=64)
    for f in (tmp_path / 'nothing', 'us/nothing'):
        with pytest.raises(
            RuntimeError, match='could not load .*nothing.*expected a folder written by save_pretrained'
        ) as e:
            from_pretrained(f)
        assert one_sentence(e)
    w = tmp_path / 'm' / 'model.safetensors'
    w.write_bytes(w.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match='does not hold the weights of darknet19') as e:
        from_pretrained(tmp_path / 'm')
    assert one_sentence(e)
    w.unlink()
    with pytest.raises(RuntimeError, match='could not load|does not hold'):
        from_pretrained(tmp_path / 'm')


# --- the card


def test_the_card_says_what_is_known(record, net, cache, tmp_path):
    create_backbone('mini', pretrained=replace(record, hub_id=None, mean=(0.5, 0.5, 0.5))).save_pretrained(tmp_path)
    card = hub.ModelCard.load(tmp_path / 'README.md')
    assert (
        card.data.license == 'mit'
        and card.data.library_name == 'backbones-nb'
        and '| acc@1 | 70.0 % |' in card.text
        and '| std | unknown |' in card.text
        and 'from_pretrained(' in card.text
    )
    create_backbone('mini', pretrained=replace(record, license=None)).save_pretrained(
        tmp_path
    )  # another model in the same folder
    card = hub.ModelCard.load(tmp_path / 'README.md')
    assert card.data.license is None and '| license | none stated |' in card.text
    (tmp_path / 'README.md').write_text('mine')
    create_backbone('mini').save_pretrained(tmp_path)
    assert (tmp_path / 'README.md').read_text() == 'mine'
    assert 'started from random weights' in hub.card_text(hub.hub_config(create_backbone('mini')))


# --- to the hub and back


class FakeApi:
    pushed = {}

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, private=None, exist_ok=False):
        return type('Repo', (), dict(repo_id=repo_id))

    def upload_folder(self, repo_id, folder_path, **kw):
        FakeApi.pushed = dict(
            repo_id=repo_id, files={o.name: o.read_bytes() for o in Path(folder_path).iterdir()}, **kw
        )
        return f'https://huggingface.co/{repo_id}/commit/1'


def test_push_and_load_by_id(record, net, cache, hf, monkeypatch):
    monkeypatch.setattr('huggingface_hub.hub_mixin.HfApi', FakeApi)
    m = create_backbone('mini', pretrained=record)
    assert m.push_to_hub('us/shared', commit_message='first') == 'https://huggingface.co/us/shared/commit/1'
    p = FakeApi.pushed
    assert (
        p['repo_id'] == 'us/shared'
        and p['commit_message'] == 'first'
        and set(p['files']) == {'model.safetensors', 'config.json', 'README.md'}
        and b"from_pretrained('us/shared')" in p['files']['README.md']
    )
    (hf.folder / 'us' / 'shared').mkdir(parents=True)
    for k, v in p['files'].items():
        (hf.folder / 'us' / 'shared' / k).write_bytes(v)
    for ask in range(2):  # the second time from the hub's cache
        n = from_pretrained('us/shared', strides=4)
        assert same(n(noise()), m.select(4).eval()(noise())) and (n.pretrained, n.record) == ('w1', record)
        monkeypatch.setattr(hf.constants, 'is_offline_mode', lambda: True)
    with pytest.raises(RuntimeError, match="could not load 'us/other'"):
        from_pretrained('us/other')


def test_damaged_on_the_hub(net, hf):
    net.save_pretrained(hf.folder / 'us' / 'damaged')
    (hf.folder / 'us' / 'damaged' / 'etag').write_text('0' * 64)
    with pytest.raises(RuntimeError, match='model.safetensors has the hash .*, but the hub states 00000000'):
        from_pretrained('us/damaged')


@pytest.mark.parametrize('name', ['vovnet39', 'resnet18', 'timm/resnet18', 'resnet18_fpn'])
def test_an_empty_tag_is_not_random_weights(name):
    with pytest.raises(ValueError, match="got pretrained='' for .*expected True, False, the tag"):
        create_backbone(name, pretrained='')


# --- what is cleared is found again


def test_a_lookup_after_clear_discovers_again(monkeypatch):
    reg, index = registry.REGISTRY, published.WEIGHTS
    for o in (reg, index):  # back to what other tests know
        for k, v in vars(o).items():
            monkeypatch.setattr(o, k, v.copy() if isinstance(v, (dict, set, list)) else v)
    names, timm_names = registry.list_backbones(), registry.list_backbones('timm/resnet*')
    records = {n: published.weight_records(n) for n in (*names, 'timm/resnet18')}
    n_callbacks = len(reg.callbacks)
    register('registered_by_hand', Mini)
    reg.clear()
    index.clear()
    assert not reg.entries and not index.records and not index.finders
    assert published.weight_records('vovnet39') == records['vovnet39']  # without asking the registry first
    assert {n: published.weight_records(n) for n in records} == records
    assert registry.list_backbones() == names and registry.list_backbones('timm/resnet*') == timm_names
    assert 'registered_by_hand' not in reg and len(reg.callbacks) == n_callbacks
    assert create_backbone('vovnet19_slim').name == 'vovnet19_slim'
