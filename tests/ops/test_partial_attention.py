"""The op against its formula, its gradients, and every way of calling it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from backbones.ops import partial_attention, partial_attention_reference
from tests.support import golden

# batch, height, width, channels of the map, value channels; qk_dim is 16 unless said
SHAPES = [(2, 7, 7, 224, 48), (1, 4, 4, 320, 68), (3, 5, 3, 9, 9), (1, 1, 1, 40, 33)]


def maps(batch: int, height: int, width: int, channels: int, values: int, qk: int = 16):
    qkv = torch.from_numpy(golden.normal("qkv", (batch, height, width, 2 * qk + values)))
    return qkv, torch.from_numpy(golden.normal("x", (batch, height, width, channels)))


def by_hand(qkv: Tensor, x: Tensor, qk: int, scale: float) -> Tensor:
    """Token by token, straight from the paper."""
    out = x.clone()
    for b in range(len(x)):
        tokens = qkv[b].reshape(-1, qkv.shape[-1])
        q, k, v = tokens[:, :qk], tokens[:, qk : 2 * qk], tokens[:, 2 * qk :]
        rows = [((k * query).sum(1) * scale).softmax(0) @ v for query in q]
        out[b, ..., : v.shape[1]] = torch.stack(rows).view(*x.shape[1:3], -1)
    return out.clamp(min=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [partial_attention, partial_attention_reference])
def test_equals_the_formula(function, shape):
    qkv, x = maps(*shape)
    torch.testing.assert_close(function(qkv, x), by_hand(qkv, x, 16, 0.25), rtol=0, atol=1e-12)


def test_queries_are_taken_in_blocks_without_a_seam(monkeypatch):
    qkv, x = maps(2, 7, 9, 24, 20)
    qkv.requires_grad_()
    whole = partial_attention(qkv, x)
    (grad_whole,) = torch.autograd.grad(whole.square().sum(), qkv)
    monkeypatch.setattr(sys.modules["backbones.ops.partial_attention"], "_BLOCK_SCORES", 1000)
    blocks = partial_attention(qkv, x)
    (grad_blocks,) = torch.autograd.grad(blocks.square().sum(), qkv)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad_blocks, grad_whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [partial_attention, partial_attention_reference])
def test_other_query_width_and_scale(function):
    qkv, x = maps(2, 3, 5, 40, 12, qk=8)
    expected = by_hand(qkv, x, 8, 0.7)
    torch.testing.assert_close(function(qkv, x, 8, 0.7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 5, 9, 6), (1, 2, 2, 5, 5)])
def test_gradients(shape):
    inputs = tuple(t.requires_grad_() for t in maps(*shape, qk=4))
    assert torch.autograd.gradcheck(lambda qkv, x: partial_attention(qkv, x, 4), inputs)


def test_closed_form_backward_equals_autograd_of_the_reference():
    qkv, x = (t.requires_grad_() for t in maps(2, 7, 5, 30, 19))
    weight = torch.from_numpy(golden.normal("weight", x.shape))
    for op, reference in zip(
        torch.autograd.grad((partial_attention(qkv, x) * weight).sum(), (qkv, x)),
        torch.autograd.grad((partial_attention_reference(qkv, x) * weight).sum(), (qkv, x)),
        strict=True,
    ):
        torch.testing.assert_close(op, reference, rtol=0, atol=1e-12)


def test_gradients_are_deterministic_and_outputs_fully_written():
    qkv, x = (t.float().requires_grad_() for t in maps(2, 7, 5, 30, 19))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        runs = [torch.autograd.grad(partial_attention(qkv, x).sum(), (qkv, x)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last view", "channel slice"])
def test_opcheck(layout):
    qkv, x = maps(2, 3, 5, 9, 6, qk=4)
    if layout == "channels_last view":
        qkv, x = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (qkv, x))
    if layout == "channel slice":
        qkv, x = torch.cat([qkv, qkv], -1)[..., :14], torch.cat([x, x], -1)[..., 3:12]
    out, lse = torch.ops.backbones.partial_attention(qkv, x, 4, 0.5)
    grad = torch.ones_like(out)
    torch.library.opcheck(
        torch.ops.backbones.partial_attention.default,
        (qkv.clone().requires_grad_(), x.clone().requires_grad_(), 4, 0.5),
    )
    torch.library.opcheck(torch.ops.backbones.partial_attention.default, (qkv, x, 4, 0.5))
    torch.library.opcheck(
        torch.ops.backbones.partial_attention_backward.default, (grad, qkv, out, lse, 4, 0.5)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_gradients(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        partial_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for height in (5, 6):
        qkv, x = (t.requires_grad_() for t in maps(2, height, 4, 40, 20))
        out, expected = compiled(qkv, x), partial_attention(qkv, x)
        assert torch.equal(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.square().sum(), (qkv, x)),
            torch.autograd.grad(expected.square().sum(), (qkv, x)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_one_graph_serves_maps_of_one_tile_and_of_several():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(partial_attention, fullgraph=True, backend=backend, dynamic=True)
    for size in [(2, 10, 14), (3, 5, 7), (4, 9, 8)]:
        qkv, x = (t.requires_grad_() for t in maps(*size, 30, 19))
        assert torch.equal(compiled(qkv, x), partial_attention(qkv, x))
    assert len(graphs) == 1


def test_export_keeps_one_node():
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, x: Tensor) -> Tensor:
            return partial_attention(qkv, x)

    qkv, x = maps(2, 3, 5, 40, 20)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (qkv, x), dynamic_shapes=({0: batch}, {0: batch}))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {"backbones.partial_attention.default", "<built-in function getitem>"}
    qkv, x = maps(5, 3, 5, 40, 20)
    assert torch.equal(program.module()(qkv, x), partial_attention(qkv, x))


def test_scripts_and_traces():
    qkv, x = maps(2, 3, 5, 40, 20)
    expected = partial_attention(qkv, x)
    assert torch.equal(torch.jit.script(partial_attention)(qkv, x), expected)
    assert torch.equal(torch.jit.trace(partial_attention, (qkv, x))(qkv, x), expected)


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_leaves():
    qkv, x = (t.float().requires_grad_() for t in maps(2, 7, 7, 64, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = partial_attention(qkv, x)
    assert out.dtype == torch.bfloat16
    exact = partial_attention(qkv, x)
    assert (out - exact).norm() / exact.norm() < 1e-2
    grads = torch.autograd.grad(out.float().sum(), (qkv, x))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_16_bit_types_accumulate_in_float32(dtype, tolerance):
    qkv, x = maps(2, 14, 14, 64, 32)
    exact = partial_attention(qkv.to(dtype).double(), x.to(dtype).double())
    out = partial_attention(qkv.to(dtype), x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < tolerance


def test_reference_switch_allows_what_ops_do_not():
    qkv, x = maps(1, 2, 3, 40, 20)
    with ops.use_reference():
        assert ops.reference_in_use()
        out = torch.func.jvp(lambda t: partial_attention(t, x), (qkv,), (torch.ones_like(qkv),))[0]
    assert not ops.reference_in_use()
    torch.testing.assert_close(out, partial_attention(qkv, x), rtol=0, atol=1e-13)


def test_flops_are_those_of_the_reference():
    qkv, x = (t.requires_grad_() for t in maps(2, 7, 5, 30, 19))

    def count(function) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            out = function(qkv, x)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(partial_attention)
    reference_forward, reference_backward = count(partial_attention_reference)
    assert forward == reference_forward == 2 * 2 * 35 * 35 * (16 + 19)
    # the op computes the scores once more instead of keeping them
    assert backward == reference_backward + 2 * 2 * 35 * 35 * 16


def test_fvcore_counts_the_op():
    from fvcore.nn import FlopCountAnalysis

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, x: Tensor) -> Tensor:
            return partial_attention(qkv, x)

    analysis = FlopCountAnalysis(Module(), maps(2, 7, 5, 30, 19))
    analysis.tracer_warnings("none").unsupported_ops_warnings(False)
    assert analysis.set_op_handle(**ops.fvcore_handles()).total() == 2 * 35 * 35 * (16 + 19)


@pytest.mark.parametrize(
    "qkv, x, message",
    [
        ((2, 3, 5, 40), (2, 3, 4, 40), "NHWC maps of one batch and size"),
        ((2, 15, 40), (2, 15, 40), "NHWC maps of one batch and size"),
        ((2, 3, 5, 32), (2, 3, 5, 40), "between 33 and 72"),
        ((2, 3, 5, 73), (2, 3, 5, 40), "between 33 and 72"),
    ],
)
def test_shapes_that_do_not_fit_are_named(qkv, x, message):
    with pytest.raises(ValueError, match=message):
        partial_attention(torch.zeros(qkv), torch.zeros(x))


def test_types_that_do_not_fit_are_named():
    qkv, x = maps(1, 2, 3, 40, 20)
    with pytest.raises(ValueError, match=r"float64.*float32.*cast"):
        partial_attention(qkv, x.float())


def test_unknown_value_of_the_environment_variable_is_named():
    run = subprocess.run(
        [sys.executable, "-c", "import backbones.ops"],
        env={**os.environ, "BACKBONES_OPS": "fast"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "BACKBONES_OPS='fast' is not one of ('auto', 'reference')" in run.stderr
