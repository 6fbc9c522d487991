"""timm's SHViT as a peer of ours: the same tensors, outputs and gradients."""

import pytest
import torch
from timm.models.shvit import SHViT

from benchmarks.official import family, kind, pair
from tests.backbones.models import relative_error
from tests.support import golden


@pytest.mark.parametrize("name, size", [("shvit_s1", (97, 65)), ("shvit_s4", (64, 128))])
def test_outputs_and_gradients_are_equal(name, size):
    models = pair(name)
    assert (family(models[0]), kind(models[0])) == ("shvit", "timm")
    assert type(models[1]) is SHViT and not models[1].training
    weights, values = golden.fill_model(models[0]), []
    for model in models:
        model.double().load_state_dict(weights)
        x = golden.image((2, 3, *size)).requires_grad_()
        logits = model(x)
        values.append([logits, *torch.autograd.grad((logits * logits).sum(), x)])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-10


def test_a_whole_model_has_the_same_tensors_on_the_meta_device():
    ours, theirs = pair("shvit_s4", device="meta")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert theirs(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1000)
