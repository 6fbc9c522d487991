"""Exact evaluation: every image counts once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .augment import View, eval_transform
from .data import BadFiles, Batch, DataConfig, check_labels, make_loader
from .errors import InterruptedRunError
from .runtime import RuntimeConfig, World
from .sampler import EvalBatches
from .sources import Source


@dataclass(frozen=True)
class Score:
    """Counts over a data set.

    Args:
        top1: Images whose best class is right.
        top5: Images whose right class is among the best five.
        loss: Sum of the cross-entropies, nats.
        images: Images that could be read.
    """

    top1: int
    top5: int
    loss: float
    images: int

    @property
    def top1_percent(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1 / max(1, self.images)

    @property
    def top5_percent(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.top5 / max(1, self.images)

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy, nats."""
        return self.loss / max(1, self.images)


class Evaluator:
    """Evaluates models on one data set.

    Args:
        source: The images.
        view: How the model sees them.
        data: Batch size and workers.
        runtime: Precision and layout.
        world: The processes.
        flip: Take the mean of the logits of an image and of its mirror image.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        data: DataConfig,
        runtime: RuntimeConfig,
        world: World,
        *,
        flip: bool = False,
    ) -> None:
        self.world = world
        self.bad = BadFiles(source, data.max_bad)
        size = max(1, data.batch_size // world.size)
        self._batches = EvalBatches(len(source), size, world.rank, world.size)
        self._loader: DataLoader[Batch] = make_loader(
            source, eval_transform(view), self._batches, data, world, seed=0
        )
        self._precision = runtime.precision(world.device)
        self._layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
        self._flip = flip
        self._answers: list[Tensor] = []

    def score(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> Score:
        """Evaluate `model`, the same weights on every process.

        Args:
            model: Maps `(B, 3, H, W)` to `(B, classes)`.
            stop: Asked before each batch whether to give up.

        Raises:
            InterruptedRunError: Some process was asked to stop.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        self.world.share_buffers(model)
        self._answers = []
        total = torch.zeros(4, dtype=torch.float64)
        batches = iter(self._loader)
        failure: Exception | None = None
        # none: a bar on a terminal only
        hidden = None if self.world.first else True
        rounds = range(self._batches.rounds)
        for number in tqdm(rounds, "evaluation", unit="batch", leave=False, disable=hidden):
            if stop():
                failure = failure or InterruptedRunError("interrupted during the evaluation")
            fail_together(self.world, failure)
            try:
                batch = next(batches, None)
                if batch is not None:
                    total += self._count(model, batch, number)
            except Exception as error:  # raised before the next batch, in all processes
                failure = error
        fail_together(self.world, failure)
        for module in training:
            # not train(), which would wake what is frozen
            module.training = True
        top1, top5, loss, images = self.world.sum(total.tolist())
        return Score(int(top1), int(top5), loss, int(images))

    def answers(self) -> Tensor:
        """What the last score counts, from all processes, which must all ask.

        Returns:
            `(N, 2 + k)`: number and class of each readable image, and its `k` <= 5 best classes.
        """
        return torch.cat([part for parts in self.world.gather(self._answers) for part in parts])

    @torch.inference_mode()
    def _count(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        images, labels, failed = batch
        self.bad.add(failed)
        device = self.world.device
        logits = self._logits(model, images)
        check_labels(labels, logits.shape[1])
        places = number * self._batches.size + torch.arange(len(labels))
        places = (self.world.rank + self.world.size * places)[failed < 0]
        logits, labels = logits[failed < 0], labels[failed < 0]
        best = logits.topk(min(5, logits.shape[1])).indices
        self._answers.append(torch.cat([places[:, None], labels[:, None], best.cpu()], dim=1))
        labels = labels.to(device)
        right = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = [right[:, 0].sum(), right.sum(), loss, torch.tensor(len(labels), device=device)]
        return torch.stack([count.float() for count in counts]).cpu().double()

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        device = self.world.device
        inputs = images.to(device, non_blocking=True, memory_format=self._layout)
        with torch.autocast(device.type, self._precision, enabled=self._precision is not None):
            logits = model(inputs).float()
            if self._flip:
                logits = (logits + model(inputs.flip(-1)).float()) / 2
        return logits


def fail_together(world: World, failure: Exception | None) -> None:
    """Raise in all processes what one of them has met: alone, it would leave the others waiting.

    Args:
        world: The processes, which must all call.
        failure: What this one has met.
    """
    if not world.sum([float(failure is not None)])[0]:
        return
    failures = world.gather(failure)
    first = next(rank for rank, error in enumerate(failures) if error is not None)
    # this process's own has a traceback
    raise failure if failure is not None and first == world.rank else failures[first]
