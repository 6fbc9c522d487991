"""Moments of depthwise convolutions against PyTorch's, and what their gradients take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import _choice, depthwise_conv_moments, embed_dilated
from tests.support import golden
from tests.support.kernels import DEVICE, error, needs_interpreter, poisoned

# sizes and dilations beside OverLoCK's kernels of 17, 13 and 7
BRANCHES = [(17, 1), (9, 2), (3, 7), (7, 2), (3, 5), (3, 1)]
SIZES = [(2, 9, 7), (1, 6, 6), (3, 2, 1), (2, 1, 1)]
CHANNELS = 4


def leaves(size: tuple[int, ...], branches=BRANCHES) -> list[Tensor]:
    """A map, and kernels."""
    shapes = {"x": (*size, CHANNELS)}
    shapes |= {f"{k} {r}": (CHANNELS, 1, k, k) for k, r in branches}
    return [torch.from_numpy(golden.normal(n, s)).requires_grad_() for n, s in shapes.items()]


def moments(x: Tensor, *weights: Tensor, branches=BRANCHES) -> tuple[Tensor, Tensor]:
    return depthwise_conv_moments(x, list(weights), [r for _, r in branches])


def one_by_one(x: Tensor, *weights: Tensor, branches=BRANCHES) -> tuple[Tensor, Tensor]:
    """PyTorch's, on planes."""
    planes, results = x.permute(0, 3, 1, 2).contiguous(), []
    for weight, (k, r) in zip(weights, branches, strict=True):
        z = F.conv2d(planes, weight, None, 1, r * (k // 2), r, CHANNELS).flatten(2)
        mean = z.mean((0, 2))
        results.append((mean, (z - mean[:, None]).square().mean((0, 2))))
    means, variances = zip(*results, strict=True)
    return torch.stack(means), torch.stack(variances)


def step(outs: tuple[Tensor, Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of all."""
    cotangents = [
        torch.from_numpy(golden.normal(f"cotangent {n}", tuple(out.shape))).to(out)
        for n, out in enumerate(outs)
    ]
    return [*outs, *torch.autograd.grad(outs, tensors, cotangents)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_convolutions_one_by_one(size):
    tensors = leaves(size)
    results, wanted = step(moments(*tensors), tensors), step(one_by_one(*tensors), tensors)
    for value, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


def test_gradients():
    branches = [(5, 2), (3, 1), (9, 2)]
    inputs = tuple(leaves((2, 2, 3), branches))
    assert torch.autograd.gradcheck(lambda *t: moments(*t, branches=branches), inputs)


def test_only_what_needs_a_gradient_gets_one():
    tensors = leaves((2, 4, 5))
    expected = step(moments(*tensors), tensors)[2:]
    for kept in (0, 2):
        given = [t.detach() for t in tensors]
        given[kept].requires_grad_()
        (gradient,) = step(moments(*given), [given[kept]])[2:]
        assert torch.equal(gradient, expected[kept])


def test_a_moment_that_nothing_depends_on():
    tensors = leaves((2, 4, 5))
    mean, variance = moments(*tensors)
    for value in (mean[1, 2], variance[1, 2], variance.new_zeros(()) * mean.sum()):
        gradients = torch.autograd.grad(value, tensors, retain_graph=True)
        assert all(g.isfinite().all() for g in gradients)
        assert not any(g.any() for g in [gradients[1], *gradients[3:]])


def test_keeps_the_map_and_the_kernels_only():
    tensors = leaves((2, 9, 7))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mean, _ = moments(*tensors)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == sorted([*(t.numel() for t in tensors), mean.numel(), mean.numel()])


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_gradients_stay_in_the_range_of_16_bit(dtype, tolerance, factor):
    """They are sums of 50,000 products of what is divided by 50,000."""
    branches, results = [(5, 1), (3, 4)], []
    rounded = [t.detach().to(dtype) for t in leaves((16, 56, 56), branches)]
    # whose products have a sum far from zero
    rounded[0] += 3
    for wide in (dtype, torch.float64):
        tensors = [t.to(wide).requires_grad_() for t in rounded]
        mean, variance = moments(*tensors, branches=branches)
        assert mean.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
        # as a loss scaler would
        results.append(step((factor * mean, factor * variance), tensors)[2:])
    for value, wanted in zip(*results, strict=True):
        assert value.dtype == dtype
        if wanted.abs().max() > 1e-4:
            assert error(value, wanted) < tolerance


@needs_interpreter
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_kernels_with_zeros_between_the_taps(dtype, tolerance, monkeypatch):
    """What runs where the table says that our kernels are faster."""
    from backbones.ops import _depthwise_dilated as dilated

    branches = [(3, 2), (3, 5)]
    tensors = leaves((1, 2, 9), branches)
    wanted = step(moments(*tensors, branches=branches), tensors)
    given = [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]
    launched = []
    original = dilated.implementation
    monkeypatch.setattr(
        dilated,
        "implementation",
        lambda *call: launched.append(original(*call).__name__) or original(*call),
    )
    with poisoned(), _choice.forced(True):
        results = step(moments(*given, branches=branches), given)
    ours = [name for name in launched if "triton" in name]
    # PyTorch takes large kernels in float32
    assert len(launched) == 8 and len(ours) == (4 if dtype == torch.float32 else 8)
    for value, expected in zip(results, wanted, strict=True):
        assert error(value, expected) < tolerance


@pytest.mark.parametrize("size", [7, 9, 11])
def test_embedded_kernels_have_the_same_taps(size):
    weight = leaves((1, 1, 1), [(3, 3)])[1]
    dense = embed_dilated(weight, 3, size)
    first = size // 2 - 3
    assert dense.shape == (CHANNELS, 1, size, size)
    assert torch.equal(dense[:, :, first : size - first : 3, first : size - first : 3], weight)
    assert int((dense != 0).sum()) == weight.numel()
    (gradient,) = torch.autograd.grad(dense.sum(), weight)
    assert torch.equal(gradient, torch.ones_like(weight))


@pytest.mark.parametrize(
    "shapes, dilations, message",
    [
        ([], [], "0 weights and 0 dilations"),
        ([(3, 1, 3, 3)], [1, 2], "1 weights and 2 dilations"),
        ([(3, 1, 3, 3)], [0], "kernels of 3 with dilation 0"),
        ([(3, 1, 9, 9)], [3], "kernels of 9 with dilation 3"),
        ([(4, 1, 3, 3)], [1], "with C = 3"),
        ([(3, 1, 4, 4)], [1], "kernels of 4"),
    ],
)
def test_what_does_not_fit_is_named(shapes, dilations, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv_moments(torch.zeros(1, 4, 5, 3), [*map(torch.zeros, shapes)], dilations)
