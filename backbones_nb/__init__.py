"Detection backbones, necks and detectors that meet one contract: ordered feature maps with known channels and strides."
__version__ = "0.0.1"

_lazy = dict(create_backbone='core.create', list_backbones='core.registry', summary='analysis.costs',
             from_pretrained='core.hub', list_weights='core.published')


def __getattr__(name):
    "Import the functions of `_lazy` when first asked for (PEP 562), so that the bare import costs nothing"
    if name not in _lazy: raise AttributeError(f"module 'backbones_nb' has no attribute '{name}'")
    from importlib import import_module
    return getattr(import_module(f'backbones_nb.{_lazy[name]}'), name)


def __dir__(): return sorted([*globals(), *_lazy])
