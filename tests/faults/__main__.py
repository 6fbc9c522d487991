"""Inject everything and count what was survived: `python -m tests.faults`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tests.faults.figures import FIGURES, Figure, Score
from tests.faults.lab import Lab

_PACKAGES = ("torch", "timm", "huggingface_hub", "safetensors", "fused-backbones")


def main(arguments: list[str] | None = None) -> int:
    """Run the figures that were asked for; 1 if anything was not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--suite", choices=("hub", "files", "all"), default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--trials", type=int, default=1, help="how often everything is injected")
    args = parser.parse_args(arguments)
    if args.trials < 1:
        parser.error(f"--trials is {args.trials}: give 1 or more")
    figures = [figure for figure in FIGURES if args.suite in ("all", figure.suite)]
    scores = {figure.name: Score(figure.name, figure.title) for figure in figures}
    for trial in range(args.trials):
        with tempfile.TemporaryDirectory() as folder, Lab(Path(folder), True, trial) as lab:
            for figure in figures:
                _inject(lab, figure, scores[figure.name])
                if trial == args.trials - 1:
                    print(*scores[figure.name].lines(), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(_report(args.trials, scores), indent=2) + "\n")
    return int(any(score.failures for score in scores.values()))


def _inject(lab: Lab, figure: Figure, score: Score) -> None:
    print(f"{figure.name}: {len(figure.names)} injections ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    outcomes = figure.run(lab)
    score.seconds += time.monotonic() - start
    score.add(figure, outcomes)


def _report(trials: int, scores: dict[str, Score]) -> dict[str, object]:
    versions = {package: version(package) for package in _PACKAGES}
    return {
        "command": f"python -m tests.faults --trials {trials}",
        "versions": {"python": platform.python_version(), **versions},
        "figures": [score.as_dict() for score in scores.values()],
    }


if __name__ == "__main__":
    sys.exit(main())
