import pytest
import timm
import torch

from backbones.pretrained import WeightsError, convert_state_dict, find_weights, maxvit
from tests.backbones.maxvit_models import ours
from tests.backbones.models import deterministic
from tests.support import golden

EMA = "/ExponentialMovingAverage"


def forged() -> dict[str, torch.Tensor]:
    """A state dict of a narrow model with TensorFlow's architecture."""
    return deterministic(ours("tf")).state_dict()


def test_tensorflow_names_and_layouts():
    official = {name: tuple(value.shape) for name, value in maxvit.to_official(forged()).items()}
    expected = {
        "stem/conv_0/kernel": (3, 3, 3, 16),
        "stem/norm_0/moving_variance": (16,),
        "stem/conv_1/bias": (24,),
        "block_00_00/mbconv/shortcut_conv/kernel": (1, 1, 24, 32),
        "block_00_00/mbconv/pre_norm/gamma": (24,),
        "block_01_01/mbconv/expand_conv/kernel": (1, 1, 64, 256),
        "block_01_01/mbconv/depthwise_conv/depthwise_kernel": (3, 3, 256, 1),
        "block_01_01/mbconv/se/reduce_conv2d/bias": (16,),
        "block_03_00/mbconv/shrink_conv/kernel": (1, 1, 384, 96),
        "block_03_00/attn_layer_norm/gamma": (96,),
        "block_03_00/ffn_layer_norm_1/beta": (96,),
        "block_03_00/attention/q/weight": (96, 3, 32),
        "block_03_00/attention_1/v/bias": (3, 32),
        "block_03_00/attention_1/o/weight": (3, 32, 96),
        "block_03_00/attention/relative_bias": (3, 3, 3),
        "block_03_00/ffn/expand_dense/weight": (96, 384),
        "block_03_00/ffn_1/shrink_dense/bias": (96,),
        "final_layer_norm/gamma": (96,),
        "cls_head/inner_dense/weight": (96, 48),
        "cls_head/logit_dense/bias": (10,),
    }
    assert {name: official[f"maxvit/{name}"] for name in expected} == expected
    assert all(name.startswith("maxvit/") for name in official)
    # q, k and v apart, no counters
    state = forged()
    counters = sum(name.endswith("num_batches_tracked") for name in state)
    packed = sum(".qkv." in name for name in state)
    assert len(official) == len(state) - counters + 2 * packed


def test_tensorflow_layers_compute_the_same():
    state = forged()
    official = maxvit.to_official(state)
    x, prefix = golden.image((5, 96)), "stages.3.blocks.0.attn_grid"
    attention = "maxvit/block_03_00/attention_1"
    qkv = x @ state[f"{prefix}.attn.qkv.weight"].T + state[f"{prefix}.attn.qkv.bias"]
    for part, values in zip("qkv", qkv.unflatten(1, (3, 3, 32)).unbind(1), strict=True):
        weight, bias = (official[f"{attention}/{part}/{leaf}"] for leaf in ("weight", "bias"))
        torch.testing.assert_close(torch.einsum("nc,chd->nhd", x, weight) + bias, values)
    heads = golden.image((5, 3, 32))
    expected = heads.flatten(1) @ state[f"{prefix}.attn.proj.weight"].T
    weight = official[f"{attention}/o/weight"]
    torch.testing.assert_close(torch.einsum("nhd,hdc->nc", heads, weight), expected)


@pytest.mark.parametrize("suffix", ["", EMA])
def test_round_trip(suffix):
    state = forged()
    official = {name + suffix: value for name, value in maxvit.to_official(state).items()}
    back = maxvit.to_ours(official)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    again = maxvit.to_official(back)
    assert all(torch.equal(again[name.removesuffix(EMA)], v) for name, v in official.items())


def test_averages_win_over_plain_variables():
    state = forged()
    official = maxvit.to_official(state)
    averages = {name + EMA: value + 1 for name, value in official.items()}
    for mixed in ({**averages, **official}, {**official, **averages}):
        assert torch.equal(maxvit.to_ours(mixed)["stem.conv2.bias"], state["stem.conv2.bias"] + 1)


def test_official_weights_fit_a_model_and_strangers_are_named():
    model = ours("tf")
    official = maxvit.to_official(forged())
    converted = convert_state_dict({"state_dict": official}, model)
    assert list(converted) == list(model.state_dict())
    with pytest.raises(WeightsError, match="left over maxvit/global_step"):
        convert_state_dict({**official, "maxvit/global_step": torch.zeros(1)}, model)
    del official["maxvit/block_00_00/attention/k/bias"]
    with pytest.raises(WeightsError, match=r"attn_block\.attn\.qkv\.bias is \(64,\) but \(96,\)"):
        convert_state_dict(official, model)


@pytest.mark.parametrize("kind", ["rw", "rmlp", "parallel"])
def test_names_of_timms_own_models_stay(kind):
    state = ours(kind, device="meta").state_dict()
    assert list(maxvit.to_official(state)) == list(maxvit.to_ours(state)) == list(state)


@pytest.mark.parametrize("row", maxvit.WEIGHTS, ids=lambda row: row.name)
def test_table_agrees_with_timm(row):
    # timm's own table, whether or not its models are replaced
    cfg = timm.models.maxxvit.default_cfgs[row.model].cfgs[row.name.partition(".")[2]]
    assert (f"timm/{row.name}", cfg.hf_hub_id) == (row.hub_id, "timm/")
    for key in ("num_classes", "input_size", "crop_pct", "interpolation", "license"):
        assert getattr(cfg, key) == getattr(row, key), key
    assert (tuple(cfg.mean), tuple(cfg.std)) == (row.mean, row.std)
    assert cfg.crop_mode == ("squash" if row.crop_pct == 1 else "center")


def test_table_is_complete_and_in_order():
    names = [
        f"{model}.{tag}"
        for model in timm.list_models("maxvit_*")
        for tag, cfg in timm.models.maxxvit.default_cfgs[model].cfgs.items()
        if cfg.hf_hub_id
    ]
    assert sorted(row.name for row in maxvit.WEIGHTS) == sorted(names)
    for model in {row.model for row in maxvit.WEIGHTS}:
        default = timm.get_pretrained_cfg(model)
        assert find_weights(model).name == f"{model}.{default.tag}"
