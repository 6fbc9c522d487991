from argparse import Namespace

import pytest
import torch

from backbones.pretrained import WeightsError, unwrap

PLAIN = {"a": torch.zeros(1), "b": torch.ones(1)}
EMA = {"a": torch.ones(1), "b": torch.zeros(1)}
TRAINING = {"model": PLAIN, "model_ema": EMA, "optimizer": {"state": {}}, "args": Namespace()}


def prefixed(prefix):
    return {prefix + name: value for name, value in PLAIN.items()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        PLAIN,
        {"model": PLAIN},
        {"state_dict": PLAIN, "epoch": 3},
        TRAINING,
        {"state_dict": {"model": PLAIN}},
        prefixed("module."),
        prefixed("_orig_mod."),
        {"model": prefixed("module._orig_mod.")},
        {"state_dict": prefixed("backbone.") | {"neck.a": torch.ones(1)}},
        {"state_dict": prefixed("module.backbone.") | {"module.neck.a": torch.ones(1)}},
    ],
)
def test_plain_weights(checkpoint):
    assert unwrap(checkpoint) == PLAIN


@pytest.mark.parametrize(
    "checkpoint",
    [
        TRAINING,
        {"state_dict_ema": EMA, "state_dict": PLAIN},
        {"model_ema": {"state_dict": EMA}, "model": PLAIN},
    ],
)
def test_moving_average_on_request(checkpoint):
    assert unwrap(checkpoint, ema=True) == EMA


def test_result_is_a_new_dict():
    unwrap(PLAIN).clear()
    assert len(PLAIN) == 2


@pytest.mark.parametrize(
    ("checkpoint", "ema", "message"),
    [
        ({"model_ema": EMA}, False, "holds a moving average only .* pass ema=True"),
        ({"model": PLAIN}, True, "holds no moving average .* leave out ema=True"),
        (PLAIN, True, "has no moving average"),
        ({}, False, "it has nothing"),
        ({"epoch": 1, "optimizer": {}}, False, "it has epoch, optimizer"),
        ({"a": torch.ones(1), "lr": 0.1}, False, "it has a, lr"),
        ([PLAIN], False, "holds a list"),
    ],
)
def test_nothing_to_unwrap(checkpoint, ema, message):
    with pytest.raises(WeightsError, match=message):
        unwrap(checkpoint, ema=ema)


def test_a_checkpoint_that_wraps_itself_ends():
    checkpoint = {}
    checkpoint["model"] = checkpoint
    with pytest.raises(WeightsError, match="wraps"):
        unwrap(checkpoint)
