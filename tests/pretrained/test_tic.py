import pytest
import timm
import torch

from backbones.pretrained import WeightsError, convert_state_dict, find_weights, tic
from tests.support import golden

NAMES = ["tic_tiny", "tic_small", "tic_base"]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_names_are_ours(name):
    manifest = golden.load(f"{name}_reconstruction")["manifest"]
    weights = {k: torch.zeros(shape, device="meta") for k, shape in manifest.items()}
    converted = convert_state_dict({"model": weights}, timm.create_model(name, device="meta"))
    assert tic.to_ours(weights) == tic.to_official(weights) == weights == converted


@pytest.mark.parametrize("name", NAMES)
def test_there_are_no_weights(name):
    with pytest.raises(WeightsError, match=f"{name}: no pretrained weights are known"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(WeightsError, match=f"no official weights are called '{name}'"):
        find_weights(name)


def test_what_is_missing_or_left_over_is_named():
    model = timm.create_model("tic_tiny", device="meta")
    weights = model.state_dict()
    weights["stages.0.blocks.0.attn.rest"] = weights.pop("stages.0.blocks.0.attn.qkv.bias")
    with pytest.raises(
        WeightsError,
        match=r"missing stages\.0\.blocks\.0\.attn\.qkv\.bias.*left over "
        r"stages\.0\.blocks\.0\.attn\.rest",
    ):
        convert_state_dict(weights, model)


def test_a_file_of_ones_own_loads(tmp_path):
    model = timm.create_model("tic_tiny", depths=(1, 1, 1, 1), num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pth")
    again = timm.create_model(
        "tic_tiny",
        pretrained=True,
        depths=(1, 1, 1, 1),
        num_classes=3,
        pretrained_cfg_overlay={"file": str(tmp_path / "mine.pth"), "num_classes": 3},
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
