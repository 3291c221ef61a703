import os
from pathlib import Path

import pytest

os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg')

root = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow')


def pytest_collection_modifyitems(config, items):
    import torch
    for o in items:
        if 'slow' in o.keywords and not config.getoption('--slow'): o.add_marker(pytest.mark.skip(reason='slow'))
        if 'cuda' in o.keywords and not torch.cuda.is_available(): o.add_marker(pytest.mark.skip(reason='no CUDA device'))


@pytest.fixture(scope='session')
def shared_pets():
    path = root.parent/'shared'/'data'/'oxford-iiit-pet-3'
    if not path.is_dir(): pytest.skip('shared data absent')
    return path


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    from backbones_nb.data.toy import toy_pets
    return toy_pets(tmp_path_factory.mktemp('toy')/'pets', n=48, seed=3)
