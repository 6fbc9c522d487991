"""What the README says is so."""

import re

import pytest
import timm
import torch

import backbones
from backbones.pretrained import WeightsError, find_weights
from tests.support import costs
from tests.support.process import ROOT

README = (ROOT / "README.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) \| (\d+) \| ([\d.]+|-) \| (.*) \|$", README, re.M
)
# the one with an official file runs in tests/backbones/test_builder.py, which makes such a file
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "shvit_s1.pth" not in b]


def test_every_model_has_a_row():
    assert [row[0] for row in ROWS] == backbones.list_models()


@pytest.mark.parametrize("name, millions, macs, size, top1, link", ROWS)
def test_row(name, millions, macs, size, top1, link):
    model = timm.create_model(name, device="meta")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions
    input_size = model.pretrained_cfg["input_size"]
    assert input_size == (3, int(size), int(size))
    assert f"{costs.macs(name) / 1e9:.3f}" == macs
    assert ("reconstruction" in link) == name.startswith("tic_")
    if link == "-" or link.startswith("none: "):
        with pytest.raises(WeightsError):
            find_weights(name)
        return
    weights = find_weights(name)
    known = [weights.top1[key] for key in ("paper", "timm", "repository") if key in weights.top1]
    assert known[:1] == ([] if top1 == "-" else [float(top1)])
    assert link.lower().endswith(f", {weights.license}")
    if weights.hub_id is not None:
        assert link.startswith(f"[`{weights.name}`](https://huggingface.co/{weights.hub_id}), ")
    elif weights.urls and "links are dead" not in link:
        assert link.startswith(f"[`{weights.name}`]({weights.urls[0]}), ")
    else:
        assert "links are dead" in link


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block):
    block = block.replace(", pretrained=True", "").replace('"path/to/checkout"', repr(str(ROOT)))
    exec(block, {"torch": torch, "timm": timm})


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\((?!http)([\w./]+)\)", README):
        assert (ROOT / link).is_file(), link
    for recipe in re.findall(r"recipes/\w+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
