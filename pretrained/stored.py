"""Official weights that are on this machine already, found without any request."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from .checksum import Record, recorded
from .hub import WEIGHT_FILES
from .mirrors import local_copy, mirror_of
from .table import Weights
from .url import cached_path


def known_record(weights: Weights) -> Record | None:
    """What `checksums.json` has of official weights.

    Args:
        weights: Which ones.

    Raises:
        WeightsError: The file of records cannot be read.
    """
    if weights.hub_id is None:
        return next(filter(None, map(recorded, weights.urls)), None)
    return recorded(f"hf-hub:{weights.hub_id}/{weights.filename}")


def stored_file(weights: Weights) -> Path | None:
    """The file or folder that `load_weights` would take for official weights, without a download.

    That is one in the user's folder of weights, or in the cache of the user's organisation, of the
    hub, or of a URL.

    Args:
        weights: Which ones.

    Raises:
        WeightsError: An environment variable that names a mirror is wrong.
    """
    if copy := local_copy(weights):
        return copy[0]
    if (mirror := mirror_of(weights)) and (path := _in_hub_cache(mirror, WEIGHT_FILES, None)):
        return path
    if weights.hub_id is not None:
        record = known_record(weights)
        revision = record.revision if record else None
        return _in_hub_cache(weights.hub_id, (weights.filename,), revision)
    path = cached_path(weights.urls[0], None)
    return path if path.is_file() else None


def _in_hub_cache(repo_id: str, names: tuple[str, ...], revision: str | None) -> Path | None:
    for name in names:
        path = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None
