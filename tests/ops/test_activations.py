"""GELU by tanh on a CPU, beside PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from backbones.ops import _activations, gelu_tanh

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "tokens": lambda x: x.flatten(2).mT.contiguous(),
    "with gaps": lambda x: x[:, :, 1:, ::2],
    "reversed": lambda x: x.permute(3, 2, 1, 0),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_equals_pytorchs(layout, inplace, monkeypatch):
    # several blocks, the last one not full
    monkeypatch.setattr(_activations, "_BLOCK", 100)
    for dtype, tolerance in [(torch.float64, 0.0), (torch.float32, 2e-6), (torch.bfloat16, 0.0)]:
        x = LAYOUTS[layout]((5 * torch.randn(2, 6, 7, 8)).to(dtype))
        before, expected = x.clone(), F.gelu(x, approximate="tanh")
        y = gelu_tanh(x, inplace)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        assert y.stride() == expected.stride()
        overwritten = y.data_ptr() == x.data_ptr()
        assert torch.equal(x, y if overwritten else before)
        if not inplace and x.numel():
            assert not overwritten


def test_overwrites_without_autograd_only():
    x = torch.randn(3, 50)
    with torch.no_grad():
        assert gelu_tanh(z := x.clone(), inplace=True).data_ptr() == z.data_ptr()
    leaf = x.clone().requires_grad_()
    y = gelu_tanh(leaf * 1, inplace=True)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    other = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(other, approximate="tanh").sum(), other)
    assert torch.equal(grad, expected)


@torch.no_grad()
def test_extreme_values():
    x = torch.tensor([-1e30, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e30, torch.inf, torch.nan])
    y = gelu_tanh(x)
    expected = torch.tensor([0.0, 0.0, -5e-31, 0.0, 5e-31, 100.0, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)


@torch.no_grad()
def test_one_step_for_tracers():
    x = torch.randn(4, 4)
    expected = F.gelu(x, approximate="tanh")
    scripted = torch.jit.script(plain)
    torch.testing.assert_close(scripted(x), expected, rtol=0, atol=0)
    assert "aten::gelu" in str(torch.jit.trace(plain, x).inlined_graph)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.func.vmap(gelu_tanh)(x.clone()), gelu_tanh(x))


def plain(x: torch.Tensor) -> torch.Tensor:
    """A function of one tensor, as tracers want it."""
    return gelu_tanh(x)
