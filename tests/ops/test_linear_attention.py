"""Linear attention against its definition and the official code, and what is particular to it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import linear_attention, linear_attention_reference
from tests.support import golden

CASES = golden.load("op_l2vit_lga")["cases"]
OPERATOR = torch.ops.backbones.linear_attention

each_function = pytest.mark.parametrize("function", [linear_attention, linear_attention_reference])


def leaves(*size: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """The packed map and the temperatures, both leaves."""
    qkv = golden.normal("qkv", (*size, 3 * heads * dim))
    temperature = golden.normal("temperature", (heads,))
    return tuple(torch.from_numpy(x).requires_grad_() for x in (qkv, temperature))


def by_hand(qkv: Tensor, temperature: Tensor, least: float) -> Tensor:
    """Token by token: every query meets every key."""
    (batch, height, width, channels), heads = qkv.shape, len(temperature)
    tokens = qkv.reshape(batch, height * width, 3, heads, channels // (3 * heads))
    out = torch.zeros_like(tokens[:, :, 0])
    for b in range(batch):
        for h in range(heads):
            q, k, v = tokens[b, :, :, h].unbind(1)
            for n in range(height * width):
                weights = k.relu() @ q[n].relu()
                out[b, n, h] = temperature[h] * (weights @ v) / max(weights.sum(), least)
    return out.view(batch, height, width, -1)


@each_function
@pytest.mark.parametrize("least", [1.0, 20.0, 100.0])
def test_equals_the_definition(function, least):
    qkv, temperature = (x.detach() for x in leaves(2, 3, 5, heads=2, dim=8))
    expected = by_hand(qkv, temperature, least)
    out = function(qkv, temperature, least)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    if least == 100:
        assert torch.equal(function(qkv, temperature), out)


def official(case: dict, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Queries, keys and values `(B, heads, N, D)`, temperatures, output and its cotangent."""
    batch, heads, count, dim = (case["shape"][key] for key in ("B", "heads", "N", "D"))
    inputs = []
    for part in "qkv":
        values = golden.normal(f"op.{part}", (batch, heads, count, dim)) * case["scales"][part]
        inputs.append(torch.from_numpy(values))
    if "note" in case:
        inputs[0][:, :, ::5] = -inputs[0][:, :, ::5].abs()
    temperature = torch.from_numpy(golden.normal("op.temperature", (heads, 1, 1)))
    inputs = [x.to(dtype).requires_grad_() for x in (*inputs, (1 + 0.1 * temperature) * dim**-0.5)]
    # any map of as many tokens; channels of a token are those of its heads, one after the other
    rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
    tokens = [x.transpose(1, 2).reshape(batch, rows, count // rows, -1) for x in inputs[:3]]
    out = linear_attention(torch.cat(tokens, dim=-1), inputs[3].flatten()).flatten(1, 2)
    cotangent = torch.from_numpy(golden.normal("op.dout", tuple(out.shape))).to(dtype)
    return inputs, out, cotangent


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_official_code_with_gradients(case, dtype, tolerance):
    arrays = load_file(golden.GOLDEN / "op_l2vit_lga.safetensors")
    inputs, out, cotangent = official(case, dtype)
    values = [out, *torch.autograd.grad(out, inputs, cotangent)]
    names = ["out", "grad_q", "grad_k", "grad_v", "grad_temperature"]
    for name, value in zip(names, values, strict=True):
        expected = arrays.get(f"{case['name']}.{name}")
        if name == "grad_temperature":
            expected = torch.tensor(case[name], dtype=torch.float64).view_as(value)
        if expected is None:
            golden.check_summary(value, case[name], tolerance)
        else:
            assert (value - expected).abs().max() < tolerance * expected.abs().max(), name


def test_a_query_without_a_positive_channel_reads_nothing():
    qkv, temperature = leaves(1, 3, 5, heads=1, dim=8)
    qkv = torch.cat([-qkv.detach()[..., :8].abs(), qkv.detach()[..., 8:]], dim=-1).requires_grad_()
    for least in (1e-30, 100.0):
        out = linear_attention(qkv, temperature, least)
        assert not out.any()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), [qkv, temperature]))


@each_function
def test_the_gradient_passes_a_denominator_at_the_bound(function):
    """As `torch.clamp` has it; just below, the denominator is a constant."""
    qkv = torch.tensor([2.0, 5.0, 3.0], dtype=torch.float64).view(1, 1, 1, 3).requires_grad_()
    temperature = torch.ones(1, dtype=torch.float64)
    for least, expected in ((10.0, [0.0, 0.0, 1.0]), (10.5, [15 / 10.5, 6 / 10.5, 10 / 10.5])):
        (grad,) = torch.autograd.grad(function(qkv, temperature, least).sum(), qkv)
        torch.testing.assert_close(grad.flatten(), grad.new_tensor(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("least", [0.5, 20.0, 1e4])
def test_backward_equals_autograd_of_the_reference(least):
    inputs = leaves(2, 4, 7, heads=3, dim=6)
    results = []
    for function in (linear_attention, linear_attention_reference):
        out = function(*inputs, least)
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape)))
        results.append(torch.autograd.grad((out * weight).sum(), inputs))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_many_tokens_do_not_overflow(dtype, tolerance):
    """A detector's first stage: denominators leave the range of float16 five times over."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 200, 304, 3 * 32, generator=generator).to(dtype).requires_grad_()
    temperature = torch.full((1,), 32**-0.5, requires_grad=True)
    weight = torch.randn(1, 200, 304, 32, generator=generator).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (qkv, temperature)]
    results = []
    for inputs in ([qkv, temperature], exact):
        out = linear_attention(*inputs)
        # a loss that is scaled, as in mixed precision
        grads = torch.autograd.grad(out, inputs, weight.to(out.dtype) * 1024)
        results.append([x.detach().double() for x in (out, *grads)])
    state = OPERATOR(*(x.detach() for x in exact), 100.0, True)[1]
    assert state[:, :, -1].max() > 2**14
    for value, expected in zip(*results, strict=True):
        assert torch.isfinite(value).all()
        assert (value - expected).norm() < tolerance * expected.norm()


def test_autocast_leaves_the_temperature_and_the_sums_alone():
    qkv, temperature = (x.detach().float() for x in leaves(1, 9, 11, heads=2, dim=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(qkv, temperature)
        reference = linear_attention_reference(qkv, temperature)
    assert torch.equal(out, linear_attention(qkv.bfloat16(), temperature))
    assert not torch.equal(out, linear_attention(qkv.bfloat16(), temperature.bfloat16()))
    assert torch.equal(reference, linear_attention(qkv, temperature))


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True), (False, False)])
def test_keeps_sums_only_for_a_backward_pass(requires_grad):
    kept = []
    inputs = leaves(1, 4, 4, heads=2, dim=4)
    inputs = [x.detach().requires_grad_(r) for x, r in zip(inputs, requires_grad, strict=True)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        linear_attention(*inputs)
    assert kept == ([(1, 4, 4, 24), (2,), (1, 2, 5, 4)] if any(requires_grad) else [])
    assert OPERATOR(*inputs, 100.0, False)[1].numel() == 0


def test_sums_that_were_not_kept_are_computed_again():
    inputs = leaves(2, 3, 5, heads=3, dim=4)
    grads = [
        torch.autograd.grad(OPERATOR(*inputs, 9.0, keep)[0].square().sum(), inputs)
        for keep in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_costs_what_autograd_costs():
    inputs = leaves(2, 3, 5, heads=3, dim=4)
    counts = []
    for function in (linear_attention, linear_attention_reference):
        out = function(*inputs)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 15 * 12 * (4 * 4 + 2)] * 2


@pytest.mark.parametrize(
    "shape, temperature, least, message",
    [
        ((2, 12, 12), 2, 100.0, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ((2, 3, 4, 16), 2, 100.0, r"multiple of 3 \* heads = 6, of as many heads as temperature"),
        ((2, 3, 4, 12), (2, 1, 1), 100.0, r"temperature \(2, 1, 1\) must be a vector \(heads,\)"),
        ((2, 3, 4, 12), 0, 100.0, r"temperature \(0,\) must be a vector"),
        ((2, 3, 4, 12), 2, 0.0, "min_denominator=0.0 must be positive and finite"),
        ((2, 3, 4, 12), 2, float("inf"), "min_denominator=inf must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_named(shape, temperature, least, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(torch.zeros(shape), torch.ones(temperature), least)
