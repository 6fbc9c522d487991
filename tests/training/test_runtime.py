from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones.training.config import parse
from backbones.training.errors import UsageError, run_command
from backbones.training.runtime import World, join, run_processes
from backbones.training.train_config import TrainConfig
from tests.support.runs import Run


def _config(*argv):
    return parse(TrainConfig, argv, program="train.py").config.runtime


def _ask_everything(folder):
    with join(_config("--device", "cpu")) as world:
        norm = nn.BatchNorm1d(4)
        norm.running_mean += 10.0 * (world.rank + 1)
        world.share_buffers(norm)
        answers = {
            "size": world.size,
            "threads": torch.get_num_threads(),
            "sum": world.sum([0.5, world.rank]),
            "share": world.share(f"from {world.rank}"),
            "gather": world.gather({"rank": world.rank}),
            "mean": norm.running_mean.tolist(),
        }
        (folder / f"{world.rank}.json").write_text(json.dumps(answers))
    return 0


def ask_in_processes(argv):
    folder, batch_size, cores, *processes = argv
    os.sched_getaffinity = lambda pid: set(range(int(cores)))
    config = _config("--device", "cpu", *processes)
    return run_processes(lambda: _ask_everything(Path(folder)), config, int(batch_size))


def _run(folder, *processes, batch_size=64, cores=2):
    done = Run(ask_in_processes, [folder, batch_size, cores, *processes], folder).finish(60)
    assert done.code == 0, done.err
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_agree(tmp_path, size):
    answers = _run(tmp_path, "--processes", size)
    expected = {
        "size": size,
        "threads": 1,
        "sum": [0.5 * size, sum(range(size))],
        "share": "from 0",
        "gather": [{"rank": rank} for rank in range(size)],
        "mean": [10.0] * 4,
    }
    assert answers == [expected] * size


def test_two_cores_are_used_by_default_if_the_batch_can_be_shared(tmp_path):
    assert len(_run(tmp_path / "even", cores=3)) == 2
    assert len(_run(tmp_path / "odd", batch_size=63, cores=3)) == 1
    assert len(_run(tmp_path / "one", cores=1)) == 1


def _lose_one(how):
    with join(_config("--device", "cpu", "--timeout", "0.1")) as world:
        for step in range(4):
            with world.watch(lambda step=step: f"step {step}"):
                world.sum([1.0])
                if world.rank == 1 and step == 2:
                    os._exit(1) if how == "gone" else time.sleep(60)
                if world.rank == 1 and how == "mistaken" and step == 1:
                    raise RuntimeError("an error of its own")


def lose_one(argv):
    (how,) = argv
    config = _config("--device", "cpu", "--processes", "3")
    return run_processes(lambda: run_command(lambda: _lose_one(how)), config, 3)


@pytest.mark.parametrize("how", ["gone", "hanging"])
def test_the_process_that_does_not_answer_is_named(tmp_path, how):
    done = Run(lose_one, [how], tmp_path).finish(40)
    assert done.code == 6 and done.err.count("\n") == 1, done
    # who is hung is noticed in the next step
    assert re.match(r"error: no answer from process 1 of 3 at step [23]: it is gone or", done.err)


def test_an_error_of_a_process_is_not_taken_for_a_lost_one(tmp_path):
    done = Run(lose_one, ["mistaken"], tmp_path).finish(40)
    assert "RuntimeError: an error of its own" in done.err


def test_one_process_needs_no_group():
    world = World(torch.device("cpu"))
    assert (world.sum([1.0, 2.0]), world.share("x"), world.gather(3)) == ([1.0, 2.0], "x", [3])
    assert str(world) == "1 process on cpu" and world.first


def test_precision_follows_the_device():
    cpu = torch.device("cpu")
    assert _config().precision(cpu) is None
    assert _config("--amp", "bf16").precision(cpu) is torch.bfloat16
    assert _config("--amp", "fp16").precision(cpu) is torch.float16
    assert _config("--amp", "none").precision(cpu) is None


def test_an_absent_device_is_named():
    if torch.xpu.is_available():
        pytest.skip("this machine has one")
    with (
        pytest.raises(UsageError, match="this machine has no xpu device: use --device cpu"),
        join(_config("--device", "xpu")),
    ):
        pass
