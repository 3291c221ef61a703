"The modules keep the rules of the house: `tools/architecture.py` has them."

import pytest

from project import root
from tools import architecture


@pytest.mark.parametrize('rule', architecture.rules, ids=lambda o: o.__name__)
def test_rule(rule):
    found = rule()
    assert not found, '\n'.join(['', *map(str, found)])


def test_map_of_the_house():
    "CONTRIBUTING.md shows the imports there are; `python -m tools.architecture --map` draws them again."
    text = (root / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert '```mermaid' in text and text == architecture.with_map(text)


def test_planted_faults_are_found(tmp_path, monkeypatch):
    "Each rule fails on a package that breaks it."
    for n, s in {
        '__init__': '',
        'core/a': 'from . import b\n__all__ = ["x"]\nx = 1\n',
        'core/b': 'def f():\n    from backbones_nb.core.a import _x\ndef x(): pass\n__all__ = ["x"]\n',
        'core/c': 'import backbones_nb.cli.d\n' + '\n' * 300,
        'core/e': 'from importlib import import_module\ndef g(): import_module("backbones_nb.cli.d")\n',
        'cli/d': f"def f({', '.join(f'p{i}' for i in range(13))}): a,b = len(p1),p2+1\n",
    }.items():
        (tmp_path / n).parent.mkdir(exist_ok=True)
        (tmp_path / f'{n}.py').write_text(s)
    monkeypatch.setattr(architecture, 'package', tmp_path)
    assert architecture.cycles() == [('core.a', 'core.b')]
    assert architecture.against_direction() == ['core.c imports cli.d', 'core.e imports cli.d']
    assert architecture.private_imports() == ['core.b imports _x from core.a']
    assert architecture.long_modules() == ['core.c: 301 lines']
    assert architecture.long_signatures() == ['cli.d:f has 13 parameters']
    assert architecture.packed() == ['cli.d:1 a, b = (len(p1), p2 + 1)']
    assert architecture.shared_names() == ['x: core.a, core.b']
