import json
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import torch
from faster_coco_eval import mask as mask_api
from PIL import Image

from backbones_nb.cli.cli import call_command, call_subcommand, finetune_command, main
from backbones_nb.data.coco import to_coco
from backbones_nb.data.pets import pets_splits
from backbones_nb.learners.finetune import finetune, _get_engine, model_builder
from backbones_nb.learners.run import RunConfig, detectors, open_data, presets, run_config

body = dict(backbone='vovnet19_slim_dw', backbone_args=dict(strides=(8, 16, 32)))


@pytest.fixture
def records(toy):
    train, valid, cm, _ = pets_splits(toy, masks=True)
    return SimpleNamespace(train=train[::6][:6], valid=valid[::4][:3], cm=cm)


def write_coco(path, records, cm):
    path.write_text(json.dumps(to_coco(records, cm, images=records[0].path.parent)))
    return path


def write_voc(root, records, cm, splits=None):
    for o in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / o).mkdir(parents=True)
    for r in records:
        r.image().save(root / 'JPEGImages' / f'{r.image_id}.jpg')
        a = ET.Element('annotation')
        for label, (x1, y1, x2, y2) in zip(r.labels, r.boxes):
            o = ET.SubElement(a, 'object')
            ET.SubElement(o, 'name').text = cm.get_name(label)
            b = ET.SubElement(o, 'bndbox')
            for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), (x1 + 1, y1 + 1, x2, y2)):
                ET.SubElement(b, k).text = str(v)
        ET.ElementTree(a).write(root / 'Annotations' / f'{r.image_id}.xml')
    for k, rs in (splits or {}).items():
        (root / 'ImageSets' / 'Main' / f'{k}.txt').write_text('\n'.join(r.image_id for r in rs))
    return root


def assert_same_records(a, b):
    assert len(a) == len(b) > 0
    for p, q in zip(a, b):
        assert (
            p.size == q.size and p.labels.tolist() == q.labels.tolist() and p.boxes == pytest.approx(q.boxes, abs=1e-3)
        )


# --- data by path


def test_two_coco_files(tmp_path, records):
    files = [write_coco(tmp_path / f'{k}.json', getattr(records, k), records.cm) for k in ('train', 'valid')]
    train, valid, cm, report = open_data(files[0], valid=files[1], images=records.train[0].path.parent, masks=True)
    assert_same_records(train, records.train)
    assert_same_records(valid, records.valid)
    assert cm == records.cm and not len(report) and report.total == 9
    assert (train[0].masks() == records.train[0].masks()).all()


def test_one_coco_file_is_split(tmp_path, records):
    file = write_coco(tmp_path / 'all.json', records.train, records.cm)
    splits = [open_data(file, images=records.train[0].path.parent, valid_pct=0.34, seed=s)[:2] for s in (1, 1, 2)]
    ids = [[[r.image_id for r in part] for part in o] for o in splits]
    assert [len(o) for o in ids[0]] == [4, 2] and ids[0] == ids[1] != ids[2] and not set(ids[0][0]) & set(ids[0][1])


def test_voc_by_its_lists(tmp_path, records):
    root = write_voc(
        tmp_path / 'voc', records.train + records.valid, records.cm, dict(train=records.train, val=records.valid)
    )
    train, valid, cm, _ = open_data(root)
    assert cm.names[1:] == sorted(records.cm.names[1:])
    by_id = {r.image_id: r for r in [*train, *valid]}
    assert {r.image_id for r in valid} == {r.image_id for r in records.valid}
    assert_same_records([by_id[r.image_id] for r in records.train], records.train)


def test_voc_without_lists_is_split(tmp_path, records):
    train, valid, *_ = open_data(write_voc(tmp_path / 'voc', records.train, records.cm), valid_pct=0.34)
    assert len(train) == 4 and len(valid) == 2


@pytest.mark.parametrize(
    'make,kwargs,match',
    [
        (lambda p, r: p / 'nowhere', {}, 'does not exist'),
        (lambda p, r: p, {}, 'does not look like a data set'),
        (lambda p, r: write_voc(p / 'voc', r.train, r.cm), dict(valid='x.json'), 'does not exist'),
        (lambda p, r: write_coco(p / 'a.json', r.train, r.cm), dict(images='nowhere'), 'nowhere'),
    ],
)
def test_wrong_data(tmp_path, records, make, kwargs, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        open_data(make(tmp_path, records), **kwargs)


# --- check


def test_check(tmp_path, records, capsys):
    file = write_coco(tmp_path / 'a.json', records.train, records.cm)
    images = str(records.train[0].path.parent)
    assert main(['check', str(file), '--images', images]) == 0
    assert 'images, all readable' in capsys.readouterr().out
    data = json.loads(file.read_text())
    data['annotations'][0]['bbox'][2] = 0
    file.write_text(json.dumps(data))
    assert main(['check', str(file), '--images', images, '--all']) == 1
    out = capsys.readouterr().out
    assert 'box without area' in out and 'error: box without area:' in out
    assert main(['check', str(tmp_path / 'nowhere')]) == 1
    assert 'error: there is no' in capsys.readouterr().err


# --- every detector


@pytest.mark.parametrize('detector', detectors)
def test_finetune_and_predict(toy, records, tmp_path, detector, capsys):
    # these say nothing below their threshold
    more = dict(score_thresh=0.0) if detector in ('retinanet', 'fcos') else {}
    train, valid = (
        str(write_coco(tmp_path / f'{k}.json', getattr(records, k), records.cm)) for k in ('train', 'valid')
    )
    config = RunConfig(
        data=train,
        valid=valid,
        images=str(toy / 'images'),
        out=str(tmp_path / 'run'),
        detector=detector,
        **body,
        size=64,
        epochs=1,
        bs=3,
        cpu_preset=True,
        model_args=more,
    )
    res = finetune(config, validate=False)
    assert ('mask_metrics' in res) == (detector == 'mask_rcnn') and 0 <= res['metrics']['AP50'] <= 1
    assert res == json.loads((tmp_path / 'run' / 'metrics.json').read_text()) | dict(config=res['config'])
    photo = next(iter((toy / 'images').glob('*.jpg')))
    file = tmp_path / 'found.json'
    args = f'predict {tmp_path}/run {photo} --score-thr 0 --json {file} --out {tmp_path}'
    assert main(args.split()) == 0
    found = json.loads(file.read_text())[str(photo)]
    w, h = Image.open(photo).size
    assert found and all(
        o['name'] in ('cat', 'dog') and 0 <= o['box'][0] <= o['box'][2] <= w and 0 <= o['box'][1] <= o['box'][3] <= h
        for o in found
    )
    assert all(
        (mask_api.decode(o['mask']).shape == (h, w)) if detector == 'mask_rcnn' else 'mask' not in o for o in found
    )
    assert 'AP50' in capsys.readouterr().out and (tmp_path / f'{photo.stem}.png').exists()


def test_own_backbone():
    with torch.device('meta'):
        net = model_builder('efficientdet', None, 128, model_name='tf_efficientdet_lite1')(num_classes=3)
    assert net.name == 'tf_efficientdet_lite1' and net.img_size == (128, 128)
    with torch.device('meta'):
        assert 'resnet50' in repr(model_builder('faster_rcnn', None)(num_classes=3))


@pytest.mark.parametrize(
    'kwargs,match',
    [
        (dict(detector='yolo'), "got detector='yolo', expected one of faster_rcnn"),
        (dict(detector='fcos', backbone='resnet_18'), "there is no backbone 'resnet_18'.*resnet18"),
        (dict(detector='fcos', pretrained_detector='coco', pretrained=True), 'leave the other two out'),
    ],
)
def test_wrong_model(kwargs, match):
    with pytest.raises(ValueError, match=match):
        model_builder(**kwargs)


# --- options and presets


def parsed(line, monkeypatch):
    "The configuration that a command line of `finetune` stands for."
    seen = []
    monkeypatch.setattr('backbones_nb.learners.finetune.finetune', seen.append)
    call_command(finetune_command, line.split(), 'backbones-nb finetune')
    return seen[0]


# what `make demo` was before it had a name
demo = """--data toy --toy-images 1400 --backbone vovnet19_slim
    --backbone-set strides=[8,16] stem=[32,32,64] mids=[32,40,48,56] outs=[64,128,192,256]
    --size 128 --epochs 8 --bs 8 --lr 1.5e-3 --cpu-preset
    --set neck_norm=gn anchor_scale=3.5 box_batch_size_per_image=32
        rpn_post_nms_top_n_train=60 rpn_pre_nms_top_n_train=200
    --loss-weights loss_classifier=3 --zoom 1 1 --color 0.1 --no-validate --seed 0 --cache"""


def test_demo_is_the_run_that_it_was(monkeypatch):
    a, b = parsed(demo, monkeypatch), parsed('--preset demo', monkeypatch)
    assert a.zoom == [1.0, 1.0] and a.__dict__ | dict(zoom=(1.0, 1.0)) == b.__dict__
    assert b == run_config('demo') and list(presets) == ['demo']


def test_options_override_a_preset(monkeypatch):
    c = parsed('--preset demo --epochs 1 --set anchor_scale=4 --picture a.png', monkeypatch)
    assert (c.epochs, c.lr, c.picture, c.model_args['anchor_scale'], c.model_args['neck_norm']) == (
        1,
        1.5e-3,
        'a.png',
        4,
        'gn',
    )
    assert presets['demo']['model_args']['anchor_scale'] == 3.5 and c.detector_args['head_channels'] == 256


def test_defaults_are_those_of_the_config(monkeypatch):
    assert parsed('', monkeypatch) == RunConfig()
    c = parsed('--pretrained --backbone own --no-augment --pretrained-detector coco --bf16', monkeypatch)
    assert c == RunConfig(pretrained=True, backbone=None, augment=False, pretrained_detector='coco', bf16=True)


def test_every_option_has_a_comment(capsys):
    with pytest.raises(SystemExit):
        call_command(finetune_command, ['--help'], 'backbones-nb finetune')
    text = capsys.readouterr().out
    for f in RunConfig.__dataclass_fields__.values():
        name = f.name.replace('_', '-')
        assert f'--{name}' in text or f'--no-{name}' in text or f.name in ('model_args', 'backbone_args'), f.name
    assert '--set' in text and '--backbone-set' in text and 'weight decay (default: 0.01)' in text


@pytest.mark.parametrize(
    'line,code,words',
    [
        ('', 2, 'required'),
        ('fly', 2, "invalid choice: 'fly'"),
        ('list --nothing', 2, 'unrecognized'),
        ('finetune --detector yolo', 2, 'invalid choice'),
        ('finetune --set a', 1, 'expected NAME=VALUE'),
        ('finetune --engine torch', 1, "got engine='torch'"),
    ],
)
def test_wrong_lines(line, code, words, capsys, tmp_path):
    try:
        got = main([*line.split(), *['--out', str(tmp_path / 'run')] * line.startswith('finetune')])
    except SystemExit as e:
        got = e.code
    err = capsys.readouterr().err
    assert got == code and words in err and not (tmp_path / 'run').exists()


def test_commands_of_commands(capsys):
    seen = []

    def plain(x: int, flag: bool = False):
        "Does something."
        seen.append((x, flag))
        return 3

    def raw(argv):
        "Parses by itself."
        seen.append(argv)

    cmds = dict(plain=plain, raw=raw)
    assert (
        call_subcommand(cmds, ['plain', '4', '--flag'], 'p') == 3
        and call_subcommand(cmds, ['raw', '--help', '-x'], 'p') is None
    )
    assert seen == [(4, True), ['--help', '-x']]
    with pytest.raises(SystemExit) as e:
        call_subcommand(cmds, ['--help'], 'p')
    out = capsys.readouterr().out
    assert e.value.code == 0 and 'plain      Does something.' in out and 'raw        Parses by itself.' in out


def test_unknown_names():
    with pytest.raises(ValueError, match="expected one of demo"):
        run_config('demos')
    with pytest.raises(TypeError, match='epochs'):
        run_config(epoch=3)
    with pytest.raises(ValueError, match="expected one of fastai"):
        _get_engine('lightning')
