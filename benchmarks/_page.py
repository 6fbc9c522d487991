"""Tables of `docs/performance.md`, made of the results of the benchmarks; see `performance.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks._report import SHARED, spilled
from benchmarks._results import Row

# beginnings of the names of an op's kernels
_OPS = {
    "window_attention": ("window_", "offset_sum_"),
    "channel_attention": ("channel_",),
    "routing_attention": ("routing_", "region_means_"),
    "neighborhood_attention": ("neighborhood_",),
    "dynamic_mixing": ("mixing_",),
    "na2d_av": ("band_",),
    "linear_attention": ("linear_",),
    "rank_augmented_attention": ("rank_augmented_",),
    "partial_attention": ("partial_",),
    "depthwise_conv": ("depthwise_", "toeplitz_", "norm_backward_"),
}
_WIDE = ("LDG.E.128", "LDGSTS")


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of Markdown; numbers are right-aligned, None is a dash."""
    body = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    rule = ["---:" if _numbers(column) else "---" for column in zip(*body, strict=True)]
    lines = [head, rule or ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(column: Sequence[str]) -> bool:
    return all(cell == "-" or cell.lstrip("~").replace("*", "")[:1].isdigit() for cell in column)


def image(row: Row) -> str:
    """Images of a row of any result: batch, height and width."""
    height, width = row["image"] if "image" in row else row["size"]
    return f"{row['batch']} x {height} x {width}"


def peer_of(row: Row) -> Row | None:
    """What a row of the traffic says of the peer; None if that cannot do it."""
    return row.get("timm") or row.get("official")


def traffic_table(rows: Sequence[Row], mode: str) -> str:
    """Kernels and gigabytes of one pass of every model."""
    head = ["model", "images", "peer", "kernels", "ours, GB", "fused, GB", "peer, kernels"]
    head += ["peer, GB", "ours / peer"]
    body = []
    for row in rows:
        if row["mode"] != mode:
            continue
        peer = peer_of(row)
        name = "timm" if "timm" in row else "official" if peer else "none of this size"
        kernels, ours = row["ours"]["total"]
        fused = row["fused"]["total"][1] if "fused" in row else None
        theirs = [None, None, None]
        if peer is not None:
            least = min(ours, fused or ours)
            theirs = [peer["total"][0], gigabytes(peer["total"][1]), ratio(least, peer["total"][1])]
        body.append(
            [code(row), image(row), name, kernels, gigabytes(ours), gigabytes(fused), *theirs]
        )
    if mode != "forward":
        head.remove("fused, GB")
        body = [line[:5] + line[6:] for line in body]
    return markdown(head, body)


def attention_table(rows: Sequence[Row]) -> str:
    """Gigabytes of the attention of every model, forward and backward."""
    head = ["model", "images", "ours, GB", "peer, GB", "ours / peer"]
    head += ["without projections: ours, GB", "peer, GB", "ours / peer"]
    body = []
    for row in rows:
        peer = peer_of(row)
        if row["mode"] != "training" or peer is None:
            continue
        line = [code(row), image(row)]
        for part in ("attention", "attention without projections"):
            ours, theirs = row["ours"][part][1], peer[part][1]
            line += [gigabytes(ours), gigabytes(theirs), ratio(ours, theirs)]
        body.append(line)
    return markdown(head, body)


def kinds_table(rows: Sequence[Row], model: str) -> str:
    """Kernels and gigabytes of a model's passes by kind of operation, images of its own size."""
    own = [row for row in rows if row["model"] == model]
    passes = [row for row in own if row["image"] == own[0]["image"]]
    sides = [
        (f"{title}, {row['mode']}", row[key]["kinds"])
        for row in passes
        for title, key in (("ours", "ours"), ("fused", "fused"), *_peer_side(row))
        if key in row
    ]
    kinds = dict.fromkeys(kind for _, counts in sides for kind in counts)
    body = []
    for kind in kinds:
        cells = [counts.get(kind) for _, counts in sides]
        body.append([kind, *(cell and f"{cell[0]}: {gigabytes(cell[1])}" for cell in cells)])
    body.sort(key=lambda line: -float((line[1] or "0:0").partition(":")[2]))
    return markdown([code({"model": model}), *(title for title, _ in sides)], body)


def _peer_side(row: Row) -> list[tuple[str, str]]:
    return [(key, key) for key in ("timm", "official") if key in row]


def cpu_table(rows: Sequence[Row]) -> str:
    """Ratios on the CPU: a line per model, columns by batch and threads."""
    places = sorted({(row["batch"], row["threads"]) for row in rows})
    found = {(row["model"], row["batch"], row["threads"]): row for row in rows}
    peers = {row["model"]: row["peer"] for row in rows}
    body = []
    for model, peer in peers.items():
        cells = [found.get((model, *place)) for place in places]
        body.append([f"`{model}`", peer, *(_pair_of_ratios(cell) for cell in cells)])
    head = [f"batch {b}, {t} thread{'s' if t > 1 else ''}" for b, t in places]
    return markdown(["model", "peer", *head], body)


def _pair_of_ratios(row: Row | None) -> str | None:
    return None if row is None else f"{row['ours']:.2f} / {row['fused']:.2f}"


def aot_table(rows: Sequence[Row]) -> str:
    """What is worst of the kernels of every op, of all models and shapes."""
    head = ["op", "kernels", "forms", "registers, sm_90", *(f"spilled, {t}" for t in SHARED)]
    head += ["shared, KiB, sm_90", "16-byte loads, sm_90"]
    body = []
    for op, prefixes in _OPS.items():
        own = [row for row in rows if row["kernel"].startswith(prefixes) and "error" not in row]
        hopper = [row for row in own if row["target"] == "sm_90"]
        wide = sum(any(name in row["instructions"] for name in _WIDE) for row in hopper)
        worst = [max(spilled(row) for row in own if row["target"] == t) for t in SHARED]
        body.append(
            [
                f"`{op}`",
                len({row["kernel"] for row in own}),
                len(hopper),
                max(row["registers"] for row in hopper),
                *worst,
                f"{max(row['shared'] for row in hopper) / 1024:.0f}",
                f"{100 * wide / len(hopper):.0f} %",
            ]
        )
    return markdown(head, body)


def memory_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The most memory of a forward and a backward pass of parts of models: ours and the peers'."""
    sides = {
        "routing_memory": ("BiFormer: attention", "op", "gather"),
        "mixing_memory": ("OverLoCK: dynamic mixing", "op", "unfold"),
        "neighborhood_memory": ("TiC: attention", "op", "unfold"),
        "reparam_memory": ("OverLoCK: large kernels", "merged_peak", "planes_peak"),
    }
    body = []
    for name, (title, ours, theirs) in sides.items():
        rows = results.get(name, {}).get("rows", [])
        # of a block that contains it the same is said twice
        pairs = [(r[f"{ours}_mib"], r[f"{theirs}_mib"]) for r in rows if r.get("part") != "block"]
        if pairs:
            shares = sorted(a / b for a, b in pairs)
            largest = max(pairs, key=lambda pair: pair[1])
            share = f"{shares[0]:.2f} to {shares[-1]:.2f} ({median(shares):.2f})"
            body.append([title, len(pairs), share, *(f"{value:.0f}" for value in largest)])
    head = ["part", "cases", "ours / peer (median)", "largest case: ours, MiB", "peer, MiB"]
    return markdown(head, body)


def code(row: Row) -> str:
    """The model of a row."""
    return f"`{row['model']}`"


def gigabytes(megabytes: float | None) -> str | None:
    """Megabytes in gigabytes."""
    return None if megabytes is None else f"{megabytes / 1000:.2f}"


def ratio(ours: float, theirs: float) -> str:
    """A quotient with two digits."""
    return f"{ours / theirs:.2f}"
