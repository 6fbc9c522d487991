"""Loading weights from wherever they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .checksum import StoredFile, verify
from .errors import WeightsError
from .families import find_weights, prefers_ema
from .files import read_copy
from .hub import WEIGHT_FILES, hub_file
from .url import url_file

_logger = logging.getLogger("backbones.pretrained")

_HUB = "hf-hub:"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def load_weights(
    location: str | Path,
    *,
    filename: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    ema: bool = False,
) -> dict[str, Tensor]:
    """Load a state dict under the names its file has; `convert_state_dict` fits it to a model.

    A download is compared with the hash that its source or its first download recorded, at every
    use. One INFO line says what was loaded.

    Args:
        location: A local file or folder, a URL, `hf-hub:org/repo` or `hf-hub:org/repo@revision`,
            or official weights by name (`shvit_s1.in1k`).
        filename: The file in a repository or folder; by default `model.safetensors`, else
            `pytorch_model.bin`, else the only weight file of a folder.
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
    text = str(location)
    if _is_name(text):
        weights = find_weights(text)
        text, filename = weights.location, filename or weights.filename
        sha256 = sha256 or weights.sha256
    file = _fetch(text, filename, sha256, cache_dir)
    digest = verify(file, sha256)
    state_dict, ema = read_copy(file.path, ema, prefers_ema(text))
    _logger.info(
        "loaded %d tensors (%s, %s weights) from %s, sha256 %s",
        len(state_dict),
        _dtypes(state_dict),
        "EMA" if ema else "plain",
        file.source,
        digest[:12],
    )
    return state_dict


def _is_name(location: str) -> bool:
    """Whether a location can only be the name of official weights."""
    if location.startswith(_HUB) or location.endswith(_SUFFIXES) or set(location) & {"/", "\\"}:
        return False
    return not Path(location).exists()


def _fetch(
    location: str, filename: str | None, sha256: str | None, cache_dir: str | Path | None
) -> StoredFile:
    if location.startswith(_HUB):
        repo_id, _, revision = location.removeprefix(_HUB).partition("@")
        return hub_file(repo_id, filename, revision or None, cache_dir)
    if location.startswith(("http://", "https://")):
        return url_file(location, sha256, cache_dir)
    path = Path(location)
    if path.is_dir():
        path = _file_of_folder(path, filename)
    if not path.is_file():
        raise WeightsError(
            f"cannot read {path}: no such file; give an existing file or folder, "
            f"{_HUB}org/repo, a URL, or the name of official weights"
        )
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


def _dtypes(state_dict: Mapping[str, Tensor]) -> str:
    dtypes = {str(value.dtype) for value in state_dict.values() if value.is_floating_point()}
    return "/".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
