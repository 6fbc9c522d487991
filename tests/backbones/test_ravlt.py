"""RAVLT against the official code (golden files): models, layers, pyramid, cost."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import backbones
from backbones.layers import RankAugmentedAttention, RotaryAttention, RotaryPosition
from backbones.pretrained import convert_state_dict, ravlt
from backbones.ravlt import Block
from tests.backbones.models import deterministic, relative_error
from tests.support import costs, golden

# parameters, and GMACs as fvcore counts them for the official code
MODELS = {
    "ravlt_t": (14897768, "2.626"),
    "ravlt_s": (25591208, "4.899"),
    "ravlt_b": (48241288, "10.616"),
    "ravlt_l": (95242440, "17.256"),
}
CASES = [("RAVLT_T", 0), ("RAVLT_T", 1), ("RAVLT_T", 2), ("RAVLT_S", 0)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name, index", CASES)
@torch.no_grad()
def test_equals_the_official_code(name, index, dtype, tolerance):
    recorded = golden.load(name)
    case = recorded["cases"][index]
    model = timm.create_model(name.lower()).to(dtype).eval()
    weights = golden.official_weights(recorded, case.get("weight_scale"))
    model.load_state_dict(convert_state_dict({"model": weights}, model))
    x = golden.image(case["input_shape"]).to(dtype)
    logits = torch.tensor(case["logits"], dtype=torch.float64).reshape(1, -1)
    last, maps = model.forward_intermediates(x)
    values = [model.forward_stem(model.image_input(x)), *maps, model.head.proj(last)]
    for value, summary in zip(values, case["features"].values(), strict=True):
        golden.check_summary(value, summary, tolerance)
    assert relative_error(model.forward_head(last).double(), logits) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@torch.no_grad()
def test_equals_the_official_detection_pyramid(dtype, tolerance):
    recorded = golden.load("det_ravlt_t")
    weights = golden.official_weights(recorded)
    detector = {f"backbone.{k}": v for k, v in weights.items()}
    features = timm.create_model("ravlt_t", features_only=True, pyramid="det").to(dtype).eval()
    features.model.load_state_dict(convert_state_dict(detector, features.model))
    assert recorded["params"] == sum(v.numel() for v in features.parameters())
    (case,) = recorded["cases"]
    maps = features(golden.image(case["input_shape"]).to(dtype))
    for value, summary in zip(maps, case["outputs"], strict=True):
        golden.check_summary(value, summary, tolerance)


def norm_operations(name: str) -> int:
    """What fvcore adds for norms: five operations per number of a LayerNorm, two of a BatchNorm."""
    model, count = timm.create_model(name, device="meta").eval(), 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal count
        count += (2 if isinstance(module, nn.BatchNorm2d) else 2 * 5) * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, Block)):
            module.register_forward_hook(add)
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    return count


@pytest.mark.parametrize("name", MODELS)
def test_costs(name):
    parameters, giga_macs = MODELS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{(costs.macs(name) + norm_operations(name)) / 1e9:.3f}" == giga_macs


def test_scales_start_as_released():
    for name, expected in [("ravlt_t", [1.0] * 4), ("ravlt_b", [1.0, 1.0, 1e-6, 1e-6])]:
        model = timm.create_model(name)
        for stage, value in zip(model.stages, expected, strict=True):
            for block in stage.blocks:
                for scale in (block.ls1, block.ls2):
                    torch.testing.assert_close(scale.gamma, torch.full_like(scale.gamma, value))


def test_layers_start_as_the_spec_says():
    model = timm.create_model("ravlt_t", num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not module.bias.any()
            assert 0.01 < module.weight.std() < 0.025


# official name of a part -> ours
PARTS = {**ravlt._PARTS, "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "qkvo": "qkvg"}
LAYERS = {
    "rala_attn": (RankAugmentedAttention, {"num_heads": 2}),
    "rala_attn_d96": (RankAugmentedAttention, {"num_heads": 1}),
    "ravlt_vanilla_attn": (RotaryAttention, {"num_heads": 2}),
    "ravlt_block_l": (Block, {"num_heads": 2, "linear": True, "layer_scale": 1.0}),
    "ravlt_block_v": (Block, {"num_heads": 2, "linear": False, "layer_scale": 1.0}),
}


def our_name(name: str) -> str:
    for theirs, ours in PARTS.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    return name


def load_layer(layer: nn.Module, manifest: dict[str, list[int]]) -> dict[str, str]:
    """Fill a layer with the weights of its official names; return the names, official by ours."""
    own = layer.state_dict()
    names = {our_name(name): name for name in manifest}
    weights = golden.state_dict(manifest)
    layer.load_state_dict({k: weights[names[k]].reshape(v.shape) for k, v in own.items()})
    assert len(own) == len(manifest)
    return names


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_official_ones_with_gradients(name, dtype, tolerance):
    (case,) = (c for c in golden.load("modules")["cases"] if c["id"] == name)
    recorded = load_file(golden.GOLDEN / "modules.safetensors")
    make, kwargs = LAYERS[name]
    layer = make(case["input_shape"][1], **kwargs).to(dtype).eval()
    names = load_layer(layer, case["manifest"])
    x = torch.from_numpy(golden.normal(f"module/{name}/x", case["input_shape"])).to(dtype)
    x.requires_grad_()
    if make is Block:
        tokens = x.permute(0, 2, 3, 1)
        out = layer(tokens, layer.attn.rotary(tokens)).permute(0, 3, 1, 2)
    else:
        layer.channels_first = True
        out = layer(x)
    cotangent = golden.normal(f"module/{name}/cotangent", case["out_shape"])
    (out * torch.from_numpy(cotangent).to(dtype)).sum().backward()
    values = {"out": out.detach(), "dx": x.grad}
    values |= {f"grad.{names[key]}": p.grad for key, p in layer.named_parameters()}
    for key, value in values.items():
        expected = recorded[f"{name}.{key}"]
        assert relative_error(golden.kept(value.double(), expected), expected) < tolerance, key


@pytest.mark.parametrize("layer", [RankAugmentedAttention, RotaryAttention])
def test_layers_take_both_layouts(layer):
    last, first = (
        deterministic(layer(32, 2, channels_first=channels_first))
        for channels_first in (False, True)
    )
    x = golden.image((2, 32, 5, 1))
    expected = last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(first(x), expected)


def test_positions_stay_in_float32_in_every_type_and_on_every_device():
    expected = torch.tensor(golden.load("RAVLT_T")["derived_values"]["layers.0.RoPE.angle"])[::2]
    rotary = RotaryPosition(64)
    assert not rotary.state_dict()
    moves = [rotary.half, rotary.double, lambda: rotary.to(torch.bfloat16)]
    moves += [lambda: rotary.to("meta").to_empty(device="cpu")]
    for move in moves:
        move()
        assert torch.equal(rotary.theta, expected)
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        table = rotary(torch.zeros(1, 300, 2, 64, dtype=dtype))
        assert table.dtype == wide
        assert table.shape == (2, 302, 16)
        torch.testing.assert_close(table[1, 299, 0].double(), torch.tensor(299.0).double().sin())


def test_stages_that_do_not_fit_are_named():
    for arguments, message in [
        ({"depths": (1, 1)}, r"depths=\(1, 1\).*must be of equal length"),
        ({"num_heads": (3, 2, 4, 8)}, r"multiples of 4 \* num_heads=\(3, 2, 4, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbones.RAVLT(**arguments)
    with pytest.raises(ValueError, match="dim=64 must be a multiple of num_heads=5"):
        RankAugmentedAttention(64, 5)
    with pytest.raises(ValueError, match="head_dim=6 must be a multiple of 4"):
        RankAugmentedAttention(12, 2)
