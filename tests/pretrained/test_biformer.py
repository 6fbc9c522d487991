import argparse

import pytest
import timm
import torch

from backbones.pretrained import (
    WeightsError,
    biformer,
    convert_state_dict,
    find_weights,
    load_weights,
)
from tests.backbones.models import VARIANTS, deterministic
from tests.support import golden

NAMES = ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw"]
SMALL = ["biformer", "biformer_stl", "biformer_stl_nchw"]


def build(name: str = "biformer_tiny", **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **kwargs)


def manifest(name: str) -> dict[str, torch.Tensor]:
    """Empty tensors under the official names of a release."""
    shapes = golden.load(name)["manifest"]
    return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return golden.state_dict(golden.load("biformer_tiny")["manifest"])


@pytest.mark.parametrize("name", NAMES)
def test_official_names_there_and_back(name):
    given = manifest(name)
    model = build(name)
    ours = convert_state_dict(given, model)
    assert len(ours) == len(given) == len(model.state_dict())
    back = biformer.to_official(ours)
    assert set(back) == set(given)
    assert all(back[key] is value for key, value in given.items())
    assert biformer.to_ours(ours) == ours


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    expected = {
        "downsample_layers.0.0.weight": "stem.conv1.conv.weight",
        "downsample_layers.0.4.running_var": "stem.conv2.bn.running_var",
        "downsample_layers.2.1.num_batches_tracked": "stages.2.downsample.bn.num_batches_tracked",
        "stages.1.0.pos_embed.weight": "stages.1.blocks.0.cpe.proj.weight",
        "stages.2.1.attn.qkv.qkv.bias": "stages.2.blocks.1.attn.qkv.bias",
        "stages.0.0.attn.wo.weight": "stages.0.blocks.0.attn.proj.weight",
        "stages.3.1.attn.qkv.weight": "stages.3.blocks.1.attn.qkv.weight",
        "stages.3.0.mlp.3.bias": "stages.3.blocks.0.mlp.fc2.bias",
    }
    if "stl" in name:
        expected = {
            "downsample_layers.0.1.weight": "stem.bn.weight",
            "downsample_layers.2.0.weight": "stages.2.downsample.bn.weight",
            "downsample_layers.2.1.weight": "stages.2.downsample.conv.weight",
            "stages.3.blocks.1.attn.proj.bias": "stages.3.blocks.1.attn.proj.bias",
            "stages.3.blocks.0.mlp.2.bias": "stages.3.blocks.0.mlp.fc2.bias",
        }
    if name == "biformer_stl":
        expected["stages.2.blocks.1.attn.qkv.qkv.bias"] = "stages.2.blocks.1.attn.qkv.bias"
    if name == "biformer_stl_nchw":
        expected["stages.2.blocks.1.attn.qkv_linear.bias"] = "stages.2.blocks.1.attn.qkv.bias"
        expected["stages.0.blocks.0.attn.output_linear.bias"] = "stages.0.blocks.0.attn.proj.bias"
    given = manifest(name)
    ours = biformer.to_ours(given)
    for theirs, wanted in {
        **expected,
        "head.bias": "head.fc.bias",
        "norm.bias": "norm.bias",
    }.items():
        assert ours[wanted] is given[theirs]


@pytest.mark.parametrize("name", SMALL)
def test_values_survive_there_and_back(name):
    ours = deterministic(VARIANTS[name].create()).state_dict()
    official = biformer.to_official(ours)
    assert not [k for k in official if ".fc1." in k or "stem" in k]
    again = biformer.to_ours(official)
    assert list(again) == list(ours)
    assert all(torch.equal(again[k], v) for k, v in ours.items())


@pytest.mark.parametrize("wrap", ["bare", "model", "ema", "both", "ddp", "ours"])
def test_any_wrapping_gives_the_names_of_the_model(official, wrap):
    model = build()
    given = {
        "bare": official,
        "model": {"model": official, "epoch": 299, "args": argparse.Namespace(lr=1e-3)},
        "ema": {"model_ema": official},
        "both": {"model": official, "model_ema": dict.fromkeys(official, torch.zeros(1))},
        "ddp": {"model": {f"module.{name}": value for name, value in official.items()}},
        "ours": biformer.to_ours(official),
    }[wrap]
    if wrap == "ema":
        with pytest.raises(WeightsError, match="moving average only"):
            convert_state_dict(given, model)
        return
    converted = convert_state_dict(given, model)
    assert list(converted) == list(model.state_dict())
    assert all(converted[k] is v for k, v in biformer.to_ours(official).items())


def test_a_training_checkpoint_loads_from_its_file(tmp_path):
    small = VARIANTS["biformer"]
    weights = small.create().state_dict()
    averaged = {k: v + 1 for k, v in weights.items()}
    checkpoint = {
        "model": biformer.to_official(weights),
        "model_ema": biformer.to_official(averaged),
        "args": argparse.Namespace(model="biformer_tiny"),
        "max_accuracy": 81.4,
    }
    path = tmp_path / "biformer_tiny_best.pth"
    torch.save(checkpoint, path)
    overlay = {"file": str(path), "num_classes": 10}
    model = small.create(pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    given = convert_state_dict(load_weights(path, ema=True), model)
    assert all(torch.equal(v, averaged[k]) for k, v in given.items())


def test_a_detector_gives_its_backbone_with_and_without_the_norms_of_its_maps():
    given = golden.state_dict(golden.load("det_biformer_small")["manifest"])
    detector = {f"backbone.{name}": value for name, value in given.items()}
    detector["neck.fpn.weight"] = torch.zeros(1)
    model = build("biformer_small", num_classes=0)
    converted = convert_state_dict({"state_dict": detector}, model)
    assert list(converted) == list(model.state_dict())
    assert converted["stem.conv1.conv.weight"] is given["downsample_layers.0.0.weight"]
    with pytest.raises(WeightsError, match=r"missing head\.fc\.weight.*they have no classifier"):
        convert_state_dict(detector, build("biformer_small"))
    pyramid = build("biformer_small", pyramid="det")
    normed = convert_state_dict({"state_dict": detector}, pyramid)
    assert list(normed) == list(pyramid.state_dict())
    assert normed["feature_norms.3.bias"] is given["extra_norms.3.bias"]
    assert set(biformer.to_official(normed)) == set(given)
    # the norm that stands in for that of the classifier does nothing
    norm = torch.nn.BatchNorm2d(512).double().eval()
    norm.load_state_dict({k[5:]: v for k, v in converted.items() if k.startswith("norm.")})
    x = torch.randn(2, 512, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x, rtol=1e-14, atol=1e-14)
    # a classifier that lost its norm is not taken for a detector
    lost = {k: v for k, v in given.items() if not k.startswith("extra_norms.")}
    with pytest.raises(WeightsError, match=r"missing norm\.weight"):
        convert_state_dict(lost, model)


@pytest.mark.parametrize(
    "weights, model",
    [
        ("biformer_stl", "biformer_stl_nchw"),
        ("biformer_stl_nchw", "biformer_stl"),
        ("biformer_stl", "biformer_tiny"),
        ("biformer_tiny", "biformer_stl"),
        ("biformer_small", "biformer_tiny"),
        ("biformer_small", "biformer_base"),
    ],
)
def test_weights_fit_no_other_model(weights, model):
    with pytest.raises(WeightsError, match="do not fit the model"):
        convert_state_dict(manifest(weights), build(model))


def test_table():
    assert [row.model for row in biformer.WEIGHTS] == NAMES
    assert [row.top1.get("paper") for row in biformer.WEIGHTS] == [81.4, 83.8, 84.3, 82.7, None]
    for row in biformer.WEIGHTS:
        assert row.hub_id is None and "dead" in row.note
        assert row.urls[0].startswith("https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvCh")


@pytest.mark.parametrize("name", NAMES)
def test_dead_links_are_said_to_be_dead(name):
    for attempt in (
        lambda: timm.create_model(name, pretrained=True),
        lambda: timm.create_model(f"{name}.in1k", pretrained=True),
        lambda: load_weights(name),
        lambda: find_weights(name).location,
    ):
        with pytest.raises(WeightsError, match=r"links are dead.*issues/53.*overlay=dict\(file="):
            attempt()
    assert not timm.is_model_pretrained(name)
