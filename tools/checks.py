"""What must hold of a notebook before it is a page: `python -m tools.checks [NOTEBOOK ...]` lists what does not.

Each check takes a notebook as JSON and yields (cell id, what is wrong). `tests/test_site.py` runs all of them on all
notebooks."""

import ast
import base64
import re
import struct
import sys
from pathlib import Path

import yaml

columns = 100  # the widest line of code that a page shows without wrapping


def source(c):
    return ''.join(c['source'])


def code_cells(nb):
    return [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip()]


def directives(c):
    "The `#|` lines of a cell: name and text after it."
    found = {}
    for line in source(c).splitlines():
        if not line.startswith('#|'):
            break
        m = re.match(r'#\|\s*([\w-]+)\s*:?\s*(.*)', line)
        if m:
            found[m[1]] = m[2]
    return found


def options(c):
    "The lines of a cell that quarto reads as YAML."
    return [l[2:].strip() for l in source(c).splitlines() if re.match(r'#\|\s*[\w-]+\s*:', l)]


def hidden(c):
    return bool(directives(c).keys() & {'hide', 'default_exp', 'exporti'}) or directives(c).get('include') == 'false'


def has_definition(c):
    try:
        return any(isinstance(o, (ast.FunctionDef, ast.ClassDef)) for o in ast.parse(source(c)).body)
    except SyntaxError:
        return False


def shows_code(c):
    return not hidden(c) and 'export' not in directives(c) and directives(c).get('echo') != 'false'


def shown_outputs(c):
    return (
        [] if hidden(c) or 'export' in directives(c) or directives(c).get('output') == 'false' else c.get('outputs', [])
    )


def texts(c):
    "The texts among the outputs of a cell that a page shows: stream and plain text, unless a richer form replaces it."
    for o in shown_outputs(c):
        data = o.get('data', {})
        if 'text' in o:
            yield ''.join(o['text'])
        elif data.keys() == {'text/plain'}:
            yield ''.join(data['text/plain'])


def images(c):
    return [(k, o) for o in shown_outputs(c) for k in o.get('data', {}) if k.startswith('image/')]


# --- the checks


def yaml_options(nb):
    "Every option of a cell is YAML, and a text."
    for c in code_cells(nb):
        for line in options(c):
            try:
                value = yaml.safe_load(line)
            except yaml.YAMLError:
                value = None
            ok = isinstance(value, dict) and all(
                isinstance(v, str) for k, v in value.items() if k.startswith('fig-') and k[4:] in ('cap', 'alt')
            )
            if not ok:
                yield c['id'], f'is not YAML, quote its value: {line}'


def wide_code(nb):
    "No line of a cell whose code a page shows is wider than `columns`; the headers of plumbing wrap."
    for c in code_cells(nb):
        if not shows_code(c):
            continue
        for line in source(c).splitlines():
            if len(line) > columns and not line.startswith('#|'):
                yield c['id'], f'{len(line)} columns: {line.strip()}'


def figures(nb):
    "Every figure has a caption and an alternative text."
    for c in code_cells(nb):
        if not images(c):
            continue
        values = {}
        for line in options(c):
            try:
                values |= yaml.safe_load(line)
            except (yaml.YAMLError, TypeError):
                pass
        for name, least in (('fig-cap', 10), ('fig-alt', 25)):
            if len(str(values.get(name, ''))) < least:
                yield c['id'], f'has a figure without {name}'


def png_size(data):
    return struct.unpack('>II', base64.b64decode(data[:64])[16:24])


def sharp(nb):
    "Every figure is SVG, or a PNG of at least twice the size it is displayed at."
    for c in code_cells(nb):
        for kind, o in images(c):
            if kind == 'image/svg+xml':
                continue
            if kind != 'image/png':
                if not o['data'].keys() & {'image/png', 'image/svg+xml'}:
                    yield c['id'], f'has a figure of type {kind}'
                continue
            if 'image/svg+xml' in o['data']:
                continue
            w = png_size(''.join(o['data']['image/png']))[0]
            shown = o.get('metadata', {}).get('image/png', {}).get('width')
            if not shown or w < 2 * shown - 1:
                yield c['id'], f'has a PNG of {w} pixels displayed at {shown or w}'


def badge(nb):
    "Pictures in text have alternative texts."
    for c in nb['cells']:
        if c['cell_type'] != 'markdown':
            continue
        for alt in re.findall(r'!\[([^\]]*)\]\(', source(c)):
            if len(alt) < 10:
                yield c['id'], f'has a picture with the alternative text {alt!r}'


def solutions(nb):
    "Solutions stand under a collapsed heading of their own, and every exercise has one."
    listed = nb['metadata'].get('colab', {}).get('collapsed_sections', [])
    for c in nb['cells']:
        title = source(c).startswith('#### Solution') and c['cell_type'] == 'markdown'
        if title and not c['metadata'].get('jp-MarkdownHeadingCollapsed'):
            yield c['id'], 'is a solution that is not collapsed in Jupyter'
        if title and c['id'] not in listed:
            yield c['id'], 'is a solution that is not collapsed in Colab'
        if title and '\n' in source(c).strip():
            yield c['id'], 'is a solution whose heading does not stand alone in its cell'
        if title and c['metadata'].get('id') != c['id']:
            yield c['id'], 'has an id that Colab does not know'
        if c['cell_type'] == 'code' and re.search(r'code-summary:.*[Ss]olution', source(c)):
            yield c['id'], 'folds the code of a solution, not its output'
    text = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')
    part = re.search(r'^## Exercises\b(.*?)(?=^## |\Z)', text, re.M | re.S)
    if part and (a := len(re.findall(r'^#### Solution', part[1], re.M))) < (
        b := len(re.findall(r'^### \d', part[1], re.M))
    ):
        yield 'exercises', f'has {b} exercises and {a} solutions'


build_paths = re.compile(r'(?<![\w:/.-])/(?:tmp|root|home|work|mnt|var|Users|opt)/\S*|site-packages|dist-packages')
chatter = re.compile(r'\bINFO\b|\bWARNING\b|Downloading|\w+Warning\b|Traceback')
bare_floats = re.compile(r'\s*[\[(]?\s*-?\d+\.\d+(?:e-?\d+)?(?:\s*,\s*-?\d+\.?\d*(?:e-?\d+)?){1,}\s*,?\s*[\])]?\s*')


def noise(nb):
    "Outputs hold no stderr, no paths of the machine that made them, no log lines, no bare lists of numbers, no errors."
    for c in code_cells(nb):
        for o in shown_outputs(c):
            if o.get('name') == 'stderr':
                yield c['id'], f"shows stderr: {''.join(o['text'])[:80]!r}"
            if o['output_type'] == 'error':
                yield c['id'], f"stores an error: {o['ename']}"
        for t in texts(c):
            for rx, what in ((build_paths, 'a path of the machine'), (chatter, 'a log line')):
                if m := rx.search(t):
                    yield c['id'], f'shows {what}: {m[0]}'
            if bare_floats.fullmatch(t):
                yield c['id'], f'shows numbers without a label: {t.strip()[:60]}'


def markup(nb):
    "No link stands in back-ticks, where it prints its Markdown."
    for c in nb['cells']:
        if c['cell_type'] != 'markdown':
            continue
        text = re.sub(r'^(```|~~~).*?^\1', '', source(c), flags=re.S | re.M)
        for _, span in re.findall(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)', text, re.S):
            if re.search(r'\]\((?:https?:|[^)\s]*\.(?:ipynb|html|md))', span):
                yield c['id'], f'prints a link as text: {span}'


def cells_of(row):
    return [re.sub(r'<[^>]+>', '', o).strip() for o in row]


def showcase(nb):
    "The last row of the table of a training run that a page shows is not a failure: AP above 0.01."
    for c in code_cells(nb):
        for o in shown_outputs(c):
            html = ''.join(o.get('data', {}).get('text/html', ''))
            if 'train_loss' not in html:
                continue
            rows = [
                cells_of(re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', r, re.S))
                for r in re.findall(r'<tr.*?>(.*?)</tr>', html, re.S)
            ]
            rows = [r for r in rows if r]
            if len(rows) < 2 or 'AP' not in rows[0]:
                continue
            value = rows[-1][rows[0].index('AP')]
            if re.fullmatch(r'-?\d+\.\d+|nan', value) and not float(value) > 0.01:
                yield c['id'], f'shows a training run that ends at AP {value}'


checks = (yaml_options, wide_code, figures, sharp, badge, solutions, noise, markup, showcase)


def main():
    import json

    files = [Path(o) for o in sys.argv[1:]] or sorted(
        o for o in Path('nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.parts)
    )
    n = 0
    for f in files:
        nb = json.loads(f.read_text(encoding='utf-8'))
        for check in checks:
            for cell, what in check(nb):
                n += 1
                print(f'{f} [{cell}] {check.__name__}: {what}')
    print(f'{n} faults in {len(files)} notebooks')
    sys.exit(bool(n))


if __name__ == '__main__':
    main()
