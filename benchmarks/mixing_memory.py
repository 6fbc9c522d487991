"""Compare what OverLoCK's dynamic mixing takes on a CPU: the op, and unfolded windows.

    python benchmarks/mixing_memory.py            a table
    python benchmarks/mixing_memory.py --write    also benchmarks/results/mixing_memory.json

A pass is forward and backward, for all gradients. "unfold" is the official formulation, as in
`peers/dynamic_mixing.py`. Memory is the peak on top of the inputs, in MiB. Times are ratios, to
that of "unfold", of the best of several passes in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._cpu import Row, compare, run
from benchmarks.cases.dynamic_mixing import MixingCase, cases
from benchmarks.peers.dynamic_mixing import PEERS

RESULT = Path(__file__).resolve().parent / "results" / "mixing_memory.json"
BATCHES = {(224, 224): 8, (800, 1216): 1}


def shapes() -> list[MixingCase]:
    """The calls of overlock_t, with batches for a CPU."""
    found = [case for case in cases() if case.model == "overlock_t"]
    return [replace(case, batch=BATCHES[case.image], dtype=torch.float32) for case in found]


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
