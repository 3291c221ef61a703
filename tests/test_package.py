import re
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import metadata, requires, version

import pytest
from packaging.requirements import Requirement

import backbones_nb
from project import copy_tree, root, run_script_quickly
from tools.proc import run


@pytest.mark.parametrize('extra', ['', 'dev', 'onnx', 'icevision', 'imagenet'])
def test_dependency_lists_have_one_home(extra):
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini', encoding='utf-8')
    norm = lambda name, spec: (re.sub('[-_.]+', '-', name).lower(), spec)
    split = lambda o: norm(*re.fullmatch(r'([\w.-]+)(.*)', o).groups())
    have = [
        re.fullmatch(r"([^;\s]+)\s*(?:;\s*extra == ['\"](\w+)['\"])?", o).groups('') for o in requires('backbones-nb')
    ]
    assert {split(o) for o, e in have if e == extra} == {
        split(o) for o in ini['DEFAULT'][f'{extra}_requirements'.lstrip('_')].split()
    }


def test_version_has_one_home():
    assert version('backbones-nb') == backbones_nb.__version__
    assert metadata('backbones-nb')['Requires-Python'] == '>=3.11'
    for f in ('pyproject.toml', 'settings.ini', 'setup.py'):
        assert not re.search(r'^version\s*=\s*["\']?\d', (root / f).read_text(encoding='utf-8'), re.M)


def test_every_folder_of_modules_is_a_package():
    from setuptools import find_packages

    want = {'.'.join(o.relative_to(root).parent.parts) for o in (root / 'backbones_nb').rglob('*.py')}
    assert want == set(find_packages(root, include=['backbones_nb*']))


def test_lazy_attributes():
    assert backbones_nb.create_backbone.__module__ == 'backbones_nb.core.create'
    assert {'create_backbone', 'list_backbones'} <= set(dir(backbones_nb))
    with pytest.raises(AttributeError, match='no attribute'):
        backbones_nb.nothing


def test_star_import_gives_the_main_functions():
    space = {}
    exec('from backbones_nb import *', space)
    assert {'create_backbone', 'list_backbones', 'register', 'from_pretrained', 'attach_neck'} <= set(space)
    assert all(callable(space[k]) for k in backbones_nb.__all__ if k != '__version__') and '_lazy' not in space


# --- the built package


def build_requirement():
    (o,) = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))['build-system']['requires']
    return o


@pytest.fixture(scope='module')
def dist(tmp_path_factory, slow_run):
    "The folder with wheel and sdist, built from a copy of the tracked files."
    d = tmp_path_factory.mktemp('built').resolve()
    here = copy_tree(d / 'backbones-nb')
    # in the quick run with this Python's setuptools, if it is new enough: saves an environment for each of the two
    here_is_setuptools = Requirement(build_requirement()).specifier.contains(version('setuptools'))
    alone = ('--no-isolation',) if here_is_setuptools and not slow_run else ()
    r = run(sys.executable, '-m', 'build', *alone, '--outdir', d / 'dist', '.', cwd=here, merge=True)
    assert r.returncode == 0, r.stdout[-2000:]
    return d / 'dist'


@pytest.fixture(scope='module')
def site(dist):
    "A folder with the installed wheel."
    to = dist.parent / 'site'
    r = run(
        sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', to, next(dist.glob('*.whl')), merge=True
    )
    assert r.returncode == 0, r.stdout[-2000:]
    return to


def test_wheel_and_sdist_are_sound(dist):
    files = sorted(dist.glob('*'))
    assert {o.suffix for o in files} == {'.whl', '.gz'}
    r = run(sys.executable, '-m', 'twine', 'check', '--strict', *files, merge=True)
    assert r.returncode == 0, r.stdout[-2000:]


def test_the_wheel_carries_every_module_and_nothing_else(dist):
    got = {o for o in zipfile.ZipFile(next(dist.glob('*.whl'))).namelist() if o.endswith('.py')}
    assert got == {o.relative_to(root).as_posix() for o in (root / 'backbones_nb').rglob('*.py')}


def test_the_command_runs_from_the_wheel(site, tmp_path):
    code = (
        f'import runpy, sys\nsys.argv = ["backbones-nb", "list", "vovnet39"]\nimport backbones_nb\n'
        f'assert backbones_nb.__file__.startswith({str(site)!r}), backbones_nb.__file__\n'
        f'runpy.run_path({str(site / "bin" / "backbones-nb")!r}, run_name="__main__")'
    )
    ok, out = run_script_quickly(code, tmp_path / 'log', site, tmp_path)
    assert ok and 'vovnet39' in out, out


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    'nb', ['nbs/index.ipynb', pytest.param('nbs/tutorials/58_faster_rcnn_pets.ipynb', marks=pytest.mark.slow)]
)
def test_notebooks_run_from_the_wheel_in_an_empty_folder(site, tmp_path, skip_flags, nb):
    (tmp_path / 'notebook.ipynb').write_bytes((root / nb).read_bytes())
    code = (
        f'import sys, backbones_nb, nbdev.test\n'
        f'assert backbones_nb.__file__.startswith({str(site)!r}), backbones_nb.__file__\n'
        f'sys.exit(not nbdev.test.test_nb("notebook.ipynb", skip_flags={skip_flags!r})[0])'
    )
    ok, out = run_script_quickly(code, tmp_path / 'log', site, tmp_path)
    assert ok, out
