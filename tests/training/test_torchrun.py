"""Runs under torchrun, as on several machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.process import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def _node(folder, port, *argv):
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-id", "test"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    # the agents' own address: the name of a machine need not lead to it
    launch += ["--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*TORCHRUN, *launch, str(ROOT / "train.py"), *map(str, argv)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _worker(agent):
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return next(pid for pid, command in commands.items() if "train.py" in command)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_nodes_train_with_fsdp2_and_survive_a_killed_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--model", "test_byobnet", "--epochs", 2, "--batch-size", 128, "--workers", 0]
    argv += ["--parallel", "fsdp2", "--checkpoint-every", 2, "--out", "out"]
    nodes = [_node(tmp_path, port, *argv) for _ in range(2)]
    while not (tmp_path / "out" / "ckpt" / "step-00000004").exists():
        assert all(node.poll() is None for node in nodes), [node.communicate() for node in nodes]
        time.sleep(0.05)
    os.kill(_worker(nodes[1]), signal.SIGKILL)
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert any("resuming out at step" in text for text in texts), texts
    assert any("no answer from process" in text and " at step " in text for text in texts), texts
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "done"
