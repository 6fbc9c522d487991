"""The folder of a run: settings, metrics, curves, status, checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import checkpoint
from .config import option, require, settings
from .errors import StorageError, UsageError


@dataclass(frozen=True)
class RunConfig:
    """What is kept of a run, and where."""

    out: str | None = option(
        None,
        "folder of the run, resumed if it has begun; none: a new one in runs/",
        may_change=True,
    )
    seed: int = option(42, "seed of every random choice")
    checkpoint_every: int = option(
        0, "steps between checkpoints, beside those at the end of epochs", may_change=True
    )

    keep: int = option(1, "checkpoints kept, the newest, beside the best one", may_change=True)

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 0, f"--checkpoint-every: {self.checkpoint_every} < 0")
        require(self.keep >= 1, f"--keep must be at least 1, not {self.keep}")


@dataclass(frozen=True)
class Row:
    """One epoch in `metrics.csv`; accuracies and shares in percent."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    val_loss: float
    top1: float
    top5: float
    top1_ema: float | None
    images_per_s: float
    wait_percent: float
    skipped: int
    bad_images: int
    seconds: float


class RunFolder:
    """Files of a run. Only the first process writes.

    Args:
        path: The folder.
        keep: Checkpoints to keep beside the best one.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self._keep = keep
        self.checkpoints = path / "ckpt"
        self.rows: list[Row] = []

    def create(self) -> None:
        """Make the folder, and make sure that it can be written.

        Raises:
            UsageError: It cannot.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".tmp-probe"
            checkpoint.write_file(probe, b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path} ({error.strerror}): choose another --out"
            ) from None

    def write_config(self, text: str) -> None:
        """Write `config.yaml`, which is also a recipe."""
        self._write("config.yaml", text)

    def check_config(self, config: dict[str, dict[str, Any]], schema: type) -> None:
        """Make sure that the folder was begun with the same settings, as far as results go.

        Raises:
            UsageError: It was begun with others; the message names them.
        """
        try:
            begun = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(
                f"{self.path}/config.yaml cannot be read ({error}): choose another --out"
            ) from None
        require(
            isinstance(begun, dict) and all(isinstance(begun.get(group), dict) for group in config),
            f"{self.path}/config.yaml is not that of a run of this version: choose another --out",
        )
        different = [
            f"{s.flag} was {begun[s.group].get(s.name)}, now {config[s.group][s.name]}"
            for s in settings(schema).values()
            if not s.may_change and begun[s.group].get(s.name) != config[s.group][s.name]
        ]
        if different:
            raise UsageError(
                f"{self.path} was begun with other settings: {'; '.join(different)}; use the same "
                "settings to resume, or another --out"
            )

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Write `status.json`: running, done, interrupted or failed, and at which step."""
        status = {"state": state, "step": step, "reason": reason}
        self._write("status.json", json.dumps(status) + "\n")

    def read_rows(self, step: int) -> None:
        """Take up the rows of `metrics.csv` up to `step`."""
        path = self.path / "metrics.csv"
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        try:
            self.rows = [row for row in map(_parse_row, rows) if row.step <= step]
        except (KeyError, ValueError, TypeError):
            raise UsageError(
                f"{path} is damaged: delete it to go on without the rows of earlier epochs"
            ) from None

    def add_row(self, row: Row) -> None:
        """Append a row to `metrics.csv`."""
        self.rows.append(row)
        names = [item.name for item in dataclasses.fields(Row)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _plain(v) for k, v in vars(row).items()} for row in self.rows)
        self._write("metrics.csv", text.getvalue())

    def write_bad_files(self, lines: Iterable[str]) -> None:
        """Write `bad_files.txt`: one unreadable image per line, with the reason."""
        text = "".join(f"{line}\n" for line in sorted(set(lines)))
        if text:
            self._write("bad_files.txt", text)

    def save(self, step: int, state: checkpoint.Checkpoint, best_step: int) -> bool:
        """Write a checkpoint, and delete all but the newest ones and the best one.

        Returns:
            Whether it worked; if not, an older checkpoint is there.

        Raises:
            StorageError: It did not, and there is no older one.
        """
        try:
            checkpoint.save(self.checkpoints, step, state)
        except OSError as error:
            checkpoint.clean(self.checkpoints)
            if checkpoint.latest(self.checkpoints) is None:
                raise self.storage_error(error) from error
            return False
        saved = sorted({int(path.name.split("-")[1]) for path in self.checkpoints.glob("step-*")})
        checkpoint.prune(self.checkpoints, {*saved[-self._keep :], best_step})
        return True

    def storage_error(self, error: OSError | None = None) -> StorageError:
        """The error of a checkpoint that cannot be written."""
        why = f" ({error.strerror})" if error else ""
        free = shutil.disk_usage(self.path).free / 2**20
        return StorageError(
            f"cannot write the checkpoint in {self.checkpoints}{why}, {free:.0f} MiB are free: "
            "make room and start the same command again"
        )

    def _write(self, name: str, text: str) -> None:
        try:
            checkpoint.replace_file(self.path / name, text.encode())
        except OSError as error:
            raise StorageError(f"cannot write {self.path / name} ({error.strerror})") from error


def new_run_path(root: Path, name: str) -> Path:
    """The first of `root/name-1`, `root/name-2`, ... that does not exist."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


def _plain(value: Any) -> Any:
    return "" if value is None else value


def _parse_row(row: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Row):
        text = row[item.name]
        kind = int if item.type == "int" else float
        values[item.name] = kind(text) if text else None
    return Row(**values)
