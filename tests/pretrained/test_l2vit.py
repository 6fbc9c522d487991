import argparse
import io
import logging

import pytest
import timm
import torch
from torch import Tensor

from backbones.pretrained import (
    WeightsError,
    convert_state_dict,
    find_weights,
    l2vit,
    load_weights,
)
from tests.pretrained.forge import LEGACY, pth
from tests.support import golden

RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-"
NAMES = ["l2vit_tiny", "l2vit_small", "l2vit_base", "l2vit_base_384"]
# tensors of the releases
COUNTS = dict(zip(NAMES, [284, 536, 536, 536], strict=True))
EMA_FILE = "L2ViT-Tiny-checkpoint-best-ema.pth"
PLAIN_FILE = "L2ViT-Base-22k-pretrain-checkpoint-best.pth"


def build(name: str = "l2vit_tiny", **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **kwargs)


def manifest(name: str) -> dict[str, Tensor]:
    """An official state dict without values."""
    names = golden.load(name)["manifest"]
    return {k: torch.empty(shape, device="meta") for k, shape in names.items()}


@pytest.mark.parametrize("name", NAMES)
def test_releases_convert_there_and_back(name):
    official = manifest(name)
    assert len(official) == COUNTS[name]
    model = build(name)
    converted = convert_state_dict(official, model)
    assert list(converted) == list(model.state_dict())
    again = l2vit.to_official(converted)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in official.items()}


def test_values_stay_what_they_are():
    official = golden.official_weights(golden.load("l2vit_tiny"))
    again = l2vit.to_official(convert_state_dict(official, build()))
    assert set(again) == set(official)
    assert all(torch.equal(again[k], official[k]) for k in official)


def test_the_classifier_of_22k_has_a_model():
    official = manifest("l2vit_base")
    official["head.weight"] = torch.empty(21841, 1024, device="meta")
    official["head.bias"] = torch.empty(21841, device="meta")
    model = build("l2vit_base.in22k")
    assert sum(p.numel() for p in model.parameters()) == 109_939_213
    assert list(convert_state_dict(official, model)) == list(model.state_dict())


@pytest.mark.parametrize("pyramid", ["", "det"])
def test_names_that_are_ours_stay(pyramid):
    ours = build(pyramid=pyramid).state_dict()
    assert {k: v.shape for k, v in l2vit.to_ours(ours).items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_the_backbone_of_a_detector_converts_there_and_back():
    official = {f"backbone.{k}": v for k, v in manifest("l2vit_det_tiny").items()}
    detector = {"state_dict": {**official, "neck.fpn.weight": torch.empty(1, device="meta")}}
    model = build(pyramid="det")
    converted = convert_state_dict(detector, model)
    assert list(converted) == list(model.state_dict())
    again = {f"backbone.{k}": v.shape for k, v in l2vit.to_official(converted).items()}
    assert again == {k: v.shape for k, v in official.items()}
    with pytest.raises(WeightsError, match="create the model with pyramid='det'"):
        convert_state_dict(detector, build())


def test_what_is_missing_or_left_over_is_named():
    official = manifest("l2vit_tiny")
    del official["stages.2.3.local_mp.bn.weight"]
    official["stages.2.3.attn.rest"] = torch.zeros(1)
    with pytest.raises(
        WeightsError,
        match=r"missing stages\.2\.blocks\.3\.local\.bn\.weight.*left over "
        r"stages\.2\.blocks\.3\.attn\.rest",
    ):
        convert_state_dict(official, build())
    with pytest.raises(WeightsError, match=r"stem\.conv1\.conv\.weight is \(48"):
        convert_state_dict(manifest("l2vit_tiny"), build("l2vit_base", depths=(2, 2, 6, 2)))


def checkpoint(copies: list[str]) -> dict:
    """What the official training script saves; the copies differ."""
    values = {"model": 1.0, "model_ema": 2.0}
    return {
        **{key: {"head.bias": torch.full((3,), values[key])} for key in copies},
        "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.zeros(2)}}},
        "epoch": "best-ema",
        "scaler": {},
        "args": argparse.Namespace(model="L2ViT_Tiny", batch_size=128),
    }


@pytest.mark.parametrize(
    ("file", "copies", "expected", "said"),
    [
        (EMA_FILE, ["model", "model_ema"], 2.0, "EMA weights"),
        (EMA_FILE, ["model_ema"], 2.0, "EMA weights"),
        (EMA_FILE, ["model"], 1.0, "plain weights"),
        (PLAIN_FILE, ["model", "model_ema"], 1.0, "plain weights"),
        ("mine.pth", ["model", "model_ema"], 1.0, "plain weights"),
    ],
)
def test_the_name_of_a_file_says_which_copy_is_meant(
    tmp_path, caplog, file, copies, expected, said
):
    for options in ({}, LEGACY):
        (tmp_path / file).write_bytes(pth(checkpoint(copies), **options))
        with caplog.at_level(logging.INFO, logger="backbones.pretrained"):
            assert load_weights(tmp_path / file)["head.bias"][0] == expected
        assert said in caplog.messages[-1]


def test_both_copies_of_a_best_file_can_be_had(tmp_path):
    (tmp_path / PLAIN_FILE).write_bytes(pth(checkpoint(["model", "model_ema"])))
    assert load_weights(tmp_path / PLAIN_FILE, ema=True)["head.bias"][0] == 2
    (tmp_path / PLAIN_FILE).write_bytes(pth(checkpoint(["model"])))
    with pytest.raises(WeightsError, match="leave out ema=True"):
        load_weights(tmp_path / PLAIN_FILE, ema=True)


def test_a_release_is_downloaded_and_its_average_loaded(hub, tmp_path):
    official = golden.official_weights(golden.load("l2vit_tiny"))
    official = {k: v.float() if v.is_floating_point() else v for k, v in official.items()}
    plain = {k: torch.zeros_like(v) for k, v in official.items()}
    file = io.BytesIO()
    torch.save({**checkpoint([]), "model": plain, "model_ema": official}, file)
    overlay = {"url": hub.add_plain(EMA_FILE, file.getvalue())}
    model = timm.create_model(
        "l2vit_tiny.in1k",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        cache_dir=tmp_path,
        num_classes=5,
        in_chans=1,
    )
    stem = official["downsample_layers.0.proj.proj.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv1.conv.weight, stem)
    assert model.get_classifier().out_features == 5
    temperature = official["stages.2.5.attn.temperature"]
    assert torch.equal(model.stages[2].blocks[5].attn.temperature, temperature)


def test_classes_of_1k_are_selected_from_22k():
    indices = l2vit.in22k_to_in1k_indices()
    assert len(indices) == len(set(indices)) == 1000
    assert (min(indices), max(indices), indices[:3]) == (15, 21840, (1297, 7897, 2488))
    rows = torch.arange(21841)
    for weight, bias in [("head.weight", "head.bias"), ("head.fc.weight", "head.fc.bias")]:
        given = {weight: rows[:, None].expand(-1, 4), bias: rows, "norm.weight": torch.ones(4)}
        selected = l2vit.select_in1k(given)
        assert list(selected) == list(given)
        assert selected[weight].shape == (1000, 4)
        assert selected[bias].tolist() == list(indices)
        assert selected["norm.weight"] is given["norm.weight"]
    for classes, message in [({"head.bias": torch.ones(1000)}, "1000 classes"), ({}, "no classes")]:
        with pytest.raises(WeightsError, match=f"have {message}, not 21841: give those of"):
            l2vit.select_in1k(classes)


def test_table():
    expected = {
        "l2vit_tiny.in1k": ("Tiny-checkpoint-best-ema", {"repository": 83.1}),
        "l2vit_small.in1k": ("Small-checkpoint-best-ema", {"repository": 84.1}),
        "l2vit_base.in1k": ("Base-checkpoint-best-ema", {"repository": 84.4}),
        "l2vit_base.in22k": ("Base-22k-pretrain-checkpoint-best", {}),
        "l2vit_base.in22k_ft_in1k": (
            "Base-22k21k-finetune-224-checkpoint-best",
            {"repository": 86.0},
        ),
        "l2vit_base_384.in22k_ft_in1k": (
            "Base-22k21k-finetune-384-checkpoint-best",
            {"repository": 87.0},
        ),
    }
    rows = {row.name: row for row in l2vit.WEIGHTS}
    assert list(rows) == list(expected)
    for name, (file, top1) in expected.items():
        assert find_weights(name).location == f"{RELEASE}{file}.pth"
        assert timm.get_pretrained_cfg(name).url == f"{RELEASE}{file}.pth"
        assert rows[name].top1 == top1
        assert rows[name].prefer_ema == file.endswith("ema")
        assert rows[name].license == "mit"
    assert timm.get_pretrained_cfg("l2vit_base.in22k").num_classes == 21841
    assert timm.get_pretrained_cfg("l2vit_base").tag == "in1k"


@pytest.mark.parametrize(
    ("name", "size", "pool", "crop"),
    [("l2vit_base", 224, 7, (0.875, "center")), ("l2vit_base_384", 384, 12, (1.0, "squash"))],
)
def test_images_as_the_authors_took_them(name, size, pool, crop):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.pool_size) == ((3, size, size), (pool, pool))
    assert (cfg.crop_pct, cfg.crop_mode) == crop
    assert (cfg.interpolation, cfg.mean[0], cfg.fixed_input_size) == ("bicubic", 0.485, False)
    assert (cfg.first_conv, cfg.classifier) == ("stem.conv1.conv", "head.fc")
