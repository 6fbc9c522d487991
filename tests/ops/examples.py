"""One small call of every kind of every op, for what holds for all ops alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backbones import ops
from tests.support import golden

Size = tuple[int, int, int]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A call of an op on a map `(batch, height, width)` of any size.

    Attributes:
        op: Name of the op, and of its module.
        kind: What tells it from other examples of the op.
        shapes: Shapes of the tensors by name, for a size of the map.
        options: Arguments that have no gradient.
        variant: What the name of the public function has behind that of the op.
        kernels: Module of the Triton kernels, if it is not called like the op.
        sized: Further arguments without a gradient, for a size of the map.
        least: The smallest side that it works for; smaller maps are enlarged.
        axes: Where the first tensor has its batch, height and width.
        lists: Arguments that are lists of tensors, by the names of these.
        wide: Whether it returns float32 for 16-bit types.
    """

    op: str
    kind: str
    shapes: Callable[[Size], dict[str, tuple[int, ...]]]
    options: dict[str, Any]
    variant: str = ""
    kernels: str = ""
    sized: Callable[[Size], dict[str, Any]] = lambda size: {}
    least: int = 1
    axes: Size = (0, 1, 2)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    wide: bool = False

    def __str__(self) -> str:
        return f"{self.op}{self.variant} {self.kind}".strip()

    @property
    def public(self) -> Callable[..., Tensor]:
        """The op as users call it."""
        return getattr(ops, self.op + self.variant)

    @property
    def keeps_type(self) -> bool:
        """Whether it returns the type of what it is given under autocast."""
        return self.wide or self.options.get("residual", False) or self.op == "na2d_av"

    def size(self, size: Size) -> Size:
        """The size of the map that stands for another one."""
        return size[0], max(size[1], self.least), max(size[2], self.least)

    def tensors(self, size: Size, dtype: torch.dtype = torch.float64) -> Tensors:
        """Make leaves."""
        shapes = self.shapes(self.size(size))
        values = {name: golden.normal(name, shape) for name, shape in shapes.items()}
        return {
            name: torch.from_numpy(value).to(dtype).requires_grad_()
            for name, value in values.items()
        }

    def arguments(self, tensors: Tensors) -> dict[str, Any]:
        """All arguments of a call."""
        shape = next(iter(tensors.values())).shape
        size = tuple(shape[axis] for axis in self.axes)
        if torch.jit.is_tracing():
            size = tuple(int(length) for length in size)
        listed = {name: [tensors[n] for n in names] for name, names in self.lists.items()}
        names = {name for names in self.lists.values() for name in names}
        single = {name: t for name, t in tensors.items() if name not in names}
        return {**single, **listed, **self.options, **self.sized(size)}

    def __call__(self, tensors: Tensors) -> Tensor:
        """Call the op."""
        return joined(self.public(**self.arguments(tensors)))

    def reference(self, tensors: Tensors) -> Tensor:
        """Call its reference."""
        reference = getattr(ops, f"{self.op}{self.variant}_reference")
        return joined(reference(**self.arguments(tensors)))

    def __hash__(self) -> int:
        return hash((self.op, self.variant, self.kind))


def joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """One map of a result; of two, one a vector for each image perhaps, a sum."""
    if isinstance(out, Tensor):
        return out
    first, second = out
    if second.ndim != first.ndim:
        second = second[:, None, None]
    return first + 2 * second.to(first.dtype)


def weight(out: Tensor) -> Tensor:
    """What an output is multiplied by before it is summed, to take gradients."""
    return torch.from_numpy(golden.normal("weight", tuple(out.shape))).to(out.dtype)


def gradients(out: Tensor, tensors: Tensors) -> list[Tensor]:
    """Gradients of all tensors."""
    return list(torch.autograd.grad((out * weight(out)).sum(), list(tensors.values())))


def _window(size: Size) -> dict[str, tuple[int, ...]]:
    return {"qkv": (*size, 12), "table": (2, 3, 5), "pad": (12,)}


def _large_window(size: Size) -> dict[str, tuple[int, ...]]:
    return {"qkv": (*size, 6), "table": (1, 9, 25)}


def _conv(kernel: int, norm: bool = False) -> Callable[[Size], dict[str, tuple[int, ...]]]:
    def shapes(size: Size) -> dict[str, tuple[int, ...]]:
        tensors = {"x": (*size, 3), "weight": (3, 1, kernel, kernel), "bias": (3,)}
        if norm:
            tensors |= {"norm_weight": (3,), "norm_bias": (3,)}
        return tensors

    return shapes


def _branches(size: Size) -> dict[str, tuple[int, ...]]:
    return {"x": (*size, 3), "first": (3, 1, 5, 5), "second": (3, 1, 3, 3)}


def _conv_addend(size: Size) -> dict[str, tuple[int, ...]]:
    return {**_conv(5)(size), "addend": (*size, 3)}


def _conv_border(size: Size) -> dict[str, tuple[int, ...]]:
    return {**_conv_addend(size), "border": (3,)}


def _mixing(
    heads: int, dim: int, small: int, large: int
) -> Callable[[Size], dict[str, tuple[int, ...]]]:
    def shapes(size: Size) -> dict[str, tuple[int, ...]]:
        slots = small**2 + large**2
        return {
            "query": (*size, heads * dim),
            "kernel": (size[0], heads, dim, slots),
            "value": (*size, 2 * heads * dim),
            "bias": (slots,),
            "table_small": (heads, 2 * small - 1, 2 * small - 1),
            "table_large": (heads, 2 * large - 1, 2 * large - 1),
        }

    return shapes


# of heads of 4 channels, on maps of up to 24 tokens a side; it has no gradient
ROTARY = ops.rotary_table(torch.tensor([0.3]), 24)


def _legacy_regions(size: Size) -> dict[str, Any]:
    batch, height, width = size
    return {"regions": _regions(batch, 6), "region_size": (-(-height // 2), -(-width // 3))}


def _nchw_regions(size: Size) -> dict[str, Any]:
    batch, *sides = size
    lengths = [max(1, side // 2) for side in sides]
    counts = [max(2, -(-side // length)) for side, length in zip(sides, lengths, strict=True)]
    return {
        "regions": _regions(batch, counts[0] * counts[1]),
        "num_regions": tuple(counts),
        "region_size": tuple(lengths),
    }


def _regions(batch: int, count: int) -> Tensor:
    """Two regions for each of an image, some of them chosen by many and some by none."""
    first = torch.arange(count) // 2
    return torch.stack([first, (first + 1) % count], dim=-1).expand(batch, -1, -1)


def _weights(slots: int) -> Callable[[Size], dict[str, tuple[int, ...]]]:
    def shapes(size: Size) -> dict[str, tuple[int, ...]]:
        batch, *sides = size
        return {"attn": (batch, 2, *sides, slots), "value": (batch, 2, *sides, 3)}

    return shapes


EXAMPLES = [
    Example("window_attention", "", _window, {"num_heads": 2, "window_size": (2, 3)}),
    Example(
        "window_attention",
        "of many keys",
        _large_window,
        {"num_heads": 1, "window_size": (5, 13), "grid": True},
    ),
    Example(
        "partial_attention",
        "",
        lambda size: {"qkv": (*size, 2 * 4 + 5), "x": (*size, 7)},
        {"qk_dim": 4},
    ),
    Example("channel_attention", "", lambda size: {"qkv": (*size, 18)}, {"num_heads": 2}),
    Example(
        "channel_attention",
        "of values",
        lambda size: {"qkv": (*size, 18)},
        {"num_heads": 2, "mix_values": True},
    ),
    Example(
        "rank_augmented_attention",
        "",
        lambda size: {"qkv": (*size, 36)},
        {"rotary": ROTARY, "num_heads": 3},
    ),
    Example(
        "rank_augmented_attention",
        "with addend and gate",
        lambda size: {"qkv": (*size, 48), "addend": (*size, 12)},
        {"rotary": ROTARY, "num_heads": 3, "gated": True},
    ),
    Example(
        "linear_attention",
        "",
        lambda size: {"qkv": (*size, 18), "temperature": (2,)},
        # about as large as the denominators of few tokens
        {"min_denominator": 4.0},
    ),
    Example(
        "routing_attention",
        "with pad",
        lambda size: {"qkv": (*size, 12), "pad": (12,)},
        {"num_heads": 2, "num_regions": (2, 3)},
        sized=_legacy_regions,
    ),
    Example(
        "routing_attention",
        "with zeros",
        lambda size: {"qkv": (*size, 12)},
        {"num_heads": 2},
        sized=_nchw_regions,
    ),
    Example("dynamic_mixing", "", _mixing(2, 3, 3, 3), {}, least=3),
    Example("dynamic_mixing", "of two sizes", _mixing(1, 2, 3, 5), {}, least=5),
    Example("na2d_av", "", _weights(9), {"kernel_size": 3}, least=3, axes=(0, 2, 3)),
    Example(
        "na2d_av",
        "with dilation",
        _weights(15),
        {"kernel_size": (3, 5), "dilation": (2, 1)},
        least=6,
        axes=(0, 2, 3),
    ),
    Example(
        "neighborhood_attention",
        "",
        lambda size: {"qkv": (*size, 18)},
        {"num_heads": 3, "kernel_size": 3, "shifts": [(1, -1), (-1, 1)]},
    ),
    Example(
        "neighborhood_attention",
        "inside",
        lambda size: {"qkv": (*size, 12)},
        {"num_heads": 2, "kernel_size": (3, 1), "dilation": (1, 2), "boundary": "clamp"},
        least=3,
    ),
    Example("depthwise_conv", "", _conv(7), {"act": "gelu"}),
    Example("depthwise_conv", "with addend", _conv_addend, {}),
    Example("depthwise_conv", "with border", _conv_border, {"border_size": (2, 1)}),
    Example("depthwise_conv", "with residual", _conv(3), {"residual": True, "pre_act": "gelu"}),
    Example("depthwise_conv", "of large kernels", _conv(13), {}, "_mean"),
    Example(
        "depthwise_conv",
        "of stride 2",
        _conv(3),
        {"stride": 2, "same": True, "act": "gelu_tanh"},
        "_mean",
    ),
    Example(
        "depthwise_conv",
        "of squares",
        _conv(3),
        {"residual": True, "pre_act": "gelu", "square": True},
        "_mean",
    ),
    Example(
        "depthwise_conv_moments",
        "",
        _branches,
        {"dilations": [1, 3]},
        kernels="depthwise_conv",
        lists={"weights": ("first", "second")},
        wide=True,
    ),
    Example(
        "depthwise_conv_norm",
        "",
        _conv(3, norm=True),
        {"residual": True},
        kernels="depthwise_conv",
    ),
]
