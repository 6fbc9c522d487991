"""F11: eight processes that load the same file at once, and one that is killed at it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.faults.client import digest
from tests.faults.lab import Lab, Outcome, partial_files

CROWD = 8
_FILE = "model.safetensors"
_WEIGHTS = {"w": torch.arange(300_000.0)}


def _publish(lab: Lab, source: str, name: str) -> tuple[str, str]:
    """Where the weights lie, and the server's key of them."""
    if source == "the hub":
        lab.hub.add(f"f11/{name}", {_FILE: save(_WEIGHTS)})
        return f"hf-hub:f11/{name}", f"f11/{name}/{_FILE}"
    key = f"f11-{name}.safetensors"
    return lab.hub.add_plain(key, save(_WEIGHTS)), key


_SOURCES = ("the hub", "a URL")
NAMES = tuple(
    f"{what}, {source}"
    for source in _SOURCES
    for what in ("eight cold", "eight warm", "downloader killed")
)


def run(lab: Lab) -> dict[str, Outcome]:
    """Load in eight processes from each source: cold, warm, and with the first of them killed."""
    failures = {}
    for source in _SOURCES:
        location, key = _publish(lab, source, "crowd")
        folder = lab.folder / f"crowd of {source}"
        for what in ("eight cold", "eight warm"):
            outcomes = lab.online.run(_calls(location, folder), CROWD)
            failures[f"{what}, {source}"] = _judge(outcomes, CROWD) or _left(lab, key, 1, folder)
        location, key = _publish(lab, source, "killed")
        folder = lab.folder / f"killed at {source}"
        lab.hub.fail(key, "stall", times=1)
        lab.online.send(_calls(location, folder), CROWD)
        _kill_downloader(folder)
        failure = _judge(lab.online.receive(), CROWD - 1) or _left(lab, key, 2, folder)
        failures[f"downloader killed, {source}"] = failure
    return {name: Outcome(failure) for name, failure in failures.items()}


def _calls(location: str, folder: Path) -> dict[str, dict[str, Any]]:
    arguments = {"location": location, "cache_dir": str(folder)}
    return {str(i): {"do": "weights", "arguments": arguments} for i in range(CROWD)}


def _judge(outcomes: dict[str, dict[str, Any]], expected: int) -> str:
    """Why not all that should have loaded the weights did."""
    loaded = [outcome.get("digest") for outcome in outcomes.values()]
    if loaded.count(digest(_WEIGHTS)) == expected:
        return ""
    others = [outcome for outcome in outcomes.values() if "digest" not in outcome]
    return f"{loaded.count(digest(_WEIGHTS))} of {expected} load the weights: {others}"


def _left(lab: Lab, key: str, gets: int, folder: Path) -> str:
    """Why the server's log or the cache is not what it should be."""
    if (found := lab.hub.requests(key)["GET"]) != gets:
        return f"{found} downloads instead of {gets}"
    kept = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    large = [path for path in kept if path.stat().st_size > 1000]
    if partial := partial_files(folder):
        return f"leaves {partial}"
    valid = [path for path in large if path.read_bytes() == save(_WEIGHTS)]
    return "" if len(large) == len(valid) == 1 else f"keeps {[path.name for path in large]}"


def _kill_downloader(folder: Path) -> None:
    """Kill the process that is writing a partial file under a folder."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for partial in partial_files(folder):
            if pid := _writer(partial):
                time.sleep(0.2)  # let the others line up behind it
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.01)


def _writer(name: str) -> int | None:
    """The process that has a file of this name open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if Path(os.readlink(link)).name == name:
                return int(link.parts[2])
        except OSError:
            continue
    return None
