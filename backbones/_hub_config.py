"""Reading `config.json` of a model on the hub or in a folder, which anybody may have written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from backbones.pretrained import WeightsError
from backbones.pretrained.checksum import StoredFile, verify
from backbones.pretrained.hub import hub_file

FILE = "config.json"
HUB, LOCAL = "hf-hub:", "local-dir:"
_MAX_BYTES = 2**20

# arguments of models that a configuration may set -> the least and the largest number
_RANGES: dict[str, tuple[float, float]] = {
    "num_classes": (0, 100_000),
    "in_chans": (1, 256),
    "img_size": (32, 4096),
    "drop_rate": (0, 1),
    "drop_path_rate": (0, 1),
    "n_win": (1, 64),
    "topks": (1, 4096),
    "window_size": (1, 64),
    "transformer_window_size": (1, 64),
    "transformer_grid_size": (1, 64),
    "transformer_partition_ratio": (1, 256),
    "kernel_size": (1, 31),
    "down_kernel_size": (1, 15),
    "dilation": (1, 64),
    "num_heads": (1, 1024),
    "partial_dim": (1, 8192),
    "stem_width": (1, 8192),
    "head_hidden_size": (1, 16_384),
    "mlp_ratio": (1, 16),
    "layer_scales": (0, 10),
    "init_values": (0, 1),
}
_WIDTHS = ("embed_dim", "embed_dims", "dims")
_DEPTHS = ("depth", "depths", "focus_depths")
_RANGES |= dict.fromkeys(_WIDTHS, (1, 8192)) | dict.fromkeys(_DEPTHS, (0, 256))
_WORDS = {"global_pool", "pyramid", "pool", "shift", "style"}
_FLAGS = {
    "attn_proj", "aux_head", "channel_attn_v2", "distilled", "named_blocks", "parallel", "patches",
    "pointwise", "reparam",
}  # fmt: skip
# blocks times width squared: about a twelfth of the parameters; DaViT-giant has 1.6e8
_MAX_SIZE = 4e8
_USUAL_WIDTH, _USUAL_DEPTH = 2048, 32

# fields of timm's PretrainedCfg that describe weights; those that say where to find them are ours
_FIELDS = {
    "tag", "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation",
    "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset",
    "label_names", "label_descriptions", "pool_size", "test_pool_size", "first_conv", "classifier",
    "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
}  # fmt: skip


@dataclass(frozen=True)
class HubConfig:
    """What a configuration says, checked.

    Attributes:
        source: Where it was read, for messages.
        architecture: A registered model.
        pretrained_cfg: Fields of timm's `PretrainedCfg`, with the place of the weights.
        model_args: Arguments of the model.
    """

    source: str
    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]


def read_config(
    name: str,
    ours: Collection[str],
    given: Mapping[str, Any],
    cache_dir: str | Path | None = None,
) -> HubConfig | None:
    """Read the configuration of a model of the hub, or of a folder.

    Args:
        name: `hf-hub:org/repo`, `hf-hub:org/repo@revision`, or `local-dir:folder`.
        ours: Names of the models of this package.
        given: Arguments that the caller sets himself: the configuration's are not looked at.
        cache_dir: Where downloads are kept; by default the cache of huggingface_hub.

    Returns:
        What it says, or None if it is of a model that only timm has.

    Raises:
        WeightsError: It cannot be had, is no configuration, names an unknown model or asks for
            something that no model of the hub should.
    """
    file, place = _find(name, cache_dir)
    verify(file)
    try:
        config = _parse(file.path)
        architecture = _architecture(config)
        if architecture not in ours:
            return None
        model_args = {k: v for k, v in _member(config, "model_args").items() if k not in given}
        check_model_args(model_args)
        return HubConfig(file.source, architecture, _pretrained_cfg(config) | place, model_args)
    except (WeightsError, OSError) as error:
        raise WeightsError(f"cannot use {file.source}: {error}") from error


def check_model_args(model_args: Mapping[str, Any]) -> None:
    """Refuse arguments of a model that a configuration should not set.

    Args:
        model_args: Name -> value.

    Raises:
        WeightsError: An argument that is not on our list, or out of its range, or a network that
            is larger than any of ours.
    """
    for name, value in model_args.items():
        if name in _RANGES:
            _check_number(f"model_args.{name}", value, *_RANGES[name])
        elif name in _WORDS or name in _FLAGS:
            wanted = str if name in _WORDS else bool
            if not isinstance(value, wanted):
                raise WeightsError(f"its model_args.{name} is {value!r}, no {wanted.__name__}")
        else:
            raise WeightsError(
                f"its model_args.{name} is not among those that a configuration may set; if you "
                f"trust it, pass {name}= yourself to backbones.create_model"
            )
    width = max((n for k in _WIDTHS for n in _numbers(model_args.get(k))), default=_USUAL_WIDTH)
    depths = [n for k in _DEPTHS for n in _numbers(model_args.get(k))]
    depth = sum(depths) if depths else _USUAL_DEPTH
    if depth * width**2 > _MAX_SIZE:
        raise WeightsError(
            f"its model_args ask for {depth:g} blocks of up to {width:g} channels, more than any "
            "model here has; if you trust it, pass them yourself to backbones.create_model"
        )


def _find(name: str, cache_dir: str | Path | None) -> tuple[StoredFile, dict[str, Any]]:
    """The file of a configuration, and where the weights beside it lie, in timm's terms."""
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not (folder / FILE).is_file():
            raise WeightsError(
                f"cannot read {folder / FILE}: no such file; give a folder as `python -m backbones "
                "convert` or timm's save_for_hf writes it"
            )
        place = {"file": str(folder), "source": "local-dir"}
        return StoredFile(folder / FILE, str(folder / FILE)), place
    model_id = name.removeprefix(HUB)
    repo_id, _, revision = model_id.partition("@")
    file = hub_file(repo_id, FILE, revision or None, cache_dir)
    return file, {"hf_hub_id": model_id, "source": "hf-hub"}


def _parse(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise WeightsError(f"it is larger than {_MAX_BYTES} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"it is not JSON ({str(error)[:100]}); ask its author to mend it"
        ) from error
    for part in (config, *(_member(config, key) for key in ("pretrained_cfg", "model_args"))):
        if not isinstance(part, dict):
            raise WeightsError("it is no configuration of a timm model; ask its author to mend it")
    return config


def _member(config: Any, key: str) -> Any:
    return (config.get(key) or {}) if isinstance(config, dict) else {}


def _architecture(config: Mapping[str, Any]) -> str:
    name = config.get("architecture")
    if not isinstance(name, str):
        raise WeightsError("it has no 'architecture'; ask its author to add the model's name")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"; did its author mean {' or '.join(near)}?" if near else ""
        raise WeightsError(
            f"its architecture {name[:80]!r} is no model of backbones or timm{meant}"
        )
    return name


def _pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that describe weights; old configurations have them on the outside."""
    fields = dict(config.get("pretrained_cfg") or config)
    # these describe the weights that were saved, and win over those that they were made from
    fields |= {k: config[k] for k in ("num_classes", "label_names") if k in config}
    fields = {k: v for k, v in fields.items() if k in _FIELDS}
    _check_number("num_classes", fields.get("num_classes", 0), *_RANGES["num_classes"])
    input_size = fields.get("input_size", (3, 224, 224))
    if not isinstance(input_size, (list, tuple)) or len(input_size) != 3:
        raise WeightsError(f"its input_size is {input_size!r}, not channels, height and width")
    channels = _member(config, "model_args").get("in_chans", input_size[0])
    fields["input_size"] = (channels, *input_size[1:])
    _check_number("input_size", channels, *_RANGES["in_chans"])
    _check_number("input_size", input_size[1:], *_RANGES["img_size"])
    return fields


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    for number in _numbers(value):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise WeightsError(f"its {name} is {str(value)[:80]!r}, no number")
        if not low <= number <= high:
            raise WeightsError(f"its {name} is {str(value)[:80]}, outside {low:g} to {high:g}")


def _numbers(value: Any, nested: int = 3) -> list[Any]:
    """What a value holds, in lists or not, without what is left open (None)."""
    if isinstance(value, (list, tuple)) and nested:
        return [number for item in value for number in _numbers(item, nested - 1)]
    return [] if value is None else [value]
