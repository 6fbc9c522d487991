"""Rotary position encoding, in the softmax attention of RAVLT's late stages."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from backbones.ops import apply_rotary, rotary_table
from tests.support import golden

CASES = golden.load("op_vanilla_rope")["cases"]


def heads_last(x: Tensor, heads: int) -> Tensor:
    """A map `(B, H, W, heads, D)` of the official `(B, C, H, W)`."""
    return x.permute(0, 2, 3, 1).unflatten(-1, (heads, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, heads: int) -> Tensor:
    """Softmax attention of planes with turned queries and keys."""
    q, k, v = (heads_last(x, heads) for x in (q, k, v))
    turned = apply_rotary(q, rotary), apply_rotary(k, rotary), v
    tokens = (x.flatten(1, 2).transpose(1, 2) for x in turned)
    out = F.scaled_dot_product_attention(*tokens)
    return out.transpose(1, 2).flatten(2).unflatten(1, q.shape[1:3]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_equals_the_official_attention_with_gradients(case):
    expected = load_file(golden.GOLDEN / "op_vanilla_rope.safetensors")
    name, shape = case["id"], (case["B"], case["heads"] * case["head_dim"], case["H"], case["W"])
    leaves = {
        part: torch.from_numpy(golden.normal(f"op_vanilla_rope/{name}/{part}", shape))
        for part in ("q", "k", "v", "cotangent")
    }
    cotangent = leaves.pop("cotangent")
    theta = torch.tensor(case["angle"], dtype=torch.float64)[::2]
    rotary = rotary_table(theta, max(shape[2:]))
    parts = [leaf.requires_grad_() for leaf in leaves.values()]
    out = attention(*parts, rotary, case["heads"])
    grads = torch.autograd.grad(out, parts, cotangent)
    for value, key in zip([out, *grads], ["out", "dq", "dk", "dv"], strict=True):
        wanted = expected[f"{name}.{key}"]
        assert (golden.kept(value, wanted) - wanted).abs().max() < 1e-8 * wanted.abs().max()


def test_turns_pairs_by_row_and_by_column():
    x = torch.from_numpy(golden.normal("x", (2, 3, 5, 2, 8)))
    theta = torch.tensor([0.7, 0.1], dtype=torch.float64)
    turned = torch.view_as_complex(apply_rotary(x, rotary_table(theta, 6)).unflatten(-1, (4, 2)))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    for y in range(3):
        for column in range(5):
            angles = torch.cat([y * theta, column * theta])
            expected = pairs[:, y, column] * torch.polar(torch.ones_like(angles), angles)
            torch.testing.assert_close(turned[:, y, column], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_table_is_float32_and_the_map_keeps_its_type(dtype):
    table = rotary_table(torch.tensor([1.0, 1e-2]).to(dtype), 300)
    assert table.dtype == torch.float32
    assert apply_rotary(torch.ones(1, 2, 300, 1, 8, dtype=dtype), table).dtype == dtype


def test_autocast_leaves_the_angles_alone():
    theta = torch.tensor([1.0, 1e-2])
    expected = rotary_table(theta, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotary_table(theta, 300), expected)


def test_scripts_and_traces():
    x, theta = torch.randn(2, 4, 3, 2, 8), torch.tensor([1.0, 0.1])

    def function(x: Tensor, theta: Tensor) -> Tensor:
        return apply_rotary(x, rotary_table(theta, 4))

    expected = function(x, theta)
    # products of complex numbers, which eager CPU code takes, round once less
    torch.testing.assert_close(torch.jit.script(function)(x, theta), expected)
    torch.testing.assert_close(torch.jit.trace(function, (x, theta))(x, theta), expected)


@pytest.mark.parametrize(
    "dim, table, message",
    [
        (8, (2, 4, 2), r"rotary has 4 positions, the map is 3 x 5: .*rotary_table\(theta, 5\)"),
        (8, (2, 5, 4), r"rotary \(2, 5, 4\) must be \(2, S, D / 4\) for heads of D = 8"),
        (8, (5, 2), r"rotary \(5, 2\) must be"),
        (6, (2, 5, 1), "D = 6 channels, a multiple of 4"),
    ],
)
def test_tables_that_do_not_fit_are_named(dim, table, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(1, 3, 5, 1, dim), torch.zeros(table))
