"""Count the bytes that operations move, on meta tensors: nothing is computed and no GPU is needed.

Every operation that a device would run as a kernel of its own reads its inputs and writes its
outputs; views are free. Our registered ops run their launchers, whose launches are recorded and not
started (`_launch_bytes.py`), so what is counted is what the kernels do, temporary sums included.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.ops import _choice
from benchmarks._launch_bytes import launch_bytes, tensor_bytes
from benchmarks._launches import recording

# the first pattern that an operation's name matches says what kind it is
KINDS = {
    "attention core": r"backbones::(?!depthwise|adaptive|route)|_scaled_dot_product",
    "convolution": r"backbones::depthwise|aten::(convolution|_conv)",
    "matrix product": r"aten::(mm|addmm|bmm|baddbmm|addbmm|linear|dot|mv)\b",
    "norm": r"(batch|layer|group)_norm|_norm_",
    "gather": r"aten::_?(gather|scatter|index|embedding|topk|sort|masked_select|take)",
    "reduction": r"aten::(sum|mean|var|std|amax|max|softmax|_?(log_)?softmax|logsumexp|norm)|"
    r"pool|adaptive_average",
    "copy": r"aten::(clone|copy|_to_copy|cat|stack|constant_pad|pad|zero|fill|full|ones|new_|roll|"
    r"im2col|col2im|flip|repeat|contiguous|slice_|select_|arange|upsample|unfold_|"
    r"_reshape_copy|as_strided_|(reflection|replication)_pad|scalar_tensor)|route_regions",
    "elementwise": r".",
}
_FREE = re.compile(r"aten::(empty|new_empty|_unsafe_view|detach|alias|lift_fresh|empty_like|set_)")
# what writes its first argument, or a new tensor, without reading it
_WRITES = re.compile(
    r"aten::(copy_|fill_|zero_|zeros|full|ones|new_zeros|new_full|new_ones|arange)"
)
# autograd's name of the backward pass of a dense projection
_PROJECTED = ("AddmmBackward0", "MmBackward0", "LinearBackward0")


@dataclass(frozen=True)
class Moved:
    """One operation and what it moved.

    Attributes:
        name: Of the operation, such as "aten::add".
        kind: One of `KINDS`.
        path: Of the module that called it, or whose backward pass it belongs to.
        backward: Whether it belongs to the backward pass.
        projection: Whether it is a dense projection, or the gradient of one.
        kernels: How many kernels it is.
        bytes: Read and written.
    """

    name: str
    kind: str
    path: str
    backward: bool
    projection: bool
    kernels: int
    bytes: int


def kind_of(name: str) -> str:
    """The kind of an operation, by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


class Traffic(TorchDispatchMode):
    """Record what every operation inside a `with` block moves, as `moved`.

    Operations of the backward pass belong to the module in whose forward pass autograd noted them.

    Args:
        model: Whose modules are named; None for no names.
        depthwise: Whether our kernels compute depthwise convolutions, as on a device where they
            have been measured to be faster, or PyTorch does.
    """

    def __init__(self, model: nn.Module | None = None, depthwise: bool = True) -> None:
        super().__init__()
        self.moved: list[Moved] = []
        self._depthwise = depthwise
        self._names = {} if model is None else {m: name for name, m in model.named_modules()}
        self._stack: list[str] = [""]
        # the module that noted nodes of autograd, from each sequence number on
        self._numbers, self._paths = [0], [""]
        # within one of our ops: its kernels and bytes so far
        self._inside: list[int] | None = None

    def __enter__(self) -> Traffic:
        if self._inside is None:
            self._hooks = [
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
            ]
            self._attention = _Fused()
            self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._inside is None:
            self._attention.__exit__(*error)
            for hook in self._hooks:
                hook.remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._names.get(module, self._stack[-1]))
        self._note()

    def _leave_module(self, *_: Any) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._paths.append(self._stack[-1])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("backbones::") and self._inside is None:
            return self._ours(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and not _FREE.match(name):
            kernels, moved = 1, _bytes(name, args, kwargs, out)
            if name == "aten::convolution_backward":
                # a kernel for each gradient, and all read that of the output
                kernels = sum(args[-1])
                moved += (kernels - 1) * tensor_bytes(args[0])
            self._add(name, kernels, moved, args)
        return out

    def _ours(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        # what this counts is added to one record, of the op
        self._inside = [0, 0]
        try:
            # meta tensors have no autocast to switch off
            with (
                patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
                self,
                recording() as launches,
                _choice.forced(self._depthwise),
            ):
                OPDEFS[name]._init_fn(*args, **kwargs)
            kernels = self._inside[0] + len(launches)
            moved = self._inside[1] + sum(launch_bytes(launch) for launch in launches)
        finally:
            self._inside = None
        self._add(name, kernels, moved, args)
        return func(*args, **kwargs)

    def _add(self, name: str, kernels: int, moved: int, args: Any) -> None:
        if self._inside is not None:
            self._inside[0] += kernels
            self._inside[1] += moved
            return
        node = torch._C._current_autograd_node()
        path = self._stack[-1] if node is None else self._path(node._sequence_nr())
        dense = name in ("aten::mm", "aten::addmm") or (
            name in ("aten::convolution", "aten::convolution_backward") and _groups(args) == 1
        )
        projection = dense or (node is not None and node.name() in _PROJECTED)
        # outside a task of autograd's engine it is -1
        backward = torch._C._current_graph_task_id() >= 0
        self.moved.append(Moved(name, kind_of(name), path, backward, projection, kernels, moved))

    def _path(self, number: int) -> str:
        # gradients that are added up have no number of their own
        if number >= 1 << 63:
            return self.moved[-1].path
        return self._paths[bisect_right(self._numbers, number) - 1]


def _groups(args: tuple[Any, ...]) -> int:
    groups = [arg for arg in args if type(arg) is int]
    return groups[-1] if groups else 1


def _bytes(name: str, args: Any, kwargs: Any, out: Any) -> int:
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if _WRITES.match(name):
        inputs = inputs[1:] if name == "aten::copy_" else []
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return sum(map(tensor_bytes, inputs + outputs))


class _Fused(TorchFunctionMode):
    """Let `scaled_dot_product_attention` be the kernel that a GPU runs, which meta tensors lack."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    assert dropout_p == 0 and query.ndim == 4
    aten = torch.ops.aten
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        attend = aten._scaled_dot_product_flash_attention
        return attend(query, key, value, 0.0, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                ~attn_mask, float("-inf")
            )
    attend = aten._scaled_dot_product_efficient_attention
    needs = torch.is_grad_enabled()
    return attend(query, key, value, attn_mask, needs, 0.0, is_causal, scale=scale)[0]
