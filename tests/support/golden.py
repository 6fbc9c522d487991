"""Deterministic weights and inputs: every tensor is a pure function of its name and shape."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def normal(name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal samples of `shape`, seeded by `name`, float64."""
    return np.random.RandomState(zlib.crc32(name.encode("utf-8"))).standard_normal(tuple(shape))


def fill(name: str, shape: Sequence[int]) -> Tensor:
    """The value of the state-dict entry `name` of `shape`, float64 (int64 for counters)."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    n = normal(name, shape)
    if name.endswith("running_mean"):
        value = 0.1 * n
    elif name.endswith("running_var"):
        value = 1 + 0.2 * np.abs(n)
    elif len(shape) >= 2:
        value = n / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("bias"):
        value = 0.1 * n
    else:
        value = 1 + 0.1 * n
    return torch.from_numpy(np.asarray(value, dtype=np.float64))


def state_dict(manifest: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Fill every entry of a golden `manifest` (name -> shape)."""
    return {name: fill(name, shape) for name, shape in manifest.items()}


def official_weights(
    recorded: Mapping[str, Any], scales: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Fill the manifest of a golden file, without derived buffers; scale names that match."""
    names = {k: v for k, v in recorded["manifest"].items() if k not in recorded["derived"]}
    weights = state_dict(names)
    for pattern, factor in (scales or {}).items():
        found = {k: factor * v for k, v in weights.items() if re.search(pattern, k)}
        assert found, pattern
        weights |= found
    return weights


def fill_model(model: nn.Module) -> dict[str, Tensor]:
    """The deterministic state dict of `model` by its own tensor names, float64."""
    return state_dict({name: tuple(value.shape) for name, value in model.state_dict().items()})


def image(shape: Sequence[int]) -> Tensor:
    """The model input of `shape`, float64."""
    return torch.from_numpy(normal("input", shape))


def load(name: str) -> dict[str, Any]:
    """The golden file `name` (without .json)."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def samples(value: Tensor) -> Tensor:
    """The 16 values of a golden summary: flat indices `linspace(0, numel - 1, 16)`, truncated."""
    index = np.linspace(0, value.numel() - 1, 16).astype(np.int64)
    return value.detach().reshape(-1)[torch.from_numpy(index)].double()


def kept(value: Tensor, recorded: Tensor) -> Tensor:
    """What a golden file keeps of a value, in its shape: of more than 1000 numbers 500 samples."""
    if value.numel() == recorded.numel():
        return value.reshape(recorded.shape)
    assert recorded.ndim == 1
    index = np.linspace(0, value.numel() - 1, len(recorded)).astype(np.int64)
    return value.reshape(-1)[torch.from_numpy(index)]


def check_summary(value: Tensor, summary: Mapping[str, Any], tolerance: float) -> None:
    """Compare a map with a golden summary, relative to its largest sample."""
    assert list(value.shape) == summary["shape"]
    expected = torch.tensor(summary["samples"], dtype=torch.float64)
    largest = tolerance * expected.abs().max()
    assert (samples(value) - expected).abs().max() < largest
    assert abs(value.double().mean() - summary["mean"]) < largest
    assert abs(value.double().std() - summary["std"]) < largest
