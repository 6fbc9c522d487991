"""Weight files from plain URLs."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from huggingface_hub.utils import WeakFileLock

from .checksum import SHA256, StoredFile, matches, sha256_of
from .errors import WeightsError, is_disk_error, reason
from .files import check_file
from .hub import is_offline

_RETRY_DELAYS = (0.5, 2.0)
_TIMEOUT_SECONDS = 30.0
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


def url_file(
    url: str, sha256: str | None = None, cache_dir: str | Path | None = None
) -> StoredFile:
    """Download a file, or find it in the cache.

    A file appears in the cache whole and checked or not at all: its length, its hash if one is
    known (given, or part of the name as in `name-1a2b3c4d.pth`), and that it holds weights. The
    hash of the download is kept beside it. URLs that end alike do not share a file.

    Args:
        url: `http://` or `https://`.
        sha256: Expected SHA-256, or its first digits.
        cache_dir: By default `checkpoints` in torch.hub's folder (`TORCH_HOME`).

    Raises:
        WeightsError: It cannot be downloaded or is not what was expected.
    """
    path = cached_path(url, cache_dir)
    if path.exists():
        return _stored(path, url)
    if is_offline():
        raise WeightsError(
            f"cannot load {url}: HF_HUB_OFFLINE is set and {path} does not exist; unset it, or "
            "give a local file"
        )
    try:
        locks = path.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{path.name}.lock"):
            if not path.exists():
                _remove_partial(path)
                _fetch_with_retries(url, path, sha256)
    except (OSError, HTTPException, ValueError) as error:
        raise WeightsError(
            f"cannot load {url}: {reason(error)}; check the link, the connection and the free "
            f"space in {path.parent}, or download it yourself and give the file"
        ) from error
    return _stored(path, url)


def _stored(path: Path, url: str) -> StoredFile:
    record = _record(path)
    text = record.read_text().strip() if record.exists() else ""
    recorded = text if SHA256.fullmatch(text) else None
    return StoredFile(path, url, recorded, cached=(path, record))


def cached_path(url: str, cache_dir: str | Path | None) -> Path:
    """Where the cache has a file, whether it is there or not.

    Args:
        url: Its URL.
        cache_dir: As for `url_file`.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name[-100:] or 'weights'}"


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _remove_partial(path: Path) -> None:
    """Remove what killed processes left; the lock is held, so nobody is writing it."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


def _fetch_with_retries(url: str, path: Path, sha256: str | None) -> None:
    for delay in (*_RETRY_DELAYS, None):
        try:
            return _fetch(url, path, sha256)
        except (OSError, HTTPException) as error:
            refused = isinstance(error, HTTPError) and error.code < 500 and error.code != 429
            if delay is None or refused or is_disk_error(error):
                raise
            time.sleep(delay * random.uniform(1.0, 1.5))


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _stream(url, partial)
        actual = sha256_of(partial)
        named = _HASH_IN_NAME.search(urlsplit(url).path)
        expected = sha256 or (named[1] if named else "")
        if not matches(actual, expected):
            raise WeightsError(
                f"cannot load {url}: its sha256 is {actual}, expected {expected}; nothing was kept"
            )
        _check(url, partial)
        _record(path).write_text(actual)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str, target: Path) -> None:
    request = Request(url, headers={"User-Agent": "fused-backbones"})
    with urlopen(request, timeout=_TIMEOUT_SECONDS) as response, target.open("xb") as file:
        while chunk := response.read(2**20):
            file.write(chunk)
        size, length = file.tell(), response.headers.get("Content-Length")
    if length is not None and size != int(length):
        raise ConnectionError(f"the connection closed after {size} of {length} bytes")


def _check(url: str, path: Path) -> None:
    try:
        check_file(path)
    except WeightsError as error:
        raise WeightsError(f"cannot load {url}: {error}; nothing was kept") from error
