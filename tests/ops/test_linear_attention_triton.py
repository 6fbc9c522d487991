"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import linear_attention
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

OP = "linear_attention"
OPERATOR = torch.ops.backbones.linear_attention


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`; `least` is the bound of the denominators."""

    map_size: tuple[int, int, int]
    heads: int = 1
    dim: int = 32
    least: float = 100.0

    @property
    def name(self) -> str:
        """Size of the map, heads, bound."""
        return f"{'x'.join(map(str, self.map_size))} {self.heads}x{self.dim} {self.least:g}"

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The packed map and the temperatures, on `DEVICE`; the latter remain in float32."""
        qkv = golden.normal("qkv", (*self.map_size, 3 * self.heads * self.dim))
        temperature = 1 + 0.1 * golden.normal("temperature", (self.heads,))
        types = (torch.from_numpy(qkv), dtype), (torch.from_numpy(temperature), torch.float32)
        return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in types]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        shape = (*self.map_size, self.heads * self.dim)
        return torch.from_numpy(golden.normal("weight", shape)).to(DEVICE, dtype)

    def clamped(self) -> float:
        """The share of the denominators that lie below the bound."""
        qkv = self.leaves(torch.float64)[0].detach().cpu().flatten(1, 2)
        q, k, _ = qkv.unflatten(-1, (3, self.heads, -1)).relu().unbind(-3)
        return ((q * k.sum(1, keepdim=True)).sum(-1) < self.least).double().mean().item()

    def __call__(self, qkv: Tensor, temperature: Tensor) -> Tensor:
        """Call the op."""
        return linear_attention(qkv, temperature, self.least)


# with one multiprocessor two heads fill it; one head of more than four tiles, of at most 128 tokens
# forward and 64 backward, is split
CALLS = [
    Call((2, 3, 5)),
    Call((1, 1, 1), heads=3, least=1e-3),
    Call((2, 7, 7), heads=2, dim=16),
    Call((2, 9, 11), heads=2, dim=24, least=200.0),
    Call((1, 13, 17), dim=64, least=2500.0),
    Call((1, 20, 21)),
    Call((1, 24, 25), heads=2),
    Call((1, 23, 29), dim=16, least=1500.0),
    Call((1, 23, 29), dim=24, least=1e5),
    Call((1, 7, 9), dim=80),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

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
    assert [r.dtype for r in results] == [leaves[0].dtype, *(x.dtype for x in leaves)]
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[leaves[0].dtype]


def test_the_calls_bound_all_denominators_some_and_none():
    assert any(call.clamped() == 1 for call in CALLS)
    assert sum(0.1 < call.clamped() < 0.9 for call in CALLS) > 3
    assert any(call.clamped() == 0 for call in CALLS)


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
@pytest.mark.parametrize("size", [(1, 5, 7), (1, 24, 26)])
def test_strides(launcher, layout, size):
    call = Call(size, dim=16)
    qkv, temperature = (leaf.detach() for leaf in call.leaves(torch.float32))
    if layout == "channels first":
        leaf = qkv.permute(0, 3, 1, 2).contiguous()
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        leaf = torch.cat([qkv, qkv], -1)
        view = lambda x: x[..., 5:53]  # noqa: E731
    else:
        leaf = torch.cat([qkv, qkv], 1).repeat_interleave(2, 2)
        view = lambda x: x[:, ::2, ::2]  # noqa: E731
        call = Call(tuple(view(leaf).shape[:3]), dim=16)
    leaves = [leaf.requires_grad_(), temperature.repeat_interleave(2).requires_grad_()]
    check(lambda x, t: call(view(x), t[::2]), leaves, call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], CALLS[7]], ids=lambda call: call.name)
def test_gradients_without_strides(launcher, call):
    check(call, call.leaves(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_query_without_a_positive_channel_reads_nothing(launcher, dtype):
    call = Call((1, 5, 7), dim=16, least=50.0)
    qkv, temperature = (leaf.detach() for leaf in call.leaves(dtype))
    qkv[:, ::2, :, :16] = -qkv[:, ::2, :, :16].abs()
    leaves = [qkv.requires_grad_(), temperature.requires_grad_()]
    check(call, leaves, call.weight(dtype))
    out, grad, _ = kernels(call, leaves, call.weight(dtype))
    assert not out[:, ::2].any() and not grad[:, ::2, :, :16].any()
    assert out[:, 1::2].any() and grad[:, 1::2, :, :16].any()


@needs_interpreter
@pytest.mark.parametrize("size", [(1, 40, 50), (2, 20, 25)], ids=str)
def test_sums_may_leave_the_range_of_float16(launcher, size):
    """As many tokens of a detector make them: S, z and denominators, and gradients under them."""
    call = Call(size, heads=1 + (size[0] > 1))
    qkv, temperature = (leaf.detach() for leaf in call.leaves(torch.float16))
    leaves = [(qkv * 60).requires_grad_(), temperature.requires_grad_()]
    with torch.no_grad():
        state = OPERATOR(leaves[0].double(), leaves[1].double(), 100.0, True)[1]
    assert state[..., :-1, :].abs().max() > 2**16
    check(call, leaves, call.weight(torch.float16))
    # gradients over such denominators would vanish
    check(call, leaves, call.weight(torch.float16) * 2**-10)


@needs_interpreter
@pytest.mark.parametrize("size", [(1, 40, 50), (2, 20, 25)], ids=str)
def test_gradients_of_queries_survive_values_with_a_mean(launcher, size):
    """They are what remains of S and z times the mean, where rounded S would leave its errors."""
    call = Call(size)
    qkv, temperature = (leaf.detach() for leaf in call.leaves(torch.float16))
    qkv[..., 64:] += 2
    leaves = [qkv.requires_grad_(), temperature.requires_grad_()]
    _, grad, _ = kernels(call, leaves, call.weight(torch.float16))
    _, expected, _ = exact(call, leaves, call.weight(torch.float16))
    assert error(grad[..., :32], expected[..., :32]) < 1e-3


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[3], CALLS[7]], ids=lambda call: call.name)
def test_deterministic(launcher, call):
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    runs = [kernels(call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[3], CALLS[7]], ids=lambda call: call.name)
def test_states_are_those_of_pytorch(launcher, call):
    """Of one program, and summed from several; written only if asked."""
    qkv, temperature = (leaf.detach() for leaf in call.leaves(torch.float32))
    with triton_kernels(OP):
        kept, unkept = (OPERATOR(qkv, temperature, call.least, keep) for keep in (True, False))
    assert torch.equal(kept[0], unkept[0])
    assert unkept[1].numel() == 0
    expected = OPERATOR(qkv.double(), temperature.double(), call.least, True)[1]
    assert kept[1].shape == expected.shape and error(kept[1], expected) < 1e-5


@needs_interpreter
def test_what_is_no_number_stays_none(launcher):
    call = Call((1, 3, 5), dim=16)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    for part in range(3):
        broken = leaves[0].clone()
        broken[0, 0, 0, 16 * part] = float("nan")
        with triton_kernels(OP):
            out = call(broken, leaves[1])
        assert torch.equal(out.isnan(), call(broken, leaves[1]).isnan()) and out.isnan().any()


@needs_interpreter
def test_an_empty_batch_passes(launcher):
    qkv, temperature = torch.zeros(0, 7, 9, 48, requires_grad=True), torch.ones(1)
    with triton_kernels(OP):
        linear_attention(qkv, temperature.requires_grad_()).sum().backward()
    assert qkv.grad.shape == qkv.shape and not temperature.grad.any()


@needs_interpreter
def test_compiles_whole(launcher):
    torch._dynamo.reset()
    call = CALLS[7]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    with triton_kernels(OP):
        assert torch.equal(compiled(call, *leaves), call(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [*CALLS, Call((1, 200, 304), heads=3), Call((64, 28, 28), heads=6), Call((128, 7, 7), 24)],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaves, weight = call.leaves(dtype), call.weight(dtype)
    check(call, leaves, weight)
    runs = [kernels(call, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[3], Call((1, 100, 100))], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    check_cuda_graph(call, call.leaves(torch.float16), call.weight(torch.float16))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    batch = 2**31 // (1024 * 1024 * 48) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, 1024, 1024, 48)
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    qkv.requires_grad_()
    temperature = torch.ones(1, device="cuda")
    out = linear_attention(qkv, temperature)
    out.backward(torch.ones_like(out))
    # the last image, alone
    last = qkv.detach()[-1:].clone().requires_grad_()
    alone = linear_attention(last, temperature)
    alone.backward(torch.ones_like(alone))
    # one image is split in more parts than many are, whose sums are rounded otherwise
    assert error(out[-1:].detach(), alone.double().cpu()) < 1.5e-2
    assert error(qkv.grad[-1:], last.grad.double().cpu()) < 1.5e-2
