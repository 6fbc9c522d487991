"""Dynamic mixing against its definition and official code, and what is particular."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import _mixing, dynamic_mixing, dynamic_mixing_reference
from backbones.ops._neighborhood import own_slots, window_starts
from tests.support import golden

CASES = golden.load("op_contmix")["contmix_core"]
OPERATOR = torch.ops.backbones.dynamic_mixing

each_function = pytest.mark.parametrize("function", [dynamic_mixing, dynamic_mixing_reference])


def leaves(
    size: tuple[int, int, int], heads: int, dim: int, small: int, large: int
) -> tuple[Tensor, ...]:
    """The six arguments, random, in float64."""
    slots, channels = small**2 + large**2, heads * dim
    shapes = {
        "query": (*size, channels),
        "kernel": (size[0], heads, dim, slots),
        "value": (*size, 2 * channels),
        "bias": (slots,),
        "table_small": (heads, 2 * small - 1, 2 * small - 1),
        "table_large": (heads, 2 * large - 1, 2 * large - 1),
    }
    return tuple(
        torch.from_numpy(golden.normal(name, shape)).requires_grad_()
        for name, shape in shapes.items()
    )


def gradients(function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and gradients of all arguments."""
    out = function(*tensors)
    weight = torch.from_numpy(golden.normal("weight", tuple(out.shape))).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors)]


def by_hand(
    query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, small: Tensor, large: Tensor
) -> Tensor:
    """Pixel by pixel and head by head."""
    batch, height, width, channels = value.shape
    heads, dim = kernel.shape[1:3]
    out = torch.zeros_like(value)
    for b, y, x, g in itertools.product(*map(range, (batch, height, width, heads))):
        logits = query[b, y, x, g * dim : (g + 1) * dim] @ kernel[b, g] + bias
        first = 0
        for half, table in enumerate((small, large)):
            size = (table.shape[-1] + 1) // 2
            top, left = (min(max(i - size // 2, 0), n - size) for i, n in ((y, height), (x, width)))
            rows = slice(top - y + size - 1, top - y + 2 * size - 1)
            cols = slice(left - x + size - 1, left - x + 2 * size - 1)
            weights = logits[first : first + size**2].view(size, size) + table[g, rows, cols]
            weights = weights.flatten().softmax(0)
            first += size**2
            channel = half * channels // 2 + g * dim
            at = slice(channel, channel + dim)
            window = value[b, top : top + size, left : left + size, at].flatten(0, 1)
            out[b, y, x, at] = weights @ window
    return out


@each_function
@pytest.mark.parametrize("sizes", [(3, 5), (5, 5), (5, 3)])
def test_equals_the_definition(function, sizes):
    tensors = [t.detach() for t in leaves((2, 6, 9), 2, 3, *sizes)]
    torch.testing.assert_close(function(*tensors), by_hand(*tensors), rtol=0, atol=1e-13)


def official_inputs(case: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a golden case: maps `(B, C, H, W)`, keys and the matrix for kernels."""
    inputs = {
        name: torch.from_numpy(golden.normal(f"{case['case']}.{name}", shape))
        for name, shape in case["inputs"].items()
    }
    inputs["query"] *= (inputs["query"].shape[1] / case["heads"] * 2) ** -0.5
    inputs["weight"] /= 7
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_equals_the_official_code_with_gradients(case, dtype, tolerance):
    stored, name = load_file(golden.GOLDEN / "op_contmix.safetensors"), case["case"]
    inputs = official_inputs(case, dtype)
    query, value = (inputs[n].permute(0, 2, 3, 1) for n in ("query", "value"))
    # (B, G, D, 49) of the keys of 49 regions, and from them the generated kernels
    keys = inputs["key"].flatten(2).unflatten(1, (case["heads"], -1))
    small = (inputs[n] for n in ("bias", "rpb1", "rpb2"))
    out = dynamic_mixing(query, keys @ inputs["weight"].mT, value, *small).permute(0, 3, 1, 2)
    cotangent = torch.from_numpy(golden.normal(case["grad_out"], tuple(out.shape))).to(dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent)
    results = {"out": out} | {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True)}
    for key, result in results.items():
        golden.check_summary(result, case[key], tolerance)
        if f"{name}/{key}" in stored:
            wanted = stored[f"{name}/{key}"]
            result = golden.kept(result, wanted)
            assert (result - wanted).abs().max() < tolerance * wanted.abs().max(), key


# windows of the whole map, of few and of many starts; several rectangles and blocks of images
@pytest.mark.parametrize(
    "size, heads, dim, small, large",
    [
        ((2, 7, 7), 2, 14, 5, 7),
        ((3, 5, 8), 1, 3, 3, 5),
        ((2, 13, 17), 3, 10, 5, 11),
        ((5, 9, 26), 2, 8, 3, 7),
    ],
)
def test_backward_equals_autograd_of_the_reference(monkeypatch, size, heads, dim, small, large):
    monkeypatch.setattr(_mixing, "_BLOCK", 1 << 14)
    tensors = leaves(size, heads, dim, small, large)
    results = (gradients(f, tensors) for f in (dynamic_mixing, dynamic_mixing_reference))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length, size", [(5, 5), (6, 5), (7, 5), (19, 5), (38, 13)])
def test_segments_are_the_windows(length, size):
    starts, own = window_starts(length, size), own_slots(length, size)
    found = _mixing.segments(length, size, 4)
    positions = [i for s in found for i in range(s.first, s.first + s.length)]
    assert positions == list(range(length))
    for s in found:
        counted = torch.arange(s.length)
        assert torch.equal(starts[s.positions], s.start + s.step * counted)
        assert own[s.positions].unique().tolist() == list(range(s.own.start, s.own.stop))
        assert s.reach(size) == slice(int(starts[s.first]), int(starts[s.positions][-1]) + size)


@pytest.mark.parametrize("shape", [(5, 5), (6, 9), (12, 5)])
def test_fold_sums_what_the_table_and_the_bias_gave(shape):
    """Of pixels or of own slots: autograd of how the reference adds them."""
    height, width, size = *shape, 5
    query = torch.zeros(1, height, width, 2, dtype=torch.float64)
    table, bias = (torch.zeros(s, dtype=torch.float64) for s in ((2, 9, 9), (25,)))
    added = _mixing.expand(table.requires_grad_(), bias.requires_grad_())
    rows, cols = own_slots(height, size), own_slots(width, size)
    weight = torch.from_numpy(golden.normal("weight", (2, height, width, 25)))
    pixels = added[:, rows[:, None], cols[None, :]]
    expected = torch.autograd.grad((pixels * weight).sum(), (table, bias, added))
    assert query.shape[1:3] == shape
    for given in (weight, expected[2]):
        for value, wanted in zip(_mixing.fold(given), expected, strict=False):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)


def test_large_logits_stay_finite():
    tensors = [t.detach() for t in leaves((1, 6, 7), 1, 8, 3, 5)]
    tensors[0] *= 1e3
    assert all(x.isfinite().all() for x in gradients(dynamic_mixing, _require(tensors)))


def _require(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def test_autocast_leaves_bias_and_tables_alone():
    tensors = [t.detach().float() for t in leaves((1, 6, 7), 2, 8, 3, 5)]
    rounded = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dynamic_mixing(*tensors)
    assert torch.equal(out, dynamic_mixing(*rounded[:3], *tensors[3:]))
    assert not torch.equal(out, dynamic_mixing(*rounded[:3], *(t.float() for t in rounded[3:])))


def test_keeps_its_arguments_and_little_else():
    kept = []
    tensors = leaves((1, 6, 7), 2, 4, 3, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
        out = dynamic_mixing(*tensors)
    assert kept == [*(t.shape for t in tensors), out.shape, (2, 1, 2, 6, 7)]


def test_the_logsumexp_is_that_of_the_logits():
    query, kernel, value, bias, *tables = (t.detach() for t in leaves((2, 5, 6), 1, 4, 3, 5))
    lse = OPERATOR(query, kernel, value, bias, *(0 * t for t in tables))[1]
    logits = torch.einsum("bhwd,bgds->bghws", query, kernel) + bias
    for part, expected in zip(lse, logits.split((9, 25), -1), strict=True):
        torch.testing.assert_close(part, expected.logsumexp(-1), rtol=0, atol=1e-13)


def test_costs_the_logits_once_more_than_autograd():
    tensors, counts = leaves((2, 6, 7), 2, 8, 3, 5), []
    for function in (dynamic_mixing, dynamic_mixing_reference):
        out = function(*tensors)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append(counter.get_total_flops())
    product = 2 * 2 * 42 * 16 * (9 + 25)
    assert counts == [5 * product, 4 * product]


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("value", (2, 6, 7), r"value \(2, 6, 7\) must be a map \(B, H, W, C\)"),
        ("value", (2, 6, 7, 15), r"query \(2, 6, 7, 8\) must be \(2, 6, 7, 7\)"),
        ("query", (2, 6, 8, 8), r"query \(2, 6, 8, 8\) must be \(2, 6, 7, 8\), for value"),
        ("kernel", (2, 2, 4, 33), r"kernel \(2, 2, 4, 33\) must be \(2, 2, 4, 34\), .*\[3, 5\]"),
        ("kernel", (1, 2, 4, 34), r"kernel \(1, 2, 4, 34\) must be \(2, 2, 4, 34\)"),
        ("bias", (35,), r"bias \(35,\) must be \(34,\)"),
        ("table_small", (2, 5, 9), r"table \(2, 5, 9\) must be \(2, 2K - 1, 2K - 1\)"),
        ("table_large", (2, 7, 7), r"table \(2, 7, 7\) must be .* an odd size K"),
        ("table_large", (3, 9, 9), r"table \(3, 9, 9\) must be \(2, 2K - 1, 2K - 1\), for heads"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, message):
    names = ["query", "kernel", "value", "bias", "table_small", "table_large"]
    tensors = dict(zip(names, leaves((2, 6, 7), 2, 4, 3, 5), strict=True))
    with pytest.raises(ValueError, match=message):
        dynamic_mixing(**{**tensors, name: torch.zeros(shape)})


def test_a_map_smaller_than_the_windows_is_named():
    with pytest.raises(ValueError, match=r"value \(1, 4, 7, 8\) must have 5 rows .* enlarge"):
        dynamic_mixing(*leaves((1, 4, 7), 1, 4, 3, 5))
