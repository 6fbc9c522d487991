"""`python -m backbones`: what list and info print."""

import json
import re
import subprocess
import sys

import pytest

import backbones
from backbones import __version__, _list
from backbones.__main__ import _COMMANDS, main
from backbones.pretrained import find_weights


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the program in a terminal of some width: what it printed."""

    def call(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(arguments) == 0
        return capsys.readouterr().out

    return call


def facts(text):
    """The facts of `info`, by their labels: title -> label -> text."""
    found = {}
    for part in text.strip().split("\n\n"):
        title, *lines = part.split("\n")
        found[title] = own = {}
        for line in lines:
            label, words = line[2:17].strip(), line[19:]
            if label:
                last, own[label] = label, words
            else:
                own[last] += f" {words}"
    return found


def test_help_and_version():
    code = [sys.executable, "-m", "backbones"]
    told = subprocess.run([*code, "--help"], capture_output=True, text=True, check=True).stdout
    for command in _COMMANDS:
        assert re.search(rf"^    {command} +[A-Z]", told, re.M)
    assert "python -m backbones info shvit_s1" in told
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"backbones {__version__}\n"


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: python -m backbones {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["list", "--markdown", "--json"], ["info"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "shvit_s9"], "no model is called 'shvit_s9': did you mean "),
        (["info", "shvit_s1.x"], "no weights are called 'shvit_s1.x': known are shvit_s1.in1k"),
        (["list", "nothing*"], "nothing matches 'nothing*': "),
        (["list", "--pretrained", "tic_tiny"], "nothing matches 'tic_tiny': "),
    ],
)
def test_unknown_names_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_list(run):
    header, *lines = run("list").split("\n\n")[0].split("\n")
    assert header.split() == ["model", "params", "GMACs", "input", "top-1", "weights"]
    assert [line.split()[0] for line in lines] == backbones.list_models()
    # numbers end in one column
    ends = {re.match(r"\w+ +[\d.]+ M", line).end() for line in lines}
    assert len(ends) == 1


def test_list_of_few_models(run):
    assert run("list", "biformer_stl", "tic_tiny", "overlock_xt") == (
        "model          params  GMACs  input  top-1  weights\n"
        "biformer_stl  28.37 M  4.574    224   82.7  in1k [1]\n"
        "overlock_xt   16.97 M  2.637    224   82.7  in1k, reparam_in1k\n"
        "tic_tiny      27.11 M  4.390    224      -  none [2]\n"
        "\n"
        "[1] Only as a file: the links are dead\n"
        "    (https://github.com/rayleizhu/BiFormer/issues/53)\n"
        "[2] This is a reconstruction, no official model exists\n"
    )


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("arguments", [["list"], ["list", "--pretrained"]])
def test_lists_fit_the_terminal(run, arguments, columns):
    lines = run(*arguments, columns=columns).splitlines()
    # of the models, one column lists tags of any number and length
    wide = {line for line in lines if len(line) > columns}
    assert all(line.startswith(("l2vit_base ", "maxvit_rmlp_base_rw_224 ")) for line in wide)


def test_list_of_weights(run):
    table, notes = run("list", "--pretrained", "shvit_s1", "biformer_tiny", "*.in22k").split("\n\n")
    assert table.split("\n") == [
        "weights             classes  top-1  licence  from",
        "biformer_tiny.in1k     1000   81.4  MIT      file [1]",
        "l2vit_base.in22k      21841      -  MIT      URL  [2]",
        "shvit_s1.in1k          1000   72.8  MIT      hub  [3]",
    ]
    assert notes.startswith("[1] The authors' links are dead\n    (https://github.com/")
    assert re.search(r"^\[3\] Trained without distillation", notes, re.M)


def test_remarks_are_given_once(run):
    text = run("list", "--pretrained", "--family", "maxvit")
    assert text.count("[1]") > 10 and text.count("Ported from TensorFlow by timm.") == 1


def test_lines_are_not_broken_in_a_pipe(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    assert main(["list", "biformer_stl"]) == 0
    assert "\n[1] Only as a file: the links are dead (https://" in capsys.readouterr().out


def test_markdown_of_weights(run):
    lines = run("list", "--pretrained", "--markdown", "davit_tiny", "biformer_tiny").splitlines()
    assert lines[0] == "| weights | classes | ImageNet-1k top-1 | licence | remarks |"
    assert lines[2].startswith("| `biformer_tiny.in1k` | 1000 | 81.4 in the paper | MIT | The auth")
    assert lines[3].startswith(
        "| [`davit_tiny.msft_in1k`](https://huggingface.co/timm/davit_tiny.msft_in1k) | 1000 "
        "| 82.8 in the paper, 82.694 by timm | Apache-2.0 | "
    )


def test_json(run):
    (model,) = json.loads(run("list", "--json", "shvit_s4"))
    assert model["parameters"] == 16_588_484 and model["input_size"] == [3, 256, 256]
    assert model["weights"] == ["shvit_s4.in1k"]
    (row,) = json.loads(run("list", "--pretrained", "--json", "shvit_s4"))
    assert row["location"] == "hf-hub:timm/shvit_s4.in1k" and row["format"] == "safetensors"
    told = json.loads(run("info", "--json", "shvit_s4"))
    assert told == model | {"weights": [row]}
    (dead,) = json.loads(run("list", "--pretrained", "--json", "biformer_tiny"))
    assert dead["location"] is None


def test_info(run):
    text = run("info", "maxvit_base_tf_224", columns=100)
    told = facts(text)
    assert list(told) == [
        "maxvit_base_tf_224",
        "maxvit_base_tf_224.in1k",
        "maxvit_base_tf_224.in21k",
    ]
    model, row, pretrain = told.values()
    assert model["parameters"] == "119,467,708"
    assert model["weights"] == "maxvit_base_tf_224.in1k, maxvit_base_tf_224.in21k"
    assert model["normalisation"] == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert "Zhengzhong Tu" in model["paper"] and "arXiv:2204.01697" in model["paper"]
    assert row["where"] == "hf-hub:timm/maxvit_base_tf_224.in1k"
    assert row["ImageNet-1k"] == "top-1 84.95 % in the paper, 84.884 % by timm"
    # only what is not said of the model already
    assert "normalisation" not in row and "paper" not in row
    assert pretrain["normalisation"] == "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert pretrain["classes"] == "21843" and "ImageNet-1k" not in pretrain
    assert all(len(line) <= 100 or "://" in line for line in text.splitlines())


def test_info_of_one_tag(run):
    told = facts(run("info", "overlock_t.reparam_in1k"))
    assert list(told) == ["overlock_t", "overlock_t.reparam_in1k"]
    assert told["overlock_t.reparam_in1k"]["state dict"] == find_weights("overlock_t").wrapping


def test_info_gives_code_that_runs(run, monkeypatch):
    calls = []
    monkeypatch.setattr(backbones, "create_model", lambda *a, **k: calls.append((a, k)))
    for name in ("l2vit_base_384.in22k_ft_in1k", "biformer_tiny", "tic_tiny"):
        # in a narrow terminal too
        lines = run("info", name, columns=60).split("in Python")[1].strip().splitlines()
        exec("\n".join(line.strip() for line in lines))
    assert calls == [
        (("l2vit_base_384.in22k_ft_in1k",), {"pretrained": True}),
        (
            ("biformer_tiny",),
            {"pretrained": True, "pretrained_cfg_overlay": {"file": "biformer_tiny_best.pth"}},
        ),
        (("tic_tiny",), {}),
    ]


def test_info_of_a_model_without_weights(run):
    told = facts(run("info", "tic_tiny"))["tic_tiny"]
    assert told["weights"] == "none: this is a reconstruction, no official model exists"
    assert told["code"].endswith("licence: none stated")


def test_notes_have_marks():
    notes = _list.Notes()
    assert [notes.add(text) for text in ("a b", "c", "a b")] == ["[1]", "[2]", "[1]"]
    assert notes.lines(6) == ["[1] A", "    b", "[2] C"]
