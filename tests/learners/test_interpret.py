import pytest
import torch

from common import Colors, make_learner

from backbones_nb.learners.interpret import DetectionInterpretation


def test_what_top_losses_refuses(colors, records):
    dl = colors.dls.test_dl([r.path for r in records[:3]])
    with pytest.raises(ValueError, match='images without targets.*with_labels=True'):
        DetectionInterpretation.from_learner(colors, dl=dl)
    with pytest.raises(TypeError, match='list of batches'):
        DetectionInterpretation.from_learner(colors, dl=[])
    assert colors.validate()[-1] == pytest.approx(1)  # the learner still works


def test_top_losses(colors, records):
    n = [len(r.labels) for r in records[16:]]
    top = DetectionInterpretation.from_learner(colors).top_losses
    vals, idxs = top()
    assert (
        sorted(idxs.tolist()) == list(range(7))
        and vals.tolist() == sorted(vals.tolist(), reverse=True)
        and n[idxs[0]] == 1
        and n[idxs[-1]] == 0
    )
    low, at, items = top(2, largest=False, items=True)
    assert low.tolist() == sorted(vals.tolist())[:2] and [r.image_id for r in items] == [
        records[16 + i].image_id for i in at.tolist()
    ]
    assert len(top(99)[0]) == 7 and len(DetectionInterpretation.from_learner(colors, 0).top_losses()[0]) == 16
    light = make_learner(records, colors.path, Colors(), loss_weights=dict(loss_count=0.0))
    assert DetectionInterpretation.from_learner(light).top_losses(1)[0].item() == pytest.approx(vals.min().item())


def test_fastais_own_interpretation(colors, records):
    from fastai.interpret import Interpretation

    theirs = Interpretation.from_learner(colors)
    vals, idxs, items = theirs.top_losses(3, items=True)
    want = DetectionInterpretation.from_learner(colors).top_losses(3)
    assert torch.equal(vals, want[0]) and [r.image_id for r in items] == [
        records[16 + i].image_id for i in idxs.tolist()
    ]
    assert len(theirs.top_losses()[0]) == 7 and theirs.top_losses(1, largest=False)[0] == theirs.losses.min()


def test_interpretation(colors, records):
    import matplotlib.pyplot as plt

    plt.switch_backend('agg')
    interp = DetectionInterpretation.from_learner(colors)
    assert len(interp) == 7 and list(interp.parts) == ['loss_count', 'loss_chance']
    torch.testing.assert_close(sum(interp.parts.values()), interp.losses)
    fig = interp.plot_top_losses(3, ncols=2)
    first = interp.top_losses(1)[1].item()
    texts = [t.get_text() for a in fig.axes for t in a.texts if 'loss' in t.get_text()]
    assert (
        len(fig.axes) == 6
        and len(texts) == 3
        and texts[0]
        == f'im{16 + first}: loss {interp.losses[first]:.2f}\ncount 1.00, chance {interp.parts["loss_chance"][0]:.2f}'
    )
    assert torch.equal(
        torch.as_tensor(fig.axes[0].images[0].get_array()).permute(2, 0, 1).float(), interp.dl.create_item(first)[0]
    )
    assert len(interp.plot_top_losses(range(5, 7), largest=False).axes) == 4
    m = interp.confusion_matrix()
    assert m.diagonal().sum() == m.sum() == sum(len(r.labels) for r in records[16:]) and interp.most_confused() == []
    assert [t.get_text() for t in interp.plot_confusion_matrix().get_yticklabels()] == ['background', 'red', 'blue']
    plt.close('all')


def test_who_is_taken_for_whom(colors):
    colors.model.find = lambda x, find=colors.model.find: (d := find(x)) | dict(labels=torch.full_like(d['labels'], 2))
    interp = DetectionInterpretation.from_learner(colors)
    ((a, b, n),) = interp.most_confused()
    assert (
        (a, b) == ('red', 'blue')
        and n == interp.confusion_matrix()[1, 2] > 0
        and interp.confusion_matrix(score_thr=0.95)[1, 0] == n
    )


def test_counts_are_readable_on_light_and_dark_cells(colors, monkeypatch):
    interp = DetectionInterpretation.from_learner(colors)
    counts = torch.tensor([[0, 1, 0], [0, 9, 4], [1, 0, 10]])
    monkeypatch.setattr(interp, 'confusion_matrix', lambda *_: counts)
    inks = {int(t.get_text()): t.get_color() for t in interp.plot_confusion_matrix().texts}
    assert inks == {0: 'black', 1: 'black', 4: 'black', 9: 'white', 10: 'white'}
