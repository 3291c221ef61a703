import importlib
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import backbones_nb
from backbones_nb import create_backbone, from_pretrained
from backbones_nb.core import hub
from backbones_nb.core.config import Unserializable, comparable, serializable_args
from backbones_nb.core.contexts import eval_mode, fixed_rng, training_flag, write_whole
from backbones_nb.core.errors import one_of, reason
from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.registry import Entry, Registry

package = Path(backbones_nb.__file__).parent

# --- errors, contexts


def test_a_choice_is_returned_or_refused():
    assert one_of(False, (True, False), 'x') is False
    with pytest.raises(ValueError, match="got pool='mean', expected one of 'max', 'avg': choose one"):
        one_of('mean', ('max', 'avg'), 'pool')


@pytest.mark.parametrize(
    'e,text', [(ValueError('a\n  b. '), 'ValueError: a b'), (KeyError('k'), "KeyError: 'k'"), (OSError(), 'OSError')]
)
def test_exceptions_on_one_line(e, text):
    assert reason(e) == text


@pytest.mark.parametrize('error', [None, RuntimeError])
def test_every_module_has_its_mode_back(error):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout())).train()
    net[1].eval()
    net[1][1].train()
    before = [m.training for m in net.modules()]
    try:
        with eval_mode(net) as m:
            assert m is net and not any(o.training for o in net.modules())
            if error:
                raise error
    except RuntimeError:
        assert error
    assert [m.training for m in net.modules()] == before
    with training_flag([net], False):
        assert [m.training for m in net.modules()] == [False, *before[1:]]


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu')])
def test_random_numbers_repeat_and_nobody_notices(device):
    state = torch.random.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        with fixed_rng(device, seed):
            draws.append(torch.rand(3))
    assert (
        torch.equal(draws[0], draws[1])
        and not torch.equal(draws[0], draws[2])
        and torch.equal(state, torch.random.get_rng_state())
    )


def test_a_full_disk_is_one_sentence(tmp_path):
    import errno, os

    (tmp_path / 'a').write_text('old')
    with pytest.raises(
        OSError, match=r'could not write .*a \(No space left on device\): free some space there and try again'
    ) as e:
        with write_whole(tmp_path / 'a'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (
        '\n' not in str(e.value)
        and (tmp_path / 'a').read_text() == 'old'
        and [o.name for o in tmp_path.iterdir()] == ['a']
    )


# --- configurations


def test_arguments_without_a_form_are_kept_as_text():
    args = serializable_args(dict(a=1, f=lambda: 0, m=nn.Conv2d(1, 1, 1), l=[nn.ReLU()]))
    assert (
        args['a'] == 1
        and [isinstance(args[k], Unserializable) for k in 'fml'] == [True] * 3
        and repr(args['m']) == 'Conv2d'
        and args['m'].is_module
    )
    assert repr(pickle.loads(pickle.dumps(args))['f']) == repr(args['f'])
    assert comparable([partial(nn.ReLU, inplace=True)]) == comparable((partial(nn.ReLU, inplace=True),))


# --- the registry


def test_every_module_that_registers_rows_announces_itself():
    "The modules that register rows, or a format of files, are those of the entry points."
    found = {
        '.'.join(p.relative_to(package.parent).with_suffix('').parts)
        for o in ('backbones', 'necks')
        for p in (package / o).glob('*.py')
        if re.search(r'^(?!def ).*\b(register|add_native_format)\(', p.read_text(encoding='utf-8'), re.M)
    }
    announced = {o.value for v in Registry().sources.values() for o in v}
    assert found == announced
    for o in announced:
        importlib.import_module(o)


def test_a_checkout_without_metadata_says_so():
    with pytest.raises(RuntimeError, match="no entry points in the group 'nobody.here'.*pip install -e .") as e:
        Registry('nobody.here').names()
    assert '\n' not in str(e.value)


class Family(Backbone):
    runtime_args = ('fast',)

    def __init__(self, width=4, act='relu', fast=False, strides=None, out_indices=None, **more):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 4, 1)
        self.set_trunk(dict(stem=['stem']), [feature_row(width, 4, 'stem')], strides, out_indices)


def family(width=4, fast=False, strides=None) -> Family:
    return Family(width, fast=fast, strides=strides)


def bare(width=4, fast=False, strides=None):
    return Family(width, fast=fast, strides=strides)


@pytest.mark.parametrize(
    'build,left', [(Family, {'width': 4, 'act': 'relu'}), (family, {'width': 4}), (bare, {'width': 4, 'fast': True})]
)
def test_builders_declare_on_the_class_that_they_build(build, left):
    e = Entry('x', build, {})
    assert (
        e.full_config(dict(fast=True, strides=4)) == left
        and e.canonical({'a': 1}) == {'a': 1}
        and e.conversions == {}
        and not e.loads_weights
    )


def test_a_request_is_the_row_the_variant_and_the_caller():
    e = Entry('x', Family, dict(width=8), dict(a={}, b=dict(act='silu')))
    r = e.resolve(dict(variant='b', width=2, pretrained='t', strides=4))
    assert (r.config, r.asked, r.pretrained, r.strides) == (
        dict(width=2, act='silu'),
        dict(variant='b', width=2),
        't',
        4,
    )
    with pytest.raises(AttributeError):
        r.config = {}


def test_rows_and_callbacks_are_forgotten():
    r, seen = Registry(), []
    r.callbacks.append(seen.append)
    e = r.add(Entry('x', Family, {}))
    assert seen == [e] and r.add(Entry('x', Family, dict(width=8))) is r.entries['x']
    with pytest.raises(ValueError, match="the name 'x' is taken by .*Family"):
        r.add(Entry('x', family, {}))
    r.clear()
    assert r.entries == {} and r.callbacks == []


# --- what huggingface_hub's mixin notes


@pytest.mark.parametrize(
    'make,config',
    [
        (lambda: Family(), dict(width=4, act='relu', fast=False, strides=None, out_indices=None)),
        (lambda: Family(8, 'silu', more=(1, 2)), dict(width=8, act='silu', more=(1, 2))),
        (lambda: Family(act=nn.SiLU), dict(act=nn.SiLU)),
        (lambda: type('Sub', (Family,), {})(act=nn.SiLU), dict(act=nn.SiLU)),
    ],
)
def test_the_arguments_of_a_constructor_are_kept(make, config):
    assert config.items() <= make().config.items()


def test_files_written_before_the_field_was_called_license(tmp_path):
    m = create_backbone('vovnet19_slim_dw')
    m.save_pretrained(tmp_path)
    f = tmp_path / 'config.json'
    unset = dict.fromkeys(['url', 'hub_id', 'filename', 'revision', 'sha256', 'resize_size', 'std', 'recipe'])
    given = dict(name='vovnet19_slim_dw', tag='t', publisher='us', input_size=224, mean=[0.5, 0.5, 0.5])
    record = unset | given | dict(metrics={}, config={}, renames=[], drop=[]) | {'licence': 'MIT'}
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(record=record, pretrained='t')))
    n = from_pretrained(tmp_path)
    assert (n.record.license, n.record.mean, n.pretrained) == ('MIT', (0.5, 0.5, 0.5), 't')
    assert hub.hub_config(n)['record']['license'] == 'MIT' and '| license | MIT |' in hub.card_text(
        json.loads(f.read_text())
    )


class Many(Backbone):
    def __init__(self, *widths, strides=None):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 4, 1)
        self.set_trunk(dict(stem=['stem']), [feature_row(widths[0], 4, 'stem')], strides)


def test_arguments_without_names_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match='got a Many .*register a function'):
        Many(4, 5).save_pretrained(tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_a_name_belongs_to_one_builder():
    "A class of the same name in another module is another builder; the same class defined again replaces the row."

    def named(module):
        return type('Net', (), dict(__module__=module))

    registry = Registry()
    registry.add(Entry('net', named('ours.nets'), {}))
    for same in ('ours.nets', '__main__'):
        registry.add(Entry('net', named(same), dict(depth=1)))
    registry.add(Entry('net', named('ours.nets'), {}))
    with pytest.raises(ValueError, match="the name 'net' is taken by ours.nets.Net: choose another name"):
        registry.add(Entry('net', named('theirs'), {}))
    with pytest.raises(ValueError, match="the name 'net' is taken by ours.nets.Net"):
        registry.add(Entry('net', partial(named('ours.nets')), {}))
