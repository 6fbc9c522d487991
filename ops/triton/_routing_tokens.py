"""Routing attention: what its kernels share, tokens of regions and their scores."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tokens import LOG2E


@triton.jit
def locate(image, region, token, real, H, W, cols, h, w, stride_b, stride_y, stride_x):
    """Offsets of tokens of regions of an image, their pixel numbers, which are real and inside."""
    y = region // cols * h + token // w
    x = region % cols * w + token % w
    inside = real & (y < H) & (x < W)
    image, y, x = tl.cast(image, tl.int64), y.to(tl.int64), x.to(tl.int64)
    return image * stride_b + y * stride_y + x * stride_x, (image * H + y) * W + x, inside


@triton.jit
def locate_listed(image, numbers, n, count, H, W, cols, h, w, stride_b, stride_y, stride_x):
    """The same of tokens n of a list of regions, one region after the other; and which are real."""
    t = h * w
    real = n < count * t
    region = tl.load(numbers + n // t, mask=real, other=0).to(tl.int32)
    offsets, pixels, inside = locate(
        image, region, n % t, real, H, W, cols, h, w, stride_b, stride_y, stride_x
    )
    return offsets, pixels, inside, real


@triton.jit
def weights_and_ds(q, k, v, g, lse, delta, visible, scale, PRECISION: tl.constexpr):
    """Softmax weights of a tile of scores, and the gradient of the scores."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.where(visible, tl.exp2(scores - lse[:, None] * LOG2E), 0.0)
    da = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    return weights, weights * (da - delta[:, None])


@triton.jit
def store_outside(
    grad_pad, row, start, C, outside, dk, dv, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write one part of the gradient of `pad`: sums over the keys outside the map."""
    d = tl.arange(0, BLOCK_D)
    at = grad_pad + tl.cast(row, tl.int64) * 2 * C + start + d
    tl.store(at, tl.sum(tl.where(outside[:, None], dk, 0.0), 0), mask=d < D)
    tl.store(at + C, tl.sum(tl.where(outside[:, None], dv, 0.0), 0), mask=d < D)
