"""Random access to WebDataset shards."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from backbones.training.errors import UsageError
from backbones.training.shards import Shards, find_shards
from tests.support.images import encode, write_shard


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.RandomState(number).randint(0, 255, (9, 12, 3)).astype(np.uint8)
    return encode(Image.fromarray(pixels), kind)


def samples(first: int, count: int) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"n01/img_{number}.png"] = picture(number)
        members[f"n01/img_{number}.json"] = b"{}"
        members[f"n01/img_{number}.cls"] = str(number % 3).encode()
    return members


def test_every_sample_by_index(tmp_path):
    paths = [
        write_shard(tmp_path / "train-0.tar", samples(0, 4)),
        write_shard(tmp_path / "train-1.tar", samples(4, 3)),
    ]
    shards = Shards(paths)
    assert len(shards) == 7
    for index in (6, 0, 3, 4):
        image, label = shards.load(index)
        expected = Image.open(io.BytesIO(picture(index)))
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert label == index % 3
        assert shards.name(index) == f"{paths[index >= 4]}:n01/img_{index}"


def test_samples_without_an_image_and_folders_are_left_out(tmp_path):
    members = {"a.txt": b"x", "a.cls": b"1", "b.seg.png": picture(0), "b.cls": b"1"}
    members |= {"c.JPG": picture(2, "JPEG"), "c.cls": b"2\n"}
    path = write_shard(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    shards = Shards([path])
    assert [shards.name(i).rpartition(":")[2] for i in range(len(shards))] == ["c"]
    assert shards.load(0)[1] == 2


def test_split_from_info_then_folders_then_names(tmp_path):
    for name in ("x/train/1.tar", "x/train/0.tar", "x/val-0.tar", "x/other.tar"):
        write_shard(tmp_path / name, {})
    root = tmp_path / "x"
    assert find_shards(root, ("train",)) == [root / "train/0.tar", root / "train/1.tar"]
    assert find_shards(root, ("val", "validation")) == [root / "val-0.tar"]
    info = {"splits": {"validation": {"filenames": ["other.tar"]}}}
    (root / "_info.json").write_text(json.dumps(info))
    assert find_shards(root, ("val", "validation")) == [root / "other.tar"]
    assert find_shards(root, ("train",)) == [root / "train/0.tar", root / "train/1.tar"]
    with pytest.raises(UsageError, match=r"no shards of test in .*x: name them test-0000\.tar"):
        find_shards(root, ("test",))


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {"val": {}}}'])
def test_a_damaged_list_of_shards_is_named(tmp_path, text):
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises(UsageError, match=r"_info\.json does not list splits .*correct or delete"):
        find_shards(tmp_path, ("val", "validation"))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": b""}, r"0\.tar: sample a has no class: add a\.cls"),
        ({"a.png": b"", "a.cls": b"cat"}, r"0\.tar: a\.cls holds 'cat', not a class number"),
    ],
)
def test_samples_without_a_class_are_named(tmp_path, members, message):
    with pytest.raises(UsageError, match=message):
        Shards([write_shard(tmp_path / "0.tar", members)])


def test_files_that_are_no_shards_are_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(UsageError, match=r"0\.tar is not a readable tar file"):
        Shards([tmp_path / "0.tar"])
    with pytest.raises(UsageError, match=r"1\.tar is not a readable tar file"):
        Shards([tmp_path / "1.tar"])


def test_truncated_shard_is_named(tmp_path):
    path = write_shard(tmp_path / "0.tar", samples(0, 4))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"0\.tar is not a readable tar file"):
        Shards([path])
