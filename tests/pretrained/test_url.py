import hashlib

import pytest
import torch

from backbones.pretrained import WeightsError, load_weights, url


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(url, "_RETRY_DELAYS", (0.0, 0.0))


@pytest.fixture
def load(tmp_path):
    """Load into a cache of this test's own."""
    return lambda location, **kwargs: load_weights(location, cache_dir=tmp_path / "c", **kwargs)


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "c").glob("*") if path.is_file())


def test_download_once(hub, tmp_path, load, weights, data):
    location = hub.add_plain("once.pth", data)
    for _ in range(2):
        assert torch.equal(load(location)["w"], weights["w"])
    assert hub.requests("once.pth") == {"GET": 1}
    stored, record = files(tmp_path)
    assert stored.endswith("-once.pth") and record == f"{stored}.sha256"


def test_urls_that_end_alike(hub, tmp_path, load, data):
    one, two = hub.add_plain("a/same.pth", data), hub.add_plain("b/same.pth", data)
    load(one), load(two)
    assert hub.requests("b/same.pth") == {"GET": 1}
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["truncate", "reset", "close", "503", "429"])
def test_one_failure_is_survived(hub, load, weights, data, kind):
    name = f"{kind}-once.pth"
    location = hub.add_plain(name, data)
    hub.fail(name, kind, times=1)
    assert torch.equal(load(location)["w"], weights["w"])
    assert hub.requests(name) == {"GET": 2}


@pytest.mark.parametrize(
    ("kind", "message", "requests"),
    [
        ("truncate", "ConnectionError: the connection closed after", 3),
        ("reset", "check the link, the connection", 3),
        ("503", "HTTP Error 503", 3),
        ("404", "HTTP Error 404", 1),
        ("short", "truncated", 1),
        ("html", "a web page", 1),
        ("pointer", "a git-lfs pointer", 1),
    ],
)
def test_failure_leaves_nothing_behind(hub, tmp_path, load, data, kind, message, requests):
    name = f"{kind}-always.pth"
    location = hub.add_plain(name, data)
    hub.fail(name, kind)
    with pytest.raises(WeightsError, match=message) as error:
        load(location)
    assert location in str(error.value) and "\n" not in str(error.value)
    assert hub.requests(name) == {"GET": requests}
    assert files(tmp_path) == []


def test_server_that_hangs(hub, load, data, monkeypatch):
    monkeypatch.setattr(url, "_TIMEOUT_SECONDS", 0.2)
    location = hub.add_plain("hang.pth", data)
    hub.fail("hang.pth", "hang")
    with pytest.raises(WeightsError, match="timed out"):
        load(location)


def test_server_that_is_gone(load):
    with pytest.raises(WeightsError, match=r"Connection refused.*check the link"):
        load("http://127.0.0.1:9/w.pth")


@pytest.mark.parametrize("where", ["argument", "name"])
def test_flipped_bit_with_a_known_hash(hub, tmp_path, load, data, where):
    digest = hashlib.sha256(data).hexdigest()
    name = f"flip-{digest[:8]}.pth" if where == "name" else "flip.pth"
    location = hub.add_plain(name, data)
    hub.fail(name, "corrupt", times=1)
    known = {"sha256": digest} if where == "argument" else {}
    with pytest.raises(WeightsError, match=rf"sha256 is \w{{64}}, expected {digest[:8]}"):
        load(location, **known)
    assert files(tmp_path) == []
    load(location, **known)


def test_cache_that_rots(hub, tmp_path, load, weights, data):
    location = hub.add_plain("rot.pth", data)
    load(location)
    stored = next((tmp_path / "c").glob("*-rot.pth"))
    stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(WeightsError, match=rf"is damaged.*{digest}; it was deleted"):
        load(location)
    assert files(tmp_path) == []
    assert torch.equal(load(location)["w"], weights["w"])


def test_remains_of_a_killed_download_are_removed(hub, tmp_path, load, data):
    location = hub.add_plain("killed.pth", data)
    load(location)
    stored = next((tmp_path / "c").glob("*-killed.pth"))
    stored.rename(f"{stored}.0123.partial")
    load(location)
    assert files(tmp_path) == [stored.name, f"{stored.name}.sha256"]


def test_offline(hub, load, data, monkeypatch):
    location = hub.add_plain("offline.pth", data)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        load(location)
    monkeypatch.undo()
    load(location)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load(location)
    assert hub.requests("offline.pth") == {"GET": 1}


def test_cache_that_cannot_be_written(hub, tmp_path, data):
    location = hub.add_plain("readonly.pth", data)
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match="free space in"):
        load_weights(location, cache_dir=tmp_path / "c")


def test_default_folder_is_that_of_torch_hub(hub, tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "c"))
    load_weights(hub.add_plain("default.pth", data))
    assert len(list((tmp_path / "c" / "checkpoints").glob("*-default.pth"))) == 1
