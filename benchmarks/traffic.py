"""Count the bytes that a model's forward and backward pass move, beside its peer's.

    python benchmarks/traffic.py                  all models below, a table
    python benchmarks/traffic.py davit_tiny       some of them
    python benchmarks/traffic.py --kinds          and what kinds of kernels move them
    python benchmarks/traffic.py --write          put the counts into results/traffic.json

Models run on meta tensors in bfloat16, so no GPU is needed and every run gives the same numbers.
Ours are counted as our kernels move bytes, depthwise convolutions included; `plain` is the total
where PyTorch computes these, as it does on a device that has not been measured. Images are given
channels-last and as planes; the fewer bytes count, for either side. Exit code 1: the attention of a
model moves more than half of what its peer's does, forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from benchmarks._traffic import KINDS, Moved, Traffic
from benchmarks.official import family, kind, pair

RESULTS = Path(__file__).resolve().parent / "results" / "traffic.json"
MODELS = (
    "maxvit_tiny_tf_224",
    "davit_tiny",
    "shvit_s1",
    "shvit_s4",
    "biformer_tiny",
    "overlock_xt",
    "l2vit_tiny",
    "ravlt_t",
    "tic_tiny",
)
# the largest share of the peer's bytes that our attention may move
MOST = 0.5
_DETECTION = (2, (800, 1216))
_BATCH = 128

Row = dict[str, Any]


class Part(NamedTuple):
    """Which modules are the attention of a family, by patterns of their names.

    Attributes:
        inside: All that they do, but for norms, is attention.
        around: Of what they do themselves, copies are: windows cut and joined.
    """

    inside: str
    around: str


_BLOCK = Part(r"\.attn(\.|$)", r"blocks\.\d+(\.\d+)?$")
ATTENTION = {
    "maxvit": Part(r"\.attn_(block|grid)\.attn(\.|$)", r"\.attn_(block|grid)$"),
    "davit": _BLOCK,
    "shvit": Part(r"\.mixer\.m(\.|$)", r"\.mixer$"),
    "biformer": _BLOCK,
    "overlock": Part(r"\.mixer\.mixing(\.|$)", r"\.mixer$"),
    "l2vit": _BLOCK,
    "ravlt": _BLOCK,
    "tic": _BLOCK,
}


def is_attention(moved: Moved, part: Part) -> bool:
    """Whether an operation belongs to the attention of a family, its projections included."""
    if re.search(part.inside, moved.path):
        return moved.kind != "norm"
    around = re.search(part.around, moved.path)
    return around is not None and moved.kind in ("copy", "gather")


def count(
    model: nn.Module, image: tuple[int, int, int], training: bool, depthwise: bool = True
) -> list[Moved]:
    """Count one pass.

    Args:
        model: On the meta device.
        image: Batch, height and width.
        training: Forward and backward in training mode, else forward for inference.
        depthwise: See `Traffic`.

    Returns:
        What moved, in the layout of images that moves less.
    """
    batch, *size = image
    passes = []
    for layout in (torch.channels_last, torch.contiguous_format):
        # not the model itself: weights of a used one may be cached in another layout
        run = copy.deepcopy(model).to(memory_format=layout).train(training)
        x = torch.empty(batch, 3, *size, device="meta", dtype=torch.bfloat16)
        x = x.to(memory_format=layout)
        with torch.set_grad_enabled(training), Traffic(run, depthwise) as traffic:
            y = run(x)
            if training:
                y.backward(torch.empty_like(y))
        passes.append(traffic.moved)
    return min(passes, key=lambda moved: sum(m.bytes for m in moved))


def _megabytes(moved: Iterable[Moved]) -> list[float]:
    """Kernels and megabytes."""
    moved = list(moved)
    return [sum(m.kernels for m in moved), round(sum(m.bytes for m in moved) / 1e6, 1)]


def summary(moved: Sequence[Moved], part: Part) -> Row:
    """Kernels and megabytes of a pass, of its parts and of its kinds of operations."""
    attention = [m for m in moved if is_attention(m, part)]
    return {
        "total": _megabytes(moved),
        "backward": _megabytes(m for m in moved if m.backward),
        "attention": _megabytes(attention),
        "attention without projections": _megabytes(m for m in attention if not m.projection),
        "kinds": {
            name: _megabytes(m for m in moved if m.kind == name)
            for name in KINDS
            if any(m.kind == name for m in moved)
        },
    }


def rows(name: str) -> list[Row]:
    """Count our model, our fused model and the peer: a row per image size and mode."""
    models: Iterable[Any] = pair(name, device="meta")
    ours, peer = (model.bfloat16() for model in models)
    part, found = ATTENTION[family(ours)], []
    fused = copy.deepcopy(ours).fuse()
    own = ours.default_cfg["input_size"][1:]
    for batch, size in ((_BATCH, tuple(own)), _DETECTION):
        for mode in ("forward", "training"):
            image, training = (batch, *size), mode == "training"
            row: Row = {"model": name, "image": list(size), "batch": batch, "mode": mode}
            row["ours"] = summary(count(ours, image, training), part)
            row["ours"]["plain"] = _megabytes(count(ours, image, training, depthwise=False))
            if not training:
                row["fused"] = summary(count(fused, image, training), part)
            try:
                row[kind(ours)] = summary(count(peer, image, training), part)
            # peers that take few sizes say so in their own ways
            except (AssertionError, RuntimeError, ValueError) as error:
                row["error"] = f"{kind(ours)}: {error}".splitlines()[0][:200]
            found.append(row)
    return found


def peer_of(row: Row) -> Row | None:
    """The peer's counts of a row; None if it cannot do it."""
    return row.get("timm") or row.get("official")


def ratio(row: Row, part: str) -> float | None:
    """Our bytes over the peer's, of a part of a row; None without a peer."""
    peer = peer_of(row)
    return None if peer is None else row["ours"][part][1] / peer[part][1]


def too_much(found: Iterable[Row]) -> list[str]:
    """Models whose attention moves more than `MOST` of the peer's bytes, forward and backward."""
    lines = []
    for row in found:
        share = ratio(row, "attention without projections")
        if row["mode"] == "training" and share is not None and share > MOST:
            lines.append(f"{row['model']} at {row['image']}: {share:.2f} of its peer's")
    return lines


def table(found: Iterable[Row], kinds: bool = False) -> str:
    """A line per row and side: kernels, gigabytes, and those of the attention."""
    lines = [
        f"{'model':20}{'image':>10}{'mode':>10} {'side':9}{'kernels':>8}{'GB':>9}"
        f"{'attention':>11}{'no proj.':>10}"
    ]
    for row in found:
        size = "x".join(map(str, row["image"]))
        for side in ("ours", "fused", "timm", "official"):
            if side not in row:
                continue
            counts = row[side]
            numbers = [counts[p][1] / 1000 for p in ("attention", "attention without projections")]
            lines.append(
                f"{row['model']:20}{size:>10}{row['mode']:>10} {side:9}{counts['total'][0]:8}"
                f"{counts['total'][1] / 1000:9.2f}{numbers[0]:11.2f}{numbers[1]:10.2f}"
            )
            for name, (kernels, megabytes) in counts["kinds"].items() if kinds else ():
                lines.append(f"{'':41}{name:>16}{kernels:8}{megabytes / 1000:9.2f}")
        shares = (ratio(row, p) for p in ("total", "attention", "attention without projections"))
        text = row.get("error") or " ".join(f"{share:.2f}" for share in shares)
        lines.append(f"{'':41}ratio to the peer, in all, attention, no projections: {text}")
    return "\n".join(lines)


def _merge(found: list[Row]) -> list[Row]:
    """Add rows to those of other models in the results, in the order of `MODELS`."""
    models = {row["model"] for row in found}
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    merged = [row for row in kept if row["model"] not in models] + found
    return sorted(merged, key=lambda row: MODELS.index(row["model"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME", help="all if left out")
    parser.add_argument("--kinds", action="store_true", help="print kinds of operations too")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args(argv)
    for name in set(arguments.models) - set(MODELS):
        parser.error(f"{name} is none of {', '.join(MODELS)}")
    found = [row for name in arguments.models or MODELS for row in rows(name)]
    print(table(found, arguments.kinds))
    if arguments.write:
        lines = ",\n".join(json.dumps(row) for row in _merge(found))
        RESULTS.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n')
        print(f"wrote {RESULTS}")
    broken = too_much(found)
    for line in broken:
        print(f"attention above {MOST}: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
