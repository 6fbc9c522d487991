"""The Triton kernels that stream rows: in the interpreter, and with `-m gpu` on a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from backbones.ops import _choice, depthwise_conv, depthwise_conv_mean, depthwise_conv_norm
from backbones.ops.triton import _depthwise_tiles as tiles
from tests.support import golden
from tests.support.kernels import (
    DEVICE,
    INTERPRETED,
    check_cuda_graph,
    error,
    needs_interpreter,
    poisoned,
)

Function = Callable[..., tuple[Tensor, ...]]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width, channels)`; `norm` "affine" has vectors."""

    size: tuple[int, int, int, int]
    kernel: int = 3
    stride: int = 1
    same: bool = False
    residual: bool = False
    pre_act: str = ""
    act: str = ""
    bias: bool = True
    addend: bool = False
    mean: bool = False
    square: bool = False
    norm: str = ""

    @property
    def name(self) -> str:
        """Size of the map, kernel, what is on."""
        options = ("same", "residual", "addend", "mean", "square")
        on = [f"{self.kernel}x{self.kernel}", *(name for name in options if getattr(self, name))]
        acts = (self.pre_act and f"{self.pre_act} before", self.act, self.norm)
        return " ".join(
            ["x".join(map(str, self.size)), f"/{self.stride}", *on, *filter(None, acts)]
        )

    def leaves(self, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
        """The map, kernels, and what else the call takes."""
        batch, height, width, channels = self.size
        out = (batch, (height - 1) // self.stride + 1, (width - 1) // self.stride + 1, channels)
        shapes = {"x": self.size, "weight": (channels, 1, self.kernel, self.kernel)}
        if self.bias:
            shapes["bias"] = (channels,)
        if self.addend:
            shapes["addend"] = out
        if self.norm == "affine":
            shapes |= {"norm_weight": (channels,), "norm_bias": (channels,)}
        values = [torch.from_numpy(golden.normal(name, shape)) for name, shape in shapes.items()]
        values[1] /= self.kernel
        return [value.to(device, dtype).requires_grad_() for value in values]

    def __call__(self, x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Call the op."""
        bias, rest = (rest[0], rest[1:]) if self.bias else (None, rest)
        if self.norm:
            return depthwise_conv_norm(x, weight, bias, *rest, residual=self.residual)
        around = (self.residual, self.pre_act)
        if self.mean or self.square:
            options = (self.stride, self.same, self.act, *around, self.square)
            return depthwise_conv_mean(x, weight, bias, *options)
        addend = rest[0] if self.addend else None
        return (depthwise_conv(x, weight, bias, addend, self.stride, self.same, *around, self.act),)


def step(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a call."""
    outs = function(*leaves)
    weights = [golden.normal(f"cotangent {n}", tuple(out.shape)) for n, out in enumerate(outs)]
    cotangents = [
        torch.from_numpy(weight).to(out.device, out.dtype)
        for weight, out in zip(weights, outs, strict=True)
    ]
    return [*outs, *torch.autograd.grad(outs, leaves, cotangents)]


def kernels(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The same, by the kernels."""
    with poisoned(), _choice.forced(True):
        return step(function, leaves)


def check(function: Function, leaves: Sequence[Tensor]) -> None:
    """Compare outputs and gradients of the kernels with PyTorch's in float64."""
    exact = step(function, [x.detach().cpu().double().requires_grad_() for x in leaves])
    dtypes = [leaves[0].dtype] * len(exact)
    if getattr(function, "square", False):
        dtypes[1] = torch.float32
    for value, wanted, dtype in zip(kernels(function, leaves), exact, dtypes, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        assert error(value, wanted) < TOLERANCE[leaves[0].dtype]


# what models call, in several chunks of rows, strips and blocks of channels
CALLS = [
    Call((2, 5, 5, 72), residual=True),
    Call((1, 5, 8, 24), residual=True, pre_act="gelu"),
    Call((2, 5, 5, 33), 5, addend=True),
    Call((1, 5, 9, 24), 7, act="gelu"),
    Call((1, 3, 8, 16), 7, addend=True, bias=False),
    Call((1, 5, 8, 20), 9),
    Call((2, 5, 6, 33), act="silu", mean=True),
    Call((1, 9, 9, 20), stride=2, act="relu", mean=True),
    Call((2, 8, 10, 20), stride=2, act="relu", mean=True),
    Call((1, 9, 9, 20), stride=2, same=True, act="gelu_tanh", mean=True),
    Call((2, 8, 10, 40), stride=2, same=True, act="silu", mean=True),
    Call((1, 7, 12, 20), stride=2, same=True, act="silu", pre_act="relu"),
    Call((2, 5, 9, 24), residual=True, pre_act="gelu", square=True),
    Call((1, 9, 9, 20), stride=2, act="relu", square=True),
]
SMALL = [
    Call((2, 1, 1, 8), residual=True),
    Call((1, 2, 1, 8), 5, addend=True),
    Call((1, 1, 3, 8), 7, act="gelu"),
    Call((1, 3, 2, 8), 9),
    Call((1, 1, 1, 8), stride=2, act="relu"),
    Call((2, 2, 2, 8), stride=2, same=True, mean=True),
    Call((1, 1, 2, 8), residual=True, norm="affine"),
]
NORMS = [
    Call((2, 5, 7, 40), residual=True, norm="affine"),
    Call((1, 5, 3, 60), residual=True, norm="plain"),
    Call((1, 2, 5, 20), norm="affine"),
]

each_call = pytest.mark.parametrize("call", [*CALLS, *SMALL, *NORMS], ids=lambda call: call.name)


@pytest.fixture
def launcher():
    return importlib.import_module("backbones.ops.triton.depthwise_conv")


@pytest.fixture
def one_processor(monkeypatch):
    """A device that few programs fill."""
    module = importlib.import_module("backbones.ops.triton._launch")
    monkeypatch.setattr(module, "_MULTIPROCESSORS", 1)


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("forward", CALLS[0]),
        ("grad_sum", CALLS[6]),
        ("grad_input", CALLS[0]),
        ("grad_weight", CALLS[0]),
        ("forward_norm", NORMS[0]),
        ("norm_backward", NORMS[0]),
    ],
)
def test_the_kernels_are_what_runs(launcher, monkeypatch, name, call):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    leaves = replace(call, size=(1, 1, 1, 4)).leaves(torch.float32)
    with pytest.raises(pytest.fail.Exception, match="launched"):
        kernels(replace(call, size=(1, 1, 1, 4)), leaves)


@needs_interpreter
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted(call, dtype):
    check(call, call.leaves(dtype))


@needs_interpreter
@pytest.mark.parametrize(
    "call",
    [
        Call((2, 9, 9, 33), 5),
        Call((3, 9, 9, 20), stride=2),
        Call((3, 7, 5, 40), norm="affine"),
    ],
    ids=lambda call: call.name,
)
def test_programs_that_serve_several_strips(one_processor, call):
    check(call, call.leaves(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("kernel", [3, 5])
def test_norm_in_a_pass_of_its_own(launcher, monkeypatch, kernel):
    """For kernels, and for numbers of channels, that no tile is made for."""
    if kernel == 3:
        monkeypatch.setattr(launcher, "_MOST_CHANNELS", 15)
    norms = launcher.norm_kernels
    monkeypatch.setattr(norms, "depthwise_norm_kernel", {}, raising=True)
    call = Call((1, 3, 3, 16), kernel, residual=True, norm="affine")
    check(call, call.leaves(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "slice", "every other row"])
@pytest.mark.parametrize(
    "call",
    [
        Call((2, 4, 5, 24), 5, addend=True),
        Call((2, 4, 5, 24), residual=True, pre_act="gelu"),
        Call((2, 4, 6, 24), stride=2, pre_act="relu", addend=True),
        Call((2, 4, 5, 24), norm="plain"),
    ],
    ids=lambda call: call.name,
)
def test_strides(call, layout):
    """The elements around a view are NaN: none of them is read."""

    def view(leaf: Tensor) -> Tensor:
        if leaf.ndim != 4 or leaf.shape[1] == 1:
            return leaf
        if layout == "channels first":
            return leaf.permute(0, 2, 3, 1)
        return leaf[:, :-1, 1:-1, 3:-4] if layout == "slice" else leaf[:, ::2, 1::2]

    def embed(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] == 1:
            return x
        batch, height, width, channels = x.shape
        shape = (batch, height + 1, width + 2, channels + 7)
        if layout == "every other row":
            shape = (batch, 2 * height, 2 * width, channels)
        if layout == "channels first":
            shape = (batch, channels, height, width)
        leaf = torch.full(shape, torch.nan)
        view(leaf).copy_(x)
        return leaf

    leaves = [embed(x.detach()).requires_grad_() for x in call.leaves(torch.float32)]
    check(lambda *leaves: call(*map(view, leaves)), leaves)


@needs_interpreter
@pytest.mark.parametrize(
    "call", [CALLS[0], CALLS[6], CALLS[9], NORMS[0]], ids=lambda call: call.name
)
def test_gradients_without_strides(call):
    leaves = call.leaves(torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with poisoned(), _choice.forced(True):
        # the gradient of a sum has strides of zero
        results = torch.autograd.grad(sum(out.sum() for out in call(*leaves)), leaves)
    wanted = torch.autograd.grad(sum(out.sum() for out in call(*exact)), exact)
    for name, value, expected in zip("xwbnm", results, wanted, strict=False):
        # the sum of a norm's outputs hardly depends on what it takes
        assert error(value, expected) < (1e-5 if name in "xwb" else 1e-4)


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[6], CALLS[9], NORMS[1]], ids=lambda call: call.name)
def test_deterministic(one_processor, call):
    leaves = call.leaves(torch.float32)
    runs = [kernels(call, leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
@pytest.mark.parametrize(
    "call",
    [CALLS[0], CALLS[9], NORMS[0]],
    ids=lambda call: call.name,
)
def test_an_empty_batch_passes(call):
    leaves = replace(call, size=(0, *call.size[1:])).leaves(torch.float32)
    for value, leaf in zip(kernels(call, leaves)[-len(leaves) :], leaves, strict=True):
        assert value.shape == leaf.shape and not value.any()


@needs_interpreter
def test_averages_what_it_returns():
    """In the type of the map, rounded once."""
    call = Call((2, 9, 7, 8), mean=True)
    y, mean = kernels(call, call.leaves(torch.float16))[:2]
    assert torch.equal(mean, y.double().mean((1, 2)).half())


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(Call.__call__, fullgraph=True, backend="aot_eager")
    call = NORMS[2]
    leaves = call.leaves(torch.float32)
    with _choice.forced(True):
        compared = zip(compiled(call, *leaves), call(*leaves), strict=True)
        assert all(torch.equal(a, b) for a, b in compared)


def test_tiles():
    assert [tiles.channel_block(n) for n in (1, 56, 64, 80, 96, 192)] == [32, 64, 64, 32, 32, 64]
    for size in (3, 5, 7, 9):
        tile = tiles.strips_tile(size, 64)
        # a thread has a channel, or two side by side
        assert tile.groups * tile.block_c == tile.num_warps * 32 * (2 if size < 7 else 1)
    assert tiles.strips_tile(3, 64, "gelu").span > tiles.strips_tile(3, 64).span
    for channels in (1, 96, 100, 384, 1024, 2048):
        tile = tiles.norm_tile(channels)
        assert tile.block_c >= channels and tile.groups * tile.block_c == 128 * tile.num_warps
        pixels, block, _ = tiles.pixels_tile(channels, False)
        assert block >= channels and pixels >= 1


def test_rows_are_split_only_where_strips_do_not_fill_the_device():
    assert tiles.rows_of(56, 1000, 500) == 56
    assert tiles.rows_of(56, 250, 500) == 28
    assert tiles.rows_of(56, 1, 500) == 4
    assert tiles.rows_of(3, 1, 500) == 3
    assert tiles.rows_of(56, 0, 500) == 4
    assert [tiles.parts_of(n, 10) for n in (0, 1, 10, 11, 20, 25)] == [1, 1, 10, 6, 10, 9]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        *SMALL,
        *NORMS,
        Call((2, 50, 76, 224), residual=True, pre_act="gelu"),
        Call((16, 28, 28, 192), 7, act="gelu"),
        Call((8, 14, 14, 512), 9),
        Call((4, 112, 112, 128), stride=2, same=True, act="silu", mean=True),
        Call((8, 14, 14, 384), residual=True, norm="affine"),
        Call((8, 7, 7, 2048), residual=True, norm="affine"),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    assert not INTERPRETED
    leaves = call.leaves(dtype)
    check(call, leaves)
    runs = [kernels(call, leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call", [CALLS[0], CALLS[6], CALLS[9], NORMS[0]], ids=lambda call: call.name
)
def test_captures_in_a_cuda_graph(call):
    leaves = call.leaves(torch.float16)
    with _choice.forced(True):
        check_cuda_graph(lambda *inputs: call(*inputs)[0], leaves, torch.tensor(0.5).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        Call((0, 64, 64, 96), residual=True, pre_act="gelu"),
        Call((0, 64, 64, 96), stride=2, act="relu"),
        Call((0, 64, 64, 96), norm="affine"),
    ],
    ids=lambda call: call.name,
)
def test_offsets_beyond_31_bits(call):
    batch = 2**31 // (64 * 64 * 96) + 2
    call = replace(call, size=(batch, 64, 64, 96))
    _, *rest = replace(call, size=(1, 64, 64, 96)).leaves(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(call.size, device="cuda", dtype=torch.bfloat16, generator=generator)
    x.requires_grad_()
    # the last image, alone
    last = x.detach()[-1:].clone().requires_grad_()
    with _choice.forced(True):
        out, alone = call(x, *rest)[-1], call(last, *rest)[-1]
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        (wanted,) = torch.autograd.grad(alone.square().sum(), last)
    assert torch.equal(out[-1:], alone)
    assert torch.equal(gradient[-1:], wanted)
