"""Reading weight files that nobody vouches for: nothing in them is ever executed."""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import WeightsError, reason
from .inert import stand_ins
from .unwrap import holds_ema, holds_plain, unwrap

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
_SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DAMAGED = "the file is damaged: delete it and download it again"


class Copy(NamedTuple):
    """Weights as a file has them.

    Attributes:
        state_dict: Name -> tensor on the CPU.
        ema: Whether they are the moving average.
        both: Whether the file has the plain weights and the moving average.
    """

    state_dict: dict[str, Tensor]
    ema: bool
    both: bool


def read_state_dict(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the weights of a safetensors file or of a file written by `torch.save`.

    The format is told from the first bytes, not from the file's name. Pickled files are read by
    torch's restricted unpickler only; a training checkpoint is reduced to its weights.

    Args:
        path: The file.
        ema: Take the moving average of the weights instead of the weights themselves.

    Returns:
        Name -> tensor on the CPU, with the names of the file.

    Raises:
        WeightsError: The file is missing, of another kind, damaged, holds code, holds tensors that
            are not finite, or does not hold the copy that `ema` asks for. The message says which.
    """
    return read_copy(Path(path), ema, prefer_ema=False).state_dict


def read_copy(path: Path, ema: bool, prefer_ema: bool) -> Copy:
    """Read weights as `read_state_dict` does, and tell which copy of them it was.

    Args:
        path: The file.
        ema: Take the moving average of the weights.
        prefer_ema: Take it if there is one.

    Raises:
        WeightsError: As `read_state_dict`.
    """
    try:
        kind = check_file(path)
        if kind == "safetensors":
            checkpoint = _load_safetensors(path)
        else:
            checkpoint = _load_torch(path, mmap=kind == "zip")
        ema = ema or (prefer_ema and holds_ema(checkpoint))
        state_dict = unwrap(checkpoint, ema=ema)
        _check_tensors(state_dict)
    except WeightsError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error.__cause__
    return Copy(state_dict, ema, both=holds_ema(checkpoint) and holds_plain(checkpoint))


def check_file(path: Path) -> str:
    """Tell the format of a weight file and check what can be checked without loading it.

    Args:
        path: The file.

    Returns:
        "safetensors", "zip" or "legacy" (the two layouts of `torch.save`).

    Raises:
        WeightsError: It is of another kind, truncated or damaged.
    """
    kind = _detect(path)
    if kind == "safetensors":
        _check_header(path)
    elif kind == "zip":
        _check_archive(path)
    return kind


def _detect(path: Path) -> str:
    """The format of a file by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(f"{reason(error)}; check the path") from error
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_TORCH_MAGIC):
        return "legacy"
    if head[8:9] == b"{":
        return "safetensors"
    raise WeightsError(_describe_stranger(path, head))


def _describe_stranger(path: Path, head: bytes) -> str:
    if not head:
        return f"it is empty; {_DAMAGED}"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, not weights; the link needs a login or has moved"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not weights; run `git lfs pull` where it came from"
    if head[:1] == b"\x80":
        names = ", ".join(_pickle_imports(path)) or "nothing"
        return (
            f"refused, it is a bare pickle (it imports {names}) and was not executed; "
            "save weights with safetensors or torch.save"
        )
    return f"it is neither safetensors nor of torch.save (it starts with {head[:8]!r}); {_DAMAGED}"


def _load_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{reason(error)}; {_DAMAGED}") from error


def _check_header(path: Path) -> None:
    """Refuse what the safetensors library would accept or only be slow at."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise WeightsError(f"its header claims {length} bytes (at most {MAX_HEADER_BYTES})")
        raw = file.read(length)
    if len(raw) < length:
        raise WeightsError(f"it is truncated inside its header ({size} bytes); {_DAMAGED}")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        dtypes = {entry["dtype"] for entry in entries.values()}
        end = 8 + length + max((int(e["data_offsets"][1]) for e in entries.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise WeightsError(f"its header is invalid ({reason(error, 100)}); {_DAMAGED}") from error
    if len(entries) > MAX_TENSORS:
        raise WeightsError(f"it lists {len(entries)} tensors (at most {MAX_TENSORS})")
    if strange := dtypes - _SAFETENSORS_DTYPES:
        types = ", ".join(sorted(map(str, strange))[:3])
        raise WeightsError(f"it holds tensors of type {types}, which no official weights have")
    if size < end:
        raise WeightsError(f"it is truncated: {size} of {end} bytes; {_DAMAGED}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _check_archive(path: Path) -> None:
    """Compare the archive's checksums, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses, and an entry that is compressed could unpack to any size
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
            broken = None if packed else archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        cause = f"it is truncated or damaged ({reason(error, 100)})"
        raise WeightsError(f"{cause}; {_DAMAGED}") from error
    if packed:
        raise WeightsError("it is a compressed archive, not a file of torch.save")
    if broken is not None:
        raise WeightsError(f"its part {broken} fails its checksum; {_DAMAGED}")


def _load_torch(path: Path, mmap: bool) -> Any:
    if path.suffix == ".safetensors":  # torch.load trusts the name
        raise WeightsError("it is a file of torch.save under a false name; rename it to .pth")
    try:
        # training scripts keep their command line beside the weights
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins(path)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise WeightsError(f"its pickle cannot be read; {_DAMAGED}") from error
        raise WeightsError(
            f"refused, its pickle calls {name[1]} and was not executed; ask its author for "
            "safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise WeightsError(f"{reason(error, 150)}; {_DAMAGED}") from error


def _pickle_imports(path: Path) -> list[str]:
    """What unpickling `path` would import, found without doing it."""
    names: list[str] = []
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, value, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.append(str(value).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except Exception:  # it is refused in any case; report what was found
        return names
    return names


def _check_tensors(state_dict: dict[str, Tensor]) -> None:
    for name, value in state_dict.items():
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise WeightsError(f"{name} is not an ordinary dense tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"{name} claims shape {tuple(value.shape)} but holds fewer values")
        if not torch.isfinite(value).all():
            raise WeightsError(
                f"{name} holds NaN or infinite values: its training diverged, or {_DAMAGED}"
            )
