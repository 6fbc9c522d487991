"""What is the same for all families: timm's interface, compiling, exporting, scripting."""

import io
import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import backbones
from tests.backbones.models import (
    FAMILIES,
    VARIANTS,
    Small,
    deterministic,
    gradients,
    relative_error,
    worst_gradient,
)
from tests.support import golden


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Small:
    return request.param


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> Small:
    return request.param


@pytest.fixture(scope="module")
def small(family) -> nn.Module:
    """The family's model with deterministic weights; tests must not change it."""
    return deterministic(family.create())


@pytest.fixture(scope="module")
def model(variant) -> nn.Module:
    """The variant with deterministic weights; tests must not change it."""
    return deterministic(variant.create())


def test_every_family_is_here():
    names = [name for family in FAMILIES for name in backbones.list_models(family)]
    assert sorted(names) == backbones.list_models()


@torch.no_grad()
def test_any_size_gives_maps_of_sizes_rounded_up(variant, model):
    for height, width in [(32, 32), (33, 47), (64, 35), (97, 65)]:
        maps = model.forward_intermediates(
            golden.image((1, 3, height, width)), intermediates_only=True
        )
        assert [tuple(m.shape[1:]) for m in maps] == variant.maps(height, width)
        assert all(m.isfinite().all() for m in maps)


@torch.no_grad()
def test_fuse_is_exact(family):
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 2e-5)]:
        model = deterministic(family.create(), dtype)
        images = [golden.image((2, 3, *size)).to(dtype) for size in [(64, 128), (97, 65)]]
        expected = [(model(x), *model.forward_intermediates(x)[1]) for x in images]
        assert model.fuse() is model
        model.fuse()
        for x, wanted in zip(images, expected, strict=True):
            outputs = (model(x), *model.forward_intermediates(x)[1])
            assert all(
                relative_error(*pair) < tolerance for pair in zip(outputs, wanted, strict=True)
            )
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@torch.no_grad()
def test_timms_reparameterization_is_fuse(small):
    x = golden.image((1, 3, 64, 96))
    fused = reparameterize_model(small)
    assert set(fused.state_dict()) == set(reparameterize_model(fused).state_dict())
    assert set(fused.state_dict()) != set(small.state_dict())
    assert relative_error(fused(x), small(x)) < 1e-11


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_once_for_all_sizes(family, backend):
    torch._dynamo.reset()
    model = deterministic(family.create_short())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in [(2, 160, 192), (3, 192, 160), (2, 200, 312), (3, 97, 65), (2, 99, 64)]:
        x = golden.image((shape[0], 3, *shape[1:]))
        assert relative_error(compiled(x), model(x)) < 1e-11
        counts.append(counter.frame_count)
    assert len(set(counts)) == family.graphs


@torch.no_grad()
def test_exports_with_free_batch_and_size(family):
    model = deterministic(family.create_short())
    # sizes that no stage maps to one, which export would make a constant
    x = golden.image((2, 3, 96, 160))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in [(2, 3, 96, 160), (3, 3, 101, 133)]:
        x = golden.image(shape)
        assert relative_error(loaded(x), model(x)) < 1e-12


@torch.no_grad()
def test_traces_and_scripts(variant):
    model = deterministic(variant.create_short())
    x = golden.image((2, 3, 65, 97))
    scripted = torch.jit.script(model)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    for size in [(64, 96), (65, 97)]:
        x = golden.image((2, 3, *size))
        assert torch.equal(scripted(x), model(x))
    getter = FeatureGetterNet(model, out_indices=[0, 1])
    maps = torch.jit.script(getter)(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, getter(x), strict=True))


@torch.no_grad()
def test_exportable_model_holds_no_custom_op(family):
    model, expected = (
        deterministic(family.create_short(exportable=flag)) for flag in (True, False)
    )
    x = golden.image((1, 3, 64, 80))
    assert "backbones::" not in str(torch.jit.trace(model, x).inlined_graph)
    assert "backbones::" in str(torch.jit.trace(expected, x).inlined_graph)
    assert relative_error(model(x), expected(x)) < 1e-12


@torch.no_grad()
def test_torchvision_graph_extraction(small):
    from torchvision.models.feature_extraction import create_feature_extractor

    x = golden.image((2, 3, 64, 97))
    extractor = create_feature_extractor(small, {"stages.1": "map", "head": "logits"})
    out = extractor(x)
    assert torch.equal(out["logits"], small(x))
    maps = small.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(out["map"], maps[small.num_stem_features + 1])
    assert torch.equal(torch.jit.script(extractor)(x)["logits"], small(x))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@torch.no_grad()
def test_features_only(family, small, feature_cls):
    x = golden.image((1, 3, 97, 65))
    expected = small.forward_intermediates(x, intermediates_only=True)
    if feature_cls in ("list", "dict") and not family.sequential:
        with pytest.raises(AssertionError, match="are not present in model"):
            family.create(features_only=True, feature_cls=feature_cls)
        return
    features = family.create(features_only=True, feature_cls=feature_cls).double()
    weights = {k.replace(".", "_", 1): v for k, v in small.state_dict().items()}
    weights |= small.state_dict()
    for key, value in features.state_dict().items():
        name = key.removeprefix("model.").removeprefix("body.").removeprefix("graph_module.")
        # older versions of torch.fx make every buffer persistent
        if not name.endswith(".theta"):
            value.copy_(weights[name])
    maps = features.eval()(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert features.feature_info.reduction() == list(family.strides)
    assert features.feature_info.channels() == list(family.widths)
    for value, wanted in zip(maps, expected, strict=True):
        assert torch.equal(value, wanted)


@torch.no_grad()
def test_intermediates_by_index_norm_and_early_stop(model):
    x = golden.image((1, 3, 64, 64))
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(model.forward_head(last), model(x))
    if model.num_stem_features:
        assert torch.equal(maps[0], model.forward_stem(model.image_input(x)))
    end = len(maps) - 1
    for indices, expected in [([0, -1], [0, end]), (2, [end - 1, end]), ([1], [1]), ([0], [0])]:
        for stop_early in (False, True):
            taken = model.forward_intermediates(
                x, indices=indices, stop_early=stop_early, intermediates_only=True
            )
            assert all(torch.equal(a, maps[i]) for a, i in zip(taken, expected, strict=True))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:-1], maps[:-1], strict=True))
    assert torch.equal(normed[-1], last)
    assert torch.equal(last, maps[-1]) == isinstance(model.norm, nn.Identity)
    first, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(first, maps[0])
    with pytest.raises(ValueError, match="output_fmt 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@torch.no_grad()
def test_pruning_keeps_the_chosen_maps(variant):
    x = golden.image((1, 3, 64, 64))
    for indices in [0, len(variant.widths) - 2], [0]:
        model = deterministic(variant.create())
        expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert model.prune_intermediate_layers(indices) == indices
        assert len(model.stages) == indices[-1] + 1 - model.num_stem_features
        width = variant.widths[indices[-1]]
        assert (model.num_features, model.head_hidden_size, model.num_classes) == (width, width, 0)
        pruned = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))
        assert torch.equal(model(x), expected[-1])
        assert not list(model.head.parameters()) + list(model.norm.parameters())

    model = deterministic(variant.create())
    logits, raw = model(x), model.forward_intermediates(x)[1][-1]
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(x), logits)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(x), raw)


def test_classifier_is_replaced_in_place_and_type(variant):
    model = variant.create(num_classes=7).to(torch.bfloat16).eval()
    x = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)
    hidden, (_, *size) = model.head_hidden_size, variant.maps(64, 64)[-1]
    assert hidden == variant.args.get("head_hidden_size", variant.widths[-1])
    assert model.get_classifier().out_features == 7
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(0)
    assert model(x).shape == (2, hidden) == (2, model.head_hidden_size)
    assert model.forward_head(model.forward_features(x), True).shape == (2, hidden)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, hidden, *size)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="global_pool='catavgmax'"):
        model.reset_classifier(3, "catavgmax")
    with pytest.raises(ValueError, match="global_pool='catavgmax'"):
        variant.create(global_pool="catavgmax")


@pytest.mark.parametrize("pool", ["avg", ""])
def test_no_classifier_at_construction(variant, pool):
    model = variant.create(num_classes=0, global_pool=pool).eval()
    out = model(torch.zeros(2, 3, 64, 64))
    size = variant.maps(64, 64)[-1][1:] if pool == "" else ()
    assert out.shape == (2, model.head_hidden_size, *size)


def test_gradients_survive_checkpointing(family):
    model, x = deterministic(family.create()), golden.image((2, 3, 97, 160))
    plain = gradients(model, x)
    model.set_grad_checkpointing()
    assert worst_gradient(gradients(model, x), plain)[0] < 1e-12
    model.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in model.stages)


def test_dropout_acts_in_training_only(variant):
    model = variant.create(drop_rate=0.5)
    features = model.eval().forward_features(torch.randn(4, 3, 64, 64))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features, True), model.forward_head(features, True))


def test_meta_device_and_type_reach_every_tensor(variant):
    model = variant.create(device="meta", dtype=torch.float16)
    for name, value in model.state_dict().items():
        assert value.is_meta, name
        assert value.dtype in (torch.float16, torch.int64), name
    assert all(buffer.is_meta for buffer in model.buffers())


def test_parameters_fall_into_layers(variant):
    model = variant.create(device="meta")
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        names = {name for members in groups.values() for name in members}
        assert names == {name for name, _ in model.named_parameters()}
        assert len(groups) > 1


def test_saved_model_comes_back_from_a_folder(family, tmp_path):
    model = family.create(num_classes=3).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == family.name
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert "state_dict" not in again.pretrained_cfg
    assert again.pretrained_cfg["source"] == "local-dir"


def test_other_input_channels(variant):
    model = variant.create(in_chans=5, num_classes=2).eval()
    assert model(torch.zeros(1, 5, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("features_only", [False, True])
def test_bad_images_are_named(family, features_only):
    model = family.create(features_only=features_only).eval()
    for shape, message in [
        ((1, 1, 64, 64), r"\[1, 1, 64, 64\] do not fit.*\(B, 3, H, W\).*in_chans"),
        ((3, 64, 64), "do not fit a model for"),
        ((1, 3, 31, 64), "31x64 are too small: resize them to 32 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))


def test_bad_arguments_are_named(family):
    with pytest.raises(TypeError, match="no_such_argument"):
        family.create(no_such_argument=3)
    with pytest.raises(ValueError, match="in_chans=0"):
        family.create(in_chans=0)
    with pytest.raises(ValueError, match="num_classes=-1"):
        family.create(num_classes=-1)
    model = family.create(device="meta")
    model.set_input_size((64, 320))
    with pytest.raises(ValueError, match=r"img_size=\(?16.* is too small"):
        model.set_input_size(16)
