"""What holds for every op: its gradients, and every way of calling it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from tests.ops.examples import EXAMPLES, Example, gradients, joined

SIZE = (2, 4, 5)

each_op = pytest.mark.parametrize("example", EXAMPLES, ids=str)


def close(values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance)


def of_tensors(function, argument: Any) -> Any:
    """What a function makes of a tensor of numbers, or of a list of them; else the argument."""
    if isinstance(argument, list):
        return [of_tensors(function, a) for a in argument]
    differentiable = isinstance(argument, Tensor) and argument.is_floating_point()
    return function(argument) if differentiable else argument


class Calls(TorchDispatchMode):
    """Records the calls of this package's operators; the tensors without their history."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "backbones":
            self.calls.append((func, [of_tensors(Tensor.detach, a) for a in args]))
        return func(*args, **(kwargs or {}))


@each_op
def test_equals_its_reference_with_gradients(example):
    tensors = example.tensors(SIZE)
    out, expected = example(tensors), example.reference(tensors)
    close([out], [expected], 1e-12)
    close(gradients(out, tensors), gradients(expected, tensors), 1e-11)


@each_op
def test_gradients(example):
    tensors = example.tensors((1, 2, 2))

    def function(*values: Tensor) -> Tensor:
        return example(dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@each_op
@pytest.mark.parametrize("layout", ["contiguous", "channels first", "channel slice"])
def test_opcheck(example, layout):
    views = {
        "contiguous": lambda t: t,
        "channels first": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
        "channel slice": lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]],
    }
    tensors = {
        name: (views[layout](t.detach()) if t.ndim >= 4 else t.detach()).requires_grad_()
        for name, t in example.tensors(SIZE).items()
    }
    with Calls() as recorded:
        gradients(example(tensors), tensors)
    names = [str(operator) for operator, _ in recorded.calls]
    assert names[:2] == [f"backbones.{example.op}{part}.default" for part in ("", "_backward")]
    (forward, arguments), *backward = recorded.calls
    for operator, grad_arguments in backward:
        torch.library.opcheck(operator, grad_arguments)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(forward, [of_tensors(Tensor.requires_grad_, a) for a in arguments])


@each_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_gradients(example, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Example.__call__, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height in (5, 6):
        tensors = example.tensors((2, height, 4))
        out, expected = compiled(example, tensors), example(tensors)
        assert torch.equal(out, expected)
        close(gradients(out, tensors), gradients(expected, tensors), 1e-12)


@each_op
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_all_sizes(example, training):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Example.__call__, fullgraph=True, backend=backend, dynamic=True)
    # no number of the first is also a number of channels: it would be taken for the same
    for size in [(8, 10, 14), (3, 12, 16), (2, 7, 18), (5, 19, 8)]:
        tensors = example.tensors(size)
        if not training:
            tensors = {name: t.detach() for name, t in tensors.items()}
        assert torch.equal(compiled(example, tensors), example(tensors))
    assert len(graphs) == 1


@each_op
def test_export_keeps_one_node(example):
    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Tensor:
            return example(tensors)

    tensors, larger = (
        {name: t.detach() for name, t in example.tensors(size).items()}
        for size in (SIZE, (3, 6, 8))
    )
    auto = torch.export.Dim.AUTO
    dynamic = {
        name: {i: auto for i, n in enumerate(t.shape) if n != larger[name].shape[i]}
        for name, t in tensors.items()
    }
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=(dynamic,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    named = [target for target in targets if "backbones" in target]
    assert named == [f"backbones.{example.op}.default"]
    assert torch.equal(program.module()(larger), example(larger))


@each_op
def test_scripts_and_traces(example):
    tensors = example.tensors(SIZE)
    expected = example(tensors)
    scripted = torch.jit.script(example.public)
    assert torch.equal(joined(scripted(**example.arguments(tensors))), expected)

    def function(*values: Tensor) -> Tensor:
        return example(dict(zip(tensors, values, strict=True)))

    traced = torch.jit.trace(function, tuple(tensors.values()))
    assert torch.equal(traced(*tensors.values()), expected)


@each_op
def test_autocast_computes_in_its_type_and_returns_gradients_in_the_leaves(example):
    tensors = example.tensors((2, 14, 10), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = example(tensors)
    assert out.dtype == (torch.float32 if example.keeps_type else torch.bfloat16)
    exact = example(tensors)
    assert (out - exact).norm() / exact.norm() < 2e-2
    assert {g.dtype for g in gradients(out.float(), tensors)} == {torch.float32}


@each_op
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_16_bit_types_accumulate_in_float32(example, dtype, tolerance):
    rounded = {name: t.detach().to(dtype) for name, t in example.tensors((2, 14, 10)).items()}
    exact = example({name: t.double() for name, t in rounded.items()})
    out = example(rounded)
    assert out.dtype == (torch.float32 if example.wide else dtype)
    assert (out.double() - exact).norm() / exact.norm() < tolerance


@each_op
def test_gradients_are_deterministic_and_outputs_fully_written(example):
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        tensors = example.tensors(SIZE, torch.float32)
        runs = [gradients(example(tensors), tensors) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@each_op
def test_an_empty_batch_passes(example):
    tensors = example.tensors((0, 7, 9))
    out = example(tensors)
    assert out.shape == example.reference(tensors).shape
    assert not any(g.any() for g in gradients(out, tensors))


@each_op
def test_reference_switch_allows_what_ops_do_not(example):
    tensors = example.tensors(SIZE)
    name, first = next(iter(tensors.items()))
    with ops.use_reference():
        assert ops.reference_in_use()
        out, _ = torch.func.jvp(lambda t: example({**tensors, name: t}), (first,), (first,))
    assert not ops.reference_in_use()
    close([out], [example(tensors)], 1e-13)


@each_op
def test_flops_are_those_of_the_reference(example):
    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            # with stride 2 the reference computes a row too many of even sizes
            function(example.tensors((2, 5, 7)))
        return counter.get_total_flops()

    assert count(example) == count(example.reference) > 0


@each_op
def test_fvcore_counts_the_op(example):
    from fvcore.nn import FlopCountAnalysis

    names = list(example.tensors(SIZE))

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return example(dict(zip(names, values, strict=True)))

    analysis = FlopCountAnalysis(Module(), tuple(example.tensors(SIZE).values()))
    analysis.tracer_warnings("none").unsupported_ops_warnings(False)
    with FlopCounterMode(display=False) as counter:
        example(example.tensors(SIZE))
    counted = analysis.set_op_handle(**ops.fvcore_handles()).by_operator()
    assert counted[example.op] == counter.get_total_flops() // 2


def test_needs_no_triton_on_the_cpu_and_says_so_elsewhere():
    code = """
import sys, torch
sys.modules["triton"] = None
from tests.ops.examples import EXAMPLES
from backbones.ops import _common
for example in EXAMPLES:
    assert example(example.tensors((1, 2, 2))).isfinite().all()
    name = example.kernels or example.op
    try:
        _common.kernels(name, torch.zeros(1))
    except RuntimeError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == len(EXAMPLES), run.stderr
    for example, line in zip(EXAMPLES, lines, strict=True):
        assert (
            f"{example.kernels or example.op} on a cpu device needs Triton: pip install triton"
            in line
        )


def test_unknown_value_of_the_environment_variable_is_named():
    run = subprocess.run(
        [sys.executable, "-c", "import backbones.ops"],
        env={**os.environ, "BACKBONES_OPS": "fast"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "BACKBONES_OPS='fast' is not one of ('auto', 'reference')" in run.stderr
