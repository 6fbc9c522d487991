"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import na2d_av
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

OP = "na2d_av"
Pair = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, heads, height, width)`."""

    map_size: tuple[int, int, int, int]
    size: Pair
    dilation: Pair = (1, 1)
    dim: int = 16

    @property
    def name(self) -> str:
        """Size of the map, windows, channels."""
        sizes = ("x".join(map(str, size)) for size in (self.map_size, self.size, self.dilation))
        return " ".join([*sizes, str(self.dim)])

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Weights and values, on `DEVICE`."""
        lengths = {"attn": self.size[0] * self.size[1], "value": self.dim}
        return [
            torch.from_numpy(golden.normal(name, (*self.map_size, length)))
            .to(DEVICE, dtype)
            .requires_grad_()
            for name, length in lengths.items()
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        values = golden.normal("weight", (*self.map_size, self.dim))
        return torch.from_numpy(values).to(DEVICE, dtype)

    def __call__(self, attn: Tensor, value: Tensor) -> Tensor:
        """Call the op."""
        return na2d_av(attn, value, self.size, self.dilation)


# with 17 columns 40 queries see the keys of a block near a border
CALLS = [
    Call((2, 2, 3, 3), (3, 3), dim=4),
    Call((1, 1, 5, 20), (5, 5), dim=14),
    Call((1, 1, 7, 9), (7, 7)),
    Call((1, 1, 3, 49), (3, 17), dim=8),
    Call((1, 1, 5, 17), (5, 13), dim=40),
    Call((1, 1, 3, 3), (3, 3), dim=130),
    Call((1, 1, 6, 21), (3, 5), (2, 3)),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def check(function, leaves: list[Tensor], weight: Tensor) -> None:
    """Compare output and gradients of the kernels with float64."""
    results = run(OP, function, leaves, weight)
    dtype = leaves[0].dtype
    assert {r.dtype for r in results} == {dtype}
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    launcher = importlib.import_module(f"backbones.ops.triton.{OP}")
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    call = CALLS[0]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        run(OP, call, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@each_call
def test_interpreted(call):
    check(call, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], CALLS[2]], ids=lambda call: call.name)
def test_interpreted_in_float16(call):
    check(call, call.leaves(torch.float16), call.weight(torch.float16))


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels last", "slice", "slots before pixels"])
def test_strides(layout):
    call = Call((2, 2, 5, 6), (3, 5), dim=8)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    if layout == "slice":
        leaves = [torch.cat([leaf, leaf], -1).repeat_interleave(2, 3) for leaf in leaves]
        view = lambda x: x[:, :, :, ::2, 3 : 3 + x.shape[-1] // 2]  # noqa: E731
    else:
        order = (0, 2, 3, 1, 4) if layout == "channels last" else (4, 2, 1, 0, 3)
        leaves = [leaf.permute(order).contiguous() for leaf in leaves]
        view = lambda x: x.permute([order.index(i) for i in range(5)])  # noqa: E731
    leaves = [leaf.requires_grad_() for leaf in leaves]
    check(lambda *inputs: call(*map(view, inputs)), leaves, call.weight(torch.float32))


@needs_interpreter
def test_gradients_without_strides():
    call = CALLS[0]
    check(call, call.leaves(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
def test_float16_sums_are_not_kept_in_float16():
    """Partial sums leave its range, the result does not."""
    call = Call((1, 1, 3, 5), (3, 3), dim=4)
    attn, value = (torch.ones_like(leaf) for leaf in call.leaves(torch.float16))
    attn[..., 6:] = -1
    value *= 2.0**14
    value[:, :, 2] *= 1.5
    leaves = [attn.requires_grad_(), value.requires_grad_()]
    check(call, leaves, call.weight(torch.float16) * 1e-3)


@needs_interpreter
def test_deterministic():
    call = CALLS[2]
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    runs = [run(OP, call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
def test_an_empty_batch_passes():
    attn, value = (torch.zeros(0, 2, 5, 7, n, requires_grad=True) for n in (9, 4))
    with triton_kernels(OP):
        na2d_av(attn, value, 3).sum().backward()
    assert attn.grad.shape == attn.shape and value.grad.shape == value.shape


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    call = CALLS[0]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    with triton_kernels(OP):
        assert torch.equal(compiled(call, *leaves), call(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call((4, 8, 14, 14), (13, 13)),
        Call((1, 8, 50, 76), (5, 5)),
        Call((1, 8, 50, 76), (13, 13)),
        Call((2, 4, 57, 61), (7, 7), (8, 3), dim=32),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaves, weight = call.leaves(dtype), call.weight(dtype)
    check(call, leaves, weight)
    runs = [run(OP, call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    call = CALLS[3]
    check_cuda_graph(call, call.leaves(torch.float16), call.weight(torch.float16))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    batch = 2**31 // (512 * 512 * 25) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    attn, value = (
        torch.randn(batch, 1, 512, 512, n, device="cuda", dtype=torch.bfloat16, generator=generator)
        for n in (25, 16)
    )
    leaves = [attn.requires_grad_(), value.requires_grad_()]
    out = na2d_av(*leaves, 5)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    # the last image, alone
    last = [leaf.detach()[-1:].clone().requires_grad_() for leaf in leaves]
    alone = na2d_av(*last, 5)
    assert torch.equal(out[-1:], alone)
    expected = torch.autograd.grad(alone, last, torch.ones_like(alone))
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad[-1:], wanted)
