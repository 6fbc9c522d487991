"""Loading in processes of its own: HF_ENDPOINT and HF_HUB_OFFLINE are read at import.

One process imports torch; forks of it set these variables and import the rest; forks of those make
a call each, so that a call can be killed, can lose its rights, and leaves nothing to the next one.
None of them really waits between attempts.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 0.01
STALL_SECONDS = 0.3
CALL_SECONDS = 60


class Processes:
    """Everything that loads, for use in a `with` statement."""

    def __enter__(self) -> Processes:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.client"],
            cwd=ROOT,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # its forks end with it
        self._process.communicate()

    def send(self, batch: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(batch), file=self._process.stdin, flush=True)

    def receive(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True)
class Client:
    """Processes that load weights and models under the same environment.

    A call is a mapping: `do` says what ("file": `hub_file`, "weights": `load_weights`, "model":
    `backbones.create_model`, "timm": `timm.create_model`), `arguments` with what. In its fork,
    `environment` holds variables that are set, `file_limit` says how many bytes it may write to a
    file, `restricted` that it may not write where the modes of files forbid it, even as root.

    Attributes:
        processes: Where they are forked; one batch at a time.
        environment: Variables that they see beside this process's own.
    """

    processes: Processes
    environment: dict[str, str]

    def send(self, calls: dict[str, dict[str, Any]], parallel: int = 4) -> None:
        """Start a batch of calls, so many at a time."""
        self.processes.send([self.environment, calls, parallel])

    def receive(self) -> dict[str, dict[str, Any]]:
        """Wait for a batch: name -> what `_outcome` says of it, or the signal that `killed` it."""
        return self.processes.receive()

    def run(self, calls: dict[str, dict[str, Any]], parallel: int = 4) -> dict[str, dict[str, Any]]:
        """Send a batch and wait for it."""
        self.send(calls, parallel)
        return self.receive()


def digest(state_dict: Mapping[str, Tensor], but: tuple[str, ...] = ()) -> str:
    """A hash of names and values, whatever their type and order.

    Args:
        state_dict: Tensors by name.
        but: Prefixes of names to leave out.
    """
    result = hashlib.sha256()
    for name in sorted(name for name in state_dict if not name.startswith(but or ("\0",))):
        result.update(name.encode() + state_dict[name].float().numpy().tobytes())
    return result.hexdigest()


def _load(do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import timm

    import backbones
    from backbones.pretrained import load_weights
    from backbones.pretrained.hub import hub_file

    if do == "file":
        file = hub_file(**arguments)
        return {"name": file.path.name, "recorded": file.recorded, "revision": file.revision}
    if do == "weights":
        return {"digest": digest(load_weights(**arguments))}
    create = {"model": backbones.create_model, "timm": timm.create_model}[do]
    model = create(arguments.pop("name"), pretrained=True, **arguments)
    state_dict = model.state_dict()
    # what neither another number of classes nor of channels changes
    body = digest(state_dict, ("head.", "patch_embed.0."))
    kind = type(model).__module__
    return {"digest": digest(state_dict), "body": body, "class": kind, "classes": model.num_classes}


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _outcome(do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `_load` says, or `error` and `message`; `lines` logged, `seconds` and `bytes` taken."""
    log = _Lines()
    logging.getLogger("backbones").addHandler(log)
    logging.getLogger("backbones").setLevel(logging.INFO)
    before, start = _peak(), time.monotonic()
    try:
        outcome = _load(do, arguments)
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    seconds, peak = time.monotonic() - start, _peak() - before
    return outcome | {"lines": log.lines, "seconds": seconds, "bytes": peak}


def _peak() -> int:
    """The most memory that this process has held since it was forked, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def obey_modes() -> None:
    """Give up root's right to read and write everywhere (CAP_DAC_*), by capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for i in range(3):  # effective, permitted, inherited
        sets[i] &= ~(1 << 1 | 1 << 2)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _child(call: dict[str, Any], pipe: int) -> None:
    signal.alarm(CALL_SECONDS)
    os.environ.update(call.get("environment", {}))
    if limit := call.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if call.get("restricted") and os.geteuid() == 0:
        obey_modes()
    answer = json.dumps(_outcome(call["do"], call["arguments"]))
    os.write(pipe, answer.encode())


def _fork(call: dict[str, Any]) -> tuple[int, int]:
    """The process that makes a call, and where it will answer."""
    here, there = os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        return pid, here
    try:
        _child(call, there)
    finally:
        os._exit(0)


def _run(calls: dict[str, dict[str, Any]], parallel: int) -> dict[str, dict[str, Any]]:
    waiting, running, outcomes = list(calls), {}, {}
    while waiting or running:
        while waiting and len(running) < parallel:
            name = waiting.pop(0)
            pid, pipe = _fork(calls[name])
            running[pipe] = name, pid
        for pipe in select.select(list(running), [], [])[0]:
            name, pid = running.pop(pipe)
            with os.fdopen(pipe) as answer:
                text = answer.read()
            status = os.waitpid(pid, 0)[1]
            outcomes[name] = json.loads(text) if text else {"killed": os.WTERMSIG(status)}
    return {name: outcomes[name] for name in calls}


def _hurry() -> None:
    """Shorten all waits between attempts, the client's of the hub included."""
    from backbones.pretrained import hub

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds * PATIENCE)
    hub._STALL_SECONDS = STALL_SECONDS


def _serve_calls(lines: IO[str], answers: IO[str], environment: dict[str, str]) -> None:
    """Make the calls of every line under an environment."""
    os.environ.update(environment)
    import timm  # noqa: F401

    import backbones  # noqa: F401

    _hurry()
    for line in lines:
        print(json.dumps(_run(*json.loads(line))), file=answers, flush=True)


def _branch(environment: dict[str, str]) -> tuple[IO[str], IO[str]]:
    """A fork that serves calls under an environment: where it listens and where it answers."""
    (lines, to_it), (from_it, answers) = os.pipe(), os.pipe()
    if os.fork():
        os.close(lines), os.close(answers)
        return os.fdopen(to_it, "w"), os.fdopen(from_it)
    try:
        os.close(to_it), os.close(from_it)
        _serve_calls(os.fdopen(lines), os.fdopen(answers, "w"), environment)
    finally:
        os._exit(0)


def main() -> None:
    """Answer batches from the standard input until it ends."""
    import torchvision  # noqa: F401

    branches: dict[str, tuple[IO[str], IO[str]]] = {}
    for line in sys.stdin:
        environment, *batch = json.loads(line)
        key = json.dumps(environment)
        if key not in branches:
            branches[key] = _branch(environment)
        print(json.dumps(batch), file=branches[key][0], flush=True)
        print(branches[key][1].readline(), end="", flush=True)


if __name__ == "__main__":
    main()
