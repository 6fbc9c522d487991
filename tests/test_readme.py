"""What the README says is so."""

import re

import pytest
import timm
import torch

from backbones.__main__ import main
from tests.support.process import ROOT

README = (ROOT / "README.md").read_text()
# the one with an official file runs in tests/backbones/test_builder.py, which makes such a file
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "shvit_s1.pth" not in b]


def test_table_of_models_is_what_the_command_prints(capsys):
    table = re.search(
        r"<!-- models: python -m backbones (.*) -->\n(.*)<!-- /models -->", README, re.S
    )
    assert main(table[1].split()) == 0
    printed = capsys.readouterr().out
    assert table[2] == printed, f"put the output of `python -m backbones {table[1]}` into README.md"


def test_reconstructions_say_so():
    rows = re.findall(r"^\| `(\w+)` \|.*\| - \| none: .*reconstruction.* \|$", README, re.M)
    assert rows == ["tic_base", "tic_small", "tic_tiny"]


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block):
    block = block.replace(", pretrained=True", "").replace('"path/to/checkout"', repr(str(ROOT)))
    exec(block, {"torch": torch, "timm": timm})


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\((?!http)([\w./]+)\)", README):
        assert (ROOT / link).is_file(), link
    for recipe in re.findall(r"recipes/\w+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
