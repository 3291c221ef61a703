"""Phrases and spellings that the house style replaces: `python -m tools.language [FILE ...]` lists where they stand.

Notebooks are read cell by cell, text and code; other files line by line. `tests/test_language.py` runs it on
everything."""

import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

# pattern -> what to write instead
phrases = {
    r'\bmend(s|ed|ing)?\b': 'fix; patch (a library)',
    r'\b(is|are) told\b': 'is reported; the error names it',
    r'\bgo(es|ing)? on\b(?! (the|a|to the)\b)': 'continues, resumes',
    r'\bwho forgets\b': 'leave one out and the error names it',
    r'\bthe way (of the data|of a name|down|up)\b': 'the data path; the top-down, the bottom-up pathway',
    r'\bbehind the contract\b': 'wrapped to meet the contract',
    r'\bmore than a rename\b': 'a conversion',
    r'\b(what|that|which) cannot be[.,;:)]': 'say which input',
    r'\b(for )?what is no \w+': 'an object that is not ...',
    r'\bnets? that gives? (features|maps)': 'a model that exposes features',
    r'\bnets of (torchvision|timm)\b': 'torchvision models, timm models',
    r'\b(one|two) of each a (stage|layer)\b|\b(one|two) a (stage|layer)\b': 'one per stage, two per layer',
    r'\bdear(er)?\b': 'expensive, costs more',
    r'\blittle is won\b': 'little is gained',
    r'\banew\b': 'again',
    r'\bfor ever\b': 'forever',
    r'\bin earnest\b': 'for real',
    r'\bshall\b': 'should',
    r'\bhow many \w+ has\b': 'how many ... does ... have',
    r'\bmay lack\b': 'may be missing',
    r'\b(is|are) not there\b': 'does not exist',
    r'\b(put|puts) together\b': 'assemble',
    r'\blay(s)? over the row\b': 'override the row',
    r'\ba training\b(?! (run|step|set|loop|image|loss|batch|mode|recipe|time|script|loader|epoch|process)'
    r'| (part|split|sample|record|example|item|data|size|folder|file))': 'a training run',
    r'\balways says\b': 'always predicts',
    r'^> After this chapter you can\b': 'say what the module contains and where it comes from',
    r'\bmake them agree\b': 'say what to change',
    r'\bmade otherwise\b': 'use a different configuration',
}
# British spelling -> American
spelling = {
    r'normalis': 'normaliz',
    r'initialis': 'initializ',
    r'randomis': 'randomiz',
    r'optimis': 'optimiz',
    r'recognis': 'recogniz',
    r'synchronis': 'synchroniz',
    r'organis': 'organiz',
    r'generalis': 'generaliz',
    r'serialis': 'serializ',
    r'summaris': 'summariz',
    r'visualis': 'visualiz',
    r'licence': 'license',
    r'colour': 'color',
    r'behaviour': 'behavior',
    r'neighbour': 'neighbor',
    r'centre(?!_?ness)': 'center',
    r'labell(ed|ing)': 'labeled, labeling',
    r'\bgrey': 'gray',
    r'judgement': 'judgment',
    r'favour': 'favor',
}
# What others spell this way, and files written before the spelling changed.
foreign = re.compile(r'convert_sync_batchnorm|grey_12_bit|[\'"`]licence[\'"`]')
patterns = [(re.compile(k, re.I | re.M), v) for k, v in (phrases | spelling).items()]


def found(text):
    "Yields what a text should not say, each with the words to write instead."
    text = foreign.sub('', text)
    for pattern, instead in patterns:
        for m in pattern.finditer(text):
            yield f'{m[0]!r}: write {instead!r}'


def in_notebook(nb):
    "No cell has a phrase or a spelling that the house style replaces."
    for c in nb['cells']:
        for what in found(''.join(c['source'])):
            yield c.get('id', '?'), what


def in_file(f):
    if f.suffix == '.ipynb':
        return [f'[{i}] {o}' for i, o in in_notebook(json.loads(f.read_text(encoding='utf-8')))]
    lines = f.read_text(encoding='utf-8').splitlines()
    return [f'line {i}: {o}' for i, line in enumerate(lines, 1) for o in found(line)]


def files():
    "What people read: notebooks, the texts at the top level, tools, tests, and benchmarks."
    nbs = (o for o in (root / 'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root).parts))
    code = (o for d in ('tests', 'tools', 'benchmarks') for o in (root / d).rglob('*.py'))
    return sorted([*nbs, *root.glob('*.md'), *(o for o in code if o.name not in ('language.py', 'test_language.py'))])


def main():
    bad = [
        f'{f.relative_to(root) if f.is_absolute() else f}: {o}'
        for f in (map(Path, sys.argv[1:]) if sys.argv[1:] else files())
        for o in in_file(f)
    ]
    print(*bad, f'{len(bad)} found', sep='\n')
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
