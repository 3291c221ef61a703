import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import randomize_, rel_error
from backbones_nb.backbones.darknet import _vt_renames
from backbones_nb.core.published import weight_records
from backbones_nb.core.weight_files import is_weight_file

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('constant_init')


def last(model, size=64):
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().select()(x)[-1]


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize(
    'value, expected',
    [
        ('ra_in1k', False),
        (True, False),
        (False, False),
        (None, False),
        ('IMAGENET1K_V1', False),
        ('a/b.pth', True),
        ('b.safetensors', True),
        ('https://x.org/download?file=3', True),
        ('darknet53.conv.74', True),
        ('yolov3.weights', True),
    ],
)
def test_a_file_is_told_from_a_tag(value, expected):
    assert is_weight_file(value) is expected


@pytest.fixture(scope='module')
def small_net(constant_init):
    return randomize_(create_backbone('vovnet19_slim_dw'))


@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'backbone.body.', 'module._orig_mod.model.'])
@pytest.mark.parametrize('key', [None, 'state_dict', 'model', 'model_state_dict'])
def test_our_names_under_any_prefix(tmp_path, small_net, prefix, key):
    net = small_net
    sd = {prefix + k: v for k, v in net.state_dict().items()}
    if prefix:
        sd['neck.lateral.weight'] = torch.ones(3)  # of the model around it
    torch.save({key: sd, 'epoch': 3} if key else sd, tmp_path / 'a.pth')
    got = create_backbone('vovnet19_slim_dw', pretrained=str(tmp_path / 'a.pth'))
    assert same(got, net)
    assert got.pretrained == got.record.tag == 'a.pth'
    assert got.record.url == (tmp_path / 'a.pth').as_uri()
    assert (got.record.license, got.record.metrics) == (None, {})


@pytest.mark.parametrize(
    'name, theirs',
    [('vovnet19_dw', 'ese_vovnet19b_dw'), ('vovnet39', 'ese_vovnet39b'), ('cspdarknet53', 'cspdarknet53')],
)
def test_timms_names_bring_timms_variant(tmp_path, name, theirs):
    ref = randomize_(timm.create_model(theirs)).eval()
    save_file(ref.state_dict(), tmp_path / 'a.safetensors')
    net = create_backbone(name, pretrained=tmp_path / 'a.safetensors')
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert rel_error(last(net), ref.forward_features(x)) < 1e-5
    assert net.record.mean == next(r for r in weight_records(name) if r.publisher == 'timm').mean


def test_timms_split_is_converted_when_another_is_asked_for(tmp_path):
    ref = randomize_(timm.create_model('cspdarknet53')).eval()
    save_file(ref.state_dict(), tmp_path / 'a.safetensors')
    net = create_backbone('cspdarknet53', pretrained=tmp_path / 'a.safetensors', split='convs')
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert rel_error(last(net), ref.forward_features(x)) < 1e-5
    assert net.config['split'] == 'convs'


def test_vision_toolboxs_names_bring_its_activation(tmp_path):
    "Its names would fit under timm's renames, too, and timm's activation would be wrong without an error."
    net = randomize_(create_backbone('darknet53', variant='vt'))
    sd = {k.replace('.norm.', '.bn.'): v for k, v in net.state_dict().items()}
    assert _vt_renames
    torch.save(sd, tmp_path / 'vt.pth')
    got = create_backbone('darknet53', pretrained=tmp_path / 'vt.pth')
    assert same(got, net) and type(got.stem.act) is torch.nn.ReLU


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'vgg11_bn', 'efficientnet_b0'])
def test_torchvisions_classifiers_and_what_they_drop(tmp_path, name):
    ref = get_model(name, weights=None)
    for o in ref.modules():
        if isinstance(o, nn.Linear):  # those of VGG have most of its numbers, and none is kept
            o.weight = nn.Parameter(torch.zeros(1))
    theirs = randomize_(ref, x=torch.zeros(0)).state_dict()
    torch.save({f'module.{k}': v for k, v in theirs.items()}, tmp_path / 'a.pth')
    net = create_backbone(name, pretrained=tmp_path / 'a.pth')
    assert all(torch.equal(v, theirs[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    'name', ['resnet18', 'regnety_002', 'convnext_atto', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224']
)
def test_timm_models_from_whole_classifiers_and_from_themselves(tmp_path, name):
    ref = randomize_(timm.create_model(name), x=torch.zeros(0))
    save_file(ref.state_dict(), tmp_path / 'a.safetensors')
    net = create_backbone(f'timm/{name}', pretrained=tmp_path / 'a.safetensors')
    have = {tuple(v.shape): 0 for v in net.state_dict().values()}
    assert have and net.record.mean == tuple(ref.pretrained_cfg['mean'])
    save_file(net.state_dict(), tmp_path / 'b.safetensors')
    assert same(create_backbone(f'timm/{name}', pretrained=tmp_path / 'b.safetensors'), net)
    save_file(net.body.state_dict(), tmp_path / 'c.safetensors')
    torch.save(ref.state_dict() | {'extra.weight': torch.ones(2)}, tmp_path / 'd.pth')
    with pytest.raises(RuntimeError, match='1 unexpected'):
        create_backbone(f'timm/{name}', pretrained=tmp_path / 'd.pth')


def test_the_body_of_a_model_with_a_neck(tmp_path):
    ref = randomize_(get_model('resnet18', weights=None))
    torch.save(ref.state_dict(), tmp_path / 'a.pth')
    net = create_backbone('resnet18_fpn', pretrained=tmp_path / 'a.pth')
    assert torch.equal(net.body.conv1.weight, ref.conv1.weight) and net.has_neck
    torch.save(net.state_dict(), tmp_path / 'b.pth')
    assert same(create_backbone('resnet18_fpn', pretrained=tmp_path / 'b.pth'), net)


def test_what_does_not_fit_is_listed(tmp_path):
    sd = create_backbone('vovnet19_slim_dw').state_dict()
    first = next(iter(sd))
    sd.pop(first)
    torch.save(sd | {'more.weight': torch.ones(1)}, tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=rf'a\.pth does not fit .* 1 missing \({first}\) and 1 unexpected \(more'):
        create_backbone('vovnet19_slim_dw', pretrained=tmp_path / 'a.pth')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        create_backbone('vovnet19_slim_dw', pretrained='nowhere.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        create_backbone('vovnet19_slim_dw', pretrained=tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'object.pth')
    with pytest.raises(ValueError, match='can run arbitrary code'):
        create_backbone('vovnet19_slim_dw', pretrained=tmp_path / 'object.pth')


def test_a_url_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    net = randomize_(create_backbone('vovnet19_slim_dw'))
    (tmp_path / 'www').mkdir()
    save_file(net.state_dict(), tmp_path / 'www' / 'a.safetensors')
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / 'www')
    handler.log_message = lambda *a: None
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/a.safetensors'
    try:
        got = create_backbone('vovnet19_slim_dw', pretrained=url)
    finally:
        server.shutdown()
        server.server_close()
    assert same(got, net) and got.record.url == url
    assert same(create_backbone('vovnet19_slim_dw', pretrained=url), net)  # the server is gone


def test_a_record_of_a_file_is_saved_with_the_model(tmp_path):
    net = create_backbone('vovnet19_slim_dw')
    torch.save(net.state_dict(), tmp_path / 'a.pth')
    create_backbone('vovnet19_slim_dw', pretrained=tmp_path / 'a.pth').save_pretrained(tmp_path / 'saved')
    spec = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert (spec['pretrained'], spec['record']['license']) == ('a.pth', None)
