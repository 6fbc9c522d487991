from __future__ import annotations

import io
import sys

import pytest

from backbones.training import console
from backbones.training.console import Console, duration


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_a_minute_has_one_line(clock, capsys):
    told = Console(True, 50)
    for step in range(1, 21):
        clock[0] += 10
        told.advance("epoch 1/2", step, "loss 1.000")
        if step == 8:
            told.say("a line of something else")
    # after 60 s; then 60 s after the other line, which came after 80 s
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 6/50  loss 1.000",
        "a line of something else",
        "epoch 1/2  step 14/50  loss 1.000",
        "epoch 1/2  step 20/50  loss 1.000",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", _Terminal())
    told = Console(True, 50)
    for step in range(1, 21):
        clock[0] += 10
        told.advance("epoch 1/2", step, "loss 1.000, left 0:30")
    # the steps of the test are faster than its eye
    told._bar.refresh()
    shown = sys.stderr.getvalue()
    assert "epoch 1/2:" in shown and "20/50" in shown and "loss 1.000, left 0:30" in shown
    told.clear()
    assert capsys.readouterr().out == ""


def test_only_the_first_process_speaks(clock, capsys):
    silent = Console(False, 50)
    clock[0] += 100
    silent.advance("epoch 1/2", 1, "loss 1.000")
    silent.say("line")
    assert capsys.readouterr() == ("", "")


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36_061)] == [
        "0:00", "1:00", "1:01", "1:00:00", "10:01:01",
    ]  # fmt: skip
