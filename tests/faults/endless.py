"""F14 to F16: leaks, equal bits, and other numbers of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

import backbones
from backbones.pretrained import load_weights
from tests.faults.lab import NARROW, Case, Lab
from tests.faults.sabotage import Fault, watch
from tests.faults.trained import SMALL, difference, faulty, log, processes, status
from tests.support.runs import run

_GROWTH = 0.05
_STEPS = 2000
# no batch norm, whose statistics are of a process's share of the batch; 2 epochs of 25 steps
_PLAIN = ("--model", "test_vit", "--img-size", "32", "--epochs", "2", "--batch-size", "56")


def _growth(path: Path) -> str:
    """Why the memory or the open files of a process grow: the last tenth against the third."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tenth = len(lines) // 10
    early, late = lines[2 * tenth : 3 * tenth], lines[-tenth:]
    before, after = (median(line["bytes"] for line in part) for part in (early, late))
    files = [max(line["files"] for line in part) for part in (early, late)]
    if files[1] > files[0]:
        return f"{files[0]} open files become {files[1]}"
    grown = after / before - 1
    return f"memory grows by {100 * grown:.1f} %" if grown > _GROWTH else ""


def _long_run(workers: int, lab: Lab) -> str:
    """Train for 2,000 steps and more, over 12 epochs with their evaluations and checkpoints."""
    folder = lab.folder / f"long-{workers}"
    argv = ["--model", "test_byobnet", "--batch-size", "8", "--epochs", "12", "--workers", workers]
    argv += [*processes(1), "--ema-decay", "0.9", "--checkpoint-every", "100"]
    done = faulty(folder, argv, Fault("watch", 0, last=10 * _STEPS), seconds=1200)
    if done.code or status(folder / "out")["step"] < _STEPS:
        return f"exit code {done.code}: {done.err}"
    return _growth(folder / "memory.jsonl")


def create_models(argv: Sequence[str]) -> int:
    """Make 200 models and drop them."""
    for _ in range(200):
        backbones.create_model("shvit_s1", **NARROW)
        watch()
    return 0


def load_files(argv: Sequence[str]) -> int:
    """Load weights 500 times, in both formats."""
    weights = {f"w{number}": torch.ones(100, 1000) for number in range(5)}
    save_file(weights, "w.safetensors")
    torch.save(weights, "w.pth")
    for number in range(500):
        load_weights(("w.safetensors", "w.pth")[number % 2])
        watch()
    return 0


def _repeated(program: Callable[[Sequence[str]], int], lab: Lab) -> str:
    folder = lab.folder / program.__name__
    done = run(program, folder=folder)
    return done.err if done.code else _growth(folder / "memory.jsonl")


LEAKS: dict[str, Case] = {
    "2,000 steps": partial(_long_run, 0),
    "2,000 steps with a loading process": partial(_long_run, 1),
    "200 models": partial(_repeated, create_models),
    "500 files of weights": partial(_repeated, load_files),
}


def _twice(seed: int, lab: Lab) -> str:
    """Run the same command twice."""
    folders = [lab.folder / f"twice-{seed}-{number}" for number in range(2)]
    for folder in folders:
        done = faulty(folder, [*SMALL, *processes(2), "--epochs", "1", "--warmup-epochs", "0",
                               "--seed", seed])  # fmt: skip
        if done.code:
            return done.err
    return difference(*(folder / "out" for folder in folders))


TWICE: dict[str, Case] = {f"seed {seed}": partial(_twice, seed) for seed in range(3)}


def _resized(seed: int, lab: Lab) -> str:
    """Train with two processes, go on with one, and with two again: 50 steps in all."""
    one, folder = lab.folder / f"one-{seed}", lab.folder / f"resized-{seed}"
    argv = [*_PLAIN, "--seed", seed]
    done = [faulty(one, [*argv, *processes(1)])]
    for count, step in ((2, 16), (1, 33), (2, 99)):
        done.append(faulty(folder, [*argv, *processes(count)], Fault("SIGTERM", step, 0)))
    if [each.code for each in done] != [0, 75, 75, 0]:
        return f"exit codes {[each.code for each in done]}: {[each.err for each in done]}"
    expected, found = log(one), log(folder)
    if [line["step"] for line in found] != [line["step"] for line in expected]:
        return "other steps were taken"
    far = max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True))
    return f"losses differ by {far:.1e}" if far >= 1e-4 or len(found) != 50 else ""


RESIZED: dict[str, Case] = {f"2, 1, 2 processes, seed {n}": partial(_resized, n) for n in range(3)}
