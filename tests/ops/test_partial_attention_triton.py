"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import partial_attention
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
    channels: int
    values: int
    qk_dim: int = 16

    @property
    def name(self) -> str:
        """Tokens, values, channels."""
        return f"{self.map_size[1] * self.map_size[2]}x{self.values}of{self.channels}"

    def inputs(self) -> list[Tensor]:
        """Leaves qkv and x, float64."""
        qkv = golden.normal("qkv", (*self.map_size, 2 * self.qk_dim + self.values))
        # every output is well above or below zero: no rounding moves one through the ReLU
        sign = 1 - 2 * (torch.arange(self.values) % 2)
        qkv = torch.from_numpy(qkv)
        qkv[..., 2 * self.qk_dim :] = 0.2 * qkv[..., 2 * self.qk_dim :].clamp(-3, 3) + sign
        x = torch.from_numpy(golden.normal("x", (*self.map_size, self.channels)))
        return [qkv.requires_grad_(), x.requires_grad_()]

    def cast(self, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
        """Leaves of another type."""
        return [t.detach().to(device, dtype).requires_grad_() for t in self.inputs()]

    def weight(self) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        return torch.from_numpy(golden.normal("weight", (*self.map_size, self.channels)))

    def __call__(self, qkv: Tensor, x: Tensor) -> Tensor:
        """Call the op."""
        return partial_attention(qkv, x, self.qk_dim)


# one tile of 16, 32, 64 tokens, several; one tile of values and two; channels that pass or none
CALLS = [
    Call((2, 1, 1), 20, 9),
    Call((2, 4, 4), 210, 68),
    Call((1, 3, 5), 30, 19, qk_dim=8),
    Call((1, 3, 3), 150, 130, qk_dim=20),
    Call((2, 5, 5), 96, 96),
    Call((1, 7, 7), 308, 66),
    Call((1, 7, 9), 83, 75),
    Call((2, 5, 13), 72, 72),
    Call((1, 10, 13), 80, 48),
]
TILED = CALLS[-1]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def check(call: Call, dtype: torch.dtype) -> None:
    """Compare output and gradients of the kernels with float64."""
    inputs, weight = call.cast(dtype), call.weight().to(DEVICE, dtype)
    results = run("partial_attention", call, inputs, weight)
    assert [r.dtype for r in results] == [dtype] * 3
    assert [r.shape for r in results] == [inputs[1].shape, *(x.shape for x in inputs)]
    for value, wanted in zip(results, exact(call, inputs, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    launcher = importlib.import_module("backbones.ops.triton.partial_attention")
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    with pytest.raises(pytest.fail.Exception, match="launched"):
        run("partial_attention", CALLS[0], CALLS[0].cast(torch.float32), torch.ones(()))


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted(call, dtype):
    check(call, dtype)


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "slice", "every other pixel"])
@pytest.mark.parametrize("call", [Call((2, 3, 5), 60, 11), TILED], ids=lambda call: call.name)
def test_strides(call, layout):
    """The elements around a view are NaN: none of them is read."""

    def embed(x: Tensor) -> Tensor:
        if layout == "channels first":
            return x.permute(0, 3, 1, 2).contiguous()
        batch, height, width, channels = x.shape
        shape = (batch, height + 1, width + 2, channels + 7)
        if layout == "every other pixel":
            shape = (batch, 2 * height, 2 * width, channels)
        leaf = torch.full(shape, torch.nan)
        view(leaf).copy_(x)
        return leaf

    def view(leaf: Tensor) -> Tensor:
        if layout == "channels first":
            return leaf.permute(0, 2, 3, 1)
        return leaf[:, :-1, 1:-1, 3:-4] if layout == "slice" else leaf[:, ::2, 1::2]

    def function(qkv: Tensor, x: Tensor) -> Tensor:
        return call(view(qkv), view(x))

    leaves = [embed(x.detach()).requires_grad_() for x in call.cast(torch.float32)]
    weight = call.weight().float()
    results = run("partial_attention", function, leaves, weight)
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
def test_gradients_without_strides_and_another_scale():
    call = CALLS[2]

    def function(qkv: Tensor, x: Tensor) -> Tensor:
        return partial_attention(qkv, x, call.qk_dim, 0.9)

    inputs = call.cast(torch.float32)
    # the gradient of a sum has strides of zero
    weight = torch.ones(())
    results = run("partial_attention", function, inputs, weight)
    for value, wanted in zip(results, exact(function, inputs, weight), strict=True):
        assert error(value, wanted) < 1e-5


@needs_interpreter
# in rows of such keys, which are not written
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("call", [CALLS[2], TILED], ids=lambda call: call.name)
def test_large_scores_leave_no_trace(call):
    """The weights of keys beyond the image, computed again, would be infinite."""
    qkv, x = (t.detach().clone() for t in call.cast(torch.float32))
    qkv[..., : call.qk_dim], qkv[..., call.qk_dim : 2 * call.qk_dim] = 10.0, -10.0
    qkv[..., 0, : call.qk_dim] += 0.1
    inputs, weight = [qkv.requires_grad_(), x.requires_grad_()], call.weight().float()
    results = run("partial_attention", call, inputs, weight)
    for value, wanted in zip(results, exact(call, inputs, weight), strict=True):
        assert error(value, wanted) < 1e-4


@needs_interpreter
def test_nan_shows():
    qkv, x = (t.detach().clone() for t in Call((3, 3, 3), 200, 20).cast(torch.float16))
    qkv[0, 1, 1, -1], x[1, 0, 0, 30], x[2, 2, 2, 199] = torch.nan, torch.nan, torch.nan
    with triton_kernels("partial_attention"):
        out = partial_attention(qkv, x)
    assert out[0, ..., 19].isnan().all()
    assert out[1, 0, 0, 30].isnan() and out[2, 2, 2, 199].isnan()
    assert int(out.isnan().sum()) == 9 + 2


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[1], TILED], ids=lambda call: call.name)
def test_deterministic(call):
    inputs, weight = call.cast(torch.float32), call.weight().float()
    runs = [run("partial_attention", call, inputs, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
def test_an_empty_batch_passes():
    qkv, x = torch.zeros(0, 7, 9, 52, requires_grad=True), torch.zeros(0, 7, 9, 30)
    x.requires_grad_()
    with triton_kernels("partial_attention"):
        partial_attention(qkv, x).sum().backward()
    assert qkv.grad.shape == qkv.shape and x.grad.shape == x.shape


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    call = CALLS[2]
    with triton_kernels("partial_attention"):
        inputs = call.cast(torch.float32)
        out, expected = compiled(call, *inputs), call(*inputs)
        assert torch.equal(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call((4, 16, 16), 336, 72),
        Call((2, 13, 19), 448, 96),
        Call((2, 25, 38), 336, 72),
        Call((1, 32, 33), 352, 75),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    check(call, dtype)
    inputs, weight = call.cast(dtype), call.weight().to(DEVICE, dtype)
    runs = [run("partial_attention", call, inputs, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [CALLS[1], TILED], ids=lambda call: call.name)
def test_captures_in_a_cuda_graph(call):
    inputs, weight = call.cast(torch.float16, "cuda"), call.weight().half().cuda()
    check_cuda_graph(call, inputs, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 4), (13, 5)])
def test_offsets_beyond_31_bits(size):
    batch = 2**31 // (size[0] * size[1] * 96) + 2
    generator = torch.Generator("cuda").manual_seed(0)
    shape, options = (batch, *size), {"device": "cuda", "dtype": torch.bfloat16}
    qkv, x = (
        torch.randn(*shape, channels, generator=generator, **options).requires_grad_()
        for channels in (96, 96)
    )
    assert x.numel() > 2**31
    out = partial_attention(qkv, x)
    out.backward(torch.ones_like(out))
    # the last image, alone
    alone = [t.detach()[-1:].clone().requires_grad_() for t in (qkv, x)]
    partial_attention(*alone).sum().backward()
    assert torch.equal(out[-1:], partial_attention(*alone))
    assert torch.equal(qkv.grad[-1:], alone[0].grad)
    assert torch.equal(x.grad[-1:], alone[1].grad)
