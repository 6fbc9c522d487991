"""The row by row form of dynamic mixing: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backbones.ops import dynamic_mixing
from tests.support import golden
from tests.support.kernels import DEVICE, error, exact, needs_interpreter, run

OP = "dynamic_mixing"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)` with windows of two sizes."""

    map_size: tuple[int, int, int]
    sizes: tuple[int, int]
    heads: int = 1
    dim: int = 16

    @property
    def name(self) -> str:
        """Size of the map, windows, heads."""
        return f"{'x'.join(map(str, self.map_size))} {self.sizes} {self.heads}x{self.dim}"

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The six inputs, on `DEVICE`; small ones in float32."""
        channels, slots = self.heads * self.dim, sum(size**2 for size in self.sizes)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (*self.map_size, channels),
            "kernel": (self.map_size[0], self.heads, self.dim, slots),
            "value": (*self.map_size, 2 * channels),
            "bias": (slots,),
        }
        for name, size in zip(("small", "large"), self.sizes, strict=True):
            shapes[name] = (self.heads, 2 * size - 1, 2 * size - 1)
        return [
            torch.from_numpy(golden.normal(name, shape))
            .to(DEVICE, dtype if len(shape) == 4 else torch.float32)
            .requires_grad_()
            for name, shape in shapes.items()
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        shape = (*self.map_size, 2 * self.heads * self.dim)
        return torch.from_numpy(golden.normal("weight", shape)).to(DEVICE, dtype)


# one block and several of a row; windows as large as the map
CALLS = [
    Call((2, 3, 4), (3, 3), heads=2, dim=8),
    Call((1, 5, 18), (3, 5), dim=10),
]
# in which 34 queries see the keys of a block near a border
WIDE = Call((1, 13, 44), (3, 13))
# beside those, for a device
LARGE = [
    Call((2, 50, 76), (5, 13), heads=8),
    Call((2, 25, 38), (5, 7), heads=12, dim=14),
    Call((40, 20, 20), (5, 13), heads=8),
    Call((2, 20, 33), (5, 7), heads=2, dim=32),
]

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture(autouse=True)
def band(monkeypatch):
    """The launcher of this form, for all maps and with parts of few rows."""
    chooser = importlib.import_module(f"backbones.ops.triton.{OP}")
    monkeypatch.setattr(chooser, "_PIXELS", 0)
    module = importlib.import_module("backbones.ops.triton._mixing_band")
    monkeypatch.setattr(module, "_ROWS", 2)
    return module


def check(function, leaves: list[Tensor], weight: Tensor) -> None:
    """Compare output and gradients of the kernels with float64."""
    results = run(OP, function, leaves, weight)
    dtype = leaves[0].dtype
    assert [r.dtype for r in results[1:]] == [leaf.dtype for leaf in leaves]
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(band, monkeypatch, name):
    """Else the tests below would compare PyTorch, or another form, with itself."""
    monkeypatch.setattr(band, name, lambda *_: pytest.fail("launched"))
    call = CALLS[0]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        check(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@each_call
def test_interpreted(call):
    check(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.slow
def test_interpreted_of_large_windows():
    check(dynamic_mixing, WIDE.leaves(torch.float32), WIDE.weight(torch.float32))


@needs_interpreter
def test_interpreted_in_float16():
    call = Call((1, 4, 17), (3, 3), dim=14)
    check(dynamic_mixing, call.leaves(torch.float16), call.weight(torch.float16))


@needs_interpreter
def test_large_maps_take_this_form(band, monkeypatch):
    monkeypatch.undo()
    chooser = importlib.import_module(f"backbones.ops.triton.{OP}")
    forms = []
    for height, width in ((14, 14), (13, 20), (50, 76)):
        leaves = Call((1, height, width), (5, 13)).leaves(torch.float32)
        forms.append([chooser.form(half) is band for half in chooser.halves(*leaves)])
    assert forms == [[True, False], [True, True], [True, True]]


@needs_interpreter
def test_strides():
    call = Call((2, 3, 5), (3, 3), dim=8)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    query, kernel, value = leaves[:3]
    # rows and columns of one map, a slice of channels, kernels of two images in turn
    query = query.permute(0, 3, 2, 1).contiguous()
    value, kernel = torch.cat([value, value], -1), kernel.transpose(0, 2).contiguous()
    inputs = [x.requires_grad_() for x in (query, kernel, value, *leaves[3:])]

    def function(query: Tensor, kernel: Tensor, value: Tensor, *small: Tensor) -> Tensor:
        query, kernel = query.permute(0, 3, 2, 1), kernel.transpose(0, 2)
        return dynamic_mixing(query, kernel, value[..., 3 : 3 + value.shape[-1] // 2], *small)

    check(function, inputs, call.weight(torch.float32))


@needs_interpreter
def test_gradients_of_logits_are_summed_over_images_where_they_are_many(band, monkeypatch):
    call = Call((3, 3, 5), (3, 3), dim=4)
    # those of one half and image take 540 bytes
    monkeypatch.setattr(band, "_SCRATCH", 1100)
    monkeypatch.setattr(band, "_ENOUGH", 0)
    chooser = importlib.import_module(f"backbones.ops.triton.{OP}")
    small, _ = chooser.halves(*call.leaves(torch.float32))
    assert band._images(small, 1) == 2
    check(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
def test_float16_gradients_may_leave_its_range_inside():
    """Gradients of logits of 2e5 and more, of which small kernels make small ones of queries."""
    call = Call((1, 3, 4), (3, 3), dim=8)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float16)]
    query, kernel, value = leaves[:3]
    inputs = [query, kernel * 1e-3, value * 30, *leaves[3:]]
    inputs = [x.to(leaf.dtype).requires_grad_() for x, leaf in zip(inputs, leaves, strict=True)]
    weight = call.weight(torch.float16) * 2000

    def function(*inputs: Tensor) -> Tensor:
        query, *others = inputs
        # the gradient of the kernels would leave the range whatever computes it
        return dynamic_mixing(query * 2**-8, *others)

    results = run(OP, function, inputs, weight)
    for value, wanted in zip(results, exact(function, inputs, weight), strict=True):
        assert torch.isfinite(value).all()
        assert error(value, wanted) < TOLERANCE[torch.float16]


@needs_interpreter
def test_deterministic():
    call = Call((1, 3, 4), (3, 3))
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    runs = [run(OP, dynamic_mixing, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [*CALLS, WIDE, *LARGE], ids=lambda call: call.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaves, weight = call.leaves(dtype), call.weight(dtype)
    check(dynamic_mixing, leaves, weight)
    runs = [run(OP, dynamic_mixing, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
