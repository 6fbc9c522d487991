"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import neighborhood_attention
from tests.support import golden
from tests.support.kernels import (
    DEVICE,
    check_cuda_graph,
    error,
    exact,
    needs_interpreter,
    run,
    triton_kernels,
)

OP = "neighborhood_attention"
DIAGONALS = ((3, 3), (3, -3), (-3, 3), (-3, -3))
Pair = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    map_size: tuple[int, int, int]
    size: Pair
    dilation: Pair = (1, 1)
    heads: int = 1
    dim: int = 8
    boundary: str = "zero"
    shifts: tuple[Pair, ...] = ()

    @property
    def name(self) -> str:
        """Sizes of the map and the windows, heads, boundary, shifts."""
        sizes = ("x".join(map(str, size)) for size in (self.map_size, self.size, self.dilation))
        shifted = f"{len(self.shifts)} shifts"
        return " ".join([*sizes, f"{self.heads}x{self.dim}", self.boundary, shifted])

    def leaf(self, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """The packed map, on `DEVICE`."""
        values = golden.normal("qkv", (*self.map_size, 3 * self.heads * self.dim))
        return (factor * torch.from_numpy(values)).to(DEVICE, dtype).requires_grad_()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        values = golden.normal("weight", (*self.map_size, self.heads * self.dim))
        return torch.from_numpy(values).to(DEVICE, dtype)

    def __call__(self, qkv: Tensor) -> Tensor:
        """Call the op."""
        options = {"boundary": self.boundary, "shifts": list(self.shifts)}
        return neighborhood_attention(qkv, self.heads, self.size, self.dilation, **options)


# windows of more than 9 columns take several blocks, and those of 7 that are clamped on a map of 22
# do in the backward pass; heads of more than 64 channels (float32) are taken in parts
CALLS = [
    Call((2, 9, 11), (3, 3), heads=2, dim=32),
    Call((1, 13, 17), (7, 7), heads=2, shifts=DIAGONALS[:2]),
    Call((1, 9, 11), (5, 5), (2, 2), dim=64),
    Call((1, 9, 23), (5, 1), (2, 3), dim=1),
    Call((1, 9, 23), (1, 5), (1, 3), dim=16),
    Call((1, 3, 2), (7, 7), (2, 4), heads=3, shifts=((7, -9), (1, 2), (-1, -1))),
    Call((2, 1, 1), (3, 3), heads=4, shifts=DIAGONALS),
    Call((1, 3, 4), (3, 3), dim=160),
    Call((1, 9, 30), (3, 11)),
    Call((1, 9, 22), (7, 7), boundary="clamp"),
    Call((1, 14, 15), (5, 7), (2, 1), heads=2, boundary="clamp", shifts=((1, 2), (-3, 40))),
    Call((1, 9, 37), (3, 15), boundary="clamp"),
]
ROLLED = Call((1, 9, 10), (7, 7), shifts=DIAGONALS[1:2])
PARTS, CLAMPED = CALLS[7], CALLS[9]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
each_boundary = pytest.mark.parametrize("call", [ROLLED, CLAMPED], ids=lambda call: call.boundary)


def kernels(function, leaf: Tensor, weight: Tensor) -> list[Tensor]:
    return run(OP, function, [leaf], weight)


def compare(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """The output, and the gradients of queries, keys and values, each by itself."""
    for value, wanted in zip(results, expected, strict=True):
        for own, other in zip(value.chunk(3, -1), wanted.chunk(3, -1), strict=True):
            assert error(own, other) < tolerance


def check(function, leaf: Tensor, weight: Tensor, tolerance: float | None = None) -> None:
    """Compare output and gradients of the kernels with float64."""
    results = kernels(function, leaf, weight)
    assert {r.dtype for r in results} == {leaf.dtype}
    compare(results, exact(function, [leaf], weight), tolerance or TOLERANCE[leaf.dtype])


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    launcher = importlib.import_module(f"backbones.ops.triton.{OP}")
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    call = CALLS[6]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        kernels(call, call.leaf(torch.float32), call.weight(torch.float32))


@needs_interpreter
@each_call
def test_interpreted(call):
    check(call, call.leaf(torch.float32), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [ROLLED, PARTS, CLAMPED], ids=lambda call: call.name)
def test_interpreted_in_float16(call):
    check(call, call.leaf(torch.float16), call.weight(torch.float16))


@needs_interpreter
@each_boundary
def test_large_scores(call):
    """Of about 100: exponentials of them are no float32."""
    check(call, call.leaf(torch.float32, 6.0), call.weight(torch.float32), 2e-5)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_below_those_of_zeros(dtype):
    """Tokens at the border see zeros alone, those inside must not."""
    qkv = torch.ones(1, 5, 5, 12, dtype=dtype, device=DEVICE)
    qkv[..., :4] = -30
    qkv[..., 4:8] = 30
    call = Call((1, 5, 5), (3, 3), dim=4)
    out, grad = kernels(call, qkv.requires_grad_(), torch.ones((), device=DEVICE))
    inside = torch.zeros(5, 5, 1, dtype=dtype, device=DEVICE)
    inside[1:-1, 1:-1] = 1
    assert torch.equal(out[0], inside.expand(5, 5, 4))
    assert grad.isfinite().all()


@needs_interpreter
def test_float16_holds_gradients_of_scores_beyond_its_range():
    call = Call((1, 5, 6), (3, 3), dim=32)
    qkv = call.leaf(torch.float16).detach()
    qkv[..., :64] *= 1e-2
    qkv[..., 64:] *= 300
    weight = 300 * call.weight(torch.float16)
    assert (weight.double() @ qkv[..., 64:].double().transpose(-1, -2)).abs().max() > 2**17
    check(call, qkv.requires_grad_(), weight)


@needs_interpreter
@each_boundary
def test_the_logsumexp_is_that_of_pytorch_in_base_2(call):
    operator, qkv = getattr(torch.ops.backbones, OP), call.leaf(torch.float32).detach()
    shifts = [number for shift in call.shifts for number in shift]
    window = (*call.size, *call.dilation, call.boundary == "clamp", shifts)
    with triton_kernels(OP):
        _, lse = operator(qkv, call.heads, None, *window)
    _, wanted = operator(qkv.double(), call.heads, None, *window)
    assert lse.shape == wanted.shape
    assert error(lse, wanted / torch.log(torch.tensor(2.0).double())) < 1e-6


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other pixel"])
def test_strides(layout):
    call = Call((2, 5, 9), (3, 5), heads=2, dim=16, shifts=DIAGONALS[:2])
    leaf = call.leaf(torch.float32).detach()
    if layout == "channels first":
        leaf = leaf.permute(0, 3, 1, 2).contiguous()
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        leaf = torch.cat([leaf, leaf], -1)
        view = lambda x: x[..., 5 : 5 + x.shape[-1] // 2]  # noqa: E731
    else:
        leaf = leaf.repeat_interleave(2, 1).repeat_interleave(3, 2)
        view = lambda x: x[:, ::2, ::3]  # noqa: E731
    check(lambda x: call(view(x)), leaf.requires_grad_(), call.weight(torch.float32))


@needs_interpreter
def test_gradients_without_strides():
    check(CALLS[0], CALLS[0].leaf(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
@each_boundary
def test_deterministic(call):
    leaf, weight = call.leaf(torch.float32), call.weight(torch.float32)
    runs = [kernels(call, leaf, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
@pytest.mark.parametrize("size", [(0, 5, 7), (1, 0, 7)])
def test_empty_maps_pass(size):
    qkv = torch.zeros(*size, 24, requires_grad=True)
    with triton_kernels(OP):
        neighborhood_attention(qkv, 2, 3, shifts=[(1, 1)]).sum().backward()
    assert qkv.grad.shape == qkv.shape


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    call = CALLS[5]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    leaf = call.leaf(torch.float32).detach()
    with triton_kernels(OP):
        assert torch.equal(compiled(call, leaf), call(leaf))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call((4, 56, 56), (7, 7), heads=3, dim=32, shifts=DIAGONALS),
        Call((8, 7, 7), (7, 7), heads=24, dim=32),
        Call((1, 200, 304), (7, 7), heads=3, dim=32),
        Call((2, 57, 61), (7, 7), (8, 3), heads=2, dim=32, boundary="clamp"),
        Call((2, 30, 31), (13, 13), heads=2, dim=32, boundary="clamp"),
        Call((1, 20, 21), (3, 3), dim=512),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaf, weight = call.leaf(dtype), call.weight(dtype)
    check(call, leaf, weight)
    runs = [kernels(call, leaf, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@each_boundary
def test_captures_in_a_cuda_graph(call):
    check_cuda_graph(call, [call.leaf(torch.float16)], call.weight(torch.float16))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    batch = 2**31 // (1024 * 1024 * 96) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, 1024, 1024, 96)
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    out = neighborhood_attention(qkv.requires_grad_(), 1, 3)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    # the last image, alone
    last = qkv.detach()[-1:].clone().requires_grad_()
    alone = neighborhood_attention(last, 1, 3)
    assert torch.equal(out[-1:], alone)
    (expected,) = torch.autograd.grad(alone, last, torch.ones_like(alone))
    assert torch.equal(grad[-1:], expected)
