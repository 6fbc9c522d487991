from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from backbones.training import checkpoint
from backbones.training.checkpoint import Checkpoint
from backbones.training.errors import StorageError, UsageError
from backbones.training.run_folder import RunFolder


def _state(value: float) -> Checkpoint:
    weights = {"weight": torch.full((40, 30), value), "count": torch.tensor(int(value))}
    optim = {"state": {0: {"exp_avg": torch.full((40, 30), -value)}}, "groups": [{"lr": 0.1}]}
    return Checkpoint(weights, {"weight": weights["weight"] / 2}, optim, {"progress": {"x": value}})


def _value(path) -> float:
    loaded = checkpoint.load(path)
    value = float(loaded.meta["progress"]["x"])
    assert torch.equal(loaded.model["weight"], torch.full((40, 30), value))
    assert torch.equal(loaded.optim["state"][0]["exp_avg"], torch.full((40, 30), -value))
    return value


class _FailingFile:
    """Passes `budget` bytes on, then calls `fail`."""

    budget = 0

    def __init__(self, path, fail):
        self._file, self._fail = path.open("wb"), fail

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        part = data[: _FailingFile.budget]
        _FailingFile.budget -= len(part)
        self._file.write(part)
        if len(part) < len(data):
            self._file.flush()
            self._fail()
        return len(data)


def _disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def _inject(monkeypatch, fail, budget):
    monkeypatch.setattr(_FailingFile, "budget", budget)
    monkeypatch.setattr(checkpoint, "open_for_write", lambda path: _FailingFile(path, fail))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = checkpoint.save(tmp_path, 12, _state(3.0))
    assert path.name == "step-00000012" and _value(path) == 3.0
    assert torch.equal(checkpoint.load(path).ema["weight"], torch.full((40, 30), 1.5))
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors", "ema.safetensors", "optim.pt", "meta.json",
    }  # fmt: skip
    assert checkpoint.read_meta(path)["step"] == 12


def test_the_newest_counts_and_a_step_can_be_saved_again(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step, value in ((5, 1.0), (10, 2.0), (10, 3.0), (100, 4.0)):
        checkpoint.save(tmp_path, step, _state(value))
    assert _value(checkpoint.latest(tmp_path)) == 4.0
    assert _value(checkpoint.find(tmp_path, 10)) == 3.0
    checkpoint.prune(tmp_path, {10, 100})
    assert len(list(tmp_path.iterdir())) == 2
    assert _value(checkpoint.find(tmp_path, 10)) == 3.0


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "meta", "format"])
def test_damage_is_named_with_its_remedy(tmp_path, damage):
    path = checkpoint.save(tmp_path, 1, _state(1.0))
    weights, meta = path / "model.safetensors", path / "meta.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    elif damage == "meta":
        meta.write_text(meta.read_text()[:50])
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
    remedy = "another checkpoint format" if damage == "format" else "delete this folder"
    with pytest.raises(UsageError, match=remedy):
        checkpoint.load(path)


@pytest.mark.parametrize("part", np.linspace(0, 0.999, 20))
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, part):
    first = checkpoint.save(tmp_path, 1, _state(1.0))
    size = sum(path.stat().st_size for path in first.iterdir())
    _inject(monkeypatch, _disk_full, int(part * size))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, _state(2.0))
    checkpoint.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [first] and _value(checkpoint.latest(tmp_path)) == 1.0


def test_a_kill_at_any_byte_leaves_a_loadable_checkpoint(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, _state(1.0))
    size = sum(path.stat().st_size for path in first.iterdir())

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save(budget):
        _inject(monkeypatch, die, budget)
        checkpoint.save(tmp_path, 2, _state(2.0))

    for budget in np.linspace(0, size - 1, 24).astype(int):
        process = multiprocessing.get_context("fork").Process(target=save, args=(int(budget),))
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        assert _value(checkpoint.latest(tmp_path)) == 1.0
    checkpoint.save(tmp_path, 2, _state(2.0))
    assert _value(checkpoint.latest(tmp_path)) == 2.0 and len(list(tmp_path.iterdir())) == 2


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    def save_on_and_on():
        for step in range(1, 100_000):
            checkpoint.save(tmp_path, step, _state(float(step)))
            checkpoint.prune(tmp_path, {step})

    checkpoint.save(tmp_path, 1, _state(1.0))
    newest = []
    for delay in np.linspace(0.05, 0.1, 10):
        process = multiprocessing.get_context("fork").Process(target=save_on_and_on)
        process.start()
        process.join(delay)
        process.kill()
        process.join()
        newest.append(_value(checkpoint.latest(tmp_path)))
    assert max(newest) > 1


def test_nothing_is_unpickled(tmp_path):
    path = checkpoint.save(tmp_path, 1, _state(1.0))
    assert torch.load(path / "optim.pt", weights_only=True)["groups"] == [{"lr": 0.1}]


def test_a_run_goes_on_without_a_checkpoint_only_if_it_has_an_older_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.create()
    assert folder.save(1, _state(1.0), best_step=1)
    _inject(monkeypatch, _disk_full, 100)
    assert not folder.save(2, _state(2.0), best_step=1)
    assert _value(checkpoint.latest(folder.checkpoints)) == 1.0
    checkpoint.prune(folder.checkpoints, ())
    with pytest.raises(StorageError, match="MiB are free"):
        folder.save(3, _state(3.0), best_step=0)
