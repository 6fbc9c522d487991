from __future__ import annotations

import pytest
import torch
from torch import nn

from backbones.training.config import parse
from backbones.training.errors import UsageError
from backbones.training.optim import (
    OptimConfig,
    clip_gradients,
    gradient_norm,
    make_optimizer,
)
from backbones.training.train_config import TrainConfig
from tests.backbones.models import FAMILIES


def _config(*argv: str) -> OptimConfig:
    return parse(TrainConfig, argv, program="train.py").config.optim


def _scales(model: nn.Module, *argv: str) -> dict[str, tuple[float, float]]:
    """The learning rate of every parameter over that of the head, and its weight decay."""
    optimizer = make_optimizer(_config("--weight-decay", "0.05", *argv), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_lowers_the_rates_towards_the_stem(family):
    model = FAMILIES[family].create_short()
    scales, plain = _scales(model, "--layer-decay", "0.5"), _scales(model)
    assert scales.keys() == plain.keys() == dict(model.named_parameters()).keys()
    assert {name: decay for name, (_, decay) in scales.items()} == {
        name: decay for name, (_, decay) in plain.items()
    }
    assert {scale for scale, _ in plain.values()} == {1.0}
    found = sorted({scale for scale, _ in scales.values()}, reverse=True)
    # every layer has half the rate of the one above it, and the classifier has all of it
    assert len(found) > 2 and found == [0.5**layer for layer in range(len(found))]
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert {scales[n][0] for n, p in model.named_parameters() if id(p) in head} == {1.0}
    first = next(name for name, _ in model.named_parameters())
    assert scales[first][0] == found[-1]


def test_layer_decay_follows_the_depth_of_the_blocks():
    scales = _scales(FAMILIES["shvit"].create(), "--layer-decay", "0.75")
    by_layer = [
        next(scale for name, (scale, _) in scales.items() if name.startswith(layer))
        for layer in (
            "patch_embed",
            "stages.0.blocks.0",
            "stages.1.downsample",
            "stages.2.blocks.1",
            "head",
        )
    ]
    assert by_layer == sorted(by_layer) and by_layer[-1] == 1.0


def _gradients(*argv: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the gradients of the body and of the classifier after clipping."""
    config = _config("--clip", "0.01", *argv)
    model = FAMILIES["shvit"].create_short()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = gradient_norm(parameters)
    clip_gradients(config, parameters, before)
    head = list(model.get_classifier().parameters())
    others = {id(p) for p in head}
    body = [p for p in parameters if id(p) not in others]
    return gradient_norm(body) / sum(p.numel() for p in body) ** 0.5, gradient_norm(head) / sum(
        p.numel() for p in head
    ) ** 0.5


def test_adaptive_clipping_reaches_the_classifier():
    # timm's own program spares it, SHViT's does not
    body, head = _gradients("--clip-mode", "agc")
    assert body < 0.1 and head < 0.1


def test_momentum_reaches_the_optimizer():
    layer = nn.Linear(3, 2)
    for argv, expected in (((), 0.9), (("--momentum", "0.5"), 0.5)):
        optimizer = make_optimizer(_config("--optim", "sgd", *argv), layer)
        assert {group["momentum"] for group in optimizer.param_groups} == {expected}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--layer-decay", "0"], "--layer-decay"),
        (["--layer-decay", "1.5"], "1.5"),
        (["--momentum", "1"], "--momentum"),
        (["--momentum=-0.1"], "-0.1"),
    ],
)
def test_impossible_settings_are_refused(argv, named):
    with pytest.raises(UsageError, match=named):
        _config(*argv)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--optim", "sgd", "--betas", "0.9,0.99"], "sgd takes no betas"),
        (["--optim", "adamw", "--momentum", "0.9"], "adamw takes no momentum"),
        (["--optim", "adamw", "--betas", "0.9"], "adamw does not take these"),
        (["--optim", "adamw", "--betas", "0.9,2"], "adamw does not take these"),
        (["--optim", "adam_w"], "unknown optimizer adam_w"),
    ],
)
def test_settings_that_the_optimizer_does_not_take_are_refused(argv, named):
    with pytest.raises(UsageError, match=named):
        make_optimizer(_config(*argv), nn.Linear(3, 2))
