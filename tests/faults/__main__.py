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
from typing import Any

from tests.faults.figures import FIGURES, SUITES, Figure, Score
from tests.faults.lab import Lab

_PACKAGES = ("torch", "timm", "huggingface_hub", "safetensors", "fused-backbones")


def main(arguments: list[str] | None = None) -> int:
    """Run the figures that were asked for; 1 if anything was not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--figure", help="one figure only, e.g. F1")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="put the figures there, beside others it has"
    )
    parser.add_argument("--trials", type=int, default=1, help="how often everything is injected")
    args = parser.parse_args(arguments)
    if args.trials < 1:
        parser.error(f"--trials is {args.trials}: give 1 or more")
    figures = [figure for figure in FIGURES if args.suite in ("all", figure.suite)]
    figures = [figure for figure in figures if args.figure in (None, figure.name)]
    if not figures:
        parser.error(f"--figure is {args.figure}: one of {', '.join(f.name for f in FIGURES)}")
    scores = {figure.name: Score(figure.name, figure.title) for figure in figures}
    for trial in range(args.trials):
        with tempfile.TemporaryDirectory() as folder, Lab(Path(folder), True, trial) as lab:
            for figure in figures:
                _inject(lab, figure, scores[figure.name])
                if trial == args.trials - 1:
                    print(*scores[figure.name].lines(), sep="\n", flush=True)
                    if args.json:
                        _merge(args.json, scores[figure.name].as_dict() | _environment(args.trials))
    return int(any(score.failures for score in scores.values()))


def _inject(lab: Lab, figure: Figure, score: Score) -> None:
    print(f"{figure.name}: {len(figure.names)} injections ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    outcomes = figure.run(lab)
    score.seconds += time.monotonic() - start
    score.add(figure, outcomes)


def _merge(path: Path, figure: dict[str, Any]) -> None:
    """Put a figure into a file, in the place of an older one, beside those of other runs."""
    kept = json.loads(path.read_text())["figures"] if path.is_file() else []
    found = {each["figure"]: each for each in [*kept, figure]}
    order = [name for name in (each.name for each in FIGURES) if name in found]
    path.write_text(json.dumps({"figures": [found[name] for name in order]}, indent=2) + "\n")


def _environment(trials: int) -> dict[str, Any]:
    versions = {package: version(package) for package in _PACKAGES}
    return {
        "command": f"python -m tests.faults --trials {trials}",
        "versions": {"python": platform.python_version(), **versions},
    }


if __name__ == "__main__":
    sys.exit(main())
