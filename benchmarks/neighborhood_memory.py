"""Compare what TiC's attention takes on a CPU: the op, and unfolded windows.

    python benchmarks/neighborhood_memory.py            a table
    python benchmarks/neighborhood_memory.py --write    also results/neighborhood_memory.json

A pass is forward and backward, for all gradients. "unfold" is the official formulation, as in
`peers/neighborhood_attention.py`. Memory is the peak on top of the inputs, in MiB. Times are
ratios, to that of "unfold", of the best of several passes in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._cpu import Row, compare, run
from benchmarks.cases.neighborhood_attention import NeighborhoodCase, cases
from benchmarks.peers.neighborhood_attention import PEERS

RESULT = Path(__file__).resolve().parent / "results" / "neighborhood_memory.json"
BATCHES = {(224, 224): (1, 8), (800, 1216): (1,)}


def shapes() -> list[NeighborhoodCase]:
    """The calls of tic_tiny, and one with shifts, with batches for a CPU."""
    found = [case for case in cases() if case.model == "tic_tiny" and not case.clamp]
    shifted = [case for case in found if case.shifts and case.image == (224, 224)][:1]
    return [
        replace(case, batch=batch, dtype=torch.float32)
        for case in [*(case for case in found if not case.shifts), *shifted]
        for batch in BATCHES[case.image]
    ]


def measure(seconds: float) -> Iterator[Row]:
    """Compare both ways of every call."""
    torch.manual_seed(0)
    for case in shapes():
        yield compare(case, PEERS, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run(measure, RESULT, argv, __doc__.splitlines()[0], 8.0)


if __name__ == "__main__":
    sys.exit(main())
