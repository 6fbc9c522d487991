"""Hierarchical vision backbones as first-class timm models.

`import backbones` registers every model with timm; then `timm.create_model("shvit_s1")`.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent
if not (_root / "ops").is_dir():
    # a plain checkout (torch.hub, no install): ops, pretrained and training lie beside this folder
    __path__.append(str(_root.parent))

from . import ops, pretrained  # noqa: E402
from ._registry import (  # noqa: E402
    create_model,
    list_models,
    log_replaced,
    restore_timm_models,
)
from ._version import __version__  # noqa: E402
from .biformer import BiFormer  # noqa: E402
from .davit import DaViT  # noqa: E402
from .l2vit import L2ViT  # noqa: E402
from .maxvit import MaxViT  # noqa: E402
from .overlock import OverLoCK  # noqa: E402
from .ravlt import RAVLT  # noqa: E402
from .shvit import SHViT  # noqa: E402
from .tic import TiC  # noqa: E402

log_replaced()

__all__ = [
    "RAVLT",
    "BiFormer",
    "DaViT",
    "L2ViT",
    "MaxViT",
    "OverLoCK",
    "SHViT",
    "TiC",
    "__version__",
    "create_model",
    "list_models",
    "ops",
    "pretrained",
    "restore_timm_models",
]
