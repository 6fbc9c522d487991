import pytest
import timm
import torch
from torch import Tensor

from backbones.pretrained import WeightsError, convert_state_dict, find_weights, ravlt
from backbones.pretrained.unwrap import unwrap
from tests.support import golden

NAMES = ["ravlt_t", "ravlt_s", "ravlt_b", "ravlt_l"]
COUNTS = dict(zip(NAMES, [302, 462, 622, 822], strict=True))


def build(name: str = "ravlt_t", **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **kwargs)


def release(name: str) -> dict[str, Tensor]:
    """An official state dict in float32, buffers of angles included."""
    recorded = golden.load(name.upper())
    angles = {k: torch.tensor(v) for k, v in recorded["derived_values"].items()}
    filled = golden.official_weights(recorded)
    return {**{k: v.float() if v.is_floating_point() else v for k, v in filled.items()}, **angles}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_releases_convert_there_and_back(name, count):
    official, model = release(name), build(name)
    assert len(official) == count
    converted = convert_state_dict(official, model)
    assert list(converted) == list(model.state_dict())
    again = ravlt.to_official(converted)
    assert set(again) == set(official)
    assert all(torch.equal(again[k], official[k]) for k in official)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_ours_stay(name):
    ours = build(name).state_dict()
    assert {k: v.shape for k, v in ravlt.to_ours(ours).items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_the_buffers_of_angles_are_not_needed():
    official = release("ravlt_t")
    bare = {k: v for k, v in official.items() if "RoPE" not in k}
    converted = convert_state_dict(bare, build())
    expected = convert_state_dict(official, build())
    assert list(converted) == list(expected)
    assert all(torch.equal(converted[k], expected[k]) for k in expected)


@pytest.mark.parametrize("ema", [False, True])
def test_checkpoints_of_the_training_script(ema):
    plain, averaged = release("ravlt_t"), {k: 2 * v for k, v in release("ravlt_t").items()}
    checkpoint = {
        "model": {f"module.{k}": v for k, v in plain.items()},
        "model_ema": averaged,
        "epoch": 299,
        "max_accuracy": 82.8,
    }
    converted = convert_state_dict(unwrap(checkpoint, ema=ema), build())
    expected = (averaged if ema else plain)["patch_embed.proj.0.weight"]
    assert torch.equal(converted["stem.0.conv.weight"], expected)


def test_a_detector_gives_its_backbone_with_and_without_the_norms_of_its_maps():
    recorded = golden.load("det_ravlt_t")
    official = golden.official_weights(recorded)
    detector = {f"backbone.{k}": v for k, v in official.items()}
    detector["neck.fpn.weight"] = torch.zeros(1)
    ours = ravlt.to_ours(unwrap({"state_dict": detector}))
    pyramid = build(pyramid="det")
    assert set(ours) == set(pyramid.state_dict())
    normed = convert_state_dict({"state_dict": detector}, pyramid)
    assert normed["feature_norms.1.weight"] is official["extra_norms.1.norm.weight"]
    assert set(ravlt.to_official(normed)) == {*official, *recorded["derived"]}
    bare = convert_state_dict({"state_dict": detector}, build(), require_head=False)
    assert set(bare) == {k for k in build().state_dict() if not k.startswith("head.")}
    with pytest.raises(WeightsError, match=r"missing head\.proj\.conv\.weight.*no classifier"):
        convert_state_dict({"state_dict": detector}, build())


def test_what_is_missing_or_left_over_is_named():
    official = release("ravlt_t")
    del official["layers.1.blocks.0.attn.qkvo.bias"]
    official["layers.1.blocks.0.attn.rest"] = torch.zeros(1)
    with pytest.raises(
        WeightsError,
        match=r"missing stages\.1\.blocks\.0\.attn\.qkvg\.bias.*left over "
        r"layers\.1\.blocks\.0\.attn\.rest",
    ):
        convert_state_dict(official, build())


def test_table():
    assert [row.model for row in ravlt.WEIGHTS] == NAMES
    assert [row.top1["repository"] for row in ravlt.WEIGHTS] == [82.8, 84.4, 85.5, 85.8]
    assert find_weights("ravlt_s").location == "hf-hub:aldjalkdf/RAVLT"
    assert find_weights("ravlt_s").filename == "RAVLT_S.pth"
    cfg = timm.get_pretrained_cfg("ravlt_l")
    assert (cfg.crop_pct, cfg.interpolation, cfg.mean[0]) == (0.875, "bicubic", 0.485)
    assert (cfg.first_conv, cfg.classifier) == ("stem.0.conv", "head.fc")
