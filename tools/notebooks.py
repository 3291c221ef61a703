"Executes notebooks in place, each in its own folder, and keeps their outputs: all of them, or those given as arguments."
import base64
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

os.environ |= dict(HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore::FutureWarning', MPLBACKEND='module://matplotlib_inline.backend_inline')
root = Path(__file__).resolve().parent.parent
files = [Path(o).resolve() for o in sys.argv[1:]] or sorted(o for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
failed = []

def shrink(nb):
    "Stores pictures without loss in fewer bytes: opaque ones need no alpha channel."
    for data in (o['data'] for c in nb.cells for o in c.get('outputs', ()) if 'image/png' in o.get('data', {})):
        old = base64.b64decode(data['image/png'])
        img,new = Image.open(io.BytesIO(old)),io.BytesIO()
        if img.mode=='RGBA' and img.getextrema()[3]==(255,255): img = img.convert('RGB')
        img.save(new, 'PNG', optimize=True)
        if len(new.getvalue())<len(old): data['image/png'] = base64.b64encode(new.getvalue()).decode()

for f in files:
    start,nb = time.time(),nbformat.read(f, 4)
    try: NotebookClient(nb, timeout=3600, kernel_name='python3', resources=dict(metadata=dict(path=f.parent))).execute()
    except Exception as e:
        print(f'{f.relative_to(root)} failed:\n{e}')
        failed.append(f)
        continue
    for c in nb.cells: c.metadata.pop('execution', None)
    shrink(nb)
    nbformat.write(nb, f)
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', f], check=True)
    print(f'{f.relative_to(root)}: {time.time()-start:.0f} s, {f.stat().st_size//1024} KB', flush=True)
sys.exit(bool(failed))
