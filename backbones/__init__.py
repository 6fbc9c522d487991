"""Hierarchical vision backbones as first-class timm models.

`import backbones` registers every model with timm; then `timm.create_model("shvit_s1")`.
"""

from pathlib import Path

from ._version import __version__

_root = Path(__file__).resolve().parent
if not (_root / "ops").is_dir():
    # a plain checkout (torch.hub, no install): ops, pretrained and training lie beside this folder
    __path__.append(str(_root.parent))

__all__ = ["__version__"]
