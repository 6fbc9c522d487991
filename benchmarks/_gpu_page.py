"""Tables of what was measured on GPUs, for `docs/performance.md`; see `performance.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks._models import PROVIDERS
from benchmarks._page import code, image, markdown
from benchmarks._results import Row

# what a comparison has in common
EXACT = ("model", "mode", "precision", "size", "batch")


def groups(rows: Iterable[Row], fields: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in `fields`, in the order of the first of each group."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str([row[field] for field in fields]), []).append(row)
    return list(found.values())


def best(rows: Iterable[Row], source: str, graph: bool) -> Row | None:
    """The fastest row of a source ("ours" or "peer"), called or replayed; None if there is none."""
    timed = [
        row
        for row in rows
        if "median_ms" in row and row["graph"] == graph and row["provider"].startswith(source)
    ]
    return min(timed, key=lambda row: row["median_ms"], default=None)


def speedup(rows: Sequence[Row], graph: bool) -> float | None:
    """How many times the peer's fastest way ours is as fast; None where one was not timed."""
    ours, peer = best(rows, "ours", graph), best(rows, "peer", graph)
    return None if ours is None or peer is None else peer["median_ms"] / ours["median_ms"]


def precisions(rows: Iterable[Row], mode: str) -> list[str]:
    """Precisions in which a mode was measured."""
    return list(dict.fromkeys(row["precision"] for row in rows if row["mode"] == mode))


def models_table(rows: Iterable[Row], mode: str, precision: str) -> str:
    """Images per second, or milliseconds of one image: as called / as a CUDA graph."""
    chosen = [row for row in rows if (row["mode"], row["precision"]) == (mode, precision)]
    providers = [key for key in PROVIDERS if any(row["provider"] == key for row in chosen)]
    body = []
    for group in groups(chosen, EXACT):
        cells = [_cell([row for row in group if row["provider"] == key]) for key in providers]
        ratios = [speedup(group, graph) for graph in (False, True)]
        shown = [None if value is None else f"{value:.2f}" for value in ratios]
        body.append([code(group[0]), group[0]["peer"], image(group[0]), *cells, *shown])
    head = ["model", "peer", "images", *providers, "speed-up", "with graphs"]
    return markdown(head, body)


def _cell(rows: Sequence[Row]) -> str | None:
    values = []
    for graph in (False, True):
        row = next((row for row in rows if row["graph"] == graph), None)
        if row is None:
            values.append("-")
        elif "error" in row:
            values.append("fails")
        elif row["batch"] == 1:
            values.append(f"{row['median_ms']:.2f} ms")
        else:
            values.append(f"{row['images_per_s']:.0f}")
    return " / ".join(values) if rows else None


def peak_table(rows: Iterable[Row]) -> str:
    """Peak memory of a training step, without compiling and with."""
    chosen = [row for row in rows if row["mode"] == "training" and "peak_mib" in row]
    names = ("ours", "peer", "ours compiled", "peer compiled")
    body = []
    for group in groups(chosen, EXACT):
        peaks = {row["provider"]: row["peak_mib"] for row in group}
        line = [code(group[0]), group[0]["precision"], image(group[0])]
        for ours, peer in (names[:2], names[2:]):
            share = f"{peaks[ours] / peaks[peer]:.2f}" if {ours, peer} <= peaks.keys() else None
            line += [f"{peaks[key]:.0f}" if key in peaks else None for key in (ours, peer)]
            line.append(share)
        body.append(line)
    head = ["model", "precision", "images", *names[:2], "ours / peer", *names[2:], "ours / peer"]
    return markdown(head, body)


def ops_table(rows: Iterable[Row]) -> str:
    """For every op and pass: share of the floor, and speed-up over the fastest peer."""
    body = []
    for passes in groups((row for row in rows if "median_ms" in row), ("op", "mode")):
        shares, speedups = [], []
        for group in groups(passes, ("case", "dtype")):
            ours = next((row for row in group if row["peer"] == "backbones"), None)
            others = [row["median_ms"] for row in group if row["peer"] != "backbones"]
            if ours is not None:
                shares.append(ours["percent_of_floor"])
                speedups += [min(others) / ours["median_ms"]] if others else []
        if shares:
            line = [f"`{passes[0]['op']}`", passes[0]["mode"], len(shares), _range(shares, 0)]
            body.append([*line, _range(speedups, 2) if speedups else None])
    head = ["op", "pass", "cases", "% of the floor (median)", "times the fastest peer (median)"]
    return markdown(head, body)


def _range(values: Sequence[float], digits: int) -> str:
    low, high, middle = min(values), max(values), median(values)
    return f"{low:.{digits}f} to {high:.{digits}f} ({middle:.{digits}f})"


def failures(rows: Iterable[Row]) -> list[str]:
    """What failed, a line for each message."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if "error" in row:
            key = (f"`{row['model']}` {row['provider']}", row["error"][:120])
            found[key] = found.get(key, 0) + 1
    return [f"- {who}, {count} rows: {what}" for (who, what), count in found.items()]
