from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from backbones.training.augment import View, eval_transform
from backbones.training.config import parse
from backbones.training.errors import InterruptedRunError
from backbones.training.evaluate import Evaluator
from backbones.training.runtime import World
from backbones.training.train_config import TrainConfig

VIEW = View(8, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


class _Noise:
    classes = tuple("abcdefg")

    def __len__(self):
        return 53

    def load(self, index):
        if index in (11, 52):
            raise OSError("unreadable")
        pixels = np.random.RandomState(index).randint(0, 256, (8, 8, 3))
        return Image.fromarray(pixels.astype(np.uint8)), index % 7

    def name(self, index):
        return f"noise {index}"


def _evaluator(batch_size, **options):
    config = parse(TrainConfig, [f"batch_size={batch_size}"], program="train.py").config
    world = World(torch.device("cpu"))
    return Evaluator(_Noise(), VIEW, config.data, config.runtime, world, **options)


def _model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("batch_size", [1, 8, 53, 100])
def test_the_score_equals_brute_force(batch_size):
    model, source, transform = _model(), _Noise(), eval_transform(VIEW)
    evaluator = _evaluator(batch_size)
    score = evaluator.score(model)
    top1 = top5 = 0
    loss = 0.0
    model.eval()
    for index in set(range(53)) - {11, 52}:
        image, label = source.load(index)
        with torch.no_grad():
            logits = model(transform(image)[None])[0]
        ranked = logits.argsort(descending=True).tolist()
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        loss += float(F.cross_entropy(logits, torch.tensor(label)))
    assert (score.top1, score.top5, score.images) == (top1, top5, 51)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.top1_percent == pytest.approx(100 * top1 / 51)
    assert evaluator.bad.indices == {11, 52}


def test_the_model_keeps_its_mode_and_its_statistics():
    model = _model().train()
    before = model[1].running_mean.clone()
    _evaluator(8).score(model)
    assert model.training and torch.equal(model[1].running_mean, before)


def test_an_evaluation_can_be_stopped():
    with pytest.raises(InterruptedRunError):
        _evaluator(8).score(_model(), stop=lambda: True)


def test_the_answers_name_each_readable_image_once():
    model, source = _model(), _Noise()
    evaluator = _evaluator(8)
    score = evaluator.score(model)
    answers = evaluator.answers()
    assert answers.shape == (51, 7)
    assert sorted(answers[:, 0].tolist()) == sorted(set(range(53)) - {11, 52})
    assert all(source.load(image)[1] == label for image, label in answers[:, :2].tolist())
    assert int((answers[:, 1] == answers[:, 2]).sum()) == score.top1
    evaluator.score(model)
    assert torch.equal(evaluator.answers(), answers)


def test_a_flip_averages_the_logits_of_both_sides():
    model = _model().eval()

    class Both(nn.Module):
        def forward(self, x):
            return (model(x) + model(x.flip(-1))) / 2

    flipped, both = _evaluator(8, flip=True).score(model), _evaluator(8).score(Both())
    assert (flipped.top1, flipped.top5) == (both.top1, both.top5)
    assert flipped.loss == pytest.approx(both.loss, rel=1e-6)
    assert flipped.loss != pytest.approx(_evaluator(8).score(model).loss, rel=1e-3)


def test_what_fails_is_raised_with_its_own_type():
    class Broken(nn.Module):
        def forward(self, x):
            raise MemoryError("of this model")

    with pytest.raises(MemoryError, match="of this model"):
        _evaluator(8).score(Broken())
