"""fastai: a learner by name."""

import pytest
import torch

import backbones  # noqa: F401

vision = pytest.importorskip(
    "fastai.vision.all", reason="pip install fastai, which is too large for the extra clients"
)


@pytest.mark.parametrize("name", ["shvit_s1", "overlock_xt"])
def test_learner_trains(name):
    images = torch.rand(8, 3, 64, 64)
    labels = torch.arange(8) % 2
    pairs = list(zip(images, labels, strict=True))
    loaders = vision.DataLoaders.from_dsets(pairs, pairs, bs=4)
    loaders.c = 2
    loss = vision.CrossEntropyLossFlat()
    learner = vision.vision_learner(
        loaders, name, pretrained=False, normalize=False, n_out=2, loss_func=loss
    )
    before = [parameter.clone() for parameter in learner.model.parameters()]
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    after = list(learner.model.parameters())
    assert all(value.isfinite().all() for value in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
