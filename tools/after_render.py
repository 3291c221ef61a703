"Runs after quarto: puts the notebooks themselves beside the pages, where the download links lead."

import os
import shutil
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def main():
    out = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
    for f in (root / 'nbs').rglob('*.ipynb'):
        rel = f.relative_to(root / 'nbs')
        if any(p[0] in '._' for p in rel.parts):
            continue
        to = (
            out / 'notebooks' / rel.with_suffix('.json')
        )  # quarto takes a link to an .ipynb file for a link to its page
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, to)


if __name__ == '__main__':
    main()
