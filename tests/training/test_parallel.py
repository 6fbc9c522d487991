"""DDP, FSDP2 and synchronised batch norm in two processes, compared with one another and with one.

All checks run in one pair of processes; each of them also computes what it compares with.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from backbones.training import checkpoint
from backbones.training.config import parse
from backbones.training.engine import Engine
from backbones.training.errors import UsageError
from backbones.training.parallel import gathered
from backbones.training.runtime import World, join, run_processes
from backbones.training.train_config import TrainConfig
from tests.support.runs import Run

ALONE = World(torch.device("cpu"))
SGD = ("--optim", "sgd", "--weight-decay", "0", "--clip", "0.5", "--smoothing", "0")
FSDP, DDP = ("--parallel", "fsdp2"), ("--parallel", "ddp")
CHECKS: dict[str, Callable[[World, Path], None]] = {}


def _check(function):
    CHECKS[function.__name__.removeprefix("_")] = function
    return function


def _config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, program="train.py").config


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=4)


def _shvit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "depth": (1, 2, 1)}
    return timm.create_model("shvit_s1", num_classes=4, **sizes)


def _norms() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    layers += [BatchNormAct2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6)]
    return nn.Sequential(*layers, nn.Linear(6, 4))


def _engine(model: nn.Module, world: World, *argv: str) -> Engine:
    return Engine(model, 4, _config("--processes", "2", *argv), world)


def _step(engine: Engine, step: int, lr: float = 1e-3, parts: int = 1, size: int = 32) -> float:
    """A step of `engine` on its share of the same 16 images, whatever its world."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, size, size, generator=generator)
    labels = torch.randint(0, 4, (16,), generator=generator)
    mine = slice(engine.world.rank, None, engine.world.size)
    images = images.to(next(engine.model.parameters()).dtype)
    batch = (images[mine], labels[mine], torch.full((16,), -1)[mine])
    micro = list(zip(*(part.chunk(parts) for part in batch), strict=True))
    agreed = engine.step(micro, step, lr, stop=False, bad=0)
    assert agreed.finite
    return agreed.loss


def _everything(engine: Engine) -> dict[str, Tensor]:
    """All values of `engine`, whole in its first process."""
    state = engine.state({})
    found = {f"model.{name}": value for name, value in state.model.items()}
    found |= {f"ema.{name}": value for name, value in (state.ema or {}).items()}
    for index, slots in state.optim["optimizer"]["state"].items():
        found |= {f"{index}.{name}": v for name, v in slots.items() if torch.is_tensor(v)}
    return {k: v.detach().clone() for k, v in found.items()}


def _close(first: Engine, second: Engine, atol: float, rtol: float = 1e-4) -> None:
    a, b = _everything(first), _everything(second)
    assert a.keys() == b.keys()
    if first.world.first:
        for name, value in a.items():
            assert not isinstance(value, DTensor), name
            torch.testing.assert_close(
                value, b[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
            )


@_check
def _ddp_equals_one_process(world: World, folder: Path) -> None:
    for build, sync in ((_vit, ()), (_norms, ("--sync-bn",)), (_shvit, ("--sync-bn",))):
        argv = (*SGD, *sync, "--ema-decay", "0.5")
        # only the loss is in float32: a wrong statistic cannot hide behind rounding
        one, two = (_engine(build().double(), w, *argv) for w in (ALONE, world))
        for step in range(3):
            assert _step(one, step, 0.05) == pytest.approx(_step(two, step, 0.05), rel=1e-6)
        _close(two, one, atol=1e-6, rtol=1e-6)


@_check
def _batch_norm_of_each_process_is_not_that_of_all(world: World, folder: Path) -> None:
    one, two = _engine(_norms(), ALONE, *SGD), _engine(_norms(), world, *SGD)
    assert abs(_step(one, 0) - _step(two, 0)) > 1e-4


@_check
def _fsdp2_equals_ddp(world: World, folder: Path) -> None:
    for build in (_vit, _shvit):
        argv = ("--ema-decay", "0.9", "--mixup", "0.2", "--accumulate", "2")
        ddp, fsdp = (_engine(build(), world, *argv, *mode) for mode in (DDP, FSDP))
        assert all(isinstance(p, DTensor) for p in fsdp.model.parameters())
        for step in range(3):
            a, b = (_step(engine, step, parts=2) for engine in (ddp, fsdp))
            assert a == pytest.approx(b, rel=2e-6)
        # Adam makes much of rounding where a gradient is next to nothing
        _close(ddp, fsdp, atol=3e-4)


@_check
def _accumulation_equals_a_large_batch(world: World, folder: Path) -> None:
    for mode in (DDP, FSDP):
        whole, parts = (_engine(_vit(), world, *SGD, *mode) for _ in range(2))
        for step in range(2):
            a, b = _step(whole, step, 0.05), _step(parts, step, 0.05, parts=4)
            assert a == pytest.approx(b, rel=1e-5)
        _close(whole, parts, atol=2e-6)


@_check
def _recomputed_activations_change_nothing(world: World, folder: Path) -> None:
    for mode in (DDP, FSDP):
        argv = (*SGD, *mode)
        plain, recomputed = _engine(_vit(), world, *argv), _engine(_vit(), world, *argv)
        recomputed.model.set_grad_checkpointing()
        for step in range(2):
            assert _step(plain, step, 0.05) == pytest.approx(_step(recomputed, step, 0.05))
        _close(plain, recomputed, atol=1e-6)


@_check
def _mixed_precision_trains_and_evaluates(world: World, folder: Path) -> None:
    for build in (_vit, _shvit):
        argv = ("--amp", "bf16", "--ema-decay", "0.9")
        ddp, fsdp = (_engine(build(), world, *argv, *mode) for mode in (DDP, FSDP))
        losses = [[_step(engine, 0) for _ in range(6)] for engine in (ddp, fsdp)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[1][-1] < losses[1][0]
        for model in (fsdp.model, fsdp.ema.module):
            _evaluate(model.eval(), world)
            model.train()
        assert _step(fsdp, 0) < losses[1][0]


def _evaluate(model: nn.Module, world: World) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with gathered(model), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        # the last process has fewer batches than the first
        answers = [model(images).float() for _ in range(3 - 2 * world.rank)]
    assert torch.isfinite(answers[0]).all() and torch.equal(answers[0], answers[-1])
    assert all(isinstance(p, DTensor) for p in model.parameters())


@_check
def _a_run_goes_on_in_any_way(world: World, folder: Path) -> None:
    argv = ("--ema-decay", "0.9", "--mixup", "0.2")
    first = _engine(_shvit(), world, *argv, *FSDP)
    for step in range(2):
        _step(first, step)
    state = first.state({})
    if world.first:
        checkpoint.save(folder / "ckpt", 2, state)
    world.share(None)
    same, other = (_engine(_shvit(), world, *argv, *mode) for mode in (FSDP, DDP))
    alone = _engine(_shvit(), ALONE, *argv)
    for engine in (same, other, alone):
        engine.restore(checkpoint.load(checkpoint.latest(folder / "ckpt")))
    _close(other, alone, atol=0, rtol=0)
    for step in range(2, 4):
        losses = [_step(engine, step) for engine in (first, same, other)]
        assert losses == [losses[0], losses[0], pytest.approx(losses[0], rel=1e-5)], losses
    _close(first, same, atol=0, rtol=0)
    _close(first, other, atol=3e-4)


@_check
def _a_non_finite_batch_of_one_process_leaves_no_trace(world: World, folder: Path) -> None:
    engine = _engine(_shvit(), world, *FSDP, "--ema-decay", "0.9")
    _step(engine, 0)
    before = _everything(engine)
    images = torch.full((4, 3, 32, 32), float("nan") if world.rank else 1.0)
    batch = (images, torch.zeros(4, dtype=torch.long), torch.full((4,), -1))
    assert not engine.step([batch], 1, 0.1, stop=False, bad=0).finite
    after = _everything(engine)
    if world.first:
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        # counters of batches, which no momentum of ours uses, go on
        assert all("num_batches" in name for name in changed), changed
    _step(engine, 2)


@_check
def _an_update_that_needs_whole_weights_is_refused(world: World, folder: Path) -> None:
    for argv in (("--optim", "adafactor"),):
        with pytest.raises(UsageError, match="cannot update sharded weights: use --parallel ddp"):
            _step(_engine(_vit(), world, *argv, *FSDP), 0)
    for argv in (("--optim", "lamb"), ("--optim", "lion", "--clip-mode", "value")):
        ddp, fsdp = (_engine(_vit(), world, *argv, *mode) for mode in (DDP, FSDP))
        for step in range(2):
            assert _step(ddp, step) == pytest.approx(_step(fsdp, step), rel=1e-4)


def run_checks(argv) -> int:
    folder, names = Path(argv[0]), argv[1:]
    config = _config("--device", "cpu", "--processes", "2", "--timeout", "1").runtime
    return run_processes(lambda: _run_checks(folder, names), config, 2)


def _run_checks(folder: Path, names: list[str]) -> int:
    with join(_config("--device", "cpu", "--timeout", "1").runtime) as world:
        for name in names:
            report = folder / f"{name}.{os.environ['RANK']}"
            (folder / name).mkdir(exist_ok=True)
            try:
                CHECKS[name](world, folder / name)
                report.write_text("")
            except BaseException:
                report.write_text(traceback.format_exc())
                # the other process may be elsewhere by now: it fails at the next collective
                return 1
    return 0


@pytest.fixture(scope="module")
def reports(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    wanted = {item.callspec.params["name"] for item in request.session.items
              if item.module is request.module and hasattr(item, "callspec")}  # fmt: skip
    Run(run_checks, [folder, *(n for n in CHECKS if n in wanted)], folder).finish(200)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(reports, name):
    for rank in range(2):
        report = reports / f"{name}.{rank}"
        assert report.exists(), "an earlier check has ended the processes"
        assert not report.read_text(), report.read_text()


def test_one_process_shares_nothing():
    engine = _engine(copy.deepcopy(_shvit()), ALONE, *FSDP, "--sync-bn")
    assert not any(isinstance(p, DTensor) for p in engine.model.parameters())
    assert _step(engine, 0) > 0
