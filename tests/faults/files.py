"""F9: files that are broken or mean harm.

The thirty that the research of the file formats tried, and more: each is refused in one line that
says what it is, or harmless, nothing in it is executed, and it takes neither time nor memory.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tests.faults.lab import Lab, Outcome, judge
from tests.pretrained.forge import (
    LEGACY,
    Command,
    entry,
    inflated,
    packed_zip,
    pth,
    safetensors,
)

MAX_BYTES = 500_000_000
_REFUSED = "refused, .*(posix|nt).system.* not executed"
_SHARD = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Hostile:
    """A file and what is said of it.

    Attributes:
        content: Makes it, given a shell command to carry.
        says: What the error says; empty if it loads and does nothing.
        name: Its name.
        where: "file", "url", "hub", or "shard" for a folder with an index that names it.
    """

    content: Callable[[str], bytes]
    says: str = ""
    name: str = "w"
    where: str = "file"


def _just(content: bytes, says: str = "", name: str = "w") -> Hostile:
    return Hostile(lambda _: content, says, name)


def _header(says: str, header: Any, body: bytes = b"") -> Hostile:
    return Hostile(lambda _: safetensors(header, body), says)


def _archived(command: str, **kwargs: Any) -> bytes:
    return pth({"model": {"a": torch.ones(1)}, "args": Command(command)}, **kwargs)


def _bare(command: str) -> bytes:
    return pickle.dumps({"model": Command(command)})


def _objects(command: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.array([Command(command)], dtype=object))
    return buffer.getvalue()


def _many_tensors(count: int, _: str = "") -> bytes:
    text = ",".join(
        f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)
    )
    return safetensors(f"{{{text}}}".encode())


def _long(header_bytes: int) -> bytes:
    return header_bytes.to_bytes(8, "little") + b"{}"


_TWO = {"a": entry(), "b": entry(offsets=(4, 8))}

THIRTY: dict[str, Hostile] = {
    "code in an archive": Hostile(_archived, _REFUSED, "w.pth"),
    "code in the old format": Hostile(partial(_archived, **LEGACY), _REFUSED, "w.pth"),
    "code in a bare pickle": Hostile(_bare, _REFUSED, "w.pth"),
    "code at a URL": Hostile(_archived, _REFUSED, "w.pth", "url"),
    "code in an npz of objects": Hostile(_objects, "not in a subdirectory", "w.npz"),
    "truncated archive": Hostile(lambda _: pth({"a": torch.ones(9)})[:-300], "truncated or dam"),
    "empty file": _just(b"", "it is empty", "w.pth"),
    "web page": _just(b"\n <!DOCTYPE html><html>", "a web page", "w.pth"),
    "header of 2^63 bytes": _just(_long(2**63), "header claims 9223372036854775808 bytes"),
    "header of 100 MB and a byte": _just(_long(100_000_001), "header claims 100000001 bytes"),
    "header longer than the file": _just(safetensors(b"{" * 10)[:12], "truncated inside its"),
    "header of 101 MB": Hostile(lambda _: safetensors(b"{" + b" " * 101_000_000), "header claims"),
    "header that is not JSON": _header("header is invalid", b'{"a": '),
    "header that is not UTF-8": _header("header is invalid", b'{"a": \xff}'),
    "no tensors": _header("no state dict", {}),
    "seven bytes": _just(b"1234567", "neither safetensors nor of torch.save"),
    "tensors that overlap": _header("SafetensorError", {"a": entry(), "b": entry()}, b"0000"),
    "hole between tensors": _header("SafetensorError", {"a": entry(offsets=(4, 8))}, b"0" * 8),
    "bytes after the last tensor": _header("SafetensorError", {"a": entry()}, b"0" * 8),
    "offset behind the end": _header(
        "is truncated: ", {"a": entry(offsets=(0, 400), shape=(100,))}, b"0" * 399
    ),
    "shape unlike the bytes": _header("SafetensorError", {"a": entry(shape=(2,))}, b"0000"),
    "shape that overflows": _header(
        "SafetensorError", {"a": entry(shape=(2**62, 2**62))}, b"0000"
    ),
    "negative offset": _header("SafetensorError", {"a": entry(offsets=(-4, 0))}, b"0000"),
    "unknown type": _header("tensors of type F4", {"a": entry(dtype="F4")}, b"0000"),
    "JSON 100,000 deep": _header("header is invalid", b'{"a":' + b"[" * 100_000),
    "metadata that is no text": _header(
        "SafetensorError", {"__metadata__": {"a": 1}, "a": entry()}, b"0000"
    ),
    "the same name twice": _header("duplicate key 'a'", b'{"a": 1, "a": 2}'),
    "shape of zero times 2^60": _header(
        "", {"a": entry(shape=(0, 2**60), offsets=(0, 0)), "b": entry()}, b"0000"
    ),
    "tensor named ../../etc/x": _header("", {"../../etc/x": entry()}, b"0000"),
    "a million empty tensors": Hostile(partial(_many_tensors, 1_000_000), "header claims"),
}  # fmt: skip

MORE: dict[str, Hostile] = {
    "code under a safe name": Hostile(_archived, "under a false name", "w.safetensors"),
    "bare code under a safe name": Hostile(_bare, _REFUSED, "w.safetensors"),
    "bare code in plain text": Hostile(
        lambda command: b"cposix\nsystem\n(S'%s'\ntR." % command.encode(), "neither safetensors"
    ),
    "code in a shard": Hostile(_archived, "under a false name", _SHARD, "shard"),
    "code on the hub": Hostile(_archived, _REFUSED, "pytorch_model.bin", "hub"),
    "git-lfs pointer": _just(b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
    "header a byte too long": _header("claims 8388609 bytes", b"{" + b" " * 8 * 2**20),
    "header of numbers": _header("header is invalid", {"a": 3}),
    "tensor without a shape": _header("header is invalid", {"a": {"dtype": "F32"}}),
    "offsets of letters": _header("header is invalid", {"a": entry(offsets=("x", "y"))}, b"0" * 4),
    "20,001 tensors": Hostile(partial(_many_tensors, 20_001), "lists 20001 tensors"),
    "archive that is packed": Hostile(lambda _: packed_zip(), "compressed archive"),
    "archive of zeros": _just(b"PK\x03\x04" + b"0" * 100, "truncated or damaged"),
    "a list": Hostile(lambda _: pth([1, 2]), "holds a list"),
    "no weights": Hostile(lambda _: pth({"epoch": 1}), "no state dict"),
    "tensor without values": Hostile(
        lambda _: pth({"a": torch.ones(2, device="meta")}), "not an ordinary dense tensor"
    ),
    "sparse tensor": Hostile(
        lambda _: pth({"a": torch.eye(2).to_sparse()}), "not an ordinary dense tensor"
    ),
    "one value spread over 10^9": Hostile(
        lambda _: pth({"a": torch.ones(1).expand(10**9)}), r"claims shape \(1000000000"
    ),
    "four gigabytes, claimed in an archive": Hostile(lambda _: inflated(True), "cannot read"),
    "four gigabytes, claimed in the old format": Hostile(lambda _: inflated(False), "cannot read"),
    **{
        f"{kind} in {'safetensors' if write is save else 'an archive'}": Hostile(
            lambda _, write=write, kind=kind: write({"a": torch.tensor([1.0, float(kind)])}),
            "a holds NaN or infinite values",
        )
        for write in (save, pth)
        for kind in ("nan", "inf")
    },
}  # fmt: skip


def _place(lab: Lab, name: str, hostile: Hostile, command: str) -> str:
    """Put a file where it belongs and say how it is loaded."""
    content, slug = hostile.content(command), "".join(filter(str.isalnum, name))
    if hostile.where == "url":
        return lab.hub.add_plain(f"{slug}/{hostile.name}", content)
    if hostile.where == "hub":
        lab.hub.add(f"f9/{slug}", {hostile.name: content})
        return f"hf-hub:f9/{slug}"
    folder = lab.folder / "files" / slug
    folder.mkdir(parents=True)
    (folder / hostile.name).write_bytes(content)
    if hostile.where == "shard":
        index = {"weight_map": {"a": hostile.name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return str(folder)
    return str(folder / hostile.name)


def run(lab: Lab, files: Mapping[str, Hostile]) -> dict[str, Outcome]:
    """Load every file, one after the other, and say what came of it."""
    canaries = {name: lab.folder / f"executed {name}" for name in files}
    calls = {}
    for name, hostile in files.items():
        location = _place(lab, name, hostile, f"touch '{canaries[name]}'")
        calls[name] = {"do": "weights", "arguments": {"location": location}}
    outcomes = lab.online.run(calls, parallel=1)
    return {name: _judge(files[name], outcomes[name], canaries[name]) for name in files}


def _judge(hostile: Hostile, outcome: dict[str, Any], canary: Path) -> Outcome:
    failure = judge(outcome, (hostile.says,) if hostile.says else ())
    if canary.exists():
        failure += " executed code"
    needed = outcome.get("bytes", 0)
    if needed > MAX_BYTES:
        failure += f" took {needed / 1e6:.0f} MB"
    return Outcome(failure, outcome.get("seconds", 0.0), needed)
