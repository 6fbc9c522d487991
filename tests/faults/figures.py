"""The figures of reliability: what is injected for each, and how it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from tests.faults import (
    crowd,
    endless,
    files,
    flips,
    hub,
    images,
    kills,
    local,
    nonfinite,
    offline,
    resources,
    saves,
    stops,
    usage,
)
from tests.faults.lab import Case, Lab, Outcome
from tests.faults.trained import whole


@dataclass(frozen=True)
class Figure:
    """A number of injections that are counted together.

    Attributes:
        name: As in the list of figures, if it is there.
        suite: What it belongs to, one of `SUITES`.
        title: What is injected.
        names: Of the injections.
        run: Makes them all.
        seconds: How long each may take, where that is part of the figure.
    """

    name: str
    suite: str
    title: str
    names: tuple[str, ...]
    run: Callable[[Lab], dict[str, Outcome]]
    seconds: float | None = None


def independent(
    name: str,
    suite: str,
    title: str,
    cases: Mapping[str, Case],
    seconds: float | None = None,
    prepare: Callable[[Lab], object] = lambda lab: None,
) -> Figure:
    """A figure whose injections are made one after the other.

    Args:
        name: As in the list of figures.
        suite: What it belongs to.
        title: What is injected.
        cases: Each makes an injection and says why it was not survived; empty if it was.
        seconds: How long each may take.
        prepare: Makes before what all of them need.
    """

    def run(lab: Lab) -> dict[str, Outcome]:
        prepare(lab)
        return {case: _inject(cases[case], lab) for case in cases}

    return Figure(name, suite, title, tuple(cases), run, seconds)


def _inject(case: Case, lab: Lab) -> Outcome:
    start = time.monotonic()
    try:
        failure = case(lab)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return Outcome(failure, time.monotonic() - start)


SUITES = ("hub", "files", "train", "usage")
FIGURES = (
    independent("F1", "train", "kills of a run, then other workers", kills.ONE_PROCESS),
    independent(
        *("F2", "train", "kills of one of two, under torchrun", kills.TWO_PROCESSES),
        seconds=60,
        prepare=partial(whole, count=2),
    ),
    independent("F3", "train", "signals to stop", stops.CASES),
    independent("F4", "train", "kills and full disks while saving", saves.CASES),
    independent("F5", "train", "losses and gradients not finite", nonfinite.CASES),
    independent("F6", "train", "odd and broken images", images.CASES),
    independent("F7", "usage", "misuse of the programs", usage.CASES),
    Figure("F8", "hub", "faults of the hub", hub.NAMES, hub.run),
    Figure(
        *("F9", "files", "broken and hostile files", tuple(files.THIRTY)),
        partial(files.run, files=files.THIRTY),
        seconds=2.0,
    ),
    Figure(
        *("F9+", "files", "more of them", tuple(files.MORE)),
        partial(files.run, files=files.MORE),
        seconds=2.0,
    ),
    Figure("F10", "files", "single flipped bits, hash known", flips.NAMES, flips.run),
    Figure("F11", "hub", "eight processes at once", crowd.NAMES, crowd.run),
    Figure(
        "F12", "hub", "families offline, warm cache", offline.OFFLINE_NAMES, offline.run_offline
    ),
    Figure(
        *("F13", "hub", "loads, hub silent, warm cache", offline.STALL_NAMES),
        offline.run_stalled,
        seconds=1.0,
    ),
    independent("F14", "train", "long runs, leaks", endless.LEAKS),
    independent("F15", "train", "the same command twice", endless.TWICE),
    independent("F16", "train", "other numbers of processes", endless.RESIZED),
    independent("memory", "train", "no memory, no room, dead loading processes", resources.CASES),
    Figure("other", "files", "models, types, shards and disks", local.NAMES, local.run),
)


@dataclass
class Score:
    """What came of the injections of a figure."""

    figure: str
    title: str
    injected: int = 0
    survived: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    largest_bytes: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, figure: Figure, outcomes: dict[str, Outcome]) -> None:
        """Count the outcomes of a run."""
        for name in figure.names:
            outcome = outcomes[name]
            failure = outcome.failure
            if figure.seconds is not None and outcome.seconds > figure.seconds:
                failure += f" takes {outcome.seconds:.1f} s, at most {figure.seconds} s"
            self.injected += 1
            self.survived += not failure
            self.slowest_seconds = max(self.slowest_seconds, outcome.seconds)
            self.largest_bytes = max(self.largest_bytes, outcome.bytes)
            if failure:
                self.failures.append({"name": name, "message": failure.strip()})

    def lines(self) -> Iterable[str]:
        """What the script prints: the figure, then whatever was not survived."""
        worst = f", slowest {self.slowest_seconds:.2f} s" if self.slowest_seconds else ""
        worst += f", at most {self.largest_bytes / 1e6:.0f} MB" if self.largest_bytes else ""
        count = f"{self.survived}/{self.injected} survived"
        yield f"{self.figure} {count} ({self.title}; {self.seconds:.0f} s{worst})"
        yield from (f"  {each['name']}: {each['message']}" for each in self.failures)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)
