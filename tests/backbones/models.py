"""Small models of every family, for the tests of what all have in common, and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from tests.support import golden


@dataclass(frozen=True)
class Small:
    """A registered model made small.

    Attributes:
        name: Its name.
        args: Arguments that make it so; a tuple as long as there are stages has a value for each.
        widths: Channels of its features.
        strides: Their strides.
        stages: Its stages.
        floor: Whether sizes of maps are rounded down, else up.
        sequential: Whether timm can run its layers one after the other.
        graphs: Graphs that compiling makes for large and small images.
        short: Arguments that make it as short as can be, if not those of its first two stages.
    """

    name: str
    args: dict[str, Any]
    widths: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)
    stages: int = 4
    floor: bool = False
    sequential: bool = True
    graphs: int = 1
    short: dict[str, Any] | None = None

    def create(self, **kwargs: Any) -> nn.Module:
        """The model, as timm makes it."""
        return timm.create_model(self.name, **{"num_classes": 10, **self.args, **kwargs})

    def create_short(self, **kwargs: Any) -> nn.Module:
        """The model with its first two stages only, or as short as can be."""
        if self.short is not None:
            return self.create(**self.short, **kwargs)
        args = {
            name: value[:2] if isinstance(value, tuple) and len(value) == self.stages else value
            for name, value in self.args.items()
        }
        return self.create(**args, **kwargs)

    def maps(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Shapes of the features of an image."""
        return [
            (channels, *(n // stride if self.floor else -(-n // stride) for n in (height, width)))
            for channels, stride in zip(self.widths, self.strides, strict=True)
        ]


_DEPTHS, _WIDTHS, _HEADS = (1, 1, 2, 1), (32, 64, 64, 96), (1, 2, 2, 3)
_BIFORMER = {
    "embed_dims": _WIDTHS,
    "num_heads": (1, 2, 2, 8),
    "depths": _DEPTHS,
    # both kinds of attention among the first two stages
    "topks": (4, None, 16, None),
}
_DAVIT = {"embed_dims": _WIDTHS, "num_heads": _HEADS, "depths": _DEPTHS}
# both kinds of blocks among the first two stages
_L2VIT = {"embed_dims": _WIDTHS, "num_heads": _HEADS, "depths": (2, 1, 2, 1)}
_MAXVIT = {"embed_dim": _WIDTHS, "depths": _DEPTHS, "stem_width": (16, 24), "img_size": 64}
_MAXVIT_TF = {**_MAXVIT, "head_hidden_size": 48}
_MAXVIT_MAPS = ((24, *_WIDTHS), (2, 4, 8, 16, 32))
_OVERLOCK = {
    "dims": (32, 48, 64, 96),
    "depths": (1, 1, 1, 1),
    "focus_depths": (1, 1),
    "num_heads": (2, 3),
    "head_hidden_size": 48,
}
_OVERLOCK_KIND = {
    "widths": (32, 48, 88, 120),
    "sequential": False,
    "graphs": 2,
    "short": {"depths": (1, 0, 1, 0)},
}
_RAVLT = {
    "embed_dims": _WIDTHS,
    "num_heads": _HEADS,
    "depths": _DEPTHS,
    "layer_scales": (1.0, 1.0, 1e-6, 1e-6),
    "head_hidden_size": 48,
}
# both kinds of blocks, and more shifts than heads
_TIC = {"embed_dims": _WIDTHS, "num_heads": _HEADS, "depths": (2, 1, 2, 1)}
_SHVIT = {"embed_dim": (32, 48, 72), "depth": (1, 1, 2), "partial_dim": (16, 16, 19)}

FAMILIES = {
    "biformer": Small("biformer_tiny", _BIFORMER, _WIDTHS),
    "davit": Small("davit_tiny", _DAVIT, _WIDTHS),
    "l2vit": Small("l2vit_tiny", _L2VIT, _WIDTHS),
    "maxvit": Small("maxvit_tiny_tf_224", _MAXVIT_TF, *_MAXVIT_MAPS),
    "overlock": Small("overlock_xt", {**_OVERLOCK, "reparam": True}, **_OVERLOCK_KIND),
    "ravlt": Small("ravlt_t", _RAVLT, _WIDTHS),
    "shvit": Small("shvit_s1", _SHVIT, (32, 48, 72), (16, 32, 64), stages=3),
    "tic": Small("tic_tiny", _TIC, _WIDTHS),
}

# the smallest real model of every family
SMALLEST = {
    "biformer": "biformer_tiny",
    "davit": "davit_tiny",
    "l2vit": "l2vit_tiny",
    "maxvit": "maxvit_pico_rw_256",
    "overlock": "overlock_xt",
    "ravlt": "ravlt_t",
    "shvit": "shvit_s1",
    "tic": "tic_tiny",
}

# other layers and heads of the same families, for what is quick to test
VARIANTS = {
    **FAMILIES,
    "biformer_stl": Small("biformer_stl", _BIFORMER, _WIDTHS, floor=True),
    "biformer_stl_nchw": Small("biformer_stl_nchw", _BIFORMER, _WIDTHS, floor=True),
    "davit_fl": Small("davit_base_fl", _DAVIT, _WIDTHS),
    "maxvit_rw": Small("maxvit_pico_rw_256", _MAXVIT, *_MAXVIT_MAPS),
    "maxvit_rmlp": Small("maxvit_rmlp_pico_rw_256", _MAXVIT, *_MAXVIT_MAPS),
    "maxvit_pm": Small("maxvit_tiny_pm_256", _MAXVIT, *_MAXVIT_MAPS),
    "overlock_trained": Small("overlock_xt", _OVERLOCK, **_OVERLOCK_KIND),
}


def deterministic(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Fill a model with the deterministic weights of its tensor names, for evaluation."""
    model = model.to(dtype).eval()
    model.load_state_dict(golden.fill_model(model))
    return model


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert value.shape == expected.shape
    return float((value - expected).detach().abs().max() / expected.detach().abs().max())


def worst_error(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> float:
    """Largest relative error of the logits, the last map and every feature."""
    last, maps = ours.forward_intermediates(x)
    expected_last, expected_maps = theirs.forward_intermediates(x)
    pairs = [(ours(x), theirs(x)), (last, expected_last), *zip(maps, expected_maps, strict=True)]
    return max(relative_error(*pair) for pair in pairs)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed sum of the logits in training; random numbers start at a fixed seed."""
    model.train().zero_grad()
    torch.manual_seed(0)
    logits = model(x)
    (logits * torch.from_numpy(golden.normal("weight", logits.shape))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst_gradient(
    value: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """Largest difference of two sets of gradients, relative to the largest of all, and where."""
    assert list(value) == list(expected)
    scale = max(grad.abs().max() for grad in expected.values())
    return max((float((value[n] - grad).abs().max() / scale), n) for n, grad in expected.items())
