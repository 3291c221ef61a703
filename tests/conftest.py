import os
import random
import sys

import pytest

os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg')
# Read when torch is first imported; the tensors here are too small for more threads.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from project import root

allowed_skips = 'slow', 'no CUDA device', 'shared data absent', 'no C++ compiler', 'no package index'
unknown_skips = set()


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests and the cells marked slow')
    parser.addoption('--cuda', action='store_true', help='run the tests marked cuda, and fail where there is no device')


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    marked = lambda name: [o for o in items if name in o.keywords]
    skip = lambda name, reason: [o.add_marker(pytest.mark.skip(reason=reason)) for o in marked(name)]
    if not config.getoption('--slow'):
        skip('slow', 'slow')
    if not config.getoption('--cuda') and marked('cuda'):
        import torch

        if not torch.cuda.is_available():
            skip('cuda', 'no CUDA device')
    # the tests of a file share its fixtures, so they run in one process; those marked spread run wherever there is room
    for o in items:
        if 'spread' not in o.keywords:
            o.add_marker(pytest.mark.xdist_group(o.location[0]))


def pytest_collection_finish(session):
    "In a process of `-n`: the tests of a file have their group in their ids, or every fixture of a file is made twice."
    one_process = [o for o in session.items if 'spread' not in o.keywords]
    if getattr(session.config.option, 'loadgroup', False) and not all('@' in o.nodeid for o in one_process):
        raise RuntimeError('pytest-xdist does not group the tests of a file: install a pytest below 9.2')


def pytest_runtest_logreport(report):
    if not report.skipped or hasattr(report, 'wasxfail'):
        return
    reason = (
        report.longrepr[2].removeprefix('Skipped: ') if isinstance(report.longrepr, tuple) else str(report.longrepr)
    )
    if reason not in allowed_skips:
        unknown_skips.add(reason)


def pytest_sessionfinish(session):
    if unknown_skips and not hasattr(session.config, 'workerinput'):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for o in sorted(unknown_skips):
        terminalreporter.write_line(f'FAILED: skipped for a reason that conftest.py does not allow: {o}', red=True)


@pytest.fixture(autouse=True)
def seeded():
    "The random numbers of a test do not depend on the tests before it."
    random.seed(0)
    if numpy := sys.modules.get('numpy'):
        numpy.random.seed(0)
    if torch := sys.modules.get('torch'):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_figures():
    "Figures that a test leaves open are not those of the next one."
    yield
    if plt := sys.modules.get('matplotlib.pyplot'):
        plt.close('all')


@pytest.fixture(scope='module')
def quick_meta():
    "Models on the meta device are built and run in a third of the time: see meta.py."
    from meta import quick_meta

    with quick_meta():
        yield


@pytest.fixture(scope='module')
def constant_init():
    "For files whose tests replace the values of every net that they build: see meta.py."
    from meta import constant_init

    with constant_init():
        yield


@pytest.fixture(scope='session')
def slow_run(request):
    "Whether a test may take all the sizes and positions that it has, and not only those of the quick run."
    return request.config.getoption('--slow')


@pytest.fixture(scope='session')
def skip_flags(request):
    "The flags of cells that this run leaves out."
    import torch

    quick = not request.config.getoption('--slow')
    left_out = dict(slow=quick, long=quick, cuda=not torch.cuda.is_available())
    return [o for o, out in left_out.items() if out]


@pytest.fixture(scope='session')
def shared_pets():
    path = root.parent / 'shared' / 'data' / 'oxford-iiit-pet-3'
    if not path.is_dir():
        pytest.skip('shared data absent')
    return path


@pytest.fixture(scope='session')
def sahi():
    try:
        import sahi
    except ImportError:
        pytest.skip('sahi absent')
    return sahi


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    from backbones_nb.data.toy import toy_pets

    return toy_pets(tmp_path_factory.mktemp('toy') / 'pets', n=48, seed=3)


@pytest.fixture(scope='session')
def records(tmp_path_factory):
    from common import draw_record

    folder = tmp_path_factory.mktemp('drawn')
    return [draw_record(i, folder) for i in range(23)]


@pytest.fixture
def colors(records, tmp_path):
    from common import Colors, make_learner

    return make_learner(records, tmp_path, Colors())
