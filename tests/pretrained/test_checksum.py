import hashlib
import json

import pytest

from backbones.pretrained import WeightsError, checksum, load_weights
from backbones.pretrained.checksum import Record, StoredFile, record, recorded, verify

DIGEST = "a" * 64


@pytest.fixture
def records(tmp_path, monkeypatch):
    path = tmp_path / "checksums.json"
    monkeypatch.setattr(checksum, "RECORDS", path)
    return path


def test_what_the_package_has_is_readable():
    for key, value in json.loads(checksum.RECORDS.read_text()).items():
        assert checksum.SHA256.fullmatch(Record(**value).sha256), key


def test_write_and_read(records):
    assert recorded("https://a/b.pth") is None
    record("https://a/b.pth", Record(DIGEST, 3))
    record("hf-hub:a/b/c", Record(DIGEST, 3, "b" * 40))
    record("https://a/b.pth", Record(DIGEST, 3))
    assert recorded("https://a/b.pth") == Record(DIGEST, 3, None)
    assert recorded("hf-hub:a/b/c") == Record(DIGEST, 3, "b" * 40)
    assert [path.name for path in records.parent.iterdir()] == [records.name]


def test_another_hash_is_refused(records):
    record("https://a/b.pth", Record(DIGEST, 3))
    before = records.read_text()
    with pytest.raises(WeightsError, match=f"sha256 is {'b' * 64}, recorded in .* is {DIGEST}"):
        record("https://a/b.pth", Record("b" * 64, 3))
    assert records.read_text() == before


def test_records_that_are_broken(records):
    records.write_text("{")
    with pytest.raises(WeightsError, match="mend or delete it"):
        recorded("x")


def test_a_recorded_download_is_compared(hub, records, tmp_path, data):
    location = hub.add_plain("known.pth", data)
    right = hashlib.sha256(data).hexdigest()
    record(location, Record(DIGEST, len(data)))
    with pytest.raises(WeightsError, match=f"sha256 is {right}, expected {DIGEST}"):
        load_weights(location, cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.pth"))
    records.unlink()
    load_weights(location, cache_dir=tmp_path / "c")
    record(location, Record(DIGEST, len(data)))
    with pytest.raises(WeightsError, match=f"sha256 is {right}, expected {DIGEST}"):
        load_weights(location, cache_dir=tmp_path / "c")


def test_git_hash_of_a_small_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}\n")
    # `printf '{}\n' | git hash-object --stdin`
    file = StoredFile(path, "here", "0967ef424bce6791893e9a57bb952f80fd536e93", (path,))
    verify(file)
    path.write_bytes(b"{ }")
    with pytest.raises(WeightsError, match=r"git hash is \w{40}, at its source it is 0967ef424"):
        verify(file)
    assert not path.exists()
