"The repository as tests see it: its notebooks, a copy to try commands in, notebooks run in a process of their own."

import gc
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from tools.proc import kill_group, run

root = Path(__file__).resolve().parents[2]


def notebooks(base=root):
    "Every notebook below nbs/, relative to `base`."
    found = (o.relative_to(base) for o in (base / 'nbs').rglob('*.ipynb'))
    return sorted(o for o in found if not any(p.startswith(('.', '_')) for p in o.parts))


def cells(f, kind):
    return [
        ''.join(c['source'])
        for c in json.loads((root / f).read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == kind
    ]


def directives(src):
    return re.findall(r'^#\|\s*([\w-]+)(?::\s*(\w+))?', src, re.M)


def tracked():
    "Each file that git tracks or would track."
    r = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=root, check=True)
    return sorted({o for o in r.stdout.split('\0') if o and (root / o).is_file()})


def copy_tree(to):
    "Copies the tracked files to the folder `to`, so that a command may change them."
    for o in tracked():
        (to / o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / o, to / o, follow_symlinks=False)
    return to


def contents(base):
    return {o.relative_to(base).as_posix(): o.read_bytes() for o in base.rglob('*') if o.is_file()}


def tool(*cmd, merge=True, **kwargs):
    "Runs a script that lies beside this Python."
    return run(Path(sys.executable).with_name(cmd[0]), *cmd[1:], merge=merge, **kwargs)


def _modules():
    return [
        o.relative_to(root / 'backbones_nb').with_suffix('').as_posix().replace('/', '.')
        for o in sorted((root / 'backbones_nb').rglob('[!_]*.py'))
    ]


def run_notebook(f, home, flags, cwd=root, timeout=600):
    "Runs a notebook through nbdev's test function, with the `backbones_nb` that lies in `home`: (passed, output)."
    code = (
        "import sys, backbones_nb\nfrom nbdev.test import test_nb\n"
        "home,path,*flags = sys.argv[1:]\n"
        "assert backbones_nb.__file__.startswith(home), f'{backbones_nb.__file__} is not in {home}'\n"
        "sys.exit(not test_nb(path, skip_flags=flags)[0])"
    )
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(home))
    try:
        r = run(sys.executable, '-c', code, home, f, *flags, cwd=cwd, env=env, timeout=timeout, merge=True)
    except subprocess.TimeoutExpired as e:
        return False, f'{e.stdout[-4000:]}\nkilled after {timeout} s'
    return r.returncode == 0, r.stdout[-4000:]


# A server that has imported the large libraries and our modules; each notebook runs in a fork of it, which saves the
# imports.
servers = multiprocessing.get_context('forkserver')
servers.set_forkserver_preload(
    ['nbdev.test', 'fastai.vision.all', 'torchvision', 'timm', 'matplotlib.pyplot', 'effdet']
    + ['albumentations', 'networkx', 'pytorch_lightning', 'scipy.ndimage', 'torch._export', 'torch._inductor.config']
    + [f'backbones_nb.{o}' for o in _modules()]
)


def _no_pixels(fig, *args, **kwargs):
    "Lays a figure out and draws it, all but the pixels."
    fig.draw_without_rendering()
    return ''


def _notebook_process(f, flags, log):
    os.setsid()
    with open(log, 'wb') as o:
        os.dup2(o.fileno(), 1)
        os.dup2(o.fileno(), 2)
    import nbdev.test
    from execnb.shell import CaptureShell
    from IPython.core import pylabtools
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    from meta import quick_meta

    quick = 'slow' in flags

    def shell(*args, **kwargs):
        res = CaptureShell(*args, **kwargs)
        set_matplotlib_formats('png', dpi=40, bbox_inches=None)  # each figure is drawn once, in few pixels
        return res

    if quick:
        pylabtools.print_figure = _no_pixels
    nbdev.test.CaptureShell = shell
    gc.freeze()  # no collection looks at the objects of the libraries
    multiprocessing.set_start_method(
        'fork', force=True
    )  # the default, as in Jupyter; the server's children have its own
    with quick_meta() if quick else nullcontext():
        sys.exit(not nbdev.test.test_nb(f, skip_flags=flags)[0])


def run_notebook_quickly(f, flags, log, timeout=600):
    "Runs a notebook of this checkout as `run_notebook` does, in a fork of a process that imported torch and fastai."
    p = servers.Process(target=_notebook_process, args=(root / f, flags, log))
    p.start()
    p.join(timeout)
    kill_group(p.pid)
    p.join(30)
    output = log.read_text(errors='replace')[-4000:] if log.exists() else ''
    return p.exitcode == 0, f'{output}\nexit code {p.exitcode}, or killed after {timeout} s'
