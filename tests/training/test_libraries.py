"""Data sets of other libraries, made here and opened through them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from backbones.training.errors import UsageError
from backbones.training.sources import open_source, read_image
from tests.support.process import python

CLASSES = ("ant", "bee", "cow")
# TensorFlow Datasets wants a builder in a file with a folder of its own
TENSORFLOW_BUILDER = f"""
import os
from etils import epath
import tensorflow_datasets as tfds

class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(os.getcwd())

    def _info(self):
        label = tfds.features.ClassLabel(names={list(CLASSES)})
        image = tfds.features.Image(shape=(None, None, 3))
        features = tfds.features.FeaturesDict({{"image": image, "label": label}})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, manager):
        examples = self._generate_examples
        return {{"train": examples(range(7)), "test": examples(range(7, 11))}}

    def _generate_examples(self, numbers):
        for number in numbers:
            yield number, {{"image": f"{{number}}.png", "label": number % 3}}

Toy(data_dir="data", file_format="array_record").download_and_prepare()
"""


def picture(number: int) -> Image.Image:
    pixels = np.random.RandomState(number).randint(0, 255, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def check(source, first: int, count: int, title: str) -> None:
    assert (len(source), source.classes) == (count, CLASSES)
    for index in (count - 1, 0):
        image, label = read_image(source, index)
        assert np.array_equal(np.asarray(image), np.asarray(picture(first + index)))
        assert label == (first + index) % 3
        assert source.name(index) == f"{title}[{index}]"


@pytest.fixture
def hugging_face_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    for split, numbers in (("train", range(7)), ("validation", range(7, 11))):
        rows = {"image": list(map(picture, numbers)), "label": [n % 3 for n in numbers]}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(str(tmp_path / "toy" / "data" / f"{split}-00000.parquet"))
    return tmp_path / "toy"


def test_hugging_face_datasets(hugging_face_folder, tmp_path):
    name = f"hfds/{hugging_face_folder}"
    cache = str(tmp_path / "cache")
    check(open_source(name, cache, "train"), 0, 7, name)
    check(open_source(name, cache, "val"), 7, 4, name)


@pytest.fixture
def tensorflow_folder(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="pip install tensorflow-datasets")
    for number in range(11):
        picture(number).save(tmp_path / f"{number}.png")
    for name in ("README.md", "TAGS.txt", "CITATIONS.bib"):
        (tmp_path / name).write_text("")
    (tmp_path / "builder.py").write_text(TENSORFLOW_BUILDER)
    run = python("builder.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    return tmp_path / "data"


def test_tensorflow_datasets(tensorflow_folder):
    train = open_source("tfds/toy", str(tensorflow_folder), "train")
    val = open_source("tfds/toy", str(tensorflow_folder), "val")
    assert (len(train), len(val), train.classes) == (7, 4, CLASSES)
    # it writes examples in an order of its own
    found = {read_image(train, i)[0].tobytes(): read_image(train, i)[1] for i in range(7)}
    assert found == {picture(n).tobytes(): n % 3 for n in range(7)}
    assert val.name(3) == "tfds/toy[3]"


def test_torchvision(tmp_path):
    # what torchvision itself writes for a data set of folders
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            picture(label).save(folder / "0.png")
    source = open_source("torch/image_folder", str(tmp_path), "val")
    check(source, 0, 3, "torch/image_folder")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="hfds/x needs another library: pip install datasets"):
        open_source("hfds/x", None, "train")


def test_what_a_library_says_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"cannot open torch/cifar10 \(train\): .*--data-root"):
        open_source("torch/cifar10", str(tmp_path), "train")
    with pytest.raises(UsageError) as error:
        open_source("torch/nosuchset", str(tmp_path), "train")
    assert "\n" not in str(error.value)


def test_a_missing_split_is_named(hugging_face_folder, tmp_path):
    os.remove(hugging_face_folder / "data" / "validation-00000.parquet")
    with pytest.raises(UsageError, match="no split val, only train"):
        open_source(f"hfds/{hugging_face_folder}", str(tmp_path / "cache"), "val")
