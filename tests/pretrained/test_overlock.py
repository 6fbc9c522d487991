import io

import pytest
import timm
import torch
from torch import Tensor

from backbones.pretrained import WeightsError, convert_state_dict, find_weights, overlock
from backbones.pretrained.unwrap import unwrap
from tests.support import golden

NAMES = ["overlock_xt", "overlock_t", "overlock_s", "overlock_b"]
# tensors of the releases, of both forms
COUNTS = dict(zip(NAMES, [(1564, 932), (2737, 1585), (3765, 2157), (4793, 2729)], strict=True))


def build(name: str = "overlock_xt", **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **{"aux_head": True, **kwargs})


def manifest(name: str) -> dict[str, Tensor]:
    """An official state dict without values."""
    names = golden.load(name)["manifest"]
    return {k: torch.empty(shape, device="meta") for k, shape in names.items()}


@pytest.mark.parametrize("reparam", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_releases_convert_there_and_back(name, reparam):
    official = manifest(f"{name}_reparam" if reparam else name)
    assert len(official) == COUNTS[name][reparam]
    model = build(name, reparam=reparam)
    converted = convert_state_dict(official, model)
    assert list(converted) == list(model.state_dict())
    again = overlock.to_official(converted)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in official.items()}


@pytest.mark.parametrize("reparam", [False, True])
def test_values_stay_what_they_are(reparam):
    recorded = golden.load("overlock_xt_reparam" if reparam else "overlock_xt")
    official = golden.official_weights(recorded)
    converted = convert_state_dict(official, build(reparam=reparam))
    again = overlock.to_official(converted)
    assert all(torch.equal(again[k], official[k]) for k in official)


@pytest.mark.parametrize("reparam", [False, True])
def test_names_that_are_ours_stay(reparam):
    for pyramid in ("", "det"):
        ours = build(reparam=reparam, pyramid=pyramid).state_dict()
        same = overlock.to_ours(ours)
        assert {k: v.shape for k, v in same.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_ema", "model", ""])
def test_checkpoints_may_be_wrapped(wrapper):
    official = {f"module.{k}": v for k, v in manifest("overlock_xt").items()}
    checkpoint = {wrapper: official, "epoch": 309} if wrapper else official
    bare = unwrap(checkpoint, ema=wrapper.endswith("_ema"))
    assert list(convert_state_dict(bare, build())) == list(build().state_dict())


@pytest.mark.parametrize("kind", ["det", "seg"])
def test_backbones_of_detectors_convert_there_and_back(kind):
    recorded = golden.load(f"overlock_xt_{kind}")
    names = {**golden.load("overlock_xt")["manifest"], **recorded["manifest_extra"]}
    official = {
        f"backbone.{k}": torch.empty(shape, device="meta")
        for k, shape in names.items()
        if k not in recorded["manifest_missing"]
    }
    official["decode_head.conv.weight"] = torch.empty(1, device="meta")
    model = build(pyramid=kind)
    converted = convert_state_dict({"state_dict": official}, model)
    assert list(converted) == list(model.state_dict())
    again = {f"backbone.{k}": v.shape for k, v in overlock.to_official(converted).items()}
    assert again == {k: v.shape for k, v in official.items() if k.startswith("backbone.")}
    with pytest.raises(WeightsError, match="create the model with pyramid='det' or 'seg'"):
        convert_state_dict({"state_dict": official}, build())


def test_the_auxiliary_head_goes_where_the_model_has_none():
    model = build(aux_head=False)
    converted = convert_state_dict(manifest("overlock_xt"), model)
    assert list(converted) == list(model.state_dict())
    with pytest.raises(WeightsError, match=r"missing aux_head\.bn"):
        official = manifest("overlock_xt")
        convert_state_dict({k: v for k, v in official.items() if "aux" not in k}, build())


def test_merged_weights_want_the_merged_form():
    with pytest.raises(WeightsError, match="create the model with reparam=True"):
        convert_state_dict(manifest("overlock_xt_reparam"), build())


def test_trained_weights_are_merged_for_the_merged_form():
    model = build(reparam=True)
    official = golden.official_weights(golden.load("overlock_xt"))
    converted = convert_state_dict(official, model)
    assert list(converted) == list(model.state_dict())
    merged = overlock.to_official(converted)
    for name, summary in golden.load("overlock_xt")["reparam_of_filled"]["merged"].items():
        golden.check_summary(merged[name], summary, 1e-8)


def test_what_is_missing_or_left_over_is_named():
    for reparam in (False, True):
        official = manifest("overlock_xt")
        del official["sub_blocks3.1.lepe.0.dil_bn_k5_1.weight"]
        official["sub_blocks3.1.rest"] = torch.zeros(1)
        with pytest.raises(WeightsError, match=r"missing .*left over .*focus\.0\.blocks\.1"):
            convert_state_dict(official, build(reparam=reparam))
    with pytest.raises(WeightsError, match=r"stem\.0\.conv\.weight is \(28"):
        convert_state_dict(manifest("overlock_xt"), build(dims=(60, 112, 256, 336)))


def test_classes_are_adapted_through_timm():
    official = golden.official_weights(golden.load("overlock_xt"))
    model = timm.create_model(
        "overlock_xt",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": official},
        num_classes=5,
        in_chans=1,
        reparam=True,
    )
    assert model.get_classifier().out_features == 5
    stem = official["patch_embed1.0.weight"].sum(1, keepdim=True).float()
    torch.testing.assert_close(model.stem[0].conv.weight, stem)


def test_table():
    tags = [f"{name}.{tag}" for name in NAMES for tag in ("in1k", "reparam_in1k")]
    assert [row.name for row in overlock.WEIGHTS] == tags
    assert [row.top1["repository"] for row in overlock.WEIGHTS[::2]] == [82.7, 84.2, 84.8, 85.1]
    release = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"
    for name, file in [
        ("overlock_t", "overlock_t_in1k_224.pth"),
        ("overlock_s.reparam_in1k", "overlock_s_in1k_224_reparam.pth"),
    ]:
        assert find_weights(name).location == f"{release}/{file}"
        assert timm.get_pretrained_cfg(name).url == f"{release}/{file}"
    cfg = timm.get_pretrained_cfg("overlock_b")
    assert (cfg.crop_pct, cfg.interpolation, cfg.mean[0]) == (0.975, "bicubic", 0.485)
    assert (cfg.first_conv, cfg.classifier) == ("stem.0.conv", "head.fc")
    assert timm.is_model_pretrained("overlock_xt")


def test_a_release_is_downloaded_once_and_converted(hub, tmp_path):
    name = "overlock_xt.reparam_in1k"
    official = golden.official_weights(golden.load("overlock_xt_reparam"))
    file = io.BytesIO()
    torch.save({"state_dict": {k: v.float() for k, v in official.items()}}, file)
    overlay = {"url": hub.add_plain("overlock_xt_in1k_224_reparam.pth", file.getvalue())}
    for _ in range(2):
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path
        )
    assert model.reparam and hub.requests("overlock_xt_in1k_224_reparam.pth") == {"GET": 1}
    table = official["sub_blocks3.2.rpb2"].float()
    assert torch.equal(model.focus[0].blocks[2].mixer.mixing.table_large, table)
