"""Turns a notebook into a page of the site; nbdev's processors do the rest (see `doc_procs` in pyproject.toml).

Pages are made from the text of the notebooks and their stored outputs. No cell is executed, so the build needs no
network and takes seconds. A cell marked `#| exports` shows its code, one marked `#| export` the signatures of its
public definitions."""

import ast
import importlib
import os
import re
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path

from fastcore.nbio import mk_cell
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, _get_exps, patch_name
from nbdev.process import Processor

definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
linked = ('backbones_nb', 'fastai', 'fastcore')  # libraries whose names become links
repo = 'https://github.com/backbones-nb/backbones-nb'


def md(text):
    return mk_cell(text, 'markdown')


def parse(source):
    "The statements of a code cell; none where it holds magics or shell commands only."
    try:
        return ast.parse(source).body
    except SyntaxError:
        pass
    try:
        return ast.parse(re.sub(r'^(\s*)[!%].*', r'\1pass', source, flags=re.M)).body  # lines keep their numbers
    except SyntaxError:
        return []


def public(source):
    "(qualified name, node) of each public definition of a cell; a patched method is named after its class."
    found = []
    for node in parse(source):
        if not isinstance(node, definitions):
            continue
        names = patch_name(node)
        for name in [names] if isinstance(names, str) else names:
            if not any(part.startswith('_') and not part.startswith('__') for part in name.split('.')):
                found.append((name, node))
    return found


# --- definitions


def header(node, lines):
    "The lines of a definition from its decorators to its docstring; of a class, fields and `__init__`'s header too."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    doc = ast.get_docstring(node) is not None
    body = node.body[1:] if doc else node.body
    begin = min([node.body[0].lineno, *(d.lineno for d in getattr(node.body[0], 'decorator_list', []))])
    last = node.body[0].end_lineno if doc else begin - 1
    if node.body[0].lineno == node.lineno:
        return lines[first - 1 : node.end_lineno]  # one line: all of it
    before = lines[node.body[0].lineno - 1].encode()[: node.body[0].col_offset].decode()
    if before.strip():
        return [
            *lines[first - 1 : node.body[0].lineno - 1],
            f'{before.rstrip()} ...',
        ]  # the body begins beside the header's end
    top, pad = lines[first - 1 : last], ' ' * node.body[0].col_offset
    if isinstance(node, ast.ClassDef):
        fields = [
            l for o in body if isinstance(o, (ast.AnnAssign, ast.Assign)) for l in lines[o.lineno - 1 : o.end_lineno]
        ]
        init = next((o for o in body if isinstance(o, ast.FunctionDef) and o.name == '__init__'), None)
        own = header(init, lines) if init else []
        if fields or own:
            return top + fields + ([''] if own else []) + own
    return [*top, f'{pad}...']


def symbol(names, module, path):
    "The line above a definition: its name, the anchor that links lead to, and a link to the source."
    spans = []
    for name in names:
        line = _get_exps(path).get(name) if path else None
        source = (
            f'[source]({repo}/blob/main/{path}#L{line}){{.symbol-source aria-label="Source of {name}"}}' if line else ''
        )
        spans.append(f'[`{name}`{{.symbol-name}}]{{#{name}}} {source}'.strip())
    return md('::: {.symbol}\n' + ' '.join(spans) + '\n:::')


class Definitions(Processor):
    """Shows what a notebook exports: whole after `#| exports`, as a signature after `#| export`;
    imports and private helpers are left out."""

    def begin(self):
        module = next(
            (
                c.directives_['default_exp']
                for c in self.nb.cells
                if c.cell_type == 'code' and 'default_exp' in c.directives_
            ),
            None,
        )
        path = f"{get_config().lib_path.name}/{module.replace('.', '/')}.py" if module else None
        cells = []
        for c in self.nb.cells:
            flags = c.directives_.keys() if c.cell_type == 'code' else set()
            if flags & {'default_exp', 'exporti', 'hide'}:
                continue
            if not flags & {'export', 'exports'}:
                cells.append(c)
                continue
            found, lines = public(c.source), c.source.splitlines()
            if found:
                cells.append(symbol([n for n, _ in found], module, path))
            if 'exports' not in flags:
                if not found:
                    continue
                nodes = {id(node): node for _, node in found}.values()
                c.source, c['outputs'] = '\n\n'.join('\n'.join(header(o, lines)) for o in nodes), []
            if 'exports' not in flags:
                c.source = f'#| classes: signature\n{c.source}'
            cells.append(c)
        self.nb.cells = cells


# --- links


def names_of(node):
    "The names that a statement binds."
    args = [o.arg for o in ast.walk(node) if isinstance(o, ast.arg)]
    if isinstance(node, definitions):
        return [node.name, *args]
    found = args + [o.id for o in ast.walk(node) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)]
    return found + [o.name for o in ast.walk(node) if isinstance(o, definitions)]


class Names:
    "What the names of a notebook mean: those it imports or exports, unless it binds them again."

    def __init__(self, nb):
        self.imports, self.bound, self.own, module = {}, Counter(), set(), None
        for c in nb.cells:
            if c.cell_type != 'code':
                continue
            exported = c.directives_.keys() & {'export', 'exports'}
            module = c.directives_.get('default_exp', module)
            for node in parse(c.source):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    self.add(node)
                elif exported and isinstance(node, definitions):
                    if patch_name(node) == node.name:
                        self.own.add(node.name)
                    self.bound.update(names_of(node)[1:])
                else:
                    self.bound.update(names_of(node))
        self.module = f'{get_config().lib_path.name}.{module}' if module else None

    def add(self, node):
        if isinstance(node, ast.Import):
            for o in node.names:
                self.imports[o.asname or o.name.partition('.')[0]] = (
                    o.name if o.asname else o.name.partition('.')[0],
                    None,
                )
        elif not node.level:
            for o in node.names:
                if o.name != '*':
                    self.imports[o.asname or o.name] = (node.module, o.name)
                elif node.module.split('.')[0] in linked:
                    self.imports |= {n: (node.module, n) for n in star(node.module) if n not in self.imports}

    def object(self, root):
        "What `root` stands for, or None where that is not certain."
        if root in self.bound:
            return None
        if root in self.own:
            return getattr(load(self.module), root, None)
        module, name = self.imports.get(root, (None, None))
        if not module or module.split('.')[0] not in linked:
            return None
        return getattr(load(module), name, None) if name else load(module)


@lru_cache(None)
def load(module):
    with warnings.catch_warnings(action='ignore'):
        try:
            return importlib.import_module(module)
        except ImportError:
            return None


@lru_cache(None)
def star(module):
    m = load(module)
    return getattr(m, '__all__', None) or [o for o in vars(m) if o[0] != '_'] if m else []


@lru_cache(None)
def pages():
    "The notebook behind each page of the site, by the page's address."
    nbs = get_config().nbs_path
    return {
        nbpath2html(o.relative_to(nbs)).as_posix(): o
        for o in nbs.rglob('*.ipynb')
        if not any(p[0] in '._' for p in o.relative_to(nbs).parts)
    }


@lru_cache(None)
def symbols():
    "Where each qualified name is documented, and how many modules define each bare name."
    syms = {k: v for k, v in NbdevLookup().syms.items() if k.split('.')[0] in linked}
    own = {k: v for k, v in syms.items() if k.startswith('backbones_nb.')}
    bare = Counter()
    for k in syms:
        module = next((m for m in modules() if k.startswith(m + '.')), None)
        if module:
            bare[k.removeprefix(module + '.')] += 1
    return syms, own, bare


@lru_cache(None)
def modules():
    "Modules in the indexes of the libraries, the longest first."
    return sorted(
        {m for lib, e in NbdevLookup().entries.items() if lib in linked for m in e['syms']}, key=len, reverse=True
    )


def key(name, names):
    "The qualified name of what `name` means in a notebook, if that is certain and it has a page."
    syms, own, bare = symbols()
    root, *rest = name.split('.')
    if any(part.startswith('_') for part in name.split('.')):
        return None
    o = names.object(root)
    for attr in rest:
        o = getattr(o, attr, None) if o is not None else None
    if o is not None:
        qualified = getattr(o, '__qualname__', '')
        if rest and qualified not in (name, rest[-1]):
            return None  # inherited, or an attribute of an instance
        full = f"{getattr(o, '__module__', '')}.{qualified}"
        return full if full in syms else None
    distinct = '_' in root.strip('_') or re.search('[a-z][A-Z]|[A-Z][a-z].*[A-Z]', root)
    if root in names.bound or root in names.imports or root in names.own or not distinct or bare[name] != 1:
        return None
    return next((k for k in own if k.endswith('.' + name) and k.removesuffix('.' + name) in modules()), None)


def address(full, page):
    "The address of a documented name, seen from the notebook `page`."
    to = symbols()[0][full]
    if not full.startswith('backbones_nb.'):
        return to[0] if isinstance(to, tuple) else to
    html, _, anchor = to[0].partition('#')
    html = html.removeprefix(get_config().doc_host + get_config().doc_baseurl).lstrip('/')
    nb = pages().get(html)
    name = full.split('.')[
        -anchor.count('.') - 1 :
    ]  # the index has lower case, in which a class and a function can meet
    return f"{os.path.relpath(nb, page.parent)}#{'.'.join(name)}" if nb else None


# What holds no link: fences, displayed math, headings, links and pictures, HTML, math; then a name in back-ticks.
token = re.compile(
    r'(?P<skip>^(?P<f>```|~~~|:::).*?^(?P=f)[^\n]*$|\$\$.*?\$\$|^#+ [^\n]*$'
    r'|!?\[(?:[^\[\]]|\[[^\]]*\])*\](?:\([^)]*\)|\{[^}]*\})|<[^>\n]+>|(?<!\\)\$[^$\n]+\$|``.+?``)'
    r'|`(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?`',
    re.S | re.M,
)


def link(text, names, page, seen=None):
    "Markdown whose names in back-ticks lead to their documentation, each once."
    seen = set() if seen is None else seen

    def f(m):
        if m['skip'] or m['name'] in seen:
            return m[0]
        full = key(m['name'], names)
        to = full and address(full, page)
        if not to:
            return m[0]
        seen.add(m['name'])
        return f'[{m[0]}]({to})'

    return token.sub(f, text)


class Links(Processor):
    """Links names in prose to their documentation, once in each section.
    Must see the imports, so it comes before `Definitions`."""

    def begin(self):
        names, page, seen = Names(self.nb), Path(self.nb.path_).resolve(), set()
        for c in self.nb.cells:
            if c.cell_type != 'markdown':
                continue
            if re.match('#+ ', c.source):
                seen = set()
            c.source = link(c.source, names, page, seen)


# --- the frame of a page


def is_solution(c):
    return c.cell_type == 'markdown' and c.source.strip().startswith('#### Solution')


class Solutions(Processor):
    "Folds code and output of a solution into one block, from the heading `#### Solution` to the next heading."

    def begin(self):
        cells, inside = [], False
        for c in self.nb.cells:
            if inside and c.cell_type == 'markdown' and re.match('#', c.source.strip()):
                cells.append(md('</details>'))
                inside = False
            if is_solution(c):
                title, _, rest = c.source.strip().partition('\n')
                cells.append(md(f'<details class="solution"><summary>{title.lstrip("# ")}</summary>'))
                if rest.strip():
                    cells.append(md(rest.strip()))
                inside = True
            else:
                cells.append(c)
        if inside:
            cells.append(md('</details>'))
        self.nb.cells = cells


def draws(c):
    "Whether a cell does nothing but draw its figure."
    if (
        c.cell_type != 'code'
        or not re.search(r'^#\|\s*fig-(cap|alt)', c.source, re.M)
        or re.search(r'^#\|\s*code-fold', c.source, re.M)
    ):
        return False
    nodes = parse(c.source)
    checks = any(isinstance(o, (ast.Assert, *definitions)) for n in nodes for o in ast.walk(n)) or re.search(
        r'\btest_\w+\(', c.source
    )
    return not checks and len([l for l in c.source.splitlines() if l.strip() and not l.startswith('#|')]) >= 6


# The line at the end of a notebook that leads to its neighbors: on the site a bar does that.
footer = re.compile(
    r'\n*^(?:\[(?:previous|next): [^\]]*\]\(|(?:Previous|Next): \[|Back to the \[overview\]\()[^\n]*\s*\Z', re.M | re.I
)


def shown(o):
    """Whether an output has something to show; HTML becomes raw HTML in Markdown.

    As `text/html` it would make quarto load jQuery and require.js from a CDN, in case it is a widget."""
    data = dict(o.get('data', {}))
    if 'application/vnd.jupyter.widget-view+json' in data:
        return False  # a progress bar
    if 'text/html' not in data:
        return True
    html = re.sub(r'<style.*?</style>', '', ''.join(data.pop('text/html')), flags=re.S).strip()
    if html:
        data = {'text/markdown': f'````{{=html}}\n{html}\n````\n'}
    else:
        data.pop('text/markdown', None)
    o['data'] = data
    return bool(data.keys() - {'text/plain'})


class Frame(Processor):
    "Badge and download link in one line, no footer that repeats the site's own navigation, folded code of figures."

    def begin(self):
        page = Path(self.nb.path_).resolve()
        rel = page.relative_to(get_config().nbs_path).as_posix()
        for c in self.nb.cells:
            if c.cell_type == 'markdown':
                if 'colab.research.google.com' in c.source and 'open-in-colab' in c.source:
                    c.source = re.sub(
                        r'\[!\[[^\]]*\]\([^)]*\)\]\((https://colab[^)]*)\)', lambda m: badge(m[1], page, rel), c.source
                    )
                c.source = re.sub(footer, '', c.source)
                c.source = re.sub(r'\n*^#+ Further reading\s*\Z', '', c.source, flags=re.M)  # nothing else stood there
            elif draws(c):
                c.source = f'#| code-fold: true\n#| code-summary: "Code for this figure"\n{c.source}'
            if c.cell_type == 'code':
                c['outputs'] = [o for o in c.get('outputs', []) if o.get('name') != 'stderr' and shown(o)]
        front = next((c for c in self.nb.cells if c.cell_type == 'raw' and c.source.startswith('---')), None)
        if front and 'image:' not in front.source:
            front.source = front.source.rstrip().removesuffix('---') + 'image: /images/card.png\n---\n\n'


def badge(colab, page, rel):
    copy = '../' * rel.count('/') + f"notebooks/{rel.removesuffix('.ipynb')}.json"  # see tools/after_render.py
    return (
        f'[Open in Colab]({colab}){{.notebook-link}} '
        f'[Download notebook]({copy}){{.notebook-link download="{page.name}"}} '
        f'[View on GitHub]({repo}/blob/main/nbs/{rel}){{.notebook-link}}'
    )
