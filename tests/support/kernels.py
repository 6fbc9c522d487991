"""Calling the Triton kernels of an op, in the interpreter where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled on this machine: run them with -m gpu"
)

Function = Callable[..., Tensor]


@contextmanager
def triton_kernels(op: str) -> Iterator[None]:
    """Let the registered op run its Triton kernels for tensors on the CPU too."""
    module = sys.modules[f"backbones.ops.{op}"]
    with (
        pytest.MonkeyPatch.context() as patch,
        module._forward.set_kernel_enabled("cpu", enabled=False),
        module._backward.set_kernel_enabled("cpu", enabled=False),
    ):
        # without gradients ops on a CPU need not be called
        patch.setattr(module, "runs_at_once", lambda x: False, raising=False)
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that what is not written shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


def run(
    op: str, function: Function, inputs: Sequence[Tensor | None], weight: Tensor
) -> list[Tensor]:
    """Run the kernels of `op` on `DEVICE`: the output, and the gradients of `inputs` that are.

    Args:
        op: Name of the op's module.
        function: Calls the op with `inputs`.
        inputs: Leaves or views of leaves, on `DEVICE`; None for what is left out.
        weight: What the output is multiplied by before it is summed.
    """
    with poisoned(), triton_kernels(op) if INTERPRETED else nullcontext():
        present = [x for x in inputs if x is not None]
        out = function(*inputs)
        return [out, *torch.autograd.grad((out * weight).sum(), present)]


def exact(function: Function, inputs: Sequence[Tensor | None], weight: Tensor) -> list[Tensor]:
    """The same in float64, by PyTorch."""
    doubled = [None if x is None else x.detach().cpu().double().requires_grad_() for x in inputs]
    out = function(*doubled)
    present = [x for x in doubled if x is not None]
    return [out, *torch.autograd.grad((out * weight.cpu().double()).sum(), present)]


def error(value: Tensor, expected: Tensor) -> float:
    """Relative L2 error; NaN stays NaN."""
    expected = expected.detach()
    difference = value.detach().cpu().double() - expected
    return float(difference.norm() / expected.norm().clamp(min=1e-30))


def check_cuda_graph(function: Function, inputs: Sequence[Tensor | None], weight: Tensor) -> None:
    """Replay output and gradients from a CUDA graph: they must equal those of plain calls."""
    leaves = [x for x in inputs if x is not None]

    def step() -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in captured:
        value.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
