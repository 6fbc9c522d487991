"""Some of what is injected into training runs; `python -m tests.faults --suite train` does it all.

Those that are slow here are whole figures in the script: see `FIGURES`.
"""

from __future__ import annotations

import pytest

from tests.faults import endless, images, kills, nonfinite, resources, saves, stops, usage
from tests.faults.figures import FIGURES
from tests.faults.lab import shared_lab


def _some(cases, *numbers):
    names = list(cases)
    return [(cases[names[number]], names[number]) for number in numbers]


QUICK = [
    *_some(kills.ONE_PROCESS, 1, 12),
    *_some(stops.CASES, 4),
    *_some(saves.CASES, *range(0, 120, 7)),
    *_some(nonfinite.CASES, 1),
    *_some(images.CASES, *range(len(images.CASES))),
    *_some(resources.CASES, 2),
    # two kinds of every part, and those that meet data, weights and runs
    *_some(usage.CASES, *range(0, len(usage.CASES), 4)),
]
SLOW = [
    *_some(kills.TWO_PROCESSES, 0, 1, 2),
    *_some(stops.CASES, 6),
    *_some(nonfinite.CASES, 5, 6, 7),
    *_some(endless.LEAKS, 2, 3),
    *_some(endless.TWICE, 0),
    *_some(endless.RESIZED, 0),
    *_some(resources.CASES, 4, 5),
]


@pytest.mark.parametrize(("case", "name"), QUICK, ids=[name for _, name in QUICK])
def test_survived(case, name):
    assert case(shared_lab()) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), SLOW, ids=[name for _, name in SLOW])
def test_survived_slowly(case, name):
    assert case(shared_lab()) == ""


def test_figures_count_what_they_say():
    counts = {figure.name: len(figure.names) for figure in FIGURES}
    for name, count in (("F1", 20), ("F2", 20), ("F3", 10), ("F4", 120), ("F5", 8), ("F15", 3)):
        assert counts[name] == count
    assert counts["F6"] >= 30 and counts["F7"] >= 40 and counts["F16"] == 3
