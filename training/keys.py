"""Stateless randomness: every random choice is a pure function of the seed and of its place.

Nothing about random number generators is ever saved. The order of an epoch, the augmentation of a
sample, the mixing of a batch and the dropped paths of a step are seeded just before use from a key
that names them, so that they do not depend on worker counts, on prefetching, or on restarts.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def key(seed: int, *place: int | str) -> int:
    """The 64-bit seed of one random choice.

    Args:
        seed: The seed of the run.
        place: What is chosen and where, e.g. `("augment", epoch, index)`.
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def seed_host(value: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators on the host, once per sample."""
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    # torch.manual_seed visits every accelerator back end too, which is slow
    torch.default_generator.manual_seed(value)


def seed_step(value: int) -> None:
    """Seed the host's and every device's generators, once before a forward pass."""
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)
