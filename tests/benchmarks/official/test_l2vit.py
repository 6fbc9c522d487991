"""The official L2ViT beside ours: the same tensors, outputs, gradients and statistics."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.official import family, kind, pair
from tests.backbones.models import FAMILIES, gradients, relative_error, worst_gradient
from tests.support import golden

SMALL = FAMILIES["l2vit"]
# neither a multiple of 4, nor halved evenly, nor filled by windows; then filled by windows of 7
SIZES = [(61, 90), (56, 56)]


def models(**options) -> tuple[nn.Module, nn.Module]:
    """A small pair with lively weights in float64."""
    found = pair(SMALL.name, **{"num_classes": 10, **SMALL.args, **options})
    weights = golden.fill_model(found[0])
    for model in found:
        model.double().load_state_dict(weights)
    return found


def outputs(model: nn.Module) -> list[Tensor]:
    """Logits of images, and gradients of the images."""
    images = [golden.image((2, 3, *size)).requires_grad_() for size in SIZES]
    logits = [model(x) for x in images]
    return [*logits, *torch.autograd.grad(sum((y * y).sum() for y in logits), images)]


@pytest.mark.parametrize("options", [{}, {"window_size": 3, "num_classes": 5}])
def test_outputs_and_gradients_are_equal(options):
    ours, theirs = models(**options)
    assert (family(ours), kind(ours), theirs.training) == ("l2vit", "official", False)
    for value, expected in zip(outputs(theirs), outputs(ours), strict=True):
        assert relative_error(value, expected) < 1e-10


def test_training_is_equal():
    ours, theirs = models()
    x = golden.image((2, 3, 61, 90))
    found, expected = gradients(theirs, x), gradients(ours, x)
    assert set(found) == set(expected)
    assert worst_gradient({name: found[name] for name in expected}, expected)[0] < 1e-10
    buffers = dict(theirs.named_buffers())
    for name, value in ours.named_buffers():
        assert relative_error(buffers[name].double(), value.double()) < 1e-10


def test_whole_models_on_the_meta_device():
    for name in ["l2vit_tiny", "l2vit_base_384"]:
        _, theirs = pair(name, device="meta")
        assert theirs(torch.empty(1, 3, 96, 130, device="meta")).shape == (1, 1000)
