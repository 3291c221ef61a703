"What an import loads: each library that a user may be missing, or waits for, only where it is needed."

import json
import sys

import pytest

from tools.proc import run

heavy = ('torch', 'torchvision', 'timm', 'fastai', 'effdet', 'matplotlib', 'faster_coco_eval', 'pandas', 'scipy')
build_all = """
from backbones_nb import create_backbone
create_backbone('resnet18')
create_backbone('vovnet19_slim', strides=(8,16))(torch.zeros(1, 3, 32, 32))
from backbones_nb.necks.build import attach_neck
attach_neck(create_backbone('vovnet19_slim'), 'fpn')
from backbones_nb.detectors import faster_rcnn
faster_rcnn.model(num_classes=3, backbone='vovnet19_slim', neck_channels=16, head_channels=16)"""
# in a Python that has loaded nothing
bare = dict(
    package='import backbones_nb',
    help="from backbones_nb.cli.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code == 0",
    fastai='import fastai',
)
# in one that has loaded torch and torchvision
after_torch = dict(
    core='import backbones_nb.core.create, backbones_nb.core.hub',
    listing="from backbones_nb import list_backbones\nassert 'vovnet39' in list_backbones('*vovnet*')",
    building=build_all,
    diagram='import backbones_nb.analysis.diagram',
)
# Each piece of code runs in a fork of one process, which imports torch once.
process = """import json, os, sys
def forked(code):
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        try:
            exec(code, {'torch': sys.modules.get('torch')})
            os.write(w, '\\n'.join(sys.modules).encode())
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    os.close(w)
    with os.fdopen(r) as f: names = f.read().split('\\n')
    return names if os.waitpid(pid, 0)[1] == 0 else None
bare, after_torch = map(json.loads, sys.argv[1:])
res = {k: forked(v) for k, v in bare.items()}
import torch, torchvision
res |= {k: forked(v) for k, v in after_torch.items()}
print(json.dumps(res))"""


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    "A function that says what a piece of code has loaded, of `among` or with a prefix."
    r = run(
        *(sys.executable, '-W', 'ignore', '-c', process, json.dumps(bare), json.dumps(after_torch)),
        cwd=tmp_path_factory.mktemp('empty'),
    )
    assert r.returncode == 0, r.stderr
    res = json.loads(r.stdout.splitlines()[-1])

    def f(name):
        assert res[name] is not None, r.stderr
        return set(res[name])

    return f


def test_the_probe_sees_what_is_loaded(loaded):
    assert 'fastai' in loaded('fastai') and 'torch' in loaded('core')


def test_bare_import_loads_nothing(loaded):
    assert not loaded('package') & set(heavy)


def test_command_help_loads_nothing(loaded):
    assert not loaded('help') & set(heavy)


def test_core_imports_no_family(loaded):
    ours = {o for o in loaded('core') if o.startswith('backbones_nb.')}
    assert ours and {o for o in ours if not o.startswith('backbones_nb.core')} == set()


def test_listing_ours_does_not_import_timm(loaded):
    assert not loaded('listing') & {'backbones_nb.backbones.timm_models', 'timm'}


def test_backbones_necks_and_detectors_load_no_fastai_and_no_effdet(loaded):
    assert not loaded('building') & {'fastai', 'effdet', 'matplotlib', 'faster_coco_eval'}


def test_drawing_needs_no_fastai_timm_effdet(loaded):
    assert not loaded('diagram') & {'fastai', 'timm', 'effdet'}
