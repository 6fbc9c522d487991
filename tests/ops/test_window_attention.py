"""The op against its definition, the official code, and every way of calling it."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
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


@pytest.mark.parametrize("layout", ["channels_last view", "channel slice", "channels first"])
def test_opcheck_of_strides_and_large_windows(layout):
    qkv, table, pad = (None if t is None else t.detach() for t in LARGE.inputs())
    if layout == "channels_last view":
        qkv = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "channel slice":
        qkv = torch.cat([qkv, qkv], -1)[..., 1 : 1 + qkv.shape[-1]]
    if layout == "channels first":
        qkv = qkv.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        qkv = qkv.contiguous().permute(0, 2, 3, 1)
    arguments = (LARGE.heads, *LARGE.window, LARGE.grid, LARGE.head_first, 0.3)
    forward = torch.ops.backbones.window_attention.default
    torch.library.opcheck(forward, (qkv.requires_grad_(), table, pad, *arguments))
    with torch.no_grad():
        out, lse = forward(qkv, table, pad, *arguments)
    assert lse.shape == (1, 10, 9, 2)
    torch.library.opcheck(
        torch.ops.backbones.window_attention_backward.default,
        (torch.ones_like(out), qkv.detach(), table, pad, out, lse, *arguments),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_gradients(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height in (5, 6):
        call = Call("", (2, height, 4), (2, 3), pad=True)
        inputs, weight = call.inputs(), call.weight()
        out, expected = compiled(TINY_OPTIONS, *inputs), TINY_OPTIONS(*inputs)
        assert torch.equal(out, expected)
        for a, b in zip(
            gradients(out, weight, inputs), gradients(expected, weight, inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# only its options are used, so that compiled code sees one object at all sizes
TINY_OPTIONS = Call("", (2, 5, 4), (2, 3), pad=True)


@pytest.mark.parametrize("window", [(2, 3), (9, 8)])
def test_one_graph_serves_all_sizes(window):
    torch._dynamo.reset()
    call = Call("", (1, 1, 1), window, heads=1, dim=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Call.__call__, fullgraph=True, backend=backend, dynamic=True)
    table = call.inputs()[1]
    for size in [(2, 10, 9), (3, 12, 16), (2, 7, 18), (5, 19, 8)]:
        qkv = torch.from_numpy(golden.normal("qkv", (*size, 6)))
        assert torch.equal(compiled(call, qkv, table, None), call(qkv, table, None))
    assert len(graphs) == 1


def test_export_keeps_one_node():
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, table: Tensor) -> Tensor:
            return CALLS[2](qkv, table, None)

    qkv, table, _ = CALLS[2].inputs()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        Module(),
        (torch.cat([qkv, qkv]).detach(), table.detach()),
        dynamic_shapes=({0: auto, 1: auto, 2: auto}, None),
    )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if "backbones" in t] == ["backbones.window_attention.default"]
    larger = torch.from_numpy(golden.normal("qkv", (3, 6, 8, 96)))
    expected = CALLS[2](larger, table, None)
    assert torch.equal(program.module()(larger, table.detach()), expected)


def test_scripts_and_traces():
    call = CALLS[5]
    inputs = call.inputs()
    expected = call(*inputs)
    qkv, table, pad = inputs
    scripted = torch.jit.script(window_attention)
    assert torch.equal(scripted(qkv, table, pad=pad, **call.options), expected)
    traced = torch.jit.trace(lambda *given: call(*given), tuple(inputs))
    assert torch.equal(traced(*inputs), expected)


def test_autocast_computes_in_its_type_and_leaves_the_table_alone():
    call = Call("", (2, 14, 10), (7, 7), pad=True)
    inputs = [t.detach().float().requires_grad_() for t in call.inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(*inputs)
    assert out.dtype == torch.bfloat16
    exact = call(*inputs)
    assert (out - exact).norm() / exact.norm() < 1e-2
    grads = gradients(out.float(), torch.ones_like(exact), inputs)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    # a rounded table would change the result
    qkv, table, pad = (t.detach() for t in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = call(qkv, table.bfloat16().float(), pad)
    assert not torch.equal(out, rounded)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_16_bit_types_accumulate_in_float32(dtype, tolerance):
    call = Call("", (2, 14, 10), (7, 7), pad=True)
    rounded = [t.detach().to(dtype) for t in call.inputs()]
    exact = call(*(t.double() for t in rounded))
    out = call(*rounded)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < tolerance


@each_call
def test_gradients_are_deterministic_and_outputs_fully_written(call):
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        inputs = [None if t is None else t.detach().float() for t in call.inputs()]
        for t in inputs:
            if t is not None:
                t.requires_grad_()
        runs = [gradients(call(*inputs), call.weight().float(), inputs) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


def test_an_empty_batch_passes():
    qkv = torch.zeros(0, 7, 9, 12, requires_grad=True)
    table = torch.zeros(2, 5, 5, requires_grad=True)
    out = window_attention(qkv, table, 2, (3, 3))
    assert out.shape == (0, 7, 9, 4)
    out.sum().backward()
    assert not table.grad.any()


def test_reference_switch_allows_what_ops_do_not():
    qkv, table, _ = CALLS[0].inputs()
    with ops.use_reference():
        out = torch.func.jvp(lambda t: CALLS[0](t, table, None), (qkv,), (torch.ones_like(qkv),))
    torch.testing.assert_close(out[0], CALLS[0](qkv, table, None), rtol=0, atol=1e-13)


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


def test_fvcore_counts_the_op():
    from fvcore.nn import FlopCountAnalysis

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, table: Tensor) -> Tensor:
            return CALLS[2](qkv, table, None)

    analysis = FlopCountAnalysis(Module(), tuple(CALLS[2].inputs()[:2]))
    analysis.tracer_warnings("none").unsupported_ops_warnings(False)
    count = analysis.set_op_handle(**ops.fvcore_handles()).by_operator()
    assert count["window_attention"] == 2 * 8 * 36 * 32


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


def test_needs_no_triton_on_the_cpu_and_says_so_elsewhere():
    code = """
import sys, torch
sys.modules["triton"] = None
from backbones.ops import window_attention
from backbones.ops import _common
print(window_attention(torch.zeros(1, 4, 4, 12), None, 2, (2, 2)).shape)
try:
    _common.kernels("window_attention", torch.zeros(1))
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True
    )
    assert "torch.Size([1, 4, 4, 4])" in run.stdout, run.stderr
    assert "window_attention on a cpu device needs Triton: pip install triton" in run.stdout
