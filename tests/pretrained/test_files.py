"""Broken and hostile files: each is refused in one line that says what it is; none is executed."""

import argparse
import pickle
import random
import sys
import types

import pytest
import torch
from safetensors.torch import save

from backbones.pretrained import WeightsError, read_state_dict
from tests.pretrained.forge import LEGACY, Command, entry, packed_zip, pth, safetensors
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


def test_pickle_under_the_name_of_a_safe_format(tmp_path, weights):
    assert "under a false name" in refusal(tmp_path / "w.safetensors", pth(weights))


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
        (b"1234567", "neither safetensors nor of torch.save"),
        (b"cposix\nsystem\n(S'true'\ntR.", "neither safetensors nor"),
        (safetensors(b"{" * 10, b"")[:12], "truncated inside its header"),
        ((2**63).to_bytes(8, "little") + b"{}", "header claims 9223372036854775808 bytes"),
        (safetensors(b"{" + b" " * 8 * 2**20), "header claims 8388609 bytes"),
        (safetensors(b'{"a": '), "header is invalid"),
        (safetensors(b'{"a": \xff}'), "header is invalid"),
        (safetensors(b'{"a":' + b"[" * 100_000), "header is invalid"),
        (safetensors({"a": 3}), "header is invalid"),
        (safetensors({"a": {"dtype": "F32"}}), "header is invalid"),
        (safetensors({"a": entry(offsets=("x", "y"))}, b"0000"), "header is invalid"),
        (safetensors(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
        (safetensors({"a": entry(dtype="F4")}, b"0000"), "tensors of type F4"),
        (safetensors({"a": entry(shape=(2,))}, b"0000"), "SafetensorError"),
        (safetensors({"a": entry(shape=(2**62, 2**62))}, b"0000"), "SafetensorError"),
        (safetensors({"a": entry(offsets=(-4, 0))}, b"0000"), "SafetensorError"),
        (safetensors({"a": entry(), "b": entry()}, b"0000"), "SafetensorError"),
        (safetensors({"a": entry(offsets=(4, 8))}, b"00000000"), "SafetensorError"),
        (safetensors({"a": entry()}, b"00000000"), "SafetensorError"),
        (safetensors({"a": entry(offsets=(0, 400), shape=(100,))}, b"0" * 399), "truncated: "),
        (safetensors({}), "no state dict"),
        (safetensors({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(20_001)}), "20001"),
        (packed_zip(), "compressed archive"),
        (b"PK\x03\x04" + b"0" * 100, "truncated or damaged"),
        (pth([1, 2]), "holds a list"),
        (pth({"epoch": 1}), "no state dict"),
        (pth({"a": torch.ones(2, device="meta")}), "not an ordinary dense tensor"),
        (pth({"a": torch.eye(2).to_sparse()}), "not an ordinary dense tensor"),
        (pth({"a": torch.ones(1).expand(10**9)}), "claims shape (1000000000"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, content, message):
    assert message in refusal(tmp_path / "w", content)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("write", [save, pth])
def test_values_that_are_not_finite(tmp_path, write, value):
    content = write({"a": torch.ones(3), "b": torch.tensor([1.0, value])})
    assert "b holds NaN or infinite values" in refusal(tmp_path / "w", content)


@pytest.mark.parametrize("write", [pth, lambda v: pth(v, **LEGACY), pickle.dumps])
def test_code_is_named_and_not_executed(tmp_path, write):
    trap = tmp_path / "executed"
    message = refusal(tmp_path / "w", write({"model": Command(f"touch {trap}")}))
    assert "posix.system" in message or "nt.system" in message
    assert "not executed" in message
    assert not trap.exists()


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
