"""L2ViT as its official code computes it, in plain PyTorch (arXiv 2501.16182).

Written from the algorithm, with its layout and its order of operations: tokens `(B, N, C)` row by
row between the layers, maps for convolutions, windows cut from normed and padded tokens before
their projection and put together after it, scores of all windows at once, and for the linear
attention batched products of heads. Names of tensors are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

Size = tuple[int, int]


def to_map(x: Tensor, size: Size) -> Tensor:
    """View tokens `(B, N, C)` as a map `(B, C, H, W)`."""
    return x.transpose(1, 2).unflatten(2, size)


def to_tokens(x: Tensor) -> Tensor:
    """View a map `(B, C, H, W)` as tokens `(B, N, C)`."""
    return x.flatten(2).transpose(1, 2)


def depthwise(dim: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution that keeps the size."""
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


class PositionEncoding(nn.Module):
    """Add a depthwise 3x3 convolution of the map.

    Args:
        dim: Width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = depthwise(dim, 3)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Take and return tokens `(B, N, dim)`."""
        return x + to_tokens(self.proj(to_map(x, size)))


class WindowAttention(nn.Module):
    """Softmax attention within windows; padding is not masked.

    Args:
        dim: Width.
        heads: Heads.
        window: Rows and columns of a window.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Take and return normed tokens `(B, N, dim)`."""
        (height, width), w, dim = size, self.window, x.shape[2]
        x = x.unflatten(1, size)
        if height % w or width % w:
            x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, cols = x.shape[1] // w, x.shape[2] // w
        x = x.reshape(-1, rows, w, cols, w, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, dim)
        x = self._attend(x).reshape(-1, rows, cols, w, w, dim).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, rows * w, cols * w, dim)
        return x[:, :height, :width].reshape(-1, height * width, dim)

    def _attend(self, x: Tensor) -> Tensor:
        """Attend in windows `(windows, tokens, dim)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention over all tokens with ReLU in place of a softmax.

    Args:
        dim: Width.
        heads: Heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return normed tokens `(B, N, dim)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q.relu(), k.relu()
        denominators = (q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1)).clamp(min=1e2)
        x = q @ (k.transpose(-2, -1) @ v * self.temperature) / denominators
        return self.proj(x.transpose(1, 2).flatten(2))


class LocalConcentration(nn.Module):
    """Two depthwise 7x7 convolutions of the map, GELU and BatchNorm between them.

    Args:
        dim: Width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = depthwise(dim, 7), nn.BatchNorm2d(dim), depthwise(dim, 7)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Take and return normed tokens `(B, N, dim)`."""
        x = F.gelu(self.conv1(to_map(x, size)))
        return to_tokens(self.conv2(self.bn(x)))


class WindowBlock(nn.Module):
    """Position encoding, window attention, position encoding, feed forward network.

    Args:
        dim: Width.
        heads: Heads.
        window: Rows and columns of a window.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = PositionEncoding(dim), PositionEncoding(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, heads, window), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Take and return tokens `(B, N, dim)`."""
        x = self.cpe1(x, size)
        x = x + self.attn(self.norm1(x), size)
        x = self.cpe2(x, size)
        return x + self.mlp(self.norm2(x))


class LinearBlock(nn.Module):
    """Position encoding, linear attention, local concentration, feed forward network.

    Args:
        dim: Width.
        heads: Heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.cpe1, self.attn, self.local = (
            PositionEncoding(dim),
            LinearAttention(dim, heads),
            LocalConcentration(dim),
        )
        self.norm1, self.local_norm, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Take and return tokens `(B, N, dim)`."""
        x = self.cpe1(x, size)
        x = x + self.attn(self.norm1(x))
        x = x + self.local(self.local_norm(x), size)
        return x + self.mlp(self.norm2(x))


def _conv_norm(in_dim: int, dim: int) -> nn.Sequential:
    layers = [("conv", nn.Conv2d(in_dim, dim, 3, 2, 1)), ("bn", nn.BatchNorm2d(dim))]
    return nn.Sequential(OrderedDict(layers))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, ReLU between them, and a LayerNorm.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv_norm(in_chans, dim // 2), _conv_norm(dim // 2, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Take images `(B, in_chans, H, W)`, return tokens `(B, N, dim)` and their size."""
        if size[0] % 4 or size[1] % 4:
            x = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
        x = self.conv2(self.conv1(x).relu())
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class Downsample(nn.Module):
    """A LayerNorm and a convolution of 2x2 patches.

    Args:
        in_dim: Input width.
        dim: Output width.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(in_dim), nn.Conv2d(in_dim, dim, 2, 2)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Take tokens `(B, N, in_dim)`, return `(B, N', dim)` and their rows and columns."""
        x = to_map(self.norm(x), size)
        if size[0] % 2 or size[1] % 2:
            x = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
        x = self.conv(x)
        return to_tokens(x), (x.shape[2], x.shape[3])


class Stage(nn.Module):
    """Blocks of one width.

    Args:
        ours: Our stage.
        in_dim: Input width; 0 for the first stage.
        dim: Width.
    """

    def __init__(self, ours: Any, in_dim: int, dim: int) -> None:
        super().__init__()
        self.downsample = Downsample(in_dim, dim) if in_dim else None
        self.blocks = nn.ModuleList(
            LinearBlock(dim, block.attn.num_heads)
            if hasattr(block, "local")
            else WindowBlock(dim, block.attn.num_heads, block.attn.window_size[0])
            for block in ours.blocks
        )

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Take tokens `(B, N, in_dim)`, return `(B, N', dim)` and their rows and columns."""
        if self.downsample is not None:
            x, size = self.downsample(x, size)
        for block in self.blocks:
            x = block(x, size)
        return x, size


class L2ViT(nn.Module):
    """The classifier, without stochastic depth: images of any size.

    Args:
        ours: Our model, for its widths, heads and windows.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in ours.feature_info]
        self.stem = Stem(ours.in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(stage, in_dim, dim)
            for stage, in_dim, dim in zip(ours.stages, [0, *dims], dims, strict=False)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.ModuleDict({"fc": nn.Linear(dims[-1], ours.num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `(B, in_chans, H, W)`: logits `(B, num_classes)`."""
        x, size = self.stem(x, (x.shape[2], x.shape[3]))
        for stage in self.stages:
            x, size = stage(x, size)
        return self.head["fc"](self.norm(x).mean(dim=1))


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Make the peer of our model, with fresh weights, on its device and in its type.

    Args:
        ours: Our model.
        name: Its name; what there is to know is read from the model.
        **options: With which it was created.
    """
    like = next(ours.parameters())
    with torch.device(like.device):
        return L2ViT(ours).to(like.dtype)
