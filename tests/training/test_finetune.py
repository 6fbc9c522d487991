"""Starts from trained weights, frozen parts, and run folders that become models of timm."""

from __future__ import annotations

import os
import signal

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.convert import convert
from backbones.pretrained import WeightsError
from backbones.training import checkpoint
from backbones.training.commands import train
from backbones.training.config import parse
from backbones.training.engine import Engine
from backbones.training.errors import UsageError
from backbones.training.evaluate import Evaluator
from backbones.training.finetune import FinetuneConfig, freeze, load_trained
from backbones.training.model import TrainModelConfig, build_model, create, load_into
from backbones.training.runtime import World
from backbones.training.train_config import TrainConfig
from tests.backbones.models import FAMILIES
from tests.support.images import make_folder
from tests.support.runs import Run, run

CPU = World(torch.device("cpu"))
QUICK = ["--model", "test_byobnet", "--epochs", 2, "--warmup-epochs", 0, "--ema-decay", 0.9]
ONE, TWO = ["--processes", "1"], ["--processes", "2"]


def _train(model, *argv, steps=3):
    """Steps with an evaluation between them; the names of what they changed."""
    config = parse(TrainConfig, ["--ema-decay", "0.9", *argv], program="train.py").config
    freeze(model, config.finetune)
    engine = Engine(model, 4, config, CPU)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluator = Evaluator.__new__(Evaluator)
    for step in range(steps):
        batch = (torch.randn(8, 3, 32, 32), torch.arange(8) % 4, torch.full((8,), -1))
        assert engine.step([batch], step, 0.01, stop=False, bad=0).finite
        _evaluate(evaluator, model)
    averaged = engine.ema.module.state_dict()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    # what stays, stays in the average too
    assert {k for k, v in averaged.items() if not torch.equal(v, before[k])} <= changed
    return changed


def _evaluate(evaluator, model):
    class NoBatches:
        rounds = 0

    evaluator.world, evaluator._batches, evaluator._loader = CPU, NoBatches(), ()
    evaluator.score(model)


def _statistics(model):
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    return {f"{name}.{leaf}" for name in norms
            for leaf in ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip


@pytest.fixture
def shvit():
    torch.manual_seed(0)
    args = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "partial_dim": (16, 16, 16)}
    return create("shvit_s1", num_classes=4, **args)


def test_frozen_parts_keep_their_bits_and_the_rest_is_trained(shvit):
    changed = _train(shvit, "--freeze", "patch_embed,stages.0,stages.1.downsample")
    frozen = ("patch_embed.", "stages.0.", "stages.1.downsample.")
    assert changed == {name for name in shvit.state_dict() if not name.startswith(frozen)}


def test_head_only_trains_the_linear_classifier(shvit):
    assert _train(shvit, "--head-only") == {"head.l.weight", "head.l.bias"}
    two = create("shvit_s1", num_classes=4, distilled=True)
    freeze(two, FinetuneConfig(head_only=True))
    trained = {name for name, p in two.named_parameters() if p.requires_grad}
    assert trained == {f"{head}.l.{leaf}" for head in ("head", "head_dist")
                       for leaf in ("weight", "bias")}  # fmt: skip


def test_freeze_bn_keeps_the_statistics_only(shvit):
    changed = _train(shvit, "--freeze-bn")
    assert changed == shvit.state_dict().keys() - _statistics(shvit)
    assert _train(shvit.train()) == set(shvit.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("stem",)}, r"--freeze stem: SHViT has no part 'stem'; its parts are .*stages"),
        ({"freeze": ("stages.7",)}, "--freeze stages.7: Sequential has no part '7'.* are 0, 1, 2"),
        ({"freeze": ("",)}, "no part ''"),
        ({"freeze": ("patch_embed", "stages", "head")}, "leaves nothing to train"),
        ({"freeze": ("stages",), "head_only": True}, "leave out --freeze"),
    ],
)
def test_mistakes_are_named(shvit, settings, message):
    with pytest.raises(UsageError, match=message):
        freeze(shvit, FinetuneConfig(**settings))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    done = run(train, *QUICK, *ONE, "--batch-size", 256, "--out", "out", folder=folder)
    assert done.code == 0, done.err
    return folder / "out"


def test_the_classifier_is_kept_for_the_same_classes_only(digits):
    known = checkpoint.load(checkpoint.latest(digits / "ckpt")).model
    heads = {"head.fc.weight", "head.fc.bias"}
    cases = [(tuple("0123456789"), 10, set()), (tuple("abcdefghij"), 10, heads),
             (tuple("abc"), 3, heads), (None, 10, set())]  # fmt: skip
    for classes, count, fresh in cases:
        torch.manual_seed(1)
        model = build_model(TrainModelConfig("test_byobnet"), count)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        line = load_trained(model, str(digits), classes)
        assert line.startswith(f"weights from {digits}")
        assert all(name in line for name in fresh) and ("fresh" in line) == bool(fresh)
        for name, value in model.state_dict().items():
            assert torch.equal(value, (before if name in fresh else known)[name]), name
        # and images are seen as before
        assert model.pretrained_cfg["mean"] == [0.3] * 3
        assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def _state(folder):
    return checkpoint.load(checkpoint.latest(folder / "ckpt"))


def test_tables_of_positions_fit_images_of_another_size(tmp_path):
    source, model = (FAMILIES["maxvit"].create_short() for _ in range(2))
    model.set_input_size(img_size=(96, 96))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert load_into(model, str(tmp_path / "model.safetensors")) == []
    source.set_input_size(img_size=(96, 96))
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("processes", [ONE, TWO], ids=["1 process", "2 processes"])
def test_a_frozen_run_resumes_to_the_same_bits(digits, tmp_path, processes):
    data = make_folder(tmp_path / "data", train=16, val=4)
    argv = [*QUICK, *processes, "--data", data, "--batch-size", 8, "--workers", 0]
    argv += ["--finetune", digits, "--freeze", "stem,stages.0", "--checkpoint-every", 1]
    done = run(train, *argv, "--out", "whole", folder=tmp_path)
    assert done.code == 0, done.err
    assert "freshly initialised: head.fc.weight, head.fc.bias" in done.out
    first = Run(train, [*argv, "--out", "parts"], tmp_path)
    first.wait_for(tmp_path / "parts" / "ckpt" / "step-00000002")
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.finish().code == 75
    rest = run(train, *argv, "--out", "parts", folder=tmp_path)
    assert rest.code == 0 and "resuming parts at step" in rest.out, rest

    source, whole, parts = (
        _state(digits).model,
        _state(tmp_path / "whole"),
        _state(tmp_path / "parts"),
    )
    for name, value in whole.model.items():
        assert torch.equal(value, parts.model[name]), name
        assert torch.equal(whole.ema[name], parts.ema[name]), name
        if name.startswith(("stem.", "stages.0.")):
            assert torch.equal(value, source[name]) and torch.equal(value, whole.ema[name]), name
        elif name.endswith("weight"):
            assert value.shape != source[name].shape or not torch.equal(value, source[name]), name
    assert whole.meta["classes"] == ["cat", "dog"]


def test_a_run_folder_becomes_a_model_of_timm(tmp_path):
    data = make_folder(tmp_path / "data", train=4, val=2)
    argv = ["--data", data, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4, *ONE]
    argv += ["--ema-decay", 0.5, "--img-size", 64, "--mean", "0.1,0.2,0.3", "--crop-pct", 0.9]
    done = run(train, *argv, "--workers", 0, "--out", "run", folder=tmp_path)
    assert done.code == 0, done.err
    x = torch.rand(2, 3, 64, 64)
    for ema in (False, True):
        report = convert(tmp_path / "run", tmp_path / f"out{ema}", ema=ema)
        assert (report.name, report.num_classes, report.ema, report.both) == (
            "shvit_s1", 2, ema, True,
        )  # fmt: skip
        model = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
        expected = create("shvit_s1", num_classes=2).eval()
        load_into(expected, str(tmp_path / "run"), ema=ema)
        assert torch.equal(model(x), expected(x))
        cfg = timm.data.resolve_data_config(model=model)
        assert cfg["input_size"] == (3, 64, 64) and cfg["crop_pct"] == 0.9
        assert tuple(cfg["mean"]) == (0.1, 0.2, 0.3)
        assert model.pretrained_cfg["label_names"] == ["cat", "dog"]

    (meta,) = (tmp_path / "run" / "ckpt").glob("*/meta.json")
    (meta.parent / "ema.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="sha256"):
        convert(tmp_path / "run", tmp_path / "out", ema=True)
    meta.write_text("{")
    with pytest.raises(WeightsError, match="is damaged: take another checkpoint"):
        convert(tmp_path / "run", tmp_path / "out")
