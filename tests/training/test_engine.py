from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from backbones.training.config import parse
from backbones.training.engine import Engine
from backbones.training.runtime import World
from backbones.training.train_config import TrainConfig


def _model(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity()]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _engine(model: nn.Module, *argv: str) -> Engine:
    config = parse(TrainConfig, argv, program="train.py").config
    world = World(torch.device("cpu"))
    return Engine(model, 4, config, world)


def _batch(seed: int = 0, size: int = 8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (size,), generator=generator)
    return images, labels, torch.full((size,), -1)


def _everything(engine: Engine) -> dict:
    state = engine.state({})
    found = dict(state.model) | {f"ema.{name}": value for name, value in state.ema.items()}
    for index, slots in state.optim["optimizer"]["state"].items():
        found |= {f"{index}.{name}": value for name, value in slots.items()}
    return {k: v.clone() for k, v in found.items() if v.is_floating_point()}


def _step(engine, step, *batches, lr=0.1):
    return engine.step(batches or [_batch(step)], step, lr, stop=False, bad=0)


def test_a_step_trains_and_the_average_follows():
    engine = _engine(_model(), "--ema-decay", "0.9")
    losses = [_step(engine, step, _batch(0), lr=0.02).loss for step in range(30)]
    assert losses[-1] < losses[0] / 1.5
    weight, average = engine.model[0].weight, engine.ema.module[0].weight
    assert not torch.equal(weight, average) and torch.allclose(weight, average, atol=0.2)


def test_the_average_warms_up_by_the_number_of_the_step():
    engine = _engine(_model(), "--ema-decay", "0.9999")
    _step(engine, 0)
    for weight, average in zip(
        engine.model.parameters(), engine.ema.module.parameters(), strict=True
    ):
        assert torch.equal(weight, average)
    _step(engine, 1)
    assert not torch.equal(engine.model[0].weight, engine.ema.module[0].weight)


class _WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = _model(), nn.Linear(8, 4)

    def forward(self, x):
        pooled = self.body[:-1](x)
        return {"main": self.body[-1](pooled), "aux": self.aux(pooled)}


def test_the_loss_of_an_auxiliary_classifier_is_added_by_its_weight():
    model, (images, labels, failed) = _WithAuxiliary(), _batch()
    expected = copy.deepcopy(model)
    engine = _engine(model, "--aux-weight", "0.4", "--smoothing", "0.1")
    agreed = _step(engine, 0, (images, labels, failed))
    output = expected(images)
    main, aux = (
        nn.functional.cross_entropy(output[name], labels, label_smoothing=0.1)
        for name in ("main", "aux")
    )
    assert agreed.loss == pytest.approx((main + 0.4 * aux).item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_batch_leaves_no_trace(value):
    engine = _engine(_model(), "--ema-decay", "0.9")
    for step in range(2):
        assert _step(engine, step).finite
    before = _everything(engine)
    bad = _batch(2)
    bad[0][3, 1, 2, 2] = value
    agreed = _step(engine, 2, bad)
    assert not agreed.finite and agreed.loss == 0.0
    after = _everything(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert _step(engine, 3).finite


def test_a_gradient_that_overflows_is_noticed_behind_a_finite_loss():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            return Overflow.apply(self.head(x.mean((2, 3))))

    engine = _engine(Model())
    before = engine.model.head.weight.clone()
    assert not _step(engine, 0).finite
    assert torch.equal(engine.model.head.weight, before)


def test_accumulated_micro_batches_equal_one_batch():
    whole, parts = _engine(_model(norm=False)), _engine(_model(norm=False))
    for step in range(3):
        images, labels, failed = _batch(step)
        micro = list(zip(images.chunk(2), labels.chunk(2), failed.chunk(2), strict=True))
        a, b = _step(whole, step, lr=1e-3), _step(parts, step, *micro, lr=1e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "argv",
    [
        ["--clip-mode", "agc", "--clip", "0.02"],
        ["--clip-mode", "value", "--clip", "0.1"],
        ["--clip", "none", "--amp", "bf16"],
        ["--mixup", "0.8", "--cutmix", "1", "--no-channels-last"],
        ["--optim", "sgd", "--smoothing", "0"],
    ],
)
def test_every_setting_trains(argv):
    engine = _engine(_model(), *argv)
    before = copy.deepcopy(engine.model.state_dict())
    assert all(_step(engine, step).finite for step in range(2))
    assert any(not torch.equal(before[k], v) for k, v in engine.model.state_dict().items())


def test_clipping_bounds_the_step():
    # the first step of timm's sgd is 1 + momentum times the gradient
    engine = _engine(_model(norm=False), "--optim", "sgd", "--clip", "0.001", "weight_decay=0")
    before = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    _step(engine, 0, lr=1.0)
    after = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.0019, rel=0.01)


def test_a_restored_engine_goes_on_to_the_same_bits():
    argv = ["--ema-decay", "0.99", "--mixup", "0.5"]
    first, second = _engine(_model(), *argv), _engine(_model(), *argv)
    for step in range(3):
        _step(first, step)
    saved = copy.deepcopy(first.state({}))
    _step(first, 3)
    second.restore(saved)
    _step(second, 3)
    a, b = _everything(first), _everything(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
