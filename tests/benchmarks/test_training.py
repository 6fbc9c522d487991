"""The comparison with timm's train.py: commands, logs, ratios; our half of it as it runs."""

import csv
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from backbones.training.commands import train
from benchmarks import training
from tests.support.runs import run

TINY = training.Job("shvit_s1", 20, 10, batch=10, side=32)
LOG = """\
Train: 0 [   0/2 (  0%)]  Loss: 2.29 (2.29)  Time: 2.067s,   3.96/s  (2.067s,   3.96/s)  LR: 1.0e-03
Train: 0 [   1/2 (100%)]  Loss: 2.39 (2.34)  Time: 0.842s,  9.03/s  (1.062s,   7.24/s)  LR: 1.0e-03
Train: 1 [   0/2 (  0%)]  Loss: 2.48 (2.48)  Time: 1.649s,   4.80/s  (1.649s,   4.80/s)  LR: 5.0e-04
Train: 1 [   1/2 (100%)]  Loss: 2.51 (2.50)  Time: 0.4s,   20.00/s  (1.090s,  1058.74/s)  LR: 5e-04
"""


def test_images_are_a_folder_of_classes_and_the_same_every_time(tmp_path):
    data = [training.draw_images(tmp_path / name, TINY) for name in "ab"]
    files = [sorted(root.rglob("*.png")) for root in data]
    assert [len(list((data[0] / split).rglob("*.png"))) for split in ("train", "val")] == [20, 10]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert Image.open(files[0][0]).size == (32, 32)


def test_our_command_runs_and_its_speed_is_found(tmp_path):
    data = training.draw_images(tmp_path, TINY)
    out = tmp_path / "out"
    argv = training.our_command(TINY, data, out)[1:]
    done = run(train, *argv, "--processes", "1", folder=tmp_path / "run")
    assert done.code == 0, done.err
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert training.our_speed(out, TINY) == pytest.approx(float(rows[1]["images_per_s"]))


def test_the_speed_of_timm_is_that_of_the_later_epochs():
    assert training.timm_speed(LOG, TINY) == 1058.7
    with pytest.raises(RuntimeError, match="1 epochs instead of 2"):
        training.timm_speed(LOG.split("Train: 1")[0], TINY)


def test_both_commands_ask_for_the_same():
    ours, theirs = (
        dict(itertools.pairwise(words))
        for words in (
            training.our_command(TINY, Path("d"), Path("o")),
            training.timm_command(Path("t"), TINY, Path("d"), Path("o")),
        )
    )
    same = {"--auto-augment": "--aa", "--clip": "--clip-grad", "--ema-decay": "--model-ema-decay"}
    for flag in ("--lr", "--weight-decay", "--reprob", "--mixup", "--cutmix", "--smoothing", *same):
        assert float_or_text(ours[flag]) == float_or_text(theirs[same.get(flag, flag)]), flag
    # theirs is per process
    assert int(ours["--batch-size"]) == 2 * int(theirs["-b"])


def float_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def test_a_script_that_the_patches_do_not_fit_is_refused(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("\n".join(training.PATCHES) + "\n")
    patched = training.patch(script, tmp_path).read_text()
    assert all(new in patched for new in training.PATCHES.values())
    script.write_text("import timm\n")
    with pytest.raises(ValueError, match=training.TIMM_COMMIT):
        training.patch(script, tmp_path)


def test_ratios_are_of_medians():
    rows = [
        {"model": "m", "program": program, **dict.fromkeys(training.MEASURES, value)}
        for program, values in (("backbones", (1.0, 9.0, 3.0)), ("timm", (4.0, 1.0, 2.0)))
        for value in values
    ]
    assert training.ratios(rows) == [{"model": "m", **dict.fromkeys(training.MEASURES, 1.5)}]


def test_a_script_that_fails_is_named_with_its_log(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match=r"(?s)broken\.py failed.*no such thing"):
        training.measure([str(script)], tmp_path / "log.txt")


def test_the_committed_result_is_of_these_jobs():
    result = json.loads(training.RESULT.read_text())
    known = [training.commands(job) for job in training.JOBS]
    assert result["jobs"] and all(job in known for job in result["jobs"])
    assert result["ratios"] == training.ratios(result["rows"])
