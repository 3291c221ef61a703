"""The site: what every notebook must hold before it is a page, and what the page made from it holds.

`tools/checks.py` and `tools/site.py` do the work."""

import ast
import base64
import copy
import importlib
import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fastcore.nbio import read_nb
from nbdev.processors import FilterDefaults

import backbones_nb
import project
from project import copy_tree, root, run_script_quickly
from tools import checks
from tools.site import Names, draws, header, key, link, public

notebooks = [o.as_posix() for o in project.notebooks()]
taught = ('nbs/backbones/', 'nbs/necks/', 'nbs/detectors/')


@lru_cache(None)
def stored(f):
    return json.loads((root / f).read_text(encoding='utf-8'))


@pytest.fixture(scope='module', autouse=True)
def processed(tmp_path_factory):
    "What `nbdev-docs` gives to quarto, made in a copy of the tree, and what it printed; `page` reads it."
    home = copy_tree(tmp_path_factory.mktemp('pages') / 'backbones-nb')
    code = """
from functools import cache
from nbdev import processors, serve
processors.get_config = cache(processors.get_config) # it parses pyproject.toml twice for every cell
serve.proc_nbs('nbs', n_workers=0, force=True)"""
    res = run_script_quickly(code, home.parent / 'log', home, home, timeout=900)
    pages['made'] = home / '_proc'
    yield res
    pages.clear()
    page.cache_clear()


pages = {}


@lru_cache(None)
def page(f):
    "The notebook as the site gets it."
    return read_nb(pages['made'] / Path(f).relative_to('nbs'))


def source(c):
    return ''.join(c['source'])


def prose(nb):
    return [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']


def default_exp(nb):
    return next((m[1] for c in nb['cells'] if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source(c)))), None)


# --- the notebooks


def test_nbdev_processes_every_notebook(processed):
    ok, out = processed
    assert ok and 'Warning' not in out, out[-3000:]
    assert [f for f in notebooks if not (pages['made'] / Path(f).relative_to('nbs')).exists()] == []


@pytest.mark.parametrize('check', checks.checks, ids=lambda o: o.__name__)
def test_notebooks(check):
    bad = [f'{f} [{cell}]: {what}' for f in notebooks for cell, what in check(stored(f))]
    assert not bad, '\n'.join(['', *bad])


def cell(src='', kind='code', outputs=(), **metadata):
    return dict(
        cell_type=kind,
        id='0badcafe',
        source=[src],
        metadata=metadata,
        **(dict(outputs=list(outputs)) if kind == 'code' else {}),
    )


def png(width):
    return base64.b64encode(
        b'\x89PNG\r\n\x1a\n' + b'\0\0\0\rIHDR' + width.to_bytes(4, 'big') + (10).to_bytes(4, 'big') + bytes(40)
    ).decode()


def figure(
    width=200,
    shown=100,
    src='#| fig-cap: "A caption of it"\n#| fig-alt: "A picture that is described here in words"\nplot()',
):
    out = dict(
        output_type='display_data',
        data={'image/png': png(width)},
        metadata={'image/png': dict(width=shown)} if shown else {},
    )
    return cell(src, outputs=[out])


def text(t, name='stdout'):
    return cell('f()', outputs=[dict(output_type='stream', name=name, text=[t])])


def table(ap):
    head = '<tr><th>epoch</th><th>train_loss</th><th>AP</th></tr>'
    html = f'<table>{head}<tr><td>0</td><td>1.2</td><td>{ap}</td></tr></table>'
    return cell('learn.fit(1)', outputs=[dict(output_type='display_data', data={'text/html': [html]}, metadata={})])


exercises = cell('## Exercises\n\n### 1. Predict\n\nWhat?', 'markdown')

# check, cells with the fault, the same without it
planted = [
    ('yaml_options', cell('#| fig-cap: a: b\nplot()'), cell('#| fig-cap: "a: b"\nplot()')),
    ('yaml_options', cell('#| fig-cap: 12\nplot()'), cell('#| fig-cap: "12"\nplot()')),
    ('wide_code', cell('x = ' + '1+' * 60 + '1'), cell('#| export\nx = ' + '1+' * 60 + '1')),
    ('wide_code', cell('#| exports\nx = ' + '1+' * 60 + '1'), cell('#| hide\nx = ' + '1+' * 60 + '1')),
    ('figures', figure(src='#| fig-cap: "A caption of it"\nplot()'), figure()),
    ('figures', figure(src='#| fig-alt: "A picture that is described here in words"\nplot()'), figure()),
    ('sharp', figure(150, 100), figure(200, 100)),
    ('sharp', figure(200, None), figure(200, 100)),
    ('badge', cell('[![](x.svg)](y)', 'markdown'), cell('[![Open in Colab](x.svg)](y)', 'markdown')),
    ('solutions', cell('#### Solution', 'markdown'), cell('Solution', 'markdown')),
    (
        'solutions',
        cell('#| code-fold: true\n#| code-summary: "Solution"\nf()'),
        cell('#| code-fold: true\n#| code-summary: "A cat"\nf()'),
    ),
    ('solutions', exercises, cell('## Exercises\n\nNone.', 'markdown')),
    ('noise', text('careful', 'stderr'), text('fine')),
    ('noise', text('wrote /tmp/tmpab12/x.pt'), text('wrote x.pt')),
    ('noise', text('/usr/lib/python3/site-packages/x.py:1'), text('x.py:1')),
    ('noise', text('INFO     - Downloading font'), text('information on downloads')),
    ('noise', text('FutureWarning: old'), text('a warning of old')),
    ('noise', text('[0.5, 1.25]\n'), text('errors 0.5 and 1.25\n')),
    (
        'noise',
        cell('f()', outputs=[dict(output_type='error', ename='ValueError', evalue='', traceback=[])]),
        text('fine'),
    ),
    ('markup', cell('see `the [x](y.ipynb)` there', 'markdown'), cell('see `a`, [x](y.ipynb) and `b`', 'markdown')),
    ('showcase', table('0.000000'), table('0.505000')),
    ('showcase', table('nan'), table('0.100000')),
]


@pytest.mark.parametrize('name,bad,good', planted, ids=[o[0] for o in planted])
def test_planted_faults_are_found(name, bad, good):
    check = getattr(checks, name)
    assert list(check(dict(cells=[bad], metadata={}))) and not list(check(dict(cells=[good], metadata={})))


def test_a_solution_that_is_not_collapsed_is_found():
    good = cell('#### Solution', 'markdown', id='0badcafe', **{'jp-MarkdownHeadingCollapsed': True})
    nb = dict(cells=[good], metadata=dict(colab=dict(collapsed_sections=['0badcafe'])))
    assert not list(checks.solutions(nb))
    for broken in (
        nb | dict(metadata={}),
        nb | dict(cells=[cell('#### Solution', 'markdown', id='0badcafe')]),
        nb | dict(cells=[cell('#### Solution', 'markdown', **{'jp-MarkdownHeadingCollapsed': True})]),
    ):
        assert len(list(checks.solutions(broken))) == 1


# --- definitions


def lines(src):
    return [l.rstrip() for l in src.splitlines() if l.strip()]


def missing(nb, shown):
    "Public definitions of a notebook whose source lines are on none of the shown cells."
    on_page = ['\n'.join(lines(source(c))) for c in shown if c['cell_type'] == 'code']
    bad = []
    for c in nb['cells']:
        if c['cell_type'] != 'code' or not re.search(r'^#\|\s*exports?\s*$', source(c), re.M):
            continue
        src = source(c)
        for name, node in public(src):
            own = '\n'.join(lines('\n'.join(src.splitlines()[node.lineno - 1 : node.end_lineno])))
            if not any(own in o for o in on_page):
                bad.append(name)
    return bad


@pytest.mark.parametrize('f', [o for o in notebooks if o.startswith(taught) and 'coco_weights' not in o])
def test_the_code_is_on_the_page(f):
    assert not missing(stored(f), page(f).cells)


def test_a_missing_definition_is_found():
    nb = copy.deepcopy(stored('nbs/necks/15_fpn.ipynb'))
    for c in nb['cells']:
        c['source'] = [source(c).replace('#| exports', '#| export')]
    assert 'FPN' in missing(nb, [c for c in page('nbs/necks/15_fpn.ipynb').cells if 'class FPN' not in source(c)])


@pytest.mark.parametrize('f', notebooks)
def test_signatures(f):
    "Plumbing shows its own header: no inherited docstring, no module of a notebook, no type of None."
    everything = '\n'.join(source(c) for c in page(f).cells)
    for o in (
        '__main__.',
        'NoneType',
        'Define the computation performed at every call',
        'Return repr(self)',
        '.. note::',
        'show_doc',
    ):
        assert o not in everything
    for c in page(f).cells:
        if c['cell_type'] == 'code':
            ast.parse(re.sub(r'^\s*[!%].*$', 'pass', source(c), flags=re.M))  # what is shown is Python


def test_header():
    src = '''@dataclass
class A(Base):
    "Holds x."
    x:int = 0 # how many
    def __init__(self,
        x:int, # how many
    ):
        "Starts."
        super().__init__()
        self.x = x
    def f(self): return 1

def g(
    a, # first
    b=2, # second
): # their sum
    "Adds."
    c = a+b
    return c

def h(a): return a

def k(
    a, # first
): return a'''
    shown = ['\n'.join(header(o, src.splitlines())) for o in ast.parse(src).body]
    assert shown[0] == (
        '@dataclass\nclass A(Base):\n    "Holds x."\n    x:int = 0 # how many\n\n'
        '    def __init__(self,\n        x:int, # how many\n    ):\n        "Starts."\n        ...'
    )
    assert (
        shown[1] == 'def g(\n    a, # first\n    b=2, # second\n): # their sum\n    "Adds."\n    ...'
        and shown[2] == 'def h(a): return a'
    )
    assert shown[3] == 'def k(\n    a, # first\n): ...'


# --- links

rx_link = re.compile(r'\[`([A-Za-z_][\w.]*)(?:\(\))?`\]\(([^)]+)\)')


def automatic(f):
    "The links that a page has and its notebook has not: name and target."
    own = Counter(m for t in prose(stored(f)) for m in rx_link.findall(t))
    return list((Counter(m for t in prose(page(f)) for m in rx_link.findall(t)) - own).elements())


@pytest.mark.parametrize('f', notebooks)
def test_links_are_right(f):
    "An automatic link leads to the definition of what its name means in this notebook, and the anchor is there."
    names, bad = Names(read_nb_with_directives(f)), []
    for name, to in automatic(f):
        if to.startswith('http'):
            module = getattr(names.object(name.split('.')[0]), '__module__', '')
            if module.split('.')[0] not in ('fastai', 'fastcore'):
                bad.append((name, to))
            continue
        path, _, anchor = to.partition('#')
        nb = (root / f).parent / path
        rel = nb.resolve().relative_to(root).as_posix()
        if anchor != name.split('.')[-1] and anchor != name:
            bad.append((name, to, 'anchor'))
        if f'{{#{anchor}}}' not in '\n'.join(prose(page(rel))):
            bad.append((name, to, 'no such anchor'))
        there = importlib.import_module(f'backbones_nb.{default_exp(stored(rel))}')
        here = names.object(name.split('.')[0])
        last = name.split('.')[-1]
        if here is not None and '.' not in name and getattr(there, last, None) is not here:
            bad.append((name, to, 'another object'))
    assert not bad, '\n'.join(map(str, ['', *bad]))


def read_nb_with_directives(f):
    nb = read_nb(root / f)
    for c in nb.cells:
        c.directives_ = c.directives
    return nb


def test_names_that_are_not_certain_are_not_linked():
    def nb(*srcs):
        return SimpleNamespace(cells=[SimpleNamespace(cell_type='code', source=s, directives_={}) for s in srcs])

    here = root / 'nbs' / 'necks' / '15_fpn.ipynb'
    names = Names(
        nb(
            'from backbones_nb.core.create import create_backbone\nfrom fastai.learner import Learner',
            'maps = 1\nfor model in []: pass\ndef f(encode): pass',
        )
    )
    for name in ('maps', 'model', 'encode', 'predict', 'main', 'f', 'print', 'list', '_private', 'nowhere_to_be_found'):
        assert key(name, names) is None, name
    assert (
        key('create_backbone', names) == 'backbones_nb.core.create.create_backbone'
        and key('Learner.fit', names) == 'fastai.learner.Learner.fit'
    )
    assert key('Learner', Names(nb('from fastai.learner import Learner', 'Learner = 3'))) is None
    assert key('detection_learner', Names(nb()))  # no other symbol has this name
    text = (
        'Call `create_backbone` or `create_backbone()`; see [`create_backbone`](x.ipynb), '
        '<a href="`create_backbone`">, ``a `create_backbone` b``.'
    )
    assert link(text, names, here) == text.replace(
        '`create_backbone` or', '[`create_backbone`](../core/13_create.ipynb#create_backbone) or'
    )
    for kept in ('# On `create_backbone`', '```python\n`create_backbone`\n```', '$$`create_backbone`$$'):
        assert link(kept, names, here) == kept


# --- the frame of a page


@pytest.mark.parametrize('f', notebooks)
def test_frame(f):
    nb = page(f)
    first, texts = source(nb.cells[0]), prose(nb)
    front = yaml.safe_load(first.strip().strip('-'))
    assert front['image'] == '/images/card.png' and front['title']
    if f != 'nbs/index.ipynb' and '/templates/' not in f:
        number = Path(f).name.split('_')[0]
        assert front['title'].startswith(f'{number} · '), front['title']
        assert sum(o.count('[Open in Colab](') for o in texts) == 1 and not any('open-in-colab.svg' in o for o in texts)
        assert any(f"notebooks/{f[4:].removesuffix('.ipynb')}.json" in o for o in texts)
    assert not any(re.search(r'^\[?(previous|next):', o, re.M | re.I) for o in texts), (
        'the site has a navigation of its own'
    )


@pytest.mark.parametrize('f', notebooks)
def test_no_widget_library_is_needed(f):
    for c in page(f).cells:
        for o in c.get('outputs', []):
            assert not o.get('data', {}).keys() & {
                'text/html',
                'application/javascript',
                'application/vnd.jupyter.widget-view+json',
            }


@pytest.mark.parametrize('f', notebooks)
def test_solutions_are_folded_whole(f):
    inside, n = False, 0
    for c in page(f).cells:
        s = source(c)
        if c['cell_type'] != 'markdown':
            continue
        if s.startswith('<details class="solution">'):
            inside, n = True, n + 1
        elif s == '</details>':
            inside = False
        else:
            assert not (inside and s.startswith('#'))
    assert not inside and n == sum(
        source(c).startswith('#### Solution') for c in stored(f)['cells'] if c['cell_type'] == 'markdown'
    )


def test_figures_that_only_draw_are_folded():
    def c(src):
        return SimpleNamespace(cell_type='code', source=src)

    opts, body = '#| fig-cap: "x"\n', 'a = 1\n' * 6
    assert (
        draws(c(opts + body))
        and not draws(c(body))
        and not draws(c(opts + 'a = 1'))
        and not draws(c(opts + body + 'assert a'))
        and not draws(c(opts + body + 'test_eq(a, 1)'))
    )


def sidebar(o):
    if isinstance(o, str):
        return [o]
    if isinstance(o, dict):
        return [p for k in ('href', 'file', 'contents') for p in sidebar(o.get(k, []))]
    return [p for v in o for p in sidebar(v)]


def test_sidebar_has_no_name_twice():
    listed = sidebar(yaml.safe_load((root / 'nbs' / 'sidebar.yml').read_text())['website']['sidebar'])
    titles = Counter(
        re.sub(r'^\d+ · ', '', yaml.safe_load(source(page(f'nbs/{o}').cells[0]).strip().strip('-'))['title']).lower()
        for o in listed
        if o.endswith('.ipynb')
    )
    assert not [o for o, n in titles.items() if n > 1]


def quarto():
    return yaml.safe_load((root / 'nbs' / '_quarto.yml').read_text())


def luminance(color):
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        w * (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4) for w, v in zip((0.2126, 0.7152, 0.0722), rgb)
    )


def contrast(a, b):
    a, b = sorted((luminance(a), luminance(b)))
    return (b + 0.05) / (a + 0.05)


def test_contrast():
    assert (
        contrast('#000000', '#ffffff') == pytest.approx(21) and contrast('#2780e3', '#ffffff') < 4.5
    )  # cosmo's own bar

    def colors(f):
        return dict(re.findall(r'^\$([\w-]+):\s*(#[0-9a-f]{6});', (root / 'nbs' / f).read_text(), re.M))

    bar, light, dark = colors('theme.scss'), colors('light.scss'), colors('dark.scss')
    for a, b in (
        (bar['navbar-bg'], bar['navbar-fg']),
        ('#ffffff', light['link-color']),
        (light['code-block-bg'], light['code-color']),
        (dark['body-bg'], dark['body-color']),
        (dark['body-bg'], dark['link-color']),
        (dark['code-bg'], dark['code-color']),
    ):
        assert contrast(a, b) >= 4.5, (a, b)
    # quarto paints the text of outputs black, in dark mode too
    assert re.search(r'^main pre\b[^{]*\{[^}]*color: inherit', (root / 'nbs' / 'styles.css').read_text(), re.M)


def test_a_hundred_columns_fit():
    grid = {k: float(v.removesuffix('px')) for k, v in quarto()['format']['html']['grid'].items() if v.endswith('px')}
    size = float(re.search(r'font-size: ([\d.]+)px', (root / 'nbs' / 'styles.css').read_text())[1])
    assert (
        grid['body-width'] >= checks.columns * 0.6022 * size + 2 * 0.75 * size
    )  # DejaVu Sans Mono, the widest of the fonts named; padding
    assert sum(grid.values()) + 4 * 17 <= 1280 + 100  # two gutters of a rem on each side; the margin may give way


def test_furniture():
    o = quarto()
    site, footer = o['website'], o['website']['page-footer']
    assert backbones_nb.__version__ in footer['right'] and 'Apache-2.0' in footer['left']
    assert o['format']['html']['keep-md']  # or quarto deletes index.html.md before it moves it, and the build fails
    assert (
        set(o['format']['html']['theme']) == {'light', 'dark'}
        and 'edit' in site['repo-actions']
        and site['repo-subdir'] == 'nbs'
    )
    assert o['format']['html']['respect-user-color-scheme'] is True
    for f in (site['favicon'], site['open-graph']['image'], '404.qmd'):
        assert (root / 'nbs' / f).exists()
    assert any('github' in o['href'] for o in site['navbar']['tools'])
    everything = '\n'.join((root / 'nbs' / o).read_text() for o in ('site.html', '_quarto.yml', 'styles.css'))
    assert 'jquery' not in everything.lower() and 'require.js' not in everything and 'cdn' not in everything


def test_pages_are_made_without_running_a_cell(tmp_path):
    nb = read_nb(root / 'nbs' / 'index.ipynb')
    bomb = copy.deepcopy(next(c for c in nb.cells if c.cell_type == 'code'))
    bomb.source = "import socket\nraise SystemExit('a cell was run')"
    nb.cells.append(bomb)
    FilterDefaults()(nb)
    assert 'SystemExit' in nb.cells[-1].source
