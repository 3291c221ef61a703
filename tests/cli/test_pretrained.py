"Weights from a file, from the command line to the trained net."

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from common import write_drawn
from safetensors.torch import load_file, save_file

from backbones_nb.cli.cli import main
from backbones_nb.core.create import create_backbone
from backbones_nb.detectors import retinanet
from backbones_nb.detectors.detector_files import save_detector
from backbones_nb.learners.finetune import load_run

body = 'vovnet19_slim_dw'
tiny = (
    f'--backbone {body} --detector retinanet --size 64 --epochs 1 --bs 4 --cpu-preset --no-validate --lr 1e-9'.split()
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Data, a file of a backbone, one of a whole detector, and files that are none."
    root = tmp_path_factory.mktemp('weights')
    write_drawn(root, train=4, valid=2)
    torch.manual_seed(3)
    net = create_backbone(body, strides=None)
    for p in net.parameters():
        p.data.mul_(1.5)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, root / 'body.safetensors')
    torch.save(dict(model=net.state_dict()), root / 'body.pth')
    whole = retinanet.model(4, create_backbone(body, strides=(8, 16, 32)), neck_channels=64)
    save_detector(whole, root / 'detector.safetensors', ['background', 'green', 'blue', 'red'])
    save_file(
        {k: v.contiguous() for k, v in create_backbone('resnet18').state_dict().items()}, root / 'other.safetensors'
    )
    (root / 'text.pth').write_text('no weights')
    return root


@pytest.fixture
def server(root, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('BACKBONES_NB_CACHE', str(tmp_path / 'cache'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(root)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def finetune(root, out, *more):
    return main(['finetune', '--data', str(root / 'data'), '--out', str(out), *tiny, *map(str, more)])


def assert_begins_with(out, file, prefix=''):
    net = load_run(out).model
    sd = net.backbone.body.state_dict()
    want = {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
    convs = [k for k, v in sd.items() if v.dim() == 4 and k in want]
    assert len(convs) > 10
    for k in convs:
        torch.testing.assert_close(sd[k], want[k], atol=1e-6, rtol=1e-5)
    return net


@pytest.mark.parametrize(
    'source',  # core/test_weight_files.py reads the other kinds of files in every run
    ['path', *(pytest.param(o, marks=pytest.mark.slow) for o in ('pth', 'file')), 'http', 'detector'],
)
def test_a_backbone_begins_with_the_weights_of_a_file(root, tmp_path, server, source):
    f = root / 'body.safetensors'
    given = dict(
        path=f,
        pth=root / 'body.pth',
        file=f.as_uri(),
        http=f'{server}/{f.name}',
        detector=root / 'detector.safetensors',
    )[source]
    assert finetune(root, tmp_path / 'run', '--pretrained', given) == 0
    whole = (root / 'detector.safetensors', 'backbone.body.') if source == 'detector' else (f,)
    net = assert_begins_with(tmp_path / 'run', *whole)
    assert net.backbone.body.pretrained


@pytest.mark.parametrize('source', ['path', 'http'])
def test_a_detector_begins_with_the_weights_of_a_file(root, tmp_path, server, source):
    f = root / 'detector.safetensors'
    given = f if source == 'path' else f'{server}/{f.name}'
    assert finetune(root, tmp_path / 'run', '--pretrained-detector', given, '--backbone', 'own') == 0
    net = assert_begins_with(tmp_path / 'run', f, 'backbone.body.')
    key = 'head.classification_head.cls_logits.weight'
    new, old = (o[key].unflatten(0, (9, -1)) for o in (net.state_dict(), load_file(f)))
    for i, j in ((1, 3), (2, 2)):  # red and blue keep their rows, under new labels
        torch.testing.assert_close(new[:, i], old[:, j], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    'name,words',
    [
        ('text.pth', 'text.pth'),
        ('other.safetensors', 'does not fit vovnet19_slim_dw'),
        ('gone.safetensors', 'does not exist: check the path'),
        ('HTTP/gone.safetensors', '404'),
    ],
)
@pytest.mark.parametrize('option', ['--pretrained', '--pretrained-detector'])
def test_a_wrong_file_is_refused_before_training(root, tmp_path, server, capsys, option, name, words):
    given = name.replace('HTTP', server) if name.startswith('HTTP') else root / name
    assert finetune(root, tmp_path / 'run', option, given) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and not (tmp_path / 'run').exists()
    if option == '--pretrained' or 'other' not in name:
        assert words in err
