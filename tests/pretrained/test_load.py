import hashlib
import logging

import pytest
import torch

from backbones.pretrained import WeightsError, load_weights


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def test_says_in_one_line_what_was_loaded(file, data, caplog):
    with caplog.at_level(logging.INFO, logger="backbones.pretrained"):
        load_weights(file)
    digest = hashlib.sha256(data).hexdigest()[:12]
    expected = f"loaded 2 tensors (float32, plain weights) from {file}, sha256 {digest}"
    assert [record.message for record in caplog.records] == [expected]


def test_moving_average(tmp_path, caplog):
    torch.save({"model": {"a": torch.ones(1)}, "model_ema": {"a": torch.zeros(1)}}, tmp_path / "w")
    with caplog.at_level(logging.INFO, logger="backbones.pretrained"):
        assert load_weights(tmp_path / "w", ema=True)["a"] == 0
    assert "EMA weights" in caplog.text


def test_hash_of_a_local_file(file, data):
    digest = hashlib.sha256(data).hexdigest()
    load_weights(file, sha256=digest.upper())
    load_weights(file, sha256=digest[:8])
    with pytest.raises(WeightsError, match=f"sha256 is {digest}, expected 1234"):
        load_weights(file, sha256="1234")
    assert file.exists(), "a file of the user's own is never deleted"


def test_folder_prefers_safetensors(file, weights):
    torch.save({"other": torch.ones(1)}, file.parent / "pytorch_model.bin")
    assert load_weights(file.parent).keys() == weights.keys()
    assert "other" in load_weights(file.parent, filename="pytorch_model.bin")


def test_folder_with_one_file_of_another_name(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "shvit_s1.pth")
    assert "a" in load_weights(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "shvit_s2.pth")
    with pytest.raises(WeightsError, match=r"shvit_s1.pth, shvit_s2.pth; name one"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("shvit_s9.in1k", "did you mean"),
        ("nope.pth", "nope.pth: no such file"),
        ("some/folder", "some/folder: no such file"),
        ("hf-hub:nope", "cannot load hf-hub:nope"),
    ],
)
def test_nothing_there(location, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=message):
        load_weights(location)


def test_empty_folder(tmp_path):
    with pytest.raises(WeightsError, match="it has no weight file"):
        load_weights(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(tmp_path, filename="w.pth")
