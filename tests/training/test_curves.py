from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from backbones.training import curves
from backbones.training.curves import Curves, draw_confusion, draw_curves
from backbones.training.run_folder import Row


def _row(epoch, top1_ema=None, **values):
    values = {"top1": 90.0 + epoch / 3, "images_per_s": 123.4, "wait_percent": 1.5} | values
    return Row(
        epoch=epoch, step=22 * epoch, lr=0.1 / 3, train_loss=1 / epoch, val_loss=2 / epoch,
        top5=99.0, top1_ema=top1_ema, skipped=0, bad_images=0, seconds=10.0 * epoch, **values,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that drawing moves by two seconds, and a list of the epochs drawn."""
    now, drawn = [1000.0], []

    def draw(rows, title, path):
        drawn.append(len(rows))
        now[0] += 2

    monkeypatch.setattr(curves.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(curves, "draw_curves", draw)
    return now, drawn


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_curves_are_drawn_for_any_number_of_epochs(tmp_path, epochs):
    rows = [_row(epoch, 50.0) for epoch in range(1, epochs + 1)]
    draw_curves(rows, "title", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1320, 418)
        assert len(picture.convert("RGB").getcolors(100_000) or []) > 50


def test_drawing_takes_a_twentieth_of_the_time_at_most(clock, tmp_path):
    now, drawn = clock
    kept, rows = Curves(tmp_path, "title"), []
    for epoch in range(1, 11):
        now[0] += 15
        rows.append(_row(epoch))
        kept.update(rows)
    # after the first epoch; then 40 s of other work must have passed
    assert drawn == [1, 4, 7, 10]
    kept.finish(rows)
    assert drawn == [1, 4, 7, 10]
    kept.finish([*rows, _row(11)])
    assert drawn[-1] == 11


def test_long_epochs_are_drawn_each(clock, tmp_path):
    now, drawn = clock
    kept = Curves(tmp_path, "title")
    for epoch in range(1, 4):
        now[0] += 41
        kept.update([_row(1)] * epoch)
    assert drawn == [1, 2, 3]


def test_tensorboard_gets_a_scalar_per_column(clock, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Curves(tmp_path, "title")
    for epoch in (1, 2, 3):
        first.update([_row(epoch)])
    # a run that was interrupted after its second epoch goes on
    Curves(tmp_path, "title").update([_row(3, top1=12.5)])
    log = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [(point.step, point.value) for point in log.Scalars("top1")] == [
        (22, pytest.approx(90 + 1 / 3)), (44, pytest.approx(90 + 2 / 3)), (66, 12.5),
    ]  # fmt: skip
    assert "top1_ema" not in log.Tags()["scalars"] and "lr" in log.Tags()["scalars"]


def test_a_run_needs_neither_tensorboard_nor_room_for_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    kept = Curves(tmp_path, "title")
    kept.update([_row(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]

    def full(rows, title, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves, "draw_curves", full)
    kept.finish([_row(1), _row(2)])


def test_a_confusion_shows_each_class_in_its_row(tmp_path):
    # nobody is taken for class 0: its column is white, and so is the row of an absent class
    answers = torch.tensor([[0, 0, 1], [1, 0, 1], [2, 1, 1]])
    draw_confusion(answers, ["ant", "bee", "cat"], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        colors = {color: count for count, color in picture.convert("RGB").getcolors(100_000)}
    darkest, lightest = colors[8, 48, 107], colors[247, 251, 255]
    assert 2.5 < lightest / darkest < 4.5
