"""F3: signals that ask a run to stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from backbones.training import checkpoint
from tests.faults.lab import Case, Lab
from tests.faults.sabotage import Fault
from tests.faults.trained import (
    SMALL,
    STEPS,
    difference,
    faulty,
    launch,
    log,
    one_line,
    processes,
    status,
    whole,
)


def _stopped(fault: Fault, count: int, torchrun: bool, lab: Lab) -> str:
    """Stop a run by a signal during a step, and start it again."""
    folder = lab.folder / f"stopped-{fault.kind}-{fault.rank}-{count}-{torchrun}"
    argv = [*SMALL, *processes(count)]
    done = launch(folder, SMALL, fault) if torchrun else faulty(folder, argv, fault)
    # torchrun's own exit code is 1 whatever that of its processes
    if done.code != (1 if torchrun else 75):
        return f"exit code {done.code}: {done.err[-2000:]}"
    wrong = "" if torchrun else one_line(done)
    # the signal comes within a step, and is heard before the next or after it
    wrong = wrong or _unsaved(folder / "out", log(folder)[-1]["step"] + 1)
    if log(folder)[-1]["step"] > fault.step + 1:
        wrong = f"heard only after {log(folder)[-1]}"
    if wrong:
        return wrong
    rest = faulty(folder, argv)
    if rest.code:
        return f"does not go on: {rest.err}"
    for rank in range(count):
        if [line["step"] for line in log(folder, rank)] != list(range(STEPS)):
            return f"rank {rank} has taken other steps: {log(folder, rank)}"
    return difference(folder / "out", whole(lab, count))


def _unsaved(out: Path, step: int) -> str:
    saved = checkpoint.latest(out / "ckpt")
    said = status(out)
    if saved is None or checkpoint.read_meta(saved)["step"] != step:
        return f"step {step} is lost: {saved} is the newest checkpoint"
    if (said["state"], said["step"]) != ("interrupted", step):
        return f"status.json says {said}"
    return ""


_ONE = {
    f"{name} to one process": partial(_stopped, Fault(name, step), 1, False)
    for name, step in (("SIGTERM", 3), ("SIGINT", 4), ("SIGUSR1", 6))
}
_TWO = {
    "SIGTERM to the first of two": partial(_stopped, Fault("SIGTERM", 2, 0), 2, False),
    "SIGUSR1 to the second of two": partial(_stopped, Fault("SIGUSR1", 5, 1), 2, False),
    "SIGINT to both of two": partial(_stopped, Fault("SIGINT", 0), 2, False),
}
_TORCHRUN = {
    "SIGTERM to torchrun": partial(_stopped, Fault("SIGTERM to the agent", 2, 0), 2, True),
    "SIGINT to torchrun": partial(_stopped, Fault("SIGINT to the agent", 6, 1), 2, True),
    "SIGTERM to rank 1 under torchrun": partial(_stopped, Fault("SIGTERM", 7, 1), 2, True),
    "SIGUSR1 to rank 0 under torchrun": partial(_stopped, Fault("SIGUSR1", 1, 0), 2, True),
}
CASES: dict[str, Case] = _ONE | _TWO | _TORCHRUN
