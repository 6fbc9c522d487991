"""F4: checkpoints whose writing is interrupted, at any byte and at any change of the disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from backbones.training import checkpoint
from backbones.training.run_folder import RunFolder
from tests.faults.lab import Case, Lab
from tests.faults.sabotage import break_writes
from tests.support.runs import run

# saved before the fault; then: step 2, again with its evaluation, and 3 and 4, which delete others
_BEGUN, _STEPS, _BEST = 1, (2, 2, 3, 4), 2
# what changes a disk, beside writing to files
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
_KILLS, _FULL = 50, 20


def _state(step: int) -> checkpoint.Checkpoint:
    weights = {f"w{number}": torch.full((40, 50), float(step)) for number in range(3)}
    return checkpoint.Checkpoint(weights, weights, {"step": torch.tensor(step)}, {})


def _save_all(folder: RunFolder) -> None:
    for step in _STEPS:
        folder.save(step, _state(step), _BEST)


def save_and_die(argv: Sequence[str]) -> int:
    """Save in `out`; killed after so many bytes, at so many events, or not: then count them."""
    (what, place), folder, events = argv, RunFolder(Path("out")), [0]
    folder.create()
    folder.save(_BEGUN, _state(_BEGUN), _BEST)

    def count(event: str, args: object) -> None:
        if event in _EVENTS:
            events[0] += 1
            if what == "event" and events[0] > int(place):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if what == "byte":
        break_writes("kill", int(place))
    _save_all(folder)
    size = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    Path("counts.json").write_text(json.dumps({"event": events[0] - 1, "byte": size}))
    return 0


def _counts(lab: Lab) -> dict[str, int]:
    folder = lab.folder / "counted"
    if not folder.exists():
        run(save_and_die, "none", 0, folder=folder)
    return json.loads((folder / "counts.json").read_text())


def _killed(what: str, number: int, lab: Lab) -> str:
    """Kill a process that saves checkpoints at one of `_KILLS` places."""
    folder = lab.folder / f"saves-{what}-{number}"
    place = number * _counts(lab)[what] // _KILLS
    done = run(save_and_die, what, place, folder=folder)
    if done.code != -signal.SIGKILL:
        return f"was not killed at {what} {place}: {done}"
    return _damage(RunFolder(folder / "out"))


def _damage(folder: RunFolder) -> str:
    """Why the newest checkpoint is not whole, or the next save does not clean up."""
    path = checkpoint.latest(folder.checkpoints)
    if path is None:
        return "no checkpoint is left"
    step = checkpoint.read_meta(path)["step"]
    if not torch.equal(checkpoint.load(path).model["w0"], _state(step).model["w0"]):
        return f"{path} holds other weights"
    if (
        not folder.save(9, _state(9), _BEST)
        or checkpoint.load(checkpoint.latest(folder.checkpoints) or path).meta["step"] != 9
    ):
        return "cannot save any more"
    left = [path.name for path in folder.checkpoints.iterdir() if path.name[:5] != "step-"]
    return f"{left} are left behind" if left else ""


def _full(number: int, lab: Lab) -> str:
    """Fill the disk after some bytes of a checkpoint, by a file that says so."""
    folder = RunFolder(lab.folder / f"full-{number}")
    folder.create()
    folder.save(_BEGUN, _state(_BEGUN), _BEST)
    plain = checkpoint.open_for_write
    break_writes("full", number * _counts(lab)["byte"] // _FULL)
    try:
        _save_all(folder)
    finally:
        checkpoint.open_for_write = plain
    return _damage(folder)


def _really_full(number: int, lab: Lab) -> str:
    """Fill a small file system up to some free pages, and save there."""
    with _small_disk(lab.folder / f"disk-{number}") as disk:
        if disk is None:
            return _full(number, lab)
        folder, ballast = RunFolder(disk / "run"), disk / "ballast"
        folder.create()
        folder.save(_BEGUN, _state(_BEGUN), _BEST)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(free - 4096 * (number - _FULL // 2)))
        if folder.save(2, _state(2), _BEST):
            return "the disk was not full"
        ballast.unlink()
        return _damage(folder)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 1 MB; none where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    mounted = (
        sys.platform == "linux"
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _numbered(text: str, function: Callable[..., str], numbers: range) -> dict[str, Case]:
    return {f"{text} {number}": partial(function, number) for number in numbers}


CASES: dict[str, Case] = (
    _numbered("killed at change", partial(_killed, "event"), range(_KILLS))
    | _numbered("killed at byte", partial(_killed, "byte"), range(_KILLS))
    | _numbered("disk full by report", _full, range(_FULL // 2))
    | _numbered("disk full", _really_full, range(_FULL // 2, _FULL))
)
