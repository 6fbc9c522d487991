"""F5: losses and gradients that are not finite."""

from __future__ import annotations

from functools import partial

from tests.faults.lab import Case, Lab
from tests.faults.sabotage import Fault
from tests.faults.trained import (
    SMALL,
    STEPS,
    difference,
    faulty,
    finite,
    log,
    one_line,
    processes,
    states,
    status,
    whole,
)

_TWO = (*SMALL, *processes(2), "--max-skips", "3")


def _skipped(fault: Fault, lab: Lab) -> str:
    """Spoil one step in one process: none takes it, and the run goes on."""
    folder = lab.folder / f"nonfinite-{fault.kind}-{fault.step}"
    done = faulty(folder, _TWO, fault)
    if done.code or done.err:
        return f"exit code {done.code}: {done.err}"
    for rank in range(2):
        skipped = [line["step"] for line in log(folder, rank) if not line["finite"]]
        if skipped != [fault.step]:
            return f"rank {rank} skips {skipped}, not step {fault.step}"
    if int(states(folder / "out")["step"]) != STEPS:
        return "the end is not saved, as its evaluation was not finite"
    return "" if finite(folder / "out") else "the checkpoint is not finite"


def _overflow(lab: Lab) -> str:
    """Scale the loss by too much for float16: steps are skipped until the scale fits."""
    folder = lab.folder / "overflow"
    done = faulty(folder, [*_TWO, "--max-skips", "9", "--amp", "fp16"], Fault("loss scale", 0))
    if done.code:
        return f"exit code {done.code}: {done.err}"
    skipped = [line["step"] for line in log(folder) if not line["finite"]]
    if not skipped or skipped != list(range(len(skipped))) or len(skipped) == STEPS:
        return f"skips {skipped}, not the first steps"
    return "" if finite(folder / "out") else "the checkpoint is not finite"


def _diverged(lab: Lab) -> str:
    """Train with a learning rate of 1e30."""
    folder = lab.folder / "diverged"
    argv = [*_TWO, "--epochs", "9", "--lr", "1e30", "--clip", "none", "--checkpoint-every", "1"]
    done = faulty(folder, argv)
    if done.code != 3 or "3 steps in a row" not in done.err:
        return f"exit code {done.code}: {done.err}"
    return one_line(done) or ("" if finite(folder / "out") else "the checkpoint is not finite")


def _persistent(lab: Lab) -> str:
    """Spoil every step from one on: the run ends, and goes on from its last good checkpoint."""
    folder = lab.folder / "persistent"
    done = faulty(folder, _TWO, Fault("NaN image", 6, 1, last=99))
    if done.code != 3 or status(folder / "out")["state"] != "failed":
        return f"exit code {done.code}: {done.err}"
    if wrong := one_line(done):
        return wrong
    rest = faulty(folder, _TWO)
    return rest.err or difference(folder / "out", whole(lab, 2))


CASES: dict[str, Case] = {
    "NaN image in one process": partial(_skipped, Fault("NaN image", 3, 1)),
    "infinite loss in one process": partial(_skipped, Fault("infinite loss", 6, 0)),
    "NaN gradient in one process": partial(_skipped, Fault("NaN gradient", 2, 1)),
    "NaN in the second micro-batch": partial(_skipped, Fault("NaN in the second micro-batch", 4)),
    "NaN image at the last step": partial(_skipped, Fault("NaN image", STEPS - 1, 0)),
    "learning rate of 1e30": _diverged,
    "overflow of float16": _overflow,
    "NaN at every step": _persistent,
}
