"""DaViT against the official code (golden files) and timm; what of the interface is its own."""

from collections import Counter

import pytest
import timm
import timm.models.davit as theirs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from backbones.pretrained import convert_state_dict
from tests.backbones.models import (
    deterministic,
    gradients,
    relative_error,
    worst_error,
    worst_gradient,
)
from tests.support import costs, golden

# name -> parameters, GMACs of the official code
MODELS = {
    "davit_tiny": (28_360_168, "4.52"),
    "davit_small": (49_745_896, "8.77"),
    "davit_base": (87_954_408, "15.47"),
    "davit_large": (196_811_752, "34.5"),
    "davit_huge": (348_922_856, "61.2"),
    "davit_giant": (1_406_470_120, "192.8"),
    "davit_base_fl": (90_370_048, "189.9"),
    "davit_huge_fl": (360_636_416, "744.0"),
}

_NARROW = {"embed_dims": (32, 64, 64, 96), "num_heads": (1, 2, 2, 3), "depths": (1, 1, 2, 1)}
_FLORENCE = {
    "window_size": 12,
    "down_kernel_size": 3,
    "channel_attn_v2": True,
    "named_blocks": True,
}
KINDS = {
    "classifier": _NARROW,
    "florence": {**_NARROW, **_FLORENCE},
    "wide": {"embed_dims": (64, 160), "num_heads": (2, 5), "depths": (1, 2)},
}


def pair(kind: str, dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A narrow model of ours and timm's, with the same weights."""
    args = {"num_classes": 10, **KINDS[kind], **kwargs}
    return deterministic(backbones.DaViT(**args), dtype), deterministic(theirs.DaVit(**args), dtype)


def spread_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the standard deviation of the expected values."""
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.std())


def test_every_model_is_here():
    assert set(backbones.list_models("davit")) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_cost_equal_timms(name):
    model = timm.create_model(name, device="meta")
    assert type(model) is backbones.DaViT
    classes = {"num_classes": model.num_classes}
    expected = getattr(theirs, name)(device="meta", **classes).state_dict()
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in expected.items()
    ]
    parameters, giga_macs = MODELS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    digits = len(giga_macs.partition(".")[2])
    assert f"{costs.macs(name) / 1e9:.{digits}f}" == giga_macs


@pytest.mark.parametrize(
    "name, kernel_size, runs",
    [("davit_tiny", 2, ["224x224", "200x312", "97x65"]), ("davit_tiny_overlap", 3, ["97x65"])],
)
@torch.no_grad()
def test_equals_the_official_release(name, kernel_size, runs):
    reference = golden.load(name)
    official = golden.state_dict(reference["manifest"])
    model = timm.create_model("davit_tiny", down_kernel_size=kernel_size).double().eval()
    model.load_state_dict(convert_state_dict({"state_dict": official}, model))
    for run in runs:
        expected = reference["runs"][run]
        x = golden.image(expected["input"])
        last, maps = model.forward_intermediates(x)
        values = {f"stage{i}": value for i, value in enumerate(maps)}
        values["logits"] = model.forward_head(last)
        assert set(values) == set(expected) - {"input", "timm_max_abs_err"}
        for key, value in values.items():
            summary = expected[key]
            assert list(value.shape) == summary["shape"]
            samples = torch.tensor(summary["samples"], dtype=torch.float64)
            scale = 1e-10 * summary["std"]
            assert (golden.samples(value) - samples).abs().max() < scale, key
            assert abs(value.mean() - summary["mean"]) < scale, key
            assert abs(value.std() - summary["std"]) < scale, key


@torch.no_grad()
def test_davit_tiny_equals_timms():
    model, expected = deterministic(timm.create_model("davit_tiny")), theirs.davit_tiny().double()
    expected.eval().load_state_dict(model.state_dict())
    for size in [(224, 224), (229, 250), (97, 65), (200, 312)]:
        x = golden.image((1, 3, *size))
        last, maps = model.forward_intermediates(x)
        expected_last, expected_maps = expected.forward_intermediates(x)
        outputs = [*maps, model.forward_head(last)]
        wanted = [*expected_maps, expected.forward_head(expected_last)]
        for value, wanted_value in zip(outputs, wanted, strict=True):
            assert spread_error(value, wanted_value) < 1e-10, size
    model, expected = model.float(), expected.float()
    for size in [(224, 224), (97, 65)]:
        assert worst_error(model, expected, golden.image((2, 3, *size)).float()) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_timm_at_any_size(kind):
    model, expected = pair(kind)
    sizes = [(224, 224), (229, 250), (97, 65), (200, 312), (33, 47), (32, 32), (35, 61)]
    for size in sizes:
        assert worst_error(model, expected, golden.image((1, 3, *size))) < 1e-10, size


@torch.no_grad()
def test_equals_timm_on_images_of_detectors():
    args = {"embed_dims": (32, 32, 32, 32), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}
    model, expected = pair("classifier", torch.float32, **args)
    for size in [(800, 1216), (801, 1333)]:
        assert worst_error(model, expected, golden.image((1, 3, *size)).float()) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_timms_and_survive_checkpointing(kind):
    model, expected = pair(kind, drop_path_rate=0.3)
    x = golden.image((4, 3, 97, 65))
    # drop path draws the same numbers in the same order
    wanted, plain = gradients(expected, x), gradients(model, x)
    assert worst_gradient(plain, wanted)[0] < 1e-10
    model.set_grad_checkpointing()
    assert worst_gradient(gradients(model, x), plain)[0] < 1e-12


def test_drop_path_is_one_for_both_blocks_of_a_pair_and_rises():
    model = backbones.DaViT(**_NARROW, drop_path_rate=0.4)
    rates = [
        getattr(drop, "drop_prob", 0.0)
        for stage in model.stages
        for blocks in stage.blocks
        for block in blocks
        for drop in (block.drop_path1, block.drop_path2)
    ]
    assert rates == pytest.approx([i // 4 / 10 for i in range(20)])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_first_values_equal_timms():
    values = []
    for model in (backbones.DaViT, theirs.DaVit):
        torch.manual_seed(0)
        values.append(model(**KINDS["florence"]).state_dict())
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fuse_is_exact(kind):
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 2e-5)]:
        model, _ = pair(kind, dtype)
        images = [golden.image((2, 3, *size)).to(dtype) for size in [(64, 128), (97, 65)]]

        def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
            last, maps = model.forward_intermediates(x)
            return [*maps, model.forward_head(last, pre_logits=True), model.forward_head(last)]

        expected = [outputs(model, x) for x in images]
        assert model.fuse() is model
        model.fuse()
        for x, wanted in zip(images, expected, strict=True):
            for value, wanted_value in zip(outputs(model, x), wanted, strict=True):
                assert relative_error(value, wanted_value) < tolerance
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight is None) == (".blocks." in name), name


@torch.no_grad()
def test_a_fused_model_scripts_and_is_saved_whole():
    model = pair("classifier")[0].fuse()
    x = golden.image((2, 3, 65, 97))
    assert torch.equal(torch.jit.script(model)(x), model(x))
    again = backbones.DaViT(**_NARROW, num_classes=10).double().eval().fuse()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert all(value.is_floating_point() for value in again.half().state_dict().values())
    assert {value.dtype for value in again.state_dict().values()} == {torch.float16}


class _Copies(TorchDispatchMode):
    """Count what copies a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "roll"):
            self.count[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["classifier", "florence"])
@torch.no_grad()
def test_nothing_is_copied_between_layers(kind):
    model, expected = pair(kind, torch.float32)
    for size, pads in [((224, 224), 0), ((224, 240), 1), ((97, 65), 3)]:
        x = golden.image((2, 3, *size)).float().contiguous(memory_format=torch.channels_last)
        with _Copies() as copies:
            model(x)
        # the overlapping convolution pads itself
        wanted = {"constant_pad_nd": pads} if pads and kind == "classifier" else {}
        assert copies.count == wanted, size
    with _Copies() as copies:
        expected(x)
    assert copies.count["clone"] > 20


@pytest.mark.parametrize("kind", ["classifier", "florence"])
@torch.no_grad()
def test_traces_for_all_sizes_and_runs_without_our_ops(kind):
    args = {**KINDS[kind], "embed_dims": (32, 64), "num_heads": (1, 2), "depths": (1, 1)}
    model = deterministic(backbones.DaViT(**args))
    traced = torch.jit.trace(model, golden.image((2, 3, 64, 96)))
    for size in [(64, 96), (65, 97), (70, 39)]:
        x = golden.image((2, 3, *size))
        assert relative_error(traced(x), model(x)) < 1e-12
    with timm.layers.set_exportable(True):
        plain = deterministic(backbones.DaViT(**args))
    assert relative_error(plain(x), model(x)) < 1e-12
    assert "backbones::" not in str(torch.jit.trace(plain, x).inlined_graph)


def test_norm_of_the_classifier_can_go():
    model = backbones.DaViT(**_NARROW).to(torch.bfloat16).eval().requires_grad_(False)
    norm = model.head.norm.weight
    model.reset_classifier(3, "max")
    assert model.head.norm.weight is norm and not norm.requires_grad
    model.reset_classifier(3, reset_other=True)
    assert model.head.global_pool.pool_type == "max"
    assert not hasattr(model.head, "norm")
    assert model(torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)).shape == (2, 3)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["classifier", "florence"])
def test_layers_for_layer_decay_equal_timms(kind):
    model, expected = pair(kind)
    for coarse in (False, True):
        groups, wanted = (
            timm.models.group_parameters(m, m.group_matcher(coarse=coarse))
            for m in (model, expected)
        )
        assert groups == wanted
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depths": (1, 1)}, r"depths=\(1, 1\) and num_heads=.* must be of equal length"),
        ({"num_heads": (3, 6, 12, 25)}, r"must be multiples of num_heads=\(3, 6, 12, 25\)"),
        ({"num_heads": (0, 6, 12, 24)}, r"must be multiples of num_heads=\(0, 6, 12, 24\)"),
        ({"window_size": 0}, "window_size=0 must be positive"),
        ({"down_kernel_size": 4}, "down_kernel_size=4 is not available: use 2 or 3"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        backbones.DaViT(**kwargs, device="meta")
