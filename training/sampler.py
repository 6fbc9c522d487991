"""Which images a process sees at which step: a pure function of seed, epoch and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .config import require
from .keys import key


class Sample(NamedTuple):
    """The place of an image in the run, which also seeds its augmentation."""

    epoch: int
    image: int
    repeat: int = 0


@dataclass(frozen=True)
class TrainOrder:
    """The order of a training run, the same for every number of processes.

    Args:
        length: Images in the data set.
        batch_size: Images per optimizer step, over all processes.
        seed: Seed of the run.
        repeats: Times an image follows itself; the epoch keeps its length, so that it shows
            `length / repeats` distinct images (repeated augmentation, Hoffer et al. 2019).
    """

    length: int
    batch_size: int
    seed: int
    repeats: int = 1

    def __post_init__(self) -> None:
        require(
            self.length >= self.batch_size,
            f"{self.length} training images do not fill one batch: use --batch-size "
            f"{self.length} or less, not {self.batch_size}",
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the images that do not fill a batch are left out."""
        return self.length // self.batch_size

    def epoch(self, epoch: int) -> list[Sample]:
        """Every sample of `epoch`, in order."""
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        positions = range(self.steps_per_epoch * self.batch_size)
        return [Sample(epoch, order[p // self.repeats], p % self.repeats) for p in positions]


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process, from step `start` to step `stop` of the run.

    Neighbours in the order go to different processes, so that the repeats of an image do too.

    Args:
        order: The order of the run.
        start: First step.
        stop: The step after the last.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches per step.
    """

    order: TrainOrder
    start: int
    stop: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        require(
            self.order.batch_size % parts == 0,
            f"--batch-size {self.order.batch_size} cannot be split over {self.world_size} "
            f"processes and {self.accumulate} accumulation steps: use a multiple of {parts}",
        )

    @property
    def size(self) -> int:
        """Images of a micro-batch."""
        return self.order.batch_size // (self.world_size * self.accumulate)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, samples = -1, []
        for step in range(self.start, self.stop):
            step_epoch, place = divmod(step, self.order.steps_per_epoch)
            if step_epoch != epoch:
                epoch, samples = step_epoch, self.order.epoch(step_epoch)
            first = place * self.order.batch_size
            batch = samples[first : first + self.order.batch_size]
            mine = batch[self.rank :: self.world_size]
            yield from (mine[i : i + self.size] for i in range(0, len(mine), self.size))


@dataclass(frozen=True)
class EvalBatches:
    """The batches of one process over a whole data set: every image once, none repeated.

    Args:
        length: Images in the data set.
        size: Images of a batch.
        rank: This process.
        world_size: Number of processes.
    """

    length: int
    size: int
    rank: int = 0
    world_size: int = 1

    @property
    def rounds(self) -> int:
        """Batches of the process that has the most."""
        return -(-self.length // (self.size * self.world_size))

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.length, self.world_size)) // self.size)

    def __iter__(self) -> Iterator[list[Sample]]:
        mine = range(self.rank, self.length, self.world_size)
        for first in range(0, len(mine), self.size):
            yield [Sample(0, index) for index in mine[first : first + self.size]]
