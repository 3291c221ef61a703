"""The rules of the house, read from the source: one direction of imports, no cycles, small modules, unique names.

`python -m tools.architecture` lists what breaks them; `--map` draws the imports between the folders into
CONTRIBUTING.md."""

import ast
import copy
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parent.parent
package = root / 'backbones_nb'
longest, most_parameters = 300, 12

# What each folder may import. The wings (imagenet, icevision) stand beside the street: only the command line knows
# imagenet, nothing knows icevision.
allowed = dict(
    core='core',
    backbones='core backbones',
    necks='core backbones necks',
    detectors='core backbones necks detectors',
    data='core analysis data',
    analysis='core backbones necks detectors analysis',
    all='core backbones necks detectors data analysis learners imagenet icevision all',
    learners='core backbones necks detectors data analysis learners',
    imagenet='core backbones necks detectors data analysis learners imagenet',
    icevision='core backbones necks detectors data analysis learners icevision',
    cli='core backbones necks detectors data analysis learners imagenet cli all',
    __init__='core',
)
allowed = {k: v.split() for k, v in allowed.items()}


def modules():
    "Dotted name below the package -> its path."
    return {
        '.'.join(p.relative_to(package).with_suffix('').parts): p
        for p in sorted(package.rglob('*.py'))
        if p.name not in ('_modidx.py', '__init__.py')
    } | {'__init__': package / '__init__.py'}


parsed = cache(ast.parse)  # every rule looks at the same files


def tree(path):
    return parsed(path.read_text(encoding='utf-8'))


def imports(name, path, known):
    """Yields (module of ours, name imported from it or None), wherever in the file the import stands,
    also those through a string."""
    here = ['backbones_nb', *name.split('.')[:-1]] if name != '__init__' else ['backbones_nb']

    def resolve(full, names):
        full = full.removeprefix('backbones_nb').lstrip('.')
        if full in known:
            yield from ((full, n) for n in names or [None])
        else:
            yield from ((f'{full}.{n}'.lstrip('.'), None) for n in names if f'{full}.{n}'.lstrip('.') in known)

    for o in ast.walk(tree(path)):
        if isinstance(o, ast.ImportFrom):
            base = here[: len(here) - o.level + 1] if o.level else []
            full = '.'.join([*base, *([o.module] if o.module else [])])
            if full.split('.')[0] == 'backbones_nb':
                yield from resolve(full, [a.name for a in o.names])
        elif isinstance(o, ast.Import):
            for a in o.names:
                if a.name.split('.')[0] == 'backbones_nb':
                    yield from resolve(a.name, [])
        elif isinstance(o, ast.Constant) and isinstance(o.value, str) and name != '__init__':
            if o.value.startswith('backbones_nb.') and o.value.removeprefix('backbones_nb.') in known:
                yield o.value.removeprefix('backbones_nb.'), None


def graph():
    known = modules()
    return {n: {(m, o) for m, o in imports(n, p, known) if m != n} for n, p in known.items()}


def cycles():
    "The groups of modules that reach one another."
    edges = {n: {m for m, _ in v} for n, v in graph().items()}

    def reach(n):
        seen, todo = set(), [n]
        while todo:
            for m in edges[todo.pop()] - seen:
                seen.add(m)
                todo.append(m)
        return seen

    far = {n: reach(n) for n in edges}
    return sorted({tuple(sorted(m for m in far[n] if n in far[m])) for n in edges if n in far[n]})


def against_direction():
    return sorted(
        f'{n} imports {m}'
        for n, v in graph().items()
        for m in {m for m, _ in v}
        if m.split('.')[0] not in allowed.get(n.split('.')[0], [])
    )


def private_imports():
    return sorted(
        f'{n} imports {o} from {m}'
        for n, v in graph().items()
        for m, o in v
        if o and o.startswith('_') and not o.startswith('__')
    )


def long_modules():
    return [
        f'{n}: {k} lines'
        for n, p in modules().items()
        if (k := len(p.read_text(encoding='utf-8').splitlines())) > longest
    ]


def long_signatures():
    res = []
    for n, p in modules().items():
        for o in ast.walk(tree(p)):
            if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)):
                a = o.args
                k = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ('self', 'cls')]
                if len(k) > most_parameters:
                    res.append(f'{n}:{o.name} has {len(k)} parameters')
    return res


def is_trivial(v):
    "A name, an attribute, a constant, a subscript by one of these, an empty container or a sign in front of one."
    if isinstance(v, (ast.List, ast.Tuple, ast.Set)):
        return all(map(is_trivial, v.elts))
    if isinstance(v, ast.Dict):
        return not v.keys
    if isinstance(v, ast.UnaryOp):
        return is_trivial(v.operand)
    if isinstance(v, ast.Subscript):
        return is_trivial(v.value) and (isinstance(v.slice, ast.Slice) or is_trivial(v.slice))
    if isinstance(v, ast.Attribute):
        return is_trivial(v.value)
    return isinstance(v, (ast.Name, ast.Constant))


def shape(v):
    "The value with its names and constants blanked: `a.min(0)` and `b.max(1)` have one shape, so they are parallel."

    class Blank(ast.NodeTransformer):
        def visit_Name(self, o):
            return ast.Name('x', ast.Load())

        def visit_Constant(self, o):
            return ast.Name('x', ast.Load())

        def visit_Attribute(self, o):
            return ast.Attribute(self.visit(o.value), 'a', ast.Load())

    return ast.dump(Blank().visit(copy.deepcopy(v)))


def packed():
    "Assignments that bind two or more computed values of different kinds in one line."
    res = []
    for n, p in modules().items():
        for o in ast.walk(tree(p)):
            if not (
                isinstance(o, ast.Assign) and isinstance(o.value, ast.Tuple) and isinstance(o.targets[0], ast.Tuple)
            ):
                continue
            computed = [v for v in o.value.elts if not is_trivial(v)]
            if len(computed) > 1 and len({shape(v) for v in computed}) > 1:
                res.append(f'{n}:{o.lineno} {ast.unparse(o)[:110]}')
    return res


def public_names():
    "Module -> the names of its `__all__` that it defines itself."
    res = {}
    for n, p in modules().items():
        body = tree(p).body
        own = {o.name for o in body if isinstance(o, (ast.FunctionDef, ast.ClassDef))} | {
            v.id
            for o in body
            if isinstance(o, ast.Assign)
            for t in o.targets
            for v in ast.walk(t)
            if isinstance(v, ast.Name)
        }
        for o in body:
            if (
                isinstance(o, ast.Assign)
                and getattr(o.targets[0], 'id', '') == '__all__'
                and isinstance(o.value, ast.List)
            ):
                res[n] = [v.value for v in o.value.elts if v.value in own]
    return res


def shared_names():
    "Public names that two modules define; each family of detectors has its `model`, by contract."
    homes = defaultdict(list)
    for n, names in public_names().items():
        for o in names:
            homes[o].append(n)
    return sorted(f"{o}: {', '.join(v)}" for o, v in homes.items() if len(v) > 1 and o != 'model')


def folder_map():
    "The imports between folders as a Mermaid diagram; an arrow that follows from others is left out."
    edges = defaultdict(set)
    for n, v in graph().items():
        for m, _ in v:
            a, b = (o.split('.')[0] for o in (n, m))
            if a != b and '__init__' not in (a, b):
                edges[a].add(b)

    def reach(a):
        return edges[a].union(*(reach(b) for b in edges[a])) if edges[a] else set()

    lines = [
        f'    {a} --> {b}'
        for a in sorted(edges)
        for b in sorted(edges[a])
        if not any(b in reach(c) for c in edges[a] - {b})
    ]
    return '\n'.join(['```mermaid', 'flowchart BT', *lines, '```'])


def with_map(text):
    return re.sub(r'```mermaid\n.*?\n```', lambda _: folder_map(), text, count=1, flags=re.S)


rules = cycles, against_direction, private_imports, long_modules, long_signatures, packed, shared_names


def main():
    if '--map' in sys.argv:
        f = root / 'CONTRIBUTING.md'
        f.write_text(with_map(f.read_text(encoding='utf-8')), encoding='utf-8')
        return
    found = {r.__name__: r() for r in rules}
    for k, v in found.items():
        print(f"{k.replace('_', ' ')}: {len(v)}", *(f'  {o}' for o in v), sep='\n')
    sys.exit(any(found.values()))


if __name__ == '__main__':
    main()
