"""train.py and validate.py as a user starts them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import yaml

from backbones.training import checkpoint
from tests.support.process import ROOT, python

TRAIN, VALIDATE = ROOT / "train.py", ROOT / "validate.py"
QUICK = ["--model", "test_byobnet", "--epochs", "2", "--batch-size", "128"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def test_train_then_validate(tmp_path):
    trained = python(TRAIN, *QUICK, cwd=tmp_path, environment=ENVIRONMENT)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "digits-test_byobnet-1"
    top1 = trained.stdout.splitlines()[-1].split(" %")[0]
    validated = python(VALIDATE, "--checkpoint", folder, cwd=tmp_path, environment=ENVIRONMENT)
    assert validated.returncode == 0, validated.stderr
    header, row, files = validated.stdout.splitlines()
    assert header.split()[:3] == ["model", "top-1", "top-5"] and "validation.csv" in files
    assert row.split()[1] == top1.split()[1]
    (result,) = json.loads((folder / "validation.json").read_text())
    assert f"top-1 {result['top1']:.2f}" == top1
    assert result["model"] == "test_byobnet" and result["img_size"] == 32
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"] == 128


def test_a_terminal_shows_a_bar(tmp_path):
    leader, follower = pty.openpty()
    rows_and_columns = struct.pack("HHHH", 30, 100, 0, 0)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, rows_and_columns)
    process = subprocess.Popen(
        [sys.executable, TRAIN, *QUICK, "--processes", "1"],
        cwd=tmp_path, stdout=follower, stderr=follower, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    os.close(follower)
    shown, end = b"", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if select.select([leader], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
                shown += os.read(leader, 65536)
    process.kill()
    os.close(leader)
    assert b"epoch 1/2:" in shown and b"step/s, loss" in shown, shown[-500:]


def test_help_and_print_config(tmp_path):
    shown = python(TRAIN, "--epochs", "7", "--print-config", cwd=tmp_path, environment=ENVIRONMENT)
    assert shown.returncode == 0
    line = next(line for line in shown.stdout.splitlines() if "epochs: 7" in line)
    assert line.endswith("# command line")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_command_of_the_readme_learns_the_digits(tmp_path):
    trained = python(TRAIN, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert float(trained.stdout.splitlines()[-1].split()[1]) >= 98.0


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_without_losing_a_bit(tmp_path):
    argv = [*QUICK, "--epochs", "4", "--ema-decay", "0.9", "--checkpoint-every", "4"]
    whole = python(TRAIN, *argv, "--processes", "2", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for rank in (0, 1):
        name = f"killed-{rank}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node=2", "--max-restarts=1", str(TRAIN)]
        process = subprocess.Popen([*launcher, *argv, "--out", name], cwd=tmp_path)
        while not list((tmp_path / name / "ckpt").glob("step-00000012*")):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(_worker(process.pid, rank), signal.SIGKILL)
        assert process.wait(120) == 0
        ends = [checkpoint.latest(tmp_path / run / "ckpt") for run in ("whole", name)]
        files = [checkpoint.read_meta(end)["files"] for end in ends]
        for weights in ("model.safetensors", "ema.safetensors"):
            assert files[0][weights] == files[1][weights]


def _worker(launcher: int, rank: int) -> int:
    """The process of `rank` among the launcher's children."""
    with open(f"/proc/{launcher}/task/{launcher}/children") as children:
        workers = [int(pid) for pid in children.read().split()]
    for pid in workers:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            if f"RANK={rank}".encode() in environ.read().split(b"\0"):
                return pid
    raise AssertionError(f"no rank {rank} among {workers}")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--compile"], ["--grad-checkpointing"]])
def test_compilation_and_recomputation_learn_too(tmp_path, argv):
    words = ["--model", "shvit_s1", "--epochs", "2", "--batch-size", "64", *argv]
    trained = python(TRAIN, *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert float(trained.stdout.splitlines()[-1].split()[1]) >= 60.0
