"""Exact evaluation: every image counts once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
    """

    def __init__(
        self, source: Source, view: View, data: DataConfig, runtime: RuntimeConfig, world: World
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

    def score(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> Score:
        """Evaluate `model`, the same weights on every process.

        Args:
            model: Maps `(B, 3, H, W)` to `(B, classes)`.
            stop: Asked before each batch whether to give up.

        Raises:
            InterruptedRunError: Some process was asked to stop.
        """
        was_training = model.training
        model.eval()
        self.world.share_buffers(model)
        total = torch.zeros(4, dtype=torch.float64)
        batches = iter(self._loader)
        for _ in range(self._batches.rounds):
            if self.world.sum([float(stop())])[0]:
                raise InterruptedRunError("interrupted during the evaluation")
            batch = next(batches, None)
            if batch is not None:
                total += self._count(model, batch)
        model.train(was_training)
        top1, top5, loss, images = self.world.sum(total.tolist())
        return Score(int(top1), int(top5), loss, int(images))

    @torch.inference_mode()
    def _count(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, failed = batch
        self.bad.add(failed)
        device = self.world.device
        inputs = images.to(device, non_blocking=True, memory_format=self._layout)
        with torch.autocast(device.type, self._precision, enabled=self._precision is not None):
            logits = model(inputs)
        check_labels(labels, logits.shape[1])
        logits, labels = logits.float()[failed < 0], labels.to(device)[failed < 0]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = [best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels), device=device)]
        return torch.stack([count.float() for count in counts]).cpu().double()
