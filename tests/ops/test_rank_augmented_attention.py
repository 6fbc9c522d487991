"""Rank-augmented attention against its definition and official code, and what is particular."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import (
    rank_augmented_attention,
    rank_augmented_attention_reference,
    rotary_table,
)
from tests.support import golden

CASES = golden.load("op_rala")["cases"]
OPERATOR = torch.ops.backbones.rank_augmented_attention

each_function = pytest.mark.parametrize(
    "function", [rank_augmented_attention, rank_augmented_attention_reference]
)


def table(dim: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The angles of RAVLT."""
    theta = 1e4 ** -torch.linspace(0, 1, dim // 4, dtype=dtype)
    return rotary_table(theta, size)


def maps(*size: int, channels: int, gated: bool = False) -> tuple[Tensor, Tensor]:
    """The packed map and an addend, both leaves."""
    qkv = golden.normal("qkv", (*size, (3 + gated) * channels))
    addend = golden.normal("addend", (*size, channels))
    return tuple(torch.from_numpy(x).requires_grad_() for x in (qkv, addend))


def by_hand(qkv: Tensor, rotary: Tensor, heads: int) -> Tensor:
    """Token by token, as the official code weights keys: by N times the softmax."""
    batch, height, width, channels = qkv.shape
    count, dim = height * width, channels // (3 * heads)
    out = torch.zeros(batch, count, heads, dim, dtype=qkv.dtype)
    angles = [
        torch.complex(*torch.cat([rotary[:, n // width], rotary[:, n % width]], dim=-1))
        for n in range(count)
    ]

    def rotate(x: Tensor, n: int) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles[n])

    for b in range(batch):
        tokens = qkv[b].reshape(count, 3, heads, dim)
        for h in range(heads):
            q, k, v = tokens[:, :, h].unbind(1)
            fq, fk = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
            fk = fk * count * (fk @ fq.mean(0) / math.sqrt(dim)).softmax(0)[:, None]
            kv = sum(torch.outer(rotate(fk[n], n).flatten(), v[n]) for n in range(count)) / count
            for n in range(count):
                out[b, n, h] = rotate(fq[n], n).flatten() @ kv / (fq[n] @ fk.mean(0) + 1e-6)
    return out.view(batch, height, width, -1)


@each_function
def test_equals_the_definition(function):
    qkv, _ = maps(2, 3, 5, channels=16)
    rotary = table(8, 6)
    expected = by_hand(qkv.detach(), rotary, 2)
    torch.testing.assert_close(function(qkv, rotary, 2).detach(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_equals_the_official_code_with_gradients(case, dtype, tolerance):
    expected = load_file(golden.GOLDEN / "op_rala.safetensors")
    name, shape = case["id"], (case["B"], case["heads"] * case["head_dim"], case["H"], case["W"])
    parts = []
    for part in "qkv":
        factor, shift = map(float, case.get(part, "normal*1+0").removeprefix("normal*").split("+"))
        values = torch.from_numpy(golden.normal(f"op_rala/{name}/{part}", shape))
        parts.append((values * factor + shift).to(dtype).requires_grad_())
    cotangent = torch.from_numpy(golden.normal(f"op_rala/{name}/cotangent", shape)).to(dtype)
    rotary = rotary_table(torch.tensor(case["angle"], dtype=torch.float64)[::2], max(shape[2:]))
    qkv = torch.cat(parts, dim=1).permute(0, 2, 3, 1)
    out = rank_augmented_attention(qkv, rotary.to(dtype), case["heads"]).permute(0, 3, 1, 2)
    grads = torch.autograd.grad(out, parts, cotangent)
    for value, key in zip([out, *grads], ["out", "dq", "dk", "dv"], strict=True):
        wanted = expected[f"{name}.{key}"]
        # the gradients of a single token's query and key are differences of equal numbers
        scale = 1 if name == "one" else wanted.abs().max()
        assert (golden.kept(value, wanted) - wanted).abs().max() < tolerance * scale, key


@each_function
def test_adds_and_gates_the_result(function):
    qkv, addend = (x.detach() for x in maps(2, 3, 5, channels=16, gated=True))
    rotary = table(8, 5)
    core, gate = function(qkv[..., :48], rotary, 2), qkv[..., 48:]
    for extra in (None, addend):
        total = core if extra is None else core + extra
        close = torch.testing.assert_close
        close(function(qkv, rotary, 2, extra, True), total * gate, rtol=0, atol=1e-14)
        close(function(qkv[..., :48], rotary, 2, extra), total, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_backward_equals_autograd_of_the_reference(gated, added):
    qkv, addend = maps(2, 4, 7, channels=24, gated=gated)
    rotary, leaves = table(12, 7), [qkv, addend] if added else [qkv]
    results = []
    for function in (rank_augmented_attention, rank_augmented_attention_reference):
        out = function(qkv, rotary, 2, addend if added else None, gated)
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape)))
        results.append(torch.autograd.grad((out * weight).sum(), leaves))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_the_addend_alone_may_require_a_gradient():
    qkv, addend = maps(1, 3, 3, channels=8, gated=True)
    out = rank_augmented_attention(qkv.detach(), table(8, 3), 1, addend, True)
    out.sum().backward()
    assert torch.equal(addend.grad, qkv.detach()[..., 24:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_tokens_do_not_overflow(dtype):
    """A detector's first stage: N times the softmax would leave the range of float16."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 200, 304, 32, generator=generator)
    # one key that takes most of the weight
    qkv[0, 100, 100, 8:16] = 30
    rounded = qkv.to(dtype).requires_grad_()
    exact = rounded.detach().double().requires_grad_()
    results = []
    for leaf in (rounded, exact):
        out = rank_augmented_attention_reference(leaf, table(8, 304).float(), 1, gated=True)
        (grad,) = torch.autograd.grad(out.square().mean() * 1e4, leaf)
        assert torch.isfinite(out).all() and torch.isfinite(grad).all()
        results.append((out.double(), grad.double()))
    for value, expected in zip(*results, strict=True):
        error = (value - expected).norm() / expected.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.6e-2)


def test_cold_queries_keep_their_precision():
    """`elu(q) + 1` would lose most digits of float32 to the one."""
    qkv, _ = maps(1, 4, 5, channels=16)
    qkv = (qkv.detach() - torch.tensor([12.0, 0.0, 0.0]).repeat_interleave(16)).float()
    rotary = table(16, 5)
    exact = rank_augmented_attention(qkv.double(), rotary, 1)
    out = rank_augmented_attention(qkv, rotary.float(), 1)
    assert (out - exact).abs().max() < 1e-6 * exact.abs().max()


def test_autocast_leaves_the_table_alone():
    qkv, addend = (x.detach().float() for x in maps(1, 2, 300, channels=8, gated=True))
    rotary = table(8, 300).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rank_augmented_attention(qkv, rotary, 1, addend, True)
    halves = qkv.bfloat16(), addend.bfloat16()
    assert torch.equal(out, rank_augmented_attention(halves[0], rotary, 1, halves[1], True))
    rounded = rank_augmented_attention(halves[0], rotary.bfloat16().float(), 1, halves[1], True)
    assert not torch.equal(out, rounded)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_keeps_nothing_of_the_size_of_the_map_but_its_arguments(requires_grad):
    kept = []
    qkv, addend = maps(1, 4, 4, channels=16, gated=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        rank_augmented_attention(
            qkv.requires_grad_(requires_grad), table(8, 4), 2, addend.detach(), True
        )
    small = [(1, 2, 9, 8), (1, 2, 8), (1, 2)]
    assert kept == ([qkv.shape, (2, 4, 2), addend.shape, *small] if requires_grad else [])
    assert all(x.numel() == 0 for x in OPERATOR(qkv, table(8, 4), None, 2, True, False)[1:])


def test_what_was_not_kept_is_computed_again():
    qkv, addend = maps(2, 3, 5, channels=8, gated=True)
    grads = [
        torch.autograd.grad(
            OPERATOR(qkv, table(8, 5), addend, 1, True, keep)[0].square().sum(), [qkv, addend]
        )
        for keep in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_costs_what_autograd_costs_and_the_core_once_more_for_a_gate(gated):
    qkv, _ = maps(2, 3, 5, channels=16, gated=gated)
    counts = []
    for function in (rank_augmented_attention, rank_augmented_attention_reference):
        out = function(qkv, table(8, 5), 2, gated=gated)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    product = 2 * 2 * 15 * 16 * 8
    assert counts == [counts[1] + gated * product, 4 * product + 4 * product // 8]


@pytest.mark.parametrize(
    "shape, heads, gated, message",
    [
        ((2, 12, 12), 1, False, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ((2, 3, 4, 36), 2, False, r"multiple of 3 \* num_heads \* 4 = 24"),
        ((2, 3, 4, 24), 1, True, r"\(B, H, W, 4C\) .* multiple of 4 \* num_heads \* 4 = 16"),
        ((2, 3, 4, 24), 0, False, "num_heads=0 must be positive"),
        ((2, 3, 4, 48), 1, False, r"rotary \(2, 6, 2\) must be .* D = 16"),
        ((2, 3, 7, 24), 1, False, r"6 positions, the map is 3 x 7: .*rotary_table\(theta, 7\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape, heads, gated, message):
    with pytest.raises(ValueError, match=message):
        rank_augmented_attention(torch.zeros(shape), table(8, 6), heads, gated=gated)


def test_an_addend_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"addend \(1, 3, 4, 24\) must be \(1, 3, 4, 8\)"):
        qkv = torch.zeros(1, 3, 4, 24)
        rank_augmented_attention(qkv, table(8, 6), 1, addend=torch.zeros(1, 3, 4, 24))
