"""Executes notebooks in place, each in its own folder, and keeps their outputs: all of them, or those named.

Cells marked `slow`, `cuda` or `eval: false` keep the outputs they have; `--slow` runs the first kind, too. A figure is
kept as SVG where it has no raster image in it and is small, otherwise as a PNG of twice the size it is displayed at,
with a palette of 256 colors."""

import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from PIL import Image

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

from tools.checks import directives

largest_svg = 150_000  # characters; what is larger, thousands of marks as a rule, is smaller as pixels

kernel_config = "c.InlineBackend.figure_formats = {'svg', 'retina'}\n"
style = 'svg.hashsalt: backbones-nb\n'  # equal figures have equal files


def keeps(src, slow):
    "Whether a cell keeps its stored outputs."
    flags = directives(dict(source=src))
    return 'cuda' in flags or flags.get('eval', '').lower() == 'false' or 'slow' in flags and not slow


def compact(svg):
    "The SVG on one line, without prolog and metadata."
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[max(0, svg.find('<svg')) :], flags=re.S)
    return re.sub(r'\s*\n\s*', ' ', re.sub(r'>\s+<', '><', svg)).strip()


def smaller(png):
    "The PNG in fewer bytes: without an alpha channel that is opaque, and with a palette of 256 colors."
    img = Image.open(io.BytesIO(base64.b64decode(png)))
    if img.mode == 'RGBA' and img.getextrema()[3] == (255, 255):
        img = img.convert('RGB')
    if img.mode == 'RGB':
        img = img.quantize(256)
    out = io.BytesIO()
    img.save(out, 'PNG', optimize=True)
    return min(png, base64.b64encode(out.getvalue()).decode(), key=len)


def tidy(outputs):
    "Outputs without stderr, streams in one piece, figures in one format."
    kept = []
    for o in outputs:
        if o.get('name') == 'stderr':
            continue
        if o.output_type == 'stream' and kept and kept[-1].output_type == 'stream':
            kept[-1].text += o.text
        else:
            kept.append(o)
        data = o.get('data', {})
        svg = data.get('image/svg+xml')
        if svg and '<image' not in svg and len(svg) < largest_svg:
            data.pop('image/png', None)
            data['image/svg+xml'] = compact(svg)
            o.metadata = {}
        elif 'image/png' in data:
            data.pop('image/svg+xml', None)
            data['image/png'] = smaller(data['image/png'])
            o.metadata = {k: v for k, v in o.metadata.items() if k == 'image/png'}
    return kept


def execute(f, slow=False):
    nb = nbformat.read(f, 4)
    stored = {
        i: (c.source, c.outputs) for i, c in enumerate(nb.cells) if c.cell_type == 'code' and keeps(c.source, slow)
    }
    for i in stored:
        nb.cells[i].source = ''
    NotebookClient(nb, timeout=7200, kernel_name='python3', resources=dict(metadata=dict(path=f.parent))).execute()
    for i, c in enumerate(nb.cells):
        c.metadata.pop('execution', None)
        if i in stored:
            c.source, c.outputs = stored[i]
        elif c.cell_type == 'code':
            c.outputs = tidy(c.outputs)
    new = f.with_suffix('.new')
    nbformat.write(nb, new)
    os.replace(new, f)  # whole or not at all
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', f], check=True)


def main():
    slow, args = '--slow' in sys.argv, [o for o in sys.argv[1:] if o != '--slow']
    files = [Path(o).resolve() for o in args] or sorted(
        o for o in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts
    )
    failed = []
    with TemporaryDirectory() as d:
        (profile := Path(d) / 'profile_default').mkdir()
        (profile / 'ipython_kernel_config.py').write_text(kernel_config)
        (Path(d) / 'matplotlibrc').write_text(style)
        os.environ |= dict(
            HF_HUB_OFFLINE='1',
            PYTHONWARNINGS='ignore::FutureWarning',
            MPLBACKEND='module://matplotlib_inline.backend_inline',
            IPYTHONDIR=d,
            MATPLOTLIBRC=d,
            SOURCE_DATE_EPOCH='0',
            OMP_WAIT_POLICY='PASSIVE',
        )
        for f in files:
            start = time.time()
            try:
                execute(f, slow)
            except Exception as e:
                print(f'{f.relative_to(root)} failed:\n{e}', flush=True)
                failed.append(f)
                continue
            print(f'{f.relative_to(root)}: {time.time() - start:.0f} s, {f.stat().st_size // 1024} KB', flush=True)
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
