"""Neighborhood attention against its definition and official code, and what is particular."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.ops import (
    _neighborhood_pytorch,
    neighborhood_attention,
    neighborhood_attention_reference,
)
from backbones.ops._neighborhood import pair, window_starts
from benchmarks._cpu import peak
from tests.support import golden

RECORDED = golden.load("op_msa_conv")
CASES = RECORDED["cases"] + RECORDED["shifted_cases_reconstruction"]
OPERATOR = torch.ops.backbones.neighborhood_attention
DIAGONALS = [(1, 2), (1, -2), (-1, 2), (-1, -2)]

each_function = pytest.mark.parametrize(
    "function", [neighborhood_attention, neighborhood_attention_reference]
)


def leaf(*shape: int, factor: float = 1.0) -> Tensor:
    """A packed map."""
    return (factor * torch.from_numpy(golden.normal("qkv", shape))).requires_grad_()


def slots(length: int, i: int, size: int, dilation: int, boundary: str) -> list[int]:
    """Positions of the slots of a window of an axis, also outside of it."""
    if boundary == "clamp":
        start = int(window_starts(length, size, dilation)[i])
    else:
        start = i - size // 2 * dilation
    return [start + slot * dilation for slot in range(size)]


def by_hand(qkv: Tensor, heads: int, size, dilation, boundary: str, shifts) -> Tensor:
    """Pixel by pixel; a slot outside the map has the score 0 and the value 0."""
    batch, height, width, packed = qkv.shape
    dim, size, dilation = packed // (3 * heads), pair(size), pair(dilation)
    outs = []
    for h in range(heads):
        shift = shifts[h % len(shifts)] if shifts else (0, 0)
        back = (-shift[0], -shift[1])
        q, k, v = qkv.unflatten(-1, (3, heads, dim))[..., h, :].roll(back, (1, 2)).unbind(-2)
        out = torch.zeros_like(q)
        for y, x in itertools.product(range(height), range(width)):
            rows = slots(height, y, size[0], dilation[0], boundary)
            cols = slots(width, x, size[1], dilation[1], boundary)
            inside = [
                r * width + c if 0 <= r < height and 0 <= c < width else -1
                for r, c in itertools.product(rows, cols)
            ]
            zero = torch.zeros(batch, 1, dim, dtype=q.dtype)
            keys, values = (torch.cat([t.flatten(1, 2), zero], 1)[:, inside] for t in (k, v))
            weights = ((keys @ q[:, y, x, :, None]).squeeze(-1) / dim**0.5).softmax(-1)
            out[:, y, x] = (weights.unsqueeze(-2) @ values).squeeze(-2)
        outs.append(out.roll(shift, (1, 2)))
    return torch.cat(outs, -1)


@each_function
@pytest.mark.parametrize(
    "size, heads, kernel_size, dilation, boundary, shifts",
    [
        ((2, 3, 5), 2, 3, 1, "zero", None),
        ((1, 9, 11), 1, (5, 3), (1, 3), "zero", None),
        ((1, 4, 10), 5, (1, 7), (3, 2), "zero", DIAGONALS),
        ((2, 2, 3), 3, 5, 2, "zero", [(7, -4), (0, 1)]),
        ((2, 3, 5), 2, 3, 1, "clamp", None),
        ((1, 9, 12), 1, (3, 5), (3, 2), "clamp", None),
        ((1, 10, 9), 3, 5, 1, "clamp", DIAGONALS),
    ],
    ids=str,
)
def test_equals_the_definition(function, size, heads, kernel_size, dilation, boundary, shifts):
    qkv = leaf(*size, 3 * heads * 4).detach()
    expected = by_hand(qkv, heads, kernel_size, dilation, boundary, shifts)
    out = function(qkv, heads, kernel_size, dilation, boundary=boundary, shifts=shifts)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@each_function
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_official_code_with_gradients(function, case, dtype, tolerance):
    sizes, name = case["shape"], case["name"]
    shape, heads = [sizes[axis] for axis in "BCHW"], sizes["heads"]
    inputs = [torch.from_numpy(golden.normal(f"op.{part}", shape)) for part in "qkv"]
    leaves = [(x * case.get("scale_inputs", 1.0)).to(dtype).requires_grad_() for x in inputs]
    cotangent = torch.from_numpy(golden.normal("op.dout", shape)).to(dtype)
    shifts = [(y, x) for y, x in case.get("shift_per_head_yx", [])]
    qkv = torch.cat(leaves, dim=1).permute(0, 2, 3, 1)
    window = (tuple(sizes["kernel"]), sizes["dilation"])
    out = function(qkv, heads, *window, case["softmax_scale"], shifts=shifts).permute(0, 3, 1, 2)
    results = [out, *torch.autograd.grad(out, leaves, cotangent)]
    stored = load_file(golden.GOLDEN / "op_msa_conv.safetensors")
    for value, key in zip(results, ["out", "grad_q", "grad_k", "grad_v"], strict=True):
        golden.check_summary(value, case[key], tolerance)
        # the largest ones are not stored
        if (wanted := stored.get(f"{name}/{key}")) is not None:
            difference = (golden.kept(value, wanted) - wanted).abs().max()
            assert difference < tolerance * wanted.abs().max(), key


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_the_logsumexp_is_the_official_one(case):
    sizes = case["shape"]
    shape, window = [sizes[axis] for axis in "BCHW"], (*sizes["kernel"], *[sizes["dilation"]] * 2)
    parts = [torch.from_numpy(golden.normal(f"op.{part}", shape)) for part in "qkv"]
    qkv = torch.cat(parts, dim=1).permute(0, 2, 3, 1) * case["scale_inputs"]
    out, lse = OPERATOR(qkv, sizes["heads"], case["softmax_scale"], *window, False, [])
    assert out.shape == (*qkv.shape[:3], shape[1])
    golden.check_summary(lse.flatten(0, 1), case["lse"], 1e-8)


@pytest.mark.parametrize(
    "size, heads, kernel_size, dilation, boundary, shifts",
    [
        ((3, 17, 20), 2, 7, 1, "zero", None),
        ((2, 19, 9), 4, (3, 5), (2, 3), "zero", DIAGONALS),
        ((2, 5, 18), 3, 5, 1, "clamp", None),
        ((1, 13, 10), 5, 3, (2, 3), "clamp", DIAGONALS),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_backward_equals_autograd_of_the_reference(
    size, heads, kernel_size, dilation, boundary, shifts, block, monkeypatch
):
    monkeypatch.setattr(_neighborhood_pytorch, "_BLOCK", block)
    qkv, results = leaf(*size, 3 * heads * 3), []
    for function in (neighborhood_attention, neighborhood_attention_reference):
        out = function(qkv, heads, kernel_size, dilation, 0.7, boundary, shifts)
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape)))
        results.append([out, *torch.autograd.grad((out * weight).sum(), qkv)])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@each_function
def test_zeros_outside_take_part_in_the_softmax(function):
    """The only token of a map has the weight exp(s) / (exp(s) + 8)."""
    qkv = torch.tensor([2.0, 3.0, 5.0]).view(1, 1, 1, 3)
    score = torch.tensor(6.0).exp()
    torch.testing.assert_close(function(qkv, 1, 3).squeeze(), 5 * score / (score + 8))
    torch.testing.assert_close(function(qkv, 1, (1, 1)).squeeze(), torch.tensor(5.0))


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_below_those_of_zeros(function, dtype):
    """Scores below -1000: tokens at the border see zeros alone, those inside must not."""
    qkv = torch.ones(1, 5, 5, 12, dtype=dtype)
    qkv[..., :4] = -30
    qkv[..., 4:8] = 30
    out = function(qkv.requires_grad_(), 1, 3)
    inside = torch.zeros(5, 5, dtype=dtype)
    inside[1:-1, 1:-1] = 1
    assert torch.equal(out[0], inside[..., None].expand(5, 5, 4))
    out.sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("boundary", ["zero", "clamp"])
def test_a_shift_rolls_the_map(boundary):
    qkv = leaf(2, 6, 7, 36).detach()
    out = neighborhood_attention(qkv, 4, 3, boundary=boundary, shifts=DIAGONALS)
    for head, (y, x) in enumerate(DIAGONALS):
        rolled = qkv.roll((-y, -x), (1, 2))
        expected = neighborhood_attention(rolled, 4, 3, boundary=boundary).roll((y, x), (1, 2))
        part = slice(3 * head, 3 * head + 3)
        torch.testing.assert_close(out[..., part], expected[..., part], rtol=0, atol=1e-14)


def test_shifts_are_modulo_the_map():
    qkv = leaf(1, 4, 5, 18).detach()
    outs = [
        neighborhood_attention(qkv, 3, 5, shifts=shifts)
        for shifts in ([(1, -1), (0, 0)], [(5, 9), (-4, 10)])
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-14)


def test_keeps_the_map_the_output_and_the_logsumexp():
    kept, qkv = [], leaf(2, 5, 6, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        neighborhood_attention(qkv, 2, 7)
    assert kept == [(2, 5, 6, 24), (2, 5, 6, 8), (2, 2, 5, 6)]


@pytest.mark.parametrize("shifts", [None, DIAGONALS])
def test_memory_is_linear_in_the_map(shifts):
    """Windows of all pixels would be 49 times the keys and values, twice and more."""

    def memory(side: int) -> float:
        qkv = leaf(1, side, side, 96).detach().float().requires_grad_()

        def step() -> None:
            neighborhood_attention(qkv, 4, 7, shifts=shifts).sum().backward()

        return peak(step) * 2**20 / qkv.nbytes

    small, large = memory(40), memory(80)
    assert large < 6
    assert large < 1.05 * small


@pytest.mark.parametrize(
    "shape, heads, options, message",
    [
        ((2, 12, 12), 1, {}, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ((1, 7, 8, 12), 3, {}, r"multiple of 3 \* num_heads = 9"),
        ((1, 7, 8, 12), 0, {}, "num_heads=0 must be positive"),
        ((1, 7, 8, 12), 2, {"kernel_size": 4}, r"kernel_size \(4, 4\) must be odd, and 1 or more"),
        ((1, 7, 8, 12), 2, {"kernel_size": (3, 0)}, r"kernel_size \(3, 0\) must be odd"),
        ((1, 7, 8, 12), 2, {"dilation": (1, 0)}, r"dilation \(1, 0\) must be positive"),
        ((1, 7, 8, 12), 2, {"boundary": "wrap"}, r"boundary='wrap' is not one of \('zero', 'cl"),
        (
            (1, 7, 8, 12),
            2,
            {"boundary": "clamp", "kernel_size": (3, 5), "dilation": 2},
            "at least 6 x 10, this one is 7 x 8: resize it or take smaller windows",
        ),
        ((1, 7, 8, 12), 2, {"shifts": [(1, 1)] * 5}, "pairs .* at most 4"),
        ((1, 7, 8, 12), 2, {"shifts": [(1, 1, 1)]}, r"shifts=\[\(1, 1, 1\)\] must be pairs"),
    ],
)
def test_what_does_not_fit_is_named(shape, heads, options, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(torch.zeros(shape), heads, **{"kernel_size": 3, **options})
