"""Finding the state dict inside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import WeightsError

_PLAIN = ("model", "state_dict")
_EMA = ("model_ema", "state_dict_ema")
_MAX_WRAPPERS = 4
_PREFIXES = ("module.", "_orig_mod.")
_BACKBONE = "backbone."


def unwrap(checkpoint: Any, *, ema: bool = False) -> dict[str, Tensor]:
    """Take the state dict out of whatever a training script saved around it.

    Known are the wrappers `model`, `state_dict`, `model_ema`, `state_dict_ema`, the prefixes
    `module.` (DistributedDataParallel) and `_orig_mod.` (torch.compile), and detectors, of which
    only `backbone.` is kept. A checkpoint with both copies gives the plain one unless `ema` is set.

    Args:
        checkpoint: A state dict, or a mapping that holds one.
        ema: Take the moving average of the weights instead of the weights themselves.

    Raises:
        WeightsError: There is no such state dict in the checkpoint.
    """
    state_dict, found_ema = checkpoint, False
    for _ in range(_MAX_WRAPPERS):
        if _is_state_dict(state_dict):
            break
        key = _wrapper(state_dict, ema=ema and not found_ema)
        found_ema = found_ema or key in _EMA
        state_dict = state_dict[key]
    else:
        raise WeightsError(f"it wraps the state dict more than {_MAX_WRAPPERS - 1} times")
    if ema and not found_ema:
        raise WeightsError(f"it has no moving average ({' or '.join(_EMA)}); leave out ema=True")
    return _strip(state_dict)


def holds_ema(checkpoint: Any) -> bool:
    """Whether a checkpoint holds a moving average of its weights.

    Args:
        checkpoint: A state dict, or a mapping that holds one.
    """
    return _holds(checkpoint, _EMA)


def holds_plain(checkpoint: Any) -> bool:
    """Whether a checkpoint holds the weights themselves under a name, beside other things.

    Args:
        checkpoint: A state dict, or a mapping that holds one.
    """
    return _holds(checkpoint, _PLAIN)


def _holds(checkpoint: Any, keys: Sequence[str]) -> bool:
    return isinstance(checkpoint, Mapping) and any(
        isinstance(checkpoint.get(key), Mapping) for key in keys
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _wrapper(checkpoint: Any, ema: bool) -> str:
    """The key under which to look on."""
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"it holds a {type(checkpoint).__name__}, not a state dict")
    holders = [key for key in (*_PLAIN, *_EMA) if isinstance(checkpoint.get(key), Mapping)]
    for key in holders:
        if (key in _EMA) == ema:
            return key
    if holders:
        copy, fix = ("no moving average", "leave out") if ema else ("a moving average only", "pass")
        raise WeightsError(f"it holds {copy} (it has {', '.join(holders)}); {fix} ema=True")
    keys = ", ".join(str(key) for key in list(checkpoint)[:5]) or "nothing"
    raise WeightsError(f"it holds no state dict (it has {keys})")


def _strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrapped models and keep a detector's backbone only."""
    names = dict(state_dict)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in names)), None):
        names = {name[len(prefix) :]: value for name, value in names.items()}
    backbone = {n[len(_BACKBONE) :]: v for n, v in names.items() if n.startswith(_BACKBONE)}
    return backbone or names
