"""Compare whole models on a CPU with what one gets elsewhere, as ratios of times.

    python benchmarks/cpu.py                              all of `MODELS`
    python benchmarks/cpu.py davit_tiny --batch 8 --threads 2 --seconds 20
    python benchmarks/cpu.py --write                      also benchmarks/results/cpu.json

Inference in float32 on images of the model's own size. Ours is timed as it is created and after
`fuse()`, the peer (`benchmarks/official`) as it is created and after its own `fuse()` if it has
one; all have the same weights, and outputs are compared first. Each is in the layout of weights and
images in which it is faster, by a short trial. They take turns. `ours` is the median time of the
peer over that of ours, `fused` that of the faster peer over that of ours after `fuse()`: above 1
ours is faster. With `_best` it is of the shortest times, which say more on a busy machine. The
spread of a way is its upper over its lower quartile. Compare only numbers of one row.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from torch import Tensor, nn

from benchmarks._cpu import Row, Ways, best_times, processor, times_in_turns, write
from benchmarks.official import kind, pair
from tests.support import golden

RESULT = Path(__file__).resolve().parent / "results" / "cpu.json"
MODELS = (
    "maxvit_tiny_tf_224", "davit_tiny", "shvit_s1", "shvit_s4", "biformer_tiny", "overlock_xt",
    "l2vit_tiny", "ravlt_t", "tic_tiny",
)  # fmt: skip
TOLERANCE = 1e-4
FORMATS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
# what makes a row of one run the same as that of another
KEY = ("model", "batch", "threads")


def create(name: str) -> tuple[str, dict[str, nn.Module]]:
    """Create the models of a comparison.

    Matrices are as they are created, so that no softmax saturates: it would end in denormal
    numbers, which take a CPU many times as long. Vectors are lively, as fresh gammas hide branches.

    Args:
        name: Of our model.

    Returns:
        What the peer is, and the models: `ours`, `fused`, `peer`, and `peer_fused` if the peer can
        be fused.
    """
    torch.manual_seed(0)
    ours, peer = pair(name)
    lively = golden.fill_model(ours)
    weights = {k: lively[k] if v.ndim == 1 else v for k, v in ours.state_dict().items()}
    for model in (ours, peer):
        model.load_state_dict(weights)
    models = {"ours": ours, "fused": _fused(ours), "peer": peer}
    if hasattr(peer, "fuse"):
        models["peer_fused"] = _fused(peer)
    return kind(ours), models


def _fused(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    # timm's returns nothing
    return model.fuse() or model


def difference(outputs: Mapping[str, Tensor]) -> float:
    """Largest difference between ours and the others, relative to the largest value of ours."""
    ours = outputs["ours"]
    # torch's maximum of a NaN is one, Python's may not be
    worst = torch.stack([(value - ours).abs().max() for value in outputs.values()]).max()
    return (worst / ours.abs().max()).item()


def in_layouts(
    models: Mapping[str, nn.Module], x: Tensor, seconds: float
) -> tuple[Ways, dict[str, str]]:
    """Put each model into the layout in which it is faster.

    Args:
        models: As `create` returns them; their weights are laid out anew.
        x: Images.
        seconds: How long to try each.

    Returns:
        What runs each model, and the layout of each.
    """
    chosen, layouts = {}, {}
    for name, model in models.items():
        ways: Ways = {
            layout: _way(copy.deepcopy(model), x, order) for layout, order in FORMATS.items()
        }
        times = best_times(ways, seconds)
        layouts[name] = min(times, key=times.__getitem__)
        chosen[name] = _way(model, x, FORMATS[layouts[name]])
    return chosen, layouts


def _way(model: nn.Module, x: Tensor, order: torch.memory_format) -> Callable[[], Tensor]:
    model.to(memory_format=order)
    images = x.contiguous(memory_format=order)
    return lambda: model(images)


def summary(times: Mapping[str, Sequence[float]]) -> Row:
    """Ratios of the medians of times, and the spread of each way."""
    row: Row = {}
    for suffix, typical in (("", statistics.median), ("_best", min)):
        of = {name: typical(values) for name, values in times.items()}
        row["ours" + suffix] = round(of["peer"] / of["ours"], 3)
        row["fused" + suffix] = round(min(of["peer"], of.get("peer_fused", inf)) / of["fused"], 3)
    row["turns"] = len(times["ours"])
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        row[f"spread_{name}"] = round(high / low, 2)
    return row


@torch.inference_mode()
def compare(models: Mapping[str, nn.Module], x: Tensor, threads: int, seconds: float) -> Row:
    """Time models in turns.

    Args:
        models: As `create` returns them.
        x: Images.
        threads: Threads of PyTorch.
        seconds: How long to take times, three turns at least.

    Returns:
        Ratios, spreads, layouts and the difference of the outputs.

    Raises:
        RuntimeError: Outputs that differ by more than `TOLERANCE`.
    """
    torch.set_num_threads(threads)
    error = difference({name: model(x) for name, model in models.items()})
    # also where it is not a number
    if not error <= TOLERANCE:
        raise RuntimeError(f"outputs differ by {error:.1e}, more than {TOLERANCE:.0e}")
    ways, layouts = in_layouts(models, x, seconds / 10)
    row = summary(times_in_turns(ways, seconds))
    row |= {f"layout_{name}": layout for name, layout in layouts.items()}
    return {**row, "difference": float(f"{error:.1e}"), "load": round(os.getloadavg()[0], 1)}


def measure(
    names: Sequence[str], batches: Sequence[int], threads: Sequence[int], seconds: float
) -> Iterator[Row]:
    """Compare models one after the other; what fails has a row with `error`."""
    for name in names:
        models: dict[str, nn.Module] = {}
        peer = ""
        for batch, count in itertools.product(batches, threads):
            row: Row = {"model": name, "batch": batch, "threads": count}
            try:
                if not models:
                    peer, models = create(name)
                x = torch.randn(batch, *models["ours"].pretrained_cfg["input_size"])
                result = compare(models, x, count, seconds)
                yield {**row, "peer": peer, **result}
            # a peer that is missing or wrong must not end the run
            except Exception as error:
                yield {**row, "error": f"{type(error).__name__}: {error}".partition("\n")[0]}


def merge(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Add rows to a result of the same processor and versions, else begin it anew."""
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    same = all(old.get(key) == value for key, value in head.items())
    found = {tuple(row[key] for key in KEY): row for row in old["rows"] if same}
    found |= {tuple(row[key] for key in KEY): row for row in rows if "error" not in row}
    write(path, head, [found[key] for key in sorted(found)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, 1 if a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: one per family")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each row")
    parser.add_argument("--write", action="store_true", help=f"add to {RESULT.name}")
    arguments = parser.parse_args(argv)
    rows, before = [], torch.get_num_threads()
    names = arguments.names or MODELS
    for row in measure(names, arguments.batch, arguments.threads, arguments.seconds):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    torch.set_num_threads(before)
    if arguments.write:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        head = {"cpu": processor(), "python": platform.python_version(), **versions}
        merge(RESULT, {**head, "dtype": "float32"}, rows)
        print(f"wrote {RESULT}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
