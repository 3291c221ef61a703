import csv
import json
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

from backbones_nb.analysis import compare, pairs as pairs_module
from backbones_nb.analysis.compare import compare_pair, parity_facts
from backbones_nb.analysis.costs import count_params
from backbones_nb.analysis.pairs import _cspdarknet_pairs, _darknet_pairs, find_pairs, pairs, _vovnet_pairs
from backbones_nb.analysis.references import build_reference, csp_weights, weights_for
from backbones_nb.backbones.cspdarknet import cspdarknet_variants
from backbones_nb.backbones.darknet import darknet_variants
from backbones_nb.backbones.torchvision import resnets, torchvision_taps
from backbones_nb.backbones.vovnet import vovnet_configs, vovnet_variants
from backbones_nb.cli.cli import main
from backbones_nb.core.create import create_backbone
from backbones_nb.core.registry import list_backbones
from backbones_nb.necks.resnet_fpn import resnet_fpn_bodies

small = ['--sizes', '64', '70x90']
pytestmark = pytest.mark.usefixtures('constant_init')


def rows(name, library=None, **config):
    return [p for p in pairs if p.name == name and library in (None, p.library) and config.items() <= p.config.items()]


def refs(name, library='timm'):
    return {p.ref for p in rows(name, library)}


# --- no row is forgotten


def test_every_name_has_a_row():
    names = [
        *list_backbones('*darknet*'),
        *list_backbones('*vovnet*'),
        *torchvision_taps,
        *(f'{o}_fpn' for o in resnet_fpn_bodies),
    ]
    assert set(names) == {p.name for p in pairs}


@pytest.mark.parametrize(
    'name,variants',
    [*darknet_variants.items(), *cspdarknet_variants.items(), *((n, vovnet_variants(n)) for n in vovnet_configs)],
)
def test_every_variant_has_a_row(name, variants):
    default = next(iter(variants))
    assert {p.config.get('variant', default) for p in rows(name)} == set(variants)


def slope(p):
    act = p.args.get('act_layer', 'leaky_relu')
    return 0.0 if act == 'relu' else 0.01 if act == 'leaky_relu' else act().negative_slope


def test_darknet_rows():
    assert (
        {slope(p) for p in rows('darknet53', 'timm')}
        == {slope(p) for p in rows('darknet19', 'timm')}
        == {0.0, 0.01, 0.1}
    )
    assert refs('darknet53') == {'darknet53'} and refs('darknet19') == {'darknet21'}
    assert refs('darknet53', 'cfg') == {'darknet53.cfg'} and refs('darknet19', 'cfg') == {'darknet19.cfg'}


def test_cspdarknet_rows():
    for kw in (dict(variant='timm'), dict(variant='vt'), dict(order='cross')):
        assert {p.config['split'] for p in rows('cspdarknet53', 'timm', **kw)} == {'convs', 'slice'}
    assert {p.config['split'] for p in rows('cspdarknet19', 'timm', variant='vt')} == {'convs', 'slice'}
    assert {p.config.get('split', 'convs') for p in rows('cspdarknet53', 'cfg')} == {'convs', 'slice'}


def test_vovnet_rows():
    want = dict(
        vovnet19_slim='ese_vovnet19b_slim',
        vovnet19_slim_dw='ese_vovnet19b_slim_dw',
        vovnet19_dw='ese_vovnet19b_dw',
        vovnet39='ese_vovnet39b',
        vovnet57='ese_vovnet57b',
        vovnet99='ese_vovnet99b',
    )
    for n, ref in want.items():
        assert [(p.ref, p.args, p.edits) for p in rows(n, variant='timm')] == [(ref, {}, ())]
    for n in ('vovnet39', 'vovnet57'):
        assert {
            (p.config.get('residual', True), p.args.get('residual', False))
            for p in rows(n, ese=False)
            if 'variant' not in p.config
        } == {(False, False), (True, True)}


@pytest.mark.parametrize('name', torchvision_taps)
def test_port_rows(name):
    assert refs(name, 'torchvision') == {name}


twins = (
    {o: o for o in resnets}
    | {f'vgg{n}{b}': f'vgg{n}{b}' for n in (11, 13, 16, 19) for b in ('', '_bn')}
    | {
        'mobilenet_v2': 'mobilenetv2_100',
        'mobilenet_v3_large': 'mobilenetv3_large_100',
        'mobilenet_v3_small': 'mobilenetv3_small_100',
    }
    | {f'efficientnet_b{i}': f'efficientnet_b{i}' for i in range(8)}
)


@pytest.mark.parametrize('name', [o for o in twins if o in torchvision_taps])
def test_twin_rows(name):
    assert refs(name) == {twins[name]}
    eps = {p.args.get('bn_eps', 1e-5) for p in rows(name, 'timm')}
    assert eps == {1e-3 if 'v3' in name or name[-2:] in ('b5', 'b6', 'b7') else 1e-5}


def test_neck_rows():
    for o in resnet_fpn_bodies:
        assert refs(f'{o}_fpn', 'fpn') == {o} and rows(f'{o}_fpn')[0].config == {}
    assert {tuple(p.config) for p in rows('resnet18_fpn')} == {(), ('channels',), ('extra',), ('norm',)}


def test_labels_tell_rows_apart():
    seen = [(p.library, p.ours, p.theirs) for p in pairs]
    assert len(seen) == len(set(seen))


own = [
    p
    for o in (_darknet_pairs, _cspdarknet_pairs, _vovnet_pairs)
    for p in o
    if p.config.get('split') != 'slice' and not p.double
]


@pytest.mark.usefixtures('quick_meta')
@pytest.mark.parametrize('p', own, ids=lambda p: f'{p.ours}-{p.theirs}')
def test_both_have_the_same_parameters(p):
    with torch.device('meta'):
        ours = create_backbone(p.name, **p.config)
        ref = build_reference(p, ours)
    assert count_params(ours) == count_params(ref) and len(ours.strides) >= 4


# --- the command


def test_a_family(capsys):
    assert main(['parity', 'vovnet19_slim_*', 'cfg/darknet19*', *small]) == 0
    out, err = capsys.readouterr()
    head, *lines = out.splitlines()
    assert (
        f'timm {timm.__version__}' in head
        and 'float32' in head
        and 'seed 0' in head
        and 'cpu' in head
        and '64, 70x90' in head
    )
    n = len(find_pairs(['vovnet19_slim_*', 'cfg/darknet19*']))
    assert lines[-1] == f'{n} rows: {n} equal, 0 not, 0 without a reference' and len(lines) == n + 3
    assert 'darknet19.cfg' in out and f'timm {timm.__version__} ese_vovnet19b_slim_dw' in out and '1,384,752' in out
    assert len(err.splitlines()) == n and err.startswith(f'1/{n} ')


@pytest.mark.parametrize('pattern', ['resnet18_fpn', 'cspdarknet19', 'mobilenet_v3_small'])
def test_small_nets(pattern, capsys):
    assert main(['parity', pattern, '--sizes', '70x90']) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    'pair,change,why',
    [
        (('darknet53', 'cfg'), lambda p: replace(p, config=dict(variant='timm')), 'in map '),
        (('darknet19', 'cfg'), lambda p: replace(p, config=dict(variant='cfg', act='relu')), 'in map '),
        (('vovnet19_slim_dw', 'timm'), lambda p: replace(p, edits=('padded pools',)), 'ValueError: got shapes'),
        (('vovnet19_slim', 'timm'), lambda p: replace(p, config=dict(ese=False)), 'matched '),
        (('vovnet19_slim', 'timm'), lambda p: replace(p, weights=None, args=dict(act_layer='gelu')), 'in map '),
        (('cspdarknet19', 'timm'), lambda p: replace(p, weights=partial(csp_weights, cs3=False)), 'in map '),
        (('resnet18', 'torchvision'), lambda p: replace(p, ref='resnet34'), 'matched '),
    ],
    ids=lambda o: str(o) if isinstance(o, tuple) else '',
)
def test_a_wrong_net_is_caught(pair, change, why):
    r = compare_pair(change(rows(*pair)[0]), (50,))
    assert r['verdict'] in ('failed', 'too far') and why in (r['reason'] or f"{r['worst']} in {r['at']}")


def test_a_wrong_net_fails_the_command_and_the_table_is_whole(monkeypatch, capsys):
    good, bad = rows('vovnet19_slim_dw', 'timm')[0], replace(rows('vovnet19_slim', 'timm')[0], config=dict(ese=False))
    monkeypatch.setattr(pairs_module, 'pairs', [bad, good])
    assert main(['parity', '--sizes', '50']) == 1
    out, err = capsys.readouterr()
    assert good.theirs in out.splitlines()[4] and '2 rows: 1 equal, 1 not, 0 without a reference' in out
    last = err.splitlines()[-1]
    assert last.startswith('error: 1 of 2 rows are not equal to their reference within 1e-05') and 'matched ' in last


def test_the_tolerance_counts(capsys):
    r = compare_pair(
        replace(next(p for p in rows('cspdarknet19') if p.double), double=False), (64,), tol=0
    )  # sums in another order
    assert r['verdict'] == 'too far' and 0 < r['worst'] < 1e-5
    assert (
        main(['parity', 'vovnet19_slim', '--sizes', '64', '--tol', '1e-3']) == 0 and '1e-03' in capsys.readouterr().out
    )


def test_sizes():
    p = replace(rows('vovnet19_slim_dw')[0], sizes=(50,))
    assert [compare_pair(o, s)['inputs'] for o, s in ((p, None), (p, (64, (40, 50))))] == ['50', '64 40x50']
    assert '224, 200, 230x310 pixels unless a row has its own' in parity_facts()


def test_nan_is_no_parity(monkeypatch):
    p = rows('vovnet19_slim_dw', 'timm')[0]

    def spoil(ref, ours):
        sd = weights_for(ref, ours, p.weights)
        return sd | {'stem.0.conv.weight': sd['stem.0.conv.weight'] * float('nan')}

    assert compare_pair(replace(p, weights=spoil), (64,))['verdict'] == 'too far'


def test_a_missing_reference_is_a_row_with_its_reason(monkeypatch, capsys):
    p, q = rows('vovnet19_slim', 'timm')[0], rows('resnet18', 'torchvision')[0]
    monkeypatch.setattr(
        pairs_module,
        'pairs',
        [replace(p, ref='vovnet1000'), replace(p, args=dict(stem_color=3)), replace(q, ref='resnet19'), p],
    )
    assert main(['parity', '--sizes', '64']) == 0
    out = capsys.readouterr().out
    assert f'timm {timm.__version__} has no vovnet1000' in out and 'stem_color' in out and 'has no resnet19' in out
    assert '4 rows: 1 equal, 0 not, 3 without a reference' in out


@pytest.fixture(scope='module')
def compared_once():
    "A pair is compared once for all tests of what is written of it."
    seen, real = {}, compare.compare_pair

    def f(pair, *args):
        key = pair.ours, pair.theirs, repr(args)
        if key not in seen:
            seen[key] = real(pair, *args)
        return dict(seen[key])

    with pytest.MonkeyPatch.context() as m:
        m.setattr(compare, 'compare_pair', f)
        yield


@pytest.mark.parametrize('suffix', ['csv', 'json', 'md'])
def test_files(suffix, compared_once, tmp_path, capsys):
    f = tmp_path / f'table.{suffix}'
    assert main(['parity', 'vovnet19_slim_dw', '--sizes', '64', '--out', str(f)]) == 0
    want, n = rows('vovnet19_slim_dw')[0], len(rows('vovnet19_slim_dw'))
    text = f.read_text()
    if suffix == 'md':
        assert text.startswith('torch ') and text.count('\n| ') > n and f'{n} rows: {n} equal' in text
    else:
        got = list(csv.DictReader(f.open())) if suffix == 'csv' else json.loads(text)['rows']
        assert (
            len(got) == n
            and got[0]['ours'] == want.ours
            and got[0]['verdict'] == 'equal'
            and float(got[0]['worst']) <= 1e-5
        )
        assert suffix == 'csv' or 'seed 0' in json.loads(text)['facts']


@pytest.mark.parametrize(
    'args,text',
    [
        (['vovnet93'], "no row of the parity table matches 'vovnet93'. Did you mean 'vovnet99'"),
        (['yolo*'], "matches 'yolo*'"),
        (['--sizes', 'big'], "got --sizes 'big', expected at least 32 pixels"),
        (['--sizes', '16'], 'at least 32'),
        (['--sizes', '64x64x64'], 'expected at least 32 pixels'),
        (['--out', 'table.xls'], 'expected a file name that ends in .csv, .json or .md'),
        (['--out', 'no/such/t.md'], 'does not exist: create it first'),
        (['--tol', '-1'], 'got --tol -1.0'),
    ],
)
def test_errors(args, text, capsys):
    assert main(['parity', *args]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith('error: ') and text in err and err.count('\n') == 1


def test_the_help_is_that_of_the_function(capsys):
    with pytest.raises(SystemExit) as e:
        main(['parity', '--help'])
    out = ' '.join(capsys.readouterr().out.split())
    assert (
        e.value.code == 0
        and 'largest relative error of a map that counts as equal, in float32' in out
        and 'exit code is 1 if any row differs' in out
    )
    assert all(o in out for o in ('PATTERN', '--sizes', '--tol', '--out'))


def test_what_argparse_refuses():
    with pytest.raises(SystemExit) as e:
        main(['parity', '--tol', 'much'])
    assert e.value.code == 2


def test_nothing_of_a_pair_stays_in_memory():
    import gc
    import weakref

    seen = []
    p = rows('vovnet19_slim_dw', 'timm')[0]

    def watch(ref, ours):
        seen.extend(map(weakref.ref, (ref, ours)))
        return weights_for(ref, ours, p.weights)

    compare_pair(replace(p, weights=watch), (64,))
    gc.collect()
    assert [o() for o in seen] == [None, None]


# --- everything


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_table(capsys):
    assert main(['parity']) == 0, capsys.readouterr().out
    assert f'{len(pairs)} rows: {len(pairs)} equal, 0 not, 0 without a reference' in capsys.readouterr().out
