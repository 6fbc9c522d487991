"""MaxViT against timm and its golden files, and at sizes that timm's code refuses."""

import json

import pytest
import timm
import timm.models.maxxvit as theirs
import torch
import torch.nn.functional as F
from timm.models._hub import save_for_hf
from torch import nn

import backbones
from backbones.layers import PartitionAttention
from tests.backbones.maxvit_models import KINDS, ours, pair, timms
from tests.backbones.models import (
    deterministic,
    gradients,
    relative_error,
    worst_error,
    worst_gradient,
)
from tests.support import costs, golden

# name -> parameters, GMACs of timm's code, with 1000 classes
MODELS = {
    "maxvit_tiny_tf_224": (30_916_528, "5.55"),
    "maxvit_tiny_tf_384": (30_977_008, "17.39"),
    "maxvit_tiny_tf_512": (31_049_584, "33.25"),
    "maxvit_small_tf_224": (68_927_956, "11.59"),
    "maxvit_small_tf_384": (69_018_676, "35.67"),
    "maxvit_small_tf_512": (69_127_540, "66.91"),
    "maxvit_base_tf_224": (119_467_708, "23.92"),
    "maxvit_base_tf_384": (119_653_468, "73.45"),
    "maxvit_base_tf_512": (119_876_380, "137.4"),
    "maxvit_large_tf_224": (211_785_560, "43.52"),
    "maxvit_large_tf_384": (212_033_240, "132.1"),
    "maxvit_large_tf_512": (212_330_456, "243.9"),
    "maxvit_xlarge_tf_224": (474_951_952, "97.26"),
    "maxvit_xlarge_tf_384": (475_323_472, "292.1"),
    "maxvit_xlarge_tf_512": (475_769_296, "532.9"),
    "maxvit_pico_rw_256": (7_457_996, "1.80"),
    "maxvit_nano_rw_256": (15_451_148, "4.42"),
    "maxvit_tiny_rw_224": (29_057_312, "5.07"),
    "maxvit_tiny_rw_256": (29_066_720, "6.69"),
    "maxvit_tiny_pm_256": (30_089_344, "6.55"),
    "maxvit_rmlp_pico_rw_256": (7_515_980, "1.82"),
    "maxvit_rmlp_nano_rw_256": (15_501_452, "4.43"),
    "maxvit_rmlp_tiny_rw_256": (29_148_896, "6.71"),
    "maxvit_rmlp_small_rw_224": (64_895_044, "10.69"),
    "maxvit_rmlp_small_rw_256": (64_895_044, "14.07"),
    "maxvit_rmlp_base_rw_224": (116_135_788, "23.04"),
    "maxvit_rmlp_base_rw_384": (116_135_788, "70.65"),
}
needs_resizing = pytest.mark.skipif(
    not hasattr(theirs.MaxxVit, "set_input_size"), reason="timm < 1.0.31 cannot resize MaxViT"
)


def one_hot_macs(model: nn.Module) -> int:
    """What timm's TensorFlow models multiply to look their tables up; ours read them."""
    macs = 0
    for name, table in model.named_parameters():
        if name.endswith("bias_table") and table.ndim == 3:
            heads, rows, cols = table.shape
            p, q = (rows + 1) // 2, (cols + 1) // 2
            macs += heads * p * p * cols * (rows + q * q)
    return macs


def test_every_model_is_here():
    assert set(backbones.list_models("maxvit")) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_cost_equal_timms(name):
    model = timm.create_model(name, device="meta", num_classes=1000)
    expected = getattr(theirs, name)(device="meta", num_classes=1000).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    parameters, giga_macs = MODELS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters

    more_classes = model.pretrained_cfg["num_classes"] - 1000
    macs = costs.macs(name) - more_classes * model.head_hidden_size + one_hot_macs(model)
    digits = len(giga_macs.partition(".")[2])
    # a strided depthwise convolution computes one row and one column too many
    assert abs(macs / 1e9 - float(giga_macs)) < 0.51 * 10**-digits + 0.002


@pytest.mark.parametrize(
    "name, run",
    [
        ("maxvit_tiny_tf_224", "224x224"),
        ("maxvit_tiny_tf_384", "384x384"),
        ("maxvit_rmlp_pico_rw_256", "256x256"),
    ],
)
@torch.no_grad()
def test_equals_the_golden_files(name, run):
    reference = golden.load(name)
    model = timm.create_model(name).double().eval()
    model.load_state_dict(golden.state_dict(reference["manifest"]))
    expected = reference["runs"][run]
    x = golden.image(expected["input"])
    features, maps = model.forward_intermediates(x)
    values = {f"stage{i}": value for i, value in enumerate(maps[1:])}
    values |= {
        "stem": maps[0],
        "features": features,
        "pre_logits": model.forward_head(features, pre_logits=True),
        "logits": model.forward_head(features),
    }
    assert set(values) == set(expected) - {"input"}
    # processors round the logarithms of offsets, in float32, in different ways: timm's model errs
    # by 4e-9 where ours does
    tolerance = 1e-8 if "rmlp" in name else 1e-10
    for key, value in values.items():
        summary = expected[key]
        assert list(value.shape) == summary["shape"]
        samples = torch.tensor(summary["samples"], dtype=torch.float64)
        scale = samples.abs().max()
        assert (golden.samples(value) - samples).abs().max() < tolerance * scale, key
        assert abs(value.mean() - summary["mean"]) < tolerance * scale, key
        assert abs(value.std() - summary["std"]) < tolerance * scale, key


@pytest.mark.parametrize("name, sizes", [("maxvit_pico_rw_256", [(256, 256), (512, 256)])])
@torch.no_grad()
def test_a_whole_model_equals_timms(name, sizes):
    model, expected = timm.create_model(name), getattr(theirs, name)()
    assert type(model) is backbones.MaxViT
    model, expected = deterministic(model), deterministic(expected)
    for size in sizes:
        assert worst_error(model, expected, golden.image((1, 3, *size))) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_timm(kind):
    for kwargs, sizes in [
        ({}, [(64, 64), (128, 192)]),
        ({"img_size": (96, 64)}, [(96, 64)]),
        ({"img_size": 96, "transformer_window_size": 2, "global_pool": "avgmax"}, [(64, 128)]),
    ]:
        model, expected = pair(kind, **kwargs)
        for size in sizes:
            assert worst_error(model, expected, golden.image((2, 3, *size))) < 1e-10, (kwargs, size)
    model, expected = pair(kind, torch.float32)
    assert worst_error(model, expected, golden.image((2, 3, 64, 64)).float()) < 2e-5


@torch.no_grad()
def test_window_and_grid_may_differ():
    kwargs = {"transformer_window_size": (2, 4), "transformer_grid_size": [4, 2]}
    model, expected = pair("tf", **kwargs)
    assert worst_error(model, expected, golden.image((1, 3, 128, 128))) < 1e-10
    only_grid = ours("rw", transformer_grid_size=1).stages[0].blocks[0]
    assert only_grid.attn_block.attn.window_size == (2, 2)
    assert only_grid.attn_grid.attn.window_size == (1, 1)


@needs_resizing
@pytest.mark.parametrize("kind", ["tf", "rw", "rmlp", "parallel"])
@torch.no_grad()
def test_set_input_size_equals_timms(kind):
    model, expected = pair(kind)
    model.requires_grad_(False)
    for size in [(128, 96), 32, (96, 160), 64]:
        model.set_input_size(size)
        expected.set_input_size(size)
        values = expected.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, values[name]), (name, size)
    assert worst_error(model, expected, golden.image((1, 3, 64, 64))) < 1e-10
    assert not any(p.requires_grad for p in model.parameters())
    model.bfloat16().set_input_size(96)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(1, 3, 96, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@needs_resizing
@torch.no_grad()
def test_saved_models_load_in_timm_and_here(tmp_path):
    name, x = "maxvit_pico_rw_256", golden.image((1, 3, 64, 96)).float()
    model = timm.create_model(name, num_classes=7, img_size=128).eval()
    model.set_input_size((64, 96), window_size=(2, 3), grid_size=(1, 3))
    save_for_hf(model, tmp_path / "ours", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert type(again) is backbones.MaxViT
    assert torch.equal(again(x), model(x))
    args = json.loads((tmp_path / "ours" / "config.json").read_text())["model_args"]
    expected = getattr(theirs, name)(**args).eval()
    expected.load_state_dict(model.state_dict())
    assert relative_error(model(x), expected(x)) < 1e-5

    expected = getattr(theirs, name)(num_classes=7, img_size=64).eval()
    expected.set_input_size((128, 64), partition_ratio=64)
    save_for_hf(expected, tmp_path / "theirs", safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    assert type(model) is backbones.MaxViT
    assert (model.img_size, model.partition_ratio) == ((128, 64), 64)
    x = golden.image((1, 3, 128, 64)).float()
    assert relative_error(model(x), expected(x)) < 1e-5


@needs_resizing
@pytest.mark.parametrize("kind", ["tf", "rw", "rmlp"])
@torch.no_grad()
def test_weights_for_another_size_are_resized_as_timm_does(kind):
    weights = deterministic(ours(kind, img_size=96)).state_dict()
    for size in [(64, 64), (64, 128)]:
        model, expected = ours(kind, img_size=size), timms(kind, img_size=size)
        resized = backbones.maxvit.checkpoint_filter_fn({"model": weights}, model)
        values = theirs.checkpoint_filter_fn(weights, expected)
        assert list(resized) == list(values)
        assert all(torch.equal(resized[name], value) for name, value in values.items())
        model.load_state_dict(resized)


def test_weights_of_windows_that_are_not_square():
    weights = deterministic(ours("rw", img_size=(64, 128))).state_dict()
    same = ours("rw", img_size=(64, 128))
    assert len(backbones.maxvit.checkpoint_filter_fn(weights, same)) == len(weights)
    with pytest.raises(ValueError, match="a table of 21 offsets is of a window that is not square"):
        backbones.maxvit.checkpoint_filter_fn(weights, ours("rw"))


def masked_attention(self: PartitionAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention on padded windows with explicit masks, written independently of the op.

    Padding is filled with large numbers: the result must not depend on it.
    """
    (p, q), (batch, height, width, dim) = self.window_size, x.shape
    rows, cols = -(-height // p), -(-width // q)
    padding = (0, 0, 0, cols * q - width, 0, rows * p - height)
    tokens = F.pad(self.qkv(x), padding, value=1e4)
    real = F.pad(torch.ones(1, height, width, 1, dtype=torch.bool), padding, value=False)

    def windows(y: torch.Tensor) -> torch.Tensor:
        if self.grid:
            y = y.reshape(len(y), p, rows, q, cols, -1).permute(0, 2, 4, 1, 3, 5)
        else:
            y = y.reshape(len(y), rows, p, cols, q, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(len(y), rows * cols, p * q, -1)

    heads, tokens, real = self.num_heads, windows(tokens), windows(real)
    order, axis = ((heads, 3, 32), 4) if self.head_first else ((3, heads, 32), 3)
    parts = tokens.reshape(*tokens.shape[:3], *order).unbind(axis)
    queries, keys, values = (part.transpose(2, 3) for part in parts)

    table, bias = self.rel_pos.get_table(), torch.empty(heads, p * q, p * q, dtype=x.dtype)
    for i in range(p * q):
        for j in range(p * q):
            bias[:, i, j] = table[:, i // q - j // q + p - 1, i % q - j % q + q - 1]
    scores = queries @ keys.transpose(-1, -2) / 32**0.5 + bias
    scores = torch.where(real[:, :, None, None, :, 0], scores, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(2, 3).reshape(batch, rows, cols, p, q, dim)
    out = out.permute(0, 3, 1, 4, 2, 5) if self.grid else out.permute(0, 1, 3, 2, 4, 5)
    return self.proj(out.reshape(batch, rows * p, cols * q, dim)[:, :height, :width])


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("tf", [(224, 256), (200, 300), (97, 65), (32, 47)]),
        ("rw", [(224, 256), (101, 131)]),
        ("rmlp", [(200, 300)]),
        ("parallel", [(224, 256), (97, 65)]),
        ("tf", [(800, 1216)]),
    ],
)
@torch.no_grad()
def test_any_size_equals_a_masked_reference(kind, sizes, monkeypatch):
    model = deterministic(ours(kind, depths=(1, 1, 1, 1), img_size=224))
    images = [golden.image((1, 3, *size)) for size in sizes]
    results = [model.forward_intermediates(x)[1] for x in images]
    monkeypatch.setattr(PartitionAttention, "forward", masked_attention)
    for x, maps in zip(images, results, strict=True):
        for value, expected in zip(maps, model.forward_intermediates(x)[1], strict=True):
            assert relative_error(value, expected) < 1e-12
        height, width = x.shape[2:]
        for value, stride in zip(maps, (2, 4, 8, 16, 32), strict=True):
            assert value.shape[2:] == (-(-height // stride), -(-width // stride))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_timms_and_survive_checkpointing(kind):
    model, expected = pair(kind, drop_path_rate=0.3)
    x = golden.image((4, 3, 64, 128))

    # dropout and drop path draw the same numbers in the same order
    wanted, plain = gradients(expected, x), gradients(model, x)
    assert worst_gradient(plain, wanted)[0] < 1e-10
    model.set_grad_checkpointing()
    assert worst_gradient(gradients(model, x), plain)[0] < 1e-12


def test_drop_path_rises_over_the_blocks():
    model = ours("tf", drop_path_rate=0.4)
    rates = [
        getattr(block.attn_grid.drop_path2, "drop_prob", 0.0)
        for stage in model.stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), model(x))
