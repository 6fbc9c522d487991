"""From a state dict under any names to a model of this package that has room for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import timm.models
import torch
from torch import Tensor, nn

from backbones.pretrained import FAMILIES, Weights, WeightsError, convert_state_dict
from backbones.pretrained.families import Family, all_weights, family_of
from backbones.pretrained.load import Loaded
from backbones.pretrained.mirrors import converted_key

from ._registry import create_model
from .catalog import find

# names that say nothing of what is in a file
_COMMON = ("model.", "pytorch_model.", "content")
# what only some checkpoints of a training hold -> the argument of a model that has room for it
_FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r".*\.rep\.conv\.bias", {"reparam": True}),
    (r"aux_head\..*", {"aux_head": True}),
    (r"feature_norms\..*", {"pyramid": "det"}),
)
_OVERVIEW_SKIP = "overview_skip."


@dataclass(frozen=True)
class Fitted:
    """A model, and the tensors of a file under its names.

    Attributes:
        model: The model, on the meta device.
        model_args: What it was built with beyond its name.
        family: Name of its family.
        tensors: Name -> tensor, in the order of the model's state dict.
        renamed: How many have another name in the file.
        computed: Names of those that the file does not have: they were made of others or added.
        left_out: Names of those of the file that the model has no use for.
    """

    model: nn.Module
    model_args: dict[str, Any]
    family: str
    tensors: dict[str, Tensor]
    renamed: int
    computed: tuple[str, ...]
    left_out: tuple[str, ...]


def choose_model(loaded: Loaded, name: str | None) -> tuple[str, Weights | None]:
    """Tell which model weights are for.

    Args:
        loaded: The weights, and where they came from.
        name: `model` or `model.tag` if the user says so.

    Returns:
        The model's name, and the official weights that these are, or None.

    Raises:
        ValueError: It cannot be told, or there is no such model or tag.
    """
    rows = all_weights()
    if name is None:
        found = [row for row in rows if row.name == loaded.official or loaded.key in keys_of(row)]
        found = found or [row for row in rows if PurePath(loaded.source).name in _file_names(row)]
        if len(found) != 1:
            raise ValueError(
                f"{loaded.source} is no official file by its name, so what it is for is not known: "
                "name the model with --model"
            )
        return found[0].model, found[0]
    model, chosen = find(name)
    return model.name, chosen[0] if "." in name else None


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """timm's configuration of a model.

    Args:
        model: A model that timm built.
    """
    return model.pretrained_cfg  # type: ignore[return-value]


def keys_of(weights: Weights) -> tuple[str, ...]:
    """What `checksums.json` calls the files of official weights.

    Args:
        weights: Which ones.
    """
    hub = (f"hf-hub:{weights.hub_id}/{weights.filename}",) if weights.hub_id else ()
    return (*weights.urls, *hub, converted_key(weights))


def fit(
    state_dict: Mapping[str, Tensor],
    name: str,
    weights: Weights | None,
    cfg: Mapping[str, Any] = MappingProxyType({}),
) -> Fitted:
    """Build a model that fits a state dict, without memory for its weights, and rename these.

    The number of classes, the channels of images and the form of the model are read from the
    tensors.

    Args:
        state_dict: Name -> tensor, unwrapped.
        name: The architecture.
        weights: The official weights that they should be, or None.
        cfg: Fields of the model's `pretrained_cfg` that are known to differ.

    Raises:
        WeightsError: Tensors are missing, left over or of the wrong shape; or they are not the
            official weights.
    """
    full_name = weights.name if weights else name
    plain = create_model(full_name, device="meta")
    family = family_of(plain)
    ours = family.to_ours(state_dict)
    model_args = _arguments(ours, plain)
    if cfg and hasattr(plain, "img_size"):
        model_args["img_size"] = tuple(cfg["input_size"][1:])
    if weights is not None:
        _check_official(weights, plain, model_args)
    differs = any(getattr(plain, key, None) != value for key, value in model_args.items())
    model = create_model(full_name, device="meta", **model_args) if differs else plain
    cfg_of(model).update(cfg)
    tensors = convert_state_dict(state_dict, model)
    assert not any(value.is_meta for value in tensors.values())
    renamed, computed, left_out = _compare(state_dict, ours, tensors, family)
    family_name = next(key for key, value in FAMILIES.items() if value is family)
    return Fitted(model, model_args, family_name, tensors, renamed, computed, left_out)


def write_config(fitted: Fitted, weights: Weights | None, license: str, folder: Path) -> None:
    """Write `config.json` as timm's `save_for_hf` does, and as transformers can read it.

    Args:
        fitted: The model.
        weights: The official weights that it gets, or None.
        license: The licence of the weights.
        folder: Where to write.
    """
    cfg = dict(cfg_of(fitted.model))
    names = cfg.pop("label_names", None)
    if weights is None:
        # of the architecture's default weights, which these are not
        for key in ("tag", "description", "origin_url", "paper_name", "paper_ids", "notes"):
            cfg.pop(key, None)
    fitted.model.pretrained_cfg = {**cfg, "license": license}  # type: ignore[assignment]
    # an auxiliary head is for training: who wants one asks for it, and gets its weights
    model_args = {k: v for k, v in fitted.model_args.items() if k != "aux_head"}
    # beside the other fields, where transformers looks for it too
    labels = {"label_names": names} if names else None
    timm.models.save_for_hf(fitted.model, str(folder), labels, model_args=model_args)
    (folder / "pytorch_model.bin").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # transformers passes num_classes beside these arguments
    for key in ("num_classes", "aux_head"):
        config.get("model_args", {}).pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def check_loads(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load a folder as its users will, and compare every tensor.

    Args:
        folder: What was written.
        tensors: What it should hold.

    Raises:
        WeightsError: It does not load, or a tensor differs.
    """
    model = create_model(f"local-dir:{folder}", pretrained=True)
    for name, value in model.state_dict().items():
        if not torch.equal(value, tensors[name].to(value.dtype)):
            raise WeightsError(f"{name} is another when it is read back: the disk may be failing")


def _file_names(row: Weights) -> set[str]:
    names = {row.filename, *(PurePath(url).name for url in row.urls)}
    return {name for name in names if not name.startswith(_COMMON)}


def _arguments(ours: Mapping[str, Tensor], plain: nn.Module) -> dict[str, Any]:
    """Arguments of the model that has the form of the weights."""
    cfg = cfg_of(plain)
    heads = [f"{cfg['classifier']}.{leaf}" for leaf in ("weight", "bias")]
    classes = next((len(ours[name]) for name in heads if name in ours), 0)
    args: dict[str, Any] = {"num_classes": classes}
    first_conv = ours.get(f"{cfg['first_conv']}.weight")
    if first_conv is not None and first_conv.shape[1] != cfg["input_size"][0]:
        args["in_chans"] = first_conv.shape[1]
    if hasattr(plain, "reparam"):
        args["reparam"] = False
    for pattern, form in _FORMS:
        if any(re.fullmatch(pattern, name) for name in ours):
            args |= form
    if hasattr(plain, "overview_skip") and args.get("pyramid"):
        args["pyramid"] = "det" if any(n.startswith(_OVERVIEW_SKIP) for n in ours) else "seg"
    return args


def _check_official(weights: Weights, plain: nn.Module, args: Mapping[str, Any]) -> None:
    if args["num_classes"] != weights.num_classes:
        raise WeightsError(
            f"the weights have {args['num_classes']} classes, {weights.name} has "
            f"{weights.num_classes}: for your own weights use --model {weights.model}"
        )
    if args.get("reparam", False) != getattr(plain, "reparam", False):
        form = "the re-parameterised" if args["reparam"] else "not the re-parameterised"
        raise WeightsError(
            f"the weights are of {form} form, other than {weights.name}: name them with --model"
        )


def _compare(
    given: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    family: Family,
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """How many tensors were renamed, which are new and which are gone."""
    # renaming and reshaping keep the memory; what was calculated has its own
    origin = {value.data_ptr(): name for name, value in given.items()}
    kept = {value.data_ptr() for value in tensors.values()}
    renamed = sum(origin.get(v.data_ptr(), name) != name for name, v in tensors.items())
    computed = tuple(name for name, v in tensors.items() if v.data_ptr() not in origin)
    renamable = {value.data_ptr() for value in ours.values()}

    def is_left_out(name: str) -> bool:
        if given[name].data_ptr() in kept:
            return False
        if given[name].data_ptr() in renamable or not computed:
            return True
        # what others were made of is missed
        rest = {key: value for key, value in given.items() if key != name}
        return family.to_ours(rest).keys() == ours.keys()

    return renamed, computed, tuple(name for name in given if is_left_out(name))
