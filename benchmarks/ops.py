"""Time the ops side by side with their peers on a GPU.

    python benchmarks/ops.py                    every case, a table
    python benchmarks/ops.py --write            also benchmarks/results/ops_<device>.json
    python benchmarks/ops.py --case davit --budget 300

A further run of the same code goes on where the last one stopped. Without a GPU every peer
computes tiny cases on the CPU and is compared with the reference; nothing is timed or written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._harness import Row, ceiling, environment, measure, slug
from benchmarks._results import earlier, write
from benchmarks.cases import Case, all_cases, tiny_cases
from benchmarks.peers import PEERS

RESULTS = Path(__file__).resolve().parent / "results"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted(PEERS), help="this op only")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=float("inf"), help="stop after seconds")
    parser.add_argument("--write", action="store_true", help="write the rows as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    arguments = parser.parse_args(argv)
    if arguments.write and not torch.cuda.is_available():
        parser.error("--write: no GPU here, and times of a CPU are no result")
    return arguments


def select(cases: Sequence[Case], op: str | None, text: str) -> list[Case]:
    """Keep the cases of `op` whose name contains `text`.

    Raises:
        ValueError: None is left.
    """
    chosen = [case for case in cases if op in (None, case.op) and text in case.name]
    if not chosen:
        names = "\n  ".join(case.name for case in cases if op in (None, case.op))
        raise ValueError(f"no case contains {text!r}; there are\n  {names}")
    return chosen


def work(cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Pair cases with their peers, in an order that a budget may cut short.

    Compiled peers take long to start and come after all others, late stages after early ones.
    """
    for compiled in (False, True):
        for case in sorted(cases, key=lambda case: case.stage):
            for peer in PEERS[case.op]:
                if peer.endswith("compiled") == compiled:
                    yield case, peer


def show(row: Row) -> str:
    """Format a row for people."""
    label = f"{row['op']} {row['case']} {row['peer']} {row.get('mode', '')}".rstrip()
    if "error" in row:
        return f"{label}: {row['error']}"
    if "median_ms" not in row:
        return f"{label}: differs from the reference by {row['difference']:.1e}"
    return (
        f"{label}: {row['median_ms']:.4f} ms ({row['p20_ms']:.4f} to "
        f"{row['p80_ms']:.4f}), {row['percent_of_floor']} % of {row['bound_us']} us, "
        f"{row['peak_mib']} MiB"
    )


def _key(case: Case, peer: str) -> tuple[str, ...]:
    return case.op, case.name, str(case.dtype).removeprefix("torch."), peer


def on_gpu(arguments: argparse.Namespace) -> int:
    """Check and time every case that earlier runs left, within the budget."""
    start, head = time.monotonic(), environment(arguments.commit)
    limit = ceiling(head["device"])
    print(*(f"{key}: {value}" for key, value in head.items()), sep="\n")
    print(f"ceilings: {limit.bytes / 1e12} TB/s, {limit.flops / 1e12:.0f} TFLOP/s")
    path = arguments.out / f"ops_{slug(head['device'])}.json"
    rows = earlier(path, head)
    known = {(row["op"], row["case"], row["dtype"], row["peer"]) for row in rows}
    chosen = work(select(all_cases(), arguments.op, arguments.case))
    tasks = [(case, peer) for case, peer in chosen if _key(case, peer) not in known]
    for done, (case, peer) in enumerate(tasks):
        if time.monotonic() - start > arguments.budget:
            print(f"budget of {arguments.budget:.0f} s used: {done} of {len(tasks)} done")
            break
        new = measure(case, peer, "cuda")
        rows += new
        for row in new:
            print(show(row), flush=True)
        if arguments.write:
            write(path, head, rows)
    if arguments.write:
        print(f"wrote {path}")
    return 0


def on_cpu(arguments: argparse.Namespace) -> int:
    """Let every peer compute tiny cases; exit code 1 if one cannot or is wrong."""
    rows = [
        row
        for case, peer in work(select(tiny_cases(), arguments.op, arguments.case))
        for row in measure(case, peer, "cpu")
    ]
    print(*map(show, rows), sep="\n")
    print("no GPU: tiny cases on the CPU, no result written")
    errors = [row["error"] for row in rows if "error" in row]
    # what a peer says that it cannot do is no fault
    return 0 if all(error.startswith("NotImplementedError") for error in errors) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = _arguments(argv)
    try:
        return on_gpu(arguments) if torch.cuda.is_available() else on_cpu(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
