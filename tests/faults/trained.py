"""Training runs that are interrupted, and what they must be equal to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.training import checkpoint
from backbones.training.commands import train
from tests.faults.lab import Lab
from tests.faults.sabotage import Fault, as_variable, with_faults
from tests.support.process import ROOT
from tests.support.runs import Finished, run

# 2 epochs of 5 steps with everything that is random switched on
SMALL = (
    "--model", "test_byobnet", "--epochs", "2", "--batch-size", "256", "--warmup-epochs", "1",
    "--ema-decay", "0.9", "--mixup", "0.2", "--drop-path", "0.1", "--repeats", "2",
    "--accumulate", "2", "--checkpoint-every", "2",
)  # fmt: skip
STEPS = 10
_LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def processes(count: int) -> tuple[str, str]:
    """The flags of so many processes on this CPU."""
    return "--processes", str(count)


def whole(lab: Lab, count: int, argv: Sequence[str] = SMALL) -> Path:
    """The folder of an uninterrupted run with `count` processes, made once."""
    folder = lab.folder / f"whole-{count}-{abs(hash(tuple(argv)))}"
    if not folder.exists():
        done = run(train, *argv, *processes(count), "--out", "out", folder=folder)
        assert done.code == 0, done.err
    return folder / "out"


def faulty(folder: Path, argv: Sequence[object], *faults: Fault, seconds: float = 120) -> Finished:
    """Run train.py with faults in `folder`, which gets `out`."""
    return run(with_faults(*faults), *argv, "--out", "out", folder=folder, timeout=seconds)


def launch(
    folder: Path, argv: Sequence[str], *faults: Fault, restarts: int = 0, seconds: float = 120
) -> Finished:
    """Run train.py with faults under torchrun, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **as_variable(*faults)}
    done = subprocess.run(
        [*_LAUNCH, *options, "-m", "tests.faults.sabotage", *argv, "--out", "out"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def difference(folder: Path, expected: Path) -> str:
    """Where the newest checkpoints of two runs differ in any bit; empty if nowhere."""
    ours, theirs = states(folder), states(expected)
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    wrong = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    return f"{len(wrong)} of {len(ours)} tensors differ, e.g. {wrong[0]}" if wrong else ""


def states(folder: Path) -> dict[str, Tensor]:
    """Weights, average and optimizer of the newest checkpoint of a run."""
    path = checkpoint.latest(folder / "ckpt")
    assert path is not None, f"no checkpoint in {folder}"
    loaded = checkpoint.load(path)
    found = {f"model.{name}": value for name, value in loaded.model.items()}
    found |= {f"ema.{name}": value for name, value in (loaded.ema or {}).items()}
    for index, slots in loaded.optim["optimizer"]["state"].items():
        found |= {f"optim.{index}.{name}": value for name, value in slots.items()}
    return found | {"step": torch.tensor(loaded.meta["step"])}


def finite(folder: Path) -> bool:
    """Whether every value of the newest checkpoint is."""
    return all(bool(value.isfinite().all()) for value in states(folder).values())


def status(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it."""
    return json.loads((folder / "status.json").read_text())


def log(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The steps that a process has taken, over all attempts."""
    return [json.loads(line) for line in (folder / f"steps-{rank}.jsonl").read_text().splitlines()]


def one_line(done: Finished) -> str:
    """Why a program's last words are not one line; empty if they are."""
    if done.err.startswith("error: ") and done.err.count("\n") == 1:
        return ""
    return f"stderr is not one line: {done.err[-2000:]!r}"
