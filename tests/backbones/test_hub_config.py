"""`backbones.create_model("local-dir:...")`: anybody may have written the configuration."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import backbones
from backbones.pretrained import WeightsError


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("shvit_s1", num_classes=5).state_dict()


@pytest.fixture
def folder(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    write(tmp_path, {})
    return tmp_path


def write(folder, changes) -> None:
    cfg = {
        "tag": "x",
        "input_size": [3, 224, 224],
        "num_classes": 5,
        "first_conv": "patch_embed.0.c",
    }
    cfg |= {"classifier": "head.l"}
    config = {"architecture": "shvit_s1", "num_classes": 5, "pretrained_cfg": cfg}
    config |= {"model_args": {"num_classes": 5}} | changes
    config["pretrained_cfg"] = {**cfg, **changes.get("pretrained_cfg", {})}
    (folder / "config.json").write_text(json.dumps(config))


def create(folder, **kwargs):
    return backbones.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def refusal(folder, **kwargs) -> str:
    with pytest.raises(WeightsError) as error:
        create(folder, **kwargs)
    message = str(error.value)
    assert message.startswith(f"cannot use {folder / 'config.json'}: ")
    assert "\n" not in message and len(message) < 600
    return message


def test_equals_the_saved_model(folder, weights):
    model = create(folder)
    assert model.num_classes == 5
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.pretrained_cfg["source"] == "local-dir"


def test_without_weights_and_with_other_classes(folder, weights):
    random = backbones.create_model(f"local-dir:{folder}")
    assert random.num_classes == 5
    assert create(folder, num_classes=9).head.l.weight.shape[0] == 9
    assert create(folder, features_only=True)


def test_what_timm_saved(tmp_path):
    model = backbones.create_model("shvit_s1", num_classes=4, in_chans=2, drop_rate=0.1)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = create(tmp_path)
    assert loaded.patch_embed[0].c.in_channels == 2
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert create(tmp_path, in_chans=3).patch_embed[0].c.in_channels == 3


def test_old_configurations_have_everything_outside(folder):
    fields = {"architecture": "shvit_s1", "num_classes": 5, "input_size": [3, 224, 224]}
    fields |= {"first_conv": "patch_embed.0.c", "classifier": "head.l"}
    (folder / "config.json").write_text(json.dumps(fields))
    assert create(folder).num_classes == 5


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "no configuration of a timm model"),
        ('{"architecture": "shvit_s1", "model_args": [1]}', "no configuration of a timm"),
        ('{"architecture": "shvit_s1", "pretrained_cfg": "x"}', "no configuration of a timm"),
        ("{}", "it has no 'architecture'"),
        ('{"architecture": 3}', "it has no 'architecture'"),
        ('{"architecture": "overlok_t"}', "is no model of backbones or timm; did its author mean"),
        (" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_no_configuration(folder, content, message):
    (folder / "config.json").write_text(content)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_args": {"img_size": 10**9}}, "model_args.img_size is 1000000000, outside 32 to"),
        ({"model_args": {"img_size": [64, 10**9]}}, "model_args.img_size is [64, 1000000000]"),
        ({"model_args": {"num_classes": -1}}, "model_args.num_classes is -1, outside 0 to 100000"),
        ({"model_args": {"num_classes": "5"}}, "model_args.num_classes is '5', no number"),
        ({"model_args": {"drop_rate": True}}, "model_args.drop_rate is 'True', no number"),
        ({"model_args": {"in_chans": 10**6}}, "model_args.in_chans is 1000000, outside 1 to 256"),
        ({"model_args": {"layers": [9] * 4}}, "pass layers= yourself to backbones.create"),
        ({"model_args": {"embed_dim": [8192] * 3}}, "32 blocks of up to 8192 channels, more than"),
        ({"model_args": {"depth": [2, 99, 256]}}, "357 blocks of up to 2048 channels, more than"),
        ({"model_args": {"embed_dim": [9, [[[9]]], 9]}}, "is '[9, [[[9]]], 9]', no number"),
        ({"model_args": {"embed_dim": [2] * 99 + [1e9]}}, "outside 1 to 8192"),
        ({"model_args": {"embed_dim": [9] * 4}}, "can be built with its model_args (embed"),
        ({"model_args": {"global_pool": 3}}, "model_args.global_pool is 3, no str"),
        ({"model_args": {"reparam": 3}}, "model_args.reparam is 3, no bool"),
        ({"model_args": {"n_win": 8}}, "built with its model_args (n_win): TypeError"),
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"pretrained_cfg": {"input_size": [3, 1, 10**9]}}, "its input_size is [1, 1000000000]"),
        ({"pretrained_cfg": {"input_size": 3}}, "its input_size is 3, not channels"),
    ],
)  # fmt: skip
def test_bombs_and_nonsense(folder, changes, message):
    write(folder, changes)
    assert message in refusal(folder)


def test_the_caller_may_choose_what_a_configuration_may_not(folder, weights):
    write(folder, {"model_args": {"depth": [200, 200, 200], "num_classes": 5}})
    assert "600 blocks" in refusal(folder)
    assert create(folder, depth=(2, 4, 5)).num_classes == 5


def test_a_network_of_another_shape(tmp_path):
    shape = {"embed_dim": (32, 48, 72), "depth": (1, 1, 2), "partial_dim": (16, 16, 19)}
    model = backbones.create_model("shvit_s1", num_classes=4, **shape)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = create(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_configuration_does_not_say_where_the_weights_lie(folder, weights):
    elsewhere = {"file": "/etc/passwd", "url": "http://127.0.0.1:9/w.pth", "source": "hf-hub"}
    elsewhere |= {"hf_hub_id": "a/b", "hf_hub_filename": "../../x", "custom_load": True}
    write(folder, {"pretrained_cfg": elsewhere})
    assert torch.equal(create(folder).head.l.bias, weights["head.l.bias"])


def test_classes_that_the_weights_do_not_have(folder):
    write(folder, {"num_classes": 6, "model_args": {}, "pretrained_cfg": {"num_classes": 6}})
    with pytest.raises(WeightsError, match=r"config.json says 6 classes, but the weights have 5"):
        create(folder)


def test_bombs_that_timm_reads(folder):
    write(folder, {"model_args": {"img_size": 10**9}})
    with pytest.raises(WeightsError, match=r"cannot use .*: its model_args.img_size is 1000000000"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_models_of_timm_are_left_to_timm(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert type(create(tmp_path)).__module__ == "timm.models.resnet"


def test_no_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"config.json: no such file; give a folder as"):
        create(tmp_path / "nope")
