"""SHViT against the official code (golden files) and timm; its blocks, cost and layers."""

import pytest
import timm
import timm.models
import torch
from torch import nn

import backbones
from backbones.pretrained import convert_state_dict
from tests.backbones.models import deterministic, gradients, relative_error, worst_gradient
from tests.support import golden

NAMES = ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"]
SIZES = [(224, 224), (256, 256), (192, 320), (97, 65)]


def timms_own(name: str, **kwargs) -> nn.Module:
    """Timm's implementation, whoever is registered under the name."""
    return getattr(timm.models.shvit, name)(**kwargs)


@pytest.mark.parametrize("run", ["224x224", "200x312", "97x65"])
@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s2"])
@torch.no_grad()
def test_equals_the_official_release(name, run):
    reference = golden.load(name)
    model = timm.create_model(name).double().eval()
    official = golden.state_dict(reference["manifest"])
    model.load_state_dict(convert_state_dict({"model": official}, model))

    expected = reference["runs"][run]
    x = golden.image(expected["input"])
    stem = model.patch_embed(x)
    logits, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    values = {"patch_embed": stem, "logits": logits}
    values |= {f"stage{i}": value for i, value in enumerate(maps)}
    scale = max(abs(sample) for sample in expected["logits"]["samples"])
    for key, value in values.items():
        summary = expected[key]
        assert list(value.shape) == summary["shape"]
        samples = torch.tensor(summary["samples"], dtype=torch.float64)
        assert (golden.samples(value) - samples).abs().max() < 1e-10 * max(scale, 1)
        assert abs(value.mean() - summary["mean"]) < 1e-10 * max(scale, 1)
        assert abs(value.std() - summary["std"]) < 1e-10 * max(scale, 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_timm(name, dtype, tolerance):
    theirs, ours = timms_own(name).to(dtype).eval(), timm.create_model(name).to(dtype).eval()
    assert type(ours) is backbones.SHViT is not type(theirs)
    weights = golden.fill_model(theirs)
    theirs.load_state_dict(weights)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for size in SIZES:
        x = golden.image((1, 3, *size)).to(dtype)
        expected_last, expected_maps = theirs.forward_intermediates(x)
        last, maps = ours.forward_intermediates(x)
        for value, expected in zip([*maps, last], [*expected_maps, expected_last], strict=True):
            assert relative_error(value, expected) < tolerance, size
        assert relative_error(ours(x), theirs(x)) < tolerance, size


@pytest.mark.parametrize(
    "name, parameters, fused_parameters, giga_macs",
    [
        ("shvit_s1", 6_330_808, 6_308_660, 0.241),
        ("shvit_s2", 11_483_072, 11_453_508, 0.365),
        ("shvit_s3", 14_245_273, 14_210_010, 0.601),
        ("shvit_s4", 16_588_484, 16_546_248, 0.986),
    ],
)
def test_size_and_cost(name, parameters, fused_parameters, giga_macs):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    macs = backbones.ops.count_macs(model, model.pretrained_cfg["input_size"])
    assert round(macs / 1e9, 3) == giga_macs
    assert sum(p.numel() for p in model.fuse().parameters()) == fused_parameters
    assert backbones.ops.count_macs(model, model.pretrained_cfg["input_size"]) == macs


def test_fvcore_counts_the_same():
    from fvcore.nn import FlopCountAnalysis

    model = timm.create_model("shvit_s1").eval()
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224))
    analysis.set_op_handle(**backbones.ops.fvcore_handles())
    analysis.unsupported_ops_warnings(False)
    count = analysis.by_operator()
    # fvcore counts norms and pooling too
    products = count["conv"] + count["linear"] + count["partial_attention"]
    assert products == backbones.ops.count_macs(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_fuse_is_exact(name):
    model = deterministic(timm.create_model(name))
    x = golden.image((1, 3, 97, 65))
    expected = model(x)
    assert model.fuse() is model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert relative_error(model(x), expected) < 1e-11

    model = deterministic(timm.create_model(name), torch.float32)
    expected = model(x.float())
    assert relative_error(model.fuse()(x.float()), expected) < 1e-5


def test_gradients_equal_timms():
    theirs, ours = (
        deterministic(timms_own("shvit_s1")),
        deterministic(timm.create_model("shvit_s1")),
    )
    # the last map has enough values for its batch statistics to be well conditioned
    x = golden.image((4, 3, 128, 160))
    assert worst_gradient(gradients(ours, x), gradients(theirs, x))[0] < 1e-10


def test_starts_as_the_identity_in_every_block():
    model = timm.create_model("shvit_s1").eval()
    x = torch.randn(1, 128, 4, 4)
    assert torch.equal(model.stages[0].blocks(x), x)


def test_layers_for_layer_decay():
    model = timm.create_model("shvit_s1")
    assert model.no_weight_decay() == set()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + 2 + 4 + 5 + 1
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 1 + 3 + 1


def test_two_classifiers_for_distillation():
    official = golden.load("shvit_s1")
    weights = golden.state_dict(official["manifest"] | official["distilled_extra"])
    plain = timm.create_model("shvit_s1").double().eval()
    model = timm.create_model("shvit_s1", distilled=True).double()
    for each in (plain, model):
        each.load_state_dict(convert_state_dict(weights, each))
    x = golden.image((2, 3, 64, 96))
    assert relative_error(model.eval()(x), plain(x)) < 1e-12
    # the mean in training too, unless a teacher is there
    assert model.train()(x).shape == (2, 1000)
    model.set_distilled_training()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    labels, teacher = model(x)
    assert torch.equal(labels, model.head(pooled))
    assert torch.equal(teacher, model.head_dist(pooled))
    mean = model.eval()(x)
    assert mean.shape == (2, 1000)
    assert relative_error(model.fuse()(x), mean) < 1e-11


def test_the_second_classifier_begins_fresh_and_follows_the_first():
    plain = timm.create_model("shvit_s1").state_dict()
    model = timm.create_model("shvit_s1", distilled=True, num_classes=5)
    given = convert_state_dict(plain, model, require_head=False)
    assert model.state_dict().keys() - given.keys() == {
        name for name in model.state_dict() if name.startswith("head_dist.")
    }
    assert model.get_classifier() == (model.head.l, model.head_dist.l)
    model.reset_classifier(3)
    assert [layer.out_features for layer in model.get_classifier()] == [3, 3]
    model.reset_classifier(0)
    assert model.head_dist is None and isinstance(model.get_classifier(), nn.Identity)
