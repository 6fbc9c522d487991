"""The launchers of the Toeplitz kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import _depthwise_pytorch as pytorch
from backbones.ops._depthwise import Fused, Window
from tests.support import golden
from tests.support.kernels import DEVICE, error, needs_interpreter, poisoned

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
PARTS = ("forward", "grad_sum", "grad_input", "grad_weight")
NONE = Fused()


@dataclass(frozen=True)
class Call:
    """One convolution of a map `(batch, height, width, channels)`, and its gradients."""

    size: tuple[int, int, int, int]
    kernel: int
    fused: Fused = NONE
    bias: bool = False
    addend: bool = False
    mean: str = ""

    @property
    def name(self) -> str:
        """Size, kernel and what is fused."""
        parts = [name for name in ("bias", "addend") if getattr(self, name)]
        sizes = f"{'x'.join(map(str, self.size))} {self.kernel}"
        return f"{sizes} {tuple(self.fused)} {parts} {self.mean}"

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Everything that any of the launchers takes."""
        batch, _, _, channels = self.size
        shapes = {
            "x": self.size,
            "weight": (channels, 1, self.kernel, self.kernel),
            "bias": (channels,),
            "addend": self.size,
            "grad": self.size,
            "grad_mean": (batch, channels),
        }
        tensors = {n: torch.from_numpy(golden.normal(n, s)) for n, s in shapes.items()}
        tensors["weight"] /= self.kernel
        return {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}

    def run(self, module, part: str, given: dict[str, Tensor]) -> list[Tensor]:
        """Call one function of an implementation."""
        at, bias = Window(self.kernel), given["bias"] if self.bias else None
        x, weight, grad = given["x"], given["weight"], given["grad"]
        if part == "forward":
            addend = given["addend"] if self.addend else None
            return list(module.forward(x, weight, bias, addend, at, self.fused, self.mean))
        if part == "grad_sum":
            mean = given["grad_mean"] if self.mean else None
            return [module.grad_sum(grad, mean, x, weight, bias, at, self.fused)]
        if part == "grad_input":
            return [module.grad_input(grad, x, weight, at, self.fused)]
        return list(module.grad_weight(grad, x, weight, at, self.fused))


# maps below the kernel, channels beside a block, several strips, rows in two parts, two blocks
CALLS = [
    Call((2, 5, 7, 3), 13, Fused(act="gelu"), bias=True, mean="mean"),
    Call((1, 4, 18, 9), 11, Fused(True, "gelu"), addend=True),
    Call((1, 17, 3, 3), 11, Fused(True, "gelu", "silu"), bias=True, mean="square"),
    Call((1, 4, 9, 2), 17),
    Call((6, 2, 20, 8), 15, Fused(act="relu"), addend=True, mean="mean"),
]
each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launchers():
    return importlib.import_module("backbones.ops.triton._toeplitz")


@pytest.fixture
def one_multiprocessor(monkeypatch):
    module = importlib.import_module("backbones.ops.triton._launch")
    monkeypatch.setattr(module, "_MULTIPROCESSORS", 1)


def check(launchers, call: Call, part: str, given: dict[str, Tensor]) -> None:
    """Compare with PyTorch in float64."""
    with poisoned():
        results = call.run(launchers, part, given)
    doubled = {name: tensor.cpu().double() for name, tensor in given.items()}
    wanted = call.run(pytorch, part, doubled)
    assert len(results) == len(wanted)
    for value, expected in zip(results, wanted, strict=True):
        squares = value.ndim == 2 and call.mean == "square"
        assert value.dtype == torch.float32 if squares else given["x"].dtype
        assert value.shape == expected.shape
        assert value.is_contiguous() or part == "grad_sum"
        assert error(value, expected) < TOLERANCE[value.dtype]


@needs_interpreter
@each_call
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(launchers, call, part):
    check(launchers, call, part, call.tensors(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CALLS[0], CALLS[1]], ids=lambda call: call.name)
@pytest.mark.parametrize("part", PARTS)
def test_interpreted_in_16_bit(launchers, call, part):
    check(launchers, call, part, call.tensors(torch.float16))


@needs_interpreter
@pytest.mark.parametrize("part", ["forward", "grad_weight"])
@pytest.mark.parametrize("call", CALLS[2::2], ids=lambda call: call.name)
def test_with_few_multiprocessors_programs_do_more(launchers, one_multiprocessor, call, part):
    check(launchers, call, part, call.tensors(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("part", PARTS)
def test_strides(launchers, part):
    call = Call((1, 3, 5, 3), 11, Fused(True, "gelu", "gelu"), addend=True)
    given = call.tensors(torch.float32)
    x, addend, grad = given["x"], given["addend"], given["grad"]
    given["x"] = x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3]
    given["addend"] = torch.cat([addend, addend], 3)[..., 2:5]
    given["grad"] = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(launchers, call, part, given)
    given["x"], given["grad"] = torch.cat([x, x], 3)[..., 2:5], grad.flip(1).repeat(1, 1, 2, 1)
    given["grad"] = given["grad"][:, :, ::2]
    check(launchers, call, part, given)


@needs_interpreter
@pytest.mark.parametrize("part", PARTS[1:])
def test_gradients_without_strides(launchers, part):
    call = Call((2, 3, 5, 3), 11, Fused(True, "relu", "gelu"), mean="mean")
    given = call.tensors(torch.float32)
    given["grad"] = torch.arange(3.0).expand(call.size)
    check(launchers, call, part, given)


@needs_interpreter
@pytest.mark.parametrize("part", PARTS)
def test_deterministic(launchers, part):
    call = CALLS[4]
    given = call.tensors(torch.float32)
    runs = [call.run(launchers, part, given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
@pytest.mark.parametrize("part", PARTS)
def test_an_empty_batch_passes(launchers, part):
    call = Call((0, 4, 5, 3), 13, Fused(True, "gelu", "gelu"), bias=True, mean="mean")
    given = call.tensors(torch.float32)
    with poisoned():
        results = call.run(launchers, part, given)
    wanted = call.run(pytorch, part, {n: t.double() for n, t in given.items()})
    for value, expected in zip(results, wanted, strict=True):
        assert value.shape == expected.shape
        assert not value.any()


@needs_interpreter
@pytest.mark.parametrize("kernel", [11, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cols", [8, 16])
def test_matrices_are_packed_as_the_kernels_read_them(launchers, kernel, dtype, cols):
    weight = Call((1, 1, 1, 9), kernel).tensors(dtype)["weight"]
    for flip in (False, True):
        matrices = launchers.expand(weight, cols, flip)
        assert matrices.shape == (16, kernel, 32 * cols) and not matrices[9:].any()
        turned = weight.flip(2, 3) if flip else weight
        # a tap is in as many columns as there are
        for c, a in ((0, 0), (8, kernel - 1)):
            values = turned[c, 0, a].repeat(cols).sort().values
            packed = matrices[c, a][matrices[c, a] != 0].sort().values
            assert torch.equal(values, packed)


@needs_interpreter
def test_sixteen_columns(launchers, monkeypatch):
    """The form for AMD GPUs."""
    monkeypatch.setattr(launchers, "columns", lambda: 16)
    call = Call((1, 3, 17, 2), 13)
    for dtype in (torch.float32, torch.float16):
        check(launchers, call, "forward", call.tensors(dtype))


@needs_interpreter
def test_maps_are_split_only_where_whole_columns_do_not_fill_the_device(launchers):
    split = launchers.split_map
    meta = lambda *size: torch.empty(size, device="meta")  # noqa: E731
    whole = split(meta(128, 56, 56, 64), 8)
    assert (whole.across, whole.total, whole.blocks) == (7, 896, 56)
    assert (whole.down, whole.rows) == (1, 56)
    assert split(meta(128, 14, 14, 384), 8).down == 1
    few = split(meta(2, 200, 304, 64), 8)
    assert few.blocks == 5 and few.down > 1 and few.rows * (few.down - 1) < 200
    assert few.rows * few.down >= 200
    assert split(meta(0, 5, 7, 3), 8).blocks == 0
    assert launchers.split_blocks(meta(128, 56, 56, 64), 56, 2) == 17
    assert launchers.split_blocks(meta(1, 5, 7, 64), 1, 2) == 1
    assert launchers.split_blocks(meta(0, 5, 7, 64), 0, 2) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        Call((16, 56, 56, 64), 17, bias=True, mean="mean"),
        Call((2, 100, 152, 112), 15, Fused(act="gelu"), bias=True),
        Call((32, 14, 14, 320), 13, Fused(True)),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_the_device(launchers, call, dtype):
    given = call.tensors(dtype)
    for part in PARTS:
        check(launchers, call, part, given)
        runs = [call.run(launchers, part, given) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
