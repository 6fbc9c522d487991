"""What else goes wrong with weights: other models, types and shards, full and read-only disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

import backbones  # noqa: F401
from tests.backbones.models import VARIANTS
from tests.faults.client import digest
from tests.faults.hub import CONFIG, WEIGHTS, config, narrow_weights
from tests.faults.lab import NARROW, Lab, Outcome, judge, partial_files

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_FIRST = "patch_embed.0.c.weight"


def run(lab: Lab) -> dict[str, Outcome]:
    """Inject everything, and say what came of it."""
    plain = narrow_weights()
    failures = _run_files(lab, plain) | _run_shards(lab, plain) | _run_full(lab)
    failures |= _run_read_only(lab, plain)
    return {name: Outcome(failures[name]) for name in NAMES}


# models from a file: name -> what the file holds, arguments, what the error says
_FILES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "another architecture": ("davit", {"num_classes": 3}, ("shvit_s1", "do not fit the model")),
    "another size": ("wider", {"num_classes": 3}, ("shvit_s1", "do not fit the model")),
    "classes not asked for": ("plain", {}, ("have 3 classes, the model 1000", "num_classes=3")),
    "classes asked for": ("plain", {"num_classes": 5}, ()),
    "no classifier asked for": ("plain", {"num_classes": 0}, ()),
    "float16": ("float16", {"num_classes": 3}, ()),
    "bfloat16": ("bfloat16", {"num_classes": 3}, ()),
}


def _file(kind: str, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "davit":
        return timm.create_model("davit_tiny", num_classes=3, **VARIANTS["davit"].args).state_dict()
    if kind == "wider":
        wide = NARROW | {"embed_dim": (32, 64, 72)}
        return timm.create_model("shvit_s1", num_classes=3, **wide).state_dict()
    if kind == "plain":
        return plain
    dtype = getattr(torch, kind)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain.items()}


def _run_files(lab: Lab, plain: dict[str, Tensor]) -> dict[str, str]:
    calls, expected = {}, {}
    for name, (kind, args, _) in _FILES.items():
        path, weights = lab.folder / f"{name}.safetensors", _file(kind, plain)
        path.write_bytes(save(weights))
        expected[name] = digest(weights, ("head.", "patch_embed.0."))
        file = {"pretrained_cfg_overlay": {"file": str(path)}}
        calls[name] = {"do": "timm", "arguments": {"name": "shvit_s1", **NARROW, **args, **file}}
    outcomes = lab.online.run(calls)
    failures = {
        name: judge(outcomes[name], says, body=expected[name])
        for name, (_, _, says) in _FILES.items()
    }
    if "classifier starts fresh" not in " ".join(outcomes["classes asked for"]["lines"]):
        failures["classes asked for"] += " logs nothing of it"
    return failures


# name -> what the index says of tensors, shards that are there, what the error says
_SHARDED: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "shards": ({}, _SHARDS, ()),
    "shard missing": ({}, _SHARDS[:1], (f"{_SHARDS[1]}", "Entry Not Found", "choose a file|fetch")),
    "shard named ../": ({_FIRST: "../x.safetensors"}, _SHARDS, ("no plain name",)),
    "tensor in the wrong shard": (
        {_FIRST: _SHARDS[1]},
        _SHARDS,
        (f"{_FIRST} is not meant to be in {_SHARDS[0]}", "fetch the index and all shards again"),
    ),
    "shard damaged": ({}, _SHARDS, (_SHARDS[1], "is damaged", "load it again")),
}


def _run_shards(lab: Lab, plain: dict[str, Tensor]) -> dict[str, str]:
    names, calls = list(plain), {}
    parts = [{n: plain[n] for n in some} for some in (names[:9], names[9:])]
    weight_map = {n: _SHARDS[i] for i, part in enumerate(parts) for n in part}
    for name, (changes, there, _) in _SHARDED.items():
        repo_id = "shards/" + name.replace(" ", "-").removesuffix("-../")
        index = json.dumps({"weight_map": weight_map | changes}).encode()
        contents = dict(zip(_SHARDS, map(save, parts), strict=True))
        files = {shard: contents[shard] for shard in there}
        lab.hub.add(repo_id, files | {f"{WEIGHTS}.index.json": index, CONFIG: config({})})
        calls[name] = {"do": "model", "arguments": {"name": f"hf-hub:{repo_id}", **NARROW}}
    lab.hub.fail(f"shards/shard-damaged/{_SHARDS[1]}", "corrupt", times=1)
    outcomes = lab.online.run(calls)
    return {
        name: judge(outcomes[name], says, digest(plain)) for name, (_, _, says) in _SHARDED.items()
    }


_FULL = {
    "full disk, from the hub": ("No space left|File too large", "free space there"),
    "full disk, from a URL": ("No space left|File too large", "free space"),
    "file limit, from the hub": ("File too large", "free space there"),
    "file limit, from a URL": ("File too large", "free space"),
}


def _run_full(lab: Lab) -> dict[str, str]:
    large = save({"a": torch.rand(500_000)})
    lab.hub.add("full/large", {WEIGHTS: large})
    locations = ("hf-hub:full/large", lab.hub.add_plain("full-large.safetensors", large))
    failures = {}
    with _small_disk(lab.folder / "full") as folder:
        for i, name in enumerate(_FULL):
            # in a folder of its own, so that nothing is there from before
            full, cache = i < 2, folder / str(i) if i < 2 else lab.folder / f"limit{i}"
            arguments = {"location": locations[i % 2], "cache_dir": str(cache)}
            limit = {} if full and os.path.ismount(folder) else {"file_limit": 1_000_000}
            call = {"do": "weights", "arguments": arguments, **limit}
            failures[name] = judge(lab.online.run({name: call})[name], _FULL[name])
            if partial := partial_files(cache):
                failures[name] += f" leaves {partial}"
    return failures


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a megabyte, where mounting one is permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


# name -> what the error says
_READ_ONLY: dict[str, tuple[str, ...]] = {
    "read-only cache, warm": (),
    "read-only cache, a newer version": (),
    "read-only cache, by URL": (),
    "read-only cache, cold": ("Permission denied", "make .* writable"),
    "read-only cache, damaged": ("is damaged|sha256",),
}


def _run_read_only(lab: Lab, plain: dict[str, Tensor]) -> dict[str, str]:
    cache, calls = lab.folder / "read-only", {}
    for case in _READ_ONLY:
        slug = case.partition(", ")[2].replace(" ", "-")
        lab.hub.add(f"ro/{slug}", {WEIGHTS: save(plain)})
        calls[case] = _in_cache(cache, f"hf-hub:ro/{slug}")
    url = lab.hub.add_plain("ro.safetensors", save(plain))
    calls["read-only cache, by URL"] = _in_cache(cache, url)
    lab.online.run({case: call for case, call in calls.items() if not case.endswith("cold")})
    _damage(cache / "models--ro--damaged")
    lab.hub.add("ro/a-newer-version", {WEIGHTS: save(plain | {_FIRST: plain[_FIRST] + 1})})
    with _read_only(cache):
        outcomes = lab.online.run({k: call | {"restricted": True} for k, call in calls.items()})
    return {name: judge(outcomes[name], says, digest(plain)) for name, says in _READ_ONLY.items()}


def _in_cache(cache: Path, location: str) -> dict[str, Any]:
    return {"do": "weights", "arguments": {"location": location, "cache_dir": str(cache)}}


def _damage(repository: Path) -> None:
    (path,) = (repository / "blobs").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Take the right to write to a folder away, from its owner too."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


NAMES = (*_FILES, *_SHARDED, *_FULL, *_READ_ONLY)
