from __future__ import annotations

from backbones.training.config import parse
from backbones.training.progress import (
    Progress,
    epoch_line,
    result_line,
    settings_lines,
    step_note,
    summary_lines,
)
from backbones.training.run_folder import Row
from backbones.training.sampler import TrainOrder
from backbones.training.train_config import TrainConfig


def _row(epoch, top1_ema=None, **values):
    values = {"top1": 90.0 + epoch / 3, "images_per_s": 123.4, "wait_percent": 1.5} | values
    return Row(
        epoch=epoch, step=22 * epoch, lr=0.1 / 3, train_loss=1 / epoch, val_loss=2 / epoch,
        top5=99.0, top1_ema=top1_ema, skipped=0, bad_images=0, seconds=10.0 * epoch, **values,
    )  # fmt: skip


def test_a_person_reads_one_line_per_epoch():
    line = epoch_line(_row(3, 95.0), 12)
    assert line.startswith("epoch  3/12  loss 0.333  validation 0.667  top-1 91.00 % (average 95.0")
    assert line.endswith("123 images/s  waiting 2 %  left 1:30")
    progress = Progress(best_top1=92.5, best_step=44, total_seconds=65)
    line = result_line(_row(3), 360, progress, "runs/x")
    assert line == (
        "top-1 91.00 % (328 of 360 held-out images), best 92.50 % after epoch 2, in 1:05; "
        "files in runs/x"
    )


def test_within_an_epoch_speed_and_waiting_are_of_the_epoch():
    order = TrainOrder(1000, 100, 0, 1)
    # the third step of the second epoch of two: 3 steps took 6 s
    progress = Progress(step=13, seconds=6.0, wait=1.5, total_seconds=39.0)
    note = step_note(progress, order, 20, 0.5)
    assert note == "loss 0.500, 50 images/s, waiting 25 %, left 0:21"
    # its last step belongs to it still
    progress = Progress(step=20, seconds=20.0, wait=0.0, total_seconds=60.0)
    assert step_note(progress, order, 20, 0.5).startswith("loss 0.500, 50 images/s")


def test_settings_are_told_where_they_differ_from_the_defaults():
    argv = ["--epochs", "7", "--batch-size", "64", "--scale", "0.3,1", "--no-channels-last"]
    lines = settings_lines(parse(TrainConfig, argv, program="train.py"))
    assert lines == [
        "  augment  scale=0.3,1.0", "  schedule epochs=7", "  runtime  channels_last=False"
    ]  # fmt: skip
    assert settings_lines(parse(TrainConfig, [], program="train.py")) == []


def test_the_summary_has_the_best_and_the_last_epoch():
    rows = [
        _row(1, 80.0, top1=91.0, images_per_s=100.0, wait_percent=40.0),
        _row(2, 85.0, top1=92.5, images_per_s=300.0, wait_percent=0.0),
        _row(3, 90.0, top1=92.0, images_per_s=300.0, wait_percent=0.0),
    ]
    lines = summary_lines(rows, Progress(best_step=44, total_seconds=65), 512.3)
    assert [line.split() for line in lines[:3]] == [
        ["epoch", "loss", "top-1", "top-5", "average"],
        ["best", "2", "1.0000", "92.50", "99.00", "85.00"],
        ["last", "3", "0.6667", "92.00", "99.00", "90.00"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    # the same images took 3, 1 and 1 parts of the time
    assert lines[3] == (
        "3 epochs in 1:05, 180 images/s, waiting 24 % for data, 512 MiB of memory at most"
    )
    assert summary_lines(rows, Progress(), None)[-1].endswith("for data")
