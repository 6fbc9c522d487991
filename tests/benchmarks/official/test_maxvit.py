"""Timm's MaxViT beside ours: the same tensors, outputs and gradients."""

import pytest
import timm.models.maxxvit
import torch

from benchmarks.official import family, kind, pair
from benchmarks.official.maxvit import build
from tests.backbones.models import relative_error
from tests.support import golden

NAMES = ["maxvit_tiny_tf_224", "maxvit_tiny_rw_224", "maxvit_rmlp_pico_rw_256"]
NARROW = {
    "embed_dim": (32, 64, 64, 96),
    "depths": (1, 2, 1, 1),
    "stem_width": (16, 24),
    "img_size": 64,
    "num_classes": 10,
}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_equal(name):
    models = pair(name, **NARROW)
    assert type(models[1]) is timm.models.maxxvit.MaxxVit
    weights = golden.fill_model(models[0])
    values = []
    for model in models:
        model.double().load_state_dict(weights)
        images = [golden.image((2, 3, *size)).requires_grad_() for size in [(64, 64), (64, 128)]]
        logits = [model(x) for x in images]
        grads = torch.autograd.grad(sum((y * y).sum() for y in logits), images)
        values.append([*logits, *grads])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-8


def test_a_whole_model_gets_the_same_weights():
    ours, theirs = pair("maxvit_rmlp_pico_rw_256")
    assert (family(ours), kind(ours), theirs.training) == ("maxvit", "timm", False)
    weights = theirs.state_dict()
    assert list(weights) == list(ours.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())


def test_tags_and_the_meta_device():
    _, theirs = pair("maxvit_tiny_tf_224.in1k", device="meta")
    assert theirs(torch.empty(1, 3, 448, 224, device="meta")).shape == (1, 1000)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="timm has no 'maxvit_huge'"):
        build(torch.nn.Identity(), "maxvit_huge")
