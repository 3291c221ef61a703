"""Runs everything that must hold: export and clean change nothing, notebooks, pytest, docs and links, README, the built package.

Each step goes on after the failure of another. The last line counts; a skip whose reason is not in skips.txt is a failure."""
import json
import multiprocessing as mp
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

root = Path(__file__).resolve().parent.parent
os.chdir(root)
sys.path.insert(0, str(root/'.ci'))
os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg', TQDM_DISABLE='1')
passed,failed,skipped = 0,[],Counter()


def check(name, ok, why=''):
    "Counts one result."
    global passed
    passed += bool(ok)
    if not ok: failed.append(name)
    print(f"{'ok    ' if ok else 'FAILED'} {name}{'' if ok else f': {why}'}", flush=True)


def sh(*cmd, **kw): return subprocess.run([str(o) for o in cmd], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
def notebooks(): return sorted(o for o in Path('nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)


def tree():
    "Export and clean leave the tree as it is: notebooks and modules agree, outputs are clean."
    def state(): return sh('git', 'status', '--porcelain').stdout + sh('git', 'diff').stdout
    before = state()
    for cmd in ('nbdev-export', 'nbdev-clean'):
        r = sh(cmd)
        check(cmd, r.returncode==0, r.stdout[-2000:])
    now = state()
    check('export and clean leave the tree unchanged', now==before, sh('git', 'status', '--porcelain').stdout[:2000])


def run_notebook(args):
    "Runs one notebook as nbdev-test does, in a process of its own."
    f,flags = args
    from nbdev.test import test_nb
    start = time.time()
    try: ok = test_nb(f, skip_flags=flags, basepath=root)[0]
    except BaseException as e: ok,_ = False,print(f, e)
    return str(f),ok,time.time()-start


def run_notebooks(files):
    "Runs notebooks in two processes of one thread each; the slowest start first."
    from nbdev.config import get_config
    os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    files = sorted(files, key=lambda f: -f.stat().st_size)
    with mp.get_context('spawn').Pool(2, maxtasksperchild=1) as pool:
        for f,ok,s in pool.imap_unordered(run_notebook, [(o.absolute(), get_config().tst_flags) for o in files]):
            check(f'notebook {Path(f).relative_to(root)} ({s:.0f} s)', ok, 'see the traceback above')
    for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.pop(k)


def run_pytest():
    "The tests of tests/; their counts and the reasons of skips enter the last line."
    global passed
    with TemporaryDirectory() as d:
        xml = Path(d)/'report.xml'
        r = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', f'--junitxml={xml}', '--durations=15', *sys.argv[1:]], text=True)
        if not xml.exists(): return check('pytest', False, f'no report, exit code {r.returncode}')
        cases = list(ET.parse(xml).getroot().iter('testcase'))
    for c in cases:
        if c.find('failure') is not None or c.find('error') is not None: failed.append(f"{c.get('classname')}.{c.get('name')}")
        elif c.find('skipped') is not None: skipped[c.find('skipped').get('message')] += 1
        else: passed += 1
    if not cases or r.returncode not in (0, 1): check('pytest', False, f'{len(cases)} tests, exit code {r.returncode}')


def anchors(nb): return {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ (.+)$', nb, re.M)}
def markdown(f): return '\n'.join(''.join(c['source']) for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')


def links():
    "Every local link and picture exists, the badge opens its own notebook, the sidebar lists every notebook."
    bad = []
    texts = {f:markdown(f) for f in notebooks()} | {o:o.read_text(encoding='utf-8') for o in [Path('README.md')] if o.exists()}
    for f,t in texts.items():
        t = re.sub(r'```.*?```', '', t, flags=re.S)
        for url in re.findall(r'\]\(([^)\s]+)\)', t) + re.findall(r'(?:src|href)="([^"]+)"', t):
            if 'colab.research.google.com' in url and not url.endswith(f'/blob/main/{f.as_posix()}'): bad.append(f'{f}: the badge opens {url}')
            if re.match(r'[a-z]+:', url): continue
            path,_,anchor = url.partition('#')
            to = (f.parent/path) if path else f
            if not to.exists(): bad.append(f'{f}: {url} is not there')
            elif anchor and to.suffix=='.ipynb' and anchor not in anchors(markdown(to)): bad.append(f'{f}: {url} has no such heading')
    import yaml
    def entries(o):
        if isinstance(o, str): return [o]
        if isinstance(o, dict): return [p for k in ('href', 'file', 'contents') for p in entries(o.get(k, []))]
        return [p for v in o for p in entries(v)]
    listed = entries(yaml.safe_load(Path('nbs/sidebar.yml').read_text())['website']['sidebar'])
    have = {o.relative_to('nbs').as_posix() for o in notebooks()}
    bad += [f'sidebar.yml: {o} is not there' for o in set(listed)-have] + [f'{o} is not in sidebar.yml' for o in have-set(listed)]
    check('links, badges and sidebar', not bad, '\n  '.join(['', *bad]))


def docs():
    "nbdev processes every notebook for the site, and README.md is what the index makes."
    from nbdev.serve import proc_nbs
    sidebar = Path('nbs/sidebar.yml').read_bytes()
    cache = Path(proc_nbs(str(root/'nbs'), n_workers=0, force=True))
    os.chdir(root)
    lost = [str(o) for o in notebooks() if not (cache/o.relative_to('nbs')).exists()]
    check('proc_nbs', not lost and Path('nbs/sidebar.yml').read_bytes()==sidebar, f'not processed: {lost}')
    from readme import readme
    text = readme()
    os.chdir(root)
    check('README.md is what nbs/index.ipynb makes', Path('README.md').exists() and Path('README.md').read_text(encoding='utf-8')==text, 'run `make readme`')


def package():
    "Wheel and sdist are sound and whole, and the index and the tutorial run from the wheel in an empty folder."
    with TemporaryDirectory() as d:
        d = Path(d)
        r = sh(sys.executable, '-m', 'build', '--outdir', d/'dist', '.')
        check('build', r.returncode==0, r.stdout[-2000:])
        files = sorted((d/'dist').glob('*'))
        if len(files)<2: return
        r = sh(sys.executable, '-m', 'twine', 'check', '--strict', *files)
        check('twine check', r.returncode==0, r.stdout[-2000:])
        whl = next(o for o in files if o.suffix=='.whl')
        lost = {o.as_posix() for o in Path('backbones_nb').rglob('*.py')} - set(zipfile.ZipFile(whl).namelist())
        check('the wheel carries every module', not lost, lost)
        r = sh(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', d/'site', whl)
        check('the wheel installs', r.returncode==0, r.stdout[-2000:])
        for nb in ('nbs/index.ipynb', 'nbs/tutorials/71_faster_rcnn_pets.ipynb'):
            empty = d/Path(nb).stem
            empty.mkdir()
            (empty/'nb.ipynb').write_bytes(Path(nb).read_bytes())
            code = ("import sys, backbones_nb; from nbdev.test import test_nb\n"
                    f"assert backbones_nb.__file__.startswith({str(d/'site')!r}), backbones_nb.__file__\n"
                    f"sys.exit(not test_nb('nb.ipynb', skip_flags={['notest','slow','cuda']!r})[0])")
            start,r = time.time(),sh(sys.executable, '-c', code, cwd=empty, env=os.environ | dict(PYTHONPATH=str(d/'site')))
            check(f'{nb} runs from the wheel in an empty folder ({time.time()-start:.0f} s)', r.returncode==0, r.stdout[-3000:])


def main():
    start = time.time()
    for step in (tree, lambda: run_notebooks(notebooks()), run_pytest, links, docs, package):
        t = time.time()
        try: step()
        except Exception as e: check(getattr(step, '__name__', 'step'), False, f'{type(e).__name__}: {e}')
        os.chdir(root)
        print(f'-- {time.time()-t:.0f} s', flush=True)
    known = {l.strip() for l in (root/'.ci'/'skips.txt').read_text().splitlines() if l.strip() and not l.startswith('#')}
    failed.extend(f'skipped for an unlisted reason: {o}' for o in skipped if o not in known)
    print(f'took {time.time()-start:.0f} s')
    if failed: print('failed:\n  ' + '\n  '.join(failed))
    print('skipped: ' + (', '.join(f'{n} {k}' for k,n in skipped.most_common()) or 'nothing'))
    print(f'{passed} passed, {len(failed)} failed, {sum(skipped.values())} skipped')
    sys.exit(bool(failed))


if __name__=='__main__': main()
