from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from backbones.training.augment import View, eval_transform
from backbones.training.data import (
    BadFiles,
    DataConfig,
    KeyedDataset,
    check_labels,
    make_loader,
    resolve_view,
)
from backbones.training.errors import UsageError
from backbones.training.runtime import World
from backbones.training.sampler import Sample, TrainBatches, TrainOrder
from backbones.training.sources import open_source
from tests.support.images import make_folder, odd_files

FIELDS = {name: item.default for name, item in DataConfig.__dataclass_fields__.items()}
WORLD = World(torch.device("cpu"))
VIEW = View(16, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


def _noisy(image):
    return eval_transform(VIEW)(image) + torch.rand(1)


@pytest.fixture
def source(tmp_path):
    return open_source(str(make_folder(tmp_path)), None, "train")


def _batches(source, workers, start=0):
    batches = TrainBatches(TrainOrder(len(source), 8, seed=5), start, 8)
    config = DataConfig(**(FIELDS | {"workers": workers}))
    return list(make_loader(source, _noisy, batches, config, WORLD, seed=5))


def test_batches_do_not_depend_on_workers_or_on_where_a_run_starts(source):
    whole = _batches(source, 0)
    assert len(whole) == 8
    for other in (_batches(source, 2), whole[:3] + _batches(source, 1, start=3)):
        for a, b in zip(whole, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_view_of_an_image_changes_with_epoch_and_repeat(source):
    data = KeyedDataset(source, _noisy, seed=5)
    places = [Sample(0, 3, 0), Sample(1, 3, 0), Sample(0, 3, 1)]
    views = [data[place][0] for place in places]
    assert torch.equal(views[0], data[places[0]][0])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))


def test_odd_files_are_read_or_replaced_and_named(tmp_path):
    folder = make_folder(tmp_path)
    for name, (content, _) in odd_files().items():
        (folder / "train" / "cat" / name).write_bytes(content)
    (folder / "train" / "cat" / "dangling.png").symlink_to("nowhere")
    (folder / "train" / "cat" / "locked.png").symlink_to("/proc/self/mem")
    source = open_source(str(folder), None, "train")
    data = KeyedDataset(source, eval_transform(VIEW), seed=0)
    bad = BadFiles(source, 0.01)
    for index in range(len(source)):
        image, label, failed = data[Sample(0, index)]
        assert image.shape == (3, 16, 16) and label in (0, 1)
        assert torch.equal(image, data[Sample(0, index)][0])
        bad.add(torch.tensor([failed]))
    named = {line.split("\t")[0].rsplit("/", 1)[1] for line in bad.lines()}
    expected = {name for name, (_, readable) in odd_files().items() if not readable}
    assert named == expected | {"dangling.png", "locked.png"}
    assert all(len(line.split("\t")[1]) > 5 for line in bad.lines())
    assert len(bad.indices) > bad.limit


def test_a_data_set_of_nothing_but_bad_files_still_gives_batches(tmp_path):
    folder = make_folder(tmp_path, train=1)
    for path in folder.glob("train/*/*.png"):
        path.write_bytes(b"no image")
    source = open_source(str(folder), None, "train")
    image, _, failed = KeyedDataset(source, eval_transform(VIEW), seed=0)[Sample(0, 1)]
    assert image.shape == (3, 16, 16) and failed == 1


def test_the_view_is_the_settings_then_the_models():
    class Model(torch.nn.Module):
        pretrained_cfg = {  # noqa: RUF012
            "input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic",
            "mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2),
        }  # fmt: skip

    folder = DataConfig(**(FIELDS | {"name": "somewhere"}))
    assert resolve_view(folder, Model()) == View(224, (0.4,) * 3, (0.2,) * 3, "bicubic", 0.9)
    changed = dataclasses.replace(folder, img_size=96, crop_pct=1.0)
    view = resolve_view(changed, Model())
    assert (view.size, view.crop_pct, view.mean) == (96, 1.0, (0.4,) * 3)
    digits = resolve_view(DataConfig(**FIELDS), Model())
    assert digits == View(32, (0.3,) * 3, (0.35,) * 3, "bilinear", 1.0)
    Model.pretrained_cfg["crop_mode"] = "squash"
    assert resolve_view(folder, Model()).crop_mode == "squash"
    changed = dataclasses.replace(folder, crop_mode="border")
    assert resolve_view(changed, Model()).crop_mode == "border"


def test_labels_that_the_model_has_no_class_for_are_named():
    check_labels(torch.tensor([0, 4, 2]), 5)
    with pytest.raises(UsageError, match=r"class 5, but .* 5 classes.*: use --num-classes 6"):
        check_labels(torch.tensor([0, 5, 2]), 5)
