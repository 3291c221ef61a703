"Detection backbones, necks and detectors with one contract: ordered feature maps with known channels and strides."
__version__ = "0.0.1"

_lazy = dict(create_backbone='core.create', register='core.create', list_backbones='core.registry',
             from_pretrained='core.hub', list_weights='core.published', attach_neck='necks.build',
             summary='analysis.costs')
__all__ = ['__version__', *_lazy]


def __getattr__(name):
    "Imports the functions of `_lazy` on first access (PEP 562), so that the bare import costs nothing."
    if name not in _lazy: raise AttributeError(f"module 'backbones_nb' has no attribute '{name}'")
    from importlib import import_module
    return getattr(import_module(f'backbones_nb.{_lazy[name]}'), name)


def __dir__(): return sorted([*globals(), *_lazy])
