"""The calls of the ops that the models make: one `Case` per op, stage and image size.

The ahead-of-time report, the benchmarks and the tests on a GPU share this list. The batch is 128 at
224 pixels; 96 at 256, 40 at 384, 24 at 512 and 10 at 768, for about as many pixels; and 2 at
800 x 1216.
"""

from . import (
    channel_attention,
    depthwise_conv,
    depthwise_conv_moments,
    depthwise_conv_norm,
    dynamic_mixing,
    linear_attention,
    na2d_av,
    neighborhood_attention,
    partial_attention,
    rank_augmented_attention,
    routing_attention,
    window_attention,
)
from ._case import Case, Floor, Tensors

_OPS = (
    window_attention,
    channel_attention,
    linear_attention,
    partial_attention,
    rank_augmented_attention,
    routing_attention,
    dynamic_mixing,
    na2d_av,
    neighborhood_attention,
    depthwise_conv,
    depthwise_conv_moments,
    depthwise_conv_norm,
)


def all_cases() -> list[Case]:
    """List every call, in bfloat16 but for a stream that autocast leaves in float32.

    Large early stages of common sizes come first.
    """
    return [case for op in _OPS for case in op.cases()]


def tiny_cases() -> list[Case]:
    """List calls of every kind that a CPU makes in an instant, in float32."""
    return [case for op in _OPS for case in op.tiny_cases()]


__all__ = ["Case", "Floor", "Tensors", "all_cases", "tiny_cases"]
