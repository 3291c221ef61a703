import os
import sys
from pathlib import Path

import pytest

os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1') # read when torch is first imported; the tensors here are too small for more

root = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow')
    parser.addoption('--cuda', action='store_true', help='run the tests marked cuda, and fail where there is no device')


def pytest_collection_modifyitems(config, items):
    marked = lambda name: [o for o in items if name in o.keywords]
    skip = lambda name, reason: [o.add_marker(pytest.mark.skip(reason=reason)) for o in marked(name)]
    if not config.getoption('--slow'): skip('slow', 'slow')
    if not config.getoption('--cuda') and marked('cuda'):
        import torch
        if not torch.cuda.is_available(): skip('cuda', 'no CUDA device')


@pytest.fixture(autouse=True)
def no_figures():
    "Figures that a test leaves open are not those of the next one."
    yield
    if plt := sys.modules.get('matplotlib.pyplot'): plt.close('all')


@pytest.fixture(scope='session')
def shared_pets():
    path = root.parent/'shared'/'data'/'oxford-iiit-pet-3'
    if not path.is_dir(): pytest.skip('shared data absent')
    return path


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    from backbones_nb.data.toy import toy_pets
    return toy_pets(tmp_path_factory.mktemp('toy')/'pets', n=48, seed=3)


@pytest.fixture(scope='session')
def records(tmp_path_factory):
    from common import draw_record
    folder = tmp_path_factory.mktemp('drawn')
    return [draw_record(i, folder) for i in range(23)]


@pytest.fixture
def colours(records, tmp_path):
    from common import Colours, make_learner
    return make_learner(records, tmp_path, Colours())
