"""Run folders of `train.py`, as `convert` takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.pretrained import WeightsError

_MODEL, _EMA = "model.safetensors", "ema.safetensors"


@dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run.

    Attributes:
        weights: The file.
        sha256: Its hash.
        both: Whether it has the weights themselves and their moving average.
        model: Name of the model.
        cfg: What timm's `PretrainedCfg` says of such weights: how the model sees images, and the
            names of the classes.
    """

    weights: Path
    sha256: str
    both: bool
    model: str
    cfg: dict[str, Any]


def read_run(source: str | Path, *, ema: bool = False) -> Run | None:
    """Find the weights in a run folder, or in one of its checkpoints.

    Args:
        source: Any location of weights.
        ema: Take the moving average.

    Returns:
        What was found, None if `source` is no such folder.

    Raises:
        WeightsError: The checkpoint is damaged, or has no moving average.
    """
    folder = Path(source)
    newest = sorted((folder / "ckpt").glob("step-*")) if (folder / "ckpt").is_dir() else []
    folder = newest[-1] if newest else folder
    if not (folder / "meta.json").is_file():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        hashes = {name: file["sha256"] for name, file in meta["files"].items()}
        view, classes, model = dict(meta["view"]), meta["classes"], meta["model"].partition(".")[0]
        size = view.pop("size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}/meta.json is damaged: take another checkpoint") from error
    if ema and _EMA not in hashes:
        raise WeightsError(f"{source} has no moving average: leave out --ema")
    cfg = view | {"input_size": (3, size, size)}
    if classes:
        cfg |= {"num_classes": len(classes), "label_names": classes}
    name = _EMA if ema else _MODEL
    return Run(folder / name, hashes[name], _EMA in hashes, model, cfg)
