"""Channel attention against its definition and timm's layers, and what is particular to it."""

import pytest
import torch
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import channel_attention, channel_attention_reference
from tests.support import golden

both = pytest.mark.parametrize("mix_values", [False, True])


def packed(batch: int, height: int, width: int, channels: int) -> Tensor:
    return torch.from_numpy(golden.normal("qkv", (batch, height, width, 3 * channels)))


def by_hand(qkv: Tensor, heads: int, mix_values: bool, scale: float) -> Tensor:
    """Channel by channel, straight from the paper."""
    batch, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    out = torch.zeros(batch, height * width, channels // 3, dtype=qkv.dtype)
    for n in range(batch):
        tokens = qkv[n].reshape(height * width, 3, heads, dim)
        for head in range(heads):
            q, k, v = tokens[:, :, head].unbind(1)
            rows, cols, mixed = (q, k, v) if mix_values else (k, v, q)
            for i in range(dim):
                scores = [rows[:, i] @ cols[:, j] * scale for j in range(dim)]
                weights = torch.stack(scores).softmax(0)
                out[n, :, head * dim + i] = mixed @ weights
    return out.view(batch, height, width, -1)


@both
@pytest.mark.parametrize("function", [channel_attention, channel_attention_reference])
def test_equals_the_definition(function, mix_values):
    qkv = packed(2, 3, 5, 12)
    scale = 15**-0.5 if mix_values else 4**-0.5
    expected = by_hand(qkv, 3, mix_values, scale)
    torch.testing.assert_close(function(qkv, 3, mix_values), expected, rtol=0, atol=1e-12)
    expected = by_hand(qkv, 3, mix_values, 0.7)
    torch.testing.assert_close(function(qkv, 3, mix_values, 0.7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer, mix_values", [(ChannelAttention, False), (ChannelAttentionV2, True)]
)
def test_equals_timm_with_gradients(layer, mix_values):
    attention = layer(64, num_heads=2, qkv_bias=True).double()
    attention.load_state_dict(golden.fill_model(attention))
    x = torch.from_numpy(golden.normal("x", (2, 5, 7, 64))).requires_grad_()
    theirs = attention(x.flatten(1, 2)).unflatten(1, (5, 7))
    ours = attention.proj(channel_attention(attention.qkv(x), 2, mix_values))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    leaves = [x, *attention.parameters()]
    weight = torch.from_numpy(golden.normal("weight", tuple(x.shape)))
    for value, expected in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((theirs * weight).sum(), leaves),
        strict=True,
    ):
        assert (value - expected).abs().max() < 1e-11 * expected.abs().max()


@both
@pytest.mark.parametrize("requires_grad", [False, True])
def test_keeps_the_weights_only_for_a_backward_pass(mix_values, requires_grad):
    kept = []
    qkv = packed(1, 4, 4, 8).requires_grad_(requires_grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        channel_attention(qkv, 2, mix_values)
    assert kept == ([qkv.shape, (1, 2, 4, 4)] if requires_grad else [])
    operator = torch.ops.backbones.channel_attention
    assert operator(qkv, 2, mix_values, None, False)[1].numel() == 0


@both
def test_weights_that_were_not_kept_are_computed_again(mix_values):
    qkv = packed(2, 3, 5, 12).requires_grad_()
    operator = torch.ops.backbones.channel_attention
    grads = [
        torch.autograd.grad(operator(qkv, 3, mix_values, None, keep)[0].square().sum(), qkv)[0]
        for keep in (False, True)
    ]
    assert torch.equal(*grads)


def test_costs_four_products_backward():
    qkv = packed(2, 3, 5, 12).requires_grad_()
    counts = []
    for function in (channel_attention, channel_attention_reference):
        out = function(qkv, 3)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 4 * 2 * 15 * 12 * 4] * 2


@pytest.mark.parametrize(
    "shape, heads, message",
    [
        ((2, 12, 12), 2, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ((2, 3, 4, 16), 2, r"multiple of 3 \* num_heads = 6"),
        ((2, 3, 4, 12), 0, "num_heads=0 must be positive"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape, heads, message):
    with pytest.raises(ValueError, match=message):
        channel_attention(torch.zeros(shape), heads)
