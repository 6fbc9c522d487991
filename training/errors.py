"""What ends a run early, and the exit code that says so.

| code | meaning |
|---|---|
| 0 | done |
| 2 | bad usage, settings or data |
| 3 | diverged: too many non-finite steps in a row |
| 4 | out of memory, or a loading process was killed |
| 5 | storage: disk full, or the folder cannot be written |
| 6 | another process of the run is gone or hangs |
| 75 | interrupted by a signal, progress saved: start the same command again |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch


class RunError(Exception):
    """A run that ends with one line on stderr and `exit_code`."""

    exit_code = 1


class UsageError(RunError, ValueError):
    """The settings, the data or the weights cannot be used."""

    exit_code = 2


class DivergedError(RunError):
    """The loss or the gradient stayed non-finite."""

    exit_code = 3


class OutOfMemoryError(RunError):
    """The model and its batch do not fit."""

    exit_code = 4


class WorkerError(RunError):
    """A loading process was killed, twice in a row or while the model was computing."""

    exit_code = 4
    SIGN = "DataLoader worker (pid"


class StorageError(RunError):
    """The run folder cannot be written."""

    exit_code = 5


class LostProcessError(RunError):
    """Another process does not answer.

    Args:
        message: Which, and where.
        speaks: Whether this process is the one that reports it.
    """

    exit_code = 6

    def __init__(self, message: str, *, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


class InterruptedRunError(RunError):
    """A signal asked for the end; the state is saved."""

    exit_code = 75


_MEMORY_ADVICE = (
    "out of memory: use a smaller --batch-size, or --accumulate 2 (same batch, half the memory), "
    "--amp bf16, --grad-checkpointing, or a smaller --img-size"
)
_WORKER_ADVICE = (
    "a loading process was killed, most likely because the memory is full: use fewer --workers or "
    "a smaller --batch-size, and start the same command again to go on from the last checkpoint"
)


def run_command(command: Callable[[], None]) -> int:
    """Run `command`, print what ended it in one line, and return the exit code.

    Only the first process of a distributed run prints; an unexpected error keeps its traceback.

    Args:
        command: The program, already given its arguments.
    """
    try:
        command()
    except RunError as error:
        return _report(error)
    except (torch.OutOfMemoryError, MemoryError):
        return _report(OutOfMemoryError(_MEMORY_ADVICE))
    except RuntimeError as error:
        if WorkerError.SIGN in str(error):
            return _report(WorkerError(_WORKER_ADVICE))
        if "can't allocate memory" not in str(error):
            raise
        return _report(OutOfMemoryError(_MEMORY_ADVICE))
    return 0


def _report(error: RunError) -> int:
    if getattr(error, "speaks", os.environ.get("RANK", "0") == "0"):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return error.exit_code
