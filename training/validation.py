"""Evaluation of checkpoints or of official weights, one or several in a run."""

from __future__ import annotations

import glob
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import timm
import torch
from torch import nn

from backbones.ops.flops import count_macs

from . import checkpoint
from .augment import View
from .config import Parsed, option, parse, require, settings
from .data import DataConfig, resolve_view
from .errors import UsageError
from .evaluate import Evaluator, Score, fail_together
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
from .reports import (
    COLUMNS,
    RealLabels,
    Table,
    peak_memory,
    write_classes,
    write_csv,
    write_json,
)
from .runtime import RuntimeConfig, World, versions
from .sources import Source, open_source

T = TypeVar("T")


@dataclass(frozen=True)
class ModelsConfig(ModelConfig):
    """Which models, and where their weights come from."""

    name: str = option("shvit_s1", "models of backbones or timm; several: a,b or 'shvit_*'")
    checkpoint: str | None = option(
        None, "a weight file, a run folder, a URL, or hf-hub:org/repo; several: a,b or 'runs/*'"
    )

    def __post_init__(self) -> None:
        require(
            not (self.pretrained and self.checkpoint),
            "--pretrained and --checkpoint both choose the weights: use one",
        )


@dataclass(frozen=True)
class ResultConfig:
    """What is evaluated, and where the result goes."""

    ema: bool = option(False, "evaluate the moving average of the weights")
    test_time_flip: bool = option(False, "mean of the logits of each image and its mirror image")
    by_class: bool = option(False, "accuracy and most common confusion of each class")
    real_labels: str | None = option(
        None, "all classes of ImageNet's validation images: a JSON file, or imagenet for timm's"
    )
    json: str | None = option(
        None,
        "file of the results, CSV beside it; none: validation.json in the run folder, or here",
    )

    def __post_init__(self) -> None:
        require(
            self.json is None or self.json.endswith(".json"),
            f"--json {self.json} must end in .json: the CSV lies beside it under the same name",
        )


@dataclass(frozen=True)
class ValidateConfig:
    """All settings of `validate.py`."""

    model: ModelsConfig
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


def plan(argv: Sequence[str]) -> list[list[str]]:
    """The command line of each model that a command line asks for.

    Raises:
        UsageError: Nothing has such a name.
    """
    model = parse(ValidateConfig, argv, program="validate.py").config.model
    if model.checkpoint:
        paths = _expand(model.checkpoint, lambda pattern: sorted(glob.glob(pattern)))
        return [[*argv, "--checkpoint", path] for path in paths]
    require(model.pretrained, "nothing to evaluate: use --checkpoint RUN_OR_FILE, or --pretrained")
    names = _expand(model.name, lambda pattern: timm.list_models(pattern, pretrained=True))
    return [[*argv, "--model", name] for name in names]


def read_settings(argv: Sequence[str]) -> Parsed[ValidateConfig]:
    """The settings of one model, over those of the run that its checkpoint comes from."""
    asked = parse(ValidateConfig, argv, program="validate.py").config
    base = checkpoint_settings(asked.model.checkpoint)
    return parse(ValidateConfig, argv, program="validate.py", base=base)


def validate_models(commands: Sequence[Sequence[str]], world: World) -> None:
    """Evaluate, print a table and write the results as soon as each is known.

    Args:
        commands: A command line for each model, see `plan`.
        world: The processes.

    Raises:
        UsageError: The data, a model or its weights do not fit together. Where there are several
            models, the others are evaluated all the same.
        StorageError: The results cannot be written.
    """
    alone, rows = len(commands) == 1, list[dict[str, Any]]()
    names = [command[-1] for command in commands]
    result = parse(ValidateConfig, commands[0], program="validate.py").config.result
    table = Table(names, real=result.real_labels is not None)
    path = _result_path(result, names[0] if alone else "")
    for number, command in enumerate(commands, start=1):
        stem = path.with_name(path.stem if alone else f"{path.stem}-{number}")
        try:
            row = _evaluate(read_settings(command).config, world, stem)
        except Exception as error:
            if alone:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            row = {command[-2][2:].replace("checkpoint", "weights"): command[-1], "error": reason}
        rows.append(row)
        if world.first:
            if number == 1:
                print(table.header())
            print(table.line(names[number - 1], row), flush=True)
            write_json(path, rows)
            write_csv(path.with_suffix(".csv"), rows, COLUMNS)
    if world.first:
        print(f"results in {path} and {path.with_suffix('.csv')}")
    failed = [name for name, row in zip(names, rows, strict=True) if "error" in row]
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(names)} models could not be evaluated: "
            f"{', '.join(failed[:5])}; {path} says why"
        )


def _evaluate(config: ValidateConfig, world: World, stem: Path) -> dict[str, Any]:
    asked = config.result
    source, model, real = _together(world, lambda: _prepare(config, world))
    view = resolve_view(config.data, model)
    evaluator = Evaluator(
        source, view, config.data, config.runtime, world, flip=asked.test_time_flip
    )
    begin = time.monotonic()
    network: Any = torch.compile(model) if config.runtime.compile else model
    score = evaluator.score(network)
    seconds = time.monotonic() - begin
    bad = sum(world.gather(len(evaluator.bad.indices)))
    if bad > evaluator.bad.limit:
        raise UsageError(
            f"{bad} of {len(source)} images cannot be read, e.g. "
            f"{next(evaluator.bad.lines(), 'see the other processes')}: repair them, or raise "
            f"--max-bad above {config.data.max_bad}"
        )
    answers = evaluator.answers()
    if not world.first:
        return {}
    row = _row(config, model, view, score, seconds) | {"unreadable": bad}
    row["peak_memory_MiB"] = peak_memory(world.device)
    if asked.by_class:
        write_classes(answers, source.classes, stem)
    return row | (real.score(answers) if real else {})


def _prepare(config: ValidateConfig, world: World) -> tuple[Source, nn.Module, RealLabels | None]:
    source = open_source(config.data.name, config.data.root, "val")
    labels = config.result.real_labels
    real = RealLabels(labels, source) if labels else None
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    model = _load_model(config, source)
    return source, to_device(model, world.device, config.runtime.channels_last), real


def _load_model(config: ValidateConfig, source: Source) -> nn.Module:
    chosen, classes = config.model, source.classes
    width = None if chosen.pretrained else len(classes) if classes else chosen.num_classes
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


def _row(
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
        "top1_err": 100 - score.top1_percent,
        "top5": score.top5_percent,
        "loss": score.mean_loss,
        "n": score.images,
        "img_size": view.size,
        "crop_pct": view.crop_pct,
        "crop_mode": view.crop_mode,
        "interpolation": view.interpolation,
        "params_M": round(count_parameters(model) / 1e6, 3),
        "gmacs": round(count_macs(model, (3, view.size, view.size)) / 1e9, 3),
        "images_per_s": round(score.images / seconds, 1),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": versions(),
    }


def _result_path(result: ResultConfig, checkpoint: str) -> Path:
    folder = Path(checkpoint)
    folder = folder if (folder / "ckpt").is_dir() else Path()
    return Path(result.json) if result.json else folder / "validation.json"


def _expand(words: str, find: Callable[[str], list[str]]) -> list[str]:
    found = []
    for word in words.split(","):
        # what has no wildcard is named in its own error
        here = find(word) if any(sign in word for sign in "*?[") else [word]
        require(
            bool(here), f"nothing matches {word}: see `python -m backbones list`, or the folder"
        )
        found += here
    return list(dict.fromkeys(found))


def _together(world: World, action: Callable[[], T]) -> T:
    try:
        result = action()
    except Exception as error:
        fail_together(world, error)
        raise
    fail_together(world, None)
    return result
