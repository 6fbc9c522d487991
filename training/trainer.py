"""A training run from the first step to the last, through any number of interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint
from .augment import train_transform
from .config import Parsed, require, to_dict, to_yaml
from .console import Console, StopRequest
from .curves import Curves
from .data import (
    BadFiles,
    Batch,
    class_count,
    make_loader,
    open_splits,
    resolve_view,
)
from .engine import Agreement, Engine
from .errors import DivergedError, InterruptedRunError, StorageError, UsageError, WorkerError
from .evaluate import Evaluator, Score
from .finetune import freeze, load_trained
from .keys import key, seed_step
from .losses import build_teacher
from .model import (
    build_model,
    count_parameters,
    fit_input_size,
    to_device,
)
from .parallel import gathered
from .progress import (
    Progress,
    epoch_line,
    make_row,
    result_line,
    settings_lines,
    step_note,
    summary_lines,
)
from .reports import peak_memory
from .run_folder import RunFolder, new_run_path
from .runtime import World, versions
from .sampler import TrainBatches, TrainOrder
from .schedule import learning_rate
from .train_config import TrainConfig


class Trainer:
    """A run of `train.py` in one process of the world.

    Args:
        parsed: The settings and their origins.
        world: The processes.
    """

    def __init__(self, parsed: Parsed[TrainConfig], world: World) -> None:
        self.parsed = parsed
        self.config = config = parsed.config
        self.world = world
        self.splits = open_splits(config.data)
        self.num_classes = class_count(self.splits, config.model.num_classes)
        self.order = TrainOrder(
            len(self.splits.train),
            config.data.batch_size,
            config.run.seed,
            config.augment.repeats,
        )
        self.total = self.order.steps_per_epoch * config.schedule.total_epochs
        self.console = Console(world.first, self.order.steps_per_epoch)
        self.progress = Progress()
        self.stop = StopRequest()
        self._save_failed = False
        self._build()

    def run(self) -> None:
        """Train to the end.

        Raises:
            InterruptedRunError: A signal came; the state is saved.
            RunError: The run cannot go on; `status.json` says why.
        """
        self.folder = self._open_folder()
        self._resume()
        self._announce()
        try:
            with self.world.watch(lambda: f"step {self.progress.step}"):
                self._loop()
        except Exception as error:
            self.console.clear()
            state = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
            # on a full disk the error that says so counts
            with contextlib.suppress(StorageError):
                self._write_status(state, str(error))
            raise

    def _build(self) -> None:
        config, world = self.config, self.world
        seed_step(key(config.run.seed, "init"))
        distilled = config.distill.teacher is not None
        model = build_model(config.model, self.num_classes, distilled=distilled)
        if config.finetune.source is not None:
            self.console.say(load_trained(model, config.finetune.source, self.splits.classes))
        self.view = resolve_view(config.data, model)
        fit_input_size(model, self.view.size)
        freeze(model, config.finetune)
        to_device(model, world.device, config.runtime.channels_last)
        batches = self._batches(0)
        require(
            not config.augment.mixes or batches.size % 2 == 0,
            f"mixup and cutmix need an even number of images per process, not {batches.size}: "
            "change --batch-size",
        )
        teacher = build_teacher(
            config.distill, self.view, self.splits, self.num_classes, world.device
        )
        self.engine = Engine(model, self.num_classes, config, world, teacher)
        self.evaluator = Evaluator(self.splits.val, self.view, config.data, config.runtime, world)
        self.bad = BadFiles(self.splits.train, config.data.max_bad)

    def _open_folder(self) -> RunFolder:
        config = self.config
        name = f"{Path(config.data.name).name}-{config.model.name.replace('/', '-')}"
        path = Path(config.run.out) if config.run.out else new_run_path(Path("runs"), name)
        folder = RunFolder(self.world.share(path), config.run.keep)
        failure = None
        if self.world.first:
            try:
                folder.create()
            except UsageError as error:
                failure = error
        failure = self.world.share(failure)
        if failure is not None:
            raise failure
        return folder

    def _resume(self) -> None:
        path = self.world.share(checkpoint.latest(self.folder.checkpoints))
        if path is not None:
            self.folder.check_config(to_dict(self.config), TrainConfig)
            loaded = checkpoint.load(path)
            self.engine.restore(loaded)
            self.progress = Progress(**loaded.meta["progress"])
            self.bad.indices.update(loaded.meta["bad_images"])
            self.folder.read_rows(self.progress.step)
            self.console.say(f"resuming {self.folder.path} at step {self.progress.step}")
        elif self.world.first:
            self.folder.write_config(to_yaml(self.parsed))
        self._write_status("running")

    def _announce(self) -> None:
        splits, model = self.splits, self.engine.model
        title = f"{self.config.model.name} on {self.config.data.name}, {self.view.size} px"
        self.curves = Curves(self.folder.path, title)
        changed = settings_lines(self.parsed)
        if changed:
            self.console.say("\n".join(["settings that are not the defaults:", *changed]))
        self.console.say(
            f"{self.config.model.name}, {count_parameters(model) / 1e6:.2f} M parameters, "
            f"{self.view.size} px, on {self.config.data.name}: {len(splits.train)} training and "
            f"{len(splits.val)} held-out images, {self.num_classes} classes"
        )
        self.console.say(
            f"{self.config.schedule.total_epochs} epochs of {self.order.steps_per_epoch} steps, "
            f"{self.order.batch_size} images a step, {self.world}; files in {self.folder.path}"
        )

    def _loop(self) -> None:
        progress, per_epoch = self.progress, self.order.steps_per_epoch
        self._batches_left = self._load(progress.step)
        while True:
            if progress.step % per_epoch == 0 and progress.step > progress.evaluated:
                self._finish_epoch()
            if progress.step == self.total:
                break
            agreed = self._step()
            if agreed.stop:
                self._interrupt()
            every = self.config.run.checkpoint_every
            if every and progress.step % every == 0 and progress.step % per_epoch:
                self._save()
        self._finish()

    def _step(self) -> Agreement:
        progress = self.progress
        begin = time.monotonic()
        micro = self._fetch()
        waited = time.monotonic() - begin
        for _, _, failed in micro:
            self.bad.add(failed)
        agreed = self.engine.step(
            micro, progress.step, self._lr(progress.step), self.stop(), len(self.bad.indices)
        )
        elapsed = time.monotonic() - begin
        progress.step += 1
        progress.seconds += elapsed
        progress.total_seconds += elapsed
        progress.wait += waited
        self._count(agreed)
        if agreed.bad > self.bad.limit:
            self._check_bad_files()
        return agreed

    def _fetch(self) -> list[Batch]:
        count = self.config.optim.accumulate
        try:
            return [next(self._batches_left) for _ in range(count)]
        except RuntimeError as error:
            if WorkerError.SIGN not in str(error):
                raise
        # the order and the views are functions of the step: nothing is lost or seen twice
        self.console.say("warning: a loading process was killed: starting new ones")
        self._batches_left = self._load(self.progress.step)
        return [next(self._batches_left) for _ in range(count)]

    def _count(self, agreed: Agreement) -> None:
        progress, config = self.progress, self.config
        if agreed.finite:
            progress.loss += agreed.loss
            progress.steps += 1
            progress.streak = 0
            epoch, place = divmod(progress.step - 1, self.order.steps_per_epoch)
            label = f"epoch {epoch + 1}/{config.schedule.total_epochs}"
            note = step_note(progress, self.order, self.total, agreed.loss)
            self.console.advance(label, place + 1, note)
            return
        progress.skipped += 1
        progress.streak += 1
        if progress.streak >= config.optim.max_skips:
            raise DivergedError(
                f"diverged at step {progress.step}: {progress.streak} steps in a row had a "
                f"non-finite loss or gradient; try a smaller --lr, a longer --warmup-epochs, or "
                f"--clip 1. The last good checkpoint is in {self.folder.checkpoints}"
            )

    def _finish_epoch(self) -> None:
        begin = time.monotonic()
        self.console.clear()
        try:
            score = self._score(self.engine.model)
            average = self.engine.ema
            averaged = self._score(average.module) if average else None
        except InterruptedRunError:
            self._interrupt()
        progress = self.progress
        progress.total_seconds += time.monotonic() - begin
        self.bad.share(self.world)
        row = make_row(progress, self.order, self._lr(progress.step - 1), score, averaged, self.bad)
        progress.finish_epoch(row)
        self.console.say(epoch_line(row, self.config.schedule.total_epochs))
        if self.world.first:
            self.folder.add_row(row)
        if math.isfinite(row.val_loss):
            self._save(proven=True)
        if self.world.first:
            self.curves.update(self.folder.rows)
        self._check_bad_files()

    def _score(self, model: nn.Module) -> Score:
        with gathered(model):
            return self.evaluator.score(model, self.stop)

    def _finish(self) -> None:
        if self.world.first and self.folder.rows:
            row, images = self.folder.rows[-1], len(self.splits.val)
            self.curves.finish(self.folder.rows)
            self._write_status("done", f"top-1 {row.top1:.2f} %")
            memory = peak_memory(self.world.device)
            for line in summary_lines(self.folder.rows, self.progress, memory):
                self.console.say(line)
            self.console.say(result_line(row, images, self.progress, self.folder.path))

    def _interrupt(self) -> None:
        self._save()
        raise InterruptedRunError(
            f"interrupted at step {self.progress.step} of {self.total}: resume with the "
            f"same command and --out {self.folder.path}"
        )

    def _save(self, *, proven: bool = False) -> None:
        # what led to a non-finite step may be in the weights: the last good checkpoint stays
        if self.progress.streak and not proven:
            return
        self.bad.share(self.world)
        meta: dict[str, Any] = {
            "progress": dataclasses.asdict(self.progress),
            "bad_images": sorted(self.bad.indices),
            "model": self.config.model.name,
            "view": dataclasses.asdict(self.view),
            "classes": list(self.splits.classes or ()),
            "config": to_dict(self.config),
            "world_size": self.world.size,
            "versions": versions(),
        }
        state = self.engine.state(meta)
        if not self.world.first:
            return
        worked = self.folder.save(self.progress.step, state, self.progress.best_step)
        if not worked and self._save_failed:
            raise self.folder.storage_error()
        if not worked:
            self.console.say(f"warning: {self.folder.storage_error()}")
        self._save_failed = not worked

    def _check_bad_files(self) -> None:
        kinds = (("training", self.bad), ("held-out", self.evaluator.bad))
        found = [set().union(*self.world.gather(list(bad.lines()))) for _, bad in kinds]
        if self.world.first:
            self.folder.write_bad_files(set().union(*found))
        for (kind, bad), lines in zip(kinds, found, strict=True):
            require(
                len(lines) <= bad.limit,
                f"{len(lines)} of {len(bad.source)} {kind} images cannot be read, listed in "
                f"{self.folder.path / 'bad_files.txt'}: repair them, or raise --max-bad above "
                f"{self.config.data.max_bad}",
            )

    def _write_status(self, state: str, reason: str = "") -> None:
        if self.world.first:
            self.folder.write_status(state, self.progress.step, reason)

    def _lr(self, step: int) -> float:
        peak = self.config.optim.peak_lr(self.config.data.batch_size)
        return learning_rate(self.config.schedule, peak, step, self.order.steps_per_epoch)

    def _batches(self, start: int) -> TrainBatches:
        return TrainBatches(
            self.order,
            start,
            self.total,
            self.world.rank,
            self.world.size,
            self.config.optim.accumulate,
        )

    def _load(self, start: int) -> Iterator[Batch]:
        config = self.config
        transform = train_transform(config.augment, self.view, affine=config.data.name == "digits")
        batches = self._batches(start)
        loader = make_loader(
            self.splits.train, transform, batches, config.data, self.world, config.run.seed
        )
        iterator = iter(loader)
        if hasattr(signal, "SIGCHLD"):
            # PyTorch's handler raises wherever the run is when a worker dies; `next` notices too
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator
