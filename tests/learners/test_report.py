"The report on a detector's errors: its numbers, and the page."

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tide import random_case, stored

from backbones_nb.data.records import ClassMap
from backbones_nb.learners.error_analysis import (
    analyze,
    best_threshold,
    calibration,
    calibration_error,
    class_table,
    confusion_table,
    pr_curve,
    worst_images,
    wrong_labels,
)
from backbones_nb.learners.error_types import error_types, match_detections
from backbones_nb.learners.metrics import coco_eval
from backbones_nb.learners.report import check_report_path, try_report, write_report
from backbones_nb.learners.run import RunConfig

odd_names = ClassMap(['<b>cat</b>', '$x$ & "y"', '_猫', "it's"])


def case(seed=0, images=12, classes=3):
    preds, targets = random_case(seed, images, classes)
    return preds, targets


def blank(n=12, size=(120, 160)):
    return [Image.new('RGB', size[::-1], (90, 90, 90))] * n


# --- error types


def test_error_types_are_those_of_tidecv():
    for i, want in enumerate(json.loads(stored.read_text())):
        got = error_types(*match_detections(*random_case(i)))
        assert got['count'] == want['count'] and 100 * got['AP'] == pytest.approx(want['AP'], abs=1e-9)
        assert {k: 100 * v for k, v in got['dAP'].items()} == pytest.approx(want['dAP'], abs=1e-9)


def test_every_detection_has_one_verdict_and_every_object_one_hit_at_most():
    d, o = match_detections(*case(3, 20))
    assert ((d['error'] == '') == d['hit']).all() and set(d['error']) == {'', 'Cls', 'Loc', 'Both', 'Dupe', 'Bkg'}
    hits = d.loc[d['hit'], 'object']
    assert hits.is_unique and (o.index[o['found']] == sorted(hits)).all() and not (o['found'] & o['missed']).any()
    assert (o.loc[hits, 'label'].to_numpy() == d.loc[d['hit'], 'label']).all()


# --- thresholds and calibration


def test_no_threshold_has_a_larger_f1():
    d, o = match_detections(*case(1, 30))
    for label in (1, 2, 3):
        one, n = d[(d['label'] == label) & ~d['ignored']], int((o['label'] == label).sum())
        best = best_threshold(*pr_curve(one['hit'].to_numpy(), one['score'].to_numpy(), n))
        f1 = {t: 2 * one['hit'][one['score'] >= t].sum() / ((one['score'] >= t).sum() + n) for t in one['score']}
        assert best['F1'] == pytest.approx(max(f1.values())) and f1[best['threshold']] == pytest.approx(best['F1'])


def test_calibration_counts_each_detection_once():
    rng = np.random.default_rng(0)
    scores = rng.random(20000)
    true = calibration(rng.random(20000) < scores, scores)
    assert true['n'].sum() == 20000 and calibration_error(true) < 0.02
    sure = calibration(rng.random(20000) < scores / 2, scores)
    assert calibration_error(sure) == pytest.approx(0.25, abs=0.02)
    assert calibration_error(calibration(np.zeros(2, bool), np.array([3.0, 0.5]))) is None


def test_the_numbers_of_classes_are_those_of_coco():
    preds, targets = case(2)
    a = analyze(preds, targets, odd_names)
    want = coco_eval(preds, targets, odd_names, per_class='all')
    assert a.coco == want and [want['class_numbers'][n]['AP'] for n in want['per_class']] == [
        *want['per_class'].values()
    ]
    assert list(a.classes['AP']) == [*want['per_class'].values()] and a.classes['objects'].sum() == len(a.objects)
    present = a.classes[a.classes['objects'] > 0]
    for k in ('AP', 'AP50', 'AP75'):
        assert present[k].mean() == pytest.approx(want[k])
    assert '<b>cat</b>' in str(class_table(want))
    absent = a.classes[a.classes['objects'] == 0]
    assert len(absent) and absent[['precision', 'recall', 'F1']].isna().all(axis=None)


# --- images and labels


def perfect(n=30):
    "Objects far from each other, and detections that fit."
    rng = np.random.default_rng(0)
    preds, targets = [], []
    for _ in range(n):
        at = torch.tensor([[x, y] for x in (10, 80, 150) for y in (10, 80)], dtype=torch.float64)
        boxes = torch.cat([at, at + torch.tensor(rng.uniform(30, 50, (6, 2)))], 1)
        labels = torch.tensor(rng.integers(1, 4, 6))
        targets.append(dict(boxes=boxes, labels=labels))
        preds.append(dict(boxes=boxes + 1, labels=labels, scores=torch.tensor(rng.uniform(0.8, 1, 6))))
    return preds, targets


def test_planted_labels_are_found_first():
    preds, targets = perfect()
    names = ClassMap('abc')
    a = analyze(preds, targets, names)
    assert not len(wrong_labels(a)) and not len(worst_images(a)) and a.coco['AP50'] == pytest.approx(1)
    t = [{k: v.clone() for k, v in o.items()} for o in targets]
    t[3]['labels'][0] = t[3]['labels'][0] % 3 + 1
    t[7] = {k: v[1:] for k, v in t[7].items()}
    t[9]['boxes'][2] += 15
    t[20] = dict(
        boxes=torch.cat([t[20]['boxes'], torch.tensor([[300.0, 300, 340, 340]])]),
        labels=torch.cat([t[20]['labels'], torch.tensor([2])]),
    )
    a = analyze(preds, t, names)
    top = wrong_labels(a)
    assert sorted(top['image']) == [3, 7, 9, 20]
    why = dict(zip(top['image'], top['reason']))
    assert 'labeled' in why[3] and 'detected' in why[3] and 'no label' in why[7] and 'fits poorly' in why[9]
    assert why[20] == 'labeled b, nothing detected'
    worst = worst_images(a)
    assert dict(zip(worst['image'], worst['errors'])) == {3: 2, 7: 1, 9: 2, 20: 1}
    table, pairs = confusion_table(a)
    assert len(pairs) == 1 and pairs[0][2] == 1 and table.to_numpy().sum() == len(a.objects) + 1 + 1


# --- the page


class Page(HTMLParser):
    "What the tests ask of a page; raises for tags that are not closed."

    void = 'meta', 'br', 'img', 'link', 'input', 'hr'

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.open, self.tags, self.text = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs, closed=False):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href', 'data', 'action', 'srcset')]
        self.ids += [v for k, v in attrs if k == 'id']
        if tag not in self.void and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(preds, targets, names, path, **kw):
    a = analyze(preds, targets, names)
    text = write_report(path, a, blank(len(targets)), **kw).read_text(encoding='utf-8')
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids) and set(page.links) >= {'#classes', '#labels'}
    inside = {f'#{o}' for o in page.ids}
    assert all(o in inside or o.startswith('data:image/jpeg;base64,') for o in page.links)
    assert 'script' not in page.tags and 'link' not in page.tags and '@import' not in text
    assert not re.search(r'url\((?!#)', text) and 'color-scheme' in text and 'width=device-width' in text
    return a, page


def test_the_page_stands_alone_and_takes_no_name_for_markup(tmp_path):
    preds, targets = case(5)
    targets[0]['image_id'] = '<img src="http://x">'
    facts = dict(data='<script>alert(1)</script>')
    a, page = page_of(preds, targets, odd_names, tmp_path / 'new' / 'a.html', title='A & <B>', facts=facts)
    text = ''.join(page.text)
    assert all(n in text for n in [*odd_names][1:]) and 'A & <B>' in text and facts['data'] in text
    assert page.tags.count('b') == 0 and not list(tmp_path.glob('**/*.part'))
    assert f'{a.coco["AP50"]:.3f}' in text and page.tags.count('section') == 8


nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))


@pytest.mark.parametrize('which', ['no detections', 'no objects', 'neither', 'one class', 'odd detections'])
def test_data_with_little_in_them(which, tmp_path):
    preds, targets = case(4, 6)
    names = odd_names
    if which in ('no detections', 'neither'):
        preds = [nothing] * 6
    if which in ('no objects', 'neither'):
        targets = [nothing] * 6
    if which == 'one class':
        names = ClassMap(['cat'])
        targets, preds = ([o | dict(labels=o['labels'].clamp(max=1)) for o in x] for x in (targets, preds))
    if which == 'odd detections':  # of classes that there are not
        preds = [o | dict(scores=o['scores'] * 2, labels=o['labels'] * 2) for o in preds]
    a, page = page_of(preds, targets, names, tmp_path / 'a.html')
    assert ('Expected calibration error' in ' '.join(page.text)) == (
        which not in ('no detections', 'neither', 'odd detections')
    )
    assert len(a.classes) == len(names) - 1


def test_wrong_input_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'a.html').mkdir()
    for path, error, words in (
        (tmp_path / 'cat.jpg', ValueError, 'ends in .html'),
        (tmp_path / 'a.html', FileExistsError, 'is a folder'),
        (tmp_path / 'file' / 'b.html', FileExistsError, 'is a file: give another folder'),
    ):
        with pytest.raises(error, match=words):
            check_report_path(path)
    with pytest.raises(ValueError, match='one dict per image'):
        match_detections([], [])


def test_a_report_that_fails_leaves_the_run_and_the_old_page(tmp_path, capsys):
    preds, targets = case(0, 3)
    results = dict(metrics=coco_eval(preds, targets, odd_names, per_class='all'))
    try_report(tmp_path / 'report.html', odd_names, blank(3), preds, targets, results, RunConfig())
    old = (tmp_path / 'report.html').read_text(encoding='utf-8')
    gone = [tmp_path / 'gone.png'] * 3
    try_report(tmp_path / 'report.html', odd_names, gone, preds, targets, results, RunConfig())
    out = capsys.readouterr().out
    assert 'there is no report (FileNotFoundError' in out and f'evaluate {tmp_path} --report' in out
    assert (tmp_path / 'report.html').read_text(encoding='utf-8') == old and 'Run' in old


def test_learn_report_evaluates_and_writes(colors, records, tmp_path):
    a = colors.report(tmp_path / 'a.html', title='mine', worst=1)
    assert {k: a.coco[k] for k in ('AP', 'APm', 'AR100')} == {k: colors.evaluate()[k] for k in ('AP', 'APm', 'AR100')}
    text = (tmp_path / 'a.html').read_text(encoding='utf-8')
    assert 'mine' in text and len(a.targets) == 7 and a.errors['count']['Miss'] == 0
    dl = colors.dls.test_dl(records[:4], with_labels=True)
    assert len(colors.report(tmp_path / 'b.htm', dl=dl).targets) == 4
    with pytest.raises(ValueError, match='ends in .html'):
        colors.report(tmp_path / 'a.txt')


@pytest.mark.slow
def test_500_images_within_10_seconds(tmp_path):
    preds, targets = case(0, 500, 20)
    images = [Image.effect_noise((160, 120), 40).convert('RGB')] * 500
    start = time.process_time()
    write_report(tmp_path / 'a.html', analyze(preds, targets, ClassMap(map(str, range(20)))), images)
    assert time.process_time() - start < 10
