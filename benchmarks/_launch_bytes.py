"""Bytes that a launch of one of our kernels moves between the device's memory and its cores.

A launch reads or writes each of its tensors once: what its programs share, as halos or the keys of
several queries, comes from a cache. Kernels that touch a part of a tensor only, or go through it
more than once, are in `SHARES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmarks._launches import Launch

Arguments = Mapping[str, Any]
Share = float | Callable[[Arguments], float]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in memory; what is expanded counts once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or size == 0 else 1
    return numel * tensor.element_size()


def _apart(together: float, apart: float, summed: str) -> Share:
    """The share of a form of one program, and that of a form where another launch has summed."""
    return lambda given: together if given[summed] is None else apart


def _parts(count: int, gate: bool = False) -> Share:
    """So many of the parts of C channels that rank-augmented attention packs, and a gate."""

    def share(given: Arguments) -> float:
        channels = given["heads"] * given["D"]
        return (count + (gate and given["GATED"])) * channels / given["qkv"].shape[-1]

    return share


def _half(name: str) -> Share:
    """The channels of one half of dynamic mixing, of a tensor that may hold both."""
    return lambda given: given["query"].shape[-1] / given[name].shape[-1]


def _slots(given: Arguments) -> float:
    return given["K"] ** 2 / given["kernel"].shape[-1]


def _halves(*names: str) -> dict[str, Share]:
    return {"kernel": _slots, **{name: _half(name) for name in names}}


def _passed(given: Arguments) -> float:
    """The channels that partial attention passes on, of all."""
    return 1 - given["P"] / given["C"]


def _attended(given: Arguments) -> float:
    return given["P"] / given["C"]


def _packed(keys: bool) -> Share:
    """The queries, or keys and values, of the packed map of partial attention."""
    return lambda given: (given["D"] + keys * given["P"]) / (2 * given["D"] + given["P"])


def _sums(given: Arguments) -> float:
    """Programs that each sum some rows of large kernels read the maps of all rows."""
    return -(-given["K"] // given["ROWS"])


_QUERIES: dict[str, Share] = {"grad_qkv": 1 / 3}
_KEYS: dict[str, Share] = {"grad_qkv": 2 / 3}

# of each kernel, the share of each tensor that is moved, where it is not all of it once; a map of
# queries, keys and values counts as three thirds
SHARES: dict[str, dict[str, Share]] = {
    # x and y are the same packed map forward, the gradient and the packed map backward
    "channel_sum_kernel": {
        "x": lambda given: 1 / 3 if given["x"].shape == given["y"].shape else 1.0,
        "y": 1 / 3,
    },
    "channel_fwd_kernel": {"qkv": _apart(1.0, 1 / 3, "sums")},
    # alone it reads the gradient and the values once for the sum, and again to apply it
    "channel_bwd_kernel": {
        "grad": _apart(2.0, 1.0, "sums"),
        "qkv": _apart(1.0, 2 / 3, "sums"),
    },
    "linear_sum_kernel": {"qkv": 2 / 3},
    "linear_fwd_kernel": {"qkv": lambda given: 1.0 if given["SUM"] else 1 / 3},
    "linear_bwd_sum_kernel": {"qkv": 1 / 3, "grad_qkv": 1 / 3},
    "linear_bwd_kernel": {
        "grad": _apart(1.0, 0.0, "grad_state"),
        "qkv": _apart(1.0, 2 / 3, "grad_state"),
        "grad_qkv": _apart(1.0, 2 / 3, "grad_state"),
    },
    # three passes forward and three backward: the queries are read in two of each
    "rank_augmented_mean_kernel": {"qkv": _parts(1)},
    "rank_augmented_state_kernel": {"qkv": _parts(2)},
    "rank_augmented_fwd_kernel": {"qkv": _parts(1, gate=True)},
    "rank_augmented_bwd_state_kernel": {
        "qkv": _parts(1, gate=True),
        "grad_qkv": _parts(0, gate=True),
    },
    "rank_augmented_bwd_kv_kernel": {"qkv": _parts(2), "grad_qkv": _parts(2)},
    "rank_augmented_bwd_q_kernel": {"qkv": _parts(1, gate=True), "grad_qkv": _parts(1)},
    "window_tiled_queries_kernel": _QUERIES,
    "window_tiled_keys_kernel": _KEYS,
    "routing_queries_kernel": _QUERIES,
    "routing_keys_kernel": _KEYS,
    "region_means_kernel": {"qkv": 2 / 3},
    "neighborhood_bwd_queries_kernel": _QUERIES,
    "neighborhood_bwd_keys_kernel": _KEYS,
    "partial_fwd_kernel": {"x": _passed},
    "partial_queries_kernel": {"grad_qkv": _packed(keys=False)},
    "partial_keys_kernel": {
        "grad": _attended,
        "out": _attended,
        "grad_qkv": _packed(keys=True),
    },
    "mixing_class_fwd_kernel": _halves("value", "out"),
    "mixing_class_queries_kernel": _halves("value", "grad", "out"),
    "mixing_class_values_kernel": _halves("grad", "grad_value"),
    "mixing_class_slots_kernel": _halves("value", "grad"),
    "mixing_band_fwd_kernel": _halves("value", "out"),
    "mixing_band_query_kernel": _halves("value", "grad", "out"),
    "mixing_band_value_kernel": _halves("grad", "grad_value"),
    "mixing_band_kernel_kernel": _halves("value", "grad"),
    "toeplitz_grad_weight_kernel": {"dy": _sums, "x": _sums},
}


def launch_bytes(launch: Launch) -> int:
    """Bytes that a recorded launch moves."""
    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.args, strict=False)), **launch.options}
    shares, total = SHARES.get(launch.name, {}), 0.0
    for name, value in given.items():
        if isinstance(value, Tensor):
            share = shares.get(name, 1.0)
            total += tensor_bytes(value) * (share(given) if callable(share) else share)
    return round(total)
