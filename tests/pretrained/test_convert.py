import pytest
import timm
import torch
from torch import nn

from backbones.pretrained import WeightsError, convert_state_dict, shvit
from tests.support import golden


@pytest.fixture(scope="module")
def official():
    return golden.state_dict(golden.load("shvit_s1")["manifest"])


def build(**kwargs):
    return timm.create_model("shvit_s1", device="meta", **kwargs)


def without_head(state_dict):
    return {name: value for name, value in state_dict.items() if not name.startswith("head.")}


@pytest.mark.parametrize("wrap", ["bare", "model", "ddp", "detector", "timm"])
def test_any_form_gives_the_names_of_the_model(official, wrap):
    model = build(num_classes=0) if wrap == "detector" else build()
    given = {
        "bare": official,
        "model": {"model": official, "args": None},
        "ddp": {f"module.{name}": value for name, value in official.items()},
        "detector": {f"backbone.{n}": v for n, v in without_head(official).items()},
        "timm": shvit.to_ours(official),
    }[wrap]
    converted = convert_state_dict(given, model)
    assert list(converted) == list(model.state_dict())


def test_values_arrive_where_the_recorded_map_says(official):
    names = golden.load("shvit_s1")["name_map_to_timm"]
    converted = convert_state_dict(official, build())
    assert all(converted[names[name]] is value for name, value in official.items())


def test_model_without_classifier_drops_that_of_the_weights(official):
    converted = convert_state_dict(official, build(num_classes=0))
    assert not any(name.startswith("head.") for name in converted)


def drop(text):
    return lambda state_dict: {k: v for k, v in state_dict.items() if text not in k}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks2.1.conv1.c."), r"missing stages\.1\.downsample\.2\.conv1\.c\.weight;"),
        (drop("blocks3."), r"missing .* and \d+ more; check that they are of this model and size"),
        (drop("head."), r"missing head\.bn.* and 4 more; .*require_head=False"),
        (lambda d: d | {"extra": torch.ones(1)}, "left over extra;"),
        (lambda d: d | {"head.l.bias": torch.ones(3)}, r"head\.l\.bias is \(3,\) but \(1000,\)"),
    ],
)
def test_misfits_are_named(official, change, message):
    with pytest.raises(WeightsError, match=message) as error:
        convert_state_dict(change(official), build())
    assert "\n" not in str(error.value)


def test_weights_of_another_size(official):
    model = timm.create_model("shvit_s2", device="meta")
    with pytest.raises(WeightsError, match=r"stages\.1.* but .* and \d+ more; create"):
        convert_state_dict(official, model, require_head=False)


@pytest.mark.parametrize("kwargs", [{"num_classes": 10}, {"in_chans": 1}])
def test_other_classes_or_channels_pass_only_for_timm_to_adapt(official, kwargs):
    model = build(**kwargs)
    with pytest.raises(WeightsError, match=r"head\.l\.weight|patch_embed\.0\.c\.weight"):
        convert_state_dict(official, model)
    converted = convert_state_dict(official, model, require_head=False)
    assert converted["head.l.weight"].shape == (1000, 320)
    assert converted["patch_embed.0.c.weight"].shape == (16, 3, 3, 3)


@pytest.mark.parametrize("name", ["head.l.weight", "patch_embed.0.c.weight", "head.bn.weight"])
def test_other_differences_of_those_layers_do_not_pass(official, name):
    wrong = official | {name: torch.ones(*(size + 1 for size in official[name].shape))}
    with pytest.raises(WeightsError, match=name):
        convert_state_dict(wrong, build(num_classes=10, in_chans=1), require_head=False)


def test_missing_classifier_passes_without_require_head(official):
    converted = convert_state_dict(without_head(official), build(), require_head=False)
    assert "head.l.weight" not in converted and "patch_embed.0.c.weight" in converted


@pytest.mark.parametrize("name", ["shvit_s1", "davit_tiny", "biformer_tiny", "ravlt_t"])
def test_fused_models(name):
    plain, fused = timm.create_model(name), timm.create_model(name).fuse()
    with pytest.raises(WeightsError, match="load the weights before fuse"):
        convert_state_dict(plain.state_dict(), fused)
    with pytest.raises(WeightsError, match="weights are of a fused model"):
        convert_state_dict(fused.state_dict(), plain)
    assert list(convert_state_dict(fused.state_dict(), fused)) == list(fused.state_dict())


def test_model_of_no_family(official):
    with pytest.raises(WeightsError, match="no family"):
        convert_state_dict(official, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_classes": 10}, {"num_classes": 0}, {"in_chans": 1}, {"features_only": True}],
)
def test_timm_adapts_what_passes(official, kwargs):
    names = golden.load("shvit_s1")["name_map_to_timm"]
    overlay = {"state_dict": {"model": official}}
    model = timm.create_model("shvit_s1", True, pretrained_cfg_overlay=overlay, **kwargs)
    # a feature extractor writes some dots of the names as underscores
    loaded = {name.replace("_", "."): value for name, value in model.state_dict().items()}
    for name in ("patch_embed.6.c.weight", "blocks2.4.ffn.m.pw1.c.weight"):
        assert torch.equal(loaded[names[name].replace("_", ".")], official[name].float())
    stem = official["patch_embed.0.c.weight"].float()
    torch.testing.assert_close(loaded["patch.embed.0.c.weight"].sum(1), stem.sum(1))


def test_weights_of_another_family_say_nothing_of_norms():
    weights = timm.create_model("tic_tiny", device="meta").state_dict()
    with pytest.raises(WeightsError, match=r"missing .*; left over .*; check that they are"):
        convert_state_dict(weights, timm.create_model("shvit_s1", device="meta"))
