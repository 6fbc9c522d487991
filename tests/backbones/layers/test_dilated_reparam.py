"""Large kernels that train as a sum of dilated ones, against that sum of PyTorch's layers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timm.layers import set_exportable
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from backbones import ops
from backbones.layers import DilatedReparamConv
from backbones.layers.dilated_reparam import BRANCHES
from tests.support import golden
from tests.support.process import ROOT

SIZES = list(BRANCHES)
SIZE = (2, 9, 7)


class Sum(nn.Module):
    """The convolutions and norms of a layer, one by one; with its own parameters."""

    def __init__(self, layer: DilatedReparamConv) -> None:
        super().__init__()
        self.conv, self.bn, self.branches = layer.conv, layer.bn, layer.branches

    def forward(self, x: Tensor) -> Tensor:
        planes = x.permute(0, 3, 1, 2)
        units = [self, *self.branches]
        return sum(unit.bn(unit.conv(planes)) for unit in units).permute(0, 2, 3, 1)


def pair(kernel: int, dtype: torch.dtype = torch.float64, dim: int = 5) -> list[nn.Module]:
    """A layer, and what it stands for."""
    layers = [DilatedReparamConv(dim, kernel, dtype=dtype) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict(golden.fill_model(layer))
    return [layers[0], Sum(layers[1])]


def maps(dim: int = 5, size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(golden.normal("x", (*size, dim))).to(dtype).requires_grad_()


def step(layer: nn.Module, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Result, gradients of the map and the parameters, and what the norms keep."""
    out = layer(x)
    if weight is None:
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape))).to(out.dtype)
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), [x, *named.values()])
    return {
        "out": out,
        **dict(zip(["x", *named], gradients, strict=True)),
        **{f"{name} kept": b.clone() for name, b in layer.named_buffers()},
    }


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        wanted = theirs[name].detach().double()
        # gradients of kernels before a norm cancel: a few are next to nothing
        scale = wanted.abs().max().clamp(min=1)
        assert (value.double() - wanted).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("kernel", SIZES)
def test_trains_as_convolutions_and_norms_do(kernel):
    layer, expected = pair(kernel)
    for _ in range(2):
        compare(step(layer, maps()), step(expected, maps()), 1e-9)
    compare(step(layer.eval(), maps()), step(expected.eval(), maps()), 1e-9)


@pytest.mark.parametrize("kernel", [7, 17])
def test_trains_in_float32(kernel):
    layer, expected = pair(kernel)[0].float(), pair(kernel)[1]
    compare(step(layer, maps(dtype=torch.float32)), step(expected, maps()), 2e-5)


def test_momentum_none_averages_all_batches():
    layer, expected = pair(7)
    for module in (layer, expected):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
    for scale in (1, 2, 3):
        inputs = [(scale * maps()).detach().requires_grad_() for _ in range(2)]
        compare(step(layer, inputs[0]), step(expected, inputs[1]), 1e-9)


def test_some_norms_may_be_in_eval_mode_and_some_frozen():
    layer, expected = pair(13)
    for module in (layer, expected):
        module.bn.eval()
        module.branches[2].bn.eval()
        module.branches[4] = freeze_batch_norm_2d(module.branches[4])
    compare(step(layer, maps()), step(expected, maps()), 1e-9)
    for module in (layer, expected):
        freeze_batch_norm_2d(module)
    results = [step(module, maps()) for module in (layer, expected)]
    compare(*results, 1e-9)
    assert torch.equal(results[0]["bn.running_mean kept"], layer.bn.running_mean)


def test_reference_switch_and_exportable_layers_train_alike():
    layer, expected = pair(7)
    with set_exportable(True):
        plain = pair(7)[0]
    wanted = step(expected, maps())
    with ops.use_reference():
        compare(step(layer, maps()), wanted, 1e-9)
    compare(step(plain, maps()), wanted, 1e-9)
    graph = torch.jit.trace(plain.eval(), maps()).inlined_graph
    assert "backbones::" not in str(graph)


@pytest.mark.parametrize("kernel", SIZES)
def test_reparameterize_changes_nothing(kernel):
    layer = pair(kernel)[0].eval()
    expected = layer(maps())
    assert layer.reparameterize() is layer and layer.reparameterize() is layer
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]
    assert (layer(maps()) - expected).abs().max() / expected.abs().max() < 1e-12
    made = DilatedReparamConv(5, kernel, reparam=True, dtype=torch.float64)
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(maps()), layer.train()(maps()))
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bit_types(dtype, tolerance):
    layer, exact = pair(13)[0].to(dtype), pair(13)[0].to(dtype).double()
    layer.eval(), exact.eval()
    x = maps().to(dtype)
    for out in (layer(x), layer.reparameterize()(x)):
        wanted = exact(x.double())
        assert out.dtype == dtype
        assert (out.double() - wanted).norm() / wanted.norm() < tolerance
    assert layer.conv.weight.dtype == layer.conv.bias.dtype == dtype


def test_autocast_measures_and_merges_in_float32():
    layer, exact = pair(13, torch.float32)[0], pair(13)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(maps(dtype=torch.float32))
    wanted = exact(maps())
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).norm() / wanted.norm() < 2e-2
    kept = [layer.bn.running_var, layer.branches[0].bn.running_var]
    for value, bn in zip(kept, (exact.bn, exact.branches[0].bn), strict=True):
        assert value.dtype == torch.float32
        assert (value - bn.running_var).norm() / bn.running_var.norm() < 1e-2


@pytest.mark.parametrize("plain", [False, True])
def test_gradients_under_autocast_on_a_large_map(plain):
    """PyTorch's own, of dilated kernels in bfloat16 on a CPU, are not even finite."""
    size, results = (2, 56, 56), []
    for dtype in (torch.float32, torch.float64):
        layer = pair(13, dtype)[0]
        with (
            torch.autocast("cpu", torch.bfloat16, dtype == torch.float32),
            ops.use_reference(plain),
        ):
            out = layer(maps(size=size, dtype=dtype))
        weight = torch.from_numpy(golden.normal("weight", tuple(out.shape))).to(out.dtype)
        results.append(torch.autograd.grad((out * weight).sum(), list(layer.parameters())))
    norms = max(g.norm() for g in results[1])
    for value, wanted in zip(*results, strict=True):
        assert (value.double() - wanted).norm() < 2e-2 * norms


def test_trains_compiled_whole():
    torch._dynamo.reset()
    layer, expected = pair(7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (SIZE, (3, 5, 8)):
        ours, theirs = step(compiled, maps(size=size)), step(expected, maps(size=size))
        compare({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, theirs, 1e-9)


@pytest.mark.parametrize("merged", [False, True])
def test_scripts_and_traces_in_eval_mode(merged):
    layer = pair(7)[0].eval()
    layer = layer.reparameterize() if merged else layer
    forms = [
        torch.jit.script(layer),
        torch.jit.trace(layer, maps()),
        torch.fx.symbolic_trace(layer),
    ]
    for form in forms:
        assert torch.equal(form(maps(size=(1, 5, 6))), layer(maps(size=(1, 5, 6))))


def test_torch_fx_keeps_what_training_does():
    layer, expected = pair(7)
    traced = torch.fx.symbolic_trace(layer)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert not any(b.any() for n, b in layer.named_buffers() if n.endswith("tracked"))
    compare(step(traced, maps()), step(expected, maps()), 1e-9)


def test_torchscript_does_not_train():
    scripted = torch.jit.script(pair(7)[0])
    with pytest.raises(Exception, match="TorchScript knows this layer in eval mode"):
        scripted(maps())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="kernel_size=19 is none of"):
        DilatedReparamConv(4, 19)
    with pytest.raises(ValueError, match="more than one pixel"):
        pair(7)[0](maps(size=(1, 1, 1)))


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from tests.backbones.layers.test_dilated_reparam import PARTS, maps, pair, step

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
layer = nn.SyncBatchNorm.convert_sync_batchnorm(pair(7)[0])
x, weight = (maps(size=(3, 6, 5)).detach()[PARTS[rank]] for _ in range(2))
torch.save(step(layer, x.requires_grad_(), weight.square()), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
# of different sizes
PARTS = [slice(0, 1), slice(1, 3)]


def test_synchronized_norms_measure_the_batch_of_all_processes(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    x = maps(size=(3, 6, 5))
    expected = step(pair(7)[1], x, x.detach().square())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, wanted in expected.items():
        values = [result[name] for result in results]
        if name in ("out", "x"):
            value = torch.cat(values)
        else:
            value = values[0] if name.endswith("kept") else sum(values)
        compare({name: value}, {name: wanted}, 1e-9)
