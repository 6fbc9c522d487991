"""One optimizer step: forward, backward, agreement over the processes, update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .augment import BatchMixer
from .checkpoint import Checkpoint
from .data import Batch, check_labels
from .keys import key, seed_step
from .losses import Teacher, TrainingLoss
from .optim import clip_gradients, gradient_norm, make_ema, make_optimizer
from .parallel import (
    average,
    distribute,
    explained,
    gradient_sync,
    load_model,
    load_optimizer,
    shard,
    sync_batch_norm,
    whole,
)
from .runtime import World
from .train_config import TrainConfig


@dataclass(frozen=True)
class Agreement:
    """What all processes know after a backward pass.

    Args:
        loss: Mean over the processes, 0 where it is not finite.
        finite: Every loss and gradient is finite, so the step was taken.
        stop: Some process was asked to stop.
        bad: Unreadable images so far, mean over the processes.
    """

    loss: float
    finite: bool
    stop: bool
    bad: float


class Engine:
    """The model in training, its optimizer and its average.

    Args:
        model: On its device.
        num_classes: Width of the classifier.
        config: The settings of the run.
        world: The processes.
        teacher: Whom the model learns from beside the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        config: TrainConfig,
        world: World,
        teacher: Teacher | None = None,
    ) -> None:
        runtime, augment = config.runtime, config.augment
        if runtime.sync_bn and world.size > 1:
            model = sync_batch_norm(model, world.device)
        self.model = model
        self.num_classes = num_classes
        self.world = world
        self.optim = config.optim
        self.ema = make_ema(config.ema, model)
        self._sharded = runtime.shards(world)
        if self._sharded:
            shard(model, runtime, world)
        if self._sharded and self.ema is not None:
            shard(self.ema.module, runtime, world)
        self.optimizer = make_optimizer(config.optim, model)
        self._seed = config.run.seed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._precision = runtime.precision(world.device)
        self._layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
        scales = self._precision is torch.float16 and world.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scales)
        self._mixer = BatchMixer(augment, num_classes) if augment.mixes else None
        smoothing = 0.0 if augment.mixes else augment.smoothing
        self._criterion = TrainingLoss(smoothing, config.model.aux_weight, config.distill)
        self._teacher = teacher
        self._network = distribute(model, runtime, world)

    def step(
        self, batches: Sequence[Batch], step: int, lr: float, stop: bool, bad: int
    ) -> Agreement:
        """Take one step, or none on any process if the loss or a gradient of one is not finite.

        Args:
            batches: The micro-batches of this process.
            step: Number of the step, from 0.
            lr: Learning rate.
            stop: Whether this process was asked to stop.
            bad: Unreadable images this process has met.
        """
        saved = self._save_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batches, step)
        self._scaler.unscale_(self.optimizer)
        norm = gradient_norm(self._parameters)
        agreed = self._agree(loss, norm, stop, bad)
        if agreed.finite:
            self._update(step, lr, norm)
        else:
            # the forward pass has already mixed the bad batch into the running statistics
            self._restore_buffers(saved)
        self._scaler.update()
        return agreed

    def state(self, meta: dict[str, Any]) -> Checkpoint:
        """Everything that the next step depends on, of use in the first process; all must ask."""
        optim = {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        keep = self.world.first
        return Checkpoint(
            model=whole(self.model.state_dict(), keep=keep),
            ema=whole(self.ema.module.state_dict(), keep=keep) if self.ema else None,
            optim=whole(optim, keep=keep),
            meta=meta,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, which another engine with the same settings has written."""
        load_model(self.model, checkpoint.model)
        if self.ema is not None and checkpoint.ema is not None:
            load_model(self.ema.module, checkpoint.ema)
        load_optimizer(self.optimizer, checkpoint.optim["optimizer"])
        self._scaler.load_state_dict(checkpoint.optim["scaler"])

    def _backward(self, batches: Sequence[Batch], step: int) -> Tensor:
        losses = []
        for micro, (images, labels, _) in enumerate(batches):
            place = (step, micro, self.world.rank)
            with gradient_sync(self._network, micro == len(batches) - 1):
                loss = self._loss(images, labels, place) / len(batches)
                self._scaler.scale(loss).backward()
            losses.append(loss.detach().float())
        return torch.stack(losses).sum()

    def _loss(self, images: Tensor, labels: Tensor, place: tuple[int, int, int]) -> Tensor:
        check_labels(labels, self.num_classes)
        device = self.world.device
        inputs = images.to(device, non_blocking=True, memory_format=self._layout)
        targets = labels.to(device, non_blocking=True)
        if self._mixer is not None:
            inputs, targets = self._mixer(inputs, targets, key(self._seed, "mix", *place))
        seed_step(key(self._seed, "net", *place))
        with torch.autocast(device.type, self._precision, enabled=self._precision is not None):
            taught = None if self._teacher is None else self._teacher(inputs)
            output = self._network(inputs)
        return self._criterion(output, targets, taught)

    def _agree(self, loss: Tensor, norm: Tensor, stop: bool, bad: int) -> Agreement:
        value, size = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        finite = abs(value) + abs(size) < float("inf")
        votes = [value if finite else 0.0, float(not finite), float(stop), float(bad)]
        total, failed, stops, bads = self.world.sum(votes)
        count = self.world.size
        return Agreement(total / count, failed == 0, stops > 0, bads / count)

    def _update(self, step: int, lr: float, norm: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with explained(self.optim) if self._sharded else contextlib.nullcontext():
            clip_gradients(self.optim, self._parameters, norm)
            self._scaler.step(self.optimizer)
        if self.ema is not None:
            average(self.ema, self.model, step + 1)

    def _save_buffers(self) -> Tensor | None:
        if not self._buffers:
            return None
        return torch.cat([buffer.detach().reshape(-1) for buffer in self._buffers])

    def _restore_buffers(self, saved: Tensor | None) -> None:
        if saved is None:
            return
        parts = saved.split([buffer.numel() for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
