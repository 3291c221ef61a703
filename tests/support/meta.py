"""Nets that are built quickly.

The meta device with kernels of its own: PyTorch's in Python take most of the time of a net without values. And nets
without random numbers, for tests that replace the values anyway."""

import warnings
from contextlib import contextmanager

import pytest
import torch


def _same(x, *args, **kw):
    return x


def _like(x, *args, **kw):
    return torch.empty_like(x)


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    for o in (weight, bias, mean, var):
        if o is not None and o.shape != x.shape[1:2]:
            raise RuntimeError(f'got a batch norm of {o.shape[0]} channels for {x.shape[1]}')
    n = x.shape[1] if training else 0
    return torch.empty_like(x), x.new_empty(n), x.new_empty(n)


def _batch_norm_in_eval(x, weight, bias, mean, var, momentum, eps):
    return _batch_norm(x, weight, bias, mean, var, True, momentum, eps)  # the meta device keeps statistics in both


def _layer_norm(x, shape, weight, bias, eps):
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise RuntimeError(f'got a layer norm of {tuple(shape)} for {tuple(x.shape)}')
    mean, rstd = (x.new_empty(*x.shape[: -len(shape)], *[1] * len(shape)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


kernels = (
    dict.fromkeys(('normal_', 'uniform_', 'hardtanh_', 'hardswish_', 'hardsigmoid_', 'silu_'), _same)
    | dict.fromkeys(('relu', 'hardtanh', 'hardswish', 'hardsigmoid', 'silu', 'gelu'), _like)
    | dict(native_batch_norm=_batch_norm, native_layer_norm=_layer_norm)
    | dict(_native_batch_norm_legit_no_training=_batch_norm_in_eval)  # what the flop counter takes
)


@contextmanager
def quick_meta():
    "Within it random numbers, norms and activations on the meta device are little more than an allocation."
    library = torch.library.Library('aten', 'IMPL', 'Meta')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the kernels that they stand in for
        for name, kernel in kernels.items():
            library.impl(name, kernel, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _constant(x, *args, **kw):
    return x.fill_(0.01)


@contextmanager
def constant_init():
    "Within it a new net has no random weight: most of the time of a net is that of its first values."
    with pytest.MonkeyPatch.context() as m:
        for o in ('normal_', 'uniform_'):
            m.setattr(torch.Tensor, o, _constant)
        yield
