"""Window attention against its definition and official code, and what is particular to it."""

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import window_attention, window_attention_reference
from tests.ops.windows import CALLS, Call, by_hand
from tests.support import golden

module = importlib.import_module("backbones.ops.window_attention")
TINY = Call("tiny", (1, 3, 4), (2, 3), heads=1, dim=2)
# more keys than one tile holds
LARGE = Call("large", (1, 10, 9), (9, 8), heads=2, dim=4, head_first=True)

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def gradients(out: Tensor, weight: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    present = [x for x in inputs if x is not None]
    return list(torch.autograd.grad((out * weight).sum(), present))


@each_call
@torch.no_grad()
def test_equals_the_definition(call):
    inputs = call.inputs()
    expected = by_hand(call, *inputs)
    torch.testing.assert_close(call(*inputs), expected, rtol=0, atol=1e-12)
    qkv, table, pad = inputs
    reference = window_attention_reference(qkv, table, pad=pad, **call.options)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "padded", "tiny_map", "ws12"])
def test_equals_the_official_code_of_l2vit(name):
    arrays = np.load(golden.GOLDEN / "op_l2vit_lwa.npz")
    (case,) = (c for c in golden.load("op_l2vit_lwa")["cases"] if c["name"] == name)
    b, h, w, c, heads, side = (case["shape"][k] for k in ("B", "H", "W", "C", "heads", "window"))
    shapes = {"qkv.weight": (3 * c, c), "qkv.bias": (3 * c,)}
    shapes |= {"proj.weight": (c, c), "proj.bias": (c,)}
    x = torch.from_numpy(golden.normal("op.x", (b, h * w, c))).requires_grad_()
    weights = {name: value.requires_grad_() for name, value in golden.state_dict(shapes).items()}

    qkv = torch.nn.functional.linear(x, weights["qkv.weight"], weights["qkv.bias"])
    attended = window_attention(
        qkv.unflatten(1, (h, w)), None, heads, (side, side), pad=weights["qkv.bias"]
    )
    out = torch.nn.functional.linear(
        attended.flatten(1, 2), weights["proj.weight"], weights["proj.bias"]
    )
    assert np.abs(out.detach().numpy() - arrays[f"{name}/out"]).max() < 1e-12
    out.backward(torch.from_numpy(arrays[f"{name}/dout"]))
    for key, value in {"x": x, **weights}.items():
        expected = arrays[f"{name}/grad_{key}"]
        assert np.abs(value.grad.numpy() - expected).max() < 1e-12 * np.abs(expected).max(), key


@each_call
def test_backward_equals_autograd_of_the_reference(call):
    inputs, weight = call.inputs(), call.weight()
    qkv, table, pad = inputs
    out = call(*inputs)
    reference = window_attention_reference(qkv, table, pad=pad, **call.options)
    for value, expected in zip(
        gradients(out, weight, inputs), gradients(reference, weight, inputs), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "call",
    [
        TINY,
        Call("padded", (1, 3, 4), (2, 3), heads=2, dim=1, pad=True, grid=True),
        Call("head first", (1, 2, 3), (2, 2), heads=2, dim=2, table=False, head_first=True),
    ],
    ids=lambda call: call.name,
)
def test_gradients(call):
    present = [x for x in call.inputs() if x is not None]
    names = [
        name
        for name, x in zip(("qkv", "table", "pad"), call.inputs(), strict=True)
        if x is not None
    ]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return call(given["qkv"], given.get("table"), given.get("pad"))

    assert torch.autograd.gradcheck(function, present)


def test_windows_are_taken_in_blocks_without_a_seam(monkeypatch):
    call = CALLS[3]
    whole = call(*call.inputs()), gradients(call(*(i := call.inputs())), call.weight(), i)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 200)
    inputs = call.inputs()
    out = call(*inputs)
    torch.testing.assert_close(out, whole[0], rtol=0, atol=1e-13)
    for value, expected in zip(gradients(out, call.weight(), inputs), whole[1], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", [64, 65])
def test_keeps_only_inputs_up_to_64_keys(keys):
    kept = []
    call = Call("", (1, 8, 8), (8, 8) if keys == 64 else (5, 13), heads=1, dim=2)
    qkv, table, _ = call.inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, id):
        call(qkv, table, None)
    assert set(kept) >= {qkv.data_ptr(), table.data_ptr()}
    assert len(kept) == (2 if keys == 64 else 4)


@each_call
def test_opcheck(call):
    qkv, table, pad = call.inputs()
    arguments = (call.heads, *call.window, call.grid, call.head_first, 0.3)
    forward = torch.ops.backbones.window_attention.default
    torch.library.opcheck(forward, (qkv, table, pad, *arguments))
    with torch.no_grad():
        out, _ = forward(qkv, table, pad, *arguments)
    backward = torch.ops.backbones.window_attention_backward.default
    detached = [None if t is None else t.detach() for t in (qkv, table, pad)]
    torch.library.opcheck(backward, (torch.ones_like(out), *detached, None, None, *arguments))


def test_autocast_leaves_the_table_alone():
    call = Call("", (2, 14, 10), (7, 7), pad=True)
    qkv, table, pad = (t.detach().float() for t in call.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(call(qkv, table, pad), call(qkv, table.bfloat16().float(), pad))


@pytest.mark.parametrize("call", [CALLS[0], CALLS[4], LARGE], ids=lambda call: call.name)
def test_flops_are_those_of_the_reference(call):
    def count(function) -> tuple[int, int]:
        qkv, table, pad = call.inputs()
        with FlopCounterMode(display=False) as forward:
            out = function(qkv, table, pad=pad, **call.options)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(window_attention)
    reference_forward, reference_backward = count(window_attention_reference)
    (p, q), (batch, height, width) = call.window, call.map_size
    windows = batch * -(-height // p) * -(-width // q)
    assert forward == reference_forward == 4 * windows * (p * q) ** 2 * call.heads * call.dim
    # the op computes the scores once more instead of keeping them
    assert backward == reference_backward + forward // 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": (2, 12, 12)}, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ({"qkv": (2, 3, 4, 16)}, "multiple of 3 \\* num_heads = 6"),
        ({"table": (2, 5, 5)}, r"table \(2, 5, 5\) must be \(2, 5, 7\)"),
        ({"pad": (13,)}, r"pad \(13,\) must be a vector of 12"),
        ({"num_heads": 0}, "num_heads=0 .* must be positive"),
        ({"window_size": (3, 0)}, r"window_size=\(3, 0\) must be positive"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    given = {"qkv": (2, 3, 4, 12), "table": (2, 5, 7), "pad": (12,)}
    given |= {"num_heads": 2, "window_size": (3, 4)} | change
    for name in ("qkv", "table", "pad"):
        given[name] = torch.zeros(given[name])
    with pytest.raises(ValueError, match=message):
        window_attention(**given)
