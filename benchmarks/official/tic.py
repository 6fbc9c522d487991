"""TiC with MSA-Conv as its official code computes it, in plain PyTorch (arXiv 2310.04134).

No network was ever released: around the attention is the same reconstruction as in our model. The
attention is restated from what the official extension does: on contiguous planes in float32, heads
as images, columns of the windows of all keys, times the queries in place, summed to scores; then
the same with the values and the weights. Names of tensors are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

Pair = tuple[int, int]
_EPS = 1e-6


def _columns(x: Tensor, size: Pair, dilation: Pair) -> Tensor:
    """The windows of all pixels of planes `(N, D, H, W)`, zeros outside: `(N, D, slots, H * W)`."""
    pads = [d * (k // 2) for k, d in zip(size, dilation, strict=True)]
    return F.unfold(x, size, dilation, pads).unflatten(1, (x.shape[1], -1))


def msa_conv(q: Tensor, k: Tensor, v: Tensor, size: Pair, dilation: Pair) -> Tensor:
    """Attend to windows: planes `(N, D, H, W)`, contiguous, for each head of each image."""
    scores = _columns(k, size, dilation).mul_(q.flatten(2).unsqueeze(2)).sum(1)
    weights = (scores * q.shape[1] ** -0.5).softmax(dim=1)
    return _columns(v, size, dilation).mul_(weights.unsqueeze(1)).sum(2).view_as(q)


class Attention(nn.Module):
    """MSA-Conv with heads, between two linear layers.

    Args:
        ours: Our attention.
        dim: Width.
    """

    def __init__(self, ours: Any, dim: int) -> None:
        super().__init__()
        self.heads, self.size, self.dilation = ours.num_heads, ours.kernel_size, ours.dilation
        self.shifts = ours.shifts
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim) if isinstance(ours.proj, nn.Linear) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        planes = self.qkv(x).permute(0, 3, 1, 2).contiguous()
        # the official layer casts to float32; float64 is for tests
        planes = planes.to(torch.promote_types(x.dtype, torch.float32))
        q, k, v = planes.unflatten(1, (3, self.heads, -1)).unbind(1)
        if self.shifts:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            for i, (rows, cols) in enumerate(self.shifts[: self.heads]):
                turn = slice(i, None, len(self.shifts))
                parts = (t[:, turn].roll((-rows, -cols), (3, 4)) for t in (q, k, v))
                out[:, turn] = self._attend(*parts).roll((rows, cols), (3, 4))
        else:
            out = self._attend(q, k, v)
        return self.proj(out.flatten(1, 2).permute(0, 2, 3, 1).to(x.dtype))

    def _attend(self, *parts: Tensor) -> Tensor:
        """Attend with heads `(B, heads, D, H, W)` as images."""
        out = msa_conv(*(t.flatten(0, 1) for t in parts), self.size, self.dilation)
        return out.view_as(parts[0])


class Block(nn.Module):
    """Attention and a feed forward network, both normed before and residual.

    Args:
        ours: Our block.
        dim: Width.
    """

    def __init__(self, ours: Any, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, _EPS), Attention(ours.attn, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, _EPS), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, dim)`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Downsample(nn.Module):
    """Pooling of 3x3 windows with stride 2, a LayerNorm and a linear layer.

    Args:
        average: Take means, else maxima.
        in_dim: Input width.
        dim: Output width.
    """

    def __init__(self, average: bool, in_dim: int, dim: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1, False, False) if average else nn.MaxPool2d(3, 2, 1)
        self.norm, self.proj = nn.LayerNorm(in_dim, _EPS), nn.Linear(in_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, H, W, in_dim)`, return one of half the size."""
        x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(self.norm(x))


def _stage(ours: Any, in_dim: int, dim: int) -> nn.Sequential:
    """A stage like ours; `in_dim` is 0 for the first."""
    average = in_dim > 0 and ours.downsample.pool.average
    downsample = Downsample(average, in_dim, dim) if in_dim else nn.Identity()
    blocks = nn.Sequential(*(Block(block, dim) for block in ours.blocks))
    return nn.Sequential(OrderedDict(downsample=downsample, blocks=blocks))


class TiC(nn.Module):
    """The classifier, without stochastic depth: images of any size.

    Args:
        ours: Our model, for its widths, heads and windows.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in ours.feature_info]
        conv, norm = nn.Conv2d(ours.in_chans, dims[0], 7, 4, 3), nn.LayerNorm(dims[0], _EPS)
        self.stem = nn.ModuleDict({"conv": conv, "norm": norm})
        self.stages = nn.Sequential(
            *(_stage(*sizes) for sizes in zip(ours.stages, [0, *dims], dims, strict=False))
        )
        self.norm = nn.LayerNorm(dims[-1], _EPS)
        self.head = nn.ModuleDict({"fc": nn.Linear(dims[-1], ours.num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `(B, in_chans, H, W)`: logits `(B, num_classes)`."""
        x = self.stem["norm"](self.stem["conv"](x).permute(0, 2, 3, 1))
        return self.head["fc"](self.norm(self.stages(x)).mean(dim=(1, 2)))


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Make the peer of our model, with fresh weights, on its device and in its type.

    Args:
        ours: Our model.
        name: Its name; what there is to know is read from the model.
        **options: With which it was created.
    """
    like = next(ours.parameters())
    with torch.device(like.device):
        return TiC(ours).to(like.dtype)
