"""Entry points for `torch.hub.load("owner/backbones", name, pretrained=True)`.

One per model, and `model` for a name with tag. Names with an underscore are hidden from torch.hub.
"""

import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

from torch import nn as _nn

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

_folder = _Path(__file__).resolve().parent
# torch.hub takes its own entry away after the call: later imports and spawned workers need one more
_sys.path.append(str(_folder))

import backbones as _backbones  # noqa: E402

if _Path(str(_backbones.__file__)).resolve().parent != _folder / "backbones":
    raise ImportError(
        f"another package called 'backbones' is already imported, from {_backbones.__file__}: "
        f"load {_folder} in a fresh Python process, before that package"
    )


def model(name: str, pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """Create any model by name, `model` or `model.tag`; arguments as for `timm.create_model`."""
    return _backbones.create_model(name, pretrained, **kwargs)


def _entry_point(name: str) -> _Callable[..., _nn.Module]:
    def create(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
        return _backbones.create_model(name, pretrained, **kwargs)

    create.__name__ = name
    create.__doc__ = f"Create {name}; arguments as for `timm.create_model`."
    return create


globals().update({_name: _entry_point(_name) for _name in _backbones.list_models()})
