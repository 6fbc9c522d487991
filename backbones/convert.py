"""Convert weights in any form to a folder that timm loads.

The folder gets `model.safetensors`, `config.json` and the model card `README.md`, and can be
published as it is. Files of the authors are known by their names; of others say which model they
are for. A run folder of `train.py` tells its model, its classes and how it sees images.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from backbones.pretrained import Weights, WeightsError
from backbones.pretrained.card import UNKNOWN_LICENSE, model_card
from backbones.pretrained.checksum import RECORDS, Record, record, sha256_of
from backbones.pretrained.errors import reason
from backbones.pretrained.load import Loaded, dtypes, load
from backbones.pretrained.mirrors import converted_key

from ._conversion import facts_of, summarize, which_copy
from ._export import Fitted, check_loads, choose_model, fit, keys_of, write_config
from ._run_folder import Run, read_run

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        folder: What it wrote.
        name: `model.tag` of official weights, else the model's name.
        source: The file that was read.
        source_sha256: Its hash.
        ema: Whether the moving average of the weights was taken.
        both: Whether the file has the weights themselves and their moving average.
        read: Tensors of the file, of the copy that was taken.
        written: Tensors of the folder.
        renamed: How many of these have another name in the file.
        computed: Names of those that the file does not have: made of others, or added.
        left_out: Names of tensors of the file that the model has no use for.
        dtype: Type of the weights, in the file and in the folder.
        num_classes: Width of the classifier, 0 if there is none.
        license: The licence that the card states.
        size: Length of `model.safetensors` in bytes.
        sha256: Its hash.
        recorded: What was written down in the file of checksums, or why not.
    """

    folder: Path
    name: str
    source: str
    source_sha256: str
    ema: bool
    both: bool
    read: int
    written: int
    renamed: int
    computed: tuple[str, ...]
    left_out: tuple[str, ...]
    dtype: str
    num_classes: int
    license: str
    size: int
    sha256: str
    recorded: str

    def __str__(self) -> str:
        counts = {
            "tensors read": self.read,
            "written": self.written,
            "renamed": self.renamed,
            "computed": len(self.computed),
            "left out": len(self.left_out),
            # else there would be nothing to report
            "missing": 0,
            "unexpected": 0,
            "classes": self.num_classes,
            "bytes": self.size,
        }
        names = {"computed": summarize(self.computed), "left out": summarize(self.left_out)}
        width = len(f"{self.size:,}")
        rows = {
            "model": self.name,
            "source": self.source,
            "its sha256": self.source_sha256,
            "taken from it": which_copy(self.ema, self.both),
            **{k: f"{n:>{width},}  {names.get(k, '')}".rstrip() for k, n in counts.items()},
            "type": self.dtype,
            "licence": self.license,
            "folder": str(self.folder),
            "sha256": self.sha256,
            "recorded": self.recorded,
        }
        return "\n".join(f"{name:<15}{value}" for name, value in rows.items())


def convert(
    source: str | Path,
    folder: str | Path,
    model: str | None = None,
    *,
    ema: bool = False,
    license: str | None = None,
    checksums: Path = RECORDS,
) -> Conversion:
    """Write a checkpoint as a folder that `timm.create_model("local-dir:...")` loads.

    Nothing is written unless every tensor has its place; the folder appears whole, after it was
    loaded back and compared. The same input gives the same files. Types stay what they are.

    Args:
        source: The weights: anything that `load_weights` takes, or a run folder of `train.py`.
        folder: What to write; it must not exist, or be empty.
        model: `model.tag` for official weights, `model` for any others. Official weights need none
            if they are given by name or have their file's official name; a run folder needs none.
        ema: Take the moving average of the weights; see `load_weights`.
        license: Licence of the weights as the hub writes it, such as `mit`; by default that of the
            official weights, else "unknown".
        checksums: Where the hashes of official weights are written down.

    Returns:
        What was done.

    Raises:
        ValueError: `folder` is occupied; the model is not known.
        WeightsError: The weights cannot be loaded or do not fit the model; another hash is known
            for them; the disk is full.
    """
    target = _check_target(Path(folder))
    trained = read_run(source, ema=ema)
    loaded = load(source, ema=ema) if trained is None else _load_run(trained, ema)
    name, weights = choose_model(loaded, model or (trained.model if trained else None))
    try:
        fitted = fit(loaded.state_dict, name, weights, trained.cfg if trained else {})
    except WeightsError as error:
        raise WeightsError(f"{weights.name if weights else name} from {source}: {error}") from error
    license = (license or (weights.license if weights else UNKNOWN_LICENSE)).lower()

    partial = target.with_name(f".convert-{uuid.uuid4().hex}.partial")
    try:
        _write(partial, loaded, fitted, weights, license)
        check_loads(partial, fitted.tensors)
        sha256, size = sha256_of(partial / WEIGHTS_FILE), (partial / WEIGHTS_FILE).stat().st_size
        recorded = _record(loaded, weights, Record(sha256, size), checksums)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"cannot write {target}: {reason(error)}; free space there or choose another folder; "
            "nothing was kept"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Conversion(
        folder=target,
        name=weights.name if weights else name,
        source=loaded.source,
        source_sha256=loaded.sha256,
        ema=loaded.ema,
        both=loaded.both,
        read=len(loaded.state_dict),
        written=len(fitted.tensors),
        renamed=fitted.renamed,
        computed=fitted.computed,
        left_out=fitted.left_out,
        dtype=dtypes(fitted.tensors),
        num_classes=fitted.model_args["num_classes"],
        license=license,
        size=size,
        sha256=sha256,
        recorded=recorded,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m backbones convert`.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "source", metavar="IN", help="file, run folder, URL, hf-hub:org/repo, or an official name"
    )
    parser.add_argument("folder", metavar="OUT", help="the folder to write; new or empty")
    parser.add_argument("--model", metavar="NAME", help="model, or model.tag for official weights")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, such as mit")
    parser.add_argument(
        "--checksums",
        metavar="FILE",
        type=Path,
        default=RECORDS,
        help="where hashes of official weights are written down; by default in the package",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done.

    Args:
        arguments: What was parsed.

    Returns:
        The exit code.

    Raises:
        ValueError: As `convert`.
        WeightsError: As `convert`.
    """
    print(
        convert(
            arguments.source,
            arguments.folder,
            arguments.model,
            ema=arguments.ema,
            license=arguments.license,
            checksums=arguments.checksums,
        )
    )
    return 0


def _load_run(run: Run, ema: bool) -> Loaded:
    return dataclasses.replace(load(run.weights, sha256=run.sha256), ema=ema, both=run.both)


def _check_target(folder: Path) -> Path:
    target = folder.absolute()
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder: create it, or choose another one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder, or delete it first")
    return target


def _write(
    folder: Path, loaded: Loaded, fitted: Fitted, weights: Weights | None, license: str
) -> None:
    folder.mkdir()
    # one entry of metadata: the library writes several in any order
    safetensors.torch.save_file(
        _separate(fitted.tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"}
    )
    write_config(fitted, weights, license, folder)
    card = model_card(facts_of(loaded, fitted, weights, license))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are contiguous and share no memory, which the format wants."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        value = value.contiguous()
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate


def _record(loaded: Loaded, weights: Weights | None, written: Record, path: Path) -> str:
    """Write down the hashes of official weights."""
    if weights is None:
        return "nothing: these are no official weights"
    records = [(converted_key(weights), written)]
    if loaded.key in keys_of(weights):
        read = Record(loaded.sha256, loaded.size, loaded.revision)
        records.insert(0, (loaded.key, read))
    try:
        for key, value in records:
            record(key, value, path)
    except OSError as error:
        return f"nothing: {path} cannot be written ({reason(error, 100)})"
    return f"{' and '.join(dict(records))} in {path}"
