"""Whole runs: resumption, signals, several processes, failures."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal

import pytest
import safetensors.torch
import torch

from backbones.training import checkpoint
from backbones.training.commands import train, validate
from backbones.training.validation import checkpoint_settings
from tests.support import golden
from tests.support.images import make_folder, make_shards, odd_files
from tests.support.runs import Run, run

# 3 epochs of 5 steps, a fraction of a second each, with everything that is random switched on
SMALL = [
    "--model", "test_byobnet", "--epochs", "2", "--cooldown-epochs", "1", "--warmup-epochs", "0",
    "--ema-decay", "0.9", "--mixup", "0.2", "--drop-path", "0.1", "--repeats", "2",
    "--batch-size", "256", "--crop-mode", "squash", "--checkpoint-every", "2",
]  # fmt: skip
ONE, TWO = ["--processes", "1"], ["--processes", "2"]


def _states(folder):
    loaded = checkpoint.load(checkpoint.latest(folder / "ckpt"))
    found = {f"model.{name}": value for name, value in loaded.model.items()}
    found |= {f"ema.{name}": value for name, value in loaded.ema.items()}
    for index, slots in loaded.optim["optimizer"]["state"].items():
        found |= {f"optim.{index}.{name}": value for name, value in slots.items()}
    return found


def _same(a, b):
    a, b = _states(a), _states(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def _metrics(folder):
    with (folder / "metrics.csv").open() as file:
        timed = ("images_per_s", "wait_percent", "seconds")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def _status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module", params=[ONE, TWO], ids=["1 process", "2 processes"])
def whole(request, tmp_path_factory):
    """An uninterrupted run and its number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(train, *SMALL, *request.param, "--out", "out", folder=folder)
    assert done.code == 0, done.err
    return folder / "out", request.param, done


def test_a_run_leaves_what_it_promises(whole):
    folder, processes, done = whole
    lines = done.out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("test_byobnet, 0.20 M"))
    assert "  schedule epochs=2 cooldown_epochs=1 warmup_epochs=0.0" in lines[:begin]
    # the model, the epochs, the summary of three lines and the times, the result
    assert done.err == "" and len(lines) == begin + 2 + 3 + 4 + 1
    assert re.fullmatch(r"top-1 \d+\.\d\d % \(\d+ of 360 held-out images\), best .*", lines[-1])
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == {
        "ckpt", "config.yaml", "curves.png", "metrics.csv", "status.json",
    }  # fmt: skip
    assert _status(folder)["state"] == "done" and _status(folder)["step"] == 15
    assert [row["epoch"] for row in _metrics(folder)] == ["1", "2", "3"]
    assert 1 <= len(list((folder / "ckpt").iterdir())) <= 2
    assert f"{processes[1]} process" in lines[begin + 1]


def test_validation_reproduces_the_reported_accuracy(whole, tmp_path):
    folder, processes, _ = whole
    assert checkpoint_settings(str(folder))["data.crop_mode"] == "squash"
    for argv, column in (([], "top1"), (["--ema"], "top1_ema")):
        done = run(validate, "--checkpoint", folder, *processes, *argv,
                   "--json", tmp_path / "result.json", folder=tmp_path)  # fmt: skip
        assert done.code == 0, done.err
        (result,) = json.loads((tmp_path / "result.json").read_text())
        assert result["top1"] == float(_metrics(folder)[-1][column]) and result["n"] == 360
    weights = checkpoint.latest(folder / "ckpt") / "ema.safetensors"
    assert (
        result["weights_sha256"]
        == checkpoint.read_meta(weights.parent)["files"][weights.name]["sha256"]
    )


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    folder, processes, _ = whole
    kills = [(4, 2), (7, 0), (12, 1)] if processes == ONE else [(7, 0)]
    for step, workers in kills:
        out = tmp_path / f"out{step}"
        argv = [*SMALL, *processes, "--out", out]
        first = Run(train, argv, tmp_path)
        first.wait_for(out / "ckpt" / f"step-{step - step % 2:08d}")
        os.kill(first.process.pid, signal.SIGKILL)
        assert first.finish().code == -signal.SIGKILL
        assert _status(out)["state"] == "running"
        rest = run(train, *argv, "--workers", workers, folder=tmp_path)
        assert rest.code == 0 and f"resuming {out} at step" in rest.out, rest.err
        _same(folder, out)
        assert _metrics(folder) == _metrics(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_nothing_is_lost(whole, tmp_path, number):
    folder, processes, _ = whole
    argv = [*SMALL, *processes, "--out", "out"]
    first = Run(train, argv, tmp_path)
    first.wait_for(tmp_path / "out" / "ckpt" / "step-00000002")
    os.kill(first.process.pid, number)
    stopped = first.finish()
    assert stopped.code == 75, stopped
    assert re.fullmatch(r"error: interrupted at step \d+ of 15: resume .*--out out\n", stopped.err)
    status = _status(tmp_path / "out")
    meta = checkpoint.read_meta(checkpoint.latest(tmp_path / "out" / "ckpt"))
    assert status["state"] == "interrupted" and status["step"] == meta["step"] < 15
    rest = run(train, *argv, folder=tmp_path)
    assert rest.code == 0 and f"resuming out at step {meta['step']}" in rest.out
    _same(folder, tmp_path / "out")


def test_a_signal_is_heard_at_the_next_step(tmp_path):
    argv = ["--model", "test_byobnet", "--batch-size", "8", "--checkpoint-every", "2", *ONE]
    first = Run(train, [*argv, "--out", "out"], tmp_path)
    first.wait_for(tmp_path / "out" / "ckpt" / "step-00000002")
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.finish().code == 75
    # an epoch has 179 steps
    assert _status(tmp_path / "out")["step"] < 100


def test_a_finished_run_is_only_told_again(whole, tmp_path):
    folder, processes, done = whole
    before = _metrics(folder)
    again = run(train, *SMALL, *processes, "--out", folder, folder=tmp_path)
    assert again.code == 0 and again.out.splitlines()[-1].split("; files")[0] in done.out
    assert _metrics(folder) == before


def test_other_settings_do_not_resume_a_run(whole, tmp_path):
    folder, processes, _ = whole
    other = run(train, *SMALL, *processes, "--out", folder, "--lr", "0.5", folder=tmp_path)
    assert other.code == 2
    assert "--lr was 0.002, now 0.5" in other.err and other.err.count("\n") == 1
    assert _status(folder)["state"] == "done"


def test_two_processes_equal_one_for_the_same_batch(tmp_path):
    # no batch norm, whose statistics are per process; sgd, which does not amplify rounding
    argv = ["--model", "test_vit", "--img-size", "32", "--epochs", "1", "--batch-size", "256"]
    argv += ["--optim", "sgd", "--lr", "0.05", "--schedule", "constant", "--warmup-epochs", "0"]
    argv += ["--ema-decay", "0.5"]
    for name, processes in (("one", ONE), ("two", TWO)):
        done = run(train, *argv, *processes, "--out", name, folder=tmp_path)
        assert done.code == 0, done.err
    one, two = _states(tmp_path / "one"), _states(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_damaged_checkpoint_is_named(tmp_path):
    argv = ["--model", "test_byobnet", "--batch-size", 720, "--epochs", 1, "--warmup-epochs", 0]
    argv += [*ONE, "--out", "out"]
    assert run(train, *argv, folder=tmp_path).code == 0
    path = checkpoint.latest(tmp_path / "out" / "ckpt") / "optim.pt"
    path.write_bytes(path.read_bytes()[:1000])
    failed = run(train, *argv, folder=tmp_path)
    assert failed.code == 2 and failed.err.count("\n") == 1
    assert "is damaged (optim.pt: 1000 bytes instead of" in failed.err


def test_divergence_stops_the_run_and_spares_the_checkpoint(tmp_path):
    argv = ["--model", "test_byobnet", "--epochs", "9", "--max-skips", "5", "--warmup-epochs", "0"]
    first = run(train, *argv, *ONE, "--out", "out", "--lr", "1e30", "--checkpoint-every", 1,
                "--clip", "none", folder=tmp_path)  # fmt: skip
    assert first.code == 3 and "5 steps in a row" in first.err and first.err.count("\n") == 1
    assert _status(tmp_path / "out")["state"] == "failed"
    saved = checkpoint.read_meta(checkpoint.latest(tmp_path / "out" / "ckpt"))
    assert (
        saved["progress"]["streak"] == 0 and saved["step"] <= _status(tmp_path / "out")["step"] - 5
    )


def train_on_a_disk_that_fills_up(argv):
    write, saved = checkpoint.open_for_write, []

    def open_for_write(path):
        if saved and "step" not in str(path) and path.parent.name.startswith(".tmp"):
            raise OSError(28, "No space left on device")
        if path.name == "meta.json":
            saved.append(path)
        return write(path)

    checkpoint.open_for_write = open_for_write
    return train(argv)


def test_a_full_disk_is_survived_once_and_then_stops_the_run(tmp_path):
    done = run(train_on_a_disk_that_fills_up, *SMALL, *ONE, "--out", "out", folder=tmp_path)
    assert done.code == 5 and "MiB are free" in done.err, done
    assert "warning: cannot write the checkpoint" in done.out
    assert checkpoint.load(checkpoint.latest(tmp_path / "out" / "ckpt")).meta["step"] == 2


def test_unreadable_images_are_replaced_and_named(tmp_path):
    folder = make_folder(tmp_path / "data", train=16, val=4)
    broken = [name for name, (_, readable) in odd_files().items() if not readable][:3]
    for name in broken:
        (folder / "train" / "cat" / name).write_bytes(odd_files()[name][0])
    (folder / "val" / "dog" / "text.png").write_bytes(b"no image")
    argv = ["--data", folder, "--model", "test_byobnet", "--img-size", 32, "--batch-size", 8]
    argv += ["--epochs", 2, "--workers", 1, *ONE]
    done = run(train, *argv, "--max-bad", "0.2", "--out", "tolerant", folder=tmp_path)
    assert done.code == 0, done.err
    lines = (tmp_path / "tolerant" / "bad_files.txt").read_text().splitlines()
    assert {line.split("\t")[0].rsplit("/", 1)[1] for line in lines} <= {*broken, "text.png"}
    assert any("text.png\tUnidentifiedImageError" in line for line in lines)
    strict = run(train, *argv, "--out", "strict", folder=tmp_path)
    assert strict.code == 2 and "training images cannot be read" in strict.err
    assert strict.err.count("\n") == 1 and (tmp_path / "strict" / "bad_files.txt").is_file()


def test_shards_train_to_the_same_bits_as_the_folder_they_hold(tmp_path):
    folder = make_folder(tmp_path / "folder", train=16, val=4)
    shards = make_shards(folder, tmp_path / "shards")
    argv = ["--model", "test_byobnet", "--img-size", 32, "--batch-size", 8, "--epochs", 2]
    argv += ["--ema-decay", "0.9", "--workers", 1, *ONE]
    sources = {
        "a": ["--data", folder],
        "b": ["--data", "wds/toy", "--data-root", shards, "--num-classes", 2],
    }
    for out, source in sources.items():
        done = run(train, *argv, *source, "--out", out, folder=tmp_path)
        assert done.code == 0, done.err
    _same(tmp_path / "a", tmp_path / "b")
    assert _metrics(tmp_path / "a") == _metrics(tmp_path / "b")
    argv = [*argv, "--data", "wds/toy", "--data-root", shards]
    few = run(train, *argv, "--num-classes", 1, "--out", "c", folder=tmp_path)
    assert few.code == 2 and "use --num-classes 2 or more" in few.err


def test_official_weights_are_fine_tuned_and_those_of_another_model_named(tmp_path):
    folder = make_folder(tmp_path / "data", train=16, val=4)
    official = golden.state_dict(golden.load("shvit_s1")["manifest"])
    official = {k: v.float() if v.is_floating_point() else v for k, v in official.items()}
    torch.save({"model": official, "args": argparse.Namespace(lr=1)}, tmp_path / "shvit_s1.pth")
    argv = ["--data", folder, "--finetune", "shvit_s1.pth", "--img-size", 32, "--epochs", 1]
    argv += ["--batch-size", 16, "--warmup-epochs", 0, "--workers", 0, *ONE]
    done = run(train, *argv, "--out", "tuned", folder=tmp_path)
    assert done.code == 0, done.err
    first = done.out.splitlines()[0]
    assert first.endswith("shvit_s1.pth; freshly initialised: head.l.weight, head.l.bias")
    other = run(train, *argv, "--model", "shvit_s2", folder=tmp_path)
    assert other.code == 2 and other.err.count("\n") == 1
    assert "shvit_s1.pth: the weights do not fit the model: stages.1" in other.err


def test_fine_tuning_resets_the_head_and_says_so(whole, tmp_path):
    source, _, _ = whole
    folder = make_folder(tmp_path / "data", train=16, val=4)
    argv = ["--data", folder, "--model", "test_byobnet", "--img-size", 32, "--batch-size", 16]
    argv += ["--epochs", 1, "--warmup-epochs", 0, "--workers", 0, *ONE, "--out", "tuned"]
    done = run(train, *argv, "--finetune", source, folder=tmp_path)
    assert done.code == 0, done.err
    first = done.out.splitlines()[0]
    assert first.startswith(f"weights from {source}; freshly initialised: head.")
    again = run(validate, "--checkpoint", "tuned", *ONE, folder=tmp_path)
    assert again.code == 0, again.err
    (result,) = json.loads((tmp_path / "tuned" / "validation.json").read_text())
    assert result["top1"] == float(_metrics(tmp_path / "tuned")[-1]["top1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "shvit_s9"], "did you mean shvit_s1"),
        (["--model", "shvit_s1.no_such_tag", "--pretrained"], "no_such_tag"),
        (["--data", "nowhere"], "no data at nowhere: --data takes a folder"),
        (["--num-classes", "3"], "--num-classes 3, but the data has 10 classes"),
        (["--device", "cuda"], "this machine has no cuda device: use --device cpu"),
        (["--finetune", "nothing.pth"], "nothing.pth"),
        (["--optim", "adamx"], "unknown optimizer adamx"),
        (["--batch-size", "2000"], "use --batch-size 1437 or less"),
        (["--batch-size", "6", "--mixup", "1", "--accumulate", "2"], "even number of images"),
        (["--accumulate", "7"], "multiple of 7"),
        (["--img-size", "8"], "8"),
        (["--out", "file/out"], "choose another --out"),
        (["no.yaml"], "no recipe no.yaml"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, argv, message):
    if argv[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    (tmp_path / "file").write_text("not a folder")
    done = run(train, *ONE, *argv, folder=tmp_path)
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and message in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "stdout.txt", "stderr.txt"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "use --checkpoint RUN_OR_FILE, or --pretrained"),
        (["--checkpoint", "nothing.safetensors"], "nothing.safetensors"),
        (["--pretraned"], "did you mean --pretrained"),
        (["--checkpoint", "weights.safetensors"], "does not fit the model"),
    ],
)
def test_mistakes_of_validation_end_in_one_line(tmp_path, argv, message):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    done = run(validate, "--model", "test_byobnet", *ONE, *argv, folder=tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done
    assert not (tmp_path / "validation.json").exists()
