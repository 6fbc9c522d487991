"""OverLoCK as its authors' code computes it (arXiv 2502.20087), restated in plain PyTorch.

Maps are planes `(B, C, H, W)` throughout, with a copy to and from every LayerNorm. A large kernel
is up to seven convolutions with a BatchNorm each; `fuse()` merges them, which is all that the
authors merge. The weights of the dynamic kernels are written for a whole map, by a score for each
of 49 regions; positions are looked up anew in every call; windows are copied, as their code does
where NATTEN is missing, whose function of that time no current version has.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._overlock_mixing import ContextMixing
from ._overlock_parts import AffineScale, LayerNorm2d, Linear2d, batch_norm, conv_norm


class LargeKernel(nn.Module):
    """A large depthwise kernel beside smaller ones, each with its norm; or all of them merged."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(ours.conv), None
        self.branches = nn.ModuleList()
        if not ours.reparam:
            self.bn = batch_norm(ours.bn)
            self.branches = nn.ModuleList(_Branch(branch) for branch in ours.branches)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        y = self.conv(x)
        y = y if self.bn is None else self.bn(y)
        for branch in self.branches:
            y = y + branch(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Make one convolution with bias of all, with the running statistics."""
        if self.bn is None:
            return
        weight, bias = _affine(self.conv, self.bn)
        for branch in self.branches:
            taps, shift = _affine(branch.conv, branch.bn)
            size, step = taps.shape[-1], branch.conv.dilation[0]
            first = weight.shape[-1] // 2 - step * (size // 2)
            at = slice(first, first + step * (size - 1) + 1, step)
            weight[:, :, at, at] += taps
            bias += shift
        self.conv.weight, self.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.bn, self.branches = None, nn.ModuleList()


class _Branch(nn.Module):
    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(ours.conv), batch_norm(ours.bn)
        step, size = ours.dilation, ours.conv.kernel_size[0]
        self.conv.dilation = (step, step)
        self.conv.padding = (step * (size // 2),) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def _affine(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class LargeKernelNorm(nn.Module):
    """A `LargeKernel` and the BatchNorm behind it."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.rep, self.bn = LargeKernel(ours.rep), batch_norm(ours.bn)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return self.bn(self.rep(x))


class Residual(nn.Module):
    """A depthwise convolution that is added to its input."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.proj = copy.deepcopy(ours.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return x + self.proj(x)


class SqueezeExcite(nn.Module):
    """Scale channels by what two layers make of their means."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = copy.deepcopy(ours.fc1), copy.deepcopy(ours.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        return x * self.fc2(F.gelu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


class ResponseNorm(nn.Module):
    """Global response normalisation (arXiv 2301.00808)."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = ours.eps, *copy.deepcopy([ours.weight, ours.bias])

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        ratio = norms / (norms.mean(1, keepdim=True) + self.eps)
        return (self.weight[:, None, None] * ratio + 1) * x + self.bias[:, None, None]


class Mlp(nn.Module):
    """Two 1x1 convolutions, between them GELU, a residual convolution and a response norm."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear2d(ours.fc1), Linear2d(ours.fc2)
        self.dwconv, self.grn = copy.deepcopy(ours.dwconv), ResponseNorm(ours.grn)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        x = F.gelu(self.fc1(x))
        return self.fc2(self.grn(x + self.dwconv(x)))


class RepConvBlock(nn.Module):
    """The block of base network and overview."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.cpe, self.norm = Residual(ours.cpe), LayerNorm2d(ours.norm)
        self.conv, self.se = LargeKernelNorm(ours.conv), SqueezeExcite(ours.se)
        self.mlp, self.drop_path = Mlp(ours.mlp), copy.deepcopy(ours.drop_path)
        self.scale = AffineScale(ours.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map `(B, C, H, W)`."""
        x = self.cpe(x)
        y = self.mlp(self.se(self.conv(self.norm(x))))
        return self.scale(x) + self.drop_path(y)


class Fusion(nn.Module):
    """What mixes features and context before they are mixed over the map."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.dwconv, self.bn = copy.deepcopy(ours.dwconv), batch_norm(ours.bn)
        self.fc, self.grn = Linear2d(ours.fc), ResponseNorm(ours.grn)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, C + C_context, H, W)`, return `(B, C, H, W)`."""
        return self.grn(self.fc(F.gelu(self.bn(self.dwconv(x)))))


class GatedMixing(nn.Module):
    """Dynamic and static kernels, squeeze-excite and a gate."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.gate, self.out = conv_norm(ours.gate), conv_norm(ours.out)
        self.lepe, self.mixing = LargeKernelNorm(ours.lepe), ContextMixing(ours.mixing)
        self.se, self.norm = SqueezeExcite(ours.se), batch_norm(ours.norm)
        self.proj = Linear2d(ours.proj)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        """Mix `y` `(B, C, H, W)`, guided by features and context `f`, in whose shape it returns."""
        gate, lepe = F.silu(self.gate(y)), self.lepe(y)
        z = self.se(self.out(self.mixing(f, y)) + lepe)
        return self.proj(self.norm(gate * z))


class FocusBlock(nn.Module):
    """The block of the focus."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.dims, self.first = ours.dims, ours.context_scale is None
        self.context_scale = AffineScale(ours.context_scale)
        self.prior_scale = AffineScale(ours.prior_scale)
        self.cpe1, self.norm1 = Residual(ours.cpe1), LayerNorm2d(ours.norm1)
        self.fusion, self.mixer = Fusion(ours.fusion), GatedMixing(ours.mixer)
        self.cpe2, self.norm2 = Residual(ours.cpe2), LayerNorm2d(ours.norm2)
        self.scale1, self.scale2 = AffineScale(ours.scale1), AffineScale(ours.scale2)
        self.mlp = Mlp(ours.mlp)
        self.drop_path1, self.drop_path2 = copy.deepcopy([ours.drop_path1, ours.drop_path2])

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> Tensor:
        """Take maps of features, context and prior, return features and context as one map."""
        if not self.first:
            context = self.context_scale(context) + self.prior_scale(prior)
        x = self.cpe1(torch.cat([x, context], 1))
        f = self.norm1(x)
        x = self.scale1(x) + self.drop_path1(self.mixer(f, self.fusion(f)))
        x = self.cpe2(x)
        return self.scale2(x) + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks of the base network or the overview, after a halving if there is one."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.downsample = conv_norm(ours.downsample)
        self.blocks = nn.Sequential(*(RepConvBlock(block) for block in ours.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return a map."""
        return self.blocks(self.downsample(x))


class FocusStage(nn.Module):
    """Blocks of the focus, after a halving of features and context if it is the second stage."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.downsample = conv_norm(ours.downsample)
        self.context_downsample = conv_norm(ours.context_downsample)
        self.blocks = nn.ModuleList(FocusBlock(block) for block in ours.blocks)
        self.dims = self.blocks[0].dims

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> Tensor:
        """Take maps of features, context and prior, return features and context as one map."""
        x, context = self.downsample(x), self.context_downsample(context)
        for block in self.blocks[:-1]:
            x, context = block(x, context, prior).split(self.dims, 1)
        return self.blocks[-1](x, context, prior)


class Head(nn.Module):
    """A 1x1 convolution with norm and SiLU, pooling, and the classifier."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.proj, self.fc = conv_norm(ours.proj), Linear2d(ours.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map, return logits."""
        return self.fc(F.adaptive_avg_pool2d(F.silu(self.proj(x)), 1)).flatten(1)


class OverLoCK(nn.Module):
    """The official model, without the classifier of the overview."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(conv_norm(layer) for layer in ours.stem))
        self.stages = nn.Sequential(*(Stage(stage) for stage in ours.stages))
        self.overview, self.context_proj = Stage(ours.overview), Linear2d(ours.context_proj)
        self.focus = nn.ModuleList(FocusStage(stage) for stage in ours.focus)
        self.head = Head(ours.head)

    def forward(self, x: Tensor) -> Tensor:
        """Take images `(B, 3, H, W)` of any size, return logits."""
        for index, layer in enumerate(self.stem):
            x = layer(x)
            x = F.gelu(x) if index < 3 else x
        x = self.stages(x)
        prior = self.context_proj(self.overview(x))
        context = F.interpolate(prior, x.shape[2:], mode="bilinear")
        x = self.focus[0](x, context, context)
        x, context = x.split(self.focus[0].dims, 1)
        return self.head(self.focus[1](x, context, prior))

    def fuse(self) -> OverLoCK:
        """Merge large kernels, as the authors do for inference, in place; return the model."""
        for layer in self.modules():
            if isinstance(layer, LargeKernel):
                layer.merge()
        return self


def build(ours: nn.Module, name: str, **options: Any) -> nn.Module:
    """Restate the official model, in the form of ours: with kernels merged if ours has them so.

    Args:
        ours: Our model, not fused.
        name: Its name.
        **options: Those it was created with.
    """
    return OverLoCK(ours)
