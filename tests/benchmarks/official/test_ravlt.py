"""The official RAVLT beside ours: the same tensors, outputs and gradients."""

import pytest
import torch

from benchmarks.official import family, kind, pair
from tests.backbones.models import gradients, relative_error, worst_gradient
from tests.support import golden

SHORT = {"depths": (1, 2, 2, 1), "num_classes": 10}


def test_outputs_and_gradients_are_equal():
    models = pair("ravlt_t", **SHORT)
    assert (family(models[0]), kind(models[0]), models[1].training) == ("ravlt", "official", False)
    weights, values = golden.fill_model(models[0]), []
    for model in models:
        model.double().load_state_dict(weights)
        images = [golden.image((2, 3, *size)).requires_grad_() for size in [(64, 96), (61, 90)]]
        logits = [model(x) for x in images]
        grads = torch.autograd.grad(sum((y * y).sum() for y in logits), images)
        values.append([*logits, *grads])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-10


def test_training_is_equal():
    models = pair("ravlt_t", **SHORT)
    weights, x = golden.fill_model(models[0]), golden.image((2, 3, 61, 90))
    for model in models:
        model.double().load_state_dict(weights)
    expected, found = (gradients(model, x) for model in models)
    assert set(found) == set(expected)
    assert worst_gradient(found, expected)[0] < 1e-8


@pytest.mark.parametrize("name", ["ravlt_s", "ravlt_l"])
def test_whole_models_on_the_meta_device(name):
    _, theirs = pair(name, device="meta")
    assert theirs(torch.empty(1, 3, 96, 130, device="meta")).shape == (1, 1000)
