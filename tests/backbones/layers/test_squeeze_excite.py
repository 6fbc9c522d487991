"""Squeeze-excite that averages in the convolution before it."""

import pytest
import torch
from timm.layers import set_exportable
from torch import Tensor, nn

from backbones.layers import SqueezeExcite
from tests.support import golden


class Layers(nn.Module):
    """A large kernel and squeeze-excite as in OverLoCK."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 13, padding=6, groups=24, dtype=torch.float64)
        self.se = SqueezeExcite(24, rd_channels=16, act_layer=nn.GELU, dtype=torch.float64)
        self.load_state_dict(golden.fill_model(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.se.forward_conv(x, self.conv.weight, self.conv.bias, 1, False, "", "")


@pytest.mark.parametrize("exportable", [False, True])
@torch.no_grad()
def test_equals_convolution_and_squeeze_excite(exportable):
    with set_exportable(exportable):
        layers = Layers()
    assert isinstance(layers.se.act, nn.GELU) and layers.se.act.approximate == "none"
    x = torch.from_numpy(golden.normal("x", (2, 24, 6, 9)))
    expected = layers.se(layers.conv(x))
    # plain PyTorch is for tracing
    scripted = [] if exportable else [torch.jit.script(layers)]
    for form in (layers, torch.jit.trace(layers, x), *scripted):
        assert (form(x) - expected).abs().max() / expected.abs().max() < 1e-12
    graph = str(torch.jit.trace(layers, x).inlined_graph)
    assert ("backbones::" in graph) is not exportable
