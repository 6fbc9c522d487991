"""Files of the hub's repositories, through the huggingface_hub client.

The client never compares a file with its checksum, gives up at once on a failed GET, ignores a warm
cache when a HEAD is cut off or the cache cannot be written, and leaves what a killed process had
downloaded; this module covers those.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock

from .checksum import StoredFile
from .errors import WeightsError, is_disk_error, reason

_logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_RETRY_DELAYS = (0.5, 2.0)
_STALL_SECONDS = 3.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
# the SHA-256 of a large file, git's hash of a small one
_RECORDED = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
# by name: the classes are of httpx or of httpx2, depending on the client's version
_TRANSIENT = {"RemoteProtocolError", "ReadError", "WriteError", "CloseError"}

_FIXES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "accept the terms on the repository's page, then set HF_TOKEN"),
    (RepositoryNotFoundError, "check the name; for a private repository set HF_TOKEN"),
    (RevisionNotFoundError, "check the revision after the @"),
    (EntryNotFoundError, "choose a file of the repository with filename="),
    (ValueError, "write hf-hub:org/repo or hf-hub:org/repo@revision, and no .. in filename="),
)


@dataclass(frozen=True)
class _Repository:
    """A repository at a revision, and the cache that it is kept in."""

    repo_id: str
    revision: str | None
    cache_dir: str | Path | None

    def __str__(self) -> str:
        return f"hf-hub:{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    def cached(self, name: str) -> Path | None:
        """The file as the cache knows it for this revision, without any request."""
        path = try_to_load_from_cache(
            self.repo_id, name, cache_dir=self.cache_dir, revision=self.revision
        )
        return Path(path) if isinstance(path, str) else None

    def download(self, name: str) -> Path:
        """The newest version of the file, or the cached one if the hub cannot be reached."""
        held = self.cached(name)
        for delay in (*_RETRY_DELAYS, None):
            try:
                return self._ask(name, held is not None)
            except Exception as error:  # the client raises what its HTTP library does
                if held is not None and (_is_transient(error) or _is_read_only(error)):
                    _logger.warning("%s/%s: %s; using the cached file", self, name, reason(error))
                    return held
                if delay is None or not _is_transient(error):
                    raise
                time.sleep(delay * random.uniform(1.0, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, name: str, held: bool) -> Path:
        # with a file at hand, a hub that does not answer is not waited for
        timeout = _STALL_SECONDS if held else constants.DEFAULT_ETAG_TIMEOUT
        path = hf_hub_download(
            self.repo_id,
            name,
            revision=self.revision,
            cache_dir=self.cache_dir,
            etag_timeout=timeout,
        )
        return Path(path)


def hub_file(
    repo_id: str,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    *,
    ask: bool = True,
) -> StoredFile:
    """Download a file of the hub, or find it in the cache.

    A revision that is a commit (40 hex digits) costs no request once it is cached. Any other is
    looked up on the hub first; without a connection, or if the cache cannot be written, the cached
    file is used. The hash recorded is the hub's ETag, after which the cache names the content: the
    SHA-256 of a large file, git's hash of a small one.

    Args:
        repo_id: `org/repo`.
        filename: The file; by default the first of `WEIGHT_FILES` that there is.
        revision: Branch, tag or commit; by default the main branch.
        cache_dir: By default the client's own (`HF_HUB_CACHE`).
        ask: Look on the hub for a newer version of a cached file.

    Raises:
        WeightsError: It is neither on the hub nor in the cache, or cannot be downloaded.
    """
    repository = _Repository(repo_id, revision, cache_dir)
    # for a commit there is no newer version, and even so the client may ask the hub other things
    ask = ask and not _COMMIT.fullmatch(revision or "")
    names = [filename] if filename else list(WEIGHT_FILES)
    name = names[0]
    try:
        # what is cached comes first: a hub that does not answer is not asked for the others
        names.sort(key=lambda name: repository.cached(name) is None)
        while True:
            name = names.pop(0)
            try:
                path = (None if ask else repository.cached(name)) or repository.download(name)
                break
            except EntryNotFoundError as error:
                if not names or not _is_absent(error):
                    raise
        _remove_partial(path.resolve())
        return _stored(path, name, f"{repository}/{name}")
    except Exception as error:  # the client raises what its HTTP library does
        raise WeightsError(
            f"cannot load {repository}/{name} from {constants.ENDPOINT}: {reason(error)}; "
            f"{_advice(error, cache_dir)}"
        ) from error


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids all requests."""
    return constants.HF_HUB_OFFLINE


def _stored(path: Path, name: str, source: str) -> StoredFile:
    content = path.resolve()
    # the file lies in a folder named after the commit, under its name in the repository
    commit = path.parents[len(PurePosixPath(name).parts) - 1].name
    return StoredFile(
        path,
        source,
        recorded=content.name if _RECORDED.fullmatch(content.name) else None,
        cached=(content, path),
        revision=commit if _COMMIT.fullmatch(commit) else None,
    )


def _remove_partial(content: Path) -> None:
    """Remove what killed processes downloaded of a file, unless a process is at it now."""
    partial = list(content.parent.glob(f"{content.name}.*incomplete"))
    folder = content.parents[1]
    lock = folder.parent / ".locks" / folder.name / f"{content.name}.lock"
    if not partial or not lock.parent.is_dir():
        return
    try:
        # the lock that the client holds while it downloads
        with WeakFileLock(lock, timeout=0.1):
            for path in partial:
                path.unlink(missing_ok=True)
    except OSError as error:  # the lock is taken, or the cache cannot be written
        _logger.debug("%s stays: %s", partial[0], reason(error))


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed where the client itself makes none."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    # a process on another machine, whose lock is not seen here, may take a download for abandoned
    lost = type(error) is FileNotFoundError
    names = {cls.__name__ for cls in type(error).__mro__}
    return lost or bool(names & _TRANSIENT) or "Consistency check failed" in str(error)


def _is_read_only(error: Exception) -> bool:
    """Whether the cache could not be written for want of permission."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def _is_absent(error: EntryNotFoundError) -> bool:
    """Whether the file is known not to be there, so that another name is worth a try."""
    return is_offline() or not isinstance(error, LocalEntryNotFoundError)


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
