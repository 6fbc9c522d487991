"""Files of the hub through the real client; what goes wrong there is in tests/faults."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import WeakFileLock

from tests.faults.client import digest
from tests.faults.lab import Lab, shared_lab
from tests.pretrained.forge import pth

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return shared_lab()


@pytest.fixture
def publish(lab, data, request):
    """Put files into a repository of this test's own; its name."""
    repo_id = f"t/{request.node.name.replace('[', '.').strip(']')}"

    def add(**files: bytes) -> str:
        named = {name.replace("__", "."): content for name, content in files.items()}
        lab.hub.add(repo_id, named or {FILE: data, "config.json": b"{}"})
        return repo_id

    return add


@pytest.fixture
def find(lab):
    """What `hub_file` finds."""

    def call(repo_id: str, **arguments: Any) -> dict[str, Any]:
        arguments["repo_id"] = repo_id
        return lab.online.run({"": {"do": "file", "arguments": arguments}})[""]

    return call


@pytest.fixture
def load(lab):
    def call(location: str, **arguments: Any) -> dict[str, Any]:
        arguments["location"] = f"hf-hub:{location}"
        return lab.online.run({"": {"do": "weights", "arguments": arguments}})[""]

    return call


def message(outcome: dict[str, Any]) -> str:
    assert outcome.get("error") == "WeightsError", outcome
    assert "\n" not in outcome["message"] and len(outcome["message"]) < 700
    return outcome["message"]


def test_hashes_and_commit_of_a_file(lab, publish, find, data):
    repo_id = publish()
    commit = lab.cache(repo_id) / "refs" / "main"
    file = find(repo_id)
    assert file["recorded"] == hashlib.sha256(data).hexdigest()
    assert file["revision"] == commit.read_text() and len(file["revision"]) == 40
    small = find(repo_id, filename="config.json")
    assert small["recorded"] == hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert small["revision"] == file["revision"]


def test_file_that_is_chosen(publish, find):
    repo_id = publish(pytorch_model__bin=b"1", model__safetensors__index__json=b"2")
    assert find(repo_id)["name"] == "model.safetensors.index.json"
    assert find(repo_id, filename="pytorch_model.bin")["name"] == "pytorch_model.bin"


def test_file_that_is_cached_is_asked_for_first(lab, publish, load):
    repo_id, weights = publish(pytorch_model__bin=pth({"w": torch.ones(5)})), {"w": torch.ones(5)}
    for _ in range(2):
        assert load(repo_id)["digest"] == digest(weights)
    assert lab.hub.requests(f"{repo_id}/pytorch_model.bin") == {"HEAD": 2, "GET": 1}


@pytest.mark.parametrize("ask", [False, True])
def test_newer_version(lab, publish, find, data, ask):
    repo_id = publish()
    first = find(repo_id)
    publish(model__safetensors=data + b"\0")
    before = lab.hub.total()
    second = find(repo_id, ask=ask)
    assert (second["revision"] != first["revision"]) == ask
    assert (second["recorded"] != first["recorded"]) == ask
    assert (lab.hub.total() > before) == ask


def test_commit_costs_no_request_once_it_is_cached(lab, publish, find, load, weights):
    repo_id = publish()
    commit = find(repo_id)["revision"]
    before = lab.hub.total()
    assert load(f"{repo_id}@{commit}")["digest"] == digest(weights)
    assert lab.hub.total() == before


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("/x", {}, ["HFValidationError", "write hf-hub:org/repo"]),
        ("", {"filename": "other.safetensors"}, ["other.safetensors", "choose a file"]),
        ("", {"filename": "../../../etc/passwd"}, ["'..' path segment", "no .. in filename"]),
        ("", {"sha256": "1234"}, ["is not the file asked for", "expected 1234"]),
    ],
)
def test_what_is_not_there_or_not_right(publish, load, name, arguments, words):
    text = message(load(publish(config__json=b"{}", model__safetensors=b"1") + name, **arguments))
    assert all(word in text for word in words), text


def test_cache_that_rots(lab, publish, load, weights):
    repo_id = publish()
    load(repo_id)
    (path,) = (lab.cache(repo_id) / "blobs").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert f"hf-hub:{repo_id}/{FILE} is damaged: its sha256 is" in message(load(repo_id))
    assert load(repo_id)["digest"] == digest(weights)


@pytest.mark.parametrize("busy", [False, True])
def test_remains_of_a_killed_process(lab, publish, find, busy):
    repo_id = publish()
    file = find(repo_id)
    folder = lab.cache(repo_id)
    partial = folder / "blobs" / f"{file['recorded']}.01234567.incomplete"
    partial.touch()
    lock = folder.parent / ".locks" / folder.name / f"{file['recorded']}.lock"
    if busy:
        with WeakFileLock(lock):
            find(repo_id)
    else:
        find(repo_id)
    assert partial.exists() == busy


def test_snapshot_of_a_whole_repository(lab, publish, tmp_path, data):
    repo_id = publish()
    folder = snapshot_download(repo_id, endpoint=lab.hub.endpoint, cache_dir=tmp_path)
    assert (Path(folder) / FILE).read_bytes() == data
    assert (Path(folder) / "config.json").read_bytes() == b"{}"
