"""The official BiFormer beside ours: the same tensors, outputs and gradients."""

import pytest
import torch

from benchmarks.official import family, kind, pair
from tests.backbones.models import gradients, relative_error, worst_gradient
from tests.support import golden

SHORT = {"depths": (1, 1, 1, 1), "num_classes": 10}
# regions fill the first map of each; the later form needs 7 tokens per side in the third stage
CASES = {
    "biformer_tiny": [(112, 112), (61, 90)],
    "biformer_stl": [(112, 224)],
    "biformer_stl_nchw": [(112, 112), (131, 115)],
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_equal(name):
    models = pair(name, **SHORT)
    assert (family(models[0]), kind(models[0])) == ("biformer", "official")
    assert not models[1].training
    weights, values = golden.fill_model(models[0]), []
    for model in models:
        model.double().load_state_dict(weights)
        # a residual stream that does not drown the attention
        for block in (block for stage in model.stages for block in stage.blocks):
            if block.cpe is not None:
                block.cpe.get_parameter("proj.weight").data.mul_(0.1)
        images = [golden.image((2, 3, *size)).requires_grad_() for size in CASES[name]]
        logits = [model(x) for x in images]
        grads = torch.autograd.grad(sum((y * y).sum() for y in logits), images)
        values.append([*logits, *grads])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-10


def test_training_is_equal():
    models = pair("biformer_tiny", **SHORT)
    weights, x = golden.fill_model(models[0]), golden.image((2, 3, 61, 90))
    for model in models:
        model.double().load_state_dict(weights)
    expected, found = (gradients(model, x) for model in models)
    assert set(found) == set(expected)
    assert worst_gradient(found, expected)[0] < 1e-8


@pytest.mark.parametrize("name", ["biformer_base", "biformer_stl", "biformer_stl_nchw"])
def test_whole_models_on_the_meta_device(name):
    _, theirs = pair(name, device="meta")
    assert theirs(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
