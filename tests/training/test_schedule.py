from __future__ import annotations

import itertools
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from backbones.training.errors import UsageError
from backbones.training.schedule import ScheduleConfig, learning_rate


def _config(**changes):
    fields = {name: item.default for name, item in ScheduleConfig.__dataclass_fields__.items()}
    return ScheduleConfig(**(fields | changes))


DEIT = _config(epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, per="epoch")


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 1e-6),
        (1, 1e-6 + (4e-3 - 1e-6) / 5),
        (4, 1e-6 + (4e-3 - 1e-6) * 4 / 5),
        (5, 1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2),
        (150, (4e-3 + 1e-5) / 2),
        (299, 1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * 299 / 300)) / 2),
    ],
)
def test_the_published_cosine_changes_between_epochs_only(epoch, expected):
    for step in (0, 312, 624):
        got = learning_rate(DEIT, 4e-3, epoch * 625 + step, 625)
        assert got == pytest.approx(expected, rel=1e-12)


def test_timm_gives_the_same_rates():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
    )
    for epoch in range(300):
        theirs.step(epoch)
        ours = learning_rate(DEIT, 4e-3, epoch * 10, 10)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_per_step_moves_every_step():
    config = _config(epochs=10, warmup_epochs=2, warmup_lr=0.0, min_lr=0.0)
    rates = [learning_rate(config, 1.0, step, 10) for step in range(100)]
    assert rates[:20] == pytest.approx([step / 20 for step in range(20)])
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[-1] < 1e-3


def test_step_and_constant():
    step = _config(name="step", epochs=90, warmup_epochs=0, step_epochs=30, step_decay=0.1)
    rates = [learning_rate(step, 1.0, epoch * 7, 7) for epoch in (0, 29, 30, 89)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])
    constant = _config(name="constant", warmup_epochs=0)
    assert {learning_rate(constant, 0.5, s, 3) for s in range(30)} == {0.5}


@pytest.mark.parametrize("name", ["cosine", "step", "constant"])
def test_a_cooldown_follows_at_the_lowest_rate(name):
    config = _config(name=name, epochs=20, cooldown_epochs=3, min_lr=1e-5)
    without = _config(name=name, epochs=20, min_lr=1e-5)
    assert (config.total_epochs, without.total_epochs) == (23, 20)
    for step in range(7, 20 * 7):
        assert learning_rate(config, 1.0, step, 7) == learning_rate(without, 1.0, step, 7) > 1e-5
    assert {learning_rate(config, 1.0, step, 7) for step in range(20 * 7, 23 * 7)} == {1e-5}


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"cooldown_epochs": -1}, {"warmup_epochs": 12}, {"step_epochs": 0}]
)
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(UsageError):
        _config(**bad)
