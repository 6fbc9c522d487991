"""Compile every kernel for GPUs that are not here; report registers, spills and shared memory.

    python benchmarks/aot.py                 all kernels, all targets, a table
    python benchmarks/aot.py --quick         each form of each kernel once
    python benchmarks/aot.py --target sm_90  for one target
    python benchmarks/aot.py --check         compare with benchmarks/results/aot.json
    python benchmarks/aot.py --write         put the report of this version of Triton there

The launchers run with meta tensors of the models' shapes (`cases/`) in bfloat16; the first case
of each kernel also in float16 and float32. No GPU is needed. Exit code 1: a limit is broken, or
`--check` found something worse.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._report import SHARED, Row, broken_limits, differences, read, table, write

if TYPE_CHECKING:
    from benchmarks._launches import Specialised

RESULTS = Path(__file__).resolve().parent / "results" / "aot.json"


@dataclass
class Unit:
    """One compilation and the cases that it serves."""

    target: str
    specialised: Specialised
    cases: list[str]

    def row(self) -> Row:
        """Compile and describe the outcome."""
        kernel, variant = self.specialised.kernel.__name__, self.specialised.variant
        labels = {"target": self.target, "kernel": kernel, "variant": variant}
        return {**labels, **self.specialised.compile(), "cases": self.cases}


# filled before the pool forks: compiled functions do not travel between processes
_units: list[Unit] = []


def record_units(targets: Sequence[str], quick: bool) -> list[Unit]:
    """Record the launches of all cases and keep those that differ once compiled.

    Args:
        targets: Names of the GPUs to compile for.
        quick: Keep the first launch of each form of each kernel only.
    """
    from benchmarks._launches import TARGETS, record
    from benchmarks.cases import all_cases

    units: dict[str, Unit] = {}
    kernels, forms = set[str](), set[str]()
    cases = all_cases()
    while cases:
        case = cases.pop(0)
        launches = record(case.launch)
        if not quick and {launch.name for launch in launches} - kernels:
            cases += [replace(case, dtype=dtype) for dtype in case.other_types]
        for launch in launches:
            if quick and launch.form in forms:
                continue
            kernels.add(launch.name)
            forms.add(launch.form)
            for target in targets:
                specialised = launch.specialise(TARGETS[target])
                unit = units.setdefault(specialised.key, Unit(target, specialised, []))
                if case.name not in unit.cases:
                    unit.cases.append(case.name)
    return list(units.values())


def _compile(index: int) -> Row:
    return _units[index].row()


def compile_units(units: list[Unit], jobs: int) -> list[Row]:
    """Compile in `jobs` processes and show the progress on stderr."""
    _units[:] = units
    rows, start, every = [], time.monotonic(), 1 if sys.stderr.isatty() else 50
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for row in pool.imap_unordered(_compile, range(len(units))):
            rows.append(row)
            if len(rows) % every == 0 or len(rows) == len(units):
                line = f"{len(rows)}/{len(units)} compiled, {time.monotonic() - start:.0f} s"
                print(line, end="\r" if every == 1 else "\n", file=sys.stderr)
    return sorted(rows, key=lambda row: (row["kernel"], row["variant"], row["target"]))


def _check(version: str, rows: list[Row], partial: bool) -> bool:
    """Print what differs from the committed report; whether nothing is worse.

    A version of Triton without a report is judged by the limits alone: a new release is no fault.
    """
    reports = read(RESULTS)
    if version not in reports:
        print(f"{RESULTS.name} has no report of triton {version}: make one with --write")
        return True
    worse, changed = differences(reports[version], rows, partial)
    for line in changed:
        print(f"changed: {line}")
    for line in worse:
        print(f"worse: {line}")
    print(f"compared with the report of triton {version}: {len(worse)} worse")
    return not worse


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each form of each kernel once")
    parser.add_argument("--target", choices=SHARED, help="one target; all if left out")
    parser.add_argument("--check", action="store_true", help=f"compare with {RESULTS.name}")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.quick or arguments.target):
        parser.error("--quick and --target compile a part: leave them out to write a report")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = _arguments(argv)
    # read when kernels are decorated, so before anything imports them
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    targets = (arguments.target,) if arguments.target else tuple(SHARED)
    rows = compile_units(record_units(targets, arguments.quick), arguments.jobs)
    print(table(rows))
    broken = broken_limits(rows)
    for line in broken:
        print(f"over the limit: {line}")
    print(f"triton {triton.__version__}: {len(rows)} compiled, {len(broken)} over a limit")
    good = not broken
    if arguments.check:
        partial = arguments.quick or arguments.target is not None
        good = _check(triton.__version__, rows, partial) and good
    if arguments.write and any("error" in row for row in rows):
        print(f"{RESULTS.name} is left as it was: some kernels do not compile")
    elif arguments.write:
        write(RESULTS, {**read(RESULTS), triton.__version__: rows})
        print(f"wrote {RESULTS}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
