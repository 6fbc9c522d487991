"""Large depthwise kernels that train as a sum of dilated ones (UniRepLKNet, OverLoCK)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from timm.layers import is_exportable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.ops import (
    depthwise_conv,
    depthwise_conv_moments,
    depthwise_conv_moments_reference,
    depthwise_conv_reference,
    embed_dilated,
)

# size and dilation of the kernels beside the large one, by its size
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class _SumOfProcesses(torch.autograd.Function):
    """Sum a tensor over a process group; its gradient is summed likewise."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        """Return the sum, the same in all processes."""
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum what all processes want of it."""
        return _SumOfProcesses.apply(grads[0].contiguous(), ctx.group), None


def _synchronize(mean: Tensor, variance: Tensor, count: int, group: Any) -> tuple[Any, Any, Any]:
    """Moments `(n, C)` and number of pixels, of all processes of a group."""
    counts = mean.new_full((1, mean.shape[1]), count)
    sums = _SumOfProcesses.apply(torch.cat([mean * count, counts]), group)
    total = sums[-1].detach()
    overall = sums[:-1] / total
    squares = _SumOfProcesses.apply((variance + (mean - overall).square()) * count, group)
    return overall, squares / total, total


def _group(norm: nn.Module) -> Any:
    """The processes that a norm shares its statistics with, or None."""
    shared = dist.is_available() and dist.is_initialized()
    if not shared or not isinstance(norm, nn.SyncBatchNorm):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


@torch.no_grad()
def _track(
    mean: Tensor, variance: Tensor, count: Any, buffers: Sequence[Tensor], momentum: float | None
) -> None:
    """Update running mean and variance and the number of batches as BatchNorm does."""
    buffers[2].add_(1)
    unbiased = variance * (count / (count - 1))
    for running, value in ((buffers[0], mean), (buffers[1], unbiased)):
        step = value - running
        running.add_(step / buffers[2] if momentum is None else step * momentum)


# torch.fx records a call, and does not look at sizes inside
@torch.fx.wrap
def batch_statistics(
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    tracked: Sequence[tuple[Sequence[Tensor], float | None]],
    group: Any,
    plain: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of the convolutions of a batch; they go into what norms keep.

    Args:
        x: Map `(B, H, W, C)`.
        weights: Kernels `(C, 1, k, k)` of each convolution.
        dilations: Distances of their taps.
        tracked: Buffers of the norm behind each, running mean and variance and number of batches,
            and its momentum.
        group: Processes that share the batch; None if there is one.
        plain: Compute in plain PyTorch, for export.

    Returns:
        Means and biased variances `(n, C)`.

    Raises:
        ValueError: If there is one value per channel.
    """
    count = x.shape[0] * x.shape[1] * x.shape[2]
    if count == 1:
        raise ValueError(f"x {tuple(x.shape)}: BatchNorm trains on more than one pixel only")
    moments = depthwise_conv_moments_reference if plain else depthwise_conv_moments
    mean, variance = moments(x, weights, dilations)
    total: Any = count
    if group is not None:
        mean, variance, total = _synchronize(mean, variance, count, group)
    for n, (buffers, momentum) in enumerate(tracked):
        _track(mean[n], variance[n], total, buffers, momentum)
    return mean, variance


class DepthwiseNorm(nn.Module):
    """A depthwise convolution and its BatchNorm, as parameters: others compute with them.

    Args:
        dim: Channels.
        kernel_size: Side of the kernels, odd.
        dilation: Distance of the taps.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, dim: int, kernel_size: int, dilation: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        pad = dilation * (kernel_size // 2)
        self.dilation = dilation
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, 1, pad, dilation, dim, False, device=device, dtype=dtype
        )
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        # kept here: frozen norms of other libraries, which may replace this one, do not tell theirs
        self.eps = self.bn.eps

    def running(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the norm, `(C,)`."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None
        return mean, variance

    def affine(self, stats: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Kernels `(C, 1, K, K)` and bias `(C,)` of both, with mean and variance `(C,)`.

        In float32 at least, so that nothing is lost in 16 bit before kernels are summed.
        """
        return _affine(self.conv.weight, self.bn.weight, self.bn.bias, stats, self.eps)


# one call in a graph of torch.fx, which would keep what it computes from buffers as constants
@torch.fx.wrap
def _affine(
    kernels: Tensor, weight: Tensor, bias: Tensor, stats: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    mean, variance = stats
    wide = torch.promote_types(mean.dtype, torch.float32)
    scale = weight.to(wide) * (variance.to(wide) + eps).rsqrt()
    return kernels.to(wide) * scale[:, None, None, None], bias.to(wide) - mean.to(wide) * scale


class DilatedReparamConv(DepthwiseNorm):
    """Depthwise convolution with a large kernel, beside smaller and dilated ones, and their norms.

    Every kernel has a BatchNorm and the results are added. That is one convolution, of the sum of
    the scaled kernels, in training too: only the statistics of a batch need the convolutions one by
    one, and no result of theirs is kept for the backward pass. The children are never called, nor
    are their hooks.

    Args:
        dim: Channels.
        kernel_size: Side of the large kernel, one of `BRANCHES`.
        reparam: Make the merged form, a convolution with bias, as `reparameterize` does.
        device: Where parameters are made.
        dtype: Their type.

    Source:
        UniRepLKNet, arXiv 2311.15599, section 3.1; OverLoCK, arXiv 2502.20087.
    """

    __constants__ = ("exportable", "reparam")

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        reparam: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if kernel_size not in BRANCHES:
            raise ValueError(f"kernel_size={kernel_size} is none of {tuple(BRANCHES)}")
        super().__init__(dim, kernel_size, device=device, dtype=dtype)
        self.exportable, self.reparam = is_exportable(), False
        self.branches: Any = nn.ModuleList(
            DepthwiseNorm(dim, size, dilation, device, dtype)
            for size, dilation in BRANCHES[kernel_size]
        )
        if reparam:
            self.reparameterize()

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Convolve a map.

        Args:
            x: Map `(B, H, W, dim)`.
            addend: Map to add to the result, or None.

        Returns:
            A map like `x`.

        Raises:
            ValueError: In training, if there is one value per channel.
        """
        if self.reparam:
            weight, bias = self.conv.weight, self.conv.bias
        else:
            weight, bias = self._merge(x)
        if self.exportable:
            return depthwise_conv_reference(x, weight, bias, addend)
        return depthwise_conv(x, weight, bias, addend)

    def _merge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels and bias of the sum, with the statistics that the norms now go by."""
        stats, trains = [self.running()], self.bn.training
        for branch in self.branches:
            stats.append(branch.running())
            trains = trains or branch.bn.training
        if torch.jit.is_scripting():
            assert not trains, "TorchScript knows this layer in eval mode: train it in Python"
        elif trains:
            stats = self._measure(x, stats)
        return self._sum(stats)

    def _measure(
        self, x: Tensor, stats: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Replace the statistics of norms in training by those of the batch."""
        units: list[Any] = [self, *self.branches]
        # frozen norms are of another class, and have a mode too
        found = [n for n, u in enumerate(units) if isinstance(u.bn, _BatchNorm) and u.bn.training]
        if not found:
            return stats
        norms = [units[n].bn for n in found]
        mean, variance = batch_statistics(
            x,
            [units[n].conv.weight for n in found],
            [units[n].dilation for n in found],
            [((m.running_mean, m.running_var, m.num_batches_tracked), m.momentum) for m in norms],
            # norms are converted all at once, so the first of them speaks for all
            _group(norms[0]),
            self.exportable,
        )
        measured = {n: (mean[i], variance[i]) for i, n in enumerate(found)}
        return [measured.get(n, pair) for n, pair in enumerate(stats)]

    def _sum(self, stats: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        weight, bias = self.affine(stats[0])
        for n, branch in enumerate(self.branches):
            taps, shift = branch.affine(stats[n + 1])
            weight = weight + embed_dilated(taps, branch.dilation, self.conv.kernel_size[0])
            bias = bias + shift
        kind = self.conv.weight.dtype
        return weight.to(kind), bias.to(kind)

    @torch.no_grad()
    def reparameterize(self) -> DilatedReparamConv:
        """Merge everything into one convolution with bias, with the running statistics.

        Returns:
            The layer, without `bn` and `branches`.
        """
        if self.reparam:
            return self
        weight, bias = self._sum([unit.running() for unit in (self, *self.branches)])
        learns = self.conv.weight.requires_grad
        self.conv.weight = nn.Parameter(weight, learns)
        self.conv.bias = nn.Parameter(bias, learns)
        del self.bn, self.branches
        self.reparam = True
        return self
