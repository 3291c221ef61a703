"The repository as tests see it: its notebooks, a copy to try commands in, notebooks run in a process of their own."

import gc
import json
import multiprocessing
import os
import re
import shutil
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
    "Our modules, but for those that import IceVision: its chapters show it before and after the patches."
    found = (o.relative_to(root / 'backbones_nb') for o in sorted((root / 'backbones_nb').rglob('[!_]*.py')))
    return ['.'.join(o.with_suffix('').parts) for o in found if o.parts[0] not in ('icevision', 'all.py')]


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


def _alone(log):
    "The process leads a group of its own and writes to a file."
    os.setsid()
    with open(log, 'wb') as o:
        os.dup2(o.fileno(), 1)
        os.dup2(o.fileno(), 2)


def _script_process(code, home, cwd, log):
    _alone(log)
    for o in [o for o in sys.modules if o.split('.')[0] == 'backbones_nb']:
        del sys.modules[o]  # of this checkout
    sys.path.insert(0, str(home))
    os.chdir(cwd)
    os.environ['PYTHONPATH'] = str(home)
    exec(compile(code, 'script', 'exec'), dict(__name__='__main__'))


def _notebook_process(f, flags, log):
    _alone(log)
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


def _forked(target, args, log, timeout):
    p = servers.Process(target=target, args=(*args, log))
    p.start()
    p.join(timeout)
    kill_group(p.pid)
    p.join(30)
    output = log.read_text(errors='replace') if log.exists() else ''
    return p.exitcode == 0, f'{output}\nexit code {p.exitcode}, or killed after {timeout} s'


def run_notebook_quickly(f, flags, log, timeout=600):
    """Runs a notebook through nbdev's test function, in a fork of a process that has imported what notebooks do.

    Returns whether it passed, and its output."""
    ok, output = _forked(_notebook_process, (root / f, flags), log, timeout)
    return ok, output[-4000:]


def run_script_quickly(code, log, home=root, cwd=root, timeout=600):
    """Runs code with the `backbones_nb` that lies in `home`, in a fork of a process that imported torch and fastai.

    Returns whether it passed, and its output."""
    return _forked(_script_process, (code, home, cwd), log, timeout)
