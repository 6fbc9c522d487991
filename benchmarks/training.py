"""Compare `train.py` with timm's on a CPU, with the same model, images, settings and processes.

    python benchmarks/training.py --timm-train FILE            a line per run, then the ratios
    python benchmarks/training.py --timm-train FILE --write    also results/training_cpu.json

FILE is timm's own `train.py`, which its packages leave out: the first of `TIMM_COMMIT` in
huggingface/pytorch-image-models. It is run as it is but for `PATCHES`. Both programs are started by
torchrun, in turns, on two processes of one thread and one loading process each, over gloo; both
evaluate the model and its average after every epoch, and write a checkpoint.

Images per second are what each program reports itself: all steps of the epochs after the first,
waits for data included. Seconds are those of the whole command, of the wall and of all its
processes; memory is that of its largest process. Compare only numbers of one run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import timm
import torch
from PIL import Image

from benchmarks._cpu import Row, processor, write
from benchmarks._harness import head_commit

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training_cpu.json"
TIMM_COMMIT = "2aabaef039d918d453b58714ab84562609981112"
# what timm's script needs to run on a CPU, with these models, and with timm's present average
PATCHES = {
    "from timm import utils\n": "import backbones\nfrom timm import utils\n",
    "device=torch.device('cuda')": "device=torch.device('cpu')",
    "device_ids=[device]": "device_ids=None",
    "utils.ModelEmaV2(": "utils.ModelEmaV3(",
    "group.add_argument('--seed'": "group.add_argument('--device', default='cpu')\n"
    "group.add_argument('--seed'",
}
CLASSES = 10
MEASURES = ("images_per_s", "wall_s", "cpu_s", "peak_mib")


class Job(NamedTuple):
    """What both programs are to do."""

    model: str
    images: int
    held_out: int
    batch: int = 64
    side: int = 64
    epochs: int = 2

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.images // self.batch


# convolutions and batch norms; attention and layer norms
JOBS = [Job("shvit_s1", 1280, 320), Job("davit_tiny", 320, 64, batch=32)]


def draw_images(folder: Path, job: Job) -> Path:
    """Write the PNG files of a job as `train/<class>/` and `val/<class>/`; return their folder."""
    root = folder / f"{job.images}-{job.held_out}-{job.side}"
    random = np.random.default_rng(0)
    for split, count in (("train", job.images), ("val", job.held_out)):
        for number in range(count):
            path = root / split / f"c{number % CLASSES}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((job.side, job.side), Image.Resampling.BICUBIC).save(path)
    return root


def our_command(job: Job, data: Path, out: Path) -> list[str]:
    """The script and flags of our program."""
    flags = f"""--model {job.model} --img-size {job.side} --batch-size {job.batch} --workers 1
        --epochs {job.epochs} --warmup-epochs 0 --lr 1e-3 --min-lr 0 --schedule-per epoch
        --weight-decay 0.05 --clip 1 --auto-augment rand-m9-mstd0.5 --train-interpolation random
        --reprob 0.25 --mixup 0.8 --cutmix 1 --smoothing 0.1 --ema-decay 0.9998 --device cpu
        --amp none"""
    return [str(ROOT / "train.py"), *flags.split(), "--data", str(data), "--out", str(out)]


def timm_command(script: Path, job: Job, data: Path, out: Path) -> list[str]:
    """The script and flags of timm's program."""
    flags = f"""--model {job.model} --img-size {job.side} --num-classes {CLASSES} -j 1
        -b {job.batch // 2} --channels-last --epochs {job.epochs} --warmup-epochs 0 --opt adamw
        --lr 1e-3 --weight-decay 0.05 --clip-grad 1 --aa rand-m9-mstd0.5 --reprob 0.25 --mixup 0.8
        --cutmix 1 --smoothing 0.1 --model-ema --model-ema-decay 0.9998
        --log-interval {job.steps - 1}"""
    return [str(script), *flags.split(), "--data-dir", str(data), "--output", str(out)]


def our_speed(out: Path, job: Job) -> float:
    """Images per second of our epochs after the first, by `metrics.csv`."""
    with (out / "metrics.csv").open() as file:
        speeds = [float(row["images_per_s"]) for row in csv.DictReader(file)]
    return _mean_speed(speeds, job)


def timm_speed(log: str, job: Job) -> float:
    """Images per second of timm's epochs after the first, by the last line of each in its log."""
    last = rf"Train: \d+ \[ *{job.steps - 1}/.*\([\d.]+s, +([\d.]+)/s\)"
    return _mean_speed([float(speed) for speed in re.findall(last, log)], job)


def patch(script: Path, folder: Path) -> Path:
    """Write a copy of timm's `script` that runs on a CPU.

    Raises:
        ValueError: It is of another version, to which the patches do not apply.
    """
    text = script.read_text()
    for old, new in PATCHES.items():
        if old not in text:
            raise ValueError(f"{script} has no {old!r}: take the one of {TIMM_COMMIT}")
        text = text.replace(old, new)
    copy = folder / "timm_train.py"
    copy.write_text(text)
    return copy


def measure(command: Sequence[str], log: Path) -> Row:
    """Run a script in two processes under torchrun; its output goes to `log`.

    Raises:
        RuntimeError: The script failed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    with log.open("w") as file:
        line = [sys.executable, *launch, *command]
        run = subprocess.Popen(line, stdout=file, stderr=file, env=environment, cwd=log.parent)
        _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {log.read_text()}")
    return {
        "wall_s": round(time.perf_counter() - begin, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def compare(job: Job, script: Path, folder: Path, runs: int) -> Iterator[Row]:
    """Run both programs in turns, `runs` times each."""
    data = draw_images(folder, job)
    for number in range(2 * runs):
        # the page cache and the machine's mood favour neither
        ours = number % 4 in (0, 3)
        out = folder / f"{job.model}-{number}"
        command = our_command(job, data, out) if ours else timm_command(script, job, data, out)
        row = measure(command, folder / "log.txt")
        log = (folder / "log.txt").read_text()
        speed = our_speed(out, job) if ours else timm_speed(log, job)
        program = "backbones" if ours else "timm"
        yield {"model": job.model, "program": program, "images_per_s": speed, **row}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """The medians of our runs over those of timm's, by model."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        row: Row = {"model": model}
        for name in MEASURES:
            ours, theirs = (
                statistics.median(r[name] for r in rows if (r["model"], r["program"]) == key)
                for key in ((model, "backbones"), (model, "timm"))
            )
            row[name] = round(ours / theirs, 3)
        found.append(row)
    return found


def environment(script: Path) -> dict[str, object]:
    """What ran where."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": head_commit(),
        "timm_train": {
            "commit": TIMM_COMMIT,
            "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
            "patches": PATCHES,
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-train", type=Path, required=True, help="timm's own train.py")
    parser.add_argument("--runs", type=int, default=5, help="of each program and model")
    parser.add_argument("--models", nargs="*", default=[job.model for job in JOBS])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args(argv)
    jobs, rows = [job for job in JOBS if job.model in arguments.models], []
    with tempfile.TemporaryDirectory() as name:
        script = patch(arguments.timm_train, Path(name))
        for job in jobs:
            for row in compare(job, script, Path(name), arguments.runs):
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    found = ratios(rows)
    for row in found:
        print("backbones / timm:", " ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.write:
        head = environment(arguments.timm_train)
        head |= {"jobs": [commands(job) for job in jobs], "ratios": found}
        write(RESULT, head, rows)
        print(f"wrote {RESULT}")
    return 0


def commands(job: Job) -> Row:
    """A job and the command lines of both programs."""
    places = Path("DATA"), Path("OUT")
    ours, theirs = our_command(job, *places), timm_command(Path("TIMM"), job, *places)
    return {**job._asdict(), "backbones": " ".join(ours[1:]), "timm": " ".join(theirs[1:])}


def _mean_speed(speeds: Sequence[float], job: Job) -> float:
    if len(speeds) != job.epochs:
        raise RuntimeError(f"{len(speeds)} epochs instead of {job.epochs} in the log")
    return round(statistics.harmonic_mean(speeds[1:]), 1)


if __name__ == "__main__":
    sys.exit(main())
