"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import rank_augmented_attention, rotary_table
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

OP = "rank_augmented_attention"


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    map_size: tuple[int, int, int]
    heads: int = 1
    dim: int = 32
    gated: bool = False
    added: bool = False

    @property
    def name(self) -> str:
        """Size of the map, heads, epilogue."""
        epilogue = " gated" * self.gated + " added" * self.added
        return f"{'x'.join(map(str, self.map_size))} {self.heads}x{self.dim}{epilogue}"

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The packed map and perhaps an addend, on `DEVICE`."""
        channels = self.heads * self.dim
        shapes = {"qkv": (3 + self.gated) * channels}
        if self.added:
            shapes["addend"] = channels
        return [
            torch.from_numpy(golden.normal(name, (*self.map_size, count)))
            .to(DEVICE, dtype)
            .requires_grad_()
            for name, count in shapes.items()
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        shape = (*self.map_size, self.heads * self.dim)
        return torch.from_numpy(golden.normal("weight", shape)).to(DEVICE, dtype)

    def __call__(self, qkv: Tensor, addend: Tensor | None = None) -> Tensor:
        """Call the op."""
        theta = 1e4 ** -torch.linspace(0, 1, self.dim // 4, device=qkv.device)
        rotary = rotary_table(theta, max(self.map_size) + 3)
        return rank_augmented_attention(qkv, rotary, self.heads, addend, self.gated)


# with one multiprocessor two heads fill it; one head of more than 256 tokens is split
CALLS = [
    Call((2, 3, 5)),
    Call((3, 1, 1), dim=4),
    Call((2, 9, 11), heads=2, dim=24, gated=True, added=True),
    Call((1, 23, 29), dim=16, added=True),
    Call((1, 21, 23), dim=64, gated=True, added=True),
    Call((1, 12, 13), dim=96, gated=True),
    Call((1, 3, 300), dim=40),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launcher(monkeypatch):
    """The launcher, on a device of one multiprocessor."""
    monkeypatch.setattr(
        importlib.import_module("backbones.ops.triton._launch"), "_MULTIPROCESSORS", 1
    )
    return importlib.import_module(f"backbones.ops.triton.{OP}")


def kernels(function, leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    return run(OP, function, leaves, weight)


def check(function, leaves: list[Tensor], weight: Tensor) -> None:
    """Compare output and gradients of the kernels with float64."""
    results = kernels(function, leaves, weight)
    dtype = leaves[0].dtype
    assert {r.dtype for r in results} == {dtype}
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(launcher, monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    call = CALLS[0]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        kernels(call, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted(launcher, call, dtype):
    check(call, call.leaves(dtype), call.weight(dtype))


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other row"])
@pytest.mark.parametrize("size", [(1, 5, 7), (1, 12, 23)])
def test_strides(launcher, layout, size):
    call = Call(size, dim=16, gated=True, added=True)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    if layout == "channels first":
        leaves = [leaf.permute(0, 3, 1, 2).contiguous() for leaf in leaves]
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        leaves = [torch.cat([leaf, leaf], -1) for leaf in leaves]
        view = lambda x: x[..., 5 : 5 + x.shape[-1] // 2]  # noqa: E731
    else:
        leaves = [torch.cat([leaf, leaf], 1).repeat_interleave(2, 2) for leaf in leaves]
        view = lambda x: x[:, ::2, ::2]  # noqa: E731
        call = Call(tuple(view(leaves[0]).shape[:3]), dim=16, gated=True, added=True)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    check(lambda *inputs: call(*map(view, inputs)), leaves, call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], CALLS[4]], ids=lambda call: call.name)
def test_gradients_without_strides(launcher, call):
    check(call, call.leaves(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
def test_float16_holds_cold_queries_and_large_states(launcher):
    """phi of the queries is 1e-6 and less, S and its gradient leave the range of float16."""
    call = Call((1, 3, 5), dim=64, gated=True)
    (qkv,) = (leaf.detach().float().unflatten(-1, (4, -1)) for leaf in call.leaves(torch.float16))
    # in turn queries, keys, values and gate
    factors, shifts = torch.tensor([[1, 200, 2000, 1e-3], [-15, 0, 0, 0]]).to(DEVICE)
    leaf = (qkv * factors[:, None] + shifts[:, None]).flatten(-2).half().requires_grad_()
    operator = torch.ops.backbones.rank_augmented_attention
    state = operator(leaf.double(), rotary_table(torch.ones(16), 5), None, 1, True, True)[1]
    assert state.abs().max() > 2**16
    check(call, [leaf], call.weight(torch.float16))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[2], CALLS[4]], ids=lambda call: call.name)
def test_deterministic(launcher, call):
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    runs = [kernels(call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[1], CALLS[4]], ids=lambda call: call.name)
def test_states_are_those_of_pytorch(launcher, call):
    """Of one part, and merged from several; written only if asked."""
    operator = torch.ops.backbones.rank_augmented_attention
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    rotary = rotary_table(torch.ones(call.dim // 4), max(call.map_size))

    def states(qkv: Tensor, keep: bool = True) -> list[Tensor]:
        return operator(qkv, rotary, None, call.heads, call.gated, keep)

    with triton_kernels(OP):
        kept, unkept = (states(leaves[0], keep) for keep in (True, False))
    assert torch.equal(kept[0], unkept[0])
    assert [x.numel() for x in unkept[1:]] == [0] * 3
    for value, wanted in zip(kept, states(leaves[0].double()), strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 1e-5


@needs_interpreter
def test_an_empty_batch_passes(launcher):
    qkv = torch.zeros(0, 7, 9, 96, requires_grad=True)
    with triton_kernels(OP):
        rank_augmented_attention(qkv, rotary_table(torch.ones(8), 9), 1).sum().backward()
    assert qkv.grad.shape == qkv.shape


@needs_interpreter
def test_compiles_whole(launcher):
    torch._dynamo.reset()
    call = CALLS[2]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    with triton_kernels(OP):
        assert torch.equal(compiled(call, *leaves), call(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call((1, 200, 304), dim=64, gated=True, added=True),
        Call((2, 100, 152), heads=2, dim=96, gated=True, added=True),
        Call((64, 28, 28), heads=5, dim=64, gated=True, added=True),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaves, weight = call.leaves(dtype), call.weight(dtype)
    check(call, leaves, weight)
    runs = [kernels(call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[2], CALLS[4]], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    check_cuda_graph(call, call.leaves(torch.float16), call.weight(torch.float16))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    batch = 2**31 // (1024 * 1024 * 128) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, 1024, 1024, 128)
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    qkv.requires_grad_()
    rotary = rotary_table(torch.ones(8, device="cuda"), 1024)
    out = rank_augmented_attention(qkv, rotary, 1, gated=True)
    out.backward(torch.ones_like(out))
    # the last image, alone
    last = qkv.detach()[-1:].clone().requires_grad_()
    alone = rank_augmented_attention(last, rotary, 1, gated=True)
    alone.backward(torch.ones_like(alone))
    # one image is split in more parts than many are, whose sums are rounded otherwise
    assert error(out[-1:].detach(), alone.double().cpu()) < 1.5e-2
    assert error(qkv.grad[-1:], last.grad.double().cpu()) < 1.5e-2
