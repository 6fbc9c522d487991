"""L2ViT against the official code (golden files): models, training, pyramid, cost."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from backbones.layers import LinearAttention
from backbones.layers.position_conv import ConvPositionEncoding
from backbones.pretrained import convert_state_dict, l2vit
from tests.backbones.models import FAMILIES, deterministic, relative_error
from tests.support import costs, golden

# parameters, and GMACs as fvcore counts them for the official code
MODELS = {
    "l2vit_tiny": (28_596_781, "4.7136"),
    "l2vit_small": (50_199_157, "9.0177"),
    "l2vit_base": (88_577_188, "15.8578"),
    "l2vit_base_384": (88_577_188, "47.4692"),
}
CASES = [("l2vit_tiny", 0), ("l2vit_tiny", 1)]
TOLERANCES = [(torch.float64, 1e-8), (torch.float32, 2e-5)]
SMALL = FAMILIES["l2vit"]


def official(name: str, dtype: torch.dtype, **kwargs) -> nn.Module:
    """A model with the deterministic weights of the official tensor names, for evaluation."""
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    weights = golden.official_weights(golden.load(name))
    model.load_state_dict(convert_state_dict({"model": weights}, model))
    return model


def logits_of(case: dict[str, Any]) -> Tensor:
    return torch.tensor(case["logits"], dtype=torch.float64)


def watch_denominators(model: nn.Module) -> dict[str, float]:
    """Where the shares of denominators below 100 will be, by official names."""
    shares: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearAttention):
            key = name.replace("blocks.", "")

            def hook(_: nn.Module, inputs: tuple[Tensor], qkv: Tensor, key=key, at=module) -> None:
                heads = qkv.flatten(1, 2).unflatten(-1, (3, at.num_heads, -1)).transpose(1, 3)
                q, k, _ = heads.relu().unbind(2)
                raw = q @ k.sum(2, keepdim=True).mT
                shares[key] = float((raw < 100).double().mean())

            module.qkv.register_forward_hook(hook)
    return shares


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "name, index", [*CASES, pytest.param("l2vit_base_384", 0, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_equals_the_official_code(name, index, dtype, tolerance):
    case = golden.load(name)["cases"][index]
    model = official(name, dtype)
    shares = watch_denominators(model)
    values: dict[str, Tensor] = {}
    for i, block in enumerate(model.stages[0].blocks):
        key = f"stage1_block{i}"
        block.register_forward_hook(
            lambda _, x, y, key=key: values.update({key: y.permute(0, 3, 1, 2)})
        )
    model.stem.register_forward_hook(lambda _, x, y: values.update(stem=y))
    last, maps = model.forward_intermediates(golden.image(case["input_shape"]).to(dtype))
    values |= {f"stage{i}": value for i, value in enumerate(maps, 1)}
    values["pre_logits"] = model.forward_head(last, pre_logits=True)
    assert set(values) == set(case["features"])
    for key, value in values.items():
        golden.check_summary(value, case["features"][key], tolerance)
    assert relative_error(model.forward_head(last).double(), logits_of(case)) < tolerance
    expected = case["clamped_denominator_fraction"]
    assert shares == pytest.approx(expected, abs=1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_equals_the_official_code(mode, dtype, tolerance):
    (case,) = (c for c in golden.load("l2vit_tiny")["gradient_cases"] if c["mode"] == mode)
    model = official("l2vit_tiny", dtype).train(mode == "train")
    x = golden.image(case["input_shape"]).to(dtype).requires_grad_()
    logits = model(x)
    assert relative_error(logits.double(), logits_of(case)) < tolerance
    cotangent = torch.from_numpy(golden.normal("cotangent", logits.shape)).to(dtype)
    (logits * cotangent).sum().backward()
    golden.check_summary(x.grad, case["grad_input"], tolerance)
    norms = {name: p.grad.double().norm() for name, p in model.named_parameters()}
    norms = l2vit.to_official(norms)
    assert set(norms) == set(case["grad_param_l2"])
    for name, expected in case["grad_param_l2"].items():
        # a bias before a BatchNorm in training has no gradient but rounding, that of the weight
        # beside it has a norm of 100 and more
        scale = expected if expected > 1e-6 else 10.0
        assert abs(norms[name] - expected) < tolerance * scale, name
    buffers = l2vit.to_official(dict(model.named_buffers()))
    for name, summary in case.get("buffers_after", {}).items():
        golden.check_summary(buffers[name], summary, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@torch.no_grad()
def test_equals_the_official_pyramid(dtype, tolerance):
    recorded = golden.load("l2vit_det_tiny")
    detector = {f"backbone.{k}": v for k, v in golden.official_weights(recorded).items()}
    features = timm.create_model("l2vit_tiny", features_only=True, pyramid="det")
    features.to(dtype).eval()
    features.model.load_state_dict(convert_state_dict(detector, features.model))
    (case,) = recorded["cases"]
    maps = features(golden.image(case["input_shape"]).to(dtype))
    assert len(maps) == len(case["features"])
    for value, summary in zip(maps, case["features"].values(), strict=True):
        golden.check_summary(value, summary, tolerance)


@torch.no_grad()
def test_images_are_completed_with_zeros():
    model = deterministic(SMALL.create())
    for height, width in [(33, 50), (62, 91), (125, 125)]:
        x = golden.image((1, 3, height, width))
        full = F.pad(x, (0, -width % 4, 0, -height % 4))
        assert torch.equal(model(x), model(full))
        # the border is not that of the convolution
        assert not torch.equal(model(x), model(x[:, :, : height // 4 * 4, : width // 4 * 4]))


@torch.no_grad()
def test_tokens_outside_the_map_take_part_in_windows():
    model = deterministic(SMALL.create())
    wide = deterministic(SMALL.create(window_size=12))
    assert set(wide.state_dict()) == set(model.state_dict())
    # one window each, with 49 and 144 tokens, of which 4 are of the last map
    x = golden.image((1, 3, 64, 64))
    assert relative_error(wide(x), model(x)) > 1e-3


def norm_operations(name: str) -> int:
    """What fvcore adds for norms: five operations per number of a LayerNorm, two of a BatchNorm."""
    model, count = timm.create_model(name, device="meta").eval(), 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        nonlocal count
        count += (2 if isinstance(module, nn.BatchNorm2d) else 5) * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, ConvPositionEncoding)):
            module.register_forward_hook(add)
    model(torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta"))
    return count


@pytest.mark.parametrize("name", MODELS)
def test_costs(name):
    parameters, giga_macs = MODELS[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{(costs.macs(name) + norm_operations(name)) / 1e9:.4f}" == giga_macs


def test_every_model_is_here():
    assert backbones.list_models("l2vit") == sorted(MODELS)


def test_layers_start_as_the_official_ones():
    model = SMALL.create()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not module.bias.any()
            assert 0.014 < module.weight.std() < 0.026
        if isinstance(module, LinearAttention):
            head_dim = module.qkv.in_features // module.num_heads
            assert module.temperature.shape == (module.num_heads, 1, 1)
            assert (module.temperature == head_dim**-0.5).all()


def test_arguments_that_do_not_fit_are_named():
    for arguments, message in [
        ({"depths": (1, 1)}, r"depths=\(1, 1\).*must be of equal length"),
        ({"num_heads": (5, 6, 12, 24)}, r"must be multiples of num_heads=\(5, 6, 12, 24\)"),
        ({"window_size": 0}, "window_size=0 must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbones.L2ViT(**arguments)
