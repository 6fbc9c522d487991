"""F1, F2: killed processes, and the runs that go on from what they have left."""

from __future__ import annotations

import random
import signal
from functools import partial

from tests.faults.lab import Case, Lab
from tests.faults.sabotage import Fault
from tests.faults.trained import SMALL, STEPS, difference, faulty, launch, processes, whole

# what a checkpoint of this model takes, roughly
_CHECKPOINT = 3_200_000


def _killed(fault: Fault, workers: int, lab: Lab) -> str:
    """Kill a run of one process, and start it again with other loading processes."""
    folder = lab.folder / f"killed-{fault.step}-{fault.bytes}"
    argv = [*SMALL, *processes(1), "--workers"]
    first = faulty(folder, [*argv, 2 - workers], fault)
    if first.code != -signal.SIGKILL:
        return f"was not killed: {first}"
    rest = faulty(folder, [*argv, workers])
    if rest.code:
        return f"does not go on: {rest.err}"
    return difference(folder / "out", whole(lab, 1))


def _one_process() -> dict[str, Case]:
    """Ten kills at a step, ten while a checkpoint is written."""
    draw, cases = random.Random(0), {}
    for number, step in enumerate(draw.sample(range(STEPS), 10)):
        workers = number % 3
        cases[f"at step {step}, then {workers} workers"] = partial(
            _killed, Fault("kill", step), workers
        )
    for number in range(10):
        place, workers = draw.randrange(5 * _CHECKPOINT), number % 3
        cases[f"after {place} bytes of checkpoints, then {workers} workers"] = partial(
            _killed, Fault("kill", bytes=place), workers
        )
    return cases


def _restarted(number: int, step: int, lab: Lab) -> str:
    """Kill a process of two under torchrun, which starts both again."""
    folder, rank = lab.folder / f"restarted-{number}", number % 2
    done = launch(folder, SMALL, Fault("kill", step, rank), restarts=1)
    if done.code or "exitcode: -9" not in done.err:
        return f"exit code {done.code}: {done.err[-2000:]}"
    return difference(folder / "out", whole(lab, 2))


def _two_processes() -> dict[str, Case]:
    draw = random.Random(1)
    return {
        f"{number}: rank {number % 2} at step {step}": partial(_restarted, number, step)
        for number, step in enumerate(draw.choices(range(STEPS), k=20))
    }


ONE_PROCESS = _one_process()
TWO_PROCESSES = _two_processes()
