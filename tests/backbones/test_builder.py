"""Pretrained weights through `timm.create_model`, read by our loader only."""

import dataclasses
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

import backbones
from backbones._builder import _locate
from backbones.pretrained import WeightsError, weights_tables
from tests.support import golden


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> str:
    """A file as the authors released it: official names, wrapped, with a decoy moving average."""
    weights = golden.state_dict(golden.load("shvit_s1")["manifest"])
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    path = tmp_path_factory.mktemp("weights") / "shvit_s1.pth"
    decoy = {k: torch.zeros_like(v) for k, v in weights.items()}
    torch.save({"model": weights, "model_ema": decoy, "epoch": 299}, path)
    return str(path)


def create(path: str, **kwargs) -> torch.nn.Module:
    overlay = {"file": path}
    return timm.create_model(
        "shvit_s1", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()


def test_official_file(official, caplog):
    with caplog.at_level(logging.INFO, "backbones.pretrained"):
        model = create(official)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("backbones.pretrained")]
    assert line.startswith("loaded 471 tensors")
    assert "plain weights" in line
    assert official in line
    expected = golden.load("shvit_s1")["runs"]["97x65"]
    with torch.no_grad():
        logits = model.double()(golden.image(expected["input"]))
    samples = torch.tensor(expected["logits"]["samples"], dtype=torch.float64)
    # the weights went through float32
    assert (golden.samples(logits) - samples).abs().max() < 1e-4 * samples.abs().max()
    assert model.pretrained_cfg["file"] == official
    assert "state_dict" not in model.pretrained_cfg


def test_other_classes_and_channels_are_adapted_by_timm(official):
    full, model = create(official), create(official, num_classes=5, in_chans=1)
    assert model.get_classifier().weight.shape == (5, 320)
    assert torch.equal(model.head.bn.weight, full.head.bn.weight)
    summed = full.patch_embed[0].c.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed[0].c.weight, summed)
    headless = create(official, num_classes=0)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(headless(x), full.forward_head(full.forward_features(x), True))


def three_classes(official, folder, **kwargs) -> torch.nn.Module:
    """A file whose classifier has three rows, while the model's tag says a thousand."""
    weights = torch.load(official, weights_only=True)["model"]
    weights |= {name: weights[name][:3] for name in ("head.l.weight", "head.l.bias")}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "three.safetensors")
    return create(str(folder / "three.safetensors"), **kwargs)


def test_classes_of_the_file_are_kept_when_they_are_those_asked_for(official, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "backbones"):
        model = three_classes(official, tmp_path, num_classes=3)
    assert torch.equal(model.head.l.weight, create(official).head.l.weight[:3])
    assert "fresh" not in caplog.text
    assert model.pretrained_cfg["num_classes"] == 3


def test_classifier_is_dropped_only_when_asked(official, tmp_path, caplog):
    with pytest.raises(WeightsError, match=r"have 3 classes, the model 1000; pass num_classes=3"):
        three_classes(official, tmp_path)
    with caplog.at_level(logging.INFO, "backbones"):
        model = three_classes(official, tmp_path, num_classes=7)
    assert "have 3 classes, the model 7; its classifier starts fresh" in caplog.text
    assert model.head.l.weight.shape == (7, 320)
    assert three_classes(official, tmp_path, num_classes=0).num_classes == 0


def test_file_without_classifier(official, tmp_path):
    weights = torch.load(official, weights_only=True)["model"]
    body = {k: v for k, v in weights.items() if not k.startswith("head.")}
    save_file(body, tmp_path / "body.safetensors")
    with pytest.raises(WeightsError, match="have no classes, the model 1000; pass num_classes=0"):
        create(str(tmp_path / "body.safetensors"))
    model = create(str(tmp_path / "body.safetensors"), num_classes=4)
    assert torch.equal(model.patch_embed[0].c.weight, weights["patch_embed.0.c.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(official, tmp_path, dtype):
    weights = torch.load(official, weights_only=True)["model"]
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = create(str(tmp_path / "half.safetensors"))
    assert model.head.l.weight.dtype == torch.float32
    assert torch.equal(model.head.l.weight, half["head.l.weight"].float())
    model = create(str(tmp_path / "half.safetensors"), dtype=dtype)
    assert model.head.l.weight.dtype == dtype


def test_features_only(official):
    full, model = create(official), create(official, features_only=True)
    x = torch.randn(1, 3, 64, 64)
    expected = full.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    assert "state_dict" not in model.pretrained_cfg


def test_state_dict_in_memory(official):
    weights = torch.load(official, weights_only=True)
    overlay = {"state_dict": weights}
    model = timm.create_model("shvit_s1", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.l.weight, weights["model"]["head.l.weight"])
    assert "state_dict" not in model.pretrained_cfg


def test_weights_of_another_size_are_refused(official):
    overlay = {"file": official}
    with pytest.raises(WeightsError, match="do not fit the model"):
        timm.create_model("shvit_s3", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_missing_tensor_is_named(official, tmp_path):
    weights = torch.load(official, weights_only=True)["model"]
    del weights["blocks2.3.mixer.m.qkv.bn.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing stages\.1\.blocks\.0\.mixer\.m\.qkv\.bn"):
        create(str(tmp_path / "model.safetensors"))


def test_no_known_weights_and_missing_files_say_what_to_do():
    overlay = {"hf_hub_id": None, "url": None}
    with pytest.raises(WeightsError, match="shvit_s1: no pretrained weights are known; pass"):
        timm.create_model("shvit_s1", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(WeightsError, match=r"no/such\.pth: no such file"):
        create("no/such.pth")


def test_unpickled_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="open"):
        create(str(tmp_path / "weights.pth"))
    assert not (tmp_path / "executed").exists()


def test_create_model_passes_everything_on(official):
    model = backbones.create_model(
        "shvit_s1.in1k", True, pretrained_cfg_overlay={"file": official}, num_classes=2
    )
    assert model.num_classes == 2


def test_official_weights_are_asked_for_by_name():
    for row in (row for table in weights_tables().values() for row in table):
        cfg = timm.models.get_pretrained_cfg(row.name)
        assert _locate(row.model, cfg) == (row.name, None)


def test_other_places_are_taken_as_they_are_given():
    cfg = timm.models.get_pretrained_cfg("shvit_s1.in1k")
    other = dataclasses.replace(cfg, hf_hub_id="acme/mine", hf_hub_filename="w.pth")
    assert _locate("shvit_s1", other) == ("hf-hub:acme/mine", "w.pth")
    other = dataclasses.replace(cfg, hf_hub_id=None, url="https://acme/w.pth")
    assert _locate("shvit_s1", other) == ("https://acme/w.pth", None)
