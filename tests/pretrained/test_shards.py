import json

import pytest
import torch
from safetensors.torch import save_file

from backbones.pretrained import WeightsError, load_weights
from backbones.pretrained.load import load

INDEX = "model.safetensors.index.json"
PARTS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(3.0)},
    "model-00002-of-00002.safetensors": {"b": torch.ones(2), "c": torch.zeros(1)},
}


@pytest.fixture
def folder(tmp_path):
    for name, tensors in PARTS.items():
        save_file(tensors, tmp_path / name)
    write(tmp_path, {key: name for name, tensors in PARTS.items() for key in tensors})
    return tmp_path


def write(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder, **weight_map):
    write(folder, json.loads((folder / INDEX).read_text())["weight_map"] | weight_map)


@pytest.mark.parametrize("name", ["", INDEX])
def test_all_shards(folder, name):
    state_dict = load_weights(folder / name)
    assert {key: value.tolist() for key, value in state_dict.items()} == {
        "a": [0, 1, 2],
        "b": [1, 1],
        "c": [0],
    }


def test_hash_is_of_all_shards(folder):
    loaded = load(folder)
    assert loaded.size == sum((folder / name).stat().st_size for name in PARTS)
    load(folder, sha256=loaded.sha256[:10])
    save_file({"b": torch.ones(2), "c": torch.ones(1)}, folder / list(PARTS)[1])
    assert load(folder).sha256 != loaded.sha256
    with pytest.raises(WeightsError, match=rf"is \w{{64}}, expected {loaded.sha256}"):
        load(folder, sha256=loaded.sha256)


def test_shard_that_is_missing(folder):
    (folder / next(iter(PARTS))).unlink()
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors: no such file, but its"):
        load_weights(folder)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"d": "model-00002-of-00002.safetensors"}, "d is missing from model-00002"),
        ({"b": "model-00001-of-00002.safetensors"}, "b is missing from model-00001"),
        ({"a": "../x.safetensors"}, "names '../x.safetensors', which is no plain name"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"a": ".safetensors"}, "names '.safetensors'"),
        ({"a": ["x"]}, "no plain name"),
        ({f"t{i}": f"s{i}.safetensors" for i in range(300)}, "more than 256 files"),
    ],
)
def test_index_that_lies(folder, weight_map, message):
    change(folder, **weight_map)
    with pytest.raises(WeightsError, match=message):
        load_weights(folder)


def test_tensor_that_no_index_names(folder):
    one, two = PARTS
    write(folder, {"a": one, "b": two})
    with pytest.raises(WeightsError, match="c is not meant to be in model-00002"):
        load_weights(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_index_that_is_broken(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(WeightsError, match="cannot read the index"):
        load_weights(folder)
