"""`load_weights` in processes of their own: HF_ENDPOINT and HF_HUB_OFFLINE are read at import.

A client takes batches of calls, runs each batch at once, and answers with what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """A process that loads weights, for use in a `with` statement.

    Args:
        **environment: Variables that it sees beside this process's own.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = environment

    def __enter__(self) -> Client:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pretrained.client"],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | self._environment,
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
        self._process.kill()
        self._process.communicate()

    def send(self, calls: dict[str, dict[str, Any]]) -> None:
        """Start a batch: name -> arguments of `load_weights`."""
        assert self._process.stdin is not None
        print(json.dumps(calls), file=self._process.stdin, flush=True)

    def receive(self) -> dict[str, dict[str, Any]]:
        """Wait for a batch: name -> `sum` of all tensors, or `error` and `message`; `seconds`."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Send a batch and wait for it."""
        self.send(calls)
        return self.receive()


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    from backbones.pretrained import load_weights

    start = time.monotonic()
    try:
        state_dict = load_weights(**arguments)
        outcome = {"sum": sum(float(value.sum()) for value in state_dict.values())}
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    return outcome | {"seconds": time.monotonic() - start}


def main() -> None:
    """Answer batches from the standard input until it ends."""
    with ThreadPoolExecutor(32) as pool:
        for line in sys.stdin:
            calls = json.loads(line)
            outcomes = pool.map(_call, calls.values())
            print(json.dumps(dict(zip(calls, outcomes, strict=True))), flush=True)


if __name__ == "__main__":
    main()
