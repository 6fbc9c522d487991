"""Launch of dynamic mixing where queries of the same window start form a class."""

from __future__ import annotations

from torch import Tensor

from ._mixing import Half


def forward(half: Half, out: Tensor, lse: Tensor) -> None:
    """Compute one half of the output.

    Args:
        half: The inputs.
        out: Where the output is written, `(B, H, W, C)`, from channel `half.channel` on.
        lse: Where the logsumexp of the logits is written, `(B, G, H, W)`, float32.
    """
    raise NotImplementedError


def backward(
    half: Half,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    added: Tensor | None,
    grad_query: Tensor,
    grad_kernel: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """Compute what one half gives to the gradients.

    Args:
        half: The inputs.
        grad: Gradient of the output `(B, H, W, C)`.
        out: The output, of both halves.
        lse: The logsumexp of the logits of this half.
        added: What to add to the gradient of the queries, like it, float32; None for nothing.
        grad_query: Where that is written, `(B, H, W, C / 2)`, float32 or the type of the queries.
        grad_kernel: Where that of the kernels is written, `(B, G, D, S)`, from `half.slot` on.
        grad_value: Where that of the values is written, `(B, H, W, C)`, from `half.channel` on.

    Returns:
        The gradient of the logits summed over the batch, `(G, H', W', K * K)`, float32: of every
        pixel, or with H' = W' = K of every place in a window, pixels of one place summed.
    """
    raise NotImplementedError
