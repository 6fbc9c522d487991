"""Pictures of `docs/performance.md`; see `performance.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backbones import catalog
from benchmarks._gpu_page import best, groups
from benchmarks._page import peer_of
from benchmarks._results import Row

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9702b", "#666666"


class Point(NamedTuple):
    """A model in a picture of accuracies: something of ours, and of its peer if there is one."""

    model: str
    ours: float
    peer: float | None


def top1(model: str) -> float | None:
    """Accuracy of the official weights of a model, in percent; None if none is known."""
    weights = catalog.weights_of(model)
    found = catalog.top1(weights[0]) if weights else {}
    return float(next(iter(found.values()))) if found else None


def bytes_points(rows: Iterable[Row]) -> list[Point]:
    """Megabytes per image of inference: ours, fused where that moves less, and the peer's."""
    points = {}
    for row in rows:
        if row["mode"] == "forward" and row["model"] not in points:
            sides = [row[key]["total"][1] for key in ("ours", "fused") if key in row]
            peer = peer_of(row)
            theirs = None if peer is None else peer["total"][1] / row["batch"]
            points[row["model"]] = Point(row["model"], min(sides) / row["batch"], theirs)
    return list(points.values())


def speed_points(rows: Iterable[Row]) -> list[Point]:
    """Images per second of inference in bf16 at batch 128: the fastest way of each side."""
    chosen = [
        row
        for row in rows
        if (row["mode"], row["precision"], row["batch"]) == ("inference", "bf16", 128)
    ]
    points = []
    for group in groups(chosen, ("model",)):
        ours, peer = best(group, "ours", graph=False), best(group, "peer", graph=False)
        if ours is not None:
            theirs = None if peer is None else peer["images_per_s"]
            points.append(Point(group[0]["model"], ours["images_per_s"], theirs))
    return points


def draw_accuracy(points: Sequence[Point], label: str, path: Path) -> None:
    """Draw the top-1 accuracy of models against something, ours joined with the peer's."""
    figure, axes = _figure(8, 4.6)
    heights = {point.model: top1(point.model) for point in points}
    known = sorted((h, point) for point in points if (h := heights[point.model]) is not None)
    for height, point in known:
        if point.peer is not None:
            axes.plot([point.ours, point.peer], [height] * 2, color="#cccccc", zorder=1)
            axes.scatter(point.peer, height, color=_ORANGE, zorder=2, s=30)
        axes.scatter(point.ours, height, color=_BLUE, zorder=3, s=30)
    axes.set_xscale("log")
    _name_points(axes, known)
    _legend(axes, "lower right" if _ours_are_left(points) else "lower left")
    _finish(axes, label, "ImageNet-1k top-1 (%), as published")
    figure.savefig(path, dpi=110)


def _ours_are_left(points: Sequence[Point]) -> bool:
    return all(point.peer is None or point.ours < point.peer for point in points)


def _name_points(axes: Any, known: Sequence[tuple[float, Point]]) -> None:
    """Write names in a column beside ours, from bottom to top, as far apart as they need."""
    left = _ours_are_left([point for _, point in known])
    low, high = axes.get_xlim()
    axes.set_xlim((low / 6, high) if left else (low, high * 6))
    column = low / 1.6 if left else high * 1.6
    bottom, top = axes.get_ylim()
    step, last = (top - bottom) / 22, bottom
    for height, point in known:
        last = max(height, last + step)
        axes.annotate(
            point.model,
            (point.ours, height),
            xytext=(column, last),
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
        )
    axes.set_ylim(bottom, max(top, last + step))


def draw_cpu(rows: Sequence[Row], path: Path) -> None:
    """Draw ratios on the CPU as bars, one for each batch and number of threads."""
    figure, axes = _figure(8, 4.2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    places = sorted({(row["batch"], row["threads"]) for row in rows})
    width = 0.8 / len(places)
    for index, place in enumerate(places):
        own = {row["model"]: row for row in rows if (row["batch"], row["threads"]) == place}
        where = [models.index(model) + (index - (len(places) - 1) / 2) * width for model in own]
        shade = 0.4 + 0.6 * index / max(1, len(places) - 1)
        name = f"batch {place[0]}, {place[1]} thread{'s' if place[1] > 1 else ''}"
        values = [row["ours"] for row in own.values()]
        axes.bar(where, values, width * 0.9, color=_BLUE, alpha=shade, label=name)
        fused = [row["fused"] for row in own.values()]
        axes.scatter(where, fused, color=_ORANGE, s=12, zorder=3)
    axes.scatter([], [], color=_ORANGE, s=12, label="after fuse()")
    axes.axhline(1, color=_GREY, linewidth=1)
    axes.set_xticks(range(len(models)), models, rotation=25, ha="right", fontsize=8)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=len(places) + 1,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.14),
    )
    _finish(axes, "", "times as fast as the peer")
    figure.savefig(path, dpi=110)


def draw_floors(rows: Iterable[Row], path: Path) -> None:
    """Draw measured times of our ops against their floors, and of the fastest peers."""
    figure, axes = _figure(6.4, 5.2)
    timed = [row for row in rows if "median_ms" in row]
    points: Mapping[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for group in groups(timed, ("op", "case", "dtype", "mode")):
        for side in points:
            own = [row for row in group if (row["peer"] == "backbones") == (side == "ours")]
            if own:
                fastest = min(own, key=lambda row: row["median_ms"])
                points[side].append((fastest["bound_us"], fastest["median_ms"] * 1e3))
    for side, color in (("peer", _ORANGE), ("ours", _BLUE)):
        if points[side]:
            axes.scatter(*zip(*points[side], strict=True), color=color, s=9, alpha=0.7)
    ends = [bound for pairs in points.values() for bound, _ in pairs]
    line = [min(ends), max(ends)]
    axes.plot(line, line, color=_GREY, linewidth=1)
    axes.plot(line, [value / 0.6 for value in line], color=_GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _legend(axes, "upper left")
    _finish(axes, "floor (us); dotted: 60 % of it", "measured (us)")
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # imported here: what only makes tables draws nothing
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _legend(axes: Any, place: str) -> None:
    axes.scatter([], [], color=_BLUE, s=30, label="ours")
    axes.scatter([], [], color=_ORANGE, s=30, label="peer")
    axes.legend(frameon=False, loc=place)


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
