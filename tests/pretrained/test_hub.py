"""`hf-hub:` locations through the real huggingface_hub client, against the stand-in hub.

All calls are made once, by a few processes at a time; each test looks at what came out of one.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

from backbones.pretrained import WeightsError, load_weights
from backbones.pretrained import hub as hub_module
from tests.pretrained.client import Client
from tests.pretrained.forge import Command, pth
from tests.support.hub_server import Hub

FILE = "model.safetensors"
# name -> fault, method, how often: what the client or our retries survive
SURVIVED = {
    "truncated once": ("truncate", "GET", 1),
    "reset once": ("reset", "GET", 1),
    "HEAD reset once": ("reset", "HEAD", 1),
    "HEAD closed once": ("close", "HEAD", 1),
    "429 once": ("429", "GET", 1),
    "503 once": ("503", "GET", 1),
    "HEAD 500 once": ("500", "HEAD", 1),
}
# name -> fault, method, what the message says
FATAL = {
    "truncated": ("truncate", "GET", r"closed connection.*set HF_ENDPOINT to a mirror"),
    "short": ("short", "GET", "Consistency check failed"),
    "page": ("html", "GET", "Consistency check failed"),
    "503": ("503", "GET", "503 Service Unavailable"),
    "gated": ("gated", "HEAD", r"GatedRepoError.*accept the terms.*HF_TOKEN"),
}
# name -> fault of every later HEAD, when the file is in the cache already
WARM = {"reset": "reset", "closed": "close", "500": "500", "hang": "hang"}


@dataclass
class Run:
    """What came out of all calls, and what the hub saw of them."""

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: dict[str, Counter[str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def sum(self, name: str) -> float:
        assert "sum" in self.outcomes[name], self.outcomes[name]
        return self.outcomes[name]["sum"]

    def message(self, name: str) -> str:
        assert self.outcomes[name].get("error") == "WeightsError", self.outcomes[name]
        message = self.outcomes[name]["message"]
        assert "\n" not in message and len(message) < 700
        return message


def call(repo: str, revision: str = "", **kwargs: Any) -> dict[str, Any]:
    return {"location": f"hf-hub:t/{repo.replace(' ', '-')}{revision}", **kwargs}


def publish(hub: Hub, name: str, data: bytes, *fault: Any) -> str:
    repo = f"t/{name.replace(' ', '-')}"
    if fault:
        hub.fail(f"{repo}/{FILE}", *fault)
    return hub.add(repo, {FILE: data, "config.json": b"{}"})


def publish_all(hub: Hub, data: bytes) -> None:
    for name, fault in SURVIVED.items():
        publish(hub, name, data, *fault)
    for name, (kind, method, _) in FATAL.items():
        publish(hub, name, data, kind, method)
    for name in ("plain", "rot", *(f"warm {name}" for name in WARM)):
        publish(hub, name, data)
    publish(hub, "flip", data, "corrupt", "GET", 1)
    hub.add("timm/shvit_s1.in1k", {FILE: data})
    hub.add("t/bin", {"pytorch_model.bin": pth({"w": torch.ones(5)})})
    hub.add("t/code", {"pytorch_model.bin": pth({"model": Command("exit 1")})})
    hub.add("t/empty", {"README.md": b"no weights"})


def rot(home: Path) -> None:
    """Flip a bit of the cached file of the repository "rot"."""
    (path,) = (home / "hub" / "models--t--rot" / "blobs").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Run:
    home, result = tmp_path_factory.mktemp("home"), Run()
    publish_all(hub, data)
    pinned = publish(hub, "pinned", data)
    cold = {name: call(name) for name in (*SURVIVED, *FATAL) if name != "truncated"}
    cold |= {name: call(name) for name in ("plain", "flip", "bin", "code", "empty", "absent")}
    cold |= {
        "pinned": call("pinned", f"@{pinned}"),
        "revision": call("plain", "@v9"),
        "filename": call("plain", filename="other.safetensors"),
        "escape": call("plain", filename="../../../etc/passwd"),
        "hash": call("plain", sha256="1234"),
        "official": {"location": "shvit_s1.in1k"},
    }
    again = {"flip again": call("flip"), "rot again": call("rot"), "truncated": call("truncated")}
    environment = {"HF_HOME": str(home)}
    with (
        Client(HF_ENDPOINT="http://127.0.0.1:9", **environment) as gone,
        Client(HF_ENDPOINT=hub.endpoint, **environment) as client,
    ):
        gone.send({"gone cold": call("never seen")})
        result.outcomes |= client.run(cold | {f"warm {k}": call(f"warm {k}") for k in WARM})
        result.outcomes |= client.run({"rot": call("rot")})
        rot(home)
        for name, kind in WARM.items():
            hub.fail(f"t/warm-{name}/{FILE}", kind, "HEAD")
        warm = {f"warm {name}": call(f"warm {name}") for name in WARM}
        warm |= {"pinned": call("pinned", f"@{pinned}"), "rot": call("rot")}
        result.outcomes |= client.run(warm)
        result.outcomes |= client.run(again)
        result.outcomes |= gone.receive()
        result.outcomes |= gone.run({"gone warm": call("plain")})
    with Client(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1", **environment) as offline:
        result.outcomes |= offline.run(
            {"offline": call("plain"), "offline bin": call("bin"), "offline cold": call("no")}
        )
    for name in ("plain", "pinned"):
        result.requests[name] = hub.requests(f"t/{name}/{FILE}")
    result.files = [path.name for path in home.rglob("*")]
    return result


@pytest.fixture(scope="module")
def total(weights: dict[str, Any]) -> float:
    return sum(float(value.sum()) for value in weights.values())


@pytest.mark.parametrize("name", [*SURVIVED, "plain", "official"])
def test_loads(run, total, name):
    assert run.sum(name) == total


@pytest.mark.parametrize("name", FATAL)
def test_fails_in_one_line(run, name):
    message = run.message(name)
    assert re.search(FATAL[name][2], message)
    assert f"hf-hub:t/{name}" in message and "127.0.0.1" in message


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("absent", ["RepositoryNotFoundError", "check the name"]),
        ("revision", ["t/plain@v9", "Invalid rev id: v9", "check the revision"]),
        ("filename", ["other.safetensors", "Entry Not Found", "with filename="]),
        ("empty", ["pytorch_model.bin", "Entry Not Found", "with filename="]),
        ("escape", ["'..' path segment"]),
        ("hash", ["is not the file asked for", "expected 1234"]),
        ("code", ["posix.system", "not executed"]),
    ],
)
def test_what_is_not_there_or_not_right(run, name, parts):
    message = run.message(name)
    assert all(part in message for part in parts), message


def test_other_file_name(run):
    assert run.sum("bin") == 5


@pytest.mark.parametrize("name", ["flip", "rot"])
def test_flipped_bit_is_found_and_forgotten(run, total, name):
    assert f"hf-hub:t/{name}/{FILE} is damaged: its sha256 is" in run.message(name)
    assert run.sum(f"{name} again") == total


@pytest.mark.parametrize("name", WARM)
def test_cache_serves_when_the_hub_does_not(run, total, name):
    assert run.sum(f"warm {name}") == total


def test_pinned_revision_is_asked_for_once(run, total):
    assert run.sum("pinned") == total
    assert run.requests["pinned"] == {"HEAD": 1, "GET": 1}


def test_hub_that_is_gone(run, total):
    assert run.sum("gone warm") == total
    assert "check the connection and try again, set HF_ENDPOINT" in run.message("gone cold")


def test_offline(run, total):
    assert run.sum("offline") == total
    assert run.sum("offline bin") == 5
    assert "HF_HUB_OFFLINE is set and" in run.message("offline cold")


def test_disk_that_is_full(monkeypatch, tmp_path):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub_module, "hf_hub_download", full)
    with pytest.raises(WeightsError, match=f"No space left.*make {tmp_path} writable and free"):
        load_weights("hf-hub:t/plain", cache_dir=tmp_path)


def test_nothing_half_written_is_left(run):
    assert not [name for name in run.files if name.endswith((".incomplete", ".partial"))]


def test_snapshot_of_a_whole_repository(hub, tmp_path, data):
    commit = hub.add("t/snapshot", {FILE: data, "config.json": b"{}"})
    folder = snapshot_download("t/snapshot", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert Path(folder).name == commit
    assert (Path(folder) / FILE).read_bytes() == data
    assert (Path(folder) / "config.json").read_bytes() == b"{}"
