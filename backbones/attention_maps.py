"""Where the attentions of a model look, as maps to draw (`visualize.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.ops._neighborhood import window_starts

from .layers import (
    BiLevelRoutingAttention,
    ContextMixing,
    LepeAttention,
    RankAugmentedAttention,
    RotaryAttention,
)

# number of the first stage of OverLoCK's focus
_FOCUS = 2


class Call(NamedTuple):
    """One attention and the map it was given.

    Attributes:
        stage: Number of the stage, from 0.
        stride: Pixels of the image per token.
        layer: The attention.
        x: Its input `(1, H, W, C)`.
        others: Its further inputs.
    """

    stage: int
    stride: int
    layer: Any
    x: Tensor
    others: tuple[Any, ...] = ()


class Panel(NamedTuple):
    """What is drawn over the image for one stage.

    Attributes:
        title: Above it.
        heat: Values `(rows, cols)` of 0 or more, without a query of mean one; or colours
            `(rows, cols, 3)` from 0 to 1.
        cell: Height and width of one value, in pixels.
        query: Row and column of the value that attends, or None.
    """

    title: str
    heat: Tensor
    cell: tuple[int, int]
    query: tuple[int, int] | None = None


@torch.no_grad()
def attention_calls(model: nn.Module, image: Tensor, *layers: type[nn.Module]) -> list[Call]:
    """Run a model and record what its attentions take.

    Args:
        model: A backbone of this package.
        image: Normalised image `(1, 3, H, W)`.
        layers: Classes of the attentions.

    Returns:
        The calls of all layers of these classes, in order.
    """
    calls: list[Call] = []
    strides = [info["reduction"] for info in model.feature_info]  # type: ignore[union-attr]
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, layers):
            continue
        # OverLoCK's focus goes on where its base network ends
        part, number, *_ = name.split(".")
        stage = int(number) + (_FOCUS if part == "focus" else 0)

        def record(layer: nn.Module, inputs: tuple[Any, ...], stage: int = stage) -> None:
            calls.append(Call(stage, strides[stage], layer, inputs[0], inputs[1:]))

        handles.append(module.register_forward_pre_hook(record))
    try:
        model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _by_stage(calls: Sequence[Call]) -> list[list[Call]]:
    stages = sorted({call.stage for call in calls})
    return [[call for call in calls if call.stage == stage] for stage in stages]


@torch.no_grad()
def routing_panels(model: nn.Module, image: Tensor, point: tuple[int, int]) -> list[Panel]:
    """Find the regions that the region of one point attends to, stage by stage.

    Args:
        model: A BiFormer.
        image: Normalised image `(1, 3, H, W)`.
        point: Column and row of a pixel.

    Returns:
        A panel per stage: the share of its blocks that chose a region; in the last, whose tokens
        attend to all others, the attention of the point's token.
    """
    calls = attention_calls(model, image, BiLevelRoutingAttention, LepeAttention)
    return [
        _routes(stage, point)
        if isinstance(stage[0].layer, BiLevelRoutingAttention)
        else _attention(stage, point)
        for stage in _by_stage(calls)
    ]


def _routes(calls: list[Call], point: tuple[int, int]) -> Panel:
    stage, stride, layer, x, _ = calls[0]
    (rows, cols), (height, width) = layer.grid(*x.shape[1:3])
    cell = (height * stride, width * stride)
    query = _cell_of(point, cell, (rows, cols))
    share = torch.zeros(rows * cols)
    for call in calls:
        chosen = call.layer.route(call.x)[0, query[0] * cols + query[1]]
        share[chosen] += 1 / len(calls)
    title = f"stage {stage + 1}: {layer.topk} of {rows * cols} regions, {len(calls)} blocks"
    return Panel(title, share.unflatten(0, (rows, cols)), cell, query)


def _cell_of(
    point: tuple[int, int], cell: tuple[int, int], count: tuple[int, int]
) -> tuple[int, int]:
    """Row and column of what holds a pixel; stems of patches leave out the last few."""
    return min(point[1] // cell[0], count[0] - 1), min(point[0] // cell[1], count[1] - 1)


def _attention(calls: list[Call], point: tuple[int, int]) -> Panel:
    stage, stride, _, x, _ = calls[0]
    query = _cell_of(point, (stride, stride), (x.shape[1], x.shape[2]))
    weights = torch.zeros(x.shape[1:3])
    for call in calls:
        qkv = call.layer.qkv(call.x[0]).unflatten(-1, (3, call.layer.num_heads, -1))
        q, k = qkv[query[0], query[1], 0], qkv[:, :, 1]
        scores = torch.einsum("hd,ijhd->hij", q, k) * q.shape[-1] ** -0.5
        weights += scores.flatten(1).softmax(-1).mean(0).unflatten(0, weights.shape).float()
    title = f"stage {stage + 1}: all tokens, {len(calls)} blocks"
    return Panel(title, weights / len(calls), (stride, stride), query)


@torch.no_grad()
def concentration_panels(model: nn.Module, image: Tensor) -> list[Panel]:
    """Find how attention weighs the tokens of an image, stage by stage.

    Args:
        model: A RAVLT.
        image: Normalised image `(1, 3, H, W)`.

    Returns:
        A panel per stage: the weights of the tokens as multiples of the average weight, averaged
        over heads and blocks, and with softmax attention over all queries too.
    """
    calls = attention_calls(model, image, RankAugmentedAttention, RotaryAttention)
    panels = []
    for stage in _by_stage(calls):
        weights = torch.stack([c.layer.token_weights(c.x)[0] for c in stage])
        mean = weights.float().mean((0, 1))
        kind = "linear" if isinstance(stage[0].layer, RankAugmentedAttention) else "softmax"
        title = f"stage {stage[0].stage + 1}, {kind}: half the weight on {_half(weights):.0%}"
        panels.append(Panel(title, mean / mean.mean(), (stage[0].stride, stage[0].stride)))
    return panels


def _half(weights: Tensor) -> float:
    """Share of the tokens that hold half the weight, averaged over blocks and heads."""
    heaviest = weights.flatten(2).sort(-1, descending=True).values.cumsum(-1)
    return float((heaviest < 0.5).float().mean(-1).mean()) + 1 / heaviest.shape[-1]


@torch.no_grad()
def context_panels(model: nn.Module, image: Tensor, point: tuple[int, int]) -> list[Panel]:
    """Find the context that guides OverLoCK's focus, and the kernels it mixes at one point.

    Args:
        model: An OverLoCK.
        image: Normalised image `(1, 3, H, W)`.
        point: Column and row of a pixel.

    Returns:
        The overview's context as colours, its three principal components; and for each stage of
        the focus and either kernel, the weights in the point's window, averaged over blocks and
        heads.

    Raises:
        ValueError: A map smaller than the kernels, which is resized before it is mixed.
    """
    context: list[Tensor] = []
    overview = getattr(model, "context_proj", None)
    if overview is None:
        return []
    handle = overview.register_forward_hook(lambda _, inputs, output: context.append(output))
    try:
        calls = attention_calls(model, image, ContextMixing)
    finally:
        handle.remove()
    stages = [_kernels(stage, point) for stage in _by_stage(calls)]
    return [_colours(context[0][0]), *(panel for panels in stages for panel in panels)]


def _colours(context: Tensor) -> Panel:
    """A map `(H, W, C)` at stride 32 as colours."""
    pixels = context.flatten(0, 1).float()
    pixels = pixels - pixels.mean(0)
    # few pixels have fewer components
    axes = torch.linalg.svd(pixels, full_matrices=False)[2][:3]
    parts = pixels @ axes.T
    low, high = parts.amin(0), parts.amax(0)
    colours = torch.full((len(pixels), 3), 0.5)
    colours[:, : parts.shape[1]] = (parts - low) / (high - low).clamp(min=1e-12)
    return Panel("overview's context", colours.unflatten(0, context.shape[:2]), (32, 32))


def _kernels(calls: list[Call], point: tuple[int, int]) -> list[Panel]:
    """The small and the large kernel of a point in one stage."""
    stage, stride, layer, x, _ = calls[0]
    size = (x.shape[1], x.shape[2])
    query = _cell_of(point, (stride, stride), size)
    weights = [call.layer.attention(call.x, call.others[0]) for call in calls]
    panels = []
    for side, blocks in zip(
        (layer.small_kernel_size, layer.kernel_size), zip(*weights, strict=True), strict=True
    ):
        mean = torch.stack([block[0].float().mean(0) for block in blocks]).mean(0)
        title = f"stage {stage + 1}: {side}x{side}, {len(calls)} blocks"
        panels.append(Panel(title, _spread(mean, size, query), (stride, stride), query))
    return panels


def _spread(weights: Tensor, size: tuple[int, int], query: tuple[int, int]) -> Tensor:
    """Put the kernel of one pixel, of those of a map `(H, W, K * K)`, where its window lies."""
    if weights.shape[:2] != size:
        raise ValueError(
            f"a map of {size[0]}x{size[1]} is smaller than its kernels: draw an image of 193 "
            "pixels or more (--size)"
        )
    side = math.isqrt(weights.shape[2])
    row, col = (int(window_starts(n, side)[i]) for n, i in zip(size, query, strict=True))
    spread = torch.zeros(size)
    spread[row : row + side, col : col + side] = weights[query].unflatten(0, (side, side))
    return spread
