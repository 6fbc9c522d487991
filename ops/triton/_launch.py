"""What the launchers share."""

from __future__ import annotations

import torch
from torch import Tensor

# where there is no GPU to ask: the interpreter, and compilation ahead of time
_MULTIPROCESSORS = 132


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the device of `tensor`."""
    if not tensor.is_cuda:
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def input_precision(tensor: Tensor) -> str:
    """How `tl.dot` is to multiply float32, by PyTorch's own setting."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or tensor.dtype != torch.float32 else "tf32"


def rows_contiguous(x: Tensor) -> Tensor:
    """Return `x`, or a copy if the stride of its last dimension is not one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
