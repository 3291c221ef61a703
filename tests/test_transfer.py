"The benchmark of transfer: one run of each kind, and the table that grows by a row for each."

import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from timm import create_model
from torchvision.models import mobilenet_v2

from project import root

sys.path.insert(0, str(root / 'benchmarks'))
import transfer  # noqa: E402
from transfer import Folders, Run, full_table, interval, key, main, quick_table, read_rows, train_and_score  # noqa: E402

tiny = Run(backbone='mobilenet_v2', epochs=2, size=64, images=3)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Toy pets, and files like those of the packages, of random numbers."
    from backbones_nb.data.toy import toy_pets

    path = tmp_path_factory.mktemp('transfer')
    pets = toy_pets(path / 'pets', n=14, side=64, seed=0, test_pct=0.3)
    breeds = {o.split('_')[0] for o in (pets / 'annotations' / 'list.txt').read_text().split() if '_' in o}
    nets = dict(mobilenet_v2=mobilenet_v2(), efficientnet_lite0=create_model('tf_efficientnet_lite0'))
    for k, net in nets.items():
        torch.save(net.state_dict(), path / transfer.weights[k])
    return Folders(str(pets), None, str(path), tuple(sorted(breeds)))


@pytest.fixture
def arguments(folders, tmp_path, monkeypatch):
    "Command line of a table of few rows, which this process makes."
    monkeypatch.setattr(transfer, 'ProcessPoolExecutor', ThreadPoolExecutor)
    monkeypatch.setattr(transfer, 'full_table', lambda seeds: [replace(tiny, seed=s) for s in seeds])
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    return ['--pets', folders.pets, '--weights', folders.weights, '--out', str(tmp_path / 'made' / 'table.csv')] + [
        '--breeds',
        *folders.breeds,
    ]


def fake(seed, ap, **kwargs):
    row = dict.fromkeys(transfer.columns, '') | transfer.asdict(replace(tiny, **dict(size=128, seed=seed) | kwargs))
    return row | dict(
        steps=1, recipe=transfer.recipes[row['peer']], AP=ap, AP50=ap, AP75=ap, seconds=1, seconds_in_all=1
    )


@pytest.mark.parametrize(
    'run',
    [
        tiny,
        replace(tiny, init='random', family='faster_rcnn'),
        replace(tiny, peer='torchvision', family='retinanet'),
        replace(tiny, peer='torchvision', family='fcos', backbone='efficientnet_lite0'),
        replace(tiny, peer='torchvision', family='faster_rcnn', backbone='efficientnet_lite0'),
        replace(tiny, peer='effdet'),
        pytest.param(replace(tiny, peer='icevision'), marks=pytest.mark.slow),
    ],
    ids=lambda o: f'{o.peer}-{o.family}-{o.init}',
)
def test_a_run_gives_a_row_of_the_table(run, folders):
    row = train_and_score(run, folders)
    assert row.keys() == set(transfer.columns)
    assert 0 <= row['AP'] <= row['AP50'] <= 1 and row['images'] == 3
    assert row['steps'] == run.steps(len(transfer.read_data('pets', folders)[0])) == 4
    assert 'torch ' in row['versions'] and row['recipe'] == transfer.recipes[run.peer]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_row(folders):
    a, b = (train_and_score(tiny, folders) for _ in range(2))
    assert a['AP_per_class'] == b['AP_per_class'] and a['AP'] == b['AP']


def test_rows_that_are_there_are_not_made_again(arguments, capsys, monkeypatch):
    main([*arguments, '--seeds', '0', '--jobs', '1'])
    out = arguments[arguments.index('--out') + 1]
    rows = read_rows(out)
    assert {r['seed'] for r in rows} == {0} and '1 of 1 runs have a row' in capsys.readouterr().out
    monkeypatch.setattr(transfer, 'train_and_score', lambda run, folders: fake(run.seed, 0.5))
    main([*arguments, '--seeds', '0', '1', '2'])
    assert '2 runs to do, 1 rows' in capsys.readouterr().out
    assert read_rows(out)[:1] == rows and [o['AP'] for o in read_rows(out)[1:]] == [0.5, 0.5]


def test_a_run_that_fails_costs_the_others_nothing(arguments, monkeypatch):
    def one(run, folders):
        if run.seed == 1:
            raise ValueError('no such luck')
        return fake(run.seed, 0.5)

    monkeypatch.setattr(transfer, 'train_and_score', one)
    with pytest.raises(SystemExit, match='seed 1.*no such luck'):
        main([*arguments, '--seeds', '0', '1', '2'])
    assert {r['seed'] for r in read_rows(arguments[arguments.index('--out') + 1])} == {0, 2}


def test_rows_of_an_older_recipe_do_not_count(tmp_path, monkeypatch):
    path = tmp_path / 'table.csv'
    for seed in (0, 1):
        transfer.append_row(path, fake(seed, 0.5) | dict(recipe=seed + 1))
    monkeypatch.setitem(transfer.recipes, 'ours', 2)
    assert [r['seed'] for r in read_rows(path)] == [1]
    with open(path) as f:
        assert len(list(csv.DictReader(f))) == 2


def test_the_table_shows_means_and_intervals():
    assert interval([0.5]) is None
    assert interval([0.1, 0.2, 0.3]) == pytest.approx(4.3026527 * 0.1 / 3**0.5)
    rows = [fake(s, ap) for s, ap in enumerate((0.1, 0.2, 0.3))]
    shown = str(transfer.comparison_table([*rows, fake(0, 0.7, peer='effdet')]))
    assert '0.200 ± 0.248' in shown and '0.700' in shown and shown.count('±') == 1


def test_a_peer_above_ours_is_named():
    ours = [fake(s, 0.5 + s / 100) for s in range(3)]
    close = [fake(s, 0.51 + s / 100, peer='torchvision') for s in range(3)]
    above = [fake(s, 0.61 + s / 100, peer='effdet') for s in range(3)]
    (said,) = transfer.shortfalls([*ours, *close, *above])
    assert said.startswith("effdet's efficientdet on mobilenet_v2, pets: above ours by 0.110, more than")
    (said,) = transfer.shortfalls([*ours, above[0]])
    assert 'by 0.100 with a single seed' in said
    assert not transfer.shortfalls(above + [fake(s, 0.9) for s in range(3)])


def test_the_steps_that_pretraining_saves():
    one = dict(backbone='efficientnet_lite0', size=128, epochs=4)
    rows = [
        fake(0, 0.5, **one),
        *(fake(0, ap, **one | dict(init='random', epochs=n)) for n, ap in ((4, 0.1), (8, 0.2))),
    ]
    assert [o['said'] for o in transfer.savings(rows)] == ['more than 2 times']
    rows.append(fake(0, 0.5, **one | dict(init='random', epochs=16)))
    assert [o['said'] for o in transfer.savings(rows)] == ['4 times'] and '0.200' in str(transfer.savings_table(rows))


def test_the_full_table_has_every_row_once_and_the_quick_one_is_a_part():
    runs = list(full_table())
    assert len({key(o) for o in runs}) == len(runs) == 3 * (32 + 12 + 4 + 12 + 4)
    assert [o.seed for o in runs] == sorted(o.seed for o in runs)  # whole tables first
    quick = quick_table()
    assert {(o.family, o.peer) for o in quick} == {(o.family, o.peer) for o in runs}
    said = transfer.state(
        [fake(0, 0.5, **dict(backbone='efficientnet_lite0', size=128, epochs=4)) | dict(day='2026-01-01')]
    )
    assert said[0] == f'1 of {len(runs)} runs are measured' and said[1].startswith(
        'missing: 33 of pets seed 0, 30 of bccd'
    )
    assert all(o.data == 'pets' and o.epochs < runs[0].epochs for o in quick)


@pytest.mark.parametrize(
    'change,message',
    [
        (('--weights', '/nowhere'), 'has no mobilenet_v2-b0353104.pth and no efficientnet'),
        (('--only', 'detector=fcos'), 'got --only detector=fcos, expected one of data, family'),
        (('--breeds', 'unicorn'), 'has no images of unicorn'),
    ],
)
def test_bad_input_is_one_sentence(change, message, arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main([*arguments, *change])
    assert message in (capsys.readouterr().err if e.value.code == 2 else str(e.value.code))


def test_missing_folders_are_named(capsys):
    with pytest.raises(SystemExit):
        main(['--only', 'data=bccd'])
    assert '--bccd and --weights not given' in capsys.readouterr().err
