"""Weight files of the hub, through the huggingface_hub client.

The client never compares a file with its checksum, gives up at once on a failed GET, and ignores a
warm cache when a HEAD is cut off; this module covers those three.
"""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checksum import SHA256, StoredFile
from .errors import WeightsError, is_disk_error, reason

_logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_RETRY_DELAYS = (0.5, 2.0)
_STALL_SECONDS = 3.0
# by name: the classes are of httpx or of httpx2, depending on the client's version
_TRANSIENT = {"RemoteProtocolError", "ReadError", "WriteError", "CloseError"}

_FIXES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "accept the terms on the repository's page, then set HF_TOKEN"),
    (RepositoryNotFoundError, "check the name; for a private repository set HF_TOKEN"),
    (RevisionNotFoundError, "check the revision after the @"),
    (EntryNotFoundError, "choose a file of the repository with filename="),
    (ValueError, "write hf-hub:org/repo or hf-hub:org/repo@revision, and no .. in filename="),
)


def hub_file(
    repo_id: str,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> StoredFile:
    """Download a weight file of the hub, or find it in the cache.

    A revision that is a commit (40 hex digits) costs no request once it is cached. Any other is
    looked up on the hub first; without a connection the cached file is used. The hash recorded is
    the hub's ETag, after which the cache names the content of a large file.

    Args:
        repo_id: `org/repo`.
        filename: The file; by default `model.safetensors`, else `pytorch_model.bin`.
        revision: Branch, tag or commit; by default the main branch.
        cache_dir: By default the client's own (`HF_HUB_CACHE`).

    Raises:
        WeightsError: It is neither on the hub nor in the cache, or cannot be downloaded.
    """
    repository = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    names = [filename] if filename else list(WEIGHT_FILES)
    while True:
        name = names.pop(0)
        try:
            path = _download(repo_id, name, revision, cache_dir)
            return _stored(path, f"{repository}/{name}")
        except Exception as error:  # the client raises what its HTTP library does
            if names and _is_absent(error):
                continue
            raise WeightsError(
                f"cannot load {repository}/{name} from {constants.ENDPOINT}: {reason(error)}; "
                f"{_advice(error, cache_dir)}"
            ) from error


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids all requests."""
    return constants.HF_HUB_OFFLINE


def _stored(path: Path, source: str) -> StoredFile:
    content = path.resolve()
    recorded = content.name if SHA256.fullmatch(content.name) else None
    return StoredFile(path, source, recorded, cached=(content, path))


def _download(
    repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None
) -> Path:
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    held = Path(cached) if isinstance(cached, str) else None
    for delay in (*_RETRY_DELAYS, None):
        try:
            return Path(
                hf_hub_download(
                    repo_id,
                    filename,
                    revision=revision,
                    cache_dir=cache_dir,
                    # with a file at hand, a hub that does not answer is not waited for
                    etag_timeout=_STALL_SECONDS if held else constants.DEFAULT_ETAG_TIMEOUT,
                )
            )
        except Exception as error:  # the client raises what its HTTP library does
            if not _is_transient(error):
                raise
            if held is not None:
                _logger.warning("the hub cannot be reached, using the cached %s", held)
                return held
            if delay is None:
                raise
            time.sleep(delay * random.uniform(1.0, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed where the client itself makes none."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _TRANSIENT) or "Consistency check failed" in str(error)


def _is_absent(error: Exception) -> bool:
    """Whether the file is known not to be there, so that another name is worth a try."""
    unreachable = isinstance(error, LocalEntryNotFoundError) and not is_offline()
    return isinstance(error, EntryNotFoundError) and not unreachable


def _advice(error: Exception, cache_dir: str | Path | None) -> str:
    cache = cache_dir or constants.HF_HUB_CACHE
    if is_disk_error(error):
        return f"make {cache} writable and free space there, or set HF_HOME to another disk"
    if is_offline():
        return f"HF_HUB_OFFLINE is set and {cache} does not hold it: unset it or fill the cache"
    if not isinstance(error, LocalEntryNotFoundError):
        for kind, fix in _FIXES:
            if isinstance(error, kind):
                return fix
    return (
        "check the connection and try again, set HF_ENDPOINT to a mirror, or give a local file "
        f"(the cache is {cache})"
    )
