"What several test files need."
import copy
import io
import pickle

import torch

from backbones_nb.core.parity import rel_error


def noise(h=64, w=None, n=1): return torch.randn(n, 3, h, w or h, generator=torch.Generator().manual_seed(1))


def out(m, x):
    with torch.no_grad(): return m(x)


def maps_of(body, *size): return out(body.eval(), noise(*size))


def close(a, b, tol=0.):
    "Maps of the same number, shapes and values; nan is never close."
    a,b = list(a),list(b)
    assert [o.shape for o in a]==[o.shape for o in b]
    errors = [rel_error(p, q) for p,q in zip(a, b)]
    assert errors and all(e<=tol for e in errors), errors


def through_file(m):
    f = io.BytesIO()
    torch.save(m, f)
    f.seek(0)
    return torch.load(f, weights_only=False)


copies = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)), file=through_file)


def buffers(m): return {k:v.clone() for k,v in m.named_buffers()}


def assert_same(a, b):
    "Lists of dicts of tensors, equal bit by bit."
    assert len(a)==len(b)
    for p,q in zip(a, b):
        assert p.keys()==q.keys()
        for k in p: assert torch.equal(p[k], q[k]), k
