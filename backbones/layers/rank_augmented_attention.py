"""The attentions of RAVLT: linear with augmented ranks, and softmax, both rotary and gated.

Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025,
arXiv 2411.07635, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor, nn

from backbones.ops import (
    apply_rotary,
    depthwise_conv,
    depthwise_conv_reference,
    rank_augmented_attention,
    rank_augmented_attention_reference,
)

from .channel_slice import with_slice
from .fold import fold_layer_norm
from .lepe_attention import lepe
from .rotary import RotaryPosition


class GatedRotaryAttention(nn.Module):
    """Attention over all tokens of a map, with rotary positions, local enhancement and a gate.

    What the values attend to and a depthwise 5x5 convolution of the values are added, multiplied by
    a gate that is linear in the input, and projected. Subclasses define `attend`.

    Args:
        dim: Width `C` of the map.
        num_heads: Heads, of `D = C / num_heads` channels, a multiple of 4.
        channels_first: Take and return maps `(B, C, H, W)` instead of `(B, H, W, C)`.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that the heads do not divide into multiples of 4.
    """

    __constants__ = ("channels_first", "exportable")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        channels_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.channels_first = channels_first
        self.exportable = is_exportable()
        self.rotary = RotaryPosition(dim // num_heads, device)
        self.qkvg = nn.Linear(dim, 4 * dim, **dd)
        self.lepe = lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Attend over a map.

        Args:
            x: Map `(B, H, W, dim)`, or `(B, dim, H, W)` with `channels_first`.
            rotary: What `RotaryPosition` returns for the map, to share it between layers.

        Returns:
            A map like `x`.
        """
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        if rotary is None:
            rotary = self.rotary(x)
        x = self.proj(self.attend(self.qkvg(x), rotary))
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def attend(self, qkvg: Tensor, rotary: Tensor) -> Tensor:
        """Take queries, keys, values and gate `(B, H, W, 4 * dim)`, return `(B, H, W, dim)`."""
        raise NotImplementedError(f"{type(self).__name__} must define attend")

    def enhance(self, v: Tensor, addend: Tensor | None) -> Tensor:
        """Convolve the values `(B, H, W, dim)`, and add a map to the result."""
        if self.exportable:
            return depthwise_conv_reference(v, self.lepe.weight, self.lepe.bias, addend)
        return depthwise_conv(v, self.lepe.weight, self.lepe.bias, addend)

    def fold_norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """Take over weight and bias of the norm before."""
        return fold_layer_norm(norm, self.qkvg)


class RankAugmentedAttention(GatedRotaryAttention):
    """Linear attention with augmented ranks (RALA): cost and memory grow with the tokens only.

    Keys are weighted by a softmax over all tokens before they are summed with the values, and the
    output is gated, both against the low rank of linear attention; see
    `backbones.ops.rank_augmented_attention`. For maps of any size, also of one row.

    Example:
        >>> layer = RankAugmentedAttention(64, num_heads=1, channels_first=True)
        >>> layer(torch.randn(2, 64, 25, 38)).shape
        torch.Size([2, 64, 25, 38])
    """

    def attend(self, qkvg: Tensor, rotary: Tensor) -> Tensor:
        """Take queries, keys, values and gate `(B, H, W, 4 * dim)`, return `(B, H, W, dim)`."""
        if self.exportable:
            local = self.enhance(qkvg[..., 2 * self.dim : 3 * self.dim], None)
            return rank_augmented_attention_reference(qkvg, rotary, self.num_heads, local, True)
        qkvg, v = with_slice(qkvg, 3, 2 * self.dim, self.dim)
        local = self.enhance(v, None)
        return rank_augmented_attention(qkvg, rotary, self.num_heads, local, True)

    @torch.jit.ignore
    def token_weights(self, x: Tensor) -> Tensor:
        """The weights of the keys of a map, for drawing.

        Args:
            x: Map `(B, H, W, dim)`.

        Returns:
            Weights `(B, num_heads, H, W)` of sum one.
        """
        tokens = self.qkvg(x).flatten(1, 2).unflatten(-1, (4, self.num_heads, -1))
        q, k = tokens[:, :, 0].transpose(1, 2), tokens[:, :, 1].transpose(1, 2)
        scores = (1 + F.elu(k)) @ (1 + F.elu(q)).mean(2, keepdim=True).mT
        return (scores.squeeze(-1) * q.shape[-1] ** -0.5).softmax(-1).unflatten(-1, x.shape[1:3])


class RotaryAttention(GatedRotaryAttention):
    """Softmax attention over all tokens; parameters as of `RankAugmentedAttention`."""

    def attend(self, qkvg: Tensor, rotary: Tensor) -> Tensor:
        """Take queries, keys, values and gate `(B, H, W, 4 * dim)`, return `(B, H, W, dim)`."""
        batch, height, width, _ = qkvg.shape
        # one split: the gradients of several slices would each be padded, and added up
        qk, v, gate = qkvg.split([2 * self.dim, self.dim, self.dim], dim=-1)
        q, k = self._rotate(qk, rotary)
        out = F.scaled_dot_product_attention(q, k, self._heads(v))
        core = out.transpose(1, 2).reshape(batch, height, width, self.dim)
        return self.enhance(v, core) * gate

    def _heads(self, x: Tensor) -> Tensor:
        """Heads `(B, num_heads, H * W, D)` of a map `(B, H, W, dim)`."""
        return x.flatten(1, 2).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)

    def _rotate(self, qk: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `(B, num_heads, H * W, D)`, rotated, of a map `(B, H, W, 2 * dim)`."""
        # both at once, as if they were more heads
        heads = qk.unflatten(-1, [2 * self.num_heads, self.dim // self.num_heads])
        q, k = apply_rotary(heads, rotary).flatten(-2).chunk(2, dim=-1)
        return self._heads(q), self._heads(k)

    @torch.jit.ignore
    def token_weights(self, x: Tensor) -> Tensor:
        """The weights of the keys of a map, averaged over all queries, for drawing.

        Args:
            x: Map `(B, H, W, dim)`.

        Returns:
            Weights `(B, num_heads, H, W)` of sum one.
        """
        q, k = self._rotate(self.qkvg(x)[..., : 2 * self.dim], self.rotary(x))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1).mean(2).unflatten(-1, x.shape[1:3])
