"""The local concentration module of L2ViT against the official one (golden files)."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbones.layers import LocalConcentration
from tests.backbones.models import deterministic, relative_error
from tests.support import golden

CASES = {case["name"]: case for case in golden.load("op_l2vit_lcm")["cases"]}


def check(value: Tensor, key: str, summary: dict, arrays, tolerance: float) -> None:
    if key in arrays:
        assert relative_error(value.double(), torch.from_numpy(arrays[key])) < tolerance, key
    else:
        golden.check_summary(value, summary, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_module_with_gradients(name, dtype, tolerance):
    case, arrays = CASES[name], np.load(golden.GOLDEN / "op_l2vit_lcm.npz")
    batch, height, width, dim = (case["shape"][key] for key in "BHWC")
    layer = deterministic(LocalConcentration(dim), dtype).train(case["mode"] == "train")
    tokens, shape = (batch, height * width, dim), (batch, height, width, dim)
    x = torch.from_numpy(golden.normal("op.x", tokens)).to(dtype).requires_grad_()
    out = layer(x.view(shape)).view(tokens)
    check(out.detach(), f"{name}/out", case["out"], arrays, tolerance)
    (out * torch.from_numpy(golden.normal("op.dout", tokens)).to(dtype)).sum().backward()
    check(x.grad, f"{name}/grad_x", case["grad_x"], arrays, tolerance)
    assert {key for key, _ in layer.named_parameters()} == set(case["grad_params"])
    for key, parameter in layer.named_parameters():
        summary = case["grad_params"][key]
        check(parameter.grad, f"{name}/grad_{key}", summary, arrays, tolerance)
    for key, summary in case.get("buffers_after", {}).items():
        golden.check_summary(dict(layer.named_buffers())[key], summary, tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_an_addend_is_added(training):
    x, addend = golden.image((2, 9, 4, 6)).requires_grad_(), torch.ones(2, 9, 4, 6).double() * 3
    addend.requires_grad_()
    layer = deterministic(LocalConcentration(6)).train(training)
    out = layer(x, addend)
    torch.testing.assert_close(out, layer(x) + 3)
    (out * 2).sum().backward()
    assert (addend.grad == 2).all()


@torch.no_grad()
def test_fused_form_is_exact_at_borders_and_with_channels_that_are_off():
    layer = deterministic(LocalConcentration(6))
    layer.bn.weight[0] = 0
    sizes = [(9, 4), (1, 2), (14, 14)]
    inputs = [golden.image((2, *size, 6)) for size in sizes]
    expected = [layer(x) for x in inputs]
    assert layer.fuse() is layer and layer.fuse() is layer
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layer.modules())
    for x, wanted in zip(inputs, expected, strict=True):
        assert relative_error(layer(x), wanted) < 1e-12


def test_training_keeps_three_maps():
    layer, x = LocalConcentration(8), torch.randn(2, 16, 16, 8, requires_grad=True)
    addend, kept = torch.randn_like(x, requires_grad=True), {}

    def pack(value: Tensor) -> Tensor:
        if value.numel() == x.numel():
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x, addend)
    assert len(kept) == 3
