import numpy as np
import pytest
import torch
from torch import nn

from backbones_nb import create_backbone
from backbones_nb.analysis.parity import randomize_
from backbones_nb.backbones.darknet_files import _darknet_rows, read_darknet, write_darknet

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('constant_init')


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize(
    'name, file, classes, size',
    [
        ('darknet53', 'darknet53.conv.74', None, 162_482_580),  # the published file's
        ('darknet19', 'darknet19_448.conv.23', None, None),
        ('darknet19', 'darknet19.weights', 1000, None),
    ],
)
def test_what_is_written_is_read_to_the_bit(tmp_path, name, file, classes, size):
    net = randomize_(create_backbone(name, variant='cfg'))
    path = write_darknet(net, tmp_path / file, classes and nn.Conv2d(1024, classes, 1), seen=2**33)
    assert size in (None, path.stat().st_size)
    got = create_backbone(name, pretrained=str(path))
    assert same(got, net)
    assert (got.record.mean, got.record.std, got.record.license) == ((0, 0, 0), (1, 1, 1), None)
    again = write_darknet(got, tmp_path / 'again', seen=2**33)
    n = again.stat().st_size
    assert again.read_bytes() == path.read_bytes()[:n]


def test_the_bytes_by_hand(tmp_path):
    "Header, then bias, weight, mean, variance, convolution; checked without the reader."
    net = randomize_(create_backbone('darknet19', variant='cfg'))
    raw = write_darknet(net, tmp_path / 'a.weights', seen=7).read_bytes()
    assert np.frombuffer(raw[:12], '<i4').tolist() == [0, 2, 0] and np.frombuffer(raw[12:20], '<i8')[0] == 7
    numbers = torch.from_numpy(np.frombuffer(raw[20:], '<f4').copy())
    norm, conv = net.stem.norm, net.stem.conv.weight
    parts = [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv]
    want = torch.cat([o.detach().flatten() for o in parts])
    assert torch.equal(numbers[: len(want)], want)
    assert torch.equal(numbers[len(want) : len(want) + 64], net.stages[0].conv.norm.bias)


def test_yolov3_begins_with_darknet53(tmp_path):
    with torch.device('meta'):
        net = create_backbone('darknet53')
    numbers = np.arange(1000, dtype='<f4')
    with open(tmp_path / 'yolov3.weights', 'wb') as f:
        f.write(np.array([0, 2, 0, 0, 0], '<i4').tobytes() + numbers.tobytes())
        f.truncate(20 + 4 * 62_001_757)
    assert (tmp_path / 'yolov3.weights').stat().st_size == 248_007_048
    sd = read_darknet(tmp_path / 'yolov3.weights', net)
    assert sd['stem.norm.bias'].tolist() == numbers[:32].tolist() and len(sd) == len(_darknet_rows(net))


@pytest.mark.parametrize(
    'change, match',
    [
        (lambda b: b[:-4], 'truncated or belongs to another net'),
        (lambda b: b + bytes(4 * 1024), '1,024 numbers more'),
        (lambda b: b'PK\x03\x04' + b[4:], 'does not start like'),
        (lambda b: b[:8], 'does not start like'),
    ],
)
def test_another_file_is_refused(tmp_path, change, match):
    path = write_darknet(create_backbone('darknet19', variant='cfg'), tmp_path / 'a.weights')
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=match):
        create_backbone('darknet19', pretrained=path)


def test_the_old_header_and_other_names(tmp_path):
    net = randomize_(create_backbone('darknet19', variant='cfg'))
    path = write_darknet(net, tmp_path / 'a.weights')
    path.write_bytes(np.array([0, 1, 0, 7], '<i4').tobytes() + path.read_bytes()[20:])
    assert same(create_backbone('darknet19', pretrained=path), net)
    with pytest.raises(ValueError, match="leave variant out"):
        create_backbone('darknet19', pretrained=path, variant='vt')
    with pytest.raises(ValueError, match='only darknet19 and darknet53'):
        create_backbone('vovnet39', pretrained=path)
