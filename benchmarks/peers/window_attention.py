"""What `window_attention` is compared with.

The peers start from q, k and v, as the op does. Two copies belong to timm's
eager code all the same: it cuts the map of C channels into windows before its qkv projection and
joins them again after attention. Under `torch.compile` the first one is part of the normalisation
before it, so that peer is not charged for it. "core" is attention alone on q, k and v that already
lie in windows, which is less than a model has to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Tensors
from benchmarks.cases.window_attention import HEAD_DIM, WindowCase

from ._peer import Compile, CompiledReference, Outputs, Peer, Peers


class Windows:
    """The windows of a case as timm makes them, `(B * G, P, Q, channels)`, and as heads."""

    def __init__(self, case: WindowCase) -> None:
        from timm.models import maxxvit

        self.case, (p, q) = case, case.window
        self.size = [-(-case.height // p) * p, -(-case.width // q) * q]
        if case.grid:
            self._cut, self._join = maxxvit.grid_partition, maxxvit.grid_reverse
        else:
            self._cut, self._join = maxxvit.window_partition, maxxvit.window_reverse

    def cut(self, x: Tensor) -> Tensor:
        """Cut `(B, H, W, channels)`, filled up with zeros below and to the right."""
        if self.case.ragged:
            height, width = x.shape[1:3]
            x = F.pad(x, (0, 0, 0, self.size[1] - width, 0, self.size[0] - height))
        return self._cut(x, list(self.case.window))

    def join(self, windows: Tensor) -> Tensor:
        """Undo `cut`."""
        x = self._join(windows, list(self.case.window), self.size)
        if self.case.ragged:
            x = x[:, : self.case.height, : self.case.width].contiguous()
        return x

    def cut_packed(self, tensors: Tensors) -> Tensor:
        """Cut the packed map; tokens outside it are `pad`."""
        windows = self.cut(tensors["qkv"])
        if self.case.ragged and self.case.pad:
            real = self.cut(torch.ones_like(tensors["qkv"][..., :1])) > 0
            windows = torch.where(real, windows, tensors["pad"])
        return windows

    def cut_heads(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Cut and split into q, k, v `(B * G, heads, N, D)`, each contiguous."""
        tokens = self.cut_packed(tensors).flatten(1, 2)
        if self.case.head_first:
            split = tokens.unflatten(-1, (self.case.heads, 3, HEAD_DIM)).permute(3, 0, 2, 1, 4)
        else:
            split = tokens.unflatten(-1, (3, self.case.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return tuple(part.contiguous() for part in split)

    def join_heads(self, out: Tensor) -> Tensor:
        """Bring `(B * G, heads, N, D)` to the map `(B, H, W, C)`."""
        return self.join(out.transpose(1, 2).unflatten(1, self.case.window).flatten(3))

    def hidden(self, device: torch.device) -> Tensor | None:
        """Which keys are masked, `(B * G, 1, 1, N)`; None if none is."""
        if not self.case.ragged or self.case.pad:
            return None
        shape = (self.case.batch, self.case.height, self.case.width, 1)
        real = self.cut(torch.ones(shape, device=device))
        return (real == 0).flatten(1)[:, None, None]


def _timm_attention(case: WindowCase, tensors: Tensors) -> nn.Module:
    """timm's attention without its two projections; the table is its parameter."""
    from timm.layers import RelPosBias, RelPosBiasTf
    from timm.models.maxxvit import AttentionCl

    kind = RelPosBias if case.head_first else RelPosBiasTf
    rel_pos = partial(kind, window_size=case.window) if case.table else None
    attention = AttentionCl(
        case.channels, dim_head=HEAD_DIM, head_first=case.head_first, rel_pos_cls=rel_pos
    )
    attention.qkv = attention.proj = nn.Identity()
    attention.to(tensors["qkv"].device, case.dtype)
    if case.table:
        # the flat table is query minus key as the op's is, the other one key minus query
        table = tensors["table"]
        theirs = table.flatten(1).T if case.head_first else table.flip(1, 2)
        attention.rel_pos.relative_position_bias_table.data.copy_(theirs)
    return attention


class Timm(Peer):
    """timm's attention with the copies that cut the map and join it again."""

    def __init__(self, case: WindowCase, compile: Compile) -> None:
        if case.ragged and not case.pad:
            raise NotImplementedError("timm takes no map that its windows do not fill")
        self.case, self.windows = case, Windows(case)
        self.attention: Callable[[Tensor], Tensor] | None = None
        self.parameters: tuple[Tensor, ...] = ()

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make the map before the projection and, in windows already, what comes out of it."""
        if self.attention is None:
            attention = _timm_attention(self.case, tensors)
            self.attention, self.parameters = attention, tuple(attention.parameters())
        x = tensors["qkv"][..., : self.case.channels].contiguous()
        return (x, self.windows.cut_packed(tensors), *self.parameters)

    def run(self, *arguments: Tensor) -> Outputs:
        """Cut the map, attend, join."""
        assert self.attention is not None
        x, packed = arguments[:2]
        return self.windows.join(self.attention(packed)), self.windows.cut(x)


class CompiledTimm(Timm):
    """timm's attention under `torch.compile` with the copy that joins the windows."""

    def __init__(self, case: WindowCase, compile: Compile) -> None:
        super().__init__(case, compile)
        self.function = compile(self._function)

    def _function(self, packed: Tensor) -> Tensor:
        assert self.attention is not None
        return self.windows.join(self.attention(packed))

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make what comes out of the projection, in windows already."""
        return super().prepare(tensors)[1:]

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend and join."""
        return (self.function(arguments[0]),)


class Sdpa(Peer):
    """PyTorch's fused attention on windows, with the bias as a mask; no copies."""

    def __init__(self, case: WindowCase, compile: Compile) -> None:
        self.case, self.windows = case, Windows(case)
        self.hidden: Tensor | None = None

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make q, k, v and the bias `(1, heads, N, N)`."""
        from backbones.ops._windows import relative_bias

        self.hidden = self.windows.hidden(tensors["qkv"].device)
        heads = self.windows.cut_heads(tensors)
        if not self.case.table:
            return heads
        bias = relative_bias(tensors["table"], self.case.window)[None]
        return (*heads, bias.to(self.case.dtype))

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend."""
        q, k, v, *bias = arguments
        mask = bias[0] if bias else None
        if self.hidden is not None:
            mask = ~self.hidden if mask is None else mask.masked_fill(self.hidden, float("-inf"))
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask),)

    def to_map(self, result: Tensor) -> Tensor:
        """Join the windows."""
        return self.windows.join_heads(result)


class Flex(Sdpa):
    """FlexAttention under `torch.compile` on windows, the bias gathered from the table."""

    trains_on_cpu = False

    def __init__(self, case: WindowCase, compile: Compile) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        super().__init__(case, compile)
        self.attention = compile(flex_attention)

    def prepare(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Make q, k, v and the table."""
        self.hidden = self.windows.hidden(tensors["qkv"].device)
        heads = self.windows.cut_heads(tensors)
        return (*heads, tensors["table"]) if self.case.table else heads

    def run(self, *arguments: Tensor) -> Outputs:
        """Attend."""
        q, k, v, *table = arguments
        (height, width), hidden = self.case.window, self.hidden

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if table:
                y, x = i // width - j // width, i % width - j % width
                s = s + table[0][h, y + height - 1, x + width - 1]
            return s if hidden is None else torch.where(hidden[b, 0, 0, j], float("-inf"), s)

        return (self.attention(q, k, v, score_mod=score),)


PEERS: Peers = {
    "backbones": Peer,
    "timm": Timm,
    "sdpa core": Sdpa,
    "timm compiled": CompiledTimm,
    "reference compiled": CompiledReference,
    "flex core compiled": Flex,
}
