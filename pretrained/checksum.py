"""SHA-256 of weight files: neither their formats nor the hub's client compare a checksum."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import WeightsError

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """A weight file on this machine.

    Attributes:
        path: The file.
        source: Where it came from, for messages.
        recorded: The SHA-256 it had at its source, or None if that is not known.
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
        expected: SHA-256 that the user or the weight table asks for, or its first digits.

    Returns:
        The file's SHA-256.

    Raises:
        WeightsError: A hash differs; the message names both.
    """
    actual = sha256_of(file.path)
    if file.recorded is not None and actual != file.recorded:
        for path in file.cached:
            path.unlink(missing_ok=True)
        raise WeightsError(
            f"{file.source} is damaged: its sha256 is {actual}, at its source it is "
            f"{file.recorded}; it was deleted from the cache, load it again"
        )
    if not matches(actual, expected or ""):
        raise WeightsError(
            f"{file.source} is not the file asked for: its sha256 is {actual}, expected "
            f"{expected}; check the hash, and the revision or link"
        )
    return actual


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
