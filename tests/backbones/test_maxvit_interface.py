"""What is MaxViT's own of timm's interface: kinds of blocks, windows, tables, first values."""

import pytest
import timm
import torch
from torch import nn

import backbones
from tests.backbones.maxvit_models import DEPTHS, KINDS, ours, timms
from tests.backbones.models import deterministic, relative_error
from tests.support import golden


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


def test_a_fused_model_keeps_its_windows():
    fused = ours("tf").fuse()
    fused.set_input_size(64)
    with pytest.raises(ValueError, match=r"window_size=\(3, 3\) comes too late: set it before"):
        fused.set_input_size(96)


@pytest.mark.parametrize("kind", ["tf", "rw"])
def test_norm_and_hidden_layer_of_the_classifier_can_go(kind):
    model = ours(kind).to(torch.bfloat16).eval()
    model.reset_classifier(3, reset_other=True)
    assert model(torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)).shape == (2, 3)
    assert not hasattr(model.head, "pre_logits")
    assert model.head_hidden_size == model.num_features == 96
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def test_the_hidden_layer_survives_a_new_classifier():
    model = ours("tf").requires_grad_(False)
    before = model.head.pre_logits.fc.weight.clone()
    model.reset_classifier(3, "max")
    assert torch.equal(model.head.pre_logits.fc.weight, before)
    assert not model.head.pre_logits.fc.weight.requires_grad


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


def test_bad_arguments_are_named():
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
