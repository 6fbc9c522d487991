"""Averages over regions: PyTorch's own, in one compiled graph for all sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from backbones.ops import adaptive_average, use_reference
from tests.support import golden

# regions that share pixels or do not, and maps enlarged
CASES = [((2, 14, 15, 5), 7, 7), ((3, 13, 17, 4), 7, 7), ((2, 3, 4, 6), 5, 4)]


def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(golden.normal(name, shape))


def leaf(shape: tuple[int, ...]) -> torch.Tensor:
    return normal("average", shape).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rows", "cols"), CASES)
@pytest.mark.parametrize("channels_first", [False, True])
def test_equals_pytorch_with_gradients(shape, rows, cols, dtype, channels_first):
    x = normal("average", shape).to(dtype)
    if channels_first:
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    x, other = (x.clone().requires_grad_() for _ in range(2))
    out = adaptive_average(x, rows, cols)
    expected = F.adaptive_avg_pool2d(other.movedim(-1, 1), (rows, cols)).movedim(1, -1)
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    grad = normal("cotangent", tuple(out.shape)).to(dtype)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, other.grad)


def test_of_a_known_map():
    x = torch.arange(5.0).view(1, 1, 5, 1)
    assert adaptive_average(x, 1, 2).flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("shape", "rows", "cols"), CASES)
def test_opcheck(shape, rows, cols):
    x = leaf(shape)
    torch.library.opcheck(torch.ops.backbones.adaptive_average.default, (x, rows, cols))
    grad = normal("cotangent", (shape[0], rows, cols, shape[3]))
    backward = torch.ops.backbones.adaptive_average_backward.default
    torch.library.opcheck(backward, (grad, x.detach()))


def test_compiles_once_for_all_sizes():
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(adaptive_average, fullgraph=True, dynamic=True, backend=counter)
    for shape, rows, cols in CASES[:2]:
        x, other = leaf(shape), leaf(shape)
        out, expected = compiled(x, rows, cols), adaptive_average(other, rows, cols)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, other.grad)
    assert counter.frame_count == 1


def test_other_ways_of_calling():
    x = normal("average", (2, 9, 8, 4))
    expected = adaptive_average(x, 7, 7)
    assert torch.equal(torch.jit.script(adaptive_average)(x, 7, 7), expected)
    graph = torch.fx.symbolic_trace(lambda x: adaptive_average(x, 7, 7))
    assert torch.equal(graph(x), expected)
    with use_reference():
        assert torch.equal(adaptive_average(x, 7, 7), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert adaptive_average(x.float(), 7, 7).dtype == torch.float32
