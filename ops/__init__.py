"""Fused attention and convolution on channels-last maps, each with a plain PyTorch reference.

Every op is one function, registered with `torch.library`: it works in eager mode, under autocast,
`torch.compile(fullgraph=True)`, `torch.export` and FLOP counters. `BACKBONES_OPS=reference`, or
`use_reference()` for a block, calls the plain PyTorch functions instead.
"""

from ._activations import gelu_tanh
from ._common import reference_in_use, runs_at_once, use_reference
from ._depthwise import embed_dilated
from ._rotary import apply_rotary, rotary_table
from .adaptive_average import adaptive_average, adaptive_average_reference
from .channel_attention import channel_attention, channel_attention_reference
from .depthwise_conv import (
    depthwise_conv,
    depthwise_conv_mean,
    depthwise_conv_mean_reference,
    depthwise_conv_reference,
)
from .depthwise_conv_moments import depthwise_conv_moments, depthwise_conv_moments_reference
from .depthwise_conv_norm import depthwise_conv_norm, depthwise_conv_norm_reference
from .dynamic_mixing import dynamic_mixing, dynamic_mixing_reference
from .flops import count_macs, fvcore_handles
from .linear_attention import linear_attention, linear_attention_reference
from .na2d_av import na2d_av, na2d_av_reference
from .neighborhood_attention import (
    neighborhood_attention,
    neighborhood_attention_reference,
)
from .partial_attention import partial_attention, partial_attention_reference
from .rank_augmented_attention import (
    rank_augmented_attention,
    rank_augmented_attention_reference,
)
from .route_regions import route_regions, route_regions_reference
from .routing_attention import routing_attention, routing_attention_reference
from .window_attention import window_attention, window_attention_reference

__all__ = [
    "adaptive_average",
    "adaptive_average_reference",
    "apply_rotary",
    "channel_attention",
    "channel_attention_reference",
    "count_macs",
    "depthwise_conv",
    "depthwise_conv_mean",
    "depthwise_conv_mean_reference",
    "depthwise_conv_moments",
    "depthwise_conv_moments_reference",
    "depthwise_conv_norm",
    "depthwise_conv_norm_reference",
    "depthwise_conv_reference",
    "dynamic_mixing",
    "dynamic_mixing_reference",
    "embed_dilated",
    "fvcore_handles",
    "gelu_tanh",
    "linear_attention",
    "linear_attention_reference",
    "na2d_av",
    "na2d_av_reference",
    "neighborhood_attention",
    "neighborhood_attention_reference",
    "partial_attention",
    "partial_attention_reference",
    "rank_augmented_attention",
    "rank_augmented_attention_reference",
    "reference_in_use",
    "rotary_table",
    "route_regions",
    "route_regions_reference",
    "routing_attention",
    "routing_attention_reference",
    "runs_at_once",
    "use_reference",
    "window_attention",
    "window_attention_reference",
]
