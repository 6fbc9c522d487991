"""Loading weights from wherever they are."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor

from .checksum import StoredFile, recorded, verify
from .errors import WeightsError
from .families import find_weights, prefers_ema
from .files import Copy, read_copy
from .hub import WEIGHT_FILES, hub_file, is_offline
from .mirrors import converted_key, local_copy, mirror_of
from .shards import is_index, merge_shards, read_index
from .table import Weights
from .url import url_file

_logger = logging.getLogger("backbones.pretrained")

_HUB = "hf-hub:"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".index.json")


@dataclass(frozen=True)
class Loaded:
    """Weights, and what is known of where they came from.

    Attributes:
        state_dict: Name -> tensor on the CPU, under the names of the file.
        source: Where they came from, for messages.
        key: What `checksums.json` calls the file; empty for a file of the user's own.
        sha256: The file's hash; of shards, the hash of their hashes in the order of their names.
        size: Length of the file, or of all shards, in bytes.
        revision: The commit of the hub's repository, or None.
        ema: Whether they are the moving average of the weights.
        both: Whether the file has the plain weights and the moving average.
        official: `model.tag` if they were asked for by name, else empty.
    """

    state_dict: dict[str, Tensor]
    source: str
    key: str
    sha256: str
    size: int
    revision: str | None
    ema: bool
    both: bool
    official: str


@dataclass(frozen=True)
class _Found:
    """A file that was found, its key, and how to find a shard beside it."""

    file: StoredFile
    key: str
    beside: Callable[[str], StoredFile]


def load_weights(
    location: str | Path,
    *,
    filename: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    ema: bool = False,
) -> dict[str, Tensor]:
    """Load a state dict under the names its file has; `convert_state_dict` fits it to a model.

    A download is compared with the hash that its source, its first download or `checksums.json`
    recorded, at every use. One INFO line says what was loaded.

    Args:
        location: A local file or folder, a URL, `hf-hub:org/repo` or `hf-hub:org/repo@revision`,
            or official weights by name (`shvit_s1.in1k`). These come from the mirrors that
            `BACKBONES_WEIGHTS_DIR` and `BACKBONES_HUB_ORG` name, if they have them, and without
            any request once they are in the cache.
        filename: The file in a repository or folder; by default `model.safetensors`, else the
            shards of `model.safetensors.index.json`, else `pytorch_model.bin`, else the only
            weight file of a folder.
        sha256: Expected SHA-256 of the file, or its first digits.
        cache_dir: Where downloads are kept; by default the caches of huggingface_hub and torch.hub.
        ema: Take the moving average of the weights instead of the weights themselves. Of official
            files that are meant so (`Weights.prefer_ema`, told by their names), it is taken anyway
            if there is one.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        WeightsError: The weights cannot be found, fetched, trusted or read.
    """
    return load(location, filename=filename, sha256=sha256, cache_dir=cache_dir, ema=ema).state_dict


def load(
    location: str | Path,
    *,
    filename: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    ema: bool = False,
) -> Loaded:
    """Load weights as `load_weights` does, with where they came from.

    Args:
        location: As for `load_weights`.
        filename: As for `load_weights`.
        sha256: As for `load_weights`.
        cache_dir: As for `load_weights`.
        ema: As for `load_weights`.

    Raises:
        WeightsError: As `load_weights`.
    """
    text = str(location)
    weights = find_weights(text) if _is_name(text) else None
    if weights is not None:
        found = _find_official(weights, filename, sha256, cache_dir)
    else:
        found = _find(text, filename, sha256, cache_dir)
    prefer_ema = weights.prefer_ema if weights else prefers_ema(text)
    copy, digest, size = _read(found, sha256 or _recorded(found.key), ema, prefer_ema)
    _logger.info(
        "loaded %d tensors (%s, %s weights) from %s, sha256 %s",
        len(copy.state_dict),
        dtypes(copy.state_dict),
        "EMA" if copy.ema else "plain",
        found.file.source,
        digest[:12],
    )
    return Loaded(
        *(copy.state_dict, found.file.source, found.key, digest, size, found.file.revision),
        ema=copy.ema,
        both=copy.both,
        official=weights.name if weights else "",
    )


def dtypes(state_dict: Mapping[str, Tensor]) -> str:
    """The floating-point types of a state dict, as in "float16/float32".

    Args:
        state_dict: Name -> tensor.
    """
    found = {str(value.dtype) for value in state_dict.values() if value.is_floating_point()}
    return "/".join(sorted(dtype.removeprefix("torch.") for dtype in found))


def _is_name(location: str) -> bool:
    """Whether a location can only be the name of official weights."""
    if location.startswith(_HUB) or location.endswith(_SUFFIXES) or set(location) & {"/", "\\"}:
        return False
    return not Path(location).exists()


def _recorded(key: str) -> str | None:
    record = recorded(key)
    return record.sha256 if record else None


def _read(found: _Found, sha256: str | None, ema: bool, prefer_ema: bool) -> tuple[Copy, str, int]:
    """The weights of a file or of its shards, their hash and their size."""
    path = found.file.path
    digest = verify(found.file, None if is_index(path) else sha256)
    if not is_index(path):
        return read_copy(path, ema, prefer_ema), digest, path.stat().st_size
    shards = read_index(path)
    files = {name: found.beside(name) for name in shards}
    digests = "".join(verify(file) for file in files.values())
    digest = hashlib.sha256(digests.encode()).hexdigest()
    if not digest.startswith((sha256 or "").lower()):
        raise WeightsError(
            f"{found.file.source}: the sha256 of its shards is {digest}, expected {sha256}"
        )
    merged = merge_shards(shards, lambda name: read_copy(files[name].path, ema, False).state_dict)
    return Copy(merged, ema, both=False), digest, sum(f.path.stat().st_size for f in files.values())


def _find_official(
    weights: Weights, filename: str | None, sha256: str | None, cache_dir: str | Path | None
) -> _Found:
    """The file of official weights: from the user's folder, his organisation, or its own place."""
    if copy := local_copy(weights):
        found = _find(str(copy[0]), filename, sha256, cache_dir)
        return _Found(found.file, copy[1], found.beside)
    if mirror := mirror_of(weights):
        try:
            found = _find_on_hub(mirror, None, None, cache_dir, ask=False)
            return _Found(found.file, converted_key(weights), found.beside)
        except WeightsError as error:
            if not _is_absent(error.__cause__):
                raise
            _logger.warning("%s has no %s: taking the original", mirror, weights.name)
    location, filename = weights.location, filename or weights.filename
    if not location.startswith(_HUB):
        return _find(location, filename, sha256, cache_dir)
    repo_id, record = location.removeprefix(_HUB), recorded(f"{location}/{filename}")
    revision = record.revision if record else None
    return _find_on_hub(repo_id, filename, revision, cache_dir, ask=False)


def _is_absent(error: BaseException | None) -> bool:
    """Whether a mirror answered that it lacks a file, or cannot be asked on the user's wish."""
    if isinstance(error, LocalEntryNotFoundError):
        return is_offline()
    return isinstance(error, (RepositoryNotFoundError, EntryNotFoundError))


def _find(
    location: str, filename: str | None, sha256: str | None, cache_dir: str | Path | None
) -> _Found:
    if location.startswith(_HUB):
        repo_id, _, revision = location.removeprefix(_HUB).partition("@")
        return _find_on_hub(repo_id, filename, revision or None, cache_dir)
    if location.startswith(("http://", "https://")):
        file = url_file(location, sha256 or _recorded(location), cache_dir)
        return _Found(file, location, _no_shards)
    path = Path(location)
    if path.is_dir():
        path = _file_of_folder(path, filename)
    if not path.is_file():
        raise WeightsError(
            f"cannot read {path}: no such file; give an existing file or folder, "
            f"{_HUB}org/repo, a URL, or the name of official weights"
        )
    return _Found(StoredFile(path, str(path)), "", lambda name: _local(path.with_name(name)))


def _find_on_hub(
    repo_id: str,
    filename: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    ask: bool = True,
) -> _Found:
    file = hub_file(repo_id, filename, revision, cache_dir, ask=ask)
    pinned = file.revision or revision
    return _Found(
        file,
        f"{_HUB}{repo_id}/{file.path.name}",
        lambda name: hub_file(repo_id, name, pinned, cache_dir, ask=ask),
    )


def _no_shards(name: str) -> StoredFile:
    raise WeightsError(f"cannot fetch the shard {name}: give a folder or a repository of the hub")


def _local(path: Path) -> StoredFile:
    if not path.is_file():
        raise WeightsError(f"cannot read {path}: no such file, but its index names it")
    return StoredFile(path, str(path))


def _file_of_folder(folder: Path, filename: str | None) -> Path:
    if filename is not None:
        return folder / filename
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "no weight file"
        raise WeightsError(
            f"cannot choose a file in {folder}: it has {found}; name one with filename="
        )
    return files[0]
