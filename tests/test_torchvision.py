import copy
import hashlib
import pickle
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from torchvision import models

from backbones_nb.backbones import torchvision as T
from backbones_nb.core.features import check_contract
from backbones_nb.core.parity import randomise_, rel_error
from backbones_nb.core.registry import create_backbone, list_backbones
from backbones_nb.necks.neck import attach_neck

every = (2,4,8,16,32)
small = ('resnet18','resnet50')
def noise(h=64, w=None, n=1): return torch.randn(n, 3, h, w or h, generator=torch.Generator().manual_seed(1))

def close(a, b, tol=0.):
    assert [o.shape for o in a]==[o.shape for o in b]
    assert max(rel_error(p, q) for p,q in zip(a, b))<=tol

def classifier(name): return models.get_model(name, weights=None)

def hooked(net, x):
    "The outputs of the named modules, as a classifier computes them."
    seen = {}
    hooks = [net.get_submodule(o).register_forward_hook(lambda m,i,o,k=k: seen.update({k:o.clone()})) for k,o in T.resnet_taps.items()]
    with torch.no_grad(): net.eval()(x)
    for h in hooks: h.remove()
    return [seen[k] for k in every]

def headless(sd): return {k:v for k,v in sd.items() if not k.startswith('fc.')}

# --- the table of rows

@pytest.mark.parametrize('name', T.resnets)
def test_row(name):
    with torch.device('meta'): m = create_backbone(name)
    wide = name not in ('resnet18','resnet34')
    assert m.channels==((256,512,1024,2048) if wide else (64,128,256,512)) and m.strides==(4,8,16,32)
    assert m.out_channels_list==[64,*m.channels] and m.name==name and m.pretrained is None and m.record is None
    assert list(m.trunk)==['stem','layer1','layer2','layer3','layer4'] and len(m.param_groups())==5
    with torch.device('meta'): ref = classifier(name)
    assert {k:v.shape for k,v in m.state_dict().items()}=={k:v.shape for k,v in headless(ref.state_dict()).items()}
    head = sum(p.numel() for p in ref.fc.parameters())
    published = models.get_model_weights(name).DEFAULT.meta['num_params']
    assert sum(p.numel() for p in m.parameters())==published-head
    with torch.device('meta'): maps = m.get_feature_maps(torch.zeros(2, 3, 96, 64))
    assert [tuple(o.shape) for o in maps]==[(2, c, 96//s, 64//s) for c,s in zip(m.out_channels_list, every)]

def test_names():
    assert set(T.resnets)<=set(list_backbones()) and list_backbones('wide_resnet*')==['wide_resnet50_2','wide_resnet101_2']
    assert list(T.ports)==list(T.resnets) and T.resnet18(strides=8).strides==(8,) and T.resnet18.__name__=='resnet18'

# --- the same function as torchvision's and timm's

@pytest.mark.parametrize('size', [(224,), (200,), (230,310)])
def test_parity_with_torchvision(size):
    ref = randomise_(classifier('resnet18'))
    ours = create_backbone('resnet18', strides=every)
    ours.load_state_dict(headless(ref.state_dict()), strict=True)
    with torch.no_grad(): close(ours.eval()(noise(*size)), hooked(ref, noise(*size)))

@pytest.mark.parametrize('name', [o if o in ('resnet18','resnet34','resnet50','resnext50_32x4d') else pytest.param(o, marks=pytest.mark.slow) for o in T.resnets])
def test_parity_with_torchvision_and_timm(name):
    ref = randomise_(classifier(name))
    ours = create_backbone(name, strides=every)
    ours.load_state_dict(headless(ref.state_dict()), strict=True)
    other = timm.create_model(name, features_only=True, out_indices=(0,1,2,3,4))
    other.load_state_dict(headless(ref.state_dict()), strict=True)
    x = noise(75, 100)
    with torch.no_grad():
        got = ours.eval()(x)
        close(got, hooked(ref, x))
        close(got, other.eval()(x), 1e-5)
    assert ours.feature_info.channels()==other.feature_info.channels() and ours.feature_info.reduction()==other.feature_info.reduction()

# --- a backbone as all others

@pytest.mark.parametrize('name', small)
def test_contract(name): check_contract(create_backbone(name, strides=every))

@pytest.mark.parametrize('name', small)
def test_gradients_reach_every_parameter(name):
    m = create_backbone(name)
    sum(o.square().mean() for o in m(noise(64, n=2))).backward()
    assert not [n for n,p in m.named_parameters() if p.grad is None or not p.grad.any()]

@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
def test_copies(how):
    m = randomise_(create_backbone('resnet18')).eval()
    n = how(m)
    close(n(noise(70)), m(noise(70)))
    assert (n.name,n.channels,n.strides)==('resnet18',m.channels,m.strides)

def test_export():
    m = randomise_(attach_neck(create_backbone('resnet18'), channels=16)).eval()
    close(torch.export.export(m, (noise(70,90),)).module()(noise(70,90)), m(noise(70,90)), 1e-6)

@pytest.mark.skipif(not any(map(shutil.which, ('c++','g++','clang++'))), reason='no C++ compiler')
@pytest.mark.slow
def test_compile():
    m = randomise_(attach_neck(create_backbone('resnet18'), channels=16, extra='pool')).eval()
    with torch.no_grad(): close(torch.compile(m, fullgraph=True)(noise(70)), m(noise(70)), 1e-5)

def test_deep_maps_are_not_computed_when_not_wanted():
    m = create_backbone('resnet18', strides=(4,8))
    m.layer3.register_forward_hook(lambda *a: pytest.fail('layer3 ran'))
    assert [o.shape[1] for o in m(noise())]==[64,128]

# --- published weights, without a network

@pytest.fixture
def published(tmp_path, monkeypatch):
    "torchvision's URL of resnet18 points to a file here, whose name carries its hash; the cache is empty."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    ref = randomise_(classifier('resnet18'))
    torch.save(ref.state_dict(), tmp_path/'w.pth')
    w = models.ResNet18_Weights.IMAGENET1K_V1
    def publish(sha=None, sd=None):
        if sd is not None: torch.save(sd, tmp_path/'w.pth')
        sha = sha or hashlib.sha256((tmp_path/'w.pth').read_bytes()).hexdigest()[:8]
        f = (tmp_path/'w.pth').rename(tmp_path/f'resnet18-{sha}.pth')
        monkeypatch.setattr(w.value, 'url', f.as_uri())
        return SimpleNamespace(ref=ref, file=f, weights=w, cache=tmp_path/'hub'/'checkpoints')
    return publish

@pytest.mark.parametrize('tag', [True, 'IMAGENET1K_V1', 'DEFAULT', 'ResNet18_Weights.IMAGENET1K_V1', models.ResNet18_Weights.IMAGENET1K_V1])
def test_pretrained(published, tag):
    p = published()
    m = create_backbone('resnet18', pretrained=tag, strides=every)
    close(m.eval()(noise()), hooked(p.ref, noise()))
    assert m.pretrained=='IMAGENET1K_V1' and 'weights=IMAGENET1K_V1' in repr(m) and list(p.cache.iterdir())==[p.cache/p.file.name]
    p.file.unlink() # the second time it comes from the cache
    close(create_backbone('resnet18', pretrained=tag, strides=every).eval()(noise()), m(noise()))

def test_record_survives_the_neck_and_copies(published):
    published()
    m = attach_neck(create_backbone('resnet18', pretrained=True), channels=16)
    for o in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert o.pretrained=='IMAGENET1K_V1' and o.record.mean==(.485,.456,.406) and o.record.std==(.229,.224,.225)

@pytest.mark.parametrize('name', T.resnets)
def test_record(name):
    for w in models.get_model_weights(name):
        r,t = T.weights_record(w),w.transforms()
        assert (list(r.mean),list(r.std),[r.input_size],[r.resize_size])==(t.mean,t.std,t.crop_size,t.resize_size)
        assert r.url==w.url and r.metrics==w.meta['_metrics']['ImageNet-1K'] and r.tag==w.name and name.split('_')[0] in r.name.lower()
        assert f'-{r.sha256}.pth' in r.url and len(r.sha256)==8 and int(r.sha256, 16) and r.licence is None

def test_batch_norm_freezes_with_published_weights_only(published):
    published()
    for pretrained in (False, True):
        m = create_backbone('resnet18', pretrained=pretrained).freeze_to(2).train()
        bns = {k:o for k,o in m.named_modules() if isinstance(o, nn.BatchNorm2d)}
        frozen = {k for k,o in bns.items() if not o.training}
        assert frozen==({k for k in bns if k.startswith(('bn1','layer1'))} if pretrained else set())
        was = m.bn1.running_mean.clone()
        m(noise(n=2))
        assert torch.equal(m.bn1.running_mean, was)==pretrained
        assert not m.conv1.weight.requires_grad and m.layer2[0].conv1.weight.requires_grad

def test_no_network(published):
    p = published()
    p.file.unlink()
    with pytest.raises(RuntimeError, match=r'could not get the weights ResNet18_Weights.IMAGENET1K_V1 from file:.*check the network, or put that file into .*pretrained=False') as e:
        create_backbone('resnet18', pretrained=True)
    assert '\n' not in str(e.value)

def test_wrong_hash(published):
    p = published(sha='00000000')
    with pytest.raises(RuntimeError, match='invalid hash value'): create_backbone('resnet18', pretrained=True)
    assert not list(p.cache.glob('*.pth'))

def test_incomplete_weights_raise(published):
    published(sd={k:v for k,v in classifier('resnet18').state_dict().items() if k!='layer4.1.conv2.weight'})
    with pytest.raises(RuntimeError, match='Missing key.*layer4.1.conv2.weight'): create_backbone('resnet18', pretrained=True)

class Evil:
    def __reduce__(self): return print,('ran',)

def test_weights_cannot_run_code(published, capsys):
    published(sd=dict(a=Evil()))
    with pytest.raises(RuntimeError, match='could not get the weights'): create_backbone('resnet18', pretrained=True)
    assert 'ran' not in capsys.readouterr().out.split()

@pytest.mark.parametrize('pretrained,text', [('IMAGENET1K_V7', "resnet18 has no weights 'IMAGENET1K_V7': give True or one of IMAGENET1K_V1"),
    ('coco', "has no weights 'coco': give True or one of IMAGENET1K_V1"), (3, 'has no weights 3'),
    (models.ResNet50_Weights.IMAGENET1K_V2, 'has no weights ResNet50_Weights.IMAGENET1K_V2')])
def test_unknown_weights(pretrained, text):
    with pytest.raises(ValueError, match=text): create_backbone('resnet18', pretrained=pretrained)
