"""What the peers of all ops share, and those that every op has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from benchmarks.cases import Case, Tensors

Outputs = tuple[Tensor, ...]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Peers = dict[str, Callable[[Any, Compile], "Peer"]]


def outputs(result: Tensor | Outputs) -> Outputs:
    """The tensors of what an op returns, one or several."""
    return result if isinstance(result, tuple) else (result,)


class Peer:
    """One way to compute a case: the op itself.

    Args:
        case: What to compute.
        compile: `torch.compile`, with the settings of this run.
    """

    # whether PyTorch has its backward pass on a CPU
    trains_on_cpu = True

    def __init__(self, case: Case, compile: Compile) -> None:
        self.function = case.function()
        self.names = list(case.tensors("meta"))

    def scope(self) -> AbstractContextManager[None]:
        """What everything happens in."""
        return nullcontext()

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make the differentiable arguments of `run`; not timed."""
        return tuple(tensors.values())

    def run(self, *arguments: Tensor) -> Outputs:
        """Compute what is timed; the first output is the result."""
        return outputs(self.function(**dict(zip(self.names, arguments, strict=True))))

    def to_map(self, result: Tensor) -> Tensor:
        """Bring the result to the op's form `(B, H, W, C)`, to compare it; not timed."""
        return result


class Reference(Peer):
    """The op's plain PyTorch form."""

    def __init__(self, case: Case, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = case.function(reference=True)


class CompiledReference(Reference):
    """The op's plain PyTorch form under `torch.compile`."""

    def __init__(self, case: Case, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self.function)


class Given(nn.Module):
    """Stands in a layer for the projection that would compute `value`."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return `value`."""
        return self.value
