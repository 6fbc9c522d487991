"""Everything that is injected, a test each; `python -m tests.faults` counts the same."""

import functools
import json

import pytest

from tests.faults import __main__ as script
from tests.faults import files, hub
from tests.faults.figures import FIGURES, Figure, Score
from tests.faults.lab import Outcome, shared_lab

BY_NAME = {figure.name: figure for figure in FIGURES}
# of the flipped bits there is one test for all; test_training.py has the others
CASES = [
    (figure.name, name)
    for figure in FIGURES
    if figure.suite in ("hub", "files") and figure.name != "F10"
    for name in figure.names
]


@functools.cache
def outcomes(figure: str) -> dict[str, Outcome]:
    return BY_NAME[figure].run(shared_lab())


@pytest.mark.parametrize(("figure", "name"), CASES)
def test_survived(figure, name):
    assert outcomes(figure)[name].failure == ""


def test_flipped_bits_are_found():
    assert len(outcomes("F10")) == 1000
    assert [outcome.failure for outcome in outcomes("F10").values() if outcome.failure] == []


def test_figures_count_what_they_say():
    assert len(hub.CASES) == 28
    assert len(files.THIRTY) == 30
    assert not files.THIRTY.keys() & files.MORE.keys()


FAKE = Figure(
    *("F0", "hub", "made up", ("good", "bad", "slow")),
    run=lambda lab: {
        "good": Outcome(),
        "bad": Outcome("loads, silently"),
        "slow": Outcome(seconds=9.0, bytes=5_000_000),
    },
    seconds=1.0,
)


def test_score():
    score = Score("F0", "made up", seconds=3.0)
    score.add(FAKE, FAKE.run(None))
    assert list(score.lines()) == [
        "F0 1/3 survived (made up; 3 s, slowest 9.00 s, at most 5 MB)",
        "  bad: loads, silently",
        "  slow: takes 9.0 s, at most 1.0 s",
    ]


@pytest.mark.parametrize("names", [("good",), ("good", "bad")])
def test_script(names, tmp_path, monkeypatch, capsys):
    fake = Figure("F0", "hub", "made up", names, FAKE.run)
    monkeypatch.setattr(script, "Lab", _NoLab)
    monkeypatch.setattr(script, "FIGURES", (fake,))
    path = tmp_path / "out.json"
    failed = len(names) - 1
    assert script.main(["--suite", "hub", "--json", str(path), "--trials", "2"]) == failed
    assert script.main(["--figure", "F0", "--json", str(path), "--trials", "2"]) == failed
    (figure,) = json.loads(path.read_text())["figures"]
    assert (figure["injected"], figure["survived"]) == (2 * len(names), 2)
    assert [each["name"] for each in figure["failures"]] == ["bad"] * 2 * failed
    assert f"F0 2/{2 * len(names)} survived" in capsys.readouterr().out


class _NoLab:
    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass
