"Every notebook runs from top to bottom, in a process of its own."

import json

import pytest

from project import cells, directives, notebooks, root, run_notebook_quickly


@pytest.mark.spread
@pytest.mark.timeout(900)
@pytest.mark.parametrize('nb', sorted(notebooks(), key=lambda o: -(root / o).stat().st_size), ids=lambda o: o.stem)
def test_notebook(nb, skip_flags, pytestconfig, tmp_path):
    ok, out = run_notebook_quickly(
        nb, skip_flags, tmp_path / 'log.txt', timeout=7200 if pytestconfig.getoption('--slow') else 300
    )
    assert ok, out


def test_no_cell_is_left_out_without_a_reason():
    bad = [
        f'{f}: {src.splitlines()[0]}'
        for f in notebooks()
        for src in cells(f, 'code')
        for k, v in directives(src)
        if k == 'notest' or (k, v) == ('eval', 'false')
    ]
    assert not bad, bad


@pytest.mark.parametrize(
    'src,timeout,expected',
    [
        ('assert 1+1==2', 60, True),
        ('assert 1+1==3', 60, False),
        ('import time; time.sleep(60)', 3, False),
        ('#| slow\nassert False', 60, True),
    ],
)
def test_a_notebook_that_fails_or_hangs_is_found(tmp_path, src, timeout, expected):
    cell = dict(cell_type='code', id='0badcafe', metadata={}, execution_count=None, outputs=[], source=src)
    nb = tmp_path / 'a.ipynb'
    nb.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    assert run_notebook_quickly(nb, ['slow'], tmp_path / 'log.txt', timeout)[0] == expected
