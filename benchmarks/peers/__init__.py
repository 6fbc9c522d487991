"""What each op is compared with."""

from . import (
    channel_attention,
    depthwise_conv,
    dynamic_mixing,
    linear_attention,
    na2d_av,
    neighborhood_attention,
    partial_attention,
    rank_augmented_attention,
    routing_attention,
    window_attention,
)
from ._peer import Compile, Outputs, Peer, Peers, outputs

PEERS: dict[str, Peers] = {
    "window_attention": window_attention.PEERS,
    "channel_attention": channel_attention.PEERS,
    "linear_attention": linear_attention.PEERS,
    "partial_attention": partial_attention.PEERS,
    "rank_augmented_attention": rank_augmented_attention.PEERS,
    "routing_attention": routing_attention.PEERS,
    "dynamic_mixing": dynamic_mixing.PEERS,
    "na2d_av": na2d_av.PEERS,
    "neighborhood_attention": neighborhood_attention.PEERS,
    "depthwise_conv": depthwise_conv.PEERS,
    "depthwise_conv_moments": depthwise_conv.PEERS,
    "depthwise_conv_norm": depthwise_conv.PEERS,
}

__all__ = ["PEERS", "Compile", "Outputs", "Peer", "Peers", "outputs"]
