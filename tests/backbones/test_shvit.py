"""SHViT against the official code (golden files), timm, and timm's conventions for a model."""

import io

import pytest
import timm
import timm.models
import torch
from timm.models._features import FeatureGetterNet
from timm.utils import reparameterize_model
from torch import nn

import backbones
from backbones.pretrained import convert_state_dict
from tests.support import golden

NAMES = ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"]
SIZES = [(224, 224), (256, 256), (192, 320), (97, 65)]


def deterministic(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Fill a model with the deterministic weights of its tensor names."""
    model = model.to(dtype).eval()
    model.load_state_dict(golden.fill_model(model))
    return model


def timms_own(name: str, **kwargs) -> nn.Module:
    """Timm's implementation, whoever is registered under the name."""
    return getattr(timm.models.shvit, name)(**kwargs)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return deterministic(timm.create_model("shvit_s1"))


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


@torch.no_grad()
def test_timms_reparameterization_is_fuse(small):
    x = golden.image((1, 3, 64, 96))
    fused = reparameterize_model(small)
    assert "head.weight" in fused.state_dict()
    assert relative_error(fused(x), small(x)) < 1e-11


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_whole(small, backend):
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend=backend)
    for size in [(160, 192), (192, 160)]:
        x = golden.image((2, 3, *size))
        assert relative_error(compiled(x), small(x)) < 1e-11


@torch.no_grad()
def test_exports_with_free_batch_and_size(small):
    # sizes that no stage maps to one, which export would make a constant
    x = golden.image((2, 3, 160, 192))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(small, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in [(2, 3, 160, 192), (3, 3, 224, 256)]:
        x = golden.image(shape)
        assert relative_error(loaded(x), small(x)) < 1e-12


@torch.no_grad()
def test_traces_and_scripts(small):
    x = golden.image((2, 3, 64, 96))
    assert torch.equal(torch.jit.trace(small, x)(x), small(x))
    assert torch.equal(torch.jit.script(small)(x), small(x))
    getter = FeatureGetterNet(deterministic(timm.create_model("shvit_s1")), out_indices=[0, 1])
    maps = torch.jit.script(getter)(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, getter(x), strict=True))


@torch.no_grad()
def test_exportable_model_holds_no_custom_op(small):
    model = deterministic(timm.create_model("shvit_s1", exportable=True))
    x = golden.image((1, 3, 64, 64))
    trace = torch.jit.trace(model, x)
    assert "backbones::" not in str(trace.inlined_graph)
    assert "backbones::" in str(torch.jit.trace(small, x).inlined_graph)
    assert relative_error(model(x), small(x)) < 1e-12


@torch.no_grad()
def test_torchvision_graph_extraction(small):
    from torchvision.models.feature_extraction import create_feature_extractor

    x = golden.image((2, 3, 64, 96))
    extractor = create_feature_extractor(small, {"stages.1": "map", "head": "logits"})
    out = extractor(x)
    assert torch.equal(out["logits"], small(x))
    assert torch.equal(out["map"], small.forward_intermediates(x)[1][1])
    assert torch.equal(torch.jit.script(extractor)(x)["logits"], small(x))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@torch.no_grad()
def test_features_only(small, feature_cls):
    x = golden.image((1, 3, 97, 65))
    expected = small.forward_intermediates(x, intermediates_only=True)
    model = timm.create_model("shvit_s1", features_only=True, feature_cls=feature_cls).double()
    weights = {k.replace(".", "_", 1): v for k, v in small.state_dict().items()}
    for key, value in model.state_dict().items():
        original = key.removeprefix("model.").removeprefix("graph_module.")
        source = small.state_dict().get(original)
        value.copy_(weights[original] if source is None else source)
    maps = model.eval()(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert model.feature_info.reduction() == [16, 32, 64]
    assert model.feature_info.channels() == [128, 224, 320]
    for value, wanted in zip(maps, expected, strict=True):
        assert torch.equal(value, wanted)


@torch.no_grad()
def test_intermediates_by_index_and_early_stop(small):
    x = golden.image((1, 3, 64, 64))
    last, maps = small.forward_intermediates(x)
    assert torch.equal(last, small.forward_features(x))
    assert len(maps) == 3
    for indices, expected in [([0, -1], [0, 2]), (2, [1, 2]), ([1], [1])]:
        taken = small.forward_intermediates(
            x, indices=indices, stop_early=True, intermediates_only=True
        )
        assert all(torch.equal(a, maps[i]) for a, i in zip(taken, expected, strict=True))
    with pytest.raises(ValueError, match="output_fmt 'NHWC'"):
        small.forward_intermediates(x, output_fmt="NHWC")


@torch.no_grad()
def test_pruning_keeps_the_chosen_maps():
    x = golden.image((1, 3, 64, 64))
    model = deterministic(timm.create_model("shvit_s1"))
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert (len(model.stages), model.num_features, model.head_hidden_size) == (2, 224, 224)
    assert model.num_classes == 0
    pruned = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))
    assert torch.equal(model(x), expected[1])

    model = deterministic(timm.create_model("shvit_s1"))
    logits = model(x)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(x), logits)


def test_classifier_is_replaced_in_place_and_type():
    model = timm.create_model("shvit_s1", num_classes=7).to(torch.bfloat16).eval()
    x = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert not any(module.training for module in model.modules())
    assert model.get_classifier().weight.dtype == torch.bfloat16
    model.reset_classifier(0)
    assert model(x).shape == (2, 320) == model.forward_head(model.forward_features(x), True).shape
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 320, 1, 1)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool='catavgmax'"):
        model.reset_classifier(3, "catavgmax")


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}])
def test_no_classifier_at_construction(kwargs):
    model = timm.create_model("shvit_s1", **kwargs).eval()
    out = model(torch.zeros(2, 3, 64, 64))
    assert out.shape == ((2, 320, 1, 1) if "global_pool" in kwargs else (2, 320))


def test_gradients_equal_timms_and_survive_checkpointing():
    theirs, ours = timms_own("shvit_s1").double(), timm.create_model("shvit_s1").double()
    weights = golden.fill_model(theirs)
    # the last map has enough values for its batch statistics to be well conditioned
    x = golden.image((4, 3, 128, 160))

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.load_state_dict(weights)
        model.train().zero_grad()
        logits = model(x)
        (logits * torch.from_numpy(golden.normal("weight", logits.shape))).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, plain = gradients(theirs), gradients(ours)
    ours.set_grad_checkpointing()
    checkpointed = gradients(ours)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (plain[name] - value).abs().max() < 1e-10 * scale, name
        assert (checkpointed[name] - plain[name]).abs().max() < 1e-12 * scale, name


def test_dropout_acts_in_training_only():
    model = timm.create_model("shvit_s1", num_classes=4, drop_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    features = model.eval().forward_features(x)
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features, True), model.forward_head(features, True))


def test_meta_device_and_type_reach_every_tensor():
    model = timm.create_model("shvit_s2", device="meta", dtype=torch.float16)
    for name, value in model.state_dict().items():
        assert value.is_meta, name
        assert value.dtype in (torch.float16, torch.int64), name


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


def test_other_input_channels():
    model = timm.create_model("shvit_s1", in_chans=5, num_classes=2).eval()
    assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("features_only", [False, True])
def test_bad_images_are_named(features_only):
    model = timm.create_model("shvit_s1", features_only=features_only).eval()
    for shape, message in [
        ((1, 1, 64, 64), r"\[1, 1, 64, 64\] do not fit.*\(B, 3, H, W\).*in_chans"),
        ((3, 64, 64), "do not fit a model for"),
        ((1, 3, 31, 64), "31x64 are too small: resize them to 32 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="embed_dims"):
        timm.create_model("shvit_s1", embed_dims=3)
    with pytest.raises(ValueError, match="in_chans=0"):
        timm.create_model("shvit_s1", in_chans=0)
    model = timm.create_model("shvit_s1", device="meta")
    model.set_input_size((48, 320))
    with pytest.raises(ValueError, match=r"img_size=16 is too small"):
        model.set_input_size(16)
