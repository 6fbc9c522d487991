"""What every op shares: the reference switch, the autocast rule, the accumulation type."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_CHOICES = ("auto", "reference")
_choice = os.environ.get("BACKBONES_OPS", "auto")
if _choice not in _CHOICES:
    raise ValueError(f"BACKBONES_OPS={_choice!r} is not one of {_CHOICES}: unset it or correct it")
_reference = _choice == "reference"


@contextmanager
def use_reference(enable: bool = True) -> Iterator[None]:
    """Call the plain PyTorch functions instead of the registered ops inside a `with` block.

    For what custom ops cannot do: `torch.func`, second derivatives, `torch.export` for programs
    that know none; `torch.onnx.export` needs no switch. The environment variable
    `BACKBONES_OPS=reference` does the same for a whole process. The switch is global, not per
    thread, and `torch.compile` recompiles when it changes.

    Args:
        enable: False calls the registered ops again inside an outer block.
    """
    global _reference
    previous, _reference = _reference, enable
    try:
        yield
    finally:
        _reference = previous


def reference_in_use() -> bool:
    """Whether ops are to run their reference: see `use_reference`, or ONNX is being written."""
    # the second question is slow, and asked in exports only
    return _reference or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def runs_at_once(x: Tensor) -> bool:
    """Whether an op may compute `x` on a CPU without the dispatcher, whose cost is that of a layer.

    Only where nothing is to see the op: no gradient, compiler, trace, mode or subclass of tensors.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast `tensors` to the autocast type of their device where autocast is on; None stays None.

    Done here and not by `register_autocast`, which knows one fixed type per device and would cast
    the small float32 tables too.
    """
    assert tensors[0] is not None
    device = tensors[0].device.type
    # the query raises on the meta device
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors)


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of `x`; one that costs nothing where it is off."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def kernels(op: str, tensor: Tensor) -> ModuleType:
    """The module of the Triton kernels of `op`, imported when they are first needed."""
    try:
        return importlib.import_module(f"{__package__}.triton.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op} on a {tensor.device.type} device needs Triton: pip install triton, or set "
            "BACKBONES_OPS=reference"
        ) from None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of `dtype` are kept in: float32 for the 16-bit types, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
