"Every notebook runs from top to bottom, in a process of its own."
import pytest

from project import cells, directives, notebooks, root, run_notebook


@pytest.mark.spread
@pytest.mark.timeout(900)
@pytest.mark.parametrize('nb', sorted(notebooks(), key=lambda o: -(root/o).stat().st_size), ids=lambda o: o.stem)
def test_notebook(nb, skip_flags, pytestconfig):
    ok,out = run_notebook(nb, root, skip_flags, timeout=7200 if pytestconfig.getoption('--slow') else 300)
    assert ok, out


def test_no_cell_is_left_out_without_a_reason():
    bad = [f'{f}: {src.splitlines()[0]}' for f in notebooks() for src in cells(f, 'code') for k,v in directives(src) if k=='notest' or (k, v)==('eval', 'false')]
    assert not bad, bad
