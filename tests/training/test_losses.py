"""The training loss against closed forms in float64, the teacher, and both in the engine."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms.functional import normalize

from backbones.training.augment import View
from backbones.training.commands import train
from backbones.training.config import parse
from backbones.training.engine import Engine
from backbones.training.errors import UsageError
from backbones.training.losses import DistillConfig, Teacher, TrainingLoss
from backbones.training.model import TrainModelConfig, build_model
from backbones.training.runtime import World
from backbones.training.train_config import TrainConfig
from tests.support.runs import run

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
TAUGHT = torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])
LABELS = torch.tensor([0, 2])


def _loss(smoothing=0.0, aux_weight=0.0, **distill):
    return TrainingLoss(smoothing, aux_weight, DistillConfig(**distill))


def _log_probabilities(row, tau=1.0):
    total = math.log(sum(math.exp(value / tau) for value in row))
    return [value / tau - total for value in row]


def _cross_entropy(logits, probabilities):
    rows = zip(logits.tolist(), probabilities, strict=True)
    terms = [-sum(map(math.prod, zip(p, _log_probabilities(x), strict=True))) for x, p in rows]
    return sum(terms) / len(terms)


def test_cross_entropy_smooths_class_numbers_and_takes_probabilities():
    smooth = [[0.7 + 0.1, 0.1, 0.1], [0.1, 0.1, 0.7 + 0.1]]
    assert _loss(0.3)(LOGITS, LABELS).item() == pytest.approx(_cross_entropy(LOGITS, smooth))
    mixed = [[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]]
    value = _loss()(LOGITS, torch.tensor(mixed)).item()
    assert value == pytest.approx(_cross_entropy(LOGITS, mixed))


def test_the_auxiliary_classifier_counts_by_its_weight():
    one_hot = [[1, 0, 0], [0, 0, 1]]
    value = _loss(aux_weight=0.4)({"main": LOGITS, "aux": TAUGHT}, LABELS).item()
    expected = _cross_entropy(LOGITS, one_hot) + 0.4 * _cross_entropy(TAUGHT, one_hot)
    assert value == pytest.approx(expected)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("two", [False, True], ids=["one classifier", "two"])
def test_soft_distillation_is_the_divergence_from_the_teacher(two, tau):
    student = LOGITS.flip(1) if two else LOGITS
    divergence = 0.0
    for x, t in zip(student.tolist(), TAUGHT.tolist(), strict=True):
        pairs = zip(_log_probabilities(x, tau), _log_probabilities(t, tau), strict=True)
        divergence += sum(math.exp(q) * (q - p) for p, q in pairs) / len(student)
    base = _cross_entropy(LOGITS, [[1, 0, 0], [0, 0, 1]])
    criterion = _loss(teacher="x", type="soft", alpha=0.3, tau=tau)
    value = criterion((LOGITS, student) if two else LOGITS, LABELS, TAUGHT).item()
    assert value == pytest.approx(0.7 * base + 0.3 * tau**2 * divergence)


def test_hard_distillation_learns_the_teachers_class():
    student = LOGITS.flip(1)
    base = _cross_entropy(LOGITS, [[1, 0, 0], [0, 0, 1]])
    hard = _cross_entropy(student, [[0, 1, 0], [0, 0, 1]])
    value = _loss(teacher="x", alpha=0.5)((LOGITS, student), LABELS, TAUGHT).item()
    assert value == pytest.approx((base + hard) / 2)


def test_the_loss_is_of_full_precision():
    halves = _loss()(LOGITS.bfloat16(), LABELS)
    assert halves.dtype == torch.float32
    taught = _loss(teacher="x", type="soft")(LOGITS.half(), LABELS, TAUGHT.half())
    assert taught.dtype == torch.float32


def test_the_teacher_sees_images_as_it_was_trained_to():
    model = timm.create_model("test_byobnet", num_classes=3)
    student = View(64, (0.3, 0.4, 0.5), (0.35, 0.3, 0.25), "bilinear", 1.0)
    teacher = Teacher(model, (0.5, 0.45, 0.4), (0.2, 0.22, 0.24), student)
    pixels = torch.rand(2, 3, 64, 64)
    logits = teacher(normalize(pixels, student.mean, student.std))
    expected = model.eval()(normalize(pixels, (0.5, 0.45, 0.4), (0.2, 0.22, 0.24)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not logits.requires_grad


def test_a_step_trains_both_classifiers_and_not_the_teacher():
    config = parse(TrainConfig, ["--teacher", "x"], program="train.py").config
    model = build_model(TrainModelConfig("shvit_s1"), 4, distilled=True)
    student = View(32, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    teacher = Teacher(
        build_model(TrainModelConfig("test_byobnet"), 4), (0.5,) * 3, (0.5,) * 3, student
    )
    before = copy.deepcopy((model.state_dict(), teacher.model.state_dict()))
    engine = Engine(model, 4, config, World(torch.device("cpu")), teacher)
    batch = (torch.randn(8, 3, 32, 32), torch.arange(8) % 4, torch.full((8,), -1))
    assert engine.step([batch], 0, 0.1, stop=False, bad=0).finite
    for name in ("head.l.weight", "head_dist.l.weight"):
        assert not torch.equal(before[0][name], model.state_dict()[name])
    assert all(torch.equal(v, before[1][k]) for k, v in teacher.model.state_dict().items())
    assert not any(name.startswith("teacher") for name in engine.state({}).model)


def test_models_of_one_classifier_stay_as_they_are():
    model: nn.Module = build_model(TrainModelConfig("test_byobnet"), 4, distilled=True)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(UsageError, match="use --finetune shvit_s1"):
        build_model(TrainModelConfig("shvit_s1", pretrained=True), 4, distilled=True)


def test_a_run_learns_from_a_teacher_and_names_one_that_does_not_fit(tmp_path):
    argv = ["--model", "test_byobnet", "--epochs", 2, "--warmup-epochs", 0, "--batch-size", 256]
    argv += ["--processes", 1]
    assert run(train, *argv, "--out", "teacher", folder=tmp_path).code == 0
    teacher = ["--teacher", "test_byobnet", "--teacher-checkpoint"]
    done = run(train, *argv, *teacher, "teacher", "--mixup", 0.2, "--out", "s", folder=tmp_path)
    assert done.code == 0, done.err
    misuses = [
        (["--teacher-checkpoint", "teacher"], "needs --teacher"),
        ([*teacher, "nowhere.pth"], "--teacher: "),
        (["--teacher", "no_such_model", "--teacher-checkpoint", "teacher"], "no_such_model"),
        (["--teacher", "x", "--distill-type", "firm"], "must be one of hard, soft"),
        (["--teacher", "x", "--distill-tau", "0"], "--distill-tau must be positive"),
    ]
    for misuse, message in misuses:
        failed = run(train, *argv, *misuse, folder=tmp_path)
        assert failed.code == 2 and failed.err.count("\n") == 1 and message in failed.err, failed
