"""What each op is compared with."""

from . import channel_attention, partial_attention, window_attention
from ._peer import Compile, Outputs, Peer, Peers

PEERS: dict[str, Peers] = {
    "window_attention": window_attention.PEERS,
    "channel_attention": channel_attention.PEERS,
    "partial_attention": partial_attention.PEERS,
}

__all__ = ["PEERS", "Compile", "Outputs", "Peer", "Peers"]
