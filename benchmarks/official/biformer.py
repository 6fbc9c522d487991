"""BiFormer as its official code computes it, in plain PyTorch, with the names of our parameters.

Written from the formulas: regions are cut out of a map and put together again by copies, and what a
region chose is gathered from a view that repeats all keys and values for every region. `biformer_*`
and `biformer_stl` compute their blocks with channels last, `biformer_stl_nchw` on planes. Maps that
regions do not fill are padded, as with the official `auto_pad`. Branches are never dropped.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones.biformer import BiFormer


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Make the official form of our model, with weights of its own.

    Args:
        ours: Our model, from which sizes are taken.
        name: Its name.
        **options: `device` and `dtype` are used.
    """
    assert isinstance(ours, BiFormer)
    return OfficialBiFormer(ours, options.get("device"), options.get("dtype"))


class OfficialBiFormer(nn.Module):
    """All of BiFormer but the norms of detectors.

    Args:
        ours: Model of the same sizes.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, ours: BiFormer, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = [int(info["num_chs"]) for info in ours.feature_info]
        patches = ours.stages[0].blocks[0].cpe is None
        self.stem = _patch_stem(ours.in_chans, dims[0], **dd) if patches else ConvStem(ours, **dd)
        self.stages = nn.Sequential()
        for stage, in_dim, dim in zip(ours.stages, [0, *dims], dims, strict=False):
            down: nn.Module = nn.Identity()
            if in_dim:
                down = (_merging if patches else _conv_norm)(in_dim, dim, **dd)
            self.stages.append(Stage(down, [Block(block, dim, **dd) for block in stage.blocks]))
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head = nn.ModuleDict({"fc": nn.Linear(dims[-1], ours.num_classes, **dd)})

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `(B, in_chans, H, W)`: logits `(B, num_classes)`."""
        x = self.norm(self.stages(self.stem(x)))
        return self.head["fc"](x.flatten(2).mean(-1))


def _conv_norm(in_dim: int, dim: int, **dd: Any) -> nn.Sequential:
    """A 3x3 convolution of stride 2 and a BatchNorm."""
    layers = nn.Sequential()
    layers.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
    layers.bn = nn.BatchNorm2d(dim, **dd)
    return layers


def _patch_stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    """A convolution of 4x4 patches and a BatchNorm."""
    layers = nn.Sequential()
    layers.conv = nn.Conv2d(in_chans, dim, 4, 4, **dd)
    layers.bn = nn.BatchNorm2d(dim, **dd)
    return layers


def _merging(in_dim: int, dim: int, **dd: Any) -> nn.Sequential:
    """A BatchNorm and a convolution of 2x2 patches."""
    layers = nn.Sequential()
    layers.bn = nn.BatchNorm2d(in_dim, **dd)
    layers.conv = nn.Conv2d(in_dim, dim, 2, 2, **dd)
    return layers


class ConvStem(nn.Module):
    """Two convolutions of stride 2 with BatchNorm, GELU between them."""

    def __init__(self, ours: BiFormer, **dd: Any) -> None:
        super().__init__()
        dim = int(ours.feature_info[0]["num_chs"])
        self.conv1 = _conv_norm(ours.in_chans, dim // 2, **dd)
        self.conv2 = _conv_norm(dim // 2, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, in_chans, H, W)`, return a map at a quarter of their size."""
        return self.conv2(F.gelu(self.conv1(x)))


class Stage(nn.Module):
    """Blocks behind a downsampling."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return self.blocks(self.downsample(x))


class Block(nn.Module):
    """Position convolution, attention and feed forward network, on a map `(B, C, H, W)`.

    Args:
        ours: Our block, from which sizes are taken.
        dim: Width.
        **dd: Device and type of the parameters.
    """

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.planes = isinstance(ours.mlp.fc1, nn.Conv2d)
        self.cpe = None
        if ours.cpe is not None:
            self.cpe = nn.ModuleDict({"proj": nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **dd)})
        norm = LayerNorm2d if self.planes else nn.LayerNorm
        self.norm1 = norm(dim, eps=1e-6, **dd)
        routed = PlaneRouting if self.planes else Routing
        self.attn = (routed if hasattr(ours.attn, "topk") else FullAttention)(ours.attn, dim, **dd)
        self.norm2 = norm(dim, eps=1e-6, **dd)
        hidden = ours.mlp.fc1.weight.shape[0]
        self.mlp = nn.Sequential()
        self.mlp.fc1 = _linear(dim, hidden, self.planes, **dd)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = _linear(hidden, dim, self.planes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        if self.cpe is not None:
            x = x + self.cpe["proj"](x)
        if not self.planes:
            x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x if self.planes else x.permute(0, 3, 1, 2)


def _linear(in_dim: int, dim: int, planes: bool, bias: bool = True, **dd: Any) -> nn.Module:
    if planes:
        return nn.Conv2d(in_dim, dim, 1, bias=bias, **dd)
    return nn.Linear(in_dim, dim, bias=bias, **dd)


class Routing(nn.Module):
    """Bi-level routing attention with channels last: all of it on regions `(B, R, h, w, C)`."""

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.heads, self.n_win, self.topk = ours.num_heads, ours.n_win, ours.topk
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _cut(self, x: Tensor) -> Tensor:
        """Regions `(B, R, h, w, C)` of a map `(B, H, W, C)`."""
        x = x.unflatten(2, (self.n_win, -1)).unflatten(1, (self.n_win, -1))
        return x.transpose(2, 3).flatten(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        """The map `(B, H, W, C)` of regions `(B, R, h, w, C)`."""
        return x.unflatten(1, (self.n_win, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _choose(self, q: Tensor, k: Tensor) -> Tensor:
        """The best regions `(B, R, K)` for mean queries and keys `(B, R, C)`."""
        q, k = q.detach(), k.detach()
        scores, chosen = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).topk(self.topk, dim=-1)
        # the official code computes these weights and does not use them
        scores.softmax(dim=-1)
        return chosen

    def _heads(self, x: Tensor) -> Tensor:
        """Split `(B, R, n, C)` into `(B * R, heads, n, D)`."""
        return x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, H, W, C)`."""
        height, width, dim = x.shape[1:]
        x = F.pad(x, (0, 0, 0, -width % self.n_win, 0, -height % self.n_win))
        q, kv = self.qkv(self._cut(x)).split([dim, 2 * dim], dim=-1)
        local = self.lepe(self._join(kv[..., dim:]).permute(0, 3, 1, 2).contiguous())
        size, q, pairs = q.shape, q.flatten(2, 3), kv.flatten(2, 3)
        chosen = self._choose(q.mean(2), pairs[..., :dim].mean(2))
        k, v = _gather(pairs, chosen).flatten(2, 3).split(dim, dim=-1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        weights = (q * dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(size)
        out = self._join(out) + local.permute(0, 2, 3, 1)
        return self.proj(out)[:, :height, :width]


def _gather(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Tokens of regions `(..., R, t, C)` that regions chose `(..., R, K)`: `(..., R, K, t, C)`."""
    *batch, count, size, channels = tokens.shape
    topk = chosen.shape[-1]
    view = tokens.unsqueeze(-4).expand(*batch, count, count, size, channels)
    index = chosen[..., None, None].expand(*batch, count, topk, size, channels)
    return view.gather(-3, index)


class PlaneRouting(nn.Module):
    """The later form of the same on planes, with regions of sizes that are rounded down."""

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.heads, self.n_win, self.topk = ours.num_heads, ours.n_win, ours.topk
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def _cut(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Regions `(B, heads, R, t, D)` of a map `(B, C, H, W)`, filled up with zeros."""
        (rows, cols), (height, width) = size, x.shape[2:]
        x = F.pad(x, (0, -width % cols, 0, -height % rows))
        x = x.unflatten(3, (-1, cols)).unflatten(2, (-1, rows)).unflatten(1, (self.heads, -1))
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)

    def _join(self, x: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
        """The map `(B, C, H, W)` of regions `(B, heads, R, t, D)`."""
        x = x.unflatten(3, size).unflatten(2, (-(-height // size[0]), -(-width // size[1])))
        x = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[..., :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        dim, height, width = x.shape[1:]
        size = (height // self.n_win, width // self.n_win)
        q, k, v = self.qkv(x).chunk(3, dim=1)
        means = [
            F.avg_pool2d(part.detach(), size, ceil_mode=True, count_include_pad=False).flatten(2)
            for part in (q, k)
        ]
        chosen = (means[0].transpose(1, 2) @ means[1]).topk(self.topk, dim=-1).indices
        chosen = chosen[:, None].expand(-1, self.heads, -1, -1)
        queries, keys, values = (self._cut(part, size) for part in (q, k, v))
        keys, values = (_gather(part, chosen).flatten(3, 4) for part in (keys, values))
        weights = (queries * dim**-0.5 @ keys.transpose(-2, -1)).softmax(dim=-1)
        out = self._join(weights @ values, size, height, width)
        return self.proj(out + self.lepe(v))


class FullAttention(nn.Module):
    """Attention over all tokens, and the local enhancement of the input, on planes of the values.

    Takes and returns maps `(B, H, W, C)`, on planes `(B, C, H, W)`.
    """

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.heads, self.planes = ours.num_heads, isinstance(ours.qkv, nn.Conv2d)
        self.qkv = _linear(dim, 3 * dim, self.planes, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim, **dd)
        self.proj = _linear(dim, dim, self.planes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over a map."""
        qkv = self.qkv(x)
        local = qkv[:, 2 * x.shape[1] :] if self.planes else x.permute(0, 3, 1, 2)
        tokens = qkv.flatten(2).transpose(1, 2) if self.planes else qkv.flatten(1, 2)
        q, k, v = tokens.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        local = self.lepe(local)
        if self.planes:
            return self.proj(out.transpose(1, 2).reshape(x.shape) + local)
        return self.proj(out.reshape(x.shape) + local.permute(0, 2, 3, 1))
