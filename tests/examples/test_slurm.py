"""The batch script, with stand-ins for SLURM's programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from tests.support.process import ROOT

SCRIPT = ROOT / "examples" / "slurm.sh"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi',
    "srun": 'echo $$ > step; cd "$CHECKOUT" && exec "$@"',
    "scancel": 'kill -TERM "$(cat step)"',
}


def _start(folder, *argv):
    for name, body in STUBS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "x"}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", SCRIPT, *map(str, argv)],
        cwd=folder,
        env={**os.environ, **job, "PATH": path, "CHECKOUT": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_script_is_well_formed_and_wants_a_folder(tmp_path):
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    job = _start(tmp_path, "--epochs", 1)
    text, _ = job.communicate(timeout=20)
    assert job.returncode == 2 and text.startswith("error: add --out FOLDER")


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_is_queued_again(tmp_path):
    out = tmp_path / "run"
    argv = ["--model", "test_byobnet", "--epochs", 2, "--batch-size", 64, "--workers", 0]
    argv += ["--checkpoint-every", 2, "--out", out]
    first = _start(tmp_path, *argv)
    while not (out / "ckpt" / "step-00000004").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    first.communicate(timeout=60)
    assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    second = _start(tmp_path, *argv)
    text, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "resuming" in text, text
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
