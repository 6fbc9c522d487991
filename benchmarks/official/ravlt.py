"""RAVLT as its official code computes it, in plain PyTorch, with the names of our parameters.

Written from the formulas: maps are planes, linear layers 1x1 convolutions; sines and cosines are
tables of all channels of all tokens, made in every call; keys are multiplied by the number of
tokens times their weight, and sums divided by it; the attention of the last stages is written out.
Branches are never dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.ravlt import RAVLT

Tables = tuple[Tensor, Tensor]


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Make the official form of our model, with weights of its own.

    Args:
        ours: Our model, from which sizes are taken.
        name: Its name.
        **options: `device` and `dtype` are used.
    """
    assert isinstance(ours, RAVLT)
    return OfficialRavlt(ours, options.get("device"), options.get("dtype"))


class OfficialRavlt(nn.Module):
    """All of RAVLT but the norms of detectors.

    Args:
        ours: Model of the same sizes.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(self, ours: RAVLT, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = [int(info["num_chs"]) for info in ours.feature_info]
        half, hidden = dims[0] // 2, ours.head_hidden_size
        self.stem = nn.Sequential(
            ConvNorm(ours.in_chans, half, 3, 2, nn.GELU(), **dd),
            ConvNorm(half, half, 3, 1, nn.GELU(), **dd),
            ConvNorm(half, half, 3, 1, nn.GELU(), **dd),
            ConvNorm(half, dims[0], 3, 2, **dd),
        )
        self.stages = nn.Sequential()
        for stage, in_dim, dim in zip(ours.stages, [0, *dims], dims, strict=False):
            down = ConvNorm(in_dim, dim, 3, 2, **dd) if in_dim else nn.Identity()
            self.stages.append(Stage(down, stage.blocks, dim, **dd))
        self.head = nn.ModuleDict(
            {
                "proj": ConvNorm(dims[-1], hidden, 1, 1, nn.SiLU(), **dd),
                "fc": Pointwise(hidden, ours.num_classes, **dd),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `(B, in_chans, H, W)`: logits `(B, num_classes)`."""
        x = self.head["proj"](self.stages(self.stem(x)))
        return self.head["fc"](F.adaptive_avg_pool2d(x, 1)).flatten(1)


class ConvNorm(nn.Module):
    """A convolution, a BatchNorm and perhaps an activation."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        stride: int,
        act: nn.Module | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take and return planes."""
        return self.act(self.bn(self.conv(x)))


class Pointwise(nn.Linear):
    """A 1x1 convolution of planes, with the parameters of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Take planes `(B, in_features, H, W)`, return `(B, out_features, H, W)`."""
        return F.conv2d(x, self.weight[..., None, None], self.bias)


class PlaneNorm(nn.LayerNorm):
    """A LayerNorm over the channels of planes."""

    def forward(self, x: Tensor) -> Tensor:
        """Take and return planes `(B, C, H, W)`."""
        x = super().forward(x.permute(0, 2, 3, 1).contiguous())
        return x.permute(0, 3, 1, 2).contiguous()


class PlaneScale(nn.Module):
    """One factor per channel."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return planes `(B, C, H, W)`."""
        return self.gamma[:, None, None] * x


class Stage(nn.Module):
    """Blocks behind a downsampling, with tables of their positions.

    Args:
        downsample: What comes first.
        blocks: Our blocks, from which sizes are taken.
        dim: Width.
        **dd: Device and type of the parameters.
    """

    def __init__(self, downsample: nn.Module, blocks: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(Block(block, dim, **dd) for block in blocks)
        count = dim // blocks[0].attn.num_heads // 4
        theta = 1.0 / (10000 ** torch.linspace(0, 1, count, device="cpu"))
        angle = theta.repeat_interleave(2).to(dd["device"])
        self.register_buffer("angle", angle, persistent=False)

    def _tables(self, height: int, width: int) -> Tables:
        """Sines and cosines `(H, W, D)` of all channels of all tokens."""
        device = self.angle.device
        rows = torch.arange(height, device=device)[:, None] * self.angle
        columns = torch.arange(width, device=device)[:, None] * self.angle

        def table(rows: Tensor, columns: Tensor) -> Tensor:
            parts = (rows[:, None].repeat(1, width, 1), columns[None].repeat(height, 1, 1))
            return torch.cat(parts, dim=-1)

        return table(rows.sin(), columns.sin()), table(rows.cos(), columns.cos())

    def forward(self, x: Tensor) -> Tensor:
        """Take and return planes."""
        x = self.downsample(x)
        tables = self._tables(x.shape[2], x.shape[3])
        for block in self.blocks:
            x = block(x, tables)
        return x


class Block(nn.Module):
    """Position convolution, attention and feed forward network, the latter two scaled.

    Args:
        ours: Our block, from which sizes are taken.
        dim: Width.
        **dd: Device and type of the parameters.
    """

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        linear = type(ours.attn).__name__ == "RankAugmentedAttention"
        self.cpe = nn.ModuleDict({"proj": nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, **dd)})
        self.norm1 = PlaneNorm(dim, eps=1e-6, **dd)
        self.attn = (LinearAttention if linear else SoftmaxAttention)(ours.attn, dim, **dd)
        self.ls1 = PlaneScale(dim, **dd)
        self.norm2 = PlaneNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, ours.mlp.fc1.out_features, **dd)
        self.ls2 = PlaneScale(dim, **dd)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Take and return planes `(B, C, H, W)`."""
        x = x + self.cpe["proj"](x)
        x = x + self.ls1(self.attn(self.norm1(x), tables))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Mlp(nn.Module):
    """Two 1x1 convolutions; between them GELU and a residual depthwise convolution."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, **dd)
        self.fc2 = Pointwise(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return planes `(B, C, H, W)`."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


def _turn(x: Tensor, tables: Tables) -> Tensor:
    """Turn pairs of channels of tokens `(B, heads, N, D)`."""
    sin, cos = (table.flatten(0, 1) for table in tables)
    crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + crossed * sin


class GatedAttention(nn.Module):
    """What both attentions share: projections, local enhancement and gate."""

    def __init__(self, ours: Any, dim: int, **dd: Any) -> None:
        super().__init__()
        self.heads = ours.num_heads
        self.qkvg = Pointwise(dim, 4 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim, **dd)
        self.proj = Pointwise(dim, dim, **dd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """Attend over tokens `(B, heads, N, D)`."""
        raise NotImplementedError

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Take and return planes `(B, C, H, W)`."""
        q, k, v, gate = self.qkvg(x).chunk(4, dim=1)
        local = self.lepe(v)
        tokens = [
            part.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3) for part in (q, k, v)
        ]
        core = self.attend(tokens[0], tokens[1], tokens[2], tables)
        core = core.transpose(2, 3).reshape(x.shape)
        return self.proj((core + local) * gate)


class LinearAttention(GatedAttention):
    """RALA, in the official order of operations."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """Attend over tokens `(B, heads, N, D)`."""
        count, scale = q.shape[-2], q.shape[-1] ** -0.5
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = scale * q.mean(dim=-2, keepdim=True) @ k.transpose(-2, -1)
        k = k * (scores.softmax(dim=-1) * count).transpose(-2, -1)
        inverse = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        q, k = _turn(q, tables), _turn(k, tables)
        kv = (k.transpose(-2, -1) * count**-0.5) @ (v * count**-0.5)
        return q @ kv * inverse


class SoftmaxAttention(GatedAttention):
    """Softmax over all tokens, its matrix written out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """Attend over tokens `(B, heads, N, D)`."""
        q, k = _turn(q, tables), _turn(k, tables)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return weights @ v
