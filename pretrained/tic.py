"""TiC: there are no official weights, and no tensor names but ours.

Source: Zhang et al., "TiC: Exploring Vision Transformer in Convolution", 2023, arXiv:2310.04134;
https://github.com/zs670980918/MSA-Conv, which has one layer, and neither the network nor weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .table import Paper, Weights

PAPER = Paper(
    title="TiC: Exploring Vision Transformer in Convolution",
    authors=("Song Zhang", "Qingzhong Wang", "Jiang Bian", "Haoyi Xiong"),
    venue="",
    year=2023,
    arxiv="2310.04134",
    code="https://github.com/zs670980918/MSA-Conv",
    code_license="none",
)

WEIGHTS: tuple[Weights, ...] = ()


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are: there is no official network to rename from.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return dict(state_dict)


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are: there are no official names.

    Args:
        state_dict: Name -> tensor, unwrapped.
    """
    return dict(state_dict)
