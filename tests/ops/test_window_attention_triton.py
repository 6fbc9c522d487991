"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib

import pytest
import torch
from torch import Tensor

from backbones.ops import window_attention
from tests.ops.windows import Call
from tests.support.kernels import (
    DEVICE,
    check_cuda_graph,
    error,
    exact,
    needs_interpreter,
    run,
    triton_kernels,
)

# one tile of 16, 32, 64 tokens; several; all of `ops/triton/window_attention.py`
CALLS = [
    Call("block", (2, 14, 7), (7, 7), dim=32),
    Call("grid", (2, 8, 8), (4, 4), grid=True, head_first=True),
    Call("hidden", (1, 9, 10), (5, 5), dim=24, head_first=True),
    Call("hidden grid", (2, 5, 9), (4, 3), grid=True),
    Call("padded", (2, 5, 9), (3, 5), dim=20, table=False, pad=True),
    Call("padded grid", (1, 5, 7), (4, 4), grid=True, pad=True),
    Call("tiled", (1, 8, 18), (8, 9), grid=True),
    Call("tiled hidden", (1, 9, 9), (8, 9), heads=1, head_first=True),
    Call("tiled padded", (1, 9, 9), (8, 9), heads=1, pad=True),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launcher(monkeypatch):
    """The launcher, with so few programs that each serves several windows."""
    monkeypatch.setattr(
        importlib.import_module("backbones.ops.triton._launch"), "_MULTIPROCESSORS", 1
    )
    return importlib.import_module("backbones.ops.triton.window_attention")


def check(call: Call, dtype: torch.dtype) -> None:
    """Compare output and gradients of the kernels with float64."""
    inputs = [
        None if x is None else x.detach().to(DEVICE, torch.float32 if i == 1 else dtype)
        for i, x in enumerate(call.inputs())
    ]
    for x in inputs:
        if x is not None:
            x.requires_grad_()
    weight = call.weight().to(DEVICE, dtype)
    results, expected = run("window_attention", call, inputs, weight), exact(call, inputs, weight)
    leaves = [x for x in inputs if x is not None]
    assert [r.dtype for r in results] == [dtype, *(x.dtype for x in leaves)]
    for value, wanted in zip(results, expected, strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(launcher, monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    inputs = [x.detach().float().requires_grad_() for x in CALLS[5].inputs()]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        run("window_attention", CALLS[5], inputs, CALLS[5].weight().float())


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted(launcher, call, dtype):
    check(call, dtype)


@needs_interpreter
@pytest.mark.parametrize("pad", [False, True])
def test_windows_beyond_all_queries(launcher, monkeypatch, pad):
    """The path of windows of more than 256 tokens, on smaller ones."""
    monkeypatch.setattr(launcher, "_ALL_QUERIES", 64)
    for tile in ("forward_tile", "queries_tile"):
        monkeypatch.setattr(launcher, tile, lambda *_: launcher.Tile(32, 16, 4))
    monkeypatch.setattr(launcher, "bias_tile", lambda: launcher.Tile(32, 64, 4))
    check(Call("", (1, 9, 9), (8, 9), heads=1, grid=not pad, pad=pad), torch.float32)


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other row"])
def test_strides(launcher, layout):
    call = Call("", (1, 5, 7), (3, 4), heads=1)
    qkv, table, _ = (None if x is None else x.detach().float() for x in call.inputs())
    if layout == "channels first":
        leaf = qkv.permute(0, 3, 1, 2).contiguous()
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        leaf = torch.cat([qkv, qkv], -1)
        view = lambda x: x[..., 5:53]  # noqa: E731
    else:
        leaf = torch.cat([qkv, qkv], 1).repeat_interleave(2, 2)
        view = lambda x: x[:, ::2, ::2]  # noqa: E731
        call = Call("", tuple(view(leaf).shape[:3]), (3, 4), heads=1)
    leaf.requires_grad_()
    wide = table.requires_grad_()

    def function(leaf: Tensor, table: Tensor) -> Tensor:
        return call(view(leaf), table, None)

    weight = call.weight().float()
    results = run("window_attention", function, [leaf, wide], weight)
    for value, wanted in zip(results, exact(function, [leaf, wide], weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
def test_gradients_without_strides_and_a_table_of_another_layout_and_type(launcher):
    call = Call("", (1, 6, 8), (3, 4), heads=2)
    qkv, table, _ = call.inputs()
    leaves = [
        qkv.detach().float().requires_grad_(),
        table.detach().half().permute(1, 2, 0).contiguous().requires_grad_(),
    ]

    def function(qkv: Tensor, table: Tensor) -> Tensor:
        return call(qkv, table.permute(2, 0, 1), None)

    # the gradient of a sum has strides of zero
    weight = torch.ones(())
    results = run("window_attention", function, leaves, weight)
    assert results[2].dtype == torch.float16
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < (1e-3 if value.dtype == torch.float16 else 1e-5)


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[3], CALLS[8]], ids=lambda call: call.name)
def test_deterministic(launcher, call):
    inputs = [None if x is None else x.detach().float().requires_grad_() for x in call.inputs()]
    runs = [run("window_attention", call, inputs, call.weight().float()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
def test_an_empty_batch_passes(launcher):
    qkv, table = torch.zeros(0, 7, 9, 12, requires_grad=True), torch.zeros(2, 5, 5)
    table.requires_grad_()
    with triton_kernels("window_attention"):
        window_attention(qkv, table, 2, (3, 3)).sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert not table.grad.any()


@needs_interpreter
def test_compiles_whole(launcher):
    torch._dynamo.reset()
    call = CALLS[3]
    inputs = [None if x is None else x.detach().float() for x in call.inputs()]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    with triton_kernels("window_attention"):
        assert torch.equal(compiled(call, *inputs), call(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call("144", (2, 24, 36), (12, 12), dim=32),
        Call("256", (1, 20, 33), (16, 16), dim=32, grid=True),
        Call("950", (1, 50, 40), (25, 38), dim=32),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    check(call, dtype)
    inputs = [None if x is None else x.detach().to("cuda", dtype) for x in call.inputs()]
    for x in inputs:
        if x is not None:
            x.requires_grad_()
    weight = call.weight().to("cuda", dtype)
    runs = [run("window_attention", call, inputs, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[0], CALLS[8]], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    inputs = [
        None if x is None else x.detach().half().cuda().requires_grad_() for x in call.inputs()
    ]
    check_cuda_graph(call, inputs, call.weight().half().cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(7, 7), (8, 9)])
def test_offsets_beyond_31_bits(window):
    height = 72 * window[0]
    width = 2**31 // (height * 48) // window[1] * window[1] + 2 * window[1]
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(
        1, height, width, 48, device="cuda", dtype=torch.bfloat16, generator=generator
    ).requires_grad_()
    assert qkv.numel() > 2**31
    out = window_attention(qkv, None, 1, window)
    out.backward(torch.ones_like(out))
    # the last windows, alone
    corner = qkv.detach()[:, -window[0] :, -window[1] :].clone().requires_grad_()
    alone = window_attention(corner, None, 1, window)
    alone.backward(torch.ones_like(alone))
    assert torch.equal(out[:, -window[0] :, -window[1] :], alone)
    assert torch.equal(qkv.grad[:, -window[0] :, -window[1] :], corner.grad)
