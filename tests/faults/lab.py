"""Where faults are injected: a stand-in hub, a host that never answers, and processes that load."""

from __future__ import annotations

import atexit
import functools
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults.client import Client, Processes
from tests.support.hub_server import Hub

# a model of our own that is as small as can be
NARROW: dict[str, Any] = {
    "embed_dim": (32, 48, 72),
    "depth": (1, 1, 2),
    "partial_dim": (16, 16, 19),
}
PARTIAL = (".incomplete", ".partial")


@dataclass(frozen=True)
class Outcome:
    """What came of an injection.

    Attributes:
        failure: Why it was not survived; empty if it was.
        seconds: How long it took, where that matters.
        bytes: How much memory it took, where that matters.
    """

    failure: str = ""
    seconds: float = 0.0
    bytes: int = 0


class SilentHost:
    """A host that accepts connections and never answers, for use in a `with` statement.

    Attributes:
        connections: How many there were.
    """

    def __enter__(self) -> SilentHost:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connections(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Refuse connections from now on."""
        if self._socket.fileno() >= 0:
            # the thread that waits in accept() keeps the port open until it is woken
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        try:
            while True:
                self._open.append(self._socket.accept()[0])
        except OSError:
            return


class Lab:
    """A folder, and, from when they are asked for, a hub and the processes that load from it.

    Args:
        folder: An empty folder for everything that is written.
        real_models: Whether models of every family have their real size; they are narrow otherwise.
        trial: Seed of what is left to chance.
    """

    def __init__(self, folder: Path, real_models: bool = False, trial: int = 0) -> None:
        self.folder, self.real_models, self.trial = folder, real_models, trial
        self.home = folder / "home"
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @functools.cached_property
    def hub(self) -> Hub:
        """The stand-in hub."""
        return self._stack.enter_context(Hub(self.folder / "server"))

    @functools.cached_property
    def _processes(self) -> Processes:
        return self._stack.enter_context(Processes())

    @property
    def online(self) -> Client:
        """A process that the hub answers."""
        return self._client(HF_ENDPOINT=self.hub.endpoint)

    @property
    def offline(self) -> Client:
        """A process that is told to make no request, though the hub would answer."""
        return self._client(HF_ENDPOINT=self.hub.endpoint, HF_HUB_OFFLINE="1")

    def client_of(self, host: SilentHost) -> Client:
        """A process that takes another host for the hub."""
        return self._client(HF_ENDPOINT=host.endpoint)

    def _client(self, **environment: str) -> Client:
        environment |= {"HF_HOME": str(self.home), "TORCH_HOME": str(self.folder / "torch")}
        return Client(self._processes, environment)

    def cache(self, repo_id: str) -> Path:
        """Where the hub's client keeps a repository."""
        return self.home / "hub" / f"models--{repo_id.replace('/', '--')}"


def partial_files(folder: Path) -> list[str]:
    """Names of half-written files under a folder."""
    return [path.name for path in folder.rglob("*") if path.name.endswith(PARTIAL)]


def judge(outcome: dict[str, Any], says: tuple[str, ...], digest: str = "", body: str = "") -> str:
    """Why what came of a call is not what it should be; empty if it is.

    Args:
        outcome: Of the call.
        says: Regular expressions, all of which its error must match; without any it must load.
        digest: What it must have loaded then.
        body: Likewise, without classifier and first convolution.
    """
    if "error" not in outcome and "digest" not in outcome:
        return f"not finished: {outcome}"
    if not says:
        if "error" in outcome:
            return f"does not load: {outcome['message']}"
        wrong = (digest and outcome["digest"] != digest) or (body and outcome["body"] != body)
        return "loads other weights, silently" if wrong else ""
    if "error" not in outcome:
        return "loads, silently"
    message = outcome["message"]
    if outcome["error"] != "WeightsError" or "\n" in message or len(message) > 700:
        return f"is no WeightsError of one line: {outcome['error']}: {message}"
    missing = [word for word in says if not re.search(word, message)]
    return f"does not say {missing}: {message}" if missing else ""


@functools.cache
def shared_lab() -> Lab:
    """A lab for all tests of this process; every test publishes under names of its own."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return stack.enter_context(Lab(Path(folder)))


# makes an injection; says why it was not survived, nothing if it was
Case = Callable[[Lab], str]
