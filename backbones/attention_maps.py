"""Where the attentions of a model look, as maps to draw (`visualize.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import (
    BiLevelRoutingAttention,
    LepeAttention,
    RankAugmentedAttention,
    RotaryAttention,
)


class Call(NamedTuple):
    """One attention and the map it was given.

    Attributes:
        stage: Number of the stage, from 0.
        stride: Pixels of the image per token.
        layer: The attention.
        x: Its input `(1, H, W, C)`.
    """

    stage: int
    stride: int
    layer: Any
    x: Tensor


class Panel(NamedTuple):
    """What is drawn over the image for one stage.

    Attributes:
        title: Above it.
        heat: Values `(rows, cols)` of 0 or more; without a query of mean one.
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
        stage = int(name.split(".")[1])

        def record(layer: nn.Module, inputs: tuple[Any, ...], stage: int = stage) -> None:
            calls.append(Call(stage, strides[stage], layer, inputs[0]))

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
    stage, stride, layer, x = calls[0]
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
    stage, stride, _, x = calls[0]
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
