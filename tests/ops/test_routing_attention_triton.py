"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from backbones.ops import route_regions, routing_attention
from tests.ops.routes import Call
from tests.support.kernels import (
    DEVICE,
    INTERPRETED,
    check_cuda_graph,
    error,
    exact,
    needs_interpreter,
    poisoned,
    run,
    triton_kernels,
)

# lists of regions, then all tokens at once; `ops/triton/routing_attention.py` chooses
LISTED = [
    Call("16 tokens", (2, 12, 8), (3, 2), (4, 4), topk=4),
    Call("a block and more", (1, 10, 28), (2, 2), (5, 14), topk=2, dim=24),
    Call("all regions", (1, 8, 12), (2, 3), (4, 4), topk=6, heads=1, dim=32),
    Call("zeros", (1, 9, 13), (3, 4), (4, 5), topk=3, heads=1),
    Call("padded", (2, 6, 13), (2, 4), (4, 5), topk=3, heads=1, pad=True),
    Call("outside", (1, 6, 7), (3, 3), (4, 4), topk=5, dim=20, pad=True),
    Call("many small regions", (1, 5, 25), (5, 13), (1, 2), topk=3, heads=1),
]
DENSE = [
    Call("dense", (2, 14, 14), (7, 7), (2, 2), topk=16),
    Call("dense zeros", (2, 9, 13), (5, 5), (2, 3), topk=4, heads=1, dim=24),
    Call("dense padded", (2, 9, 13), (5, 5), (2, 3), topk=4, dim=20, pad=True),
    Call("dense outside", (1, 3, 5), (4, 4), (1, 2), topk=3, pad=True),
    Call("dense, bit 63", (1, 8, 16), (8, 8), (1, 2), topk=40, heads=1),
]
CALLS = LISTED + DENSE
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launcher():
    return importlib.import_module("backbones.ops.triton.routing_attention")


def leaves(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """Inputs on the device."""
    moved = [None if x is None else x.detach().to(DEVICE, dtype) for x in call.inputs()]
    return [None if x is None else x.requires_grad_() for x in moved]


def check(call: Call, dtype: torch.dtype) -> None:
    """Compare output and gradients of the kernels with float64."""
    inputs, weight = leaves(call, dtype), call.weight().to(DEVICE, dtype)
    results, expected = run("routing_attention", call, inputs, weight), exact(call, inputs, weight)
    assert {r.dtype for r in results} == {dtype}
    for value, wanted in zip(results, expected, strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


def test_calls_take_both_ways(launcher):
    for calls, expected in ((LISTED, False), (DENSE, True)):
        for call in calls:
            qkv, pad = call.inputs()
            at = launcher.Regions(*call.num_regions, *call.region_size)
            made = launcher._Call(qkv, call.regions(), pad, call.heads, at, 1.0)
            assert made.is_dense == expected, call.name


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(launcher, monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    with pytest.raises(pytest.fail.Exception, match="launched"):
        run(
            "routing_attention",
            CALLS[0],
            leaves(CALLS[0], torch.float32),
            CALLS[0].weight().float(),
        )


@needs_interpreter
@each_call
def test_interpreted(call):
    check(call, torch.float32)


@needs_interpreter
@pytest.mark.parametrize(
    "call", [CALLS[1], CALLS[4], DENSE[0], DENSE[2]], ids=lambda call: call.name
)
def test_interpreted_in_float16(call):
    check(call, torch.float16)


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other row"])
@pytest.mark.parametrize(
    "call",
    [
        Call("", (1, 6, 7), (2, 2), (4, 4), heads=1),
        Call("", (1, 5, 7), (3, 3), (2, 3), heads=1),
    ],
    ids=["listed", "dense"],
)
def test_strides(call, layout):
    qkv = call.inputs()[0].detach().float()
    if layout == "channels first":
        leaf = qkv.permute(0, 3, 1, 2).contiguous()
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        leaf = torch.cat([qkv, qkv], -1)
        view = lambda x: x[..., 5:53]  # noqa: E731
    else:
        leaf = qkv.repeat_interleave(2, 1).repeat_interleave(2, 2)
        view = lambda x: x[:, ::2, ::2]  # noqa: E731
    leaf.requires_grad_()

    def function(leaf: Tensor) -> Tensor:
        return call(view(leaf), None)

    weight = call.weight().float()
    results = run("routing_attention", function, [leaf], weight)
    for value, wanted in zip(results, exact(function, [leaf], weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[4], DENSE[2]], ids=lambda call: call.name)
def test_gradients_without_strides_and_choices_of_another_layout(call):
    inputs = leaves(call, torch.float32)
    # the choices that a slice of longer lists are
    regions = torch.cat([call.regions()] * 2, -1)[..., : call.topk]
    assert not regions.is_contiguous()

    def function(qkv: Tensor, pad: Tensor) -> Tensor:
        return routing_attention(qkv, regions, pad=pad, **call.options)

    # the gradient of a sum has strides of zero
    weight = torch.ones(())
    results = run("routing_attention", function, inputs, weight)
    for value, wanted in zip(results, exact(function, inputs, weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[4], DENSE[2]], ids=lambda call: call.name)
def test_pad_without_strides(call):
    qkv = leaves(call, torch.float32)[0]
    pad = torch.tensor(0.7).requires_grad_()

    def function(qkv: Tensor, pad: Tensor) -> Tensor:
        return call(qkv, pad.expand(qkv.shape[-1]))

    weight = call.weight().float()
    results = run("routing_attention", function, [qkv, pad], weight)
    for value, wanted in zip(results, exact(function, [qkv, pad], weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], DENSE[1]], ids=lambda call: call.name)
def test_regions_that_nobody_chose_have_no_gradient_of_keys_and_values(call):
    inputs = leaves(call, torch.float32)
    _, grad = run("routing_attention", call, inputs, call.weight().float())
    h, w = call.region_size
    unused = set(range(call.count)) - set(call.regions()[0].flatten().tolist())
    assert unused
    for region in unused:
        row, col = divmod(region, call.num_regions[1])
        part = grad[0, row * h : row * h + h, col * w : col * w + w, grad.shape[-1] // 3 :]
        assert not part.any() and part.isfinite().all()


@needs_interpreter
@pytest.mark.parametrize("pad", [False, True])
def test_an_empty_batch_passes(pad):
    for layout in [((2, 2), (4, 4)), ((3, 3), (2, 3))]:
        call = Call("", (0, 5, 7), *layout, pad=pad)
        results = run("routing_attention", call, leaves(call, torch.float32), torch.ones(()))
        assert results[0].shape == (0, 5, 7, 32)
        assert not any(r.any() for r in results)
        regions = route(results[1], 2, *layout, None)
        assert regions.shape == (0, layout[0][0] * layout[0][1], 2)


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    call = DENSE[2]
    inputs = [x.detach().float() for x in call.inputs()]
    regions = call.regions()

    def function(qkv: Tensor, pad: Tensor) -> Tensor:
        return routing_attention(qkv, regions, pad=pad, **call.options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with triton_kernels("routing_attention"):
        assert torch.equal(compiled(*inputs), function(*inputs))


def route(qkv: Tensor, *args) -> Tensor:
    """Choose regions by the kernel, wherever it runs."""
    module = sys.modules["backbones.ops.route_regions"]
    enabled = module._route.set_kernel_enabled("cpu", enabled=False)
    with poisoned(), enabled if INTERPRETED else nullcontext():
        return route_regions(qkv, *args)


def check_means(call: Call, dtype: torch.dtype) -> None:
    """Compare the means with those in float64, and the choices with those of the means."""
    module = sys.modules["backbones.ops.route_regions"]
    launch = importlib.import_module("backbones.ops.triton.route_regions")
    qkv, pad = (None if x is None else x.detach().to(DEVICE, dtype) for x in call.inputs())
    at = launch.Regions(*call.num_regions, *call.region_size)
    with poisoned():
        means = launch.region_means(qkv, pad, at)
    wide = [None if x is None else x.cpu().double() for x in (qkv, pad)]
    assert means.dtype == torch.float32
    assert error(means, module._means(*wide, at)) < 1e-6
    chosen = route(qkv, call.topk, call.num_regions, call.region_size, pad)
    assert torch.equal(chosen, module._best(means, call.topk))


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_means_interpreted(call, dtype):
    check_means(call, dtype)


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "every other row"])
def test_means_of_strided_maps(layout):
    qkv = torch.randn(2, 6, 7, 48)
    if layout == "channels first":
        view = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    else:
        view = qkv.repeat_interleave(2, 1)[:, ::2]
    launch = importlib.import_module("backbones.ops.triton.route_regions")
    at = launch.Regions(2, 2, 4, 4)
    assert torch.equal(launch.region_means(view, None, at), launch.region_means(qkv, None, at))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call("stage 1", (2, 56, 56), (7, 7), (8, 8), topk=1, dim=32),
        Call("stage 2", (2, 28, 28), (7, 7), (4, 4), topk=4, heads=4, dim=32),
        Call("stage 3", (2, 14, 14), (7, 7), (2, 2), topk=16, heads=8, dim=32),
        Call("detection", (1, 100, 152), (16, 16), (7, 10), topk=4, dim=32, pad=True),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    check(call, dtype)
    check_means(call, dtype)
    inputs, weight = leaves(call, dtype), call.weight().to("cuda", dtype)
    runs = [run("routing_attention", call, inputs, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[4], DENSE[2]], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    regions = call.regions().cuda()

    def function(qkv: Tensor, pad: Tensor) -> Tensor:
        return routing_attention(qkv, regions, pad=pad, **call.options)

    check_cuda_graph(function, leaves(call, torch.float16), call.weight().half().cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("region_size", [(4, 8), (1, 4)], ids=["listed", "dense"])
def test_offsets_beyond_31_bits(region_size):
    (h, w), channels = region_size, 16
    height, width = 8 * h, 8 * w
    batch = 2**31 // (height * width * 3 * channels) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(
        batch, height, width, 3 * channels, device="cuda", dtype=torch.bfloat16, generator=generator
    ).requires_grad_()
    assert qkv.numel() > 2**31
    regions = route_regions(qkv, 2, (8, 8), region_size)
    out = routing_attention(qkv, regions, 1, (8, 8), region_size)
    out.backward(torch.ones_like(out))
    # the last image, alone
    last = qkv.detach()[-1:].clone().requires_grad_()
    alone = routing_attention(last, regions[-1:], 1, (8, 8), region_size)
    alone.backward(torch.ones_like(alone))
    assert torch.equal(regions[-1:], route_regions(last, 2, (8, 8), region_size))
    assert torch.equal(out[-1:], alone)
    assert torch.equal(qkv.grad[-1:], last.grad)
