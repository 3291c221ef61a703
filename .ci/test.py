"""Runs everything that must hold: export and clean change nothing, notebooks, pytest, links, documentation, README, the built package.

Each step goes on after the failure of another. The last line counts; a skip whose reason is not in skips.txt is a failure.
`--slow` also runs what is marked slow; other arguments go to pytest."""
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import yaml
from nbdev.config import get_config

root = Path(__file__).resolve().parent.parent
os.chdir(root)
sys.path.insert(0, str(root))

from tools.proc import run
os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg', PYTHONUNBUFFERED='1')
passed,failed,skipped = 0,[],Counter()
jobs = max(1, min(4, os.cpu_count() or 1)) # processes of one thread each
limit = 900 # seconds for a notebook
pytest_limit = 3000 # seconds for all of pytest


def check(name, ok, why=''):
    "Counts one result and prints it."
    global passed
    passed += bool(ok)
    if not ok: failed.append(name)
    print(f"{'ok    ' if ok else 'FAILED'} {name}{'' if ok or not why else f': {why}'}", flush=True)


def sh(*cmd, **kw):
    "The finished command and what it printed; one that takes longer than its limit has failed."
    try: return run(*cmd, merge=True, **kw)
    except subprocess.TimeoutExpired as e: return subprocess.CompletedProcess(cmd, -9, f'{e.stdout}\nkilled after {e.timeout} s')


def tool(name): return Path(sys.executable).with_name(name)
def notebooks(): return sorted(o for o in Path('nbs').rglob('*.ipynb') if not any(p.startswith(('.', '_')) for p in o.parts))
def cells(f, kind): return [''.join(c['source']) for c in json.loads(Path(f).read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]


def state():
    "A digest of each file that git tracks or would track."
    r = sh('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
    if r.returncode: raise RuntimeError(r.stdout)
    names = r.stdout.split('\0')
    return {o:hashlib.sha256(Path(o).read_bytes()).hexdigest() for o in set(names) if o and Path(o).is_file()}


def tree():
    "Export and clean leave the tree as it is: notebooks and modules agree, what is stored is clean."
    before = state()
    for cmd in ('nbdev-export', 'nbdev-clean'):
        r = sh(tool(cmd))
        check(cmd, r.returncode==0, r.stdout[-2000:])
    now = state()
    check('export and clean leave the tree unchanged', now==before, sorted(k for k in now.keys()|before.keys() if now.get(k)!=before.get(k)))


def skip_flags():
    "The flags that keep a cell out of this run, each with its reason."
    import torch
    reasons = dict(slow='slow', cuda='no CUDA device')
    on = {o for o,b in dict(slow='--slow' in sys.argv, cuda=torch.cuda.is_available()).items() if b}
    return {o:reasons.get(o, o) for o in get_config().tst_flags if o not in on}


def run_notebook(f, flags, home, cwd=root):
    "Runs one notebook through nbdev's test function in a process of its own, with the `backbones_nb` that lies in `home`."
    code = ("import sys, backbones_nb\nfrom nbdev.test import test_nb\n"
            "home,path,*flags = sys.argv[1:]\n"
            "assert backbones_nb.__file__.startswith(home), f'{backbones_nb.__file__} is not in {home}'\n"
            "sys.exit(not test_nb(path, skip_flags=flags)[0])")
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(home))
    start = time.time()
    r = sh(sys.executable, '-c', code, home, f, *flags, cwd=cwd, env=env, timeout=limit)
    return r.returncode==0,time.time()-start,r.stdout[-4000:]


def run_pytest(xml):
    "Runs tests/; the results lie in the report `xml`."
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    start = time.time()
    r = sh(sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', f'--junitxml={xml}', '--durations=10', '-n', jobs, '--dist=loadfile',
           *sys.argv[1:], env=env, timeout=pytest_limit)
    return r.returncode,time.time()-start,r.stdout


def count_pytest(xml, code):
    "Adds pytest's counts and its reasons for skips."
    global passed
    if not xml.exists(): return check('pytest', False, f'no report, exit code {code}')
    cases = list(ET.parse(xml).getroot().iter('testcase'))
    for c in cases:
        if c.find('failure') is not None or c.find('error') is not None: failed.append(f"{c.get('classname')}::{c.get('name')}")
        elif c.find('skipped') is not None: skipped[c.find('skipped').get('message')] += 1
        else: passed += 1
    if not cases or code not in (0, 1): check('pytest', False, f'{len(cases)} tests, exit code {code}')


def lessons():
    "Every test of tests/, then every notebook, several at once; what is skipped is counted by its reason."
    flags = skip_flags()
    for f in notebooks():
        for src in cells(f, 'code'):
            head = re.findall(r'^#\|\s*([\w-]+)(?::\s*(\w+))?', src, re.M)
            if ('eval', 'false') in head: skipped['eval: false'] += 1
            for o in {flags[k] for k,_ in head if k in flags}: skipped[o] += 1
    with TemporaryDirectory() as d:
        code,s,out = run_pytest(xml := Path(d)/'report.xml')
        print(f'{out}\npytest took {s:.0f} s', flush=True)
        count_pytest(xml, code)
    with ThreadPoolExecutor(jobs) as pool:
        todo = {pool.submit(run_notebook, f, flags, root):f for f in sorted(notebooks(), key=lambda o: -o.stat().st_size)}
        for job in as_completed(todo):
            ok,s,out = job.result()
            check(f'notebook {todo[job]} ({s:.0f} s)', ok, out)


def anchors(md):
    "The ids that quarto and GitHub give to the headings of a text."
    heads = re.findall(r'^#+\s+(.+?)\s*$', md, re.M)
    own = [m[1] for h in heads if (m := re.search(r'\{#([\w-]+)', h))]
    return {re.sub(r'[^\w\- ]', '', re.sub(r'\{.*\}$', '', h).lower()).strip().replace(' ', '-') for h in heads} | set(own)


def urls(md):
    "The targets of links and pictures in a text, code left out."
    md = re.sub(r'^(```|~~~).*?^\1', '', md, flags=re.S|re.M)
    md = re.sub(r'`[^`\n]*`', '`', md)
    return re.findall(r'\]\(<([^>\n]+)>', md) + re.findall(r'\]\(\s*([^)\s<]+)(?:\s+["\'][^)]*)?\)', md) + re.findall(r'(?:src|href)=["\']([^"\']+)', md) + re.findall(r'^\[[^\]]+\]:\s*(\S+)', md, re.M)


def listed(o):
    "The pages of a sidebar's contents."
    if isinstance(o, str): return [o]
    if isinstance(o, dict): return [p for k in ('href', 'file', 'contents') for p in listed(o.get(k, []))]
    return [p for v in o for p in listed(v)]


def links():
    "Local links, pictures and headings exist, each badge opens its own notebook, the sidebar lists every notebook."
    bad = []
    texts = {f:'\n'.join(cells(f, 'markdown')) for f in notebooks()} | {o:o.read_text(encoding='utf-8') for o in Path('.').glob('*.md')}
    for f,t in texts.items():
        badges = [u for u in urls(t) if 'colab.research.google.com' in u]
        bad += [f'{f}: the badge opens {u}' for u in badges if f.suffix=='.ipynb' and not u.endswith(f'/blob/main/{f.as_posix()}')]
        if f.suffix=='.ipynb' and f.name!='index.ipynb' and not badges: bad.append(f'{f}: no Colab badge')
        for url in urls(t):
            if re.match(r'[a-z]+:', url): continue
            path,_,anchor = unquote(url).partition('#')
            to = Path(os.path.normpath(f.parent/path)) if path else f
            if not to.exists(): bad.append(f'{f}: {url} is not there')
            elif anchor and anchor not in anchors(texts.get(to, '')): bad.append(f'{f}: {url} has no such heading')
    side = listed(yaml.safe_load(Path('nbs/sidebar.yml').read_text())['website']['sidebar'])
    have = {o.relative_to('nbs').as_posix() for o in notebooks()}
    bad += [f'sidebar.yml: {o} is not there' for o in sorted(set(side)-have)] + [f'{o} is not in sidebar.yml' for o in sorted(have-set(side))]
    bad += [f'sidebar.yml lists {o} twice' for o,n in Counter(side).items() if n>1]
    nav = [o['href'] for o in yaml.safe_load(Path('nbs/_quarto.yml').read_text())['website']['navbar'].get('left', []) if 'href' in o]
    bad += [f'_quarto.yml: {o} is not there' for o in nav if not (Path('nbs')/o).exists()]
    check('links, badges and sidebar', not bad, '\n  '.join(['', *bad]))


def docs():
    "nbdev processes every notebook for the site without a warning and touches no file; README.md is what the index makes."
    before = state()
    r = sh(sys.executable, '-c', "from nbdev.serve import proc_nbs; proc_nbs('nbs', n_workers=0, force=True)")
    lost = [str(o) for o in notebooks() if not ('_proc'/o.relative_to('nbs')).exists()]
    check('proc_nbs', r.returncode==0 and not lost and 'Warning' not in r.stdout, f'{r.stdout[-3000:]}\nnot processed: {lost}')
    check('proc_nbs leaves the tree unchanged', state()==before)
    r = sh(sys.executable, 'tools/readme.py', '--check')
    check('README.md is what nbs/index.ipynb makes', r.returncode==0, r.stdout[-3000:])


def package():
    "Wheel and sdist are sound and whole; the command, the index and the tutorial run from the wheel in an empty folder."
    with TemporaryDirectory() as d:
        d = Path(d).resolve()
        r = sh(sys.executable, '-m', 'build', '--outdir', d/'dist', '.')
        check('build', r.returncode==0, r.stdout[-2000:])
        files = sorted((d/'dist').glob('*'))
        if len(files)!=2: return
        r = sh(sys.executable, '-m', 'twine', 'check', '--strict', *files)
        check('twine check', r.returncode==0, r.stdout[-2000:])
        whl = next(o for o in files if o.suffix=='.whl')
        have,want = set(zipfile.ZipFile(whl).namelist()),{o.as_posix() for o in Path('backbones_nb').rglob('*.py')}
        got = {o for o in have if o.endswith('.py')}
        check('the wheel carries every module and nothing else', got==want, sorted(got^want))
        flat = {o.parent.as_posix() for o in Path('backbones_nb').rglob('*.py')} - {o.parent.as_posix() for o in Path('backbones_nb').rglob('__init__.py')}
        check('every folder of modules is a package', not flat, sorted(flat))
        r = sh(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', d/'site', whl)
        check('the wheel installs', r.returncode==0, r.stdout[-2000:])
        env = os.environ | dict(PYTHONPATH=str(d/'site'))
        (d/'empty').mkdir()
        r = sh(d/'site'/'bin'/'backbones-nb', 'list', 'vovnet39', cwd=d/'empty', env=env)
        check('backbones-nb list, from the wheel', r.returncode==0 and 'vovnet39' in r.stdout, r.stdout[-2000:])
        def run(nb):
            (dest := d/Path(nb).stem).mkdir()
            (dest/'notebook.ipynb').write_bytes(Path(nb).read_bytes())
            return run_notebook('notebook.ipynb', flags, d/'site', dest)
        flags,nbs = skip_flags(),['nbs/index.ipynb', 'nbs/tutorials/71_faster_rcnn_pets.ipynb']
        for nb in nbs:
            if not Path(nb).exists(): check(f'{nb}, from the wheel in an empty folder', False, 'is not there')
        nbs = [o for o in nbs if Path(o).exists()]
        with ThreadPoolExecutor(jobs) as pool:
            for nb,(ok,s,out) in zip(nbs, pool.map(run, nbs)): check(f'{nb}, from the wheel in an empty folder ({s:.0f} s)', ok, out)


def cpu():
    "Seconds of processor time so far, children included."
    return sum(o.ru_utime+o.ru_stime for o in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def main():
    start = time.time()
    for step in (tree, lessons, links, docs, package):
        t,c = time.time(),cpu()
        print(f'== {step.__name__}: {step.__doc__}', flush=True)
        try: step()
        except Exception as e: check(step.__name__, False, f'{type(e).__name__}: {e}')
        print(f'== {step.__name__} took {time.time()-t:.0f} s, {cpu()-c:.0f} s of processor time\n', flush=True)
    known = {l.strip() for l in Path('.ci/skips.txt').read_text().splitlines() if l.strip() and not l.startswith('#')}
    failed.extend(f'skipped for a reason that is not in .ci/skips.txt: {o}' for o in skipped if o not in known)
    if failed: print('failed:\n  ' + '\n  '.join(failed))
    print(f'took {time.time()-start:.0f} s, {cpu():.0f} s of processor time on {os.cpu_count()} cores')
    print('skipped: ' + (', '.join(f'{n} {k}' for k,n in skipped.most_common()) or 'nothing'))
    print(f'{passed} passed, {len(failed)} failed, {sum(skipped.values())} skipped')
    sys.exit(bool(failed))


if __name__=='__main__': main()
