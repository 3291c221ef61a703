"""Makes README.md from nbs/index.ipynb without quarto: nbdev's processors, then pandoc. `--check` only compares.

Links to notebooks and pictures become paths from the top level; pictures among the outputs become
nbs/images/index-N.png."""

import base64
import difflib
import json
import os
import re
import sys
from pathlib import Path

import pypandoc
import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbpath2html
from nbdev.processors import FilterDefaults

root = Path(__file__).resolve().parent.parent
nbs = root / 'nbs'


def directives(src):
    "Code without its `#|` lines, and these as a dict."
    lines = src.splitlines()
    own = [l for l in lines if re.match(r'#\|', l)]
    pairs = (l[2:].strip().partition(':') for l in own)
    return '\n'.join(l for l in lines if l not in own).strip('\n'), {
        k.strip(): v.strip().strip('\'"') for k, _, v in pairs
    }


def code_cells(c, pics):
    "The Markdown cells that stand for code cell `c`: source, then outputs; pictures are added to `pics`."
    src, opts = directives(''.join(c['source']))
    if src and opts.get('echo') != 'false':
        yield f'```python\n{src}\n```'
    if opts.get('output') == 'false':
        return
    for o in c.get('outputs', []):
        data = o.get('data', {})
        text = lambda v: ''.join(v).strip('\n')
        if 'image/png' in data:
            name = f'index-{len(pics) + 1}.png'
            pics[name] = base64.b64decode(text(data['image/png']))
            yield f"![{opts.get('fig-alt', opts.get('fig-cap', ''))}](images/{name})"
        elif 'text/markdown' in data or 'text/html' in data:
            md = re.sub(
                r'^```(?:\{=html\}|html)\n(.*?)\n```$',
                r'\1',
                text(data.get('text/markdown', data.get('text/html'))),
                flags=re.S | re.M,
            )  # HTML that nbdev or fastprogress wrapped
            md = re.sub(r'\s*<style.*?</style>\s*', '', md, flags=re.S)
            if md.strip():
                yield md
        elif t := text(data.get('text/plain', o.get('text', ''))):
            yield f'``` text\n{t}\n```'


def top_level(node, home):
    "Rewrites the targets of links and pictures below `node` of a pandoc tree, so that they work from the top level."

    def fix(u):
        if u.startswith(home['site']):
            return home['pages'].get(u.removeprefix(home['site']).partition('#')[0], u)
        if re.match(r'[a-z]+:|[#/]', u):
            return u
        return f"nbs/{re.sub(r'(?<=[.]ipynb)#.*', '', u)}"  # GitHub shows notebooks without anchors

    if isinstance(node, list):
        for o in node:
            top_level(o, home)
    elif isinstance(node, dict):
        if node.get('t') in ('Link', 'Image'):
            node['c'][2][0] = fix(node['c'][2][0])
        if node.get('t') in ('RawInline', 'RawBlock'):
            node['c'][1] = re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1] + fix(m[2]), node['c'][1])
        top_level(list(node.values()), home)


def readme():
    "The text of README.md and the pictures it shows, by name."
    os.environ['IN_TEST'] = '1'  # nbdev's processors execute imports only
    nb = read_nb(nbs / 'index.ipynb')
    FilterDefaults()(nb)
    pics, parts = {}, []
    for c in nb.cells:
        if c.cell_type == 'raw' and ''.join(c.source).lstrip().startswith('---'):
            front = yaml.safe_load(''.join(c.source).strip().strip('-'))
            parts.append(f"# {front['title']}" + (f"\n\n> {front['description']}" if 'description' in front else ''))
        elif c.cell_type == 'markdown':
            parts.append(''.join(c.source))
        elif c.cell_type == 'code':
            parts += code_cells(c, pics)
    pages = {nbpath2html(o.relative_to(nbs)).as_posix(): o.relative_to(root).as_posix() for o in nbs.rglob('*.ipynb')}
    doc = json.loads(pypandoc.convert_text('\n\n'.join(parts), 'json', format='gfm'))
    top_level(doc['blocks'], dict(site=get_config().doc_url.rstrip('/') + '/', pages=pages))
    md = pypandoc.convert_text(json.dumps(doc), 'gfm', format='json', extra_args=['--wrap=preserve'])
    return md.strip() + '\n', pics


def main():
    os.chdir(root)
    text, pics = readme()
    files = {root / 'README.md': text.encode()} | {nbs / 'images' / k: v for k, v in pics.items()}
    stale = [o for o in (nbs / 'images').glob('index-*.png') if o not in files]
    if '--check' not in sys.argv:
        for f in stale:
            f.unlink()
        for f, data in files.items():
            f.write_bytes(data)
        return print(f'README.md: {len(text.splitlines())} lines, {len(pics)} pictures')
    bad = [o for o, data in files.items() if not o.exists() or o.read_bytes() != data] + stale
    if bad:
        old = (root / 'README.md').read_text(encoding='utf-8') if (root / 'README.md').exists() else ''
        print(
            *difflib.unified_diff(old.splitlines(), text.splitlines(), 'README.md', 'made from the index', lineterm=''),
            sep='\n',
        )
        sys.exit(f"`make readme` changes {', '.join(o.relative_to(root).as_posix() for o in bad)}")


if __name__ == '__main__':
    main()
