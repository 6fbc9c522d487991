"""Time whole models side by side with timm's, or with the official algorithm, on a GPU.

    python benchmarks/models.py                         the models of the comparison, a line per row
    python benchmarks/models.py --write --budget 540    also benchmarks/results/models_<device>.json
    python benchmarks/models.py 'davit_*'               models by name, with a shell's wildcards

A further run of the same code goes on where the last one stopped. Without a GPU every provider
computes two images on the CPU and is compared with the reference; nothing is timed or written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from backbones import catalog
from benchmarks._gpu_page import EXACT, groups, speedup
from benchmarks._harness import environment, slug
from benchmarks._model_runs import measure
from benchmarks._models import PROVIDERS, Job, own_size, work
from benchmarks._results import Row, earlier, write

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = (
    "maxvit_tiny_tf_224",
    "davit_tiny",
    "shvit_s4",
    "biformer_small",
    "overlock_t",
    "ravlt_s",
    "l2vit_tiny",
    "tic_tiny",
    "shvit_s1",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="models; one of each family if none"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="stop after seconds")
    parser.add_argument("--write", action="store_true", help="write the rows as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    arguments = parser.parse_args(argv)
    if arguments.write and not torch.cuda.is_available():
        parser.error("--write: no GPU here, and times of a CPU are no result")
    return arguments


def select(patterns: Sequence[str]) -> list[str]:
    """Names of the models that patterns name; those of the comparison if there are none.

    Raises:
        ValueError: Nothing matches a pattern.
    """
    return [model.name for model in catalog.find_models(patterns)] if patterns else list(NAMES)


def _label(row: Row) -> str:
    height, width = row["size"]
    return f"{row['model']} {row['mode']} {row['precision']} {row['batch']}x{height}x{width}"


def show(row: Row) -> str:
    """Format a row for people."""
    provider = row["provider"].replace("peer", row["peer"])
    label = f"{_label(row)} {provider}{' graph' if row['graph'] else ''}"
    if "error" in row:
        return f"{label}: {row['error']}"
    if "median_ms" not in row:
        return f"{label}: differs from the reference by {row['difference']:.1e}"
    memory = f", {row['peak_mib']} MiB" if "peak_mib" in row else ""
    times = f"{row['median_ms']} ms ({row['p20_ms']} to {row['p80_ms']})"
    return f"{label}: {times}, {row['images_per_s']} images/s{memory}"


def show_speedups(rows: Sequence[Row]) -> Iterator[str]:
    """Lines that say how many times as fast as the peer ours is, the fastest way of each."""
    for group in groups(rows, EXACT):
        plain, graphs = (speedup(group, graph) for graph in (False, True))
        if plain is not None:
            line = f"{_label(group[0])}: {plain:.2f} times {group[0]['peer']}"
            yield line if graphs is None else f"{line}, {graphs:.2f} with graphs"


def _done(job: Job, rows: Sequence[Row]) -> bool:
    return any(row.items() >= job.row.items() for row in rows)


def on_gpu(arguments: argparse.Namespace) -> int:
    """Check and time every job that earlier runs left, within the budget."""
    start, head = time.monotonic(), environment(arguments.commit)
    print(*(f"{key}: {value}" for key, value in head.items()), sep="\n")
    # what anyone does who wants convolutions to be fast
    torch.backends.cudnn.benchmark = True
    path = arguments.out / f"models_{slug(head['device'])}.json"
    rows = earlier(path, head)
    tasks = [job for job in work(select(arguments.names)) if not _done(job, rows)]
    for done, job in enumerate(tasks):
        if time.monotonic() - start > arguments.budget:
            print(f"budget of {arguments.budget:.0f} s used: {done} of {len(tasks)} done")
            break
        new = measure(job, "cuda")
        rows += new
        for row in new:
            print(show(row), flush=True)
        if arguments.write:
            write(path, head, rows)
        # after a fault of a kernel nothing runs in this process any more
        torch.cuda.synchronize()
    print(*show_speedups(rows), sep="\n")
    if arguments.write:
        print(f"wrote {path}")
    return 0


def on_cpu(arguments: argparse.Namespace) -> int:
    """Let every provider compute two images; exit code 1 if one cannot or is wrong."""
    errors = 0
    for name in select(arguments.names):
        for mode in ("inference", "training"):
            for provider, way in PROVIDERS.items():
                if mode == "training" and way.fused:
                    continue
                for row in measure(Job(name, provider, mode, "fp32", own_size(name), 2), "cpu"):
                    print(show(row), flush=True)
                    errors += "error" in row
    print("no GPU: two images on the CPU, no result written")
    return 1 if errors else 0


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
