"""Layers that need no model: strided convolution and pooling, folding, position tables."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame, resize_rel_pos_bias_table
from torch import nn

from backbones.layers import RelativePositionBias, RelativePositionBiasTf, RelativePositionMlp
from backbones.layers.fold import batch_norm_affine, fold_input, fold_layer_norm, fold_output
from backbones.layers.resize_table import resize_table
from backbones.layers.strided import AvgPool2dCeil, PatchConv2d, StridedConv2d, conv2d_same

SIZES = [(8, 8), (7, 8), (8, 7), (7, 7), (1, 2), (2, 1), (1, 1), (12, 5)]


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("compiled", [False, True])
def test_strided_convolution_pads_as_tensorflow(groups, compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    layer = StridedConv2d(6, 12, groups=groups, bias=groups == 1).double()
    expected = Conv2dSame(6, 12, 3, 2, groups=groups, bias=groups == 1).double()
    expected.load_state_dict(layer.state_dict())
    for size in SIZES:
        x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
        y, wanted = layer(x), expected(x)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_pooling_averages_what_is_there(compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    pool = AvgPool2dCeil()
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        y = pool(x)
        assert y.shape == (2, 3, (height + 1) // 2, (width + 1) // 2)
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
                torch.testing.assert_close(y[:, :, i, j], window, rtol=1e-14, atol=1e-14)
        grad = torch.autograd.grad(y.sum(), x)[0]
        assert grad.sum().item() == pytest.approx(y.numel())
    # where timm counts the zeros it pads with
    ones = torch.ones(1, 1, 3, 3)
    assert AvgPool2dSame(2, 2)(ones).flatten().tolist() == [1.0, 0.5, 0.5, 0.25]
    assert pool(ones).flatten().tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("compiled, tracing", [(False, False), (True, False), (False, True)])
def test_patches_of_odd_maps_end_with_zeros(compiled, tracing, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: tracing)
    layer = PatchConv2d(3, 5).double()
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 5, (height + 1) // 2, (width + 1) // 2)
        padded = torch.zeros(2, 3, height + height % 2, width + width % 2, dtype=torch.float64)
        padded[:, :, :height, :width] = x
        patches = padded.unfold(2, 2, 2).unfold(3, 2, 2)
        expected = torch.einsum("bchwij,ocij->bohw", patches, layer.weight)
        expected = expected + layer.bias[:, None, None]
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_nothing_is_padded_where_a_convolution_can(monkeypatch):
    def pad(*args: object) -> torch.Tensor:
        raise AssertionError("a copy")

    monkeypatch.setattr(F, "pad", pad)
    weight = torch.randn(6, 1, 3, 3)
    assert conv2d_same(torch.randn(1, 6, 8, 8), weight, None, 6).shape == (1, 6, 4, 4)
    assert AvgPool2dCeil()(torch.randn(1, 6, 9, 8)).shape == (1, 6, 5, 4)
    assert PatchConv2d(6, 6)(torch.randn(1, 6, 8, 8)).shape == (1, 6, 4, 4)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_folding(bias):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    norm = nn.BatchNorm2d(4).double().eval()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    before = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias).double()
    after = nn.Conv2d(4, 7, 1, bias=bias).double()
    expected, affine = after(norm(before(x))), batch_norm_affine(norm)
    assert fold_input(after, *affine) is after
    torch.testing.assert_close(after(before(x)), expected, rtol=1e-12, atol=1e-12)

    expected = norm(before(x))
    fold_output(before, *affine)
    torch.testing.assert_close(before(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_layer_norm_folds_into_all_layers_behind_it():
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = nn.LayerNorm(8, eps=0.1).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    layers = [nn.Linear(8, width).double() for width in (3, 5)]
    expected = [layer(norm(x)) for layer in layers]
    bare = fold_layer_norm(norm, *layers)
    assert not list(bare.parameters())
    for layer, value in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(bare(x)), value, rtol=1e-12, atol=1e-12)
    assert fold_layer_norm(bare, *layers) is bare
    with torch.enable_grad():
        torch.testing.assert_close(bare(x), F.layer_norm(x, (8,), eps=0.1), rtol=1e-12, atol=1e-12)
    for graph in (torch.jit.script(bare), torch.fx.symbolic_trace(bare), torch.jit.trace(bare, x)):
        torch.testing.assert_close(graph(x), bare(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [(2, 3), (1, 1), (4, 2)])
@torch.no_grad()
def test_tables_hold_the_bias_of_query_minus_key(window):
    (p, q), heads = window, 2
    flat = RelativePositionBias(window, heads)
    tf, mlp = RelativePositionBiasTf(window, heads), RelativePositionMlp(window, heads).eval()
    tables = flat.get_table(), tf.get_table(), mlp.get_table()
    assert {tuple(table.shape) for table in tables} == {(heads, 2 * p - 1, 2 * q - 1)}
    for i, j in [(y, x) for y in range(1 - p, p) for x in range(1 - q, q)]:
        row, col = i + p - 1, j + q - 1
        wanted = flat.relative_position_bias_table[row * (2 * q - 1) + col]
        assert torch.equal(tables[0][:, row, col], wanted)
        wanted = tf.relative_position_bias_table[:, -i + p - 1, -j + q - 1]
        assert torch.equal(tables[1][:, row, col], wanted)
        offset = torch.tensor([float(i), float(j)])
        wanted = mlp.mlp(offset.sign() * torch.log(1 + offset.abs()))
        torch.testing.assert_close(tables[2][:, row, col], wanted)
    for module, table in zip((flat, tf, mlp), tables, strict=True):
        finished = module.fuse()
        assert torch.equal(finished.get_table(), table)
        assert not list(finished.parameters())
        finished.set_window_size(window)
        with pytest.raises(ValueError, match="comes too late"):
            finished.set_window_size((9, 9))


@pytest.mark.skipif(
    "old_window_size" not in inspect.signature(resize_rel_pos_bias_table).parameters,
    reason="timm < 1.0.31 resizes these tables wrongly",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("old", [(1, 1), (1, 5), (13, 13), (23, 15)])
@pytest.mark.parametrize("new", [(1, 1), (3, 1), (13, 13), (7, 31), (31, 31), (49, 75)])
def test_tables_are_resized_as_timm_does(old, new):
    table = torch.randn(3, *old)
    windows = ((new[0] + 1) // 2, (new[1] + 1) // 2)
    assert torch.equal(
        resize_table(table, *new), resize_rel_pos_bias_table(table, windows, (3, *new))
    )


def test_resizing_keeps_centre_symmetry_and_type():
    table = torch.randn(2, 13, 13, dtype=torch.bfloat16)
    table = table + table.flip(1, 2)
    resized = resize_table(table, 23, 31)
    assert (resized.dtype, resized.shape) == (torch.bfloat16, (2, 23, 31))
    assert torch.equal(resized[:, 11, 15], table[:, 6, 6])
    torch.testing.assert_close(resized, resized.flip(1, 2), rtol=2e-2, atol=1e-3)
    assert resize_table(table, 13, 13) is table
    assert resize_table(table.to("meta"), 5, 7).shape == (2, 5, 7)
    constant = resize_table(torch.full((1, 5, 9), 3.0), 31, 31)
    torch.testing.assert_close(constant, torch.full((1, 31, 31), 3.0))
