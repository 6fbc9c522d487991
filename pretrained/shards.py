"""Weights in several safetensors files with an index, as large models are saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import WeightsError, reason

INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 8 * 2**20
_MAX_SHARDS = 256
_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name.

    Args:
        path: The file.
    """
    return path.name.endswith(".safetensors.index.json")


def read_index(path: Path) -> dict[str, set[str]]:
    """Read which tensors lie in which file.

    Args:
        path: The index.

    Returns:
        Name of a shard, a plain file name -> names of its tensors, sorted by shard.

    Raises:
        WeightsError: It is no such index, or names files elsewhere.
    """
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise WeightsError(f"it is larger than {_MAX_INDEX_BYTES} bytes")
        weight_map = _weight_map(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError, WeightsError) as error:
        text = error if isinstance(error, WeightsError) else reason(error, 150)
        raise WeightsError(f"cannot read the index {path}: {text}") from error
    shards: dict[str, set[str]] = {name: set() for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        shards[name].add(tensor)
    return shards


def merge_shards(
    shards: Mapping[str, set[str]], read: Callable[[str], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read all shards and put their tensors together.

    Args:
        shards: What `read_index` returned.
        read: Reads the tensors of the shard of a name.

    Raises:
        WeightsError: A shard holds other tensors than the index says.
    """
    merged: dict[str, Tensor] = {}
    for name, tensors in shards.items():
        found = read(name)
        if wrong := sorted(tensors ^ found.keys()):
            where = "is missing from" if wrong[0] in tensors else "is not meant to be in"
            raise WeightsError(
                f"{wrong[0]} {where} {name}, by its index ({len(wrong)} such tensors); "
                "fetch the index and all shards again"
            )
        merged |= found
    return merged


def _weight_map(index: Any) -> dict[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError("it has no weight_map")
    for name in set(map(str, weight_map.values())):
        if not _SHARD_NAME.fullmatch(name):
            raise WeightsError(f"it names {name!r}, which is no plain name of a safetensors file")
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise WeightsError(f"it names more than {_MAX_SHARDS} files")
    return weight_map
