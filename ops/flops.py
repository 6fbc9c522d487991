"""What the ops cost: formulas for `torch.utils.flop_counter` and handles for fvcore.

PyTorch counts two operations per multiply-add, fvcore and the papers' "FLOPs" count one (MACs).
Only matrix products and convolutions are counted, as both tools do, and what the algorithm needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import channel_attention as _channel_attention  # noqa: F401  registers the op
from . import depthwise_conv as _depthwise_conv  # noqa: F401
from . import depthwise_conv_moments as _depthwise_conv_moments  # noqa: F401
from . import depthwise_conv_norm as _depthwise_conv_norm  # noqa: F401
from . import dynamic_mixing as _dynamic_mixing  # noqa: F401
from . import linear_attention as _linear_attention  # noqa: F401
from . import na2d_av as _na2d_av  # noqa: F401
from . import neighborhood_attention as _neighborhood_attention  # noqa: F401
from . import partial_attention as _partial_attention  # noqa: F401
from . import rank_augmented_attention as _rank_augmented_attention  # noqa: F401
from . import route_regions as _route_regions  # noqa: F401
from . import routing_attention as _routing_attention  # noqa: F401
from . import window_attention as _window_attention  # noqa: F401
from ._windows import cells

Shape = Sequence[int]


def _partial_attention_macs(qkv: Shape, qk_dim: int) -> int:
    batch, tokens, value_dim = qkv[0], qkv[1] * qkv[2], qkv[3] - 2 * qk_dim
    return batch * tokens**2 * (qk_dim + value_dim)


@register_flop_formula(torch.ops.backbones.partial_attention)
def _partial_attention_flops(
    qkv: Shape, x: Shape, qk_dim: int, scale: float, *, out_shape: Any = None
) -> int:
    return 2 * _partial_attention_macs(qkv, qk_dim)


@register_flop_formula(torch.ops.backbones.partial_attention_backward)
def _partial_attention_backward_flops(
    grad: Shape, qkv: Shape, out: Any, lse: Any, qk_dim: int, *args: Any, out_shape: Any = None
) -> int:
    # scores again, then dv and dA over the values, dq and dk over the queries
    batch, tokens, value_dim = qkv[0], qkv[1] * qkv[2], qkv[3] - 2 * qk_dim
    return 2 * batch * tokens**2 * (3 * qk_dim + 2 * value_dim)


def _window_attention_product(qkv: Shape, window: tuple[int, int]) -> int:
    """Multiply-adds of one product of the windows, `q k^T` for one, over all heads."""
    rows, cols = cells(qkv[1], qkv[2], window)
    return qkv[0] * rows * cols * prod(window) ** 2 * qkv[3] // 3


@register_flop_formula(torch.ops.backbones.window_attention)
def _window_attention_flops(
    qkv: Shape, table: Any, pad: Any, num_heads: int, *args: Any, out_shape: Any = None
) -> int:
    return 2 * 2 * _window_attention_product(qkv, args[:2])


@register_flop_formula(torch.ops.backbones.window_attention_backward)
def _window_attention_backward_flops(
    grad: Shape,
    qkv: Shape,
    table: Any,
    pad: Any,
    out: Any,
    lse: Any,
    num_heads: int,
    *args: Any,
    out_shape: Any = None,
) -> int:
    # scores again, then dv, dA, dq and dk
    return 2 * 5 * _window_attention_product(qkv, args[:2])


def _channel_attention_product(qkv: Shape, num_heads: int) -> int:
    """Multiply-adds of one product over the tokens, that of the scores for one, over all heads."""
    return prod(qkv) // 3 * (qkv[3] // (3 * num_heads))


@register_flop_formula(torch.ops.backbones.channel_attention)
def _channel_attention_flops(qkv: Shape, num_heads: int, *args: Any, out_shape: Any = None) -> int:
    return 2 * 2 * _channel_attention_product(qkv, num_heads)


@register_flop_formula(torch.ops.backbones.channel_attention_backward)
def _channel_attention_backward_flops(
    grad: Shape, qkv: Shape, weights: Any, num_heads: int, *args: Any, out_shape: Any = None
) -> int:
    # the gradient of the weights, then those of a, b and m
    return 2 * 4 * _channel_attention_product(qkv, num_heads)


def _rank_augmented_macs(qkv: Shape, heads: int, gated: bool, products: int, vectors: int) -> int:
    """Multiply-adds of products of the tokens with matrices and with vectors of the heads."""
    channels = qkv[3] // (3 + gated)
    return prod(qkv[:3]) * channels * (products * (channels // heads) + vectors)


@register_flop_formula(torch.ops.backbones.rank_augmented_attention)
def _rank_augmented_flops(
    qkv: Shape,
    rotary: Any,
    addend: Any,
    num_heads: int,
    gated: bool,
    *args: Any,
    out_shape: Any = None,
) -> int:
    # S and what it does to the queries; scores and denominators
    return 2 * _rank_augmented_macs(qkv, num_heads, gated, 2, 2)


@register_flop_formula(torch.ops.backbones.rank_augmented_attention_backward)
def _rank_augmented_backward_flops(grad: Any, qkv: Shape, *args: Any, out_shape: Any = None) -> int:
    # u, dS, dv, t, and what the gate is multiplied by; scores and denominators again, dc and dmu
    num_heads, gated = args[-2:]
    return 2 * _rank_augmented_macs(qkv, num_heads, gated, 4 + gated, 4)


def _linear_attention_macs(qkv: Shape, heads: int, products: int, vectors: int) -> int:
    """Multiply-adds of products of the tokens with matrices and with vectors of the heads."""
    return prod(qkv) // 3 * (products * (qkv[3] // (3 * heads)) + vectors)


@register_flop_formula(torch.ops.backbones.linear_attention)
def _linear_attention_flops(
    qkv: Shape, temperature: Shape, *args: Any, out_shape: Any = None
) -> int:
    # S and what it does to the queries; denominators
    return 2 * _linear_attention_macs(qkv, temperature[0], 2, 1)


@register_flop_formula(torch.ops.backbones.linear_attention_backward)
def _linear_attention_backward_flops(
    grad: Shape, qkv: Shape, temperature: Shape, *args: Any, out_shape: Any = None
) -> int:
    # u, dS, dv, dfk; denominators again, and dz
    return 2 * _linear_attention_macs(qkv, temperature[0], 4, 2)


def _dynamic_mixing_product(query: Shape, kernel: Shape) -> int:
    """Multiply-adds of one product over all slots, the logits for one, over all heads."""
    return prod(query) * kernel[3]


@register_flop_formula(torch.ops.backbones.dynamic_mixing)
def _dynamic_mixing_flops(query: Shape, kernel: Shape, *args: Any, out_shape: Any = None) -> int:
    return 2 * 2 * _dynamic_mixing_product(query, kernel)


@register_flop_formula(torch.ops.backbones.dynamic_mixing_backward)
def _dynamic_mixing_backward_flops(
    grad: Shape, query: Shape, kernel: Shape, *args: Any, out_shape: Any = None
) -> int:
    # logits again, then those of the values, weights, queries and kernels
    return 2 * 5 * _dynamic_mixing_product(query, kernel)


@register_flop_formula(torch.ops.backbones.na2d_av)
def _na2d_av_flops(attn: Shape, value: Shape, *args: Any, out_shape: Any = None) -> int:
    return 2 * prod(attn) * value[-1]


@register_flop_formula(torch.ops.backbones.na2d_av_backward)
def _na2d_av_backward_flops(
    grad: Any, attn: Shape, value: Shape, *args: Any, out_shape: Any = None
) -> int:
    # those of weights and of values
    return 2 * 2 * prod(attn) * value[-1]


def _neighborhood_attention_product(qkv: Shape, rows: int, cols: int) -> int:
    """Multiply-adds of one product over all slots, also those outside the map, over all heads."""
    return prod(qkv) // 3 * rows * cols


@register_flop_formula(torch.ops.backbones.neighborhood_attention)
def _neighborhood_attention_flops(
    qkv: Shape, num_heads: int, scale: Any, rows: int, cols: int, *args: Any, out_shape: Any = None
) -> int:
    return 2 * 2 * _neighborhood_attention_product(qkv, rows, cols)


@register_flop_formula(torch.ops.backbones.neighborhood_attention_backward)
def _neighborhood_attention_backward_flops(
    grad: Shape, qkv: Shape, out: Any, lse: Any, *args: Any, out_shape: Any = None
) -> int:
    # scores again, then dv, dA, dq and dk; behind the number of heads and the scale
    return 2 * 5 * _neighborhood_attention_product(qkv, *args[2:4])


def _depthwise_conv_macs(x: Shape, weight: Shape, stride: int, border: Shape = (0, 0)) -> int:
    sizes = zip(x[1:3], border, strict=True)
    positions = prod(-(-(length + beyond) // stride) for length, beyond in sizes)
    return x[0] * positions * prod(weight)


@register_flop_formula(torch.ops.backbones.depthwise_conv)
def _depthwise_conv_flops(
    x: Shape, weight: Shape, bias: Any, addend: Any, stride: int, *args: Any, out_shape: Any = None
) -> int:
    # same, residual, pre_act, act, mean, border, and its rows and columns
    return 2 * _depthwise_conv_macs(x, weight, stride, args[6:])


@register_flop_formula(torch.ops.backbones.depthwise_conv_backward)
def _depthwise_conv_backward_flops(
    grad: Shape,
    grad_mean: Any,
    y: Any,
    x: Shape,
    weight: Shape,
    bias: Any,
    stride: int,
    *args: Any,
    out_shape: Any = None,
) -> int:
    act, _, *border, need_x, need_weight = args[3:]
    # what an activation took is computed anew
    passes = need_x + need_weight + bool(act)
    return 2 * passes * _depthwise_conv_macs(x, weight, stride, border)


@register_flop_formula(torch.ops.backbones.depthwise_conv_norm)
def _depthwise_conv_norm_flops(x: Shape, weight: Shape, *args: Any, out_shape: Any = None) -> int:
    return 2 * _depthwise_conv_macs(x, weight, 1)


def _depthwise_conv_moments_macs(x: Shape, weights: Sequence[Shape]) -> int:
    return sum(_depthwise_conv_macs(x, weight, 1) for weight in weights)


@register_flop_formula(torch.ops.backbones.depthwise_conv_moments)
def _depthwise_conv_moments_flops(
    x: Shape, weights: Sequence[Shape], *args: Any, out_shape: Any = None
) -> int:
    return 2 * _depthwise_conv_moments_macs(x, weights)


@register_flop_formula(torch.ops.backbones.depthwise_conv_moments_backward)
def _depthwise_conv_moments_backward_flops(*args: Any, out_shape: Any = None) -> int:
    *_, x, weights, _, need_x, need_weight = args
    # the convolutions are computed anew
    return 2 * (1 + need_x + need_weight) * _depthwise_conv_moments_macs(x, weights)


def _route_regions_macs(qkv: Shape, regions: int) -> int:
    return qkv[0] * regions**2 * qkv[3] // 3


@register_flop_formula(torch.ops.backbones.route_regions)
def _route_regions_flops(
    qkv: Shape, pad: Any, topk: int, rows: int, cols: int, *args: Any, out_shape: Any = None
) -> int:
    return 2 * _route_regions_macs(qkv, rows * cols)


def _routing_attention_product(qkv: Shape, regions: Shape, size: Shape) -> int:
    """Multiply-adds of one product of all regions of a size, `q k^T` for one, over all heads."""
    return prod(regions) * prod(size) ** 2 * qkv[3] // 3


@register_flop_formula(torch.ops.backbones.routing_attention)
def _routing_attention_flops(
    qkv: Shape, regions: Shape, pad: Any, num_heads: int, *args: Any, out_shape: Any = None
) -> int:
    return 2 * 2 * _routing_attention_product(qkv, regions, args[2:4])


@register_flop_formula(torch.ops.backbones.routing_attention_backward)
def _routing_attention_backward_flops(
    grad: Shape,
    qkv: Shape,
    regions: Shape,
    pad: Any,
    out: Any,
    lse: Any,
    num_heads: int,
    *args: Any,
    out_shape: Any = None,
) -> int:
    # scores again, then dv, dA, dq and dk
    return 2 * 5 * _routing_attention_product(qkv, regions, args[2:4])


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for `fvcore.nn.FlopCountAnalysis(model, x).set_op_handle(**handles)`, in MACs.

    fvcore counts nothing for an op that it does not know, the registered ones of this package and
    PyTorch's own `scaled_dot_product_attention` among them.
    """
    from fvcore.nn.jit_handles import get_shape

    def partial_attention(inputs: list[Any], outputs: list[Any]) -> int:
        return _partial_attention_macs(get_shape(inputs[0]), inputs[2].toIValue())

    def window_attention(inputs: list[Any], outputs: list[Any]) -> int:
        window = (inputs[4].toIValue(), inputs[5].toIValue())
        return 2 * _window_attention_product(get_shape(inputs[0]), window)

    def channel_attention(inputs: list[Any], outputs: list[Any]) -> int:
        return 2 * _channel_attention_product(get_shape(inputs[0]), inputs[1].toIValue())

    def depthwise_conv(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = get_shape(inputs[0]), get_shape(inputs[1])
        border = inputs[11].toIValue(), inputs[12].toIValue()
        return _depthwise_conv_macs(*shapes, inputs[4].toIValue(), border)

    def depthwise_conv_moments(inputs: list[Any], outputs: list[Any]) -> int:
        weights = [get_shape(i) for i in inputs[1].node().inputs()]
        return _depthwise_conv_moments_macs(get_shape(inputs[0]), weights)

    def depthwise_conv_norm(inputs: list[Any], outputs: list[Any]) -> int:
        return _depthwise_conv_macs(get_shape(inputs[0]), get_shape(inputs[1]), 1)

    def dynamic_mixing(inputs: list[Any], outputs: list[Any]) -> int:
        return 2 * _dynamic_mixing_product(get_shape(inputs[0]), get_shape(inputs[1]))

    def linear_attention(inputs: list[Any], outputs: list[Any]) -> int:
        return _linear_attention_macs(get_shape(inputs[0]), get_shape(inputs[1])[0], 2, 1)

    def na2d_av(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(get_shape(inputs[0])) * get_shape(inputs[1])[-1]

    def neighborhood_attention(inputs: list[Any], outputs: list[Any]) -> int:
        rows, cols = (i.toIValue() for i in inputs[3:5])
        return 2 * _neighborhood_attention_product(get_shape(inputs[0]), rows, cols)

    def rank_augmented_attention(inputs: list[Any], outputs: list[Any]) -> int:
        heads, gated = inputs[3].toIValue(), inputs[4].toIValue()
        return _rank_augmented_macs(get_shape(inputs[0]), heads, gated, 2, 2)

    def route_regions(inputs: list[Any], outputs: list[Any]) -> int:
        rows, cols = (i.toIValue() for i in inputs[3:5])
        return _route_regions_macs(get_shape(inputs[0]), rows * cols)

    def routing_attention(inputs: list[Any], outputs: list[Any]) -> int:
        qkv, regions = get_shape(inputs[0]), get_shape(inputs[1])
        size = [i.toIValue() for i in inputs[6:8]]
        return 2 * _routing_attention_product(qkv, regions, size)

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        query, key, value = (get_shape(i) for i in inputs[:3])
        return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    return {
        "backbones::channel_attention": channel_attention,
        "backbones::depthwise_conv": depthwise_conv,
        "backbones::depthwise_conv_moments": depthwise_conv_moments,
        "backbones::depthwise_conv_norm": depthwise_conv_norm,
        "backbones::dynamic_mixing": dynamic_mixing,
        "backbones::linear_attention": linear_attention,
        "backbones::na2d_av": na2d_av,
        "backbones::neighborhood_attention": neighborhood_attention,
        "backbones::partial_attention": partial_attention,
        "backbones::rank_augmented_attention": rank_augmented_attention,
        "backbones::route_regions": route_regions,
        "backbones::routing_attention": routing_attention,
        "backbones::window_attention": window_attention,
        "aten::scaled_dot_product_attention": attention,
    }


def count_macs(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> int:
    """Multiply-adds of one forward pass of one image.

    Args:
        model: Any model; on the meta device nothing is computed.
        input_size: `(C, H, W)` of the image.

    Returns:
        The count; papers call it FLOPs.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops() // 2
