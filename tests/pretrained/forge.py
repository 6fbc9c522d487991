"""Weight files of every kind, hostile ones included, as bytes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

LEGACY = {"_use_new_zipfile_serialization": False}


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def pth(value: Any, **kwargs: Any) -> bytes:
    """A file of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def safetensors(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file with any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(
    dtype: str = "F32", shape: Sequence[int] = (1,), offsets: Sequence[Any] = (0, 4)
) -> dict[str, Any]:
    """What a safetensors header says of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def packed_zip() -> bytes:
    """An archive that unpacks to a thousand times its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000_000)
    return buffer.getvalue()


def inflated(archived: bool) -> bytes:
    """A file of `torch.save` whose only tensor claims four gigabytes."""
    # the number of values, as pickled: 1000 in two bytes, and 10 ** 9 in five
    old, new = b"M\xe8\x03", b"\x8a\x05" + (10**9).to_bytes(5, "little")
    honest = {"a": torch.ones(1000)}
    if not archived:
        return pth(honest, **LEGACY).replace(old, new)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pth(honest))) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name).replace(old, new))
    return buffer.getvalue()
