"""A training program in which something goes wrong at a known step of a known process.

`train_with` runs train.py with faults, in a fork (`tests/support/runs.py`); as a module under
torchrun it takes them from the variable `FAULTS`.
"""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from backbones.training import checkpoint
from backbones.training.commands import train
from backbones.training.engine import Engine

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        kind: A key of `AT_STEP`, or "kill" or "full" after some bytes.
        step: Before which step, from 0.
        rank: In which process; none: in all.
        last: The last step at which it happens, where it is not the first.
        bytes: After how many bytes of checkpoints, instead of at a step.
    """

    kind: str
    step: int = -1
    rank: int | None = None
    last: int | None = None
    bytes: int | None = None

    def hits(self, step: int, rank: int) -> bool:
        """Whether it happens now."""
        last = self.step if self.last is None else self.last
        return self.step <= step <= last and self.rank in (None, rank)


def train_with(faults: Sequence[Fault], argv: Sequence[str]) -> int:
    """Run train.py with faults; the steps of each process are logged in `steps-RANK.jsonl`."""
    _break_steps([fault for fault in faults if fault.bytes is None])
    for fault in faults:
        if fault.bytes is not None:
            break_writes(fault.kind, fault.bytes)
    return train(argv)


def with_faults(*faults: Fault) -> Callable[[Sequence[str]], int]:
    """`train_with` as a program of `tests/support/runs.py`."""
    return functools.partial(train_with, faults)


def as_variable(*faults: Fault) -> dict[str, str]:
    """The environment that tells this module under torchrun what goes wrong."""
    return {"FAULTS": json.dumps([asdict(fault) for fault in faults])}


def break_writes(kind: str, limit: int) -> None:
    """End the process ("kill") or fill the disk ("full") after `limit` bytes of checkpoints."""
    plain, left = checkpoint.open_for_write, [limit]

    def open_for_write(path: Path) -> Any:
        return _Breaking(plain(path), kind, left)

    checkpoint.open_for_write = open_for_write


class _Breaking:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: IO[bytes], kind: str, left: list[int]) -> None:
        self._file, self._kind, self._left = file, kind, left

    def __enter__(self) -> _Breaking:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        written = self._file.write(data[: self._left[0]])
        self._left[0] -= written
        if written < len(data):
            self._file.flush()
            if self._kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        return written


def _break_steps(faults: Sequence[Fault]) -> None:
    plain_step, plain_loss = Engine.step, Engine._loss
    now: list[Fault] = []

    def step(engine: Engine, batches: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        rank = engine.world.rank
        now[:] = [fault for fault in faults if fault.hits(number, rank)]
        for fault in now:
            AT_STEP[fault.kind](engine, batches)
        agreed = plain_step(engine, batches, number, *args, **kwargs)
        line = {"step": number, "loss": agreed.loss, "finite": agreed.finite}
        with Path(f"steps-{rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        return agreed

    def loss(engine: Engine, *args: Any) -> Any:
        value = plain_loss(engine, *args)
        return value * INF if any(fault.kind == "infinite loss" for fault in now) else value

    Engine.step, Engine._loss = step, loss  # type: ignore[method-assign, assignment]


def _kill(engine: Engine, batches: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(number: int, agent: bool = False) -> Callable[[Engine, Any], None]:
    return lambda engine, batches: os.kill(os.getppid() if agent else os.getpid(), number)


def _spoil_image(value: float, micro: int = 0) -> Callable[[Engine, Any], None]:
    return lambda engine, batches: batches[micro][0][0].fill_(value)


def _spoil_gradient(engine: Engine, batches: Any) -> None:
    parameter = next(p for p in engine.model.parameters() if p.requires_grad)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * NAN

    handle = parameter.register_hook(spoil)


def _scale(engine: Engine, batches: Any) -> None:
    # what a GPU uses with --amp fp16, so much too large that gradients overflow
    engine._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)


def _raise(error: Callable[[], Exception]) -> Callable[[Engine, Any], None]:
    def act(engine: Engine, batches: Any) -> None:
        raise error()

    return act


def _kill_loader(engine: Engine, batches: Any) -> None:
    multiprocessing.active_children()[0].kill()


def watch() -> None:
    """Log the memory and the open files of this process in `memory.jsonl`."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(list(Path("/proc/self/fd").iterdir()))
    with Path("memory.jsonl").open("a") as file:
        print(json.dumps({"bytes": pages * os.sysconf("SC_PAGESIZE"), "files": files}), file=file)


AT_STEP: dict[str, Callable[[Engine, Any], None]] = {
    "kill": _kill,
    "infinite loss": lambda engine, batches: None,
    "NaN image": _spoil_image(NAN),
    "infinite image": _spoil_image(INF),
    "NaN in the second micro-batch": _spoil_image(NAN, 1),
    "NaN gradient": _spoil_gradient,
    "loss scale": _scale,
    "watch": lambda engine, batches: watch(),
    "kill a loading process": _kill_loader,
    "out of GPU memory": _raise(lambda: torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
    "out of memory": _raise(MemoryError),
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
    "SIGUSR1": _signal(signal.SIGUSR1),
    "SIGTERM to the agent": _signal(signal.SIGTERM, agent=True),
    "SIGINT to the agent": _signal(signal.SIGINT, agent=True),
}


if __name__ == "__main__":
    # a restarted attempt runs as it should
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    given = json.loads(os.environ.get("FAULTS", "[]")) if first else []
    sys.exit(train_with([Fault(**each) for each in given], sys.argv[1:]))
