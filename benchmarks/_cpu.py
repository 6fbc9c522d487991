"""What the scripts that measure on a CPU share: memory, times in turns, and their program."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.cases import Case
from benchmarks.peers._peer import Peers

Row = dict[str, Any]
Ways = Mapping[str, Callable[[], Any]]


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak(step: Callable[[], Any]) -> float:
    """MiB that a step takes at its height, gradients included: allocations are counted."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 2**20


def times_in_turns(ways: Ways, seconds: float, turns: int = 3) -> dict[str, list[float]]:
    """Seconds of every pass of each way, in turns, without those of the first turn.

    Args:
        ways: What to time, by name.
        seconds: How long to do so.
        turns: Turns at least.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn > turns and time.perf_counter() > end:
            break
        # whoever comes first has a cold cache
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    # the first is slow
    return {name: values[1:] for name, values in times.items()}


def best_times(ways: Ways, seconds: float) -> dict[str, float]:
    """Seconds of the best pass of each way, in turns."""
    return {name: min(times) for name, times in times_in_turns(ways, seconds, 1).items()}


def compare(case: Case, peers: Peers, seconds: float, base: str = "unfold") -> Row:
    """Compare the op with a peer: memory in MiB, and times as ratios to those of the peer.

    Args:
        case: What to compute, forward and backward.
        peers: Those of the op, by name.
        seconds: How long to take the times.
        base: Name of the peer.
    """
    steps = {"op": _training(case, peers, "backbones"), base: _training(case, peers, base)}
    times = best_times(steps, seconds)
    row: Row = {"case": case.name, "batch": case.batch, "height": case.height, "width": case.width}
    row |= {f"{way}_mib": round(peak(step), 1) for way, step in steps.items()}
    return row | {f"{way}_time": round(times[way] / times[base], 3) for way in steps}


def _training(case: Case, peers: Peers, name: str) -> Callable[[], None]:
    """A forward and a backward pass."""
    peer = peers[name](case, lambda function: function)
    inputs = [x.requires_grad_() for x in peer.prepare(case.tensors("cpu"))]
    grad = torch.randn_like(peer.run(*inputs)[0])

    def step() -> None:
        torch.autograd.grad(peer.run(*inputs)[0], inputs, grad)

    return step


def run(
    measure: Callable[[float], Iterable[Row]],
    result: Path,
    argv: Sequence[str] | None,
    about: str,
    seconds: float,
) -> int:
    """Run a program that prints rows, and writes them with `--write`.

    Args:
        measure: Makes the rows, each timed for so many seconds.
        result: JSON file to write.
        argv: The command line.
        about: Help text.
        seconds: Default of `--seconds`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--write", action="store_true", help=f"write {result.name}")
    parser.add_argument("--seconds", type=float, default=seconds, help="of timing, for each row")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for row in measure(arguments.seconds):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if arguments.write:
        head = {"cpu": processor(), "threads": 1, "dtype": "float32", "torch": torch.__version__}
        write(result, head, rows)
        print(f"wrote {result}")
    return 0


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write a result as JSON: the fields of `head`, then `rows`, one a line."""
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{\n{fields} "rows": [\n{lines}\n ]\n}}\n')
