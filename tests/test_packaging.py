import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import backbones_nb

root = Path(__file__).resolve().parent.parent


def loaded(code, tmp_path):
    "Names of the heavy libraries that `code` loads in a fresh Python, in an empty folder."
    code += "\nimport sys; print(*[o for o in ('torch','fastai','timm','effdet','torchvision','matplotlib') if o in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    return set(r.stdout.split('\n')[-2].split())


def test_bare_import_loads_nothing(tmp_path): assert loaded('import backbones_nb', tmp_path)==set()


@pytest.mark.parametrize('code', ["from backbones_nb import create_backbone\ncreate_backbone('vovnet19_slim')",
    "from backbones_nb import list_backbones\nassert 'vovnet39' in list_backbones('*vovnet*')",
    "from backbones_nb.necks.neck import attach_neck\nfrom backbones_nb import create_backbone\nattach_neck(create_backbone('resnet18'))"])
def test_backbones_load_no_fastai_and_no_effdet(code, tmp_path): assert not loaded(code, tmp_path) & {'fastai', 'effdet', 'matplotlib'}


def test_command_help_loads_nothing(tmp_path):
    assert loaded("from backbones_nb.cli.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code==0", tmp_path)==set()


def test_dependency_lists_have_one_home():
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    names = lambda xs: {o.split(';')[0].split('>')[0].strip().replace('-', '_').lower() for o in xs}
    meta = requires('backbones-nb')
    assert names(ini['DEFAULT']['requirements'].split())==names(o for o in meta if 'extra ==' not in o)
    assert names(ini['DEFAULT']['dev_requirements'].split())==names(o for o in meta if "extra == 'dev'" in o.replace('"', "'"))


def test_version_has_one_home(): assert version('backbones-nb')==backbones_nb.__version__


def test_lazy_attributes():
    assert backbones_nb.create_backbone.__module__=='backbones_nb.core.registry'
    with pytest.raises(AttributeError, match='no attribute'): backbones_nb.nothing
