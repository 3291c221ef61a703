"""The options of a run: wrong values are refused when the object is made, and presets stay as they are."""

import math
import pickle

import pytest

from backbones_nb.cli.cli import main
from backbones_nb.learners.finetune import load_run
from backbones_nb.learners.run import RunConfig, presets, run_config

wrong = [
    (dict(lr=-1), 'expected a number above 0'),
    (dict(lr=math.nan), 'expected a number above 0'),
    (dict(lr='fast'), 'expected a number'),
    (dict(wd=-0.1), 'expected at least 0'),
    (dict(valid_pct=1.0), 'expected a number between 0 and 1'),
    (dict(epochs=True), 'expected an integer'),
    (dict(epochs=2.5), 'expected an integer'),
    (dict(bs=0), 'expected at least 1'),
    (dict(size=(64, 64)), 'expected an integer'),
    (dict(seed=-1), 'expected a number from 0 to 4294967295'),
    (dict(zoom=1.0), 'expected 2 numbers'),
    (dict(zoom=(2, 1)), 'expected the lower number first'),
    (dict(zoom=(0, 1)), 'expected a number above 0'),
    (dict(detector='yolo'), "expected one of 'faster_rcnn'"),
    (dict(broken='no'), "expected one of 'stop', 'skip', 'read'"),
    (dict(bf16=1), 'expected True or False'),
    (dict(data=None), 'expected a string'),
    (dict(pretrained=3), 'expected a string, True or False'),
    (dict(model_args=['x']), 'expected a dict'),
    (dict(picture='a/b.png'), 'expected a file name without a folder'),
    (dict(picture='a.docx'), 'that ends in .png'),
]


@pytest.mark.parametrize('options,words', wrong, ids=[f'{k}={v}' for o, _ in wrong for k, v in o.items()])
def test_a_wrong_option_is_one_sentence(options, words):
    with pytest.raises(ValueError) as e:
        RunConfig(**options)
    (name,) = options
    assert str(e.value).startswith(f'got {name}=') and words in str(e.value) and '\n' not in str(e.value)


def test_options_that_are_right_pass(tmp_path):
    RunConfig(backbone=None, pretrained='vt', lr=1, zoom=[1.0, 1.0], data=tmp_path, out=tmp_path, wd=0, color=0)


def test_a_run_cannot_change_its_preset():
    c = run_config('demo')
    c.model_args['anchor_scale'] = 9
    c.backbone_args['stem'].append(9)
    again = run_config('demo')
    assert again.model_args['anchor_scale'] == 3.5 and again.backbone_args['stem'] == [32, 32, 64]
    assert presets['demo']['model_args']['anchor_scale'] == 3.5


@pytest.mark.parametrize(
    'content', [b'', b'no pickle', pickle.dumps([1, 2]), b'\x80\x04cno_such_module\nThing\n.'], ids=repr
)
def test_a_damaged_learner_is_one_sentence(tmp_path, content, capsys):
    (tmp_path / 'learner.pkl').write_bytes(content)
    with pytest.raises(ValueError, match='is not a learner that this installation can read'):
        load_run(tmp_path)
    assert main(['predict', str(tmp_path), 'a.jpg']) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: got run=') and err.count('\n') == 1
