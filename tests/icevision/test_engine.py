"`backbones-nb finetune --engine icevision`, and the engine behind it."

import json
import sys

import pytest

from backbones_nb.icevision.patches import has_icevision

if not has_icevision():
    pytest.skip('IceVision absent', allow_module_level=True)

from backbones_nb.cli.cli import main
from backbones_nb.data.toy import toy_pets
from backbones_nb.icevision import patches
from backbones_nb.icevision.engine import icevision_engine
from backbones_nb.icevision.learner import icevision_args
from backbones_nb.learners.run import RunConfig, cpu_preset
from tools.proc import run

families = ['faster_rcnn', 'mask_rcnn', 'efficientdet', 'retinanet']
body = 'vovnet19_slim_dw'


def config(**kw):
    return RunConfig(**dict(engine='icevision', backbone=body, size=96) | kw)


@pytest.mark.parametrize('family', families)
def test_the_cpu_preset_is_accepted(family):
    build, _ = icevision_engine(config(detector=family, cpu_preset=True))
    args = set(build.keywords) & set(cpu_preset[family])
    assert args and args <= icevision_args(family)
    assert build(num_classes=3).num_classes == 3


def test_own_arguments_override_the_preset():
    build, _ = icevision_engine(
        config(detector='faster_rcnn', cpu_preset=True, model_args=dict(box_detections_per_img=7))
    )
    assert build(num_classes=3).net.roi_heads.detections_per_img == 7


@pytest.mark.parametrize(
    'kw,error,match',
    [
        (dict(detector='fcos'), ValueError, '--detector fcos'),
        (dict(backbone=None), ValueError, '--backbone own'),
        (dict(bf16=True), ValueError, '--bf16'),
        (dict(pretrained_detector=True), ValueError, '--pretrained-detector'),
        (dict(loss_weights=dict(loss_classifier=2)), ValueError, '--loss-weights'),
        (dict(model_args=dict(head_channels=8)), TypeError, 'head_channels'),
    ],
)
def test_refusals(kw, error, match):
    with pytest.raises(error, match=match):
        icevision_engine(config(**kw))


def test_without_icevision(monkeypatch):
    monkeypatch.setattr(patches, 'has_icevision', lambda: False)
    with pytest.raises(ImportError, match='pip install --no-deps icevision'):
        icevision_engine(config())


def test_import_is_light():
    code = (
        'import sys, backbones_nb.icevision.engine; '
        "print([o for o in ('icevision','torch','fastai','effdet') if o in sys.modules])"
    )
    assert run(sys.executable, '-c', code, check=True).stdout.strip() == '[]'


def command(line, capsys):
    code = main(line.split())
    return code, capsys.readouterr()


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return toy_pets(tmp_path_factory.mktemp('few') / 'pets', n=16, seed=3)


few_boxes = 'rpn_post_nms_top_n_train=20 rpn_post_nms_top_n_test=20 box_detections_per_img=5'
lean = dict(
    faster_rcnn=f'--set neck_channels=16 {few_boxes}',
    mask_rcnn=f'--set neck_channels=16 {few_boxes}',
    efficientdet='--set max_det_per_image=5',
)


@pytest.mark.parametrize('family', [pytest.param('faster_rcnn', marks=pytest.mark.slow), 'mask_rcnn', 'efficientdet'])
def test_command(family, few, tmp_path, capsys):
    out, base = tmp_path / 'run', f'finetune --data {few} --detector {family} --backbone {body} --engine icevision'
    base += f' --size 64 --epochs 1 --bs 3 --cpu-preset --no-validate --seed 0 --out {out} {lean[family]}'
    assert command(base, capsys)[0] == 0
    res = json.loads((out / 'metrics.json').read_text())
    assert (
        res['config']['engine'] == 'icevision'
        and res['steps'] > 0
        and ('mask_metrics' in res) == (family == 'mask_rcnn')
    )
    image = next((few / 'images').glob('*.jpg'))
    code, _ = command(f'predict {out} {image} --score-thr 0.0 --json {tmp_path}/found.json', capsys)
    assert code == 0 and str(image) in json.loads((tmp_path / 'found.json').read_text())


@pytest.mark.parametrize(
    'option,match',
    [
        ('--detector fcos', 'fcos'),
        ('--backbone own', 'own'),
        ('--bf16', 'bf16'),
        ('--loss-weights loss_classifier=2', 'loss-weights'),
        ('--set head_channels=8', 'head_channels'),
        ('--pretrained-detector', 'pretrained-detector'),
    ],
)
def test_command_refuses(option, match, tmp_path, capsys):
    code, printed = command(
        f'finetune --data toy --toy-images 12 --engine icevision --out {tmp_path}/run {option}', capsys
    )
    assert code == 1 and match in printed.err and not (tmp_path / 'run').exists()
