"""The Triton kernels: in the interpreter, and with `-m gpu` on a device."""

import importlib
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from backbones.ops import dynamic_mixing
from backbones.ops._mixing import fold
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

OP = "dynamic_mixing"


@dataclass(frozen=True)
class Call:
    """One call on a map `(batch, height, width)`."""

    map_size: tuple[int, int, int]
    heads: int
    dim: int
    small: int
    large: int

    @property
    def name(self) -> str:
        """Size of the map, heads, windows."""
        size = "x".join(map(str, self.map_size))
        return f"{size} {self.heads}x{self.dim} {self.small},{self.large}"

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The six arguments on `DEVICE`, bias and tables in float32."""
        channels, slots = self.heads * self.dim, self.small**2 + self.large**2
        shapes = {
            "query": (*self.map_size, channels),
            "kernel": (self.map_size[0], self.heads, self.dim, slots),
            "value": (*self.map_size, 2 * channels),
            "bias": (slots,),
            "table_small": (self.heads, 2 * self.small - 1, 2 * self.small - 1),
            "table_large": (self.heads, 2 * self.large - 1, 2 * self.large - 1),
        }
        tensors = [torch.from_numpy(golden.normal(name, shape)) for name, shape in shapes.items()]
        tensors[0] /= (2 * self.dim) ** 0.5
        types = [dtype] * 3 + [torch.float32] * 3
        return [t.to(DEVICE, kind).requires_grad_() for t, kind in zip(tensors, types, strict=True)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the output is multiplied by, to take gradients."""
        shape = (*self.map_size, 2 * self.heads * self.dim)
        return torch.from_numpy(golden.normal("weight", shape)).to(DEVICE, dtype)


# both halves by classes: one window, some of three sizes, and queries of a class in several blocks
CLASSES = [
    Call((1, 7, 7), 2, 14, 5, 7),
    Call((3, 7, 8), 1, 10, 7, 7),
    Call((1, 13, 13), 1, 8, 13, 13),
    Call((1, 14, 14), 1, 16, 13, 13),
]
# the large half by classes, the small one by bands; `test_mixing_band.py` has more of these
MIXED = [Call((1, 7, 9), 1, 10, 3, 7)]
BANDS = [Call((1, 9, 17), 1, 8, 3, 5)]
CALLS = CLASSES + MIXED
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


@pytest.fixture
def launcher():
    return importlib.import_module(f"backbones.ops.triton.{OP}")


kernels = partial(run, OP)


def check(function, leaves: list[Tensor], weight: Tensor) -> None:
    """Compare output and gradients of the kernels with float64."""
    results = kernels(function, leaves, weight)
    dtype = leaves[0].dtype
    assert [r.dtype for r in results] == [dtype] * 4 + [torch.float32] * 3
    for value, wanted in zip(results, exact(function, leaves, weight), strict=True):
        assert error(value, wanted) < TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_are_what_runs(launcher, monkeypatch, name):
    """Else the tests below would compare PyTorch with itself."""
    monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("launched"))
    call = CALLS[0]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        kernels(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize(
    "calls, forms",
    [
        (CLASSES, ["_mixing_class", "_mixing_class"]),
        (MIXED, ["_mixing_band", "_mixing_class"]),
        (BANDS, ["_mixing_band", "_mixing_band"]),
    ],
    ids=["classes", "mixed", "bands"],
)
def test_the_size_of_the_map_chooses_the_form(launcher, calls, forms):
    for call in calls:
        halves = launcher.halves(*call.leaves(torch.float32))
        assert [launcher.form(half).__name__.split(".")[-1] for half in halves] == forms


@needs_interpreter
@each_call
def test_interpreted(call):
    check(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))


@needs_interpreter
@pytest.mark.parametrize("call", [CLASSES[0], CLASSES[3], *MIXED], ids=lambda call: call.name)
def test_interpreted_in_float16(call):
    check(dynamic_mixing, call.leaves(torch.float16), call.weight(torch.float16))


@needs_interpreter
@pytest.mark.parametrize("layout", ["channels first", "channel slice", "every other row"])
def test_strides(layout):
    call = Call((2, 5, 6), 1, 10, 3, 5)
    leaves = [leaf.detach() for leaf in call.leaves(torch.float32)]
    maps, small = leaves[:3], leaves[3:]
    if layout == "channels first":
        maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        view = lambda x: x.permute(0, 2, 3, 1)  # noqa: E731
    elif layout == "channel slice":
        maps = [torch.cat([x, x], -1) for x in maps]
        view = lambda x: x[..., 5 : 5 + x.shape[-1] // 2]  # noqa: E731
    else:
        maps = [x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in maps]
        view = lambda x: x[:, ::2, ::2]  # noqa: E731
    # tables are read as they are
    small = [x.mT.contiguous() if x.ndim == 3 else x.repeat_interleave(2) for x in small]

    def function(*inputs: Tensor) -> Tensor:
        bias, *tables = inputs[3:]
        return dynamic_mixing(*map(view, inputs[:3]), bias[::2], *(t.mT for t in tables))

    leaves = [x.requires_grad_() for x in (*maps, *small)]
    check(function, leaves, call.weight(torch.float32))


@needs_interpreter
def test_gradients_without_strides():
    call = CALLS[1]
    check(dynamic_mixing, call.leaves(torch.float32), torch.ones((), device=DEVICE))


@needs_interpreter
def test_images_in_several_groups(monkeypatch):
    """Sums over the batch in parts, as on a device with room for few programs."""
    module = importlib.import_module("backbones.ops.triton._mixing_class")
    groups = []

    def two(half, tile, programs):
        groups.append(half.batch)
        return 2, 2

    monkeypatch.setattr(module, "_groups", two)
    call = CALLS[1]
    check(dynamic_mixing, call.leaves(torch.float32), call.weight(torch.float32))
    assert groups == [3, 3]


@needs_interpreter
@pytest.mark.parametrize("images", [1, 3, 128])
@pytest.mark.parametrize("call", CLASSES, ids=lambda call: call.name)
def test_groups_cover_the_batch(launcher, call, images):
    module = importlib.import_module("backbones.ops.triton._mixing_class")
    call = Call((images, *call.map_size[1:]), call.heads, call.dim, call.small, call.large)
    for half in launcher.halves(*(x.to("meta") for x in call.leaves(torch.float16))):
        chunk, groups = module._groups(half, module.slots_tile(half), 6)
        assert (groups - 1) * chunk < images <= groups * chunk


@needs_interpreter
def test_a_large_bias_changes_nothing():
    """It is the same for all slots; tiles have rows that are no queries."""
    call = CLASSES[1]
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    wanted = exact(dynamic_mixing, leaves, weight)
    leaves[3] = (leaves[3].detach() + 256).requires_grad_()
    for value, expected in zip(kernels(dynamic_mixing, leaves, weight), wanted, strict=True):
        assert error(value, expected) < 1e-4


@needs_interpreter
@pytest.mark.parametrize("size", [(5, 5), (6, 11)])
def test_folds_as_pytorch(launcher, size):
    """A gradient of own slots, and one of pixels."""
    logits = torch.from_numpy(golden.normal("logits", (2, *size, 25))).float()
    for value, wanted in zip(launcher.fold(logits), fold(logits.double()), strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 1e-6


@needs_interpreter
def test_float16_holds_sums_over_pixels():
    """Gradients of the bias and the tables leave the range of float16, those of kernels do not."""
    call = CLASSES[0]
    leaves = [leaf.detach() for leaf in call.leaves(torch.float16)]
    leaves[0], leaves[2] = leaves[0] * 0.3, leaves[2] * 100
    weight = call.weight(torch.float16) * 300
    results = kernels(dynamic_mixing, [leaf.requires_grad_() for leaf in leaves], weight)
    wanted = exact(dynamic_mixing, leaves, weight)
    assert all(x.abs().max() > 2**16 for x in wanted[-3:])
    for value, expected in zip(results[2:], wanted[2:], strict=True):
        assert error(value, expected) < TOLERANCE[torch.float16]


@needs_interpreter
def test_float16_gradients_may_leave_its_range_inside():
    """Gradients of logits of 2e5 and more, of which small kernels make small ones of queries."""
    call = CLASSES[1]
    leaves = [leaf.detach() for leaf in call.leaves(torch.float16)]
    scales = (1, 1e-3, 30, 1, 1, 1)
    inputs = [(x * by).requires_grad_() for x, by in zip(leaves, scales, strict=True)]
    weight = call.weight(torch.float16) * 2000

    def function(query: Tensor, *others: Tensor) -> Tensor:
        # the gradient of the kernels would leave the range whatever computes it
        return dynamic_mixing(query * 2**-10, *others)

    results = kernels(function, inputs, weight)
    for value, wanted in zip(results, exact(function, inputs, weight), strict=True):
        assert torch.isfinite(value).all()
        assert error(value, wanted) < TOLERANCE[torch.float16]


@needs_interpreter
def test_deterministic():
    call = MIXED[0]
    leaves, weight = call.leaves(torch.float32), call.weight(torch.float32)
    runs = [kernels(dynamic_mixing, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_interpreter
def test_the_logsumexp_is_that_of_pytorch():
    operator = torch.ops.backbones.dynamic_mixing
    leaves = [leaf.detach() for leaf in CALLS[1].leaves(torch.float32)]
    with triton_kernels(OP):
        lse = operator(*leaves)[1]
    wanted = operator(*(leaf.double() for leaf in leaves))[1]
    assert lse.shape == wanted.shape and error(lse, wanted) < 1e-6


@needs_interpreter
def test_an_empty_batch_passes():
    leaves = Call((0, 7, 8), 1, 8, 5, 7).leaves(torch.float32)
    with triton_kernels(OP):
        dynamic_mixing(*leaves).sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@needs_interpreter
def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(dynamic_mixing, fullgraph=True, backend="aot_eager")
    leaves = [leaf.detach() for leaf in CALLS[0].leaves(torch.float32)]
    with triton_kernels(OP):
        assert torch.equal(compiled(*leaves), dynamic_mixing(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        *CALLS,
        *BANDS,
        Call((64, 14, 14), 8, 16, 5, 13),
        Call((64, 7, 7), 32, 8, 5, 7),
        Call((2, 50, 76), 16, 10, 5, 13),
    ],
    ids=lambda call: call.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(call, dtype):
    leaves, weight = call.leaves(dtype), call.weight(dtype)
    check(dynamic_mixing, leaves, weight)
    runs = [kernels(dynamic_mixing, leaves, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [*CLASSES[:1], *MIXED, *BANDS], ids=lambda call: call.name)
def test_in_a_cuda_graph(call):
    check_cuda_graph(dynamic_mixing, call.leaves(torch.float16), call.weight(torch.float16))
