"Makes README.md from nbs/index.ipynb without quarto: nbdev's processors, then pandoc with nbdev's own filter for links."
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pypandoc
from nbdev import readme_filter
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent


def readme(
    nb=root/'nbs'/'index.ipynb', # the notebook
) -> str: # the text of README.md
    "Returns the README that the index makes."
    name = Path(nb).name
    cache = proc_nbs(str(root/'nbs'), n_workers=0, force=False)
    doc = json.loads((Path(cache)/name).read_text(encoding='utf-8'))
    for c in doc['cells']:
        if c['cell_type']=='code':
            c['execution_count'] = 1 # pandoc refuses null
            for o in c.get('outputs', []):
                if 'execution_count' in o: o['execution_count'] = 1
                if 'text/markdown' in o.get('data', {}): # one form of each output
                    o['data'] = {'text/markdown': o['data']['text/markdown']}
    with TemporaryDirectory() as d:
        p = Path(d)/name
        p.write_text(json.dumps(doc), encoding='utf-8')
        filt = Path(d)/'filter.py' # pandoc runs filters by file
        filt.write_text(f'import runpy, sys\nsys.argv[0] = {readme_filter.__file__!r}\nfrom nbdev.readme_filter import main\nmain()\n')
        md = pypandoc.convert_file(str(p), 'gfm', format='ipynb', extra_args=['--wrap=preserve', '--markdown-headings=atx'], filters=[str(filt)])
    md = re.sub(r'\A---\n.*?\n---\n', '', md, flags=re.S)
    md = re.sub(r'</?div[^>]*>\n?', '', md) # pandoc's wrappers of cells
    md = re.sub(r'(!\[[^\]]*\]\(|<img src=")(?!https?:|/)', r'\1nbs/', md) # pictures, from the top level
    return '<!-- made from nbs/index.ipynb by `make readme` -->\n\n' + re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'


if __name__=='__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    print(f"{root/'README.md'}: {len(readme().splitlines())} lines")
