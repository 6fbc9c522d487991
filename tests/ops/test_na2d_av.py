"""`na2d_av` against its definition and natten 0.17, and what is particular."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.ops import na2d_av, na2d_av_reference
from backbones.ops._neighborhood import pair, window_starts
from tests.support import golden

CASES = golden.load("op_contmix")["na2d_av"]

each_function = pytest.mark.parametrize("function", [na2d_av, na2d_av_reference])


def maps(size: tuple[int, ...], slots: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Weights and values of a map `(B, G, H, W)`, both leaves."""
    attn, value = (golden.normal(name, (*size, n)) for name, n in (("a", slots), ("v", dim)))
    return tuple(torch.from_numpy(x).requires_grad_() for x in (attn, value))


def by_hand(attn: Tensor, value: Tensor, size: tuple[int, int], steps: tuple[int, int]) -> Tensor:
    """Pixel by pixel and slot by slot."""
    height, width = value.shape[2:4]
    rows = window_starts(height, size[0], steps[0]).tolist()
    cols = window_starts(width, size[1], steps[1]).tolist()
    out = torch.zeros_like(value)
    for y in range(height):
        for x in range(width):
            for slot in range(size[0] * size[1]):
                row = rows[y] + slot // size[1] * steps[0]
                col = cols[x] + slot % size[1] * steps[1]
                out[:, :, y, x] += attn[:, :, y, x, slot, None] * value[:, :, row, col]
    return out


@each_function
@pytest.mark.parametrize(
    "size, kernel_size, dilation",
    [((2, 3, 5, 7), 3, 1), ((1, 2, 9, 19), (5, 3), (1, 6)), ((2, 1, 6, 40), (3, 7), (2, 1))],
    ids=str,
)
def test_equals_the_definition(function, size, kernel_size, dilation):
    rows, cols = pair(kernel_size)
    attn, value = (x.detach() for x in maps(size, rows * cols))
    expected = by_hand(attn, value, (rows, cols), pair(dilation))
    out = function(attn, value, kernel_size, dilation)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@each_function
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_equals_natten_with_gradients(function, case, dtype, tolerance):
    *size, dim, kernel_size, dilation = case["B,G,H,W,D,K,dilation"]
    name, stored = case["case"], load_file(golden.GOLDEN / "op_contmix.safetensors")
    logits = torch.from_numpy(golden.normal(f"{name}.logits", (*size, kernel_size**2)))
    value, cotangent = (
        torch.from_numpy(golden.normal(f"{name}.{part}", (*size, dim))).to(dtype)
        for part in ("value", "grad_out")
    )
    leaves = [x.requires_grad_() for x in (logits.softmax(-1).to(dtype), value)]
    out = function(*leaves, kernel_size, dilation)
    results = [out, *torch.autograd.grad(out, leaves, cotangent)]
    for result, key in zip(results, ["out", "grad_attn", "grad_value"], strict=True):
        golden.check_summary(result, case[key], tolerance)
        # the largest ones are not stored
        if (wanted := stored.get(f"{name}/{key}")) is not None:
            result = golden.kept(result, wanted)
            assert (result - wanted).abs().max() < tolerance * wanted.abs().max(), key


@pytest.mark.parametrize(
    "size, kernel_size, dilation",
    [((2, 2, 7, 50), (3, 5), 1), ((1, 2, 13, 15), 13, 1), ((2, 1, 11, 37), 5, 2)],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_backward_equals_autograd_of_the_reference(size, kernel_size, dilation, block, monkeypatch):
    monkeypatch.setattr(sys.modules[na2d_av.__module__], "_BLOCK", block)
    rows, cols = pair(kernel_size)
    leaves, results = maps(size, rows * cols), []
    for function in (na2d_av, na2d_av_reference):
        out = function(*leaves, kernel_size, dilation)
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape)))
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@each_function
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_take_the_type_of_the_values(function, autocast, dtype):
    attn, value = maps((1, 2, 6, 5), 9)
    attn, value = attn.detach().float().requires_grad_(), value.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = function(attn, value, 3)
    out.sum().backward()
    assert (out.dtype, attn.grad.dtype, value.grad.dtype) == (dtype, torch.float32, dtype)
    exact = na2d_av(attn.detach().to(dtype).double(), value.detach().double(), 3)
    assert (out - exact).norm() < (1e-6 if dtype == torch.float32 else 1e-3) * exact.norm()


@pytest.mark.parametrize("strides", ["natten 0.14", "channels last"])
def test_strides_are_free(strides):
    attn, value = (x.detach() for x in maps((2, 3, 6, 7), 15, dim=4))
    order = (0, 2, 3, 1, 4) if strides == "channels last" else (1, 0, 3, 4, 2)
    inverse = [order.index(i) for i in range(5)]
    views = [x.permute(order).contiguous().permute(inverse).requires_grad_() for x in (attn, value)]
    leaves = [attn.requires_grad_(), value.requires_grad_()]
    results = []
    for inputs in (views, leaves):
        out = na2d_av(*inputs, (3, 5))
        assert out.is_contiguous()
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_keeps_its_arguments_only():
    kept, leaves = [], maps((1, 1, 4, 5), 9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        na2d_av(*leaves, 3)
    assert kept == [leaf.shape for leaf in leaves]


def test_copies_no_windows():
    """Those of all pixels would be 81 times the values."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return out

    attn, value = (x.detach() for x in maps((1, 8, 60, 60), 81, dim=16))
    attn.requires_grad_()
    with Sizes():
        na2d_av(attn, value.requires_grad_(), 9).sum().backward()
    assert 0 < largest <= attn.numel()


@pytest.mark.parametrize(
    "attn, value, kernel_size, dilation, message",
    [
        ((1, 2, 6, 7, 16), (1, 2, 6, 7, 4), 4, 1, r"kernel_size \(4, 4\) must be odd, and 3 or mo"),
        ((1, 2, 6, 7, 3), (1, 2, 6, 7, 4), (1, 3), 1, r"kernel_size \(1, 3\) must be odd, and 3"),
        ((1, 2, 6, 7, 9), (1, 2, 6, 7, 4), 3, 0, r"dilation \(0, 0\) must be positive"),
        ((1, 2, 6, 7, 9), (1, 2, 6, 7, 4), 3, (2, 3), "at least 6 x 9, this one is 6 x 7"),
        ((1, 2, 6, 7, 81), (1, 2, 6, 7, 4), 9, 1, "at least 9 x 9, this one is 6 x 7"),
        ((1, 2, 6, 7, 9), (1, 2, 6, 7, 4), (3, 5), 1, r"attn \(1, 2, 6, 7, 9\) must be \(1, 2, 6,"),
        ((1, 1, 6, 7, 9), (1, 2, 6, 7, 4), 3, 1, r"attn \(1, 1, 6, 7, 9\) must be \(1, 2, 6, 7,"),
        ((2, 6, 7, 9), (2, 6, 7, 4), 3, 1, r"value \(2, 6, 7, 4\) must be \(B, heads, H, W, D\)"),
    ],
)
def test_what_does_not_fit_is_named(attn, value, kernel_size, dilation, message):
    with pytest.raises(ValueError, match=message):
        na2d_av(torch.zeros(attn), torch.zeros(value), kernel_size, dilation)
