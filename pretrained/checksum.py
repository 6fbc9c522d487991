"""Hashes of files: neither the formats of weights nor the hub's client compare a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import WeightsError, reason

SHA256 = re.compile(r"[0-9a-f]{64}")
# what is known of official files, written by `python -m backbones convert`
RECORDS = Path(__file__).with_name("checksums.json")


@dataclass(frozen=True)
class Record:
    """What is known of an official file since somebody had it.

    Attributes:
        sha256: Its hash, 64 hex digits.
        size: Its length in bytes.
        revision: The commit of the hub's repository that has it, 40 hex digits, or None.
    """

    sha256: str
    size: int
    revision: str | None = None


@dataclass(frozen=True)
class StoredFile:
    """A weight file on this machine.

    Attributes:
        path: The file.
        source: Where it came from, for messages.
        recorded: The hash it had at its source, or None if that is not known: a SHA-256, or git's
            SHA-1 of a small file of the hub.
        cached: What to delete when the file is damaged; empty for a file that is the user's own.
        revision: The commit of the hub's repository that it belongs to, or None.
    """

    path: Path
    source: str
    recorded: str | None = None
    cached: tuple[Path, ...] = ()
    revision: str | None = None


def verify(file: StoredFile, expected: str | None = None) -> str:
    """Compare a file with its recorded and its expected hash; a damaged cached file is deleted.

    Done at every load, so that a cache that rots is found.

    Args:
        file: The file.
        expected: SHA-256 that the user asks for or `checksums.json` has, or its first digits.

    Returns:
        The file's SHA-256.

    Raises:
        WeightsError: A hash differs; the message names both.
    """
    actual = sha256_of(file.path)
    if file.recorded is not None:
        _compare_with_source(file, actual)
    if not matches(actual, expected or ""):
        raise WeightsError(
            f"{file.source} is not the file asked for: its sha256 is {actual}, expected "
            f"{expected}; check the hash, and the revision or link"
        )
    return actual


def _compare_with_source(file: StoredFile, sha256: str) -> None:
    is_sha256 = SHA256.fullmatch(file.recorded or "")
    kind, actual = ("sha256", sha256) if is_sha256 else ("git hash", git_hash(file.path))
    if actual == file.recorded:
        return
    try:
        for path in file.cached:
            path.unlink(missing_ok=True)
        fix = "it was deleted from the cache, load it again" if file.cached else "fetch it again"
    except OSError as error:
        fix = f"it cannot be deleted ({reason(error)}): do that, and load it again"
    raise WeightsError(
        f"{file.source} is damaged: its {kind} is {actual}, at its source it is "
        f"{file.recorded}; {fix}"
    )


def recorded(key: str, path: Path | None = None) -> Record | None:
    """What is known of an official file.

    Args:
        key: `hf-hub:org/repo/file`, a URL, or `converted:model.tag` for what
            `python -m backbones convert` makes of it.
        path: The file of records; by default `checksums.json` of the package.

    Raises:
        WeightsError: The file of records cannot be read.
    """
    found = _records(path or RECORDS).get(key)
    return Record(**found) if found else None


def record(key: str, value: Record, path: Path | None = None) -> None:
    """Write down what is known of an official file.

    Args:
        key: As for `recorded`.
        value: What is known now.
        path: The file of records; by default `checksums.json` of the package.

    Raises:
        WeightsError: Another hash is recorded already; the message names both.
        OSError: The file of records cannot be written.
    """
    path = path or RECORDS
    records = _records(path)
    known = records.get(key)
    if known and known["sha256"] != value.sha256:
        raise WeightsError(
            f"{key} has changed: its sha256 is {value.sha256}, recorded in {path} is "
            f"{known['sha256']}; if its authors replaced it, delete that entry"
        )
    records[key] = {name: v for name, v in asdict(value).items() if v is not None}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsError(f"cannot read {path}: {error}; mend or delete it") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def matches(sha256: str, expected: str) -> bool:
    """Whether a SHA-256 begins with the digits of `expected`, in upper or lower case.

    Args:
        sha256: 64 hex digits.
        expected: Any number of its first digits.
    """
    return sha256.startswith(expected.lower())


def git_hash(path: Path) -> str:
    """The hash by which git, and so the hub's ETag, knows a small file: 40 hex digits.

    Args:
        path: The file.
    """
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
