import pytest
import timm
import timm.models.davit
import torch

from backbones.pretrained import WeightsError, convert_state_dict, davit, find_weights
from tests.support import golden

RELEASED = ["davit_tiny", "davit_small", "davit_base", "davit_large", "davit_huge", "davit_giant"]
FLORENCE = ["davit_base_fl", "davit_huge_fl"]
COUNTS = dict(zip(RELEASED + FLORENCE, [212, 404, 404, 404, 404, 564, 402, 402], strict=True))


def build(name: str = "davit_tiny", **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **kwargs)


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return golden.state_dict(golden.load("davit_tiny")["manifest"])


@pytest.fixture(scope="module")
def florence() -> dict[str, torch.Tensor]:
    """A narrow image tower, and a tensor of the rest, under Florence-2's names."""
    model = build("davit_base_fl", embed_dims=(32, 64, 64, 96), num_heads=(1, 2, 2, 3))
    tower = davit.to_official(golden.fill_model(model))
    return {**tower, "language_model.model.shared.weight": torch.zeros(4, 2)}


@pytest.mark.parametrize("name", ["davit_tiny", "davit_tiny_overlap"])
def test_names_equal_the_recorded_map(name):
    recorded = golden.load(name)
    manifest, names = recorded["manifest"], recorded["name_map_to_timm"]
    given = golden.state_dict(manifest)
    ours = davit.to_ours(given)
    assert set(ours) == set(names.values())
    assert all(ours[names[official_name]] is value for official_name, value in given.items())
    assert list(davit.to_official(ours)) == list(manifest)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_round_trip(name, count):
    ours = build(name).state_dict()
    official = davit.to_official(ours)
    assert len(ours) == count
    assert not set(official) & set(ours)
    assert set(davit.to_ours(official)) == set(ours)
    assert list(davit.to_official(davit.to_ours(official))) == list(official)


@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
def test_names_that_are_ours_stay(name):
    ours = build(name).state_dict()
    assert list(davit.to_ours(ours)) == list(ours)


@pytest.mark.parametrize("make", ["release", "florence"])
def test_names_equal_what_timm_makes_of_them(make, official, florence):
    given = official if make == "release" else florence
    # timm's own filter asks nothing of the model
    theirs = timm.models.davit.checkpoint_filter_fn(dict(given), None)
    ours = davit.to_ours(given)
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    added = {"head.norm.weight", "head.norm.bias"} if make == "florence" else set()
    assert set(ours) - set(theirs) == added


def test_florence_names(florence):
    names = {
        "convs.0.proj.weight": "stem.conv.weight",
        "convs.3.norm.bias": "stages.3.downsample.norm.bias",
        "blocks.2.8.spatial_block.conv1.fn.dw.bias": (
            "stages.2.blocks.8.spatial_block.cpe1.proj.bias"
        ),
        "blocks.0.0.spatial_block.window_attn.norm.weight": (
            "stages.0.blocks.0.spatial_block.norm1.weight"
        ),
        "blocks.3.0.channel_block.channel_attn.fn.qkv.weight": (
            "stages.3.blocks.0.channel_block.attn.qkv.weight"
        ),
        "blocks.1.0.channel_block.ffn.fn.net.fc2.bias": (
            "stages.1.blocks.0.channel_block.mlp.fc2.bias"
        ),
    }
    ours = davit.to_ours(florence)
    for theirs, name in names.items():
        assert ours[name] is florence[f"vision_tower.{theirs}"]
    assert not any("language" in name for name in ours)
    assert (ours["head.norm.weight"] == torch.ones(96)).all()
    assert not ours["head.norm.bias"].any()


def test_florence_fits_its_tower(florence):
    model = build("davit_base_fl", embed_dims=(32, 64, 64, 96), num_heads=(1, 2, 2, 3))
    assert list(convert_state_dict(florence, model)) == list(model.state_dict())
    with pytest.raises(WeightsError, match="missing"):
        convert_state_dict(florence, build())


def test_florence_weights_load_through_timm(florence):
    for classes in (0, 5):
        model = timm.create_model(
            "davit_base_fl",
            pretrained=True,
            num_classes=classes,
            embed_dims=(32, 64, 64, 96),
            num_heads=(1, 2, 2, 3),
            pretrained_cfg_overlay={"state_dict": florence},
        )
        stem = florence["vision_tower.convs.0.proj.weight"].float()
        assert torch.equal(model.stem.conv.weight, stem)
        assert (model.head.norm.weight == 1).all() and not model.head.norm.bias.any()


def test_a_detector_gives_its_backbone_with_and_without_the_norms_of_its_maps(official):
    body = {k: v for k, v in official.items() if not k.startswith(("norms.", "head."))}
    norms = {
        f"norm{i}.{leaf}": torch.ones(96 * 2**i) for i in range(4) for leaf in ("weight", "bias")
    }
    detector = {f"backbone.{name}": value for name, value in (body | norms).items()}
    detector["neck.fpn.weight"] = torch.zeros(1)

    model = build(num_classes=0)
    converted = convert_state_dict({"state_dict": detector}, model)
    assert list(converted) == list(model.state_dict())
    assert converted["stem.conv.weight"] is official["patch_embeds.0.proj.weight"]
    assert (converted["head.norm.weight"] == 1).all() and not converted["head.norm.bias"].any()
    with pytest.raises(WeightsError, match=r"missing head\.fc\.weight.*they have no classifier"):
        convert_state_dict(detector, build())
    pyramid = build(pyramid="det")
    normed = convert_state_dict({"state_dict": detector}, pyramid)
    assert list(normed) == list(pyramid.state_dict())
    assert normed["feature_norms.2.weight"] is norms["norm2.weight"]
    assert set(davit.to_official(normed)) == {*body, *norms}
    # a classifier that lost its norm is not taken for a detector
    with pytest.raises(WeightsError, match=r"missing head\.norm\.weight"):
        convert_state_dict(body, model)


def test_table():
    assert [row.model for row in davit.WEIGHTS] == RELEASED[:3] + FLORENCE
    assert [row.top1.get("paper") for row in davit.WEIGHTS] == [82.8, 84.2, 84.6, None, None]
    assert find_weights("davit_base_fl").location == "hf-hub:microsoft/Florence-2-base"


@pytest.mark.parametrize("row", davit.WEIGHTS, ids=lambda row: row.name)
def test_table_agrees_with_timm(row):
    # timm's own table, whether or not its models are replaced
    cfg = timm.models.davit.default_cfgs[row.model].cfgs[row.name.partition(".")[2]]
    hub_id = cfg.hf_hub_id if row.model in FLORENCE else f"{cfg.hf_hub_id}{row.name}"
    assert hub_id == row.hub_id
    for key in ("num_classes", "input_size", "crop_pct", "interpolation"):
        assert getattr(cfg, key) == getattr(row, key), key
    assert (tuple(cfg.mean), tuple(cfg.std)) == (row.mean, row.std)
    # of Florence-2 timm states its default, the model's card this
    assert row.license == ("mit" if row.model in FLORENCE else cfg.license)


def test_every_tag_with_weights_is_in_the_table():
    names = [
        f"{model}.{tag}"
        for model, cfgs in timm.models.davit.default_cfgs.items()
        for tag, cfg in cfgs.cfgs.items()
        if cfg.hf_hub_id
    ]
    assert [row.name for row in davit.WEIGHTS] == names
