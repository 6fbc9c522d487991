"""The ahead-of-time report: its rows, its limits, and what became worse since another one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# shared memory that one program may use, in bytes
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
NO_SPILL = ("sm_90", "sm_100")
MATRIX_UNITS = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")

Row = dict[str, Any]


class Key(NamedTuple):
    """What names a compiled kernel whatever its tiles are."""

    target: str
    kernel: str
    dtype: str
    case: str

    def __str__(self) -> str:
        return " ".join(self)


def spilled(row: Row) -> int:
    """Bytes of stack that the code loads or stores; ptxas also reserves some that it never uses."""
    return row["stack"] if {"LDL", "STL", "spill"} & row["instructions"].keys() else 0


def broken_limits(rows: Iterable[Row]) -> list[str]:
    """Name the rows that do not compile, spill where nothing may, or take too much memory."""
    lines = []
    for row in rows:
        label = f"{row['target']} {row['kernel']} [{row['variant']}] for {row['cases'][0]}"
        if "error" in row:
            lines.append(f"{label}: {row['error']}")
            continue
        if spilled(row) and row["target"] in NO_SPILL:
            lines.append(f"{label}: {row['stack']} bytes spilled, none allowed")
        if row["shared"] > SHARED[row["target"]]:
            lines.append(
                f"{label}: {row['shared']} bytes of shared memory, {SHARED[row['target']]} allowed"
            )
    return lines


def differences(
    old: Iterable[Row], new: Iterable[Row], partial: bool = False
) -> tuple[list[str], list[str]]:
    """Compare two reports of one version of Triton, case by case.

    Args:
        old: The earlier report.
        new: The later one.
        partial: The later one may lack rows.

    Returns:
        What is worse - more spilled, no matrix instructions any more, rows that only one report
        has - and what merely differs: registers, stack and shared memory.
    """
    before, after = _by_key(old), _by_key(row for row in new if "error" not in row)
    worse = [f"{key}: not in the committed report" for key in after.keys() - before.keys()]
    if not partial:
        worse += [f"{key}: only in the committed report" for key in before.keys() - after.keys()]
    changed = []
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        if spilled(now) > spilled(was):
            worse.append(f"{key}: spilled {spilled(was)} -> {spilled(now)} bytes")
        if _matrix(was) and not _matrix(now):
            worse.append(f"{key}: no {_matrix(was)} any more")
        for field in ("registers", "stack", "shared"):
            if was[field] != now[field]:
                changed.append(f"{key}: {field} {was[field]} -> {now[field]}")
    return sorted(worse), sorted(changed)


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Map every case of every row; of several launches of a kernel the one that spills most."""
    keyed: dict[Key, Row] = {}
    for row in rows:
        for case in row["cases"]:
            key = Key(row["target"], row["kernel"], row["variant"].split()[0], case)
            if key not in keyed or spilled(row) > spilled(keyed[key]):
                keyed[key] = row
    return keyed


def _matrix(row: Row) -> str:
    return next((unit for unit in MATRIX_UNITS if unit in row["instructions"]), "")


def table(rows: Iterable[Row]) -> str:
    """Format the rows for people; the last column counts the cases that share one."""
    head = ("target", "kernel", "variant", "regs", "stack", "shared", "instructions", "cases")
    lines = [head]
    for row in (row for row in rows if "error" not in row):
        counts = " ".join(f"{name}:{count}" for name, count in row["instructions"].items())
        numbers = (str(row[field]) for field in ("registers", "stack", "shared"))
        cases = str(len(row["cases"]))
        lines.append((row["target"], row["kernel"], row["variant"], *numbers, counts, cases))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def read(path: Path) -> dict[str, list[Row]]:
    """Read reports by version of Triton; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, reports: dict[str, list[Row]]) -> None:
    """Write reports, one row per line so that a diff shows what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = []
    for version, rows in sorted(reports.items()):
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        versions.append(f" {json.dumps(version)}: [\n{lines}\n ]")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")
