import csv
import math
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.torch_core import find_bs
from PIL import Image, ImageDraw
from torch import nn

from backbones_nb.core.features import Backbone, feature_row
from backbones_nb.core.layers import ConvNormAct
from backbones_nb.data.batches import detection_dls
from backbones_nb.data.records import ClassMap, Record
from backbones_nb.detectors import faster_rcnn
from backbones_nb.learners.detection import DetectionLearner, Targets, detection_learner
from backbones_nb.learners.metrics import COCOMetric, coco_eval

cm = ClassMap(['red','blue'])
parts = ['classifier','box_reg','objectness','rpn_box_reg']

class Tiny(Backbone):
    def __init__(self, strides=None):
        super().__init__()
        self.stem,self.a,self.b = ConvNormAct(3, 8, 3, 2),ConvNormAct(8, 16, 3, 2),ConvNormAct(16, 32, 3, 2)
        self.set_trunk(dict(stem=['stem'], stage1=['a'], stage2=['b']), [feature_row(16, 4, 'a'), feature_row(32, 8, 'b')], strides)

def model(num_classes=3, **kw):
    torch.manual_seed(0)
    return faster_rcnn.model(num_classes, Tiny(), neck_channels=16, head_channels=32, box_batch_size_per_image=16, rpn_post_nms_top_n_train=50,
                             rpn_post_nms_top_n_test=30, box_detections_per_img=10, **kw)

def draw(i, folder):
    rng = np.random.RandomState(i)
    w,h = (int(o) for o in rng.randint(50, 100, 2))
    img,l,n = Image.new('RGB', (w,h), (90,90,90)),1+i%2,int(i%5!=4)
    bw,bh = rng.randint(20, 40, 2)
    x,y = rng.randint(0, w-bw),rng.randint(0, h-bh)
    if n: ImageDraw.Draw(img).rectangle([x, y, x+bw-1, y+bh-1], fill=[(255,0,0),(0,0,255)][l-1])
    img.save(folder/f'{i}.png')
    return Record(image_id=f'im{i}', path=folder/f'{i}.png', size=(h,w), boxes=torch.tensor([[x,y,x+bw,y+bh]]*n, dtype=torch.float32).reshape(-1,4),
                  labels=torch.tensor([l]*n, dtype=torch.int64), masks=None, iscrowd=torch.zeros(n, dtype=torch.int64))

@pytest.fixture(scope='module')
def records(tmp_path_factory):
    d = tmp_path_factory.mktemp('drawn')
    return [draw(i, d) for i in range(23)]

def make_dls(records, path, **kw): return detection_dls(records[:16], records[16:], cm, **dict(size=64, bs=4, val_bs=3, seed=1, device='cpu',
                                                                                                cache=True, path=path)|kw)

@pytest.fixture
def learn(records, tmp_path): return make(records, tmp_path)

def make(records, path, net=None, **kw):
    res = detection_learner(make_dls(records, path), net or model(), **dict(lr=2e-3)|kw)
    res.remove_cb(res.progress)
    res.logger = lambda *a: None
    return res

def named(learn, row=-1): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[row]))

def test_one_table_of_losses_parts_and_ap(learn):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit_one_cycle(2)
    r = named(learn)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss',*[f'train_{p}' for p in parts],*[f'valid_{p}' for p in parts],
                                               'AP','AP50','time']
    assert r['valid_loss']==pytest.approx(sum(r[f'valid_{p}'] for p in parts), rel=1e-5)
    assert all(math.isfinite(v) for v in r.values()) and 0<=r['AP']<=r['AP50']<=1

def test_validation_loss_is_the_mean_over_images(learn):
    "7 images in batches of 3, 3, 1: fastai's own count would weigh each batch by the boxes of its first image."
    from backbones_nb.learners.detection import fixed_rng
    got,total = learn.validate()[0],0.
    learn.model.eval()
    for i,(x,y) in enumerate(learn.dls.valid):
        with torch.no_grad(), fixed_rng(x.device, i): total += sum(learn.model(x.as_subclass(torch.Tensor), list(y), both=True)[0].values()).item()*len(x)
    assert got==pytest.approx(total/7, rel=1e-5)

def test_validation_repeats_and_leaves_the_model_alone(learn):
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    a,b = learn.validate(),learn.validate()
    assert a==b and len(a)==7
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())

def test_targets_count_images():
    t = Targets([dict(boxes=torch.zeros(5,4)), dict(boxes=torch.zeros(0,4))])
    assert find_bs((t,))==2 and len(t)==2 and [len(o['boxes']) for o in t]==[5,0]

def test_it_learns(records, tmp_path):
    learn = make(records, tmp_path)
    before = learn.validate()
    learn.fit_one_cycle(12, 5e-3)
    after = learn.validate()
    assert after[0]<before[0]*0.7 and after[-1]>before[-1]+0.1

def test_metrics_equal_a_separate_evaluation(learn):
    learn.fit(3, 5e-3)
    preds,targs = learn.get_preds()
    assert [t['image_id'] for t in targs]==[f'im{i}' for i in range(16, 23)] and len(preds)==7
    want = coco_eval(preds, targs, cm)
    assert learn.validate()[-2:]==[want['AP'],want['AP50']] and learn.evaluate(per_class=True)['per_class'].keys()=={'red','blue'}

def test_metrics_by_key_weights_and_no_parts(records, tmp_path):
    learn = make(records, tmp_path, metrics=['AP75', COCOMetric('AR10', name='recall')], parts=False, loss_weights=dict(loss_classifier=0.))
    learn.fit(1)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','AP75','recall','time']
    full = make(records, tmp_path)
    v = dict(zip(['valid_loss',*parts], full.validate()))
    light = make(records, tmp_path, loss_weights=dict(loss_classifier=0., loss_box_reg=2.)).validate()[0]
    assert light==pytest.approx(v['valid_loss']-v['classifier']+v['box_reg'], rel=1e-4)

def test_groups_freeze_and_discriminative_rates(learn):
    n = len(learn.model.param_groups())
    learn.create_opt()
    assert learn.n_backbone==3 and len(learn.opt.param_lists)==n>3
    assert sum(len(g) for g in learn.opt.param_lists)==len([*learn.model.parameters()])
    learn.freeze()
    own = {id(p) for g in learn.model.param_groups()[:3] for p in g}
    for k,m in learn.model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): assert m.weight.requires_grad!=(id(m.weight) in own), k
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fit(1, slice(1e-5, 1e-3))
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert lrs[0]==pytest.approx(1e-5) and lrs[-1]==pytest.approx(1e-3) and lrs==sorted(lrs)

def test_fine_tune_trains_heads_first(learn):
    seen = []
    before = {k:v.clone() for k,v in learn.model.named_parameters()}
    def after_first():
        seen.append({k for k,v in learn.model.named_parameters() if not torch.equal(v, before[k])})
    unfreeze = learn.unfreeze
    learn.unfreeze = lambda: (after_first(), unfreeze())
    learn.fine_tune(1, 1e-3)
    frozen = {id(p) for g in learn.model.param_groups()[:3] for p in g}
    conv = {k for k,m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    changed = {k.rsplit('.', 1)[0] for k in seen[0]} & conv
    by_id = dict(learn.model.named_modules())
    assert changed and all(id(by_id[k].weight) not in frozen for k in changed)
    assert any(not torch.equal(v, before[k]) for k,v in learn.model.named_parameters() if id(v) in frozen)

def test_lr_find_puts_everything_back(learn):
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    lr = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7<lr.valley<10 and all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())

def image_kinds(r):
    img = r.image().convert('RGB')
    a = np.asarray(img)
    return dict(record=r, path=r.path, str=str(r.path), pil=img, array=a, float=(a/255).astype(np.float32), tensor=torch.tensor(a).permute(2,0,1),
                float_tensor=torch.tensor(a).permute(2,0,1)/255)

def test_predict_is_in_pixels_of_the_original(records, tmp_path):
    learn = make(records, tmp_path)
    learn.fit_one_cycle(10, 5e-3)
    r = records[0]
    big = r.image().convert('RGB').resize((r.size[1]*4, r.size[0]*4), Image.NEAREST)
    outs = {k:learn.predict(v, score_thr=0.05) for k,v in image_kinds(r).items()}
    one = outs['record']
    assert len(one['boxes'])>0 and set(one['names'])<={'red','blue'} and len(one['names'])==len(one['labels'])
    for o in outs.values():
        torch.testing.assert_close(o['boxes'], one['boxes'], atol=1e-3, rtol=1e-3)
        assert o['labels'].tolist()==one['labels'].tolist()
    best = learn.predict(big, score_thr=0.05)['boxes'][0]
    assert (best/4-one['boxes'][0]).abs().max()<6
    assert best[0::2].max()<=r.size[1]*4 and best[1::2].max()<=r.size[0]*4
    many = learn.predict([r.path, big], score_thr=0.05)
    assert len(many)==2
    torch.testing.assert_close(many[0]['boxes'], one['boxes'], atol=1e-2, rtol=1e-3)
    assert (learn.predict(r, score_thr=0.3)['scores']>=0.3).all() and learn.predict([])==[]

def test_get_preds_of_training_is_in_order_and_not_augmented(learn):
    (xs,_,t),(xs2,_,_) = learn.get_preds(0, with_input=True),learn.get_preds(0, with_input=True)
    assert [o['image_id'] for o in t]==[f'im{i}' for i in range(16)] and all(torch.equal(a, b) for a,b in zip(xs, xs2))
    preds,targs = learn.get_preds(dl=learn.dls.test_dl([f'{r.path}' for r in learn.dls.valid_ds.items]))
    assert len(preds)==7 and targs==[]

def test_save_load_and_export(learn, records, tmp_path):
    learn.fit(1, 1e-3)
    learn.save('m')
    want = learn.predict(records[0], score_thr=0.)
    for p in learn.model.parameters(): p.data.zero_()
    learn.load('m')
    assert torch.equal(learn.predict(records[0], score_thr=0.)['boxes'], want['boxes'])
    learn.validate()
    learn.export('x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'x.pkl')
    got = new.predict(records[0].path, score_thr=0.)
    assert all(torch.equal(got[k], want[k]) for k in ('boxes','labels','scores')) and got['names']==want['names']
    assert isinstance(new, DetectionLearner) and new.dls.class_map.get_name(1)=='red' and len(new.dls.train)==0
    assert new.metrics[-1].preds==[] and learn.validate()[-1]==pytest.approx(learn.validate()[-1])
    new.dls = learn.dls
    new.fit(1, 1e-4) # a loaded learner trains on

@pytest.mark.parametrize('half,dtype', [('to_bf16', torch.bfloat16), ('to_fp16', torch.float16)])
def test_mixed_precision_on_cpu(learn, half, dtype):
    seen = set()
    hook = next(m for m in learn.model.backbone.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda m,i,o: seen.add(o.dtype))
    getattr(learn, half)()
    learn.fit(1, 1e-3)
    assert seen=={dtype} and all(math.isfinite(v) for v in named(learn).values())
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    preds,_ = learn.get_preds()
    assert {d['boxes'].dtype for d in preds}=={torch.float32} and not hasattr(learn, 'autocast')
    learn.to_fp32()
    seen.clear()
    learn.fit(1, 1e-3)
    assert seen=={torch.float32}
    hook.remove()

def test_bf16_boxes_keep_their_precision(learn):
    "Coordinates of bfloat16 lie on a coarse grid; those of a net that hands them on in float32 do not."
    learn.to_bf16()
    boxes = torch.cat([d['boxes'] for d in learn.get_preds()[0]])
    assert len(boxes) and (boxes!=boxes.to(torch.bfloat16).float()).float().mean()>0.3

@pytest.mark.cuda
@pytest.mark.parametrize('half', ['to_bf16','to_fp16',None])
def test_cuda(records, tmp_path, half):
    if not torch.cuda.is_available(): pytest.skip('no CUDA device')
    learn = make(records, tmp_path)
    learn.dls.to(torch.device('cuda'))
    if half: getattr(learn, half)()
    learn.fit(1, 1e-3)
    assert all(math.isfinite(v) for v in named(learn).values()) and learn.predict(records[0], score_thr=0.)['boxes'].device.type=='cpu'

def test_gradient_accumulation_is_one_big_batch(records, tmp_path):
    "Two batches of four with n_acc=8 give one step; fastai's count of images decides that."
    steps = []
    learn = make(records, tmp_path)
    class Count(GradientClip):
        def after_step(self): steps.append(self.iter)
    learn.fit(1, 1e-3, cbs=[GradientAccumulation(8), Count(0.1)])
    assert steps==[1,3]

def test_trackers_and_csv(learn, tmp_path):
    learn.fit(3, 1e-3, cbs=[SaveModelCallback('AP50', fname='best'), EarlyStoppingCallback('valid_loss', patience=3), CSVLogger()])
    rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert (tmp_path/'models/best.pth').exists() and len(rows)==3
    assert learn.validate()[-1]==pytest.approx(max(float(r['AP50']) for r in rows))
    learn.fit(9, 0., cbs=EarlyStoppingCallback('AP50', patience=2))
    assert len(learn.recorder.values)<9

def test_tensorboard(learn, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn.fit(1, 1e-3, cbs=TensorBoardCallback(log_dir=tmp_path/'tb'))
    acc = EventAccumulator(str(tmp_path/'tb')).Reload()
    assert {'train_loss','valid_loss','AP','AP50','valid_box_reg'}<=set(acc.Tags()['scalars']) and acc.Tags()['images']==['Sample results']

def test_figures(learn):
    import matplotlib.pyplot as plt
    plt.switch_backend('agg')
    assert len(learn.dls.show_batch(max_n=3).axes)==3
    assert len(learn.show_results(max_n=2, score_thr=0.).axes)==4
    dl = learn.dls.test_dl([r.path for r in learn.dls.valid_ds.items[:2]])
    assert len(learn.show_results(dl=dl, max_n=2, shuffle=False).axes)==2
    plt.close('all')

def test_progress_bar(records, tmp_path, capsys):
    learn = detection_learner(make_dls(records, tmp_path), model())
    learn.fit(1, 1e-3)
    out = capsys.readouterr().out
    assert 'train_objectness' in out and 'AP50' in out and '100.00%' in out

def test_nothing_to_find(records, tmp_path):
    none = [r for r in records if not len(r.labels)]
    learn = detection_learner(detection_dls(none, none, cm, size=64, bs=2, device='cpu', path=tmp_path), model())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    r = named(learn)
    assert math.isfinite(r['valid_loss']) and r['AP']==-1
    learn = detection_learner(detection_dls(records[:4], [], cm, size=64, bs=4, device='cpu', path=tmp_path), model())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert named(learn)['valid_loss'] is None

def test_what_does_not_fit(records, tmp_path):
    dls = make_dls(records, tmp_path)
    with pytest.raises(ValueError, match='num_classes=5.*class map has 3'): detection_learner(dls, model(5))
    with pytest.raises(TypeError, match='Linear.*detector'): detection_learner(dls, nn.Linear(1, 1))
    with pytest.raises(ValueError, match='no class_map'): detection_learner(DataLoaders([1], [2]), model())
    with pytest.raises(ValueError, match='AP51'): detection_learner(dls, model(), metrics='AP51')
    with pytest.raises(ValueError, match='loss_x'): make(records, tmp_path, loss_weights=dict(loss_x=1)).fit(1)
