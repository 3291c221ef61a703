import re
import sys
from configparser import ConfigParser
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest

import backbones_nb
from tools.proc import run

root = Path(__file__).resolve().parent.parent
heavy = ('torch', 'torchvision', 'timm', 'fastai', 'effdet', 'matplotlib', 'faster_coco_eval', 'pandas', 'scipy')


def loaded(code, tmp_path):
    "Which of the heavy libraries `code` loads in a fresh Python, in an empty folder."
    code += f"\nimport sys; print('loaded', *[o for o in {heavy} if o in sys.modules])"
    r = run(sys.executable, '-c', code, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    return set(r.stdout.splitlines()[-1].split()[1:])


def test_bare_import_loads_nothing(tmp_path): assert loaded('import backbones_nb', tmp_path)==set()


def test_probe_sees_what_is_loaded(tmp_path): assert 'fastai' in loaded('import fastai', tmp_path)


def test_backbones_necks_and_detectors_load_no_fastai_and_no_effdet(tmp_path):
    code = """import torch
from backbones_nb import create_backbone, list_backbones
assert 'vovnet39' in list_backbones('*vovnet*')
create_backbone('resnet18')
create_backbone('vovnet19_slim', strides=(8,16))(torch.zeros(1, 3, 32, 32))
from backbones_nb.necks.neck import attach_neck
attach_neck(create_backbone('vovnet19_slim'), 'fpn')
from backbones_nb.detectors import faster_rcnn
faster_rcnn.model(num_classes=3, backbone='vovnet19_slim', neck_channels=16, head_channels=16)"""
    assert not loaded(code, tmp_path) & {'fastai', 'effdet', 'matplotlib', 'faster_coco_eval'}


def test_command_help_loads_nothing(tmp_path):
    assert loaded("from backbones_nb.cli.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code==0", tmp_path)==set()


@pytest.mark.parametrize('extra', ['', 'dev', 'onnx', 'icevision', 'imagenet'])
def test_dependency_lists_have_one_home(extra):
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    norm = lambda name, spec: (re.sub('[-_.]+', '-', name).lower(), spec)
    split = lambda o: norm(*re.fullmatch(r'([\w.-]+)(.*)', o).groups())
    have = [re.fullmatch(r"([^;\s]+)\s*(?:;\s*extra == ['\"](\w+)['\"])?", o).groups('') for o in requires('backbones-nb')]
    assert {split(o) for o,e in have if e==extra}=={split(o) for o in ini['DEFAULT'][f'{extra}_requirements'.lstrip('_')].split()}


def test_version_has_one_home():
    assert version('backbones-nb')==backbones_nb.__version__
    assert metadata('backbones-nb')['Requires-Python']=='>=3.11'
    for f in ('pyproject.toml', 'settings.ini', 'setup.py'): assert not re.search(r'^version\s*=\s*["\']?\d', (root/f).read_text(encoding='utf-8'), re.M)


def test_every_folder_of_modules_is_a_package():
    from setuptools import find_packages
    want = {'.'.join(o.relative_to(root).parent.parts) for o in (root/'backbones_nb').rglob('*.py')}
    assert want==set(find_packages(root, include=['backbones_nb*']))


def test_lazy_attributes():
    assert backbones_nb.create_backbone.__module__=='backbones_nb.core.registry'
    assert {'create_backbone', 'list_backbones'} <= set(dir(backbones_nb))
    with pytest.raises(AttributeError, match='no attribute'): backbones_nb.nothing


def test_imports_run_one_way():
    order = ['core', 'backbones', 'necks', 'detectors', 'data', 'learners', 'cli']
    for f in (root/'backbones_nb').rglob('*/*.py'):
        here = order.index(f.parent.name)
        text = f.read_text(encoding='utf-8')
        used = set(re.findall(r'^\s*from (?:backbones_nb|\.\.)\.?(\w+)', text, re.M)) & set(order)
        assert all(order.index(o)<=here for o in used), f'{f} imports {used}'
        if f.parent.name in ('backbones', 'necks', 'detectors'):
            drawn = set(re.findall(r'^\s*from (?:backbones_nb|\.\.)\.?core\.(\w+)', text, re.M)) & {'inspect', 'draw', 'parity', 'diagram'}
            assert not drawn, f'{f} imports core.{drawn}'
