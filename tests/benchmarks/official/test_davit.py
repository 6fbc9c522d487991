"""timm's DaViT as a peer of ours: the same tensors, outputs and gradients."""

import pytest
import torch
from timm.models.davit import DaVit

from benchmarks.official import family, kind, pair
from tests.backbones.models import relative_error
from tests.support import golden

SHORT = {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 96), "num_heads": (1, 2, 2, 3)}


@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
def test_outputs_and_gradients_are_equal(name):
    models = pair(name, **SHORT)
    assert (family(models[0]), kind(models[0])) == ("davit", "timm")
    assert type(models[1]) is DaVit and not models[1].training
    weights, values = golden.fill_model(models[0]), []
    for model in models:
        model.double().load_state_dict(weights)
        images = [golden.image((2, 3, *size)).requires_grad_() for size in [(64, 96), (97, 65)]]
        logits = [model(x) for x in images]
        grads = torch.autograd.grad(sum((y * y).sum() for y in logits), images)
        values.append([*logits, *grads])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-10


def test_a_whole_model_has_the_same_tensors_on_the_meta_device():
    ours, theirs = pair("davit_tiny", device="meta")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert theirs(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
