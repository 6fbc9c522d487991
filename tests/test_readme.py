"""What the README says is so."""

import re

import pytest
import timm
import torch

from backbones.__main__ import main
from backbones.training.config import settings
from backbones.training.train_config import TrainConfig
from backbones.training.validation import ValidateConfig
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
    block = re.sub(r", pretrained(_backbone)?=True", "", block)
    block = block.replace('"path/to/checkout"', repr(str(ROOT)))
    exec(block, {"torch": torch, "timm": timm})


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([\w./]+)\)", text):
        assert (page.parent / link).exists(), link
    for recipe in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(page):
    known = {
        program: {setting.flag for setting in settings(schema).values()} | {"--recipe", "--help"}
        for program, schema in (("train", TrainConfig), ("validate", ValidateConfig))
    }
    for program, words in re.findall(r"(train|validate)\.py (.+)", page.read_text()):
        used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", words.split("`")[0]))
        assert used <= known[program], used - known[program]
