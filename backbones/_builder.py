"""Building a model through timm, with weights through `backbones.pretrained`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import timm.models
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from backbones.pretrained import Weights, WeightsError, load_weights, weights_tables

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.31 keeps no record of what a model was built with
    update_model_input_size = None

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[dict[str, Any], nn.Module], dict[str, Tensor]]


def generate_cfgs(weights: Iterable[Weights], **family: Any) -> dict[str, Any]:
    """Turn a table of weights into timm's default cfgs.

    Args:
        weights: The rows of a family.
        **family: Fields of timm's `PretrainedCfg` that all rows share.

    Returns:
        What a model module calls `default_cfgs`.
    """
    return generate_default_cfgs({row.name: _cfg(row, family) for row in weights})


def _cfg(row: Weights, family: dict[str, Any]) -> dict[str, Any]:
    return {
        "url": row.urls[0] if row.direct else None,
        "hf_hub_id": row.hub_id,
        "hf_hub_filename": row.filename,
        "num_classes": row.num_classes,
        "input_size": row.input_size,
        "crop_pct": row.crop_pct,
        "interpolation": row.interpolation,
        "mean": row.mean,
        "std": row.std,
        "license": row.license,
        **family,
    }


def build_model(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: Filter,
    feature_cfg: dict[str, Any],
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Model:
    """Build a model as timm does, reading weights with `backbones.pretrained` only.

    Args:
        model_cls: The class of the model.
        variant: Its registered name.
        pretrained: Load weights.
        filter_fn: Brings a state dict to the names of the model.
        feature_cfg: How `features_only=True` takes the model apart.
        pretrained_cfg: Tag or configuration of the weights; the default tag if None.
        pretrained_cfg_overlay: Fields of the configuration to override.
        **kwargs: Arguments of the model class and of timm's `build_model_with_cfg`.

    Returns:
        The model, a feature extractor around it with `features_only=True`.

    Raises:
        WeightsError: Weights that do not exist, cannot be fetched, are damaged or do not fit.
        ValueError: An unknown tag.
    """
    cfg = _resolve_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = {}
    if pretrained and not cfg.state_dict:
        location, filename = _locate(variant, cfg)
        cache_dir = kwargs.get("cache_dir")
        convert = filter_fn

        def filter_fn(_: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
            weights = load_weights(location, filename=filename, cache_dir=cache_dir)
            try:
                return convert(weights, model)
            except WeightsError as error:
                raise WeightsError(f"{variant} from {location}: {error}") from error

        # timm passes an in-memory state dict to the filter unread: there our loader takes over
        overlay = {"state_dict": {location: filename}, "source": None}

    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)
    if cfg.source:
        model.pretrained_cfg["source"] = cfg.source
    return model


def _resolve_cfg(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None,
    overlay: dict[str, Any] | None,
) -> PretrainedCfg:
    known = timm.models.get_arch_pretrained_cfgs(variant)
    if isinstance(pretrained_cfg, str) and f"{variant}.{pretrained_cfg}" not in known:
        tags = ", ".join(name.partition(".")[2] for name in known)
        raise ValueError(f"pretrained tag {pretrained_cfg!r} of {variant} is unknown: use {tags}")
    return timm.models.resolve_pretrained_cfg(variant, pretrained_cfg, overlay)


def _locate(variant: str, cfg: PretrainedCfg) -> tuple[str, str | None]:
    """Where the weights of `cfg` lie, in the order of precedence that timm documents."""
    if cfg.file and cfg.source != "hf-hub":
        return str(cfg.file), None
    if cfg.hf_hub_id:
        return f"hf-hub:{cfg.hf_hub_id}", cfg.hf_hub_filename
    if cfg.url:
        return cfg.url, None
    raise WeightsError(f"{variant}: {_why_nowhere(f'{variant}.{cfg.tag}')}")


def _why_nowhere(name: str) -> str:
    """Why weights cannot be downloaded, and what to do."""
    for row in (row for table in weights_tables().values() for row in table):
        if row.name == name and row.hub_id is None:
            return row.note
    return (
        "no pretrained weights are known; pass pretrained=False, or a file of your own as "
        "pretrained_cfg_overlay=dict(file=...)"
    )


def record_input_size(model: nn.Module, img_size: tuple[int, int], **model_args: Any) -> None:
    """Record a change of the input size where timm's `save_for_hf` looks for it.

    Args:
        model: A model after the change.
        img_size: Its new height and width.
        **model_args: Constructor arguments, serialisable, that changed with it.
    """
    if update_model_input_size is not None:
        update_model_input_size(model, img_size, **model_args)
