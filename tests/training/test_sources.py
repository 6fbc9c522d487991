from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from backbones.training.data import DataConfig, class_count, open_splits
from backbones.training.digits import Digits
from backbones.training.errors import UsageError
from backbones.training.sources import open_source, to_rgb
from tests.support.images import encode, make_folder


def _data(name) -> DataConfig:
    fields = {key: item.default for key, item in DataConfig.__dataclass_fields__.items()}
    return DataConfig(**(fields | {"name": str(name)}))


def test_the_digits_are_split_once_and_for_all():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    image, label = val.load(0)
    assert (image.size, image.mode) == ((8, 8), "RGB") and 0 <= label < 10
    counts = np.bincount([val.load(i)[1] for i in range(360)], minlength=10)
    assert counts.min() >= 25
    ours = {train.load(i)[0].tobytes() for i in range(1437)}
    assert not ours & {val.load(i)[0].tobytes() for i in range(360)}


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_a_folder_is_found_with_its_classes(tmp_path, val):
    make_folder(tmp_path, train=3, val=2)
    (tmp_path / "val").rename(tmp_path / val)
    splits = open_splits(_data(tmp_path))
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val)) == (6, 4)
    assert [splits.train.load(i)[1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert splits.train.name(0).endswith("train/cat/000.png")


def test_16_bit_images_keep_their_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    grey = np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0]
    assert (grey.min(), grey.max()) == (0, 255) and len(np.unique(grey)) > 250


def test_transparent_palettes_become_rgb():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert to_rgb(image).getpixel((0, 0)) == (200, 100, 50)


def test_class_count_comes_from_the_data():
    splits = open_splits(_data("digits"))
    assert class_count(splits, None) == class_count(splits, 10) == 10
    with pytest.raises(UsageError, match="--num-classes 7, but the data has 10"):
        class_count(splits, 7)


def test_missing_and_unfit_data_is_named(tmp_path):
    with pytest.raises(UsageError, match="no data at"):
        open_source(str(tmp_path / "nothing"), None, "train")
    with pytest.raises(UsageError, match="has no train/ or training/"):
        open_source(str(tmp_path), None, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="Found 0 images"):
        open_source(str(tmp_path), None, "train")
    with pytest.raises(UsageError, match="wds/imagenet needs --data-root FOLDER"):
        open_source("wds/imagenet", None, "train")
    with pytest.raises(UsageError, match="use hfds/ instead of hfids/"):
        open_source("hfids/user/name", None, "train")


def test_an_empty_class_folder_is_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(UsageError, match=r"no images in .*emu .*delete the folder"):
        open_source(str(tmp_path), None, "train")


def test_images_outside_of_class_folders_are_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "stray.png").write_bytes(encode(Image.new("RGB", (4, 4))))
    with pytest.raises(UsageError, match="outside of class folders"):
        open_source(str(tmp_path), None, "train")


def test_different_classes_in_the_two_halves_are_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "emu")
    with pytest.raises(UsageError, match="only in training dog, only in validation emu"):
        open_splits(_data(tmp_path))
