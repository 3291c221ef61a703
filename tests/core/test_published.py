import dataclasses
import functools
import hashlib
import math
import re
from collections import OrderedDict
from itertools import pairwise

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from backbones_nb.backbones import vovnet as V
from backbones_nb.backbones.csp_convert import convert_split
from backbones_nb.analysis.parity import assert_parity, randomize_
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones
from backbones_nb.core.published import list_weights, pick_weights, weight_records
from backbones_nb.core.weights import find_misfits, fit_weights

pytestmark = pytest.mark.usefixtures('constant_init')
five = (2, 4, 8, 16, 32)
names = [n for n in list_backbones() if re.match('(cspdark|dark|vov)net', n)]
records = [r for n in names for r in weight_records(n)]


def file_of(r):
    return r.hub_id.split('/')[1] if r.hub_id else r.url.rsplit('/', 1)[1].removesuffix('.pth')


rows = {file_of(r): r for r in records}
of_timm, of_vt = ([k for k, r in rows.items() if r.publisher == p] for p in ('timm', 'vision-toolbox'))

# --- what is published
# top-1 at the input size, input size, our name, what tells the configuration from the name's default

timm_rows = {
    'darknet53.c2ns_in1k': (80.01, 256, 'darknet53'),
    'cspdarknet53.ra_in1k': (80.08, 256, 'cspdarknet53'),
    'ese_vovnet19b_dw.ra_in1k': (76.83, 224, 'vovnet19_dw'),
    'ese_vovnet39b.ra_in1k': (79.31, 224, 'vovnet39'),
    'ese_vovnet57b.ra4_e3600_r256_in1k': (82.46, 256, 'vovnet57'),
}
v1 = dict(ese=False)  # what vision-toolbox lists as V1, and has the identity all the same
vt_rows = {
    'darknet19-2cb641ca': (73.5, {}),
    'darknet53-94427f5b': (76.9, {}),
    'cspdarknet53-3bfa0423': (77.5, {}),
    'vovnet27_slim-dd43306a': (71.6, {}),
    'vovnet39-4c79d629': (78.2, v1),
    'vovnet57-ecb9cc34': (79.3, v1),
    'vovnet19_slim_ese-f8075640': (70.8, {}),
    'vovnet19_ese-a077657e': (75.4, {}),
    'vovnet39_ese-9ce81b0d': (78.1, {}),
    'vovnet57_ese-ae1a7f89': (79.2, {}),
    'vovnet99_ese-713f3062': (80.7, {}),
}


def test_every_published_file_has_a_row():
    assert set(of_timm) == set(timm_rows) and set(of_vt) == set(vt_rows) and len(rows) == len(records)


@pytest.mark.parametrize('file', timm_rows)
def test_rows_of_timm(file):
    r, (top1, px, name), card = rows[file], timm_rows[file], timm.get_pretrained_cfg(file)
    assert (r.name, r.tag, r.hub_id) == (name, card.tag, f'timm/{file}') and card.hf_hub_id.rstrip('/').split('/')[
        0
    ] == 'timm'
    assert (r.mean, r.std) == (card.mean, card.std) and r.input_size == card.input_size[-1] == px
    assert r.resize_size == math.floor(px / card.crop_pct) and r.license.lower() == card.license
    assert r.metrics['acc@1'] == top1 and r.config == {'variant': 'timm'} and r.sha256 is None


@pytest.mark.parametrize('file', vt_rows)
def test_rows_of_vision_toolbox(file):
    r, (top1, config) = rows[file], vt_rows[file]
    assert (
        r.tag == 'vt' and r.url == f'https://github.com/gau-nernst/vision-toolbox/releases/download/v0.0.1/{file}.pth'
    )
    assert r.name == file.split('-')[0].removesuffix('_ese') and r.sha256 == file.split('-')[1]
    assert (r.license, r.mean, r.std, r.input_size, r.resize_size) == (None, None, None, 224, 232)
    assert r.metrics['acc@1'] == top1 and r.config == {'variant': 'vt'} | config


# --- nets in vision-toolbox's layout of keys, written for this file


def unit(ni, nf, ks=3, stride=1):
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(ni, nf, ks, stride, ks // 2, bias=False), norm=nn.BatchNorm2d(nf), act=nn.ReLU())
    )


class Part(nn.Module):
    "Named children, and a function that says how the data goes through them."

    def __init__(self, way, **children):
        super().__init__()
        self.way = way
        for k, m in children.items():
            self.add_module(k, m)

    def forward(self, x):
        return self.way(self, x)


def pair(nf, mid):
    return Part(lambda m, x: x + m.conv2(m.conv1(x)), conv1=unit(nf, mid, 1), conv2=unit(mid, nf))


def pairs(n, nf, mid):
    return nn.Sequential(*[pair(nf, mid) for _ in range(n)])


def dark_stage(n, ni, nf):
    if not n:
        return unit(ni, nf, stride=2)
    return Part(lambda m, x: m.blocks(m.conv(x)), conv=unit(ni, nf, stride=2), blocks=pairs(n, nf, nf // 2))


def csp_stage(n, ni, nf):
    def way(m, x):
        x = m.conv(x)
        return m.out_conv(torch.cat([m.conv1(x), m.blocks(m.conv2(x))], 1))

    return Part(
        way,
        conv=unit(ni, nf, stride=2),
        conv1=unit(nf, nf // 2, 1),
        conv2=unit(nf, nf // 2, 1),
        blocks=pairs(n, nf // 2, nf // 2),
        out_conv=unit(nf, nf, 1),
    )


def osa(ni, mid, nf, layers, ese):
    def way(m, x):
        maps = [x]
        for o in m.convs:
            maps.append(o(maps[-1]))
        y = m.out_conv(torch.cat(maps, 1))
        if ese:
            y = y * ((m.ese.linear(y.mean((2, 3), keepdim=True)) + 3).clamp(0, 6) / 6)
        return x + y if ni == nf else y

    kw = dict(ese=nn.ModuleDict(dict(linear=nn.Conv2d(nf, nf, 1)))) if ese else {}
    return Part(
        way,
        convs=nn.ModuleList([unit(mid if i else ni, mid) for i in range(layers)]),
        out_conv=unit(ni + layers * mid, nf, 1),
        **kw,
    )


def osa_stage(n, ni, mid, nf, layers, ese):
    blocks = {f'module_{j}': osa(nf if j else ni, mid, nf, layers, ese) for j in range(n)}
    return nn.Sequential(OrderedDict(max_pool=nn.MaxPool2d(3, 2, 1), **blocks))


def maps_of(m, x, stem):
    maps = [m.stem(x)]
    for s in m.stages:
        maps.append(s(maps[-1]))
    return maps if stem else maps[1:]


def darknet_vt(blocks, stage):
    widths = (32, 64, 128, 256, 512, 1024)
    stages = [stage(n, *p) for n, p in zip(blocks, pairwise(widths))]
    return Part(lambda m, x: maps_of(m, x, False), stem=unit(3, 32), stages=nn.ModuleList(stages))


def vovnet_vt(blocks, layers=5, slim=False, ese=True):
    mids, outs = ((64, 80, 96, 112), (128, 256, 384, 512)) if slim else ((128, 160, 192, 224), (256, 512, 768, 1024))
    stages = [osa_stage(n, ni, mid, nf, layers, ese) for n, mid, (ni, nf) in zip(blocks, mids, pairwise((128, *outs)))]
    stem = nn.Sequential(unit(3, 64, stride=2), unit(64, 64), unit(64, 128))
    return Part(lambda m, x: maps_of(m, x, True), stem=stem, stages=nn.ModuleList(stages))


vt_nets = dict(
    darknet19=lambda: darknet_vt((0, 1, 1, 2, 2), dark_stage),
    darknet53=lambda: darknet_vt((1, 2, 8, 8, 4), dark_stage),
    cspdarknet53=lambda: darknet_vt((1, 2, 8, 8, 4), csp_stage),
    vovnet27_slim=lambda: vovnet_vt((1, 1, 1, 1), slim=True, ese=False),
    vovnet39=lambda: vovnet_vt((1, 1, 2, 2), ese=False),
    vovnet57=lambda: vovnet_vt((1, 1, 4, 3), ese=False),
    vovnet19_slim_ese=lambda: vovnet_vt((1, 1, 1, 1), 3, slim=True),
    vovnet19_ese=lambda: vovnet_vt((1, 1, 1, 1), 3),
    vovnet39_ese=lambda: vovnet_vt((1, 1, 2, 2)),
    vovnet57_ese=lambda: vovnet_vt((1, 1, 4, 3)),
    vovnet99_ese=lambda: vovnet_vt((1, 3, 9, 3)),
)

# --- each row, from a file in its publisher's format through the real path


@pytest.fixture
def serve(tmp_path, monkeypatch):
    "Saves a state dict as its publisher does, and gives a record that finds it in the temporary folder."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))

    def f(record, sd):
        path = tmp_path / (file_of(record) + ('.safetensors' if record.publisher == 'timm' else '.pth'))
        if record.publisher == 'timm':
            save_file({k: v.contiguous() for k, v in sd.items()}, path)
        else:
            torch.save(sd, path)
        digits = hashlib.sha256(path.read_bytes()).hexdigest()
        return dataclasses.replace(
            record, url=path.as_uri(), hub_id=None, sha256=digits[:8] if record.sha256 else digits
        )

    yield f
    for p in tmp_path.rglob('*'):
        if p.is_file():
            p.unlink()  # some have hundreds of megabytes


@functools.lru_cache(2)
def reference(file):
    "A net of the publisher with random weights, and the state dict that it would publish."
    if file in vt_rows:
        ref = randomize_(vt_nets[file.split('-')[0]]())
        return ref, ref.state_dict()
    full = timm.create_model(file, pretrained=False)
    maps = randomize_(
        timm.create_model(
            file, pretrained=False, features_only=True, out_indices=range(1, 6) if 'dark' in file else range(5)
        )
    )
    body = {re.sub(r'^(stem|stages)_', r'\1.', k): v for k, v in maps.state_dict().items()}
    assert {k for k in full.state_dict() if k not in body} == {'head.fc.weight', 'head.fc.bias'}
    full.load_state_dict(full.state_dict() | body, strict=True)
    return maps, full.state_dict()


# with values in every run: the smallest of each family, of both publishers, with and without eSE; the others are slow
quick = """cspdarknet53.ra_in1k ese_vovnet19b_dw.ra_in1k darknet19-2cb641ca vovnet27_slim-dd43306a
    vovnet19_slim_ese-f8075640""".split()


@pytest.mark.parametrize(
    'file', [o if o in quick else pytest.param(o, marks=pytest.mark.slow) for o in (*timm_rows, *vt_rows)]
)
def test_loads_and_equals(file, serve, slow_run):
    ref, sd = reference(file)
    record = serve(rows[file], sd)
    m = create_backbone(record.name, pretrained=record, strides=five)
    assert m.pretrained == record.tag and m.record == record and m.strides == five
    sizes = (64, (75, 101), 200) if slow_run else (64, (75, 101))
    assert len(assert_parity(m, ref, sizes=sizes, batch=1, tol=1e-5)) == 5 * len(sizes)


@pytest.mark.parametrize('file', [o for o in (*timm_rows, *vt_rows) if o not in quick])
def test_every_tensor_of_a_file_has_its_place(file, quick_meta):
    "The record's configuration, renames and what it drops, for nets whose values are compared in the slow run."
    record = rows[file]
    with torch.device('meta'):
        ref = vt_nets[file.split('-')[0]]() if file in vt_rows else timm.create_model(file, pretrained=False)
        m = create_backbone(record.name, **record.config)
    assert not find_misfits(m, fit_weights(ref.state_dict(), record))


small = dict(
    darknet19='darknet19-2cb641ca', cspdarknet53='cspdarknet53-3bfa0423', vovnet19_slim='vovnet19_slim_ese-f8075640'
)


@pytest.mark.parametrize('name', small)
def test_keys_of_2022_and_files_without_counters(name, serve):
    ref, sd = reference(small[name])
    old = {k.replace('.norm.', '.bn.'): v for k, v in sd.items() if not k.endswith('num_batches_tracked')}
    m = create_backbone(name, pretrained=serve(rows[small[name]], old), strides=five)
    assert_parity(m, ref, 64, batch=1, tol=1e-5)


@pytest.mark.parametrize(
    'change,says',
    [
        (lambda sd: sd.pop('stem.0.norm.bias'), 'stem.0.norm.bias'),
        (lambda sd: sd.update({'head.fc.bias': torch.zeros(9)}), 'head.fc.bias'),
        (
            lambda sd: sd.update({'stages.1.module_0.out_conv.conv.weight': torch.zeros(256, 112 + 3 * 80, 1, 1)}),
            'stages.1.blocks.0.concat.conv.weight',
        ),
    ],
    ids=('missing', 'unexpected', 'shape'),
)
def test_nothing_is_left_over(change, says, serve):
    sd = vt_nets['vovnet19_slim_ese']().state_dict()
    change(sd)
    with pytest.raises(RuntimeError, match='do not fit') as e:
        create_backbone('vovnet19_slim', pretrained=serve(rows['vovnet19_slim_ese-f8075640'], sd))
    assert says in str(e.value)


# --- what is asked for beside the weights


@pytest.fixture
def csp_of_timm(serve):
    ref, sd = reference('cspdarknet53.ra_in1k')
    return ref, serve(rows['cspdarknet53.ra_in1k'], sd)


def test_the_split_is_converted_exactly(csp_of_timm):
    ref, record = csp_of_timm
    one, two = (
        create_backbone('cspdarknet53', pretrained=record, strides=five, **kw) for kw in ({}, dict(split='convs'))
    )
    assert (
        'stages.0.split.both.conv.weight' in one.state_dict() and 'stages.0.split.cross.conv.weight' in two.state_dict()
    )
    assert (
        two.pretrained == 'ra_in1k' and two.record == record and two.strides == five and two.config['split'] == 'convs'
    )
    for k, v in convert_split(two.state_dict(), to='slice').items():
        assert torch.equal(v, one.state_dict()[k])
    assert_parity(two, ref, sizes=(64, (75, 101)), batch=1, tol=1e-5)  # one: test_loads_and_equals


def picked(name, pretrained, **config):
    r = pick_weights(name, pretrained, config)
    return file_of(r)


@pytest.mark.parametrize(
    'name,config,file',
    [
        ('vovnet39', {}, 'vovnet39_ese-9ce81b0d'),
        ('vovnet39', dict(ese=False), 'vovnet39-4c79d629'),
        ('vovnet57', dict(ese='all'), 'vovnet57_ese-ae1a7f89'),
        ('vovnet57', dict(variant='vt', ese=False, residual='same'), 'vovnet57-ecb9cc34'),
        ('vovnet39', dict(ese=False, residual=True), 'vovnet39-4c79d629'),
        ('vovnet27_slim', {}, 'vovnet27_slim-dd43306a'),
        ('vovnet27_slim', dict(ese=False), 'vovnet27_slim-dd43306a'),
        ('vovnet19', dict(residual=False, ese='last'), 'vovnet19_ese-a077657e'),
        ('darknet53', dict(act='relu'), 'darknet53-94427f5b'),
        ('cspdarknet53', dict(split='slice'), 'cspdarknet53-3bfa0423'),
    ],
    ids=str,
)
def test_the_tag_of_vision_toolbox(name, config, file):
    assert picked(name, 'vt', **config) == file


@pytest.mark.parametrize(
    'name,config,file',
    [
        ('darknet53', {}, 'darknet53.c2ns_in1k'),
        ('darknet53', dict(variant='timm'), 'darknet53.c2ns_in1k'),
        ('cspdarknet53', dict(split='convs'), 'cspdarknet53.ra_in1k'),
        ('vovnet19_dw', dict(ese=True), 'ese_vovnet19b_dw.ra_in1k'),
        ('vovnet19_dw', dict(variant='official'), 'ese_vovnet19b_dw.ra_in1k'),
        ('vovnet39', dict(ese='last'), 'ese_vovnet39b.ra_in1k'),
        ('vovnet57', dict(residual='same'), 'ese_vovnet57b.ra4_e3600_r256_in1k'),
    ],
    ids=str,
)
def test_true_takes_those_with_a_license(name, config, file):
    assert picked(name, True, **config) == file


@pytest.mark.parametrize(
    'name,kw,says',
    [
        ('vovnet39', dict(pretrained='vt', residual=False, ese=False), 'residual=False'),
        ('vovnet27_slim', dict(pretrained='vt', residual=False), 'residual=False'),
        ('vovnet39', dict(pretrained=True, variant='official'), "variant='timm'"),
        ('vovnet39', dict(pretrained=True, ese=True), "variant='timm'"),
        ('vovnet39', dict(pretrained='vt', pool='official'), "pool='official'"),
        ('vovnet99', dict(pretrained='vt', residual=False), 'residual=False'),
        ('vovnet19_slim', dict(pretrained='vt', outs=(112, 256, 384, 512)), 'outs='),
        ('darknet53', dict(pretrained=True, act='leaky_relu'), "act='leaky_relu'"),
        ('cspdarknet53', dict(pretrained=True, variant='cfg'), "variant='timm'"),
        ('cspdarknet53', dict(pretrained=True, order='blocks'), "order='blocks'"),
        ('cspdarknet53', dict(pretrained='vt', first='full'), "first='full'"),
        ('darknet53', dict(pretrained='coco'), "'c2ns_in1k'"),
        ('darknet19', dict(pretrained=True), "pretrained='vt'"),
        ('vovnet27_slim', dict(pretrained=True), "pretrained='vt'"),
        ('vovnet39', dict(pretrained=True, residual='identity'), "got residual='identity'"),
        ('vovnet39', dict(pretrained=True, blocks=(1, 1, 1)), '3 blocks'),
        ('cspdarknet19', dict(pretrained=True), 'no published weights'),
        ('vovnet19_slim_dw', dict(pretrained='vt'), 'no published weights'),
    ],
    ids=str,
)
def test_contradictions(name, kw, says):
    with pytest.raises(ValueError) as e:
        create_backbone(name, **kw)
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(  # vovnet57 has the stages of vovnet39 and vovnet99, with other numbers of blocks
    'name',
    [pytest.param(n, marks=[pytest.mark.slow] * (n == 'vovnet57')) for n in names if n.startswith('vovnet')],
)
def test_equal_nets_have_equal_configurations(name, quick_meta):
    conf, seen = (
        dict(stem=(64, 64, 128), mids=(128, 160, 192, 224), outs=(256, 512, 768, 1024), blocks=(1, 1, 1, 1)),
        {},
    )
    conf |= {k: v for k, v in V.vovnet_configs[name].items() if k in conf}
    for residual in (True, 'same', False):
        for ese in (True, 'all', 'last', False):
            with torch.device('meta'):
                m = create_backbone(name, residual=residual, ese=ese)
            net = str([[(b.residual, b.ese is not None) for b in s.blocks] for s in m.stages])
            c = V.VoVNet.canonical(conf | dict(residual=residual, ese=ese))
            assert str([[(bool(r), bool(e)) for r, e in zip(*o)] for o in zip(c['residual'], c['ese'])]) == net
            seen.setdefault(net, c)
            assert seen[net] == c


def test_table():
    for pattern, n in (('darknet*', 3), ('cspdarknet*', 2), ('vovnet*', 11)):
        assert len(list_weights(pattern)) == n


def test_what_cannot_be_built_is_refused_before_the_download(monkeypatch):
    monkeypatch.setattr('backbones_nb.core.weights.fetch_weights', lambda r: pytest.fail('fetched'))
    with pytest.raises(ValueError, match="got split='halves', expected one of"):
        create_backbone('cspdarknet53', pretrained=True, split='halves')
