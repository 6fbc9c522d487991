"""Partial attention against its formula, and what is particular to it."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import partial_attention, partial_attention_reference
from tests.support import golden

# batch, height, width, channels of the map, value channels; qk_dim is 16 unless said
SHAPES = [(2, 7, 7, 224, 48), (1, 4, 4, 320, 68), (3, 5, 3, 9, 9), (1, 1, 1, 40, 33)]


def maps(batch: int, height: int, width: int, channels: int, values: int, qk: int = 16):
    qkv = torch.from_numpy(golden.normal("qkv", (batch, height, width, 2 * qk + values)))
    return qkv, torch.from_numpy(golden.normal("x", (batch, height, width, channels)))


def by_hand(qkv: Tensor, x: Tensor, qk: int, scale: float) -> Tensor:
    """Token by token, straight from the paper."""
    out = x.clone()
    for b in range(len(x)):
        tokens = qkv[b].reshape(-1, qkv.shape[-1])
        q, k, v = tokens[:, :qk], tokens[:, qk : 2 * qk], tokens[:, 2 * qk :]
        rows = [((k * query).sum(1) * scale).softmax(0) @ v for query in q]
        out[b, ..., : v.shape[1]] = torch.stack(rows).view(*x.shape[1:3], -1)
    return out.clamp(min=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [partial_attention, partial_attention_reference])
def test_equals_the_formula(function, shape):
    qkv, x = maps(*shape)
    torch.testing.assert_close(function(qkv, x), by_hand(qkv, x, 16, 0.25), rtol=0, atol=1e-12)


def test_queries_are_taken_in_blocks_without_a_seam(monkeypatch):
    qkv, x = maps(2, 7, 9, 24, 20)
    qkv.requires_grad_()
    whole = partial_attention(qkv, x)
    (grad_whole,) = torch.autograd.grad(whole.square().sum(), qkv)
    monkeypatch.setattr(sys.modules["backbones.ops.partial_attention"], "_BLOCK_SCORES", 1000)
    blocks = partial_attention(qkv, x)
    (grad_blocks,) = torch.autograd.grad(blocks.square().sum(), qkv)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad_blocks, grad_whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [partial_attention, partial_attention_reference])
def test_other_query_width_and_scale(function):
    qkv, x = maps(2, 3, 5, 40, 12, qk=8)
    expected = by_hand(qkv, x, 8, 0.7)
    torch.testing.assert_close(function(qkv, x, 8, 0.7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 5, 9, 6), (1, 2, 2, 5, 5)])
def test_gradients(shape):
    inputs = tuple(t.requires_grad_() for t in maps(*shape, qk=4))
    assert torch.autograd.gradcheck(lambda qkv, x: partial_attention(qkv, x, 4), inputs)


def test_one_graph_serves_maps_of_one_tile_and_of_several():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(partial_attention, fullgraph=True, backend=backend, dynamic=True)
    for size in [(2, 10, 14), (3, 5, 7), (4, 9, 8)]:
        qkv, x = (t.requires_grad_() for t in maps(*size, 30, 19))
        assert torch.equal(compiled(qkv, x), partial_attention(qkv, x))
    assert len(graphs) == 1


def test_flops_are_those_of_the_reference():
    qkv, x = (t.requires_grad_() for t in maps(2, 7, 5, 30, 19))

    def count(function) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            out = function(qkv, x)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(partial_attention)
    reference_forward, reference_backward = count(partial_attention_reference)
    assert forward == reference_forward == 2 * 2 * 35 * 35 * (16 + 19)
    # the op computes the scores once more instead of keeping them
    assert backward == reference_backward + 2 * 2 * 35 * 35 * 16


@pytest.mark.parametrize(
    "qkv, x, message",
    [
        ((2, 3, 5, 40), (2, 3, 4, 40), "NHWC maps of one batch and size"),
        ((2, 15, 40), (2, 15, 40), "NHWC maps of one batch and size"),
        ((2, 3, 5, 32), (2, 3, 5, 40), "between 33 and 72"),
        ((2, 3, 5, 73), (2, 3, 5, 40), "between 33 and 72"),
    ],
)
def test_shapes_that_do_not_fit_are_named(qkv, x, message):
    with pytest.raises(ValueError, match=message):
        partial_attention(torch.zeros(qkv), torch.zeros(x))


def test_types_that_do_not_fit_are_named():
    qkv, x = maps(1, 2, 3, 40, 20)
    with pytest.raises(ValueError, match=r"float64.*float32.*cast"):
        partial_attention(qkv, x.float())
