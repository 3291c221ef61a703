"The benchmarks of augmentation: the speed of the loader, and what each transform is worth."

import re
import sys

import pytest
import torch
from torchvision.models import mobilenet_v2

from project import root

sys.path.insert(0, str(root / 'benchmarks'))
import ablation  # noqa: E402
import transfer  # noqa: E402
from transfer import Folders, Run  # noqa: E402


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    from backbones_nb.data.toy import toy_pets

    path = tmp_path_factory.mktemp('ablation')
    pets = toy_pets(path / 'pets', n=14, side=64, seed=0, test_pct=0.3)
    breeds = {o.split('_')[0] for o in (pets / 'annotations' / 'list.txt').read_text().split() if '_' in o}
    torch.save(mobilenet_v2().state_dict(), path / transfer.weights['mobilenet_v2'])
    return Folders(str(pets), None, str(path), tuple(sorted(breeds)))


@pytest.mark.parametrize('arm', ['none', 'all'])
def test_an_arm_gives_a_row(folders, arm, tmp_path):
    run = Run('pets', 'fcos', 'mobilenet_v2', epochs=2, size=64, images=3)
    row = ablation.score(run, arm, folders)
    assert list(row) == list(ablation.columns) and 0 <= row['AP'] <= row['AP50'] <= 1
    for _ in range(2):
        ablation.append_row(tmp_path / 'a' / 'b.csv', row)
    again = ablation.read_rows(tmp_path / 'a' / 'b.csv')
    assert again == [row, row]


def test_every_arm_has_transforms():
    for arm in ablation.arms:
        items, batches, cbs = ablation.transforms(arm, 64, masks=True)
        assert bool(cbs) == (arm in ('closing', 'all')) and bool(batches) == (arm in ('multiscale', 'all'))
    assert len(ablation.transforms('all', 64, True)[0]) == len(ablation.transforms('all', 64, False)[0]) + 1


def test_gains_are_to_the_default_of_the_same_seed(tmp_path, capsys):
    base = dict.fromkeys(ablation.columns, '') | dict(
        data='pets', epochs=6, size=160, steps=9, AP50=0, AP75=0, seconds=1
    )
    aps = [('default', 0, 0.2), ('default', 1, 0.4), ('mosaic', 0, 0.3), ('mosaic', 1, 0.45), ('jitter', 2, 0.1)]
    rows = [base | dict(arm=a, seed=s, AP=v) for a, s, v in aps]
    default, mosaic, jitter = ablation.summary(rows)
    assert mosaic['gain'] == pytest.approx(0.075) and mosaic['least'] == pytest.approx(0.05)
    assert default['gain'] == 0 and jitter['gain'] is None
    for r in rows:
        ablation.append_row(tmp_path / 'a.csv', r)
    ablation.main(['--show', '--out', str(tmp_path / 'a.csv')])
    assert re.search(r'pets +\S* *mosaic.*\+0\.075', capsys.readouterr().out)


def test_loaders_are_compared(folders, capsys):
    import detection_loaders

    args = ['--pets', folders.pets, '--images', '8', '--bs', '4', '--size', '64', '--repeats', '1', '--target']
    detection_loaders.main([*args, '0'])
    rows = re.findall(r'^(\w.*?) +([\d.]+) images/s +ours is ([\d.]+) of it$', capsys.readouterr().out, re.M)
    assert [r[0] for r in rows] == ['ours', 'albumentations', 'albumentations, area', 'torchvision']
    assert rows[0][2] == '1.00'
    with pytest.raises(SystemExit, match='below the target of 1000000.0: ours, albumentations'):
        detection_loaders.main([*args, '1e6'])
    with pytest.raises(SystemExit, match='expected 9999 or more'):
        detection_loaders.main(['--pets', folders.pets, '--images', '9999'])
