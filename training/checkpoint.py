"""Checkpoints that are complete and verified, or not there at all.

`<run>/ckpt/step-00001234/` holds `model.safetensors`, `ema.safetensors` (with an average),
`optim.pt` (tensors and plain values: loads with `weights_only=True`) and `meta.json` with the
SHA-256 of the others. It is written under another name, forced to disk and renamed, so that a crash
at any moment leaves the previous checkpoint as the newest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import UsageError

FORMAT = 1
META, MODEL, EMA, OPTIM = "meta.json", "model.safetensors", "ema.safetensors", "optim.pt"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        model: State dict.
        ema: State dict of the average, if there is one.
        optim: States of the optimizer and of the gradient scaler.
        meta: Everything else, plain JSON values.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optim: Mapping[str, Any]
    meta: Mapping[str, Any]


def save(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; when this returns, it is on the disk.

    Args:
        folder: The checkpoints of the run.
        step: Steps done.
        checkpoint: What to write.

    Returns:
        The new folder.

    Raises:
        OSError: The disk is full or cannot be written; the older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    temporary = folder / f"{_TEMPORARY}{os.getpid()}"
    temporary.mkdir()
    files = {name: write_file(temporary / name, data) for name, data in _encode(checkpoint)}
    meta = {"format": FORMAT, "step": step, **checkpoint.meta, "files": files}
    write_file(temporary / META, json.dumps(meta, indent=1).encode())
    _sync_folder(temporary)
    target = folder / f"step-{step:08d}"
    while target.exists():
        # a step that is saved again, now with its evaluation: never without either of the two
        target = target.with_name(f"{target.name}-again")
    temporary.rename(target)
    _sync_folder(folder)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, none when there is none."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def find(folder: Path, step: int) -> Path | None:
    """The newest checkpoint of `step`, none when there is none."""
    found = sorted(folder.glob(f"step-{step:08d}*"))
    return found[-1] if found else None


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        UsageError: A file is missing, cut off or changed.
    """
    meta = read_meta(path)
    data = {name: _read_verified(path / name, entry) for name, entry in meta["files"].items()}
    averaged = data.get(EMA)
    return Checkpoint(
        model=safetensors.torch.load(data[MODEL]),
        ema=None if averaged is None else safetensors.torch.load(averaged),
        optim=torch.load(io.BytesIO(data[OPTIM]), map_location="cpu", weights_only=True),
        meta=meta,
    )


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta.json` of a checkpoint.

    Raises:
        UsageError: It is missing, damaged or of another format.
    """
    try:
        meta = json.loads((path / META).read_text())
        known = meta["format"] == FORMAT and meta["files"].keys() >= {MODEL, OPTIM}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, META, "it cannot be read") from None
    if not known:
        raise UsageError(f"{path} has another checkpoint format: use the version that wrote it")
    return meta


def prune(folder: Path, keep: Iterable[int]) -> None:
    """Delete all checkpoints but the newest of each step in `keep`."""
    kept = {find(folder, step) for step in keep}
    for path in folder.glob("step-*"):
        if path not in kept:
            # a half-deleted checkpoint must not look like one
            doomed = path.rename(path.with_name(f"{_TEMPORARY}{path.name}"))
            shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Delete what interrupted writes have left behind."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def open_for_write(path: Path) -> IO[bytes]:
    """Open a file of a checkpoint: the one place where its bytes go out."""
    return path.open("wb")


def write_file(path: Path, data: bytes | memoryview) -> dict[str, Any]:
    """Write `data` and force it to disk; return its size and hash."""
    with open_for_write(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` in one step."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    write_file(temporary, data)
    temporary.replace(path)


def _encode(checkpoint: Checkpoint) -> Iterable[tuple[str, bytes | memoryview]]:
    yield MODEL, _safetensors(checkpoint.model)
    if checkpoint.ema is not None:
        yield EMA, _safetensors(checkpoint.ema)
    buffer = io.BytesIO()
    torch.save(checkpoint.optim, buffer)
    yield OPTIM, buffer.getbuffer()


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()})


def _read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        raise _damaged(path.parent, path.name, "it cannot be read") from None
    if len(data) != entry["bytes"]:
        raise _damaged(path.parent, path.name, f"{len(data)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(path.parent, path.name, "its SHA-256 is wrong")
    return data


def _damaged(path: Path, name: str, how: str) -> UsageError:
    return UsageError(
        f"the checkpoint {path} is damaged ({name}: {how}): delete this folder to go on from an "
        "older one, or choose another --out"
    )


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
