"""Means over the regions of a map."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._routing_tokens import locate


@triton.jit(do_not_specialize=["H", "W", "R", "cols", "h", "w"])
def region_means_kernel(
    qkv,  # (B, H, W, 3C)
    pad,  # (3C,) or None
    means,  # (B, R, channels)
    stride_b,
    stride_y,
    stride_x,
    H,
    W,
    R,
    cols,
    h,
    w,
    channels,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = h * w
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(0) // blocks // R
    region = tl.program_id(0) // blocks % R
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, t, BLOCK_T):
        n = first + tl.arange(0, BLOCK_T)
        at, _, inside = locate(
            image, region, n, n < t, H, W, cols, h, w, stride_b, stride_y, stride_x
        )
        mask = inside[:, None] & (c < channels)[None, :]
        sums += tl.load(qkv + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0)
    height = tl.minimum(tl.maximum(H - region // cols * h, 0), h)
    width = tl.minimum(tl.maximum(W - region % cols * w, 0), w)
    count = tl.maximum(height * width, 1)
    if pad is not None:
        vector = tl.load(pad + c, mask=c < channels, other=0.0).to(tl.float32)
        total += vector * (t - height * width)
        count = t
    rows = means + tl.cast(image * R + region, tl.int64) * channels
    tl.store(rows + c, total / count, mask=c < channels)
