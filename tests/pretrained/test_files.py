"""Reading weight files; those that are broken or hostile are in tests/faults/files.py."""

import argparse
import random
import sys
import types

import pytest
import torch
from safetensors.torch import save

from backbones.pretrained import WeightsError, read_state_dict
from tests.pretrained.forge import LEGACY, Command, pth
from tests.support import golden


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w"])
def test_format_is_told_from_the_content(tmp_path, weights, data, name):
    namespace = argparse.Namespace(lr=1e-3)
    for content in (data, pth(weights), pth({"model": weights, "args": namespace}, **LEGACY)):
        (tmp_path / name).write_bytes(content)
        result = read_state_dict(tmp_path / name)
        assert result.keys() == weights.keys()
        assert all(torch.equal(result[key], value) for key, value in weights.items())


def test_configurations_beside_the_weights_are_not_built(tmp_path):
    """A file of torch.save with an `omegaconf.DictConfig`; the library is not needed."""
    content = (golden.GOLDEN / "omegaconf.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content)
    assert torch.equal(read_state_dict(tmp_path / "w.pth")["a"], torch.arange(3.0))
    assert "omegaconf" not in sys.modules


def test_code_beside_a_configuration_is_not_executed(tmp_path, monkeypatch):
    trap = tmp_path / "executed"
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    checkpoint = {"model": {"a": torch.ones(1)}, "args": module.DictConfig()}
    (tmp_path / "w").write_bytes(pth(checkpoint))
    assert read_state_dict(tmp_path / "w")["a"] == 1
    message = refusal(tmp_path / "v", pth({**checkpoint, "b": Command(f"touch {trap}")}))
    assert "posix.system" in message or "nt.system" in message
    assert not trap.exists()


def test_moving_average_on_request(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "model_ema": {"a": torch.zeros(1)}}, tmp_path / "w")
    assert read_state_dict(tmp_path / "w")["a"] == 1
    assert read_state_dict(tmp_path / "w", ema=True)["a"] == 0


@pytest.mark.parametrize("write", [save, pth, lambda v: pth(v, **LEGACY)])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, weights, write, part):
    content = write(weights)
    refusal(tmp_path / "w", content[: int(len(content) * part)])


def test_flipped_bits_of_an_archive_are_found_without_a_hash(tmp_path, weights):
    content, chance = pth(weights), random.Random(0)
    path = tmp_path / "w"
    for _ in range(100):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            result = read_state_dict(path)
        except WeightsError:
            continue
        # a bit of the padding or of a time stamp: it is not part of any tensor
        assert all(torch.equal(result[key], value) for key, value in weights.items())


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"nope.pth: .*check the path"):
        read_state_dict(tmp_path / "nope.pth")
    with pytest.raises(WeightsError, match="check the path"):
        read_state_dict(tmp_path)
