"A torch Dataset of (image, target) in place of records."

import numpy as np
import pytest
import torch
from common import cm, Colors, draw_record
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchvision import tv_tensors

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.pairs import DatasetItem
from backbones_nb.learners.detection import detection_learner

kw = dict(class_map=cm, size=64, seed=0, device='cpu')
forms = dict(
    pil=lambda im: im,
    array=np.asarray,
    bytes=lambda im: torch.from_numpy(np.asarray(im).transpose(2, 0, 1).copy()),
    float=lambda im: torch.from_numpy(np.asarray(im).transpose(2, 0, 1) / np.float32(255)),
    tv=lambda im: tv_tensors.Image(np.asarray(im).transpose(2, 0, 1).copy()),
)


class Own(Dataset):
    "As in torchvision's tutorial."

    def __init__(self, records, form='pil', masks=True, keys=('image_id', 'area', 'iscrowd')):
        self.records, self.form, self.masks, self.keys, self.reads = records, form, masks, keys, 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        self.reads += 1
        r = self.records[range(len(self))[i]]
        t = r.target()
        boxes = t['boxes'] if len(t['labels']) else torch.tensor([])
        res = dict(boxes=boxes, labels=t['labels']) | {k: t[k] for k in self.keys}
        if self.masks:
            res['masks'] = tv_tensors.Mask(t['masks'])
        return forms[self.form](r.image()), res


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return [draw_record(i, folder) for i in range(11)]


def same(a, b):
    assert len(a) == len(b)
    for (x, t), (y, u) in zip(a, b):
        assert torch.equal(x, y)
        for p, q in zip(t, u):
            assert p.keys() == q.keys()
            for k in ('boxes', 'labels', 'masks', 'area', 'iscrowd'):
                torch.testing.assert_close(p[k], q[k])
            assert p['image_id'] == q['image_id']


@pytest.mark.parametrize('form,workers', [*((o, 0) for o in forms), ('pil', 2)])
def test_the_same_batches_as_of_records(records, form, workers):
    want = detection_dls(records[:8], records[8:], bs=3, **kw)
    got = detection_dls(Own(records[:8], form), Own(records[8:], form), bs=3, num_workers=workers, **kw)
    for i in (0, 1):
        same(list(want[i]), list(got[i]))
    assert got.valid_ds[0][0].dtype == torch.uint8


def test_subsets_concatenations_and_a_part_that_is_records(records):
    ds = Own(records)
    dls = detection_dls(Subset(ds, [4, 2, 0]), ConcatDataset([Subset(ds, [1]), Subset(ds, [3])]), bs=2, **kw)
    assert [o['image_id'] for _, t in dls.valid for o in t] == ['im1', 'im3'] and len(dls.train_ds) == 3
    mixed = detection_dls(ds, records[:2], bs=2, **kw)
    assert len(mixed.train_ds) == 11 and len(mixed.valid_ds) == 2
    assert len(detection_dls(ds, None, bs=2, **kw).valid_ds) == 0


def test_an_item_is_read_once(records):
    ds = Own(records[:4])
    dl = detection_dls(Own(records), ds, bs=2, **kw).valid
    ds.reads = 0
    list(dl)
    assert ds.reads == 4


def test_training_measuring_and_prediction(records, tmp_path):
    dls = detection_dls(Own(records[:8]), Own(records[8:]), bs=4, path=tmp_path, **kw)
    learn = detection_learner(dls, Colors(), lr=1e-3)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    learn.fit(1)
    assert learn.evaluate()['AP50'] == pytest.approx(1)
    assert learn.evaluate(dl=dls.test_dl(Own(records[:3]), with_labels=True))['AP50'] == pytest.approx(1)
    learn.export('x.pkl')
    assert len(learn.predict(records[0].path)['boxes'])


class Of(Dataset):
    def __init__(self, item, n=2):
        self.item, self.n = item, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield 1


class NoLength(Dataset):
    def __getitem__(self, i):
        return 1


img, box = Image.new('RGB', (40, 30)), torch.tensor([[1.0, 2, 11, 12]])


@pytest.mark.parametrize(
    'data,words',
    [
        (Stream(), 'got the IterableDataset Stream, expected one with a length'),
        (NoLength(), 'NoLength without __len__'),
        (DataLoader(Of(1)), 'got a DataLoader, expected a dataset'),
        (Of(img), 'item 0 of the dataset is of type Image, expected'),
        (Of((img, [dict(bbox=[1, 2, 3, 4])])), 'is list, expected a dict with boxes and labels.*wrap_dataset'),
        (Of((img, dict(annotation={}))), 'is a dict with annotation, expected a dict with boxes and labels'),
        (Of((img, dict(boxes=box, labels=[1, 2]))), 'item 0 of the dataset has 2 labels and 1 boxes'),
        (Of((torch.randn(3, 9, 9), dict(boxes=box, labels=[1]))), 'divide by 255 or undo the normalization'),
    ],
)
def test_what_is_refused(data, words):
    for train, valid in ((data, []), (Of((img, dict(boxes=box, labels=[1]))), data)):
        with pytest.raises((TypeError, ValueError), match=words) as e:
            detection_dls(train, valid, bs=1, **kw)
        assert '\n' not in str(e.value)


def test_boxes_of_torchvisions_types():
    for fmt, v in (('XYWH', [1, 2, 10, 10]), ('CXCYWH', [6, 7, 10, 10]), ('XYXY', [1, 2, 11, 12])):
        b = tv_tensors.BoundingBoxes([v], format=fmt, canvas_size=(30, 40))
        t = DatasetItem(Of((img, dict(boxes=b, labels=torch.tensor([1]), image_id=torch.tensor([9])))), 0).target()
        assert t['boxes'].tolist() == box.tolist() and type(t['boxes']) is torch.Tensor and t['image_id'] == 9
