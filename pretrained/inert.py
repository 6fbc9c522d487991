"""Stand-ins for configuration objects in checkpoints: something to unpickle that does nothing."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint

_CONFIGURATION = "omegaconf."
# what objects of that library hold besides its own
_HELD = {
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str")),
}


class Inert:
    """An object in place of another: it takes any arguments and any state, and keeps none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def stand_ins(path: Path) -> list[tuple[type[Inert], str]]:
    """What `torch.serialization.safe_globals` is to be given for a checkpoint.

    Training scripts that are configured by OmegaConf keep its objects beside the weights. Nobody
    needs them, and their library may be missing.

    Args:
        path: A file of `torch.save`; nothing in it is executed.

    Returns:
        Pairs of a stand-in and the full name of what it stands for.
    """
    # files older than OmegaConf are no archives
    if not zipfile.is_zipfile(path):
        return []
    names = get_unsafe_globals_in_checkpoint(path)
    if not any(name.startswith(_CONFIGURATION) for name in names):
        return []
    return [(Inert, n) for n in names if n.startswith(_CONFIGURATION) or n in _HELD]
