"""Whole models beside their peers: what is timed, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import timm
import torch
from torch import nn

from benchmarks import official
from benchmarks._results import Row
from tests.support import golden

PRECISIONS = ("bf16", "tf32", "fp32")
DETECTION = (800, 1216)
# images of the model's own size (None) or of a detector's, and how many; the first matter most
PLACES: tuple[tuple[tuple[int, int] | None, int], ...] = (
    (None, 128),
    (None, 1),
    (DETECTION, 2),
    (None, 32),
    (DETECTION, 1),
)


class Provider(NamedTuple):
    """One way to compute a model.

    Attributes:
        source: "ours", "peer", or "reference": our model on the plain PyTorch form of its ops.
        fused: After `fuse()`.
        compiled: Under `torch.compile`.
    """

    source: str
    fused: bool = False
    compiled: bool = False


PROVIDERS = {
    "ours": Provider("ours"),
    "ours fused": Provider("ours", fused=True),
    "peer": Provider("peer"),
    "peer compiled": Provider("peer", compiled=True),
    "ours compiled": Provider("ours", compiled=True),
    "ours fused compiled": Provider("ours", fused=True, compiled=True),
    "reference compiled": Provider("reference", compiled=True),
}


class Job(NamedTuple):
    """What one provider is to compute.

    Attributes:
        model: Name of our model.
        provider: A key of `PROVIDERS`.
        mode: "inference", or "training": forward and backward with batch statistics, no optimizer.
        precision: "bf16": weights in bfloat16, in training autocast over weights in float32;
            "tf32", "fp32": float32 whose products may, or may not, be rounded to TF32.
        size: Height and width of the images.
        batch: Images of a step.
    """

    model: str
    provider: str
    mode: str
    precision: str
    size: tuple[int, int]
    batch: int

    @property
    def row(self) -> Row:
        """The fields that name its rows; "peer" says what the peer is."""
        return {**self._asdict(), "size": list(self.size), "peer": kind(self.model)}


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Our model and its peer, on the CPU, with the same weights.

    Matrices are as they are created, the same in every run: batch statistics of a few images make
    rounding a matter of luck. Vectors are lively, as fresh gammas and biases hide branches.
    """
    torch.manual_seed(0)
    ours, peer = official.pair(name)
    lively = golden.fill_model(ours)
    weights = {key: lively[key] if v.ndim == 1 else v for key, v in ours.state_dict().items()}
    for model in (ours, peer):
        model.load_state_dict(weights)
    return ours, peer


def kind(name: str) -> str:
    """What the peer of a model is: "timm" or "official"."""
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return "timm" if family in official.TIMM else "official"


def own_size(name: str) -> tuple[int, int]:
    """Height and width of the images that a model is made for."""
    _, height, width = timm.get_pretrained_cfg(name).input_size
    return height, width


def work(names: Sequence[str]) -> Iterator[Job]:
    """All jobs of models, in an order that a budget may cut short: what compiles comes later."""
    for precision in PRECISIONS:
        for size, batch in PLACES:
            for compiled in (False, True):
                for mode in ("inference", "training") if batch > 1 else ("inference",):
                    for provider, name in _turns(names, mode, compiled):
                        yield Job(name, provider, mode, precision, size or own_size(name), batch)


def _turns(names: Sequence[str], mode: str, compiled: bool) -> Iterator[tuple[str, str]]:
    """Pairs of provider and model; the peer of each is timed next to ours where that is quick."""
    chosen = [
        key
        for key, provider in PROVIDERS.items()
        if provider.compiled == compiled and (mode == "inference" or not provider.fused)
    ]
    if compiled:
        yield from ((provider, name) for provider in chosen for name in names)
    else:
        yield from ((provider, name) for name in names for provider in chosen)
