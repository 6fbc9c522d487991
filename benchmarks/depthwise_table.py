"""Choose between our depthwise kernels and PyTorch's, by what `ops.py` measured on GPUs.

    python benchmarks/depthwise_table.py            what would change
    python benchmarks/depthwise_table.py --write    ops/depthwise_table.json

Every row of `results/ops_<device>.json` about a depthwise convolution that was timed with both
becomes one of the table: what was computed, on a map of which size, and how many times faster ours
was. Of two devices of one architecture the slower speed-up counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import all_cases
from benchmarks.cases.depthwise_conv_norm import KERNEL

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = Path(__file__).resolve().parents[1] / "ops" / "depthwise_table.json"
# what `_choice.Work.part` is called for a mode of an op
PARTS = {
    ("depthwise_conv", "forward"): "forward",
    ("depthwise_conv", "grad_input"): "grad_input",
    ("depthwise_conv", "grad_weight"): "grad_weight",
    ("depthwise_conv_norm", "forward"): "norm",
    ("depthwise_conv_norm", "grad_norm"): "norm_backward",
}
EMPTY = "No GPU has been measured yet: PyTorch's convolution runs on every device."
HOW = "Written by benchmarks/depthwise_table.py --write."

Row = dict[str, Any]
Table = dict[str, dict[tuple[Any, ...], float]]


def speedups(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    """How many times faster ours was, by the fields of `_choice.Work`."""
    cases = {(case.op, case.name): case for case in all_cases()}
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        part = PARTS.get((row["op"], row.get("mode", "")))
        case = cases.get((row["op"], row["case"]))
        if part is None or case is None or "median_ms" not in row:
            continue
        kernel, stride = getattr(case, "kernel", KERNEL), getattr(case, "stride", 1)
        work = (part, row["dtype"], kernel, stride, case.pixels, case.channels)
        # several calls of one size: what surrounds them differs, the slower ratio counts
        times.setdefault((work, row["case"]), {})[row["peer"]] = row["median_ms"]
    table: dict[tuple[Any, ...], float] = {}
    for (work, _), peers in times.items():
        if {"backbones", "pytorch"} <= peers.keys():
            ratio = round(peers["pytorch"] / peers["backbones"], 3)
            table[work] = min(ratio, table.get(work, ratio))
    return table


def collect(results: Path) -> Table:
    """Read all results of a folder, by architecture."""
    table: Table = {}
    for path in sorted(results.glob("ops_*.json")):
        result = json.loads(path.read_text())
        for work, ratio in speedups(result["rows"]).items():
            rows = table.setdefault(result["arch"], {})
            rows[work] = min(ratio, rows.get(work, ratio))
    return table


def text(table: Table) -> str:
    """Format the table, one row per line."""
    archs = []
    for arch, rows in sorted(table.items()):
        lines = ",\n".join(f"   {json.dumps([*work, rows[work]])}" for work in sorted(rows))
        archs.append(f'  "{arch}": [\n{lines}\n  ]')
    note = HOW if archs else f"{EMPTY} {HOW}"
    body = "{\n" + ",\n".join(archs) + "\n }" if archs else "{}"
    return f'{{\n "note": {json.dumps(note)},\n "archs": {body}\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to read")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to write")
    arguments = parser.parse_args(argv)
    table = collect(arguments.results)
    for arch, rows in table.items():
        faster = sum(ratio > 1 for ratio in rows.values())
        print(f"{arch}: ours is faster in {faster} of {len(rows)}")
    new = text(table)
    same = arguments.table.exists() and arguments.table.read_text() == new
    print(f"{arguments.table.name}: {'as it is' if same else 'would change'}")
    if arguments.write and not same:
        part = arguments.table.with_suffix(".part")
        part.write_text(new)
        part.replace(arguments.table)
        print(f"wrote {arguments.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
