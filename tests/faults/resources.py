"""What else ends a training run: no memory, full disks, dead loading processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from backbones.training import checkpoint
from backbones.training.commands import train
from tests.faults.lab import Case, Lab
from tests.faults.sabotage import Fault
from tests.faults.trained import (
    SMALL,
    difference,
    faulty,
    one_line,
    processes,
    status,
    whole,
)
from tests.support.runs import run

_ARGV = (*SMALL, *processes(1))


def _ended(fault: Fault, code: int, says: str, lab: Lab) -> str:
    """End a run in one line, and start it again."""
    folder = lab.folder / f"{fault.kind}-{fault.bytes}"
    done = faulty(folder, [*_ARGV, "--workers", "1"], fault)
    if done.code != code or says not in done.err:
        return f"exit code {done.code}: {done.err}"
    if wrong := one_line(done):
        return wrong
    # on a full disk there is no room to say so
    if fault.kind != "full" and status(folder / "out")["state"] != "failed":
        return f"status.json says {status(folder / 'out')}"
    rest = faulty(folder, _ARGV)
    return rest.err if rest.code else difference(folder / "out", whole(lab, 1))


def _survived(fault: Fault, says: str, lab: Lab) -> str:
    """Go on after a fault, to the same bits."""
    folder = lab.folder / f"{fault.kind}-{fault.last}-survived"
    done = faulty(folder, [*_ARGV, "--workers", "2"], fault)
    if done.code or says not in done.out:
        return f"exit code {done.code}: {done.out} {done.err}"
    return difference(folder / "out", whole(lab, 1))


def train_without_room_for(name: str, argv: Sequence[str]) -> int:
    """Run train.py where files of the run folder called `name` cannot be written any more."""
    plain, seen = checkpoint.open_for_write, set[str]()

    def open_for_write(path):  # type: ignore[no-untyped-def]
        if path.name == f".tmp-{name}" and name in seen:
            raise OSError(28, "No space left on device")
        seen.add(path.name.removeprefix(".tmp-"))
        return plain(path)

    checkpoint.open_for_write = open_for_write
    return train(argv)


def _no_room(name: str, lab: Lab) -> str:
    folder = lab.folder / f"no-room-{name}"
    done = run(partial(train_without_room_for, name), *_ARGV, "--out", "out", folder=folder)
    if done.code != 5 or name not in done.err:
        return f"exit code {done.code}: {done.err}"
    if wrong := one_line(done):
        return wrong
    rest = faulty(folder, _ARGV)
    return rest.err if rest.code else difference(folder / "out", whole(lab, 1))


_KILLED = "a loading process was killed"
CASES: dict[str, Case] = {
    "no memory on the GPU": partial(
        _ended, Fault("out of GPU memory", 3), 4, "smaller --batch-size"
    ),
    "no memory": partial(_ended, Fault("out of memory", 3), 4, "smaller --batch-size"),
    "a loading process is killed": partial(_survived, Fault("kill a loading process", 3), _KILLED),
    "loading processes are killed twice": partial(
        _survived, Fault("kill a loading process", 2, last=3), _KILLED
    ),
    "no room for a checkpoint": partial(
        _ended, Fault("full", bytes=9_000_000), 5, "MiB are free: make room"
    ),
    "no room for metrics.csv": partial(_no_room, "metrics.csv"),
    "no room for status.json": partial(_no_room, "status.json"),
}
