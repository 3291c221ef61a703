"Notebooks, modules, links, README and the site's sources agree with one another."

import os
import re
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from project import cells, contents, copy_tree, notebooks, root, tool
from tools.proc import run


@pytest.fixture(scope='module')
def copied(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp('copy') / 'backbones-nb')


@pytest.fixture
def env(copied):
    return os.environ | dict(PYTHONPATH=str(copied))


@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_the_tree_is_what_the_notebooks_make(copied, env, command):
    before = contents(copied)
    r = tool(command, cwd=copied, env=env)
    assert r.returncode == 0, r.stdout[-2000:]
    now = {k: v for k, v in contents(copied).items() if '__pycache__' not in k}
    assert sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k)) == []


def test_readme_is_what_the_index_makes(copied, env):
    r = run(sys.executable, 'tools/readme.py', '--check', cwd=copied, env=env, merge=True)
    assert r.returncode == 0, r.stdout[-3000:]


def anchors(md):
    "The ids that quarto and GitHub give to the headings of a text."
    heads = re.findall(r'^#+\s+(.+?)\s*$', md, re.M)
    own = [m[1] for h in heads if (m := re.search(r'\{#([\w-]+)', h))]
    return {re.sub(r'[^\w\- ]', '', re.sub(r'\{.*\}$', '', h).lower()).strip().replace(' ', '-') for h in heads} | set(
        own
    )


def urls(md):
    "The targets of links and images in a text, code left out."
    md = re.sub(r'^(```|~~~).*?^\1', '', md, flags=re.S | re.M)
    md = re.sub(r'`[^`\n]*`', '`', md)
    patterns = r'\]\(<([^>\n]+)>', r'\]\(\s*([^)\s<]+)(?:\s+["\'][^)]*)?\)', r'(?:src|href)=["\']([^"\']+)'
    return [u for p in patterns for u in re.findall(p, md)] + re.findall(r'^\[[^\]]+\]:\s*(\S+)', md, re.M)


def broken(f, text, texts):
    "What is wrong with the local links and the badge of a text that lies at `f`."
    if f.suffix == '.ipynb':
        badges = [u for u in urls(text) if 'colab.research.google.com' in u]
        yield from (f'{f}: the badge opens {u}' for u in badges if not u.endswith(f'/blob/main/{f.as_posix()}'))
        if f.name != 'index.ipynb' and not badges:
            yield f'{f}: no Colab badge'
    for url in urls(text):
        if re.match(r'[a-z]+:', url):
            continue
        path, _, anchor = unquote(url).partition('#')
        to = Path(os.path.normpath(f.parent / path)) if path else f
        if not (root / to).exists():
            yield f'{f}: {url} does not exist'
        elif anchor and anchor not in anchors(texts.get(to, '')):
            yield f'{f}: {url} has no such heading'


def test_links():
    texts = {f: '\n'.join(cells(f, 'markdown')) for f in notebooks()}
    texts |= {o.relative_to(root): o.read_text(encoding='utf-8') for o in root.glob('*.md')}
    bad = [o for f, t in texts.items() for o in broken(f, t, texts)]
    assert not bad, '\n'.join(['', *bad])


@pytest.mark.parametrize(
    'text,message',
    [
        ('[a](../necks/nothing.ipynb)', 'does not exist'),
        ('[a](#no-heading)', 'has no such heading'),
        ('[b](https://colab.research.google.com/github/x/blob/main/nbs/y.ipynb)', 'the badge opens'),
        ('', 'no Colab badge'),
    ],
)
def test_broken_links_are_found(text, message):
    assert any(message in o for o in broken(Path('nbs/core/02_features.ipynb'), text, {}))


def listed(o):
    "The pages of a sidebar's contents."
    if isinstance(o, str):
        return [o]
    if isinstance(o, dict):
        return [p for k in ('href', 'file', 'contents') for p in listed(o.get(k, []))]
    return [p for v in o for p in listed(v)]


def test_sidebar_and_navigation():
    side = listed(yaml.safe_load((root / 'nbs/sidebar.yml').read_text())['website']['sidebar'])
    have = {o.relative_to('nbs').as_posix() for o in notebooks()}
    assert set(side) == have
    assert [o for o, n in Counter(side).items() if n > 1] == []
    navbar = yaml.safe_load((root / 'nbs/_quarto.yml').read_text())['website']['navbar'].get('left', [])
    assert [o['href'] for o in navbar if 'href' in o and not (root / 'nbs' / o['href']).exists()] == []
