"""The feed forward network, beside timm's."""

import pytest
import timm.layers
import torch
import torch.fx
import torch.nn.functional as F

from backbones.layers import mlp as module
from backbones.layers.gelu import Gelu, GeluTanh
from backbones.layers.mlp import Mlp
from tests.support import golden


@pytest.fixture
def blocks(monkeypatch):
    """Take ten tokens at a time."""
    monkeypatch.setattr(module, "_TOKENS", 10)


def pair(dtype=torch.float64) -> tuple[Mlp, timm.layers.Mlp]:
    torch.manual_seed(0)
    ours, timms = Mlp(6, 24, dtype=dtype), timm.layers.Mlp(6, 24, dtype=dtype)
    timms.load_state_dict(ours.state_dict())
    return ours.eval(), timms.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.from_numpy(golden.normal("x", shape))


SHAPES = {"one block": (2, 9, 6), "last block not full": (1, 7, 5, 6), "one vector": (6,)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("blocks")
@torch.no_grad()
def test_equals_timms(shape):
    ours, timms = pair()
    x = tokens(*shape)
    before = x.clone()
    torch.testing.assert_close(ours(x), timms(x), rtol=0, atol=1e-14)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("blocks")
@torch.no_grad()
def test_takes_any_strides():
    ours, timms = pair()
    x = tokens(1, 6, 7, 5).permute(0, 2, 3, 1)
    y = ours(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, timms(x), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("blocks")
@torch.no_grad()
def test_autocast_decides_the_type():
    ours, timms = pair(torch.float32)
    x = tokens(1, 7, 5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), timms(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("blocks")
def test_keeps_few_hidden_values_without_autograd_only():
    ours, _ = pair()
    sizes: list[int] = []
    ours.act.register_forward_hook(lambda _, args, y: sizes.append(len(y.flatten(0, -2))))
    x = tokens(1, 7, 5, 6)
    with torch.no_grad():
        ours(x)
    assert sizes == [10, 10, 10, 5]
    ours(x)
    assert sizes[4:] == [35]


def test_gradients_are_timms():
    ours, timms = pair()
    grads = [
        torch.autograd.grad(net(tokens(1, 7, 5, 6)).sin().sum(), net.parameters())
        for net in (ours, timms)
    ]
    for grad, expected in zip(*grads, strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.usefixtures("blocks")
@torch.no_grad()
def test_graphs_hold_one_block():
    ours, timms = pair(torch.float32)
    x = tokens(1, 7, 5, 6).float()
    expected = timms(x)
    for graph in (
        torch.jit.script(ours),
        torch.jit.trace(ours, x),
        torch.fx.symbolic_trace(ours),
        torch.compile(ours, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(graph(x), expected)
    exported = torch.export.export(ours, (x,))
    assert sum(node.target == torch.ops.aten.linear.default for node in exported.graph.nodes) == 2


@pytest.mark.parametrize("act", [Gelu, GeluTanh])
def test_activations_write_over_their_input_without_autograd_only(act):
    x = tokens(3, 50).float()
    expected = F.gelu(x, approximate="none" if act is Gelu else "tanh")
    with torch.no_grad():
        y = act()(z := x.clone())
    assert y.data_ptr() == z.data_ptr()
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    y = act()(z := x.clone())
    assert torch.equal(y, expected)
    assert torch.equal(z, x)
