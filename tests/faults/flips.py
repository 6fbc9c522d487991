"""F10: single bits that flip on the way, of files whose hash is known."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch
from safetensors.torch import save

from backbones.pretrained import WeightsError, load_weights
from tests.faults.lab import Lab, Outcome
from tests.pretrained.forge import pth

COUNT = 1000
NAMES = tuple(f"{kind} {i}" for kind in ("safetensors", "pth") for i in range(COUNT // 2))


def run(lab: Lab) -> dict[str, Outcome]:
    """Flip one bit of a fresh copy, for every name, and load it."""
    weights = {"a": torch.arange(200.0), "b": torch.ones(3)}
    contents = {"safetensors": save(weights), "pth": pth({"model": weights})}
    path = lab.folder / "flipped"
    return {
        name: Outcome(_flip(path, f"{name} {lab.trial}", contents[name.split()[0]]))
        for name in NAMES
    }


def _flip(path: Path, seed: str, content: bytes) -> str:
    """Why a flipped bit was not found; empty if it was."""
    bit = random.Random(seed).randrange(8 * len(content))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    digests = [hashlib.sha256(each).hexdigest() for each in (flipped, content)]
    try:
        load_weights(path, sha256=digests[1])
    except WeightsError as error:
        named = all(digest in str(error) for digest in digests)
        return "" if named else f"bit {bit}: does not name both hashes: {error}"
    return f"bit {bit} is not found"
