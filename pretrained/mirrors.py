"""Other places that official weights are taken from, if the user names them.

Two environment variables are read at every load. `BACKBONES_WEIGHTS_DIR` is a folder with, for each
`model.tag`, a folder of that name as `python -m backbones convert` writes it, or `model.tag` with
the suffix `.safetensors`, or the file under its official name. `BACKBONES_HUB_ORG` is an
organisation of the hub that has such folders as repositories.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from .errors import WeightsError
from .table import Weights

_DIR = "BACKBONES_WEIGHTS_DIR"
_ORG = "BACKBONES_HUB_ORG"


def local_copy(weights: Weights) -> tuple[Path, str] | None:
    """A copy of official weights in the user's folder of weights.

    Args:
        weights: Which ones.

    Returns:
        The file or folder and its key in `checksums.json`, or None if there is no folder of
        weights or nothing of that name in it.

    Raises:
        WeightsError: `BACKBONES_WEIGHTS_DIR` is no folder.
    """
    value = os.environ.get(_DIR)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"{_DIR} is {value!r}, which is no folder: create it, or unset it")
    found = ((folder / name, key) for name, key in _names(weights))
    return next((copy for copy in found if copy[0].exists()), None)


def mirror_of(weights: Weights) -> str | None:
    """The repository in the user's organisation, as `org/repo`, or None if none is named.

    Args:
        weights: Which ones.

    Raises:
        WeightsError: `BACKBONES_HUB_ORG` is no name of an organisation.
    """
    org = os.environ.get(_ORG)
    if not org:
        return None
    if "/" in org or ":" in org:
        raise WeightsError(f"{_ORG} is {org!r}: give the name of an organisation, without / or :")
    return f"{org}/{weights.name}"


def converted_key(weights: Weights) -> str:
    """The key in `checksums.json` of the file that `convert` writes.

    Args:
        weights: Of which weights.
    """
    return f"converted:{weights.name}"


def _names(weights: Weights) -> Iterator[tuple[str, str]]:
    """What a copy may be called, and its key."""
    yield weights.name, converted_key(weights)
    yield f"{weights.name}.safetensors", converted_key(weights)
    if weights.hub_id is None:
        yield weights.filename, weights.urls[0]
        return
    for url in weights.urls:
        yield PurePath(url).name, url
    if not weights.filename.startswith(("model.", "pytorch_model.")):
        yield weights.filename, f"hf-hub:{weights.hub_id}/{weights.filename}"
