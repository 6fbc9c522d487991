"""The fine-tuning example: its images, its commands and its report; the training is left out."""

from __future__ import annotations

import gzip
import json
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_fashion.py"


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_three_ways_see_the_same_images_and_are_reported(tmp_path, monkeypatch, capsys):
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.broadcast_to(labels[:, None, None] * 20, (40, 28, 28)).copy()
    for name in ("train", "t10k"):
        _write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        _write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    commands = []

    def train(command, check):
        commands.append(command)
        out = Path(command[-1])
        out.mkdir(parents=True)
        rows = "".join(f"{epoch},{len(commands)}{epoch}.5\n" for epoch in (1, 2))
        (out / "metrics.csv").write_text(f"epoch,top1\n{rows}")

    monkeypatch.setattr("subprocess.run", train)
    argv = ["digits", "--fashion", tmp_path, "--work", tmp_path / "work"]
    argv += ["--images", 30, "--epochs", 2, "--val", 10]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    names = runpy.run_path(str(SCRIPT), run_name="__main__")["CLASSES"]

    work = tmp_path / "work"
    assert len(list((work / "images-30" / "train").rglob("*.png"))) == 30
    assert len(list((work / "images-30" / "val").rglob("*.png"))) == 10
    for path in (work / "images-30").rglob("*.png"):
        pixel = np.asarray(Image.open(path))[0, 0]
        assert path.parent.name == names[pixel // 20]
    ways = [command[command.index("--geometry") + 2 : -2] for command in commands]
    assert ways == [[], ["--finetune", "digits"], ["--finetune", "digits", "--head-only"]]
    assert all(command[2:6] == commands[0][2:6] for command in commands)
    report = json.loads((work / "finetune_fashion.json").read_text())["30 images x 2 epochs"]
    assert [way["top1"] for way in report["ways"]] == [12.5, 22.5, 32.5]
    assert Image.open(work / "finetune_fashion.png").size == (960, 600)
    assert "from scratch: top-1 12.50 %" in capsys.readouterr().out
