from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backbones
from backbones.training.config import parse
from backbones.training.schedule import learning_rate
from backbones.training.train_config import TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
WEIGHT_DECAY = {"shvit_s1": 0.025, "shvit_s2": 0.032, "shvit_s3": 0.035, "shvit_s4": 0.03}


def _config(path):
    return parse(TrainConfig, [str(path)], program="train.py").config


def test_there_is_a_recipe_for_every_size():
    assert {path.stem for path in RECIPES} >= set(WEIGHT_DECAY)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_model_of_a_recipe_takes_its_input(path):
    config = _config(path)
    with torch.device("meta"):
        model = backbones.create_model(config.model.name).eval()
        size = config.data.img_size
        assert model(torch.empty(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.parametrize("name", WEIGHT_DECAY)
def test_shvit_values_are_the_published_ones(name):
    config = _config(next(path for path in RECIPES if path.stem == name))
    assert config.optim.weight_decay == WEIGHT_DECAY[name]
    assert config.optim.peak_lr(config.data.batch_size) == pytest.approx(4e-3)
    assert (config.optim.clip, config.optim.clip_mode) == (0.02, "agc")
    assert (config.ema.decay, config.augment.repeats) == (0.99996, 3)
    assert config.data.img_size == (256 if name == "shvit_s4" else 224)
    rates = [learning_rate(config.schedule, 4e-3, epoch * 625, 625) for epoch in (0, 5, 150)]
    assert rates == pytest.approx([1e-6, 3.99726e-3, 2.005e-3], rel=1e-4)
