"""validate.py on several models, with what else it can tell."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from backbones.training.commands import train, validate
from backbones.training.errors import UsageError
from backbones.training.validation import plan, read_settings
from tests.support.images import write_shard
from tests.support.runs import run

ONE, TWO = ["--processes", "1"], ["--processes", "2"]


def _rows(folder, name="validation"):
    with (folder / f"{name}.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(json.loads((folder / f"{name}.json").read_text())) == len(read)
    return read


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs and a weight file of random values."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ["--model", "test_byobnet", "--epochs", "1", "--batch-size", "256"]
    argv += ["--warmup-epochs", "0", *ONE]
    for name in ("a", "b"):
        seed = ["--seed", str(ord(name)), "--img-size", "32" if name == "a" else "24"]
        done = run(train, *argv, *seed, "--out", f"runs/{name}", folder=folder)
        assert done.code == 0, done.err
    model = timm.create_model("test_byobnet", num_classes=10)
    save_file(model.state_dict(), folder / "fresh.safetensors")
    (folder / "runs" / "notes").mkdir()
    return folder


@pytest.mark.parametrize("processes", [ONE, TWO], ids=["1 process", "2 processes"])
def test_one_that_fails_does_not_end_the_others(trained, processes):
    words = ["--checkpoint", "runs/*,fresh.safetensors", "--model", "test_byobnet", *processes]
    done = run(validate, *words, folder=trained)
    assert done.code == 2 and done.err.startswith("error: 1 of 4 models could not be evaluated: ")
    assert done.err.count("\n") == 1 and "runs/notes" in done.err
    rows = _rows(trained)
    assert [row["weights"] for row in rows] == [
        "runs/a", "runs/b", "runs/notes", "fresh.safetensors",
    ]  # fmt: skip
    # each with the view of its own run
    assert [row["img_size"] for row in rows] == ["32", "24", "", "32"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    assert all(row["n"] == "360" and float(row["top1"]) > 0 for row in rows if not row["error"])
    header, *lines, files = done.out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("runs/notes") and "error: " in lines[2]
    assert len({len(line) for line in (header, lines[0], lines[1], lines[3])}) == 1
    assert files == "results in validation.json and validation.csv"


def test_several_equal_each_alone_on_any_number_of_processes(trained):
    both = run(
        validate, "--checkpoint", "runs/a,runs/b", *TWO, "--json", "two.json", folder=trained
    )
    assert both.code == 0, both.err
    for name, row in zip("ab", _rows(trained, "two"), strict=True):
        alone = run(validate, "--checkpoint", f"runs/{name}", *ONE, folder=trained)
        assert alone.code == 0, alone.err
        (other,) = _rows(trained / "runs" / name)
        for column in ("top1", "top1_err", "top5", "n", "weights_sha256", "gmacs", "params_M"):
            assert row[column] == other[column]
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)


@pytest.mark.parametrize("processes", [ONE, TWO], ids=["1 process", "2 processes"])
def test_accuracy_by_class_adds_up(trained, processes):
    done = run(validate, "--checkpoint", "runs/a", "--by-class", *processes, folder=trained)
    assert done.code == 0, done.err
    folder = trained / "runs" / "a"
    with (folder / "validation-classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and sum(int(row["n"]) for row in rows) == 360
    right = sum(float(row["top1"]) * int(row["n"]) for row in rows) / 360
    assert right == pytest.approx(float(_rows(folder)[0]["top1"]))
    assert (folder / "validation-confusion.png").is_file()


@pytest.mark.parametrize("processes", [ONE, TWO], ids=["1 process", "2 processes"])
def test_real_labels_and_a_flip_reach_the_results(tmp_path, processes):
    for number in range(1, 5):
        place = tmp_path / "data" / "val" / f"n{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{number:08d}.png"
        Image.effect_noise((32, 32), 60 + number).convert("RGB").save(place / name)
    model = timm.create_model("test_byobnet", num_classes=2)
    torch.nn.init.constant_(model.head.fc.bias, 0)
    model.head.fc.bias.data[1] = 1e3
    save_file(model.state_dict(), tmp_path / "ones.safetensors")
    # everything is taken for class 1, which images 1 and 3 are; image 4 has no real label
    (tmp_path / "real.json").write_text("[[0, 1], [1], [0], []]")
    argv = ["--model", "test_byobnet", "--checkpoint", "ones.safetensors", "--data", "data"]
    argv += ["--img-size", "32", "--workers", "0", "--test-time-flip", *processes]
    done = run(validate, *argv, "--real-labels", "real.json", folder=tmp_path)
    assert done.code == 0, done.err
    (row,) = _rows(tmp_path)
    assert float(row["top1"]) == 50 and row["real_n"] == "3"
    assert float(row["real_top1"]) == pytest.approx(200 / 3)
    assert done.out.splitlines()[0].split()[1:4] == ["top-1", "top-5", "real"]
    wrong = run(validate, *argv, "--data", "digits", "--real-labels", "imagenet", folder=tmp_path)
    assert wrong.code == 2 and "is not called as ILSVRC2012_val_" in wrong.err


def test_what_one_process_meets_ends_the_model_in_all(tmp_path):
    # the second process gets the image of class 1, which the model does not have
    random = np.random.RandomState(0)
    members = {}
    for label in (0, 1):
        file = io.BytesIO()
        Image.fromarray(random.randint(0, 256, (32, 32, 3)).astype(np.uint8)).save(file, "png")
        members |= {f"{label}.png": file.getvalue(), f"{label}.cls": str(label).encode()}
    write_shard(tmp_path / "toy-val-0.tar", members)
    for name in "ab":
        model = timm.create_model("test_byobnet", num_classes=1)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    argv = ["--data", "wds/toy", "--data-root", ".", "--num-classes", "1", "--workers", "0"]
    argv += ["--model", "test_byobnet", "--img-size", "32", "--batch-size", "2", *TWO]
    alone = run(validate, *argv, "--checkpoint", "a.safetensors", folder=tmp_path)
    assert alone.code == 2 and alone.err.startswith("error: an image is of class 1, but the model")
    both = run(validate, *argv, "--checkpoint", "*.safetensors", folder=tmp_path)
    assert both.code == 2 and "2 of 2 models" in both.err
    assert all("an image is of class 1" in row["error"] for row in _rows(tmp_path))


def test_names_expand_to_command_lines(tmp_path, monkeypatch):
    names = [command[-1] for command in plan(["--pretrained", "--model", "shvit_*,test_vit"])]
    assert "shvit_s1.in1k" in names and names[-1] == "test_vit" and len(set(names)) == len(names)
    settings = read_settings(plan(["--pretrained", "--model", "shvit_s[1]*"])[0]).config
    assert settings.model.name == "shvit_s1.in1k" and settings.model.pretrained
    monkeypatch.chdir(tmp_path)
    for name in ("b.pth", "a.pth", "c.bin"):
        (tmp_path / name).touch()
    commands = plan(["--checkpoint", "*.pth,hf-hub:org/x", "--ema"])
    assert [command[-1] for command in commands] == ["a.pth", "b.pth", "hf-hub:org/x"]
    assert all(command[0] == "--checkpoint" and "--ema" in command for command in commands)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "nowhere/*"], r"nothing matches nowhere/\*"),
        (["--pretrained", "--model", "shvit_x*"], r"nothing matches shvit_x\*"),
        ([], "use --checkpoint RUN_OR_FILE, or --pretrained"),
        (["--pretrained", "--json", "a.csv"], r"must end in \.json"),
    ],
)
def test_what_names_nothing_is_refused(argv, message):
    with pytest.raises(UsageError, match=message):
        plan(argv)


def test_a_model_is_compiled_on_demand(trained, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.chdir(trained)
    assert validate(["--checkpoint", "runs/a", *ONE]) == 0 and not compiled
    assert validate(["--checkpoint", "runs/a", "--compile", *ONE]) == 0 and len(compiled) == 1
