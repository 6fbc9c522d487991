"""Building a model through timm, with weights through `backbones.pretrained`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import timm.models
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from backbones.pretrained import Weights, WeightsError
from backbones.pretrained.families import all_weights
from backbones.pretrained.load import Loaded, load

from ._hub_config import check_model_args

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.31 keeps no record of what a model was built with
    update_model_input_size = None

_logger = logging.getLogger("backbones")

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
        "crop_mode": row.crop_mode,
        "interpolation": row.interpolation,
        "mean": row.mean,
        "std": row.std,
        "license": row.license,
        "origin_url": row.paper.code,
        "paper_name": row.paper.title,
        "paper_ids": f"arXiv:{row.paper.arxiv}",
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
    _check_configured(cfg, kwargs)
    if kwargs.get("pyramid"):
        # its norms are no layers of the chain that timm would take apart
        feature_cfg = {**feature_cfg, "feature_cls": "getter"}
    overlay = {}
    if pretrained and not cfg.state_dict:
        location, filename = _locate(variant, cfg)
        cache_dir = kwargs.get("cache_dir")
        convert = filter_fn
        chosen = bool(kwargs.get("features_only")) or "num_classes" in kwargs

        def filter_fn(_: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
            loaded = load(location, filename=filename, cache_dir=cache_dir)
            try:
                weights = convert(loaded.state_dict, model)
                _settle_classes(model, weights, loaded, cfg, chosen)
            except WeightsError as error:
                raise WeightsError(f"{variant} from {loaded.source}: {error}") from error
            return weights

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


def _check_configured(cfg: PretrainedCfg, kwargs: dict[str, Any]) -> None:
    """Refuse what a configuration of the hub may not ask for, where timm read it."""
    model_args = kwargs.get("pretrained_model_args")
    if model_args and cfg.source in ("hf-hub", "local-dir"):
        try:
            check_model_args({k: v for k, v in model_args.items() if kwargs.get(k) == v})
        except WeightsError as error:
            raise WeightsError(f"cannot use {cfg.hf_hub_id or cfg.file}: {error}") from error


def _locate(variant: str, cfg: PretrainedCfg) -> tuple[str, str | None]:
    """Where the weights of `cfg` lie, in the order of precedence that timm documents."""
    if cfg.file and cfg.source != "hf-hub":
        return str(cfg.file), None
    for row in all_weights():
        place = row.urls[0] if row.direct else row.hub_id
        # timm prefers the hub to a URL, and writes some missing addresses as empty text
        if row.name == f"{variant}.{cfg.tag}" and place == (cfg.hf_hub_id or cfg.url or None):
            # by name, so that mirrors and recorded hashes are looked at
            return row.name, None
    if cfg.hf_hub_id:
        return f"hf-hub:{cfg.hf_hub_id}", cfg.hf_hub_filename
    if cfg.url:
        return cfg.url, None
    raise WeightsError(
        f"{variant}: no pretrained weights are known; pass pretrained=False, or a file of your "
        "own as pretrained_cfg_overlay=dict(file=...)"
    )


def _settle_classes(
    model: Any, weights: dict[str, Tensor], loaded: Loaded, cfg: PretrainedCfg, chosen: bool
) -> None:
    """Let timm drop the classifier of the weights only where another one was asked for.

    timm compares the model's classes with those that the configuration says the weights have, so
    that is made true first.
    """
    wanted, found = getattr(model, "num_classes", 0), _count_classes(model, weights)
    if not wanted:
        return
    if cfg.source in ("hf-hub", "local-dir") and found != cfg.num_classes:
        raise WeightsError(
            f"its config.json says {cfg.num_classes} classes, but the weights have {found}; ask "
            "its author to mend it"
        )
    if wanted != found:
        text = f"the weights have {found or 'no'} classes, the model {wanted}"
        if not chosen:
            raise WeightsError(
                f"{text}; pass num_classes={found}, or the number you want for a fresh classifier"
            )
        _logger.info("%s: %s; its classifier starts fresh", loaded.source, text)
    model.pretrained_cfg["num_classes"] = found


def _count_classes(model: Any, weights: dict[str, Tensor]) -> int:
    """Rows of the classifier in the weights; 0 without one."""
    names = model.pretrained_cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    rows = [len(weights[f"{name}.weight"]) for name in names if f"{name}.weight" in weights]
    return rows[0] if rows else 0


def record_input_size(model: nn.Module, img_size: tuple[int, int], **model_args: Any) -> None:
    """Record a change of the input size where timm's `save_for_hf` looks for it.

    Args:
        model: A model after the change.
        img_size: Its new height and width.
        **model_args: Constructor arguments, serialisable, that changed with it.
    """
    if update_model_input_size is not None:
        update_model_input_size(model, img_size, **model_args)
