"""Files of what was measured on a device: a head that names code and versions, and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def earlier(path: Path, head: Mapping[str, str]) -> list[Row]:
    """Rows of earlier runs of the same code on the same device.

    Args:
        path: Of the file.
        head: Device, versions and commit of this run.
    """
    # uncommitted changes may be others than last time
    if not path.exists() or head["commit"].endswith(("-dirty", "unknown")):
        return []
    old = json.loads(path.read_text())
    if any(old.get(key) != value for key, value in head.items()):
        return []
    return old["rows"]


def write(path: Path, head: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write a result, one row per line; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    part = path.with_suffix(".part")
    part.write_text(f'{{\n{fields} "rows": [\n{lines}\n ]\n}}\n')
    part.replace(path)
