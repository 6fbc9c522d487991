"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import channel_attention
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


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    map_size: tuple[int, int, int]
    heads: int = 1
    dim: int = 32
    mix_values: bool = False

    @property
    def name(self) -> str:
        """Size of the map, heads, variant."""
        variant = "values" if self.mix_values else "queries"
        return f"{'x'.join(map(str, self.map_size))} {self.heads}x{self.dim} {variant}"

    def leaf(self, dtype: torch.dtype) -> Tensor:
        """The packed map, on `DEVICE`; small, so that no row of weights is a single one."""
        values = 0.5 * golden.normal("qkv", (*self.map_size, 3 * self.heads * self.dim))
        return torch.from_numpy(values).to(DEVICE, dtype).requires_grad_()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        shape = (*self.map_size, self.heads * self.dim)
        return torch.from_numpy(golden.normal("weight", shape)).to(DEVICE, dtype)

    def __call__(self, qkv: Tensor) -> Tensor:
        """Call the op."""
        return channel_attention(qkv, self.heads, self.mix_values)


# with one multiprocessor two heads fill it; one head of more than 512 tokens is split
CALLS = [
    Call((2, 3, 5)),
    Call((1, 1, 1), heads=3, mix_values=True),
    Call((2, 9, 11), heads=2, dim=24, mix_values=True),
    Call((1, 24, 25), heads=2),
    Call((1, 23, 29), dim=16),
    Call((1, 23, 29), dim=24, mix_values=True),
    Call((1, 17, 19), dim=40),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launcher(monkeypatch):
    """The launcher, on a device of one multiprocessor."""
    monkeypatch.setattr(
        importlib.import_module("backbones.ops.triton._launch"), "_MULTIPROCESSORS", 1
    )
    return importlib.import_module("backbones.ops.triton.channel_attention")


def kernels(function, leaf: Tensor, weight: Tensor) -> list[Tensor]:
    return run("channel_attention", function, [leaf], weight)


def check(function, leaf: Tensor, weight: Tensor) -> None:
    """Compare output and gradient of the kernels with float64."""
    results = kernels(function, leaf, weight)
    assert [r.dtype for r in results] == [leaf.dtype] * 2
    for value, wanted in zip(results, exact(function, [leaf], weight), strict=True):
        assert error(value, wanted) < TOLERANCE[leaf.dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(launcher, monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    call = CALLS[0]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        kernels(call, call.leaf(torch.float32), call.weight(torch.float32))


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted(launcher, call, dtype):
    check(call, call.leaf(dtype), call.weight(dtype))


@needs_interpreter
def test_tokens_are_split_only_where_heads_do_not_fill_the_device(launcher, monkeypatch):
    split = importlib.import_module("backbones.ops.triton._token_reduction").split_tokens
    x = torch.empty(0)
    assert split(x, 2, 10**6, 128) == (1, 1000064)
    assert split(x, 1, 512, 128) == (1, 512)
    assert split(x, 1, 513, 128) == (2, 384)
    assert split(x, 1, 10**6, 128) == (4, 250112)
    assert split(x, 0, 100, 128) == (1, 128)
    for tokens in range(1, 5000, 37):
        parts, chunk = split(x, 1, tokens, 64)
        assert (parts - 1) * chunk < tokens <= parts * chunk


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other row"])
@pytest.mark.parametrize("size", [(1, 5, 7), (1, 24, 26)])
def test_strides(launcher, layout, size):
    call = Call(size, dim=16)
    qkv = call.leaf(torch.float32).detach()
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
    check(lambda x: call(view(x)), leaf.requires_grad_(), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], CALLS[4]], ids=lambda call: call.name)
def test_gradients_without_strides(launcher, call):
    check(call, call.leaf(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
def test_sums_of_gradients_may_leave_the_range_of_float16(launcher):
    call = CALLS[4]
    # gradients of the scores up to 2e5, which small keys and values bring back
    factors = torch.tensor([100.0, 0.01, 0.01]).repeat_interleave(call.dim)
    leaf = (call.leaf(torch.float32).detach() * factors).half().requires_grad_()
    check(call, leaf, call.weight(torch.float16) * 8000)


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[2], CALLS[5]], ids=lambda call: call.name)
def test_deterministic(launcher, call):
    leaf, weight = call.leaf(torch.float32), call.weight(torch.float32)
    runs = [kernels(call, leaf, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
def test_an_empty_batch_passes(launcher):
    qkv = torch.zeros(0, 7, 9, 48, requires_grad=True)
    with triton_kernels("channel_attention"):
        channel_attention(qkv, 1).sum().backward()
    assert qkv.grad.shape == qkv.shape


@needs_interpreter
def test_writes_the_weights_only_if_asked(launcher):
    qkv = CALLS[4].leaf(torch.float32).detach()
    with triton_kernels("channel_attention"):
        kept, unkept = (
            torch.ops.backbones.channel_attention(qkv, 1, False, None, keep)
            for keep in (True, False)
        )
    assert torch.equal(kept[0], unkept[0])
    assert unkept[1].numel() == 0
    expected = torch.ops.backbones.channel_attention(qkv.double(), 1, False, None, True)[1]
    assert error(kept[1], expected) < 1e-5


@needs_interpreter
def test_compiles_whole(launcher):
    torch._dynamo.reset()
    call = CALLS[4]
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    leaf = call.leaf(torch.float32).detach()
    with triton_kernels("channel_attention"):
        assert torch.equal(compiled(call, leaf), call(leaf))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [*CALLS, Call((1, 200, 304), heads=3), Call((64, 28, 28), heads=6, mix_values=True)],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaf, weight = call.leaf(dtype), call.weight(dtype)
    check(call, leaf, weight)
    runs = [kernels(call, leaf, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[2], Call((1, 100, 100))], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    leaf, weight = call.leaf(torch.float16), call.weight(torch.float16)
    check_cuda_graph(call, [leaf], weight)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    batch = 2**31 // (1024 * 1024 * 48) + 2
    shape = (batch, 1024, 1024, 48)
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.1
    qkv.requires_grad_()
    out = channel_attention(qkv, 1)
    out.backward(torch.ones_like(out))
    # the last image, alone
    last = qkv.detach()[-1:].clone().requires_grad_()
    alone = channel_attention(last, 1)
    alone.backward(torch.ones_like(alone))
    # one image is split in more parts than many are, whose sums are rounded otherwise
    assert error(out[-1:].detach(), alone.double().cpu()) < 1.5e-2
    assert error(qkv.grad[-1:], last.grad.double().cpu()) < 1.5e-2
