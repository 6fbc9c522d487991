"""What the cases of all ops share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

BATCHES = {
    (224, 224): 128,
    (256, 256): 96,
    (384, 384): 40,
    (512, 512): 24,
    (768, 768): 10,
    (800, 1216): 2,
}
DETECTION = (800, 1216)

Tensors = dict[str, Tensor]


class Floor(NamedTuple):
    """The least that a call can cost: compulsory bytes, and FLOPs of products or convolutions."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of an op on a map `(batch, height, width, channels)`.

    Attributes:
        model: Model that makes the call.
        image: Height and width of its input, in pixels.
        stage: Index of the stage, from 0.
    """

    op: ClassVar[str]
    # what is timed: a number is the tensor whose gradient alone is computed
    modes: ClassVar[dict[str, int | None]] = {"forward": None, "training": None}

    model: str
    image: tuple[int, int]
    stage: int
    batch: int
    height: int
    width: int
    channels: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Unique within an op and a dtype."""
        return f"{self.model}@{self.image[0]}x{self.image[1]}.stage{self.stage}"

    @property
    def pixels(self) -> int:
        """Positions of the map, over the batch."""
        return self.batch * self.height * self.width

    @abstractmethod
    def tensors(self, device: str, seed: int = 0) -> Tensors:
        """Make random inputs; small tables are the same for every seed."""

    @property
    def other_types(self) -> tuple[torch.dtype, ...]:
        """Types beside bfloat16 that our kernels compute it in."""
        return torch.float16, torch.float32

    @property
    def on_matrix_units(self) -> bool:
        """Whether matrix units can do what it computes."""
        return True

    @abstractmethod
    def function(self, reference: bool = False) -> Callable[..., Any]:
        """Return the public op, or its reference, bound to the options of this case."""

    @abstractmethod
    def floor(self, mode: str) -> Floor:
        """Count what one of `modes` needs; "training" is a forward and a backward pass."""

    @abstractmethod
    def launch(self) -> None:
        """Call the launchers of the forward and the backward kernels with meta tensors."""


def normal(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    """Make random numbers of a seed; on the meta device none."""
    if device == "meta":
        return torch.empty(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


def four_stages(model: str, image: tuple[int, int], channels: int) -> Iterator[dict[str, Any]]:
    """Arguments of `Case` for four stages at strides 4 to 32 whose width doubles."""
    for stage in range(4):
        height, width = (-(-size // (4 << stage)) for size in image)
        yield {
            "model": model,
            "image": image,
            "stage": stage,
            "batch": BATCHES[image],
            "height": height,
            "width": width,
            "channels": channels << stage,
        }


def tiny(height: int, width: int) -> dict[str, Any]:
    """Arguments of `Case` for a call that a CPU makes in an instant."""
    fixed = {"model": "tiny", "stage": 0, "batch": 2, "dtype": torch.float32}
    return {**fixed, "image": (4 * height, 4 * width), "height": height, "width": width}
