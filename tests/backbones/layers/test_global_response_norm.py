"""Global response norm behind a convolution, against the layers one by one."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_exportable
from torch import Tensor, nn

from backbones import ops
from backbones.layers import GlobalResponseNorm
from tests.support import golden

DIM = 6


class Middle(nn.Module):
    """What is between the linear layers of a feed forward network of OverLoCK."""

    def __init__(self) -> None:
        super().__init__()
        dd = {"dtype": torch.float64}
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM, **dd)
        self.norm = GlobalResponseNorm(DIM, **dd)
        self.load_state_dict(golden.fill_model(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward_conv(x, self.conv.weight, self.conv.bias, True, "gelu")

    def one_by_one(self, x: Tensor) -> Tensor:
        t = F.gelu(x)
        y = t + self.conv(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        norms = y.square().sum((1, 2), keepdim=True).sqrt()
        ratio = norms / (norms.mean(3, keepdim=True) + 1e-6)
        return (self.norm.weight * ratio + 1) * y + self.norm.bias


def maps(*size: int) -> Tensor:
    return torch.from_numpy(golden.normal("x", (*size, DIM))).requires_grad_()


def step(out: Tensor, x: Tensor, layer: Middle) -> list[Tensor]:
    weight = torch.from_numpy(golden.normal("weight", tuple(out.shape)))
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("size", [(2, 5, 7), (3, 8, 8), (1, 1, 1)], ids=str)
def test_equals_the_layers_one_by_one(size):
    layer, x = Middle(), maps(*size)
    wanted = step(layer.one_by_one(x), x, layer)
    with set_exportable(True):
        plain = Middle()
    with ops.use_reference():
        switched = step(layer(x), x, layer)
    for results in (step(layer(x), x, layer), step(plain(x), x, plain), switched):
        for value, expected in zip(results, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    assert "backbones::" not in str(torch.jit.trace(plain, x).inlined_graph)


def test_channels_of_zeros_have_finite_gradients():
    layer = Middle()
    nn.init.zeros_(layer.conv.bias)
    x = maps(2, 4, 5).detach()
    x[..., 0] = 0
    x[0] = 0
    x.requires_grad_()
    for gradient in step(layer(x), x, layer):
        assert gradient.isfinite().all()


def test_squares_may_leave_the_range_of_float16():
    layer = Middle()
    x = (1000 * maps(2, 5, 7)).detach()
    exact, out = layer.one_by_one(x), layer.half()(x.half())
    assert out.dtype == torch.float16
    assert (out.double() - exact).norm() / exact.norm() < 5e-3


def test_autocast():
    layer, x = Middle(), maps(2, 5, 7)
    wanted = layer(x)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).norm() / wanted.norm() < 2e-2


def test_scripts_traces_and_compiles_whole():
    torch._dynamo.reset()
    layer = Middle()
    forms = [
        torch.jit.script(layer),
        torch.jit.trace(layer, maps(2, 8, 6)),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager"),
    ]
    for size in ((2, 8, 6), (1, 5, 7)):
        for form in forms:
            torch.testing.assert_close(form(maps(*size)), layer(maps(*size)), rtol=0, atol=1e-12)
