"""Runs of train.py and validate.py in forked processes: as from a shell, without the imports."""

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


class Run:
    """A running program; its stdout and stderr go to files beside `folder`."""

    def __init__(self, program: Program, argv: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / "stdout.txt", folder / "stderr.txt"]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._main, args=(program, argv, folder))
        self.process.start()

    def _main(self, program: Program, argv: Sequence[str], folder: Path) -> None:
        for number, path in enumerate(self._files, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        # pytest's own streams do not end in these files
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        torch.set_num_threads(1)
        try:
            code = program([str(word) for word in argv])
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

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


def run(program: Program, *argv: object, folder: Path) -> Finished:
    """Run `program` in `folder` to its end."""
    return Run(program, [str(word) for word in argv], folder).finish()
