"""Evaluation of a checkpoint or of official weights, with its result as JSON."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from . import checkpoint
from .augment import View
from .config import Parsed, option, settings
from .data import DataConfig, resolve_view
from .errors import StorageError, UsageError
from .evaluate import Evaluator, Score
from .model import (
    UNUSABLE,
    ModelConfig,
    checkpoint_folder,
    count_parameters,
    create,
    fit_input_size,
    load_into,
    to_device,
)
from .runtime import RuntimeConfig, World, versions
from .sources import Source, open_source


@dataclass(frozen=True)
class ResultConfig:
    """Which weights of a checkpoint, and where the result goes."""

    ema: bool = option(False, "evaluate the moving average of the weights")
    json: str | None = option(
        None, "file of the result; none: validation.json in the run folder, or here"
    )


@dataclass(frozen=True)
class ValidateConfig:
    """All settings of `validate.py`."""

    model: ModelConfig
    data: DataConfig
    runtime: RuntimeConfig
    result: ResultConfig


def checkpoint_settings(location: str | None) -> dict[str, Any]:
    """What a checkpoint of ours says about its model and data, by the full names of settings.

    Args:
        location: A run folder, a checkpoint folder, or a file in it; anything else says nothing.
    """
    folder = checkpoint_folder(location) if location else None
    if folder is None:
        return {}
    meta = checkpoint.read_meta(folder)
    view = meta["view"]
    known: dict[str, Any] = {
        "data.img_size": view["size"],
        **{f"data.{name}": value for name, value in view.items() if name != "size"},
    }
    for setting in settings(ValidateConfig).values():
        group = meta["config"].get(setting.group, {})
        if setting.name in group and not setting.may_change:
            known.setdefault(setting.key, group[setting.name])
    return known | {"model.checkpoint": None, "model.pretrained": False}


def validate_model(parsed: Parsed[ValidateConfig], world: World) -> None:
    """Evaluate, print one line, write the JSON file.

    Raises:
        UsageError: The data, the weights or their classes do not fit together.
        StorageError: The file cannot be written.
    """
    config = parsed.config
    source = open_source(config.data.name, config.data.root, "val")
    model = _load_model(config, source)
    to_device(model, world.device, config.runtime.channels_last)
    view = resolve_view(config.data, model)
    evaluator = Evaluator(source, view, config.data, config.runtime, world)
    begin = time.monotonic()
    score = evaluator.score(model)
    seconds = time.monotonic() - begin
    bad = sum(world.gather(len(evaluator.bad.indices)))
    if bad > evaluator.bad.limit:
        raise UsageError(
            f"{bad} of {len(source)} images cannot be read, e.g. "
            f"{next(evaluator.bad.lines(), 'see the other processes')}: repair them, or raise "
            f"--max-bad above {config.data.max_bad}"
        )
    if world.first:
        result = _result(config, model, view, score, seconds) | {"unreadable": bad}
        path = _write(config, result)
        print(
            f"{config.model.name}: top-1 {score.top1_percent:.2f} %  top-5 "
            f"{score.top5_percent:.2f} %  loss {score.mean_loss:.4f}  ({score.top1} of "
            f"{score.images} images, {result['images_per_s']} images/s); {path}"
        )


def _load_model(config: ValidateConfig, source: Source) -> nn.Module:
    chosen, classes = config.model, source.classes
    width = None if chosen.pretrained else len(classes) if classes else chosen.num_classes
    if not chosen.pretrained and not chosen.checkpoint:
        raise UsageError("nothing to evaluate: use --checkpoint RUN_OR_FILE, or --pretrained")
    try:
        model = create(chosen.name, pretrained=chosen.pretrained, num_classes=width)
        fit_input_size(model, resolve_view(config.data, model).size)
        if chosen.checkpoint:
            _fill(model, chosen.checkpoint, config.result.ema, classes)
    except UNUSABLE as error:
        raise UsageError(str(error)) from error
    outputs = getattr(model, "num_classes", None)
    if classes and outputs != len(classes):
        raise UsageError(
            f"{chosen.name} tells {outputs} classes apart, {config.data.name} has {len(classes)}"
        )
    return model


def _fill(model: nn.Module, location: str, ema: bool, classes: tuple[str, ...] | None) -> None:
    fresh = load_into(model, location, ema=ema)
    if fresh:
        raise UsageError(
            f"{location} has no {fresh[0]} for the classes of the data: evaluate it on the data it "
            "was trained for"
        )
    folder = checkpoint_folder(location)
    trained = checkpoint.read_meta(folder)["classes"] if folder else []
    if trained and classes and trained != list(classes):
        raise UsageError(
            f"{location} was trained on other classes ({', '.join(trained[:3])}, ...) than the "
            f"data has ({', '.join(classes[:3])}, ...)"
        )


def _result(
    config: ValidateConfig, model: nn.Module, view: View, score: Score, seconds: float
) -> dict[str, Any]:
    weights = safetensors.torch.save(
        {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    )
    return {
        "model": config.model.name,
        "weights": config.model.checkpoint or "pretrained",
        "data": config.data.name,
        "top1": score.top1_percent,
        "top5": score.top5_percent,
        "loss": score.mean_loss,
        "n": score.images,
        "img_size": view.size,
        "crop_pct": view.crop_pct,
        "interpolation": view.interpolation,
        "params_M": round(count_parameters(model) / 1e6, 3),
        "images_per_s": round(score.images / seconds, 1),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": versions(),
    }


def _write(config: ValidateConfig, result: dict[str, Any]) -> Path:
    folder = Path(config.model.checkpoint or "")
    folder = folder if (folder / "ckpt").is_dir() else Path()
    path = Path(config.result.json) if config.result.json else folder / "validation.json"
    try:
        checkpoint.replace_file(path, json.dumps(result, indent=1).encode() + b"\n")
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror}): use --json FILE") from error
    return path
