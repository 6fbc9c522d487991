"""Official names, taken from the user's own folder or organisation."""

import logging

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from backbones.pretrained import WeightsError, load_weights
from backbones.pretrained import load as load_module
from backbones.pretrained.checksum import Record, StoredFile
from backbones.pretrained.load import load

NAME = "biformer_tiny.in1k"


def model(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    return tmp_path


def test_folder_of_a_model_then_a_file_then_the_official_name(folder):
    torch.save({"model": model(3), "model_ema": model(4)}, folder / "shvit_s1.pth")
    loaded = load("shvit_s1.in1k")
    assert loaded.state_dict["w"][0] == 3 and loaded.both and not loaded.ema
    assert loaded.key == "https://github.com/ysj9909/SHViT/releases/download/v1.0/shvit_s1.pth"
    save_file(model(2), folder / "shvit_s1.in1k.safetensors")
    assert load_weights("shvit_s1")["w"][0] == 2
    (folder / "shvit_s1.in1k").mkdir()
    save_file(model(1), folder / "shvit_s1.in1k" / "model.safetensors")
    loaded = load("shvit_s1")
    assert loaded.state_dict["w"][0] == 1
    assert (loaded.key, loaded.official) == ("converted:shvit_s1.in1k", "shvit_s1.in1k")


def test_file_of_the_authors_whose_links_are_dead(folder):
    torch.save({"model": model(3)}, folder / "biformer_tiny_best.pth")
    loaded = load(NAME)
    assert loaded.state_dict["w"][0] == 3
    assert loaded.key.startswith("https://api.onedrive.com/")


def test_average_that_is_meant(folder):
    both = {"model": model(3), "model_ema": model(4)}
    torch.save(both, folder / "L2ViT-Tiny-checkpoint-best-ema.pth")
    loaded = load("l2vit_tiny.in1k")
    assert loaded.state_dict["w"][0] == 4 and loaded.ema and loaded.both


def test_known_hash_of_a_converted_file(folder, monkeypatch):
    save_file(model(2), folder / f"{NAME}.safetensors")
    known = {f"converted:{NAME}": Record("a" * 64, 1)}
    monkeypatch.setattr(load_module, "recorded", known.get)
    with pytest.raises(WeightsError, match=rf"sha256 is \w{{64}}, expected {'a' * 64}"):
        load_weights(NAME)


def test_what_no_mirror_has_is_said_to_be_nowhere(folder):
    with pytest.raises(WeightsError, match=f"{NAME} cannot be downloaded: "):
        load_weights(NAME)


def test_folder_that_is_none(monkeypatch):
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", "/nope")
    with pytest.raises(WeightsError, match="BACKBONES_WEIGHTS_DIR is '/nope', which is no folder"):
        load_weights(NAME)


@pytest.fixture
def hub_calls(tmp_path, monkeypatch):
    """Stands in for the hub: repository -> its weights, or the error of the client."""
    monkeypatch.setenv("BACKBONES_HUB_ORG", "acme")
    answers, calls = {}, []

    def hub_file(repo_id, filename=None, revision=None, cache_dir=None, *, ask=True):
        calls.append((repo_id, filename, revision, ask))
        answer = answers.get(repo_id)
        if not isinstance(answer, dict):
            raise WeightsError(f"cannot load {repo_id}") from answer
        save_file(answer, tmp_path / "model.safetensors")
        return StoredFile(tmp_path / "model.safetensors", repo_id)

    monkeypatch.setattr(load_module, "hub_file", hub_file)
    return answers, calls


def not_found(cls):
    return cls.__new__(cls)


def test_organisation(hub_calls):
    answers, calls = hub_calls
    answers[f"acme/{NAME}"] = model(5)
    assert load_weights(NAME)["w"][0] == 5
    assert calls == [(f"acme/{NAME}", None, None, False)]


def test_original_of_what_the_organisation_lacks(hub_calls, caplog):
    answers, calls = hub_calls
    answers["acme/shvit_s1.in1k"] = not_found(RepositoryNotFoundError)
    answers["timm/shvit_s1.in1k"] = model(6)
    with caplog.at_level(logging.WARNING, logger="backbones.pretrained"):
        assert load_weights("shvit_s1.in1k")["w"][0] == 6
    assert "acme/shvit_s1.in1k has no shvit_s1.in1k: taking the original" in caplog.text
    assert calls[1] == ("timm/shvit_s1.in1k", "model.safetensors", None, False)


def test_organisation_that_cannot_be_reached_is_an_error(hub_calls):
    answers, calls = hub_calls
    answers["acme/shvit_s1.in1k"] = not_found(LocalEntryNotFoundError)
    answers["timm/shvit_s1.in1k"] = model(6)
    with pytest.raises(WeightsError, match=r"cannot load acme/shvit_s1.in1k"):
        load_weights("shvit_s1.in1k")
    assert len(calls) == 1


def test_recorded_commit_is_asked_for(hub_calls, monkeypatch):
    answers, calls = hub_calls
    monkeypatch.delenv("BACKBONES_HUB_ORG")
    answers["timm/shvit_s1.in1k"] = model(7)
    key = "hf-hub:timm/shvit_s1.in1k/model.safetensors"
    known = {key: Record("", 1, "c" * 40)}
    monkeypatch.setattr(load_module, "recorded", known.get)
    load_weights("shvit_s1.in1k")
    assert calls == [("timm/shvit_s1.in1k", "model.safetensors", "c" * 40, False)]


def test_organisation_that_is_none(monkeypatch):
    monkeypatch.setenv("BACKBONES_HUB_ORG", "a/b")
    with pytest.raises(WeightsError, match="BACKBONES_HUB_ORG is 'a/b': give the name"):
        load_weights(NAME)
