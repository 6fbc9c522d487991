import pytest
import timm
import torch

from backbones.pretrained import convert_state_dict, shvit
from tests.support import golden

NAMES = ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"]


@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s2"])
def test_names_equal_the_recorded_map(name):
    recorded = golden.load(name)
    manifest, names = recorded["manifest"], recorded["name_map_to_timm"]
    official = golden.state_dict(manifest)
    ours = shvit.to_ours(official)
    assert set(ours) == set(names.values())
    assert all(ours[names[official_name]] is value for official_name, value in official.items())


@pytest.mark.parametrize(("name", "count"), list(zip(NAMES, [471, 471, 521, 635], strict=True)))
def test_round_trip(name, count):
    ours = timm.create_model(name, device="meta").state_dict()
    official = shvit.to_official(ours)
    assert len(ours) == len(official) == count
    assert not any(key.startswith("stages.") for key in official)
    assert list(shvit.to_ours(official)) == list(ours)
    assert list(shvit.to_official(shvit.to_ours(official))) == list(official)


def test_official_blocks_are_counted_after_the_downsampling():
    value = torch.zeros(1)
    names = {
        "blocks1.1.conv.m.c.weight": "stages.0.blocks.1.conv.m.c.weight",
        "blocks2.0.1.m.pw1.c.weight": "stages.1.downsample.1.m.pw1.c.weight",
        "blocks2.1.se.fc1.bias": "stages.1.downsample.2.se.fc1.bias",
        "blocks3.2.0.m.bn.weight": "stages.2.downsample.3.m.bn.weight",
        "blocks3.10.mixer.m.proj.1.c.weight": "stages.2.blocks.7.mixer.m.proj.1.c.weight",
        "blocks3.0.7.m.bn.weight": "blocks3.0.7.m.bn.weight",
    }
    assert list(shvit.to_ours(dict.fromkeys(names, value))) == list(names.values())


def test_names_that_are_ours_stay():
    ours = timm.create_model("shvit_s1", device="meta").state_dict()
    assert list(shvit.to_ours(ours)) == list(ours)


def test_two_heads_become_their_mean():
    recorded = golden.load("shvit_s1")
    official = golden.state_dict(recorded["manifest"] | recorded["distilled_extra"])
    model = timm.create_model("shvit_s1").double().eval()
    model.load_state_dict(convert_state_dict(official, model))

    features = golden.image((4, 320))
    outputs = []
    for head in ("head", "head_dist"):
        mean, var, gamma, beta = (
            official[f"{head}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        x = torch.nn.functional.batch_norm(features, mean, var, gamma, beta)
        outputs.append(x @ official[f"{head}.l.weight"].T + official[f"{head}.l.bias"])
    torch.testing.assert_close(model.head(features), sum(outputs) / 2, rtol=1e-10, atol=1e-10)


def test_table():
    assert [row.name for row in shvit.WEIGHTS] == [f"{name}.in1k" for name in NAMES]
    assert {row.license for row in shvit.WEIGHTS} == {"mit"}
    last = shvit.WEIGHTS[-1]
    assert last.location == "hf-hub:timm/shvit_s4.in1k"
    assert last.urls == ("https://github.com/ysj9909/SHViT/releases/download/v1.0/shvit_s4.pth",)
    assert (last.input_size, last.top1["timm"]) == ((3, 256, 256), 79.362)


@pytest.mark.parametrize("row", shvit.WEIGHTS, ids=lambda row: row.name)
def test_table_agrees_with_timm(row):
    # timm's own table, whether or not its models are replaced
    cfg = timm.models.shvit.default_cfgs[row.model].cfgs["in1k"]
    assert (f"timm/{row.name}", cfg.hf_hub_id) == (row.hub_id, "timm/")
    for key in ("num_classes", "input_size", "crop_pct", "interpolation", "license"):
        assert getattr(cfg, key) == getattr(row, key), key
    assert (tuple(cfg.mean), tuple(cfg.std)) == (row.mean, row.std)
