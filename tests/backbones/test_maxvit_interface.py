"""MaxViT as a timm model: fusing, compiling, features, pruning, classifier, first values."""

import io

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import backbones
from tests.backbones.maxvit_models import (
    DEPTHS,
    KINDS,
    STEM,
    WIDTHS,
    deterministic,
    ours,
    relative_error,
    timms,
)
from tests.support import golden

# a registered model made narrow
SMALL = {
    "embed_dim": WIDTHS,
    "depths": DEPTHS,
    "stem_width": STEM,
    "head_hidden_size": 48,
    "img_size": 64,
    "num_classes": 10,
}


def create(name: str = "maxvit_tiny_tf_224", **kwargs) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return deterministic(create())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fuse_is_exact(kind):
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 2e-5)]:
        model = deterministic(ours(kind), dtype)
        images = [golden.image((2, 3, *size)).to(dtype) for size in [(64, 128), (97, 65)]]
        expected = [model.forward_intermediates(x)[1] for x in images]
        assert model.fuse() is model
        model.fuse()
        for x, wanted in zip(images, expected, strict=True):
            for value, map_ in zip(model.forward_intermediates(x)[1], wanted, strict=True):
                assert relative_error(value, map_) < tolerance
    for name, module in model.named_modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm), name
        assert ".rel_pos.mlp" not in name
        if isinstance(module, nn.LayerNorm) and name.startswith("stages"):
            assert module.weight is None
    assert not any("gamma" in name or "bias_table" in name for name in model.state_dict())


@torch.no_grad()
def test_a_fused_model_keeps_its_windows(small):
    fused = reparameterize_model(small)
    x = golden.image((1, 3, 64, 96))
    assert relative_error(fused(x), small(x)) < 1e-11
    fused.set_input_size(64)
    with pytest.raises(ValueError, match=r"window_size=\(3, 3\) comes too late: set it before"):
        fused.set_input_size(96)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_once_for_all_sizes(backend):
    torch._dynamo.reset()
    model = deterministic(ours("tf", depths=(1, 1)))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in [(2, 160, 192), (3, 192, 160), (2, 200, 312), (3, 97, 65), (2, 99, 64)]:
        x = golden.image((shape[0], 3, *shape[1:]))
        assert relative_error(compiled(x), model(x)) < 1e-11
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 4


@torch.no_grad()
def test_exports_with_free_batch_and_size():
    model = deterministic(ours("tf", depths=(1, 1)))
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


@pytest.mark.parametrize("kind", ["tf", "rmlp", "parallel"])
@torch.no_grad()
def test_traces_and_scripts(kind):
    model = deterministic(ours(kind, depths=(1, 1)))
    x = golden.image((2, 3, 65, 97))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    scripted = torch.jit.script(model)
    for size in [(64, 96), (65, 97)]:
        x = golden.image((2, 3, *size))
        assert torch.equal(scripted(x), model(x))
    getter = FeatureGetterNet(model, out_indices=[0, 2])
    maps = torch.jit.script(getter)(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, getter(x), strict=True))


@torch.no_grad()
def test_exportable_model_holds_no_custom_op(small):
    model = deterministic(create(exportable=True))
    x = golden.image((1, 3, 64, 80))
    assert "backbones::" not in str(torch.jit.trace(model, x).inlined_graph)
    assert "backbones::" in str(torch.jit.trace(small, x).inlined_graph)
    assert relative_error(model(x), small(x)) < 1e-12


@torch.no_grad()
def test_torchvision_graph_extraction(small):
    from torchvision.models.feature_extraction import create_feature_extractor

    x = golden.image((2, 3, 64, 97))
    extractor = create_feature_extractor(small, {"stages.1": "map", "head": "logits"})
    out = extractor(x)
    assert torch.equal(out["logits"], small(x))
    assert torch.equal(out["map"], small.forward_intermediates(x)[1][2])
    assert torch.equal(torch.jit.script(extractor)(x)["logits"], small(x))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@torch.no_grad()
def test_features_only(small, feature_cls):
    x = golden.image((1, 3, 97, 65))
    expected = small.forward_intermediates(x, intermediates_only=True)
    model = create(features_only=True, feature_cls=feature_cls).double()
    weights = {k.replace(".", "_", 1): v for k, v in small.state_dict().items()}
    weights |= small.state_dict()
    for key, value in model.state_dict().items():
        value.copy_(weights[key.removeprefix("model.").removeprefix("graph_module.")])
    maps = model.eval()(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [STEM[1], *WIDTHS]
    for value, wanted in zip(maps, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("kind", ["tf", "rw"])
@torch.no_grad()
def test_intermediates_by_index_norm_and_early_stop(kind):
    model, x = deterministic(ours(kind)), golden.image((1, 3, 64, 64))
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert len(maps) == 5
    assert torch.equal(maps[0], model.stem(model.image_input(x)))
    for indices, expected in [([0, -1], [0, 4]), (2, [3, 4]), ([1], [1]), ([0], [0])]:
        for stop_early in (False, True):
            taken = model.forward_intermediates(
                x, indices=indices, stop_early=stop_early, intermediates_only=True
            )
            assert all(torch.equal(a, maps[i]) for a, i in zip(taken, expected, strict=True))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:-1], maps, strict=False))
    assert torch.equal(normed[-1], last)
    assert torch.equal(last, maps[-1]) == (kind == "tf")
    stem, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(stem, maps[0])


@pytest.mark.parametrize("kind", ["tf", "rw"])
@torch.no_grad()
def test_pruning_keeps_the_chosen_maps(kind):
    x = golden.image((1, 3, 64, 64))
    for indices, width in [([0, 2], 64), ([0], STEM[1])]:
        model = deterministic(ours(kind))
        expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert model.prune_intermediate_layers(indices) == indices
        assert len(model.stages) == indices[-1]
        assert (model.num_features, model.head_hidden_size, model.num_classes) == (width, width, 0)
        pruned = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))
        assert torch.equal(model(x), expected[-1])
        assert not list(model.head.parameters()) + list(model.norm.parameters())

    model = deterministic(ours(kind))
    logits, raw = model(x), model.forward_intermediates(x)[1][-1]
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(x), logits)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(x), raw)


@pytest.mark.parametrize("kind, hidden", [("tf", 48), ("rw", 96)])
def test_classifier_is_replaced_in_place_and_type(kind, hidden):
    model = ours(kind, num_classes=7).to(torch.bfloat16).eval()
    x = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(0)
    assert model(x).shape == (2, hidden) == (2, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, hidden, 2, 2)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    model.reset_classifier(3, reset_other=True)
    assert model(x).shape == (2, 3)
    assert model.head_hidden_size == model.num_features == 96
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="global_pool='catavgmax'"):
        model.reset_classifier(3, "catavgmax")


def test_the_hidden_layer_survives_a_new_classifier():
    model = ours("tf").requires_grad_(False)
    before = model.head.pre_logits.fc.weight.clone()
    model.reset_classifier(3, "max")
    assert torch.equal(model.head.pre_logits.fc.weight, before)
    assert not model.head.pre_logits.fc.weight.requires_grad


@pytest.mark.parametrize("kind", ["tf", "rw"])
@pytest.mark.parametrize("pool", ["avg", ""])
def test_no_classifier_at_construction(kind, pool):
    model = ours(kind, num_classes=0, global_pool=pool).eval()
    out = model(torch.zeros(2, 3, 64, 64))
    assert out.shape == (2, model.head_hidden_size, *((2, 2) if pool == "" else ()))


def test_dropout_acts_in_training_only():
    model = ours("rw", drop_rate=0.5)
    features = model.eval().forward_features(torch.randn(4, 3, 64, 64))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features, True), model.forward_head(features, True))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_and_type_reach_every_tensor(kind):
    model = ours(kind, device="meta", dtype=torch.float16)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.is_meta, name
        assert value.dtype in (torch.float16, torch.int64), name
    model.set_input_size(128)
    assert all(value.is_meta for value in model.parameters())


def test_first_values():
    torch.manual_seed(0)
    model = timm.create_model("maxvit_rmlp_small_rw_224", depths=(1, 1, 1, 1))
    block = model.stages[3].blocks[0]
    for conv in (block.conv.conv1_1x1, block.conv.conv2_kxk, block.conv.se.fc2):
        kernel = conv.kernel_size[0] ** 2
        deviation = (2 / (kernel * conv.out_channels / conv.groups)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not block.conv.se.fc2.bias.any()
    attention, mlp = block.attn_block.attn, block.attn_block.mlp
    for linear in (attention.qkv, mlp.fc1):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.99 * bound < linear.weight.max() <= bound
    assert not attention.qkv.bias.any()
    for linear in (mlp.fc1, attention.rel_pos.mlp.fc1):
        assert linear.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert (block.attn_grid.ls2.gamma == 1e-6).all()
    for kind in ("tf", "rw"):
        table = ours(kind, img_size=512).stages[3].blocks[0].attn_grid.attn.rel_pos
        assert table.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)


def test_buffers_can_be_computed_again():
    model = deterministic(ours("rmlp", depths=(1, 1, 1, 1)))
    x = golden.image((1, 3, 64, 64))
    expected = model(x)
    for name, buffer in model.named_buffers():
        if name.endswith("log_offsets"):
            buffer.zero_()
    assert not torch.equal(model(x), expected)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert torch.equal(model(x), expected)


def test_layers_for_layer_decay_and_weight_decay():
    model = ours("rw")
    expected = timms("rw")
    groups, wanted = (timm.models.group_parameters(m, m.group_matcher()) for m in (model, expected))
    assert groups == wanted
    assert model.no_weight_decay() == expected.no_weight_decay()
    tables = {name for name, _ in model.named_parameters() if "bias_table" in name}
    assert model.no_weight_decay() == tables
    assert len(tables) == 2 * sum(DEPTHS)
    assert all(".rel_pos.mlp." in name for name in ours("rmlp").no_weight_decay())


def test_bad_images_and_arguments_are_named():
    model = create(features_only=True)
    with pytest.raises(ValueError, match="31x64 are too small"):
        model(torch.zeros(1, 3, 31, 64))
    with pytest.raises(TypeError, match="window_size"):
        backbones.MaxViT(window_size=3)
    with pytest.raises(ValueError, match="style='swin' is unknown: use 'tf'"):
        backbones.MaxViT(style="swin")
    with pytest.raises(ValueError, match=r"windows of \(0, 2\).*img_size=\(31, 64\)"):
        ours("tf", img_size=(31, 64))
    with pytest.raises(ValueError, match=r"windows of \(2, 2\) and grids of \(3, 3\) differ"):
        ours("parallel", transformer_grid_size=3)
    with pytest.raises(ValueError, match=r"init_values=1e-06: parallel blocks"):
        ours("parallel", init_values=1e-6)
    model = ours("tf", device="meta")
    with pytest.raises(ValueError, match=r"img_size=\(16, 16\) is too small"):
        model.set_input_size(16)
    with pytest.raises(ValueError, match=r"windows of \(1, 1\) and grids of \(0, 0\)"):
        model.set_input_size(window_size=1, partition_ratio=80)
    assert (model.img_size, model.partition_ratio) == ((64, 64), 32)
