from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image

from backbones.training.errors import StorageError, UsageError
from backbones.training.reports import (
    COLUMNS,
    RealLabels,
    Table,
    class_rows,
    peak_memory,
    write_classes,
    write_csv,
    write_json,
)

# number of the image, its class, its best classes
ANSWERS = torch.tensor(
    [[0, 0, 0, 1], [1, 0, 2, 0], [2, 0, 2, 1], [3, 1, 1, 0], [4, 1, 1, 2], [5, 2, 0, 2]]
)


class _Validation:
    classes = None

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]


def _imagenet(numbers):
    return _Validation([f"val/n01/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers])


def test_classes_come_worst_first_with_what_they_are_taken_for():
    rows = class_rows(ANSWERS, ["ant", "bee", "cat"])
    assert [row["class"] for row in rows] == ["cat", "ant", "bee"]
    assert rows[1] == {
        "class": "ant", "n": 3, "top1": pytest.approx(100 / 3), "confused_with": "cat",
        "confused": 2,
    }  # fmt: skip
    assert rows[2]["confused_with"] == "" and rows[2]["top1"] == 100


@pytest.mark.parametrize(("count", "drawn"), [(3, True), (50, True), (51, False)])
def test_few_classes_are_drawn_too(tmp_path, count, drawn):
    write_classes(ANSWERS, [f"class {number}" for number in range(count)], tmp_path / "v")
    assert len((tmp_path / "v-classes.csv").read_text().splitlines()) == 4
    assert (tmp_path / "v-confusion.png").exists() == drawn
    if count == 3:
        with Image.open(tmp_path / "v-confusion.png") as picture:
            blue = {color for _, color in picture.convert("RGB").getcolors(100_000)}
        # all bees are taken for bees: the darkest of the scale
        assert (8, 48, 107) in blue


def test_classes_without_names_are_numbered(tmp_path):
    write_classes(ANSWERS, None, tmp_path / "v")
    assert (tmp_path / "v-classes.csv").read_text().splitlines()[1].startswith("2,1,0.0,0,1")


def test_real_labels_are_found_by_the_numbers_in_the_names(tmp_path):
    # images 6, 5, ..., 1 of ImageNet: any of their labels counts, without one an image does not
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[2, 0], [], [0], [1], [2, 1], [5]]))
    score = RealLabels(str(path), _imagenet([6, 5, 4, 3, 2, 1])).score(ANSWERS)
    # best classes 0, 2, 2, 1, 1, 0 for labels {5}, {2, 1}, {1}, {0}, none, {2, 0}
    assert score == {"real_top1": 40.0, "real_top5": 80.0, "real_n": 5}


def test_timm_brings_the_labels_of_imagenet():
    # no label is sure for the first image; the second is 970 or 795, the third 230 or 231
    answers = torch.tensor([[0, 65, 65, 1], [1, 970, 1, 795], [2, 230, 231, 5]])
    score = RealLabels("imagenet", _imagenet([1, 2, 3])).score(answers)
    assert score == {"real_top1": 50.0, "real_top5": 100.0, "real_n": 2}


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (None, [1], "No such file"),
        ("{", [1], "Expecting"),
        ("[[1]]", [7], "index out of range"),
        ("3", [1], "not subscriptable"),
    ],
)
def test_real_labels_that_cannot_be_used_are_named(tmp_path, text, names, message):
    path = tmp_path / "real.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        RealLabels(str(path), _imagenet(names))
    with pytest.raises(UsageError, match=r"cat\.jpg is not called"):
        RealLabels("imagenet", _Validation(["cat.jpg"]))


def test_results_have_the_same_form_for_one_and_for_several(tmp_path):
    rows = [{"model": "a", "top1": 71.5}, {"model": "b", "error": "no such file"}]
    for count in (1, 2):
        write_json(tmp_path / "r.json", rows[:count])
        write_csv(tmp_path / "r.csv", rows[:count], COLUMNS)
        assert json.loads((tmp_path / "r.json").read_text()) == rows[:count]
        with (tmp_path / "r.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        assert list(read[0]) == list(COLUMNS) and len(read) == count
        assert read[0]["top1"] == "71.5" and read[0]["error"] == ""
    with pytest.raises(StorageError, match="use --json FILE"):
        write_json(tmp_path / "nowhere" / "r.json", rows)


def test_the_table_is_aligned():
    row = {
        "top1": 71.5, "top5": 90.0, "loss": 1.25, "n": 360, "img_size": 32, "gmacs": 0.2414,
        "images_per_s": 812.3,
    }  # fmt: skip
    table = Table(["shvit_s1", "a"], real=False)
    lines = [table.header(), table.line("shvit_s1", row), table.line("a", row)]
    assert len({len(line) for line in lines}) == 1 and "real" not in lines[0]
    assert lines[2].split() == ["a", "71.50", "90.00", "1.2500", "360", "32", "0.24", "812"]
    assert table.line("a", {"error": "no such file"}) == "a         error: no such file"
    assert "real" in Table(["a"], real=True).header()


def test_memory_is_counted_in_mebibytes():
    # a process with PyTorch in it
    assert 100 < peak_memory(torch.device("cpu")) < 100_000
