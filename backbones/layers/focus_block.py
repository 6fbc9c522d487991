"""The blocks of OverLoCK's focus network (arXiv 2502.20087, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, is_exportable
from torch import Tensor, nn

from backbones.ops import depthwise_conv, depthwise_conv_reference

from .affine_scale import AffineScale
from .conv_grn_mlp import ConvGrnMlp
from .fold import batch_norm_affine, fold_layer_norm, fold_output
from .gated_mixing import GatedMixing
from .global_response_norm import GlobalResponseNorm
from .position_conv import ConvPositionEncoding

_MLP_RATIO = 3


class ContextFusion(nn.Module):
    """A depthwise 3x3 convolution, BatchNorm, GELU, a linear layer and a global response norm.

    Args:
        in_dim: Input channels.
        dim: Output channels.
        device: Where parameters are made.
        dtype: Their type.
    """

    __constants__ = ("exportable",)

    # torch.jit.script stumbles over annotations of a module class
    if TYPE_CHECKING:
        bn: nn.Module

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.exportable = is_exportable()
        self.act = ""
        self.dwconv = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim, **dd)
        self.bn = nn.BatchNorm2d(in_dim, **dd)
        self.fc = nn.Linear(in_dim, dim, **dd)
        self.grn = GlobalResponseNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map `(B, H, W, in_dim)`, return `(B, H, W, dim)`."""
        weight, bias = self.dwconv.weight, self.dwconv.bias
        if self.exportable:
            x = depthwise_conv_reference(x, weight, bias, act=self.act)
        else:
            x = depthwise_conv(x, weight, bias, act=self.act)
        if not self.act:
            x = F.gelu(self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.grn(self.fc(x))

    @torch.no_grad()
    def fuse(self) -> ContextFusion:
        """Fold the norm into the convolution, which computes GELU too; return the layer."""
        if isinstance(self.bn, nn.BatchNorm2d):
            fold_output(self.dwconv, *batch_norm_affine(self.bn))
            self.bn, self.act = nn.Identity(), "gelu"
        return self


class FocusBlock(nn.Module):
    """Gated dynamic mixing guided by a context, and a feed forward network, both residual.

    The map is `C` channels of features and then those of the context, which every block but the
    first of a stage mixes with the overview's prior. Depthwise convolutions compute the norms
    behind them, from the parameters of `norm1` and `norm2`: these modules are not called, nor are
    their hooks.

    Args:
        dim: Channels `C` of the features.
        context_dim: Channels of the context.
        kernel_size: Side of the large dynamic kernel, and of the static one beside it.
        small_kernel_size: Side of the small dynamic kernel.
        num_heads: Heads of the dynamic mixing.
        first: Leave the context as it comes.
        drop_path: Probability that training drops a branch.
        reparam: Make the merged form of the static kernel.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ValueError: A width that does not fit the heads.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        first: bool = False,
        drop_path: float = 0.0,
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dims, both = [dim, context_dim], dim + context_dim
        self.context_scale = None if first else AffineScale(context_dim, **dd)
        self.prior_scale = None if first else AffineScale(context_dim, **dd)
        self.cpe1 = ConvPositionEncoding(both, **dd)
        self.norm1 = LayerNorm(both, eps=1e-6, **dd)
        self.fusion = ContextFusion(both, dim, **dd)
        self.mixer = GatedMixing(
            dim, context_dim, both, kernel_size, small_kernel_size, num_heads, False, reparam, **dd
        )
        self.scale1 = AffineScale(both, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = ConvPositionEncoding(both, **dd)
        self.norm2 = LayerNorm(both, eps=1e-6, **dd)
        self.mlp = ConvGrnMlp(both, _MLP_RATIO * dim, **dd)
        self.scale2 = AffineScale(both, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """Refine features and context.

        Args:
            x: Map `(B, H, W, dim + context_dim)`.
            prior: Map `(B, H, W, context_dim)` of the overview.

        Returns:
            A map like `x`.
        """
        x = self._mix_prior(x, prior)
        x, f = self.cpe1(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        features, context = f.split(self.dims, -1)
        z = self.mixer(features, context, self.fusion(f))
        x = self.scale1(x, self.drop_path1(z))
        x, f = self.cpe2(x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        return self.scale2(x, self.drop_path2(self.mlp(f)))

    def _mix_prior(self, x: Tensor, prior: Tensor) -> Tensor:
        if self.context_scale is None or self.prior_scale is None:
            return x
        features, context = x.split(self.dims, -1)
        shift = self.prior_scale(prior, self.context_scale.bias)
        mixed = torch.addcmul(shift, context, self.context_scale.weight)
        return torch.cat([features, mixed], -1)

    @torch.no_grad()
    def fuse(self) -> FocusBlock:
        """Fold the second norm's weights and the shifts into linear layers; return the block."""
        self.norm2 = fold_layer_norm(self.norm2, self.mlp.fc1)
        self.scale1.fold_bias(self.mixer.proj)
        self.scale2.fold_bias(self.mlp.fc2)
        return self
