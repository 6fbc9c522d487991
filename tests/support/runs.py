"""Runs of train.py and validate.py in forked processes: as from a shell, without the imports.

They are forked from a server that has only imported the programs: a child of pytest itself would
inherit the threads of every backward pass that earlier tests have made.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Program = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    out: str
    err: str


_SERVER = multiprocessing.get_context("forkserver")
# what the programs import late: the first step of an optimizer and the picture take seconds
_SERVER.set_forkserver_preload(
    ["backbones.training.commands", "torch._dynamo", "matplotlib.figure", "pytest", __name__]
)


class Run:
    """A running program; its stdout and stderr go to files in `folder`.

    Args:
        program: A function of a module, so that another process finds it.
        argv: Its command line.
        folder: Its working folder, made if need be.
    """

    def __init__(self, program: Program, argv: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / "stdout.txt", folder / "stderr.txt"]
        argv = [str(word) for word in argv]
        self.process = _SERVER.Process(target=_main, args=(program, argv, folder, self._files))
        self.process.start()

    def wait_for(self, path: Path, timeout: float = 60) -> None:
        """Wait until `path` exists."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.is_alive(), f"the run ended before {path}: {self.finish()}"
            assert time.monotonic() < end, f"no {path} after {timeout} s"
            time.sleep(0.002)

    def finish(self, timeout: float = 120) -> Finished:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s")
        out, err = (path.read_text() for path in self._files)
        return Finished(self.process.exitcode or 0, out, err)


def run(program: Program, *argv: object, folder: Path, timeout: float = 120) -> Finished:
    """Run `program` in `folder` to its end."""
    return Run(program, [str(word) for word in argv], folder).finish(timeout)


def _main(program: Program, argv: Sequence[str], folder: Path, files: Sequence[Path]) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    # the server's start method is not the one that a program finds by default
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    try:
        code = program(argv)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
