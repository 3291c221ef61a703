import pytest
from common import cm, Colors, draw_record

from backbones_nb.data.batches import detection_dls
from backbones_nb.data.mosaic import ClosingEpochs, Mosaic
from backbones_nb.data.multiscale import MultiScale, named_augment
from backbones_nb.learners.detection import detection_learner, NoValidation
from backbones_nb.learners.run import RunConfig


class Fixed(Colors):
    img_size = (64, 64)


def make(tmp_path, net, **kw):
    records = [draw_record(i, tmp_path) for i in range(8)]
    dls = detection_dls(records, records, cm, 64, bs=4, seed=0, device='cpu', path=tmp_path, **kw)
    learn = detection_learner(dls, net, lr=1e-3, parts=False)
    learn.logger = lambda *a: None
    return learn


@pytest.mark.parametrize('last,epochs,want', [(0.25, 4, '0001'), (2, 3, '011'), (0.2, 1, '0'), (0, 2, '00')])
def test_the_last_epochs_do_not_mix(tmp_path, last, epochs, want):
    learn, made = make(tmp_path, Colors(), item_tfms=Mosaic(64, p=1.0)), []
    whole = type(learn.dls.train).random_item
    mixes = []

    def count(self):
        made.append(1)
        return whole(self)

    type(learn.dls.train).random_item = count
    try:
        real = learn.dls.train.before_iter

        def before_iter():
            mixes.append(len(made))
            real()

        learn.dls.train.before_iter = before_iter
        with learn.no_bar():
            learn.fit(epochs, cbs=[ClosingEpochs(last), NoValidation()])
    finally:
        type(learn.dls.train).random_item = whole
    mixes.append(len(made))
    assert ''.join('01'[b == a] for a, b in zip(mixes, mixes[1:])) == want
    assert not learn.dls.train.tfm.closed


def test_closing_asks_for_something_to_close(tmp_path):
    with pytest.raises(ValueError, match='no training transform mixes images'):
        make(tmp_path, Colors()).fit(1, cbs=ClosingEpochs())


def test_several_sizes_need_a_detector_that_takes_them(tmp_path):
    make(tmp_path, Colors(), batch_tfms=MultiScale())
    with pytest.raises(ValueError, match=r'resizes them all to one size, \(64, 64\)'):
        make(tmp_path, Fixed(), batch_tfms=[MultiScale()])


def test_a_run_mixes_by_name(tmp_path):
    with pytest.raises(ValueError, match="got mix='mosaik', expected mosaic, copy_paste, jitter or multiscale"):
        RunConfig(mix='mosaik')
    with pytest.raises(ValueError, match="got mix='jitter' beside augment=False"):
        RunConfig(mix='jitter', augment=False)
    with pytest.raises(ValueError, match="got 'x', expected some of mosaic, copy_paste"):
        named_augment(['x'], 64)
    items, batches, cbs = named_augment('copy_paste mosaic jitter'.split(), 64, color=0.1)
    assert [type(o).__name__ for o in items] == ['Mosaic', 'CopyPaste', 'RandomZoom', 'Mirror', 'ColorJitter']
    assert items[2].scale == (0.1, 2.0) and items[4].strength == 0.1 and batches == [] and len(cbs) == 1
    assert [len(o) for o in named_augment(['multiscale'], 64)] == [3, 1, 0]
