"""The layers on neighborhood attention: NeighborhoodAttention and the official MSAConv2d."""

import pytest
import torch
from torch import Tensor, nn

from backbones.layers import MSAConv2d, NeighborhoodAttention
from backbones.ops import neighborhood_attention_reference
from tests.backbones.models import deterministic, relative_error
from tests.support import golden

CASES = golden.load("op_msa_conv_layer")["cases"]
DIAGONALS = [(2, 2), (2, -2)]


def official(case: dict, **kwargs) -> MSAConv2d:
    """The layer of a recorded case, with the official state dict."""
    sizes = [case[key] for key in ("cin", "cout", "kernel", "stride", "conv_padding", "dilation")]
    layer = MSAConv2d(*sizes, **kwargs).double()
    layer.load_state_dict(golden.state_dict(case["manifest"]))
    return layer.eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_official_layer_with_gradients(case, dtype, tolerance):
    layer = official(case).to(dtype)
    x = golden.image(case["input_shape"]).to(dtype).requires_grad_()
    out = layer(x)
    golden.check_summary(out, case["out"], tolerance)
    out.backward(torch.from_numpy(golden.normal("op.dout", out.shape)).to(dtype))
    golden.check_summary(x.grad, case["grad_x"], tolerance)
    for name, parameter in layer.named_parameters():
        golden.check_summary(parameter.grad, case["grad_params"][name], tolerance)


def test_the_official_arguments_are_the_defaults():
    layer = MSAConv2d(8, 8, 5)
    assert (layer.mlp.padding, layer.mlp.stride, layer.attn_drop) == ((1, 1), (1, 1), 0.1)
    assert layer(torch.zeros(1, 8, 9, 9)).shape == (1, 8, 7, 7)
    assert list(layer.state_dict()) == list(CASES[0]["manifest"])


@torch.no_grad()
def test_dropout_drops_weights_in_training_only():
    case = next(c for c in CASES if c["dilation"] == 2)
    x, expected = golden.image(case["input_shape"]), official(case)
    wanted = expected(x)
    plain = official(case, attn_drop=0.0).train()
    assert torch.equal(plain(x), wanted)
    # too rare to happen: what is left is the path slot by slot
    rare = official(case, attn_drop=1e-12).train()
    assert relative_error(rare(x), wanted) < 1e-12
    layer = official(case, attn_drop=0.5).train()
    qkv = expected.qkv_conv(x)
    torch.manual_seed(0)
    outs = torch.stack([layer._attend(qkv) for _ in range(1000)])
    assert outs[0].ne(outs[1]).any()
    wanted = expected._attend(qkv)
    assert (outs.mean(0) - wanted).norm() < 0.05 * wanted.norm()


def test_training_with_dropout_has_gradients():
    layer, x = official(CASES[0]).train(), golden.image(CASES[0]["input_shape"])
    layer(x.requires_grad_()).sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, *layer.parameters()))


def test_training_with_dropout_keeps_no_windows():
    dim, slots, x = 64, 49, golden.image((1, 64, 20, 20)).requires_grad_()
    layer, kept = MSAConv2d(dim, dim, 7).double().train(), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    kept_numbers = sum(t.untyped_storage().nbytes() // 8 for t in kept.values())
    # few maps, the larger ones with the zeros around them, and a few weights of every slot
    assert kept_numbers < 15 * dim * 20 * 20 + 5 * slots * 20 * 20
    assert kept_numbers < dim * slots * 20 * 20 / 2


@pytest.mark.parametrize("layer", [MSAConv2d, NeighborhoodAttention])
@torch.no_grad()
def test_layers_script(layer):
    if layer is MSAConv2d:
        module, x = deterministic(MSAConv2d(6, 4)), golden.image((2, 6, 5, 7))
    else:
        module, x = deterministic(NeighborhoodAttention(6, 2)), golden.image((2, 5, 7, 6))
    assert torch.equal(torch.jit.script(module)(x), module(x))


def attend(layer: NeighborhoodAttention, x: Tensor, *args) -> Tensor:
    """The layer written out."""
    return layer.proj(neighborhood_attention_reference(layer.qkv(x), *args))


@torch.no_grad()
def test_neighborhood_attention_passes_its_arguments_on():
    x = golden.image((2, 9, 10, 12))
    layer = deterministic(NeighborhoodAttention(12, 3, (3, 5), 2, DIAGONALS))
    expected = attend(layer, x, 3, (3, 5), 2, None, "zero", DIAGONALS)
    assert relative_error(layer(x), expected) < 1e-12
    layer = deterministic(NeighborhoodAttention(12, 2, 3, (1, 3), boundary="clamp", proj=False))
    assert isinstance(layer.proj, nn.Identity)
    expected = attend(layer, x, 2, 3, (1, 3), None, "clamp")
    assert relative_error(layer(x), expected) < 1e-12


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NeighborhoodAttention(10, 3), "dim=10 must be a multiple of num_heads=3"),
        (lambda: NeighborhoodAttention(8, 2, 4), r"kernel_size \(4, 4\) must be odd, and 1 or"),
        (lambda: NeighborhoodAttention(8, 2, 3, 0), r"dilation \(0, 0\) must be positive"),
        (lambda: MSAConv2d(8, 8, 2), r"kernel_size \(2, 2\) must be odd"),
        (lambda: MSAConv2d(8, 8, attn_drop=1.5), "attn_drop=1.5 must be a probability"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_print_what_they_are():
    assert "shifts=[(2, 2), (2, -2)]" in repr(NeighborhoodAttention(8, 2, shifts=DIAGONALS))
    assert "attn_drop=0.1" in repr(MSAConv2d(8, 8))
