"""Depthwise convolutions against PyTorch's, step by step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import conv2d_same as timm_same
from torch import Tensor

from backbones.ops import (
    _depthwise_pytorch,
    depthwise_conv,
    depthwise_conv_mean,
    depthwise_conv_norm,
)
from backbones.ops._depthwise import Fused
from tests.support import golden

KERNELS = range(3, 18, 2)
# odd, square, smaller than every kernel, one pixel
SIZES = [(2, 9, 7), (1, 6, 6), (3, 2, 1), (1, 1, 1)]
ACTS = {
    "": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def leaf(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(golden.normal(name, shape)).requires_grad_()


def leaves(size: tuple[int, ...], kernel: int, channels: int = 4) -> list[Tensor]:
    """A map, kernels, bias."""
    shape = (channels, 1, kernel, kernel)
    return [leaf("x", *size, channels), leaf("weight", *shape), leaf("bias", channels)]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """PyTorch's, on planes."""
    planes, pad = x.permute(0, 3, 1, 2).contiguous(), weight.shape[-1] // 2
    return F.conv2d(planes, weight, bias, stride, pad, 1, x.shape[3]).permute(0, 2, 3, 1)


def same_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """timm's of stride 2, padded as TensorFlow does."""
    planes = x.permute(0, 3, 1, 2)
    return timm_same(planes, weight, bias, (2, 2), groups=x.shape[3]).permute(0, 2, 3, 1)


def close(value: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    weight = torch.from_numpy(golden.normal("cotangent", tuple(value.shape)))
    pairs = [torch.autograd.grad((out * weight).sum(), tensors) for out in (value, expected)]
    for gradient, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_plain(kernel, size):
    tensors = leaves(size, kernel)
    close(depthwise_conv(*tensors), conv2d(*tensors), tensors)
    close(depthwise_conv(*tensors[:2]), conv2d(*tensors[:2], None), tensors[:2])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activation_behind(act, size):
    tensors = leaves(size, 7)
    close(depthwise_conv(*tensors, act=act), ACTS[act](conv2d(*tensors)), tensors)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activation_before_and_residual(act, size):
    tensors = leaves(size, 3)
    t = ACTS[act](tensors[0])
    out = depthwise_conv(*tensors, residual=True, pre_act=act)
    close(out, t + conv2d(t, *tensors[1:]), tensors)


@pytest.mark.parametrize("dtype, folded", [(torch.float32, True), (torch.bfloat16, False)])
def test_a_residual_is_folded_into_the_taps_only_where_they_keep_their_digits(dtype, folded):
    x, weight, bias = (t.detach().to(dtype) for t in leaves((2, 9, 7), 5))
    # small taps beside a one
    weight = weight / 1000
    taps, left = _depthwise_pytorch._fold(weight, Fused(residual=True), x)
    assert left is not folded
    assert torch.equal(taps, weight) is not folded
    exact = depthwise_conv(x.double(), weight.double(), bias.double(), residual=True)
    out = depthwise_conv(x, weight, bias, residual=True)
    tolerance = 1e-6 if folded else 8e-3
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", [5, 7, 13])
def test_addend(kernel, size):
    tensors = [*leaves(size, kernel), leaf("addend", *size, 4)]
    close(depthwise_conv(*tensors), conv2d(*tensors[:3]) + tensors[3], tensors)


@pytest.mark.parametrize("size", [*SIZES, (2, 8, 7), (1, 5, 4), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("act", ["", "relu", "gelu_tanh"])
def test_stride_2_and_mean(size, same, act):
    tensors = leaves(size, 3)
    expected = ACTS[act](same_conv2d(*tensors) if same else conv2d(*tensors, stride=2))
    out, mean = depthwise_conv_mean(*tensors, 2, same, act)
    assert out.is_contiguous()
    means = expected.mean((1, 2))
    torch.testing.assert_close(mean, means, rtol=0, atol=1e-12)
    close(out + mean[:, None, None], expected + means[:, None, None], tensors)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("square", [False, True])
def test_means_of_values_and_of_squares(size, square):
    tensors = leaves(size, 3)
    t = F.gelu(tensors[0])
    expected = F.silu(t + conv2d(t, *tensors[1:]))
    options = {"act": "silu", "residual": True, "pre_act": "gelu", "square": square}
    out, mean = depthwise_conv_mean(*tensors, **options)
    means = (expected.square() if square else expected).mean((1, 2))
    torch.testing.assert_close(mean, means, rtol=0, atol=1e-12)
    close(out + 3 * mean[:, None, None], expected + 3 * means[:, None, None], tensors)


def test_means_of_squares_are_wide_in_16_bit():
    tensors = [300 * t.detach().half() for t in leaves((2, 9, 7), 3)[:1]]
    weight = torch.zeros(4, 1, 3, 3).half()
    y, mean = depthwise_conv_mean(*tensors, weight, residual=True, square=True)
    assert mean.dtype == torch.float32 and mean.max() > 65504
    torch.testing.assert_close(mean, y.float().square().mean((1, 2)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_norm(size, residual):
    norm = [leaf("norm_weight", 4), leaf("norm_bias", 4)]
    tensors = leaves(size, 3)
    for affine in (norm, [None, None]):
        y = conv2d(*tensors) + residual * tensors[0]
        out, normed = depthwise_conv_norm(*tensors, *affine, 1e-6, residual)
        present = [*tensors, *(t for t in affine if t is not None)]
        close(out + 3 * normed, y + 3 * F.layer_norm(y, (4,), *affine, 1e-6), present)


# what shipped models call, kernels and what surrounds them
COMBINATIONS = [
    (3, {"residual": True}),
    (3, {"pre_act": "gelu", "residual": True}),
    (5, {"addend": True}),
    (7, {"act": "gelu"}),
    (7, {"addend": True}),
    (9, {}),
    *[(kernel, {"mean": True}) for kernel in (7, 13, 15, 17)],
    (3, {"mean": True, "square": True, "residual": True, "pre_act": "gelu"}),
    *[
        (3, {"mean": True, "act": act, "stride": stride, "same": same})
        for act, (stride, same) in itertools.product(
            ("relu", "silu", "gelu_tanh"), ((1, False), (2, False), (2, True))
        )
    ],
    (3, {"norm": True, "residual": True}),
]


@pytest.mark.parametrize("kernel, options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 2), (2, 2, 3)], ids=str)
def test_gradients(size, kernel, options):
    options, extra = dict(options), []
    if options.pop("norm", False):
        function, extra = depthwise_conv_norm, [leaf("norm_weight", 2), leaf("norm_bias", 2)]
    elif options.pop("mean", False):
        function = depthwise_conv_mean
    else:
        function = depthwise_conv
        extra = [leaf("addend", *size, 2)] if options.pop("addend", False) else []
    inputs = (*leaves(size, kernel, 2), *extra)
    assert torch.autograd.gradcheck(lambda *t: function(*t, **options), inputs)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["small", "narrow"])
def test_the_official_convolutions_of_l2vit(name, mode):
    """Its local mixing is 7x7, GELU, BatchNorm, 7x7."""
    case, file = f"{name}_{mode}/", np.load(golden.GOLDEN / "op_l2vit_lcm.npz")
    data = {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if case in k}
    spec = golden.load("op_l2vit_lcm")["cases"]
    shape = next(c["shape"] for c in spec if c["name"] == case[:-1])
    names = [f"{layer}.{kind}" for layer in ("conv1", "bn", "conv2") for kind in ("weight", "bias")]
    tokens = data["x"].requires_grad_()
    params = [data[f"param_{n}"].requires_grad_() for n in names]
    w1, b1, wn, bn, w2, b2 = params
    x = tokens.unflatten(1, (shape["H"], shape["W"]))
    mixed = depthwise_conv(x, w1, b1, act="gelu").permute(0, 3, 1, 2)
    stats = data["param_bn.running_mean"], data["param_bn.running_var"]
    normed = F.batch_norm(mixed, *stats, wn, bn, mode == "train", 0.1, 1e-5)
    out = depthwise_conv(normed.permute(0, 2, 3, 1), w2, b2).flatten(1, 2)
    torch.testing.assert_close(out, data["out"], rtol=0, atol=1e-11)
    gradients = torch.autograd.grad((out * data["dout"]).sum(), [tokens, *params])
    wanted = [data["grad_x"], *(data[f"grad_{n}"] for n in names)]
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = leaves((1, 4, 5), 3)
    expected = torch.autograd.grad(depthwise_conv(x, weight, bias).sum(), [x, weight, bias])
    for kept in range(3):
        tensors = [t.detach() for t in (x, weight, bias)]
        tensors[kept].requires_grad_()
        (gradient,) = torch.autograd.grad(depthwise_conv(*tensors).sum(), tensors[kept])
        assert torch.equal(gradient, expected[kept])


def test_a_residual_stream_keeps_its_type_under_autocast():
    x, weight, bias = (t.detach().float() for t in leaves((1, 8, 8), 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        streamed = depthwise_conv(x, weight, bias, residual=True)
        normed = depthwise_conv_norm(x, weight, bias, residual=True)
        half = depthwise_conv(x.bfloat16(), weight, bias, residual=True)
        branch = depthwise_conv(x, weight, bias)
    assert streamed.dtype == normed[0].dtype == normed[1].dtype == torch.float32
    assert half.dtype == branch.dtype == torch.bfloat16
    assert torch.equal(streamed, depthwise_conv(x, weight, bias, residual=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (4, 5, 3)}, r"x \(4, 5, 3\) must be a map \(B, H, W, C\)"),
        ({"weight": (3, 1, 3, 5)}, r"weight \(3, 1, 3, 5\) must be \(C, 1, K, K\) with C = 3"),
        ({"weight": (3, 3, 3)}, r"weight \(3, 3, 3\) must be \(C, 1, K, K\)"),
        ({"weight": (4, 1, 3, 3)}, "with C = 3"),
        ({"weight": (3, 1, 4, 4)}, "kernels of 4: they must be odd, from 3 to 17"),
        ({"weight": (3, 1, 19, 19)}, "kernels of 19"),
        ({"weight": (3, 1, 1, 1)}, "kernels of 1"),
        ({"bias": (4,)}, r"bias \(4,\) must be a vector of C = 3"),
        ({"addend": (1, 4, 5, 4)}, r"addend \(1, 4, 5, 4\) must have the shape \(1, 4, 5, 3\)"),
        ({"stride": 3}, "stride=3 of kernels of 3"),
        ({"stride": 2, "weight": (3, 1, 5, 5)}, "stride=2 of kernels of 5"),
        ({"same": True}, "same=True needs stride 2"),
        ({"stride": 2, "residual": True}, "residual needs stride 1, not 2"),
        ({"act": "swish"}, "activation 'swish' is none of"),
        ({"pre_act": "tanh"}, "activation 'tanh' is none of"),
        ({"addend": (1, 4, 5, 3), "act": "relu"}, "act='relu' and an addend"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": (1, 4, 5, 3), "weight": (3, 1, 3, 3), **change}
    tensors = {
        name: torch.zeros(value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**tensors)


def test_types_that_differ_are_named():
    with pytest.raises(ValueError, match=r"weight is torch\.float32 and x torch\.float16"):
        depthwise_conv(torch.zeros(1, 4, 5, 3).half(), torch.zeros(3, 1, 3, 3))


def test_norms_that_do_not_fit_are_named():
    x, weight = torch.zeros(1, 4, 5, 3), torch.zeros(3, 1, 3, 3)
    with pytest.raises(ValueError, match=r"norm_weight \(4,\) must be a vector of C = 3"):
        depthwise_conv_norm(x, weight, None, torch.zeros(4))
    with pytest.raises(ValueError, match="norm_bias without norm_weight"):
        depthwise_conv_norm(x, weight, None, None, torch.zeros(3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("border_size", [(0, 0), (2, 1), (0, 2), (1, 0)], ids=str)
def test_a_border_continues_the_map(size, border_size):
    tensors, border = leaves(size, 5), leaf("border", 4)
    addend = leaf("addend", *size, 4)
    out = depthwise_conv(*tensors, addend, border=border, border_size=border_size)
    x, weight, bias = tensors
    batch, height, width = size
    below, right = border_size
    whole = border.expand(batch, height + below, width + right, 4).clone()
    whole[:, :height, :width] = x
    expected = conv2d(whole, weight, bias)[:, :height, :width] + addend
    close(out, expected, [*tensors, addend, border])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"border": torch.zeros(3)}, r"border \(3,\) must be a vector of C = 4"),
        ({"border": torch.zeros(4), "border_size": (-1, 0)}, r"border_size=\(-1, 0\)"),
        ({"border": torch.zeros(4), "stride": 2}, "border needs stride 1, not 2"),
    ],
)
def test_borders_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(torch.zeros(1, 5, 5, 4), torch.zeros(4, 1, 3, 3), **options)
