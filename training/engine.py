"""One optimizer step: forward, backward, agreement over the processes, update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .augment import BatchMixer
from .checkpoint import Checkpoint
from .data import Batch, check_labels
from .keys import key, seed_step
from .optim import clip_gradients, clipped_parameters, gradient_norm, make_ema, make_optimizer
from .runtime import RuntimeConfig, World
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
    """

    def __init__(
        self, model: nn.Module, num_classes: int, config: TrainConfig, world: World
    ) -> None:
        runtime, augment = config.runtime, config.augment
        self.model = model
        self.num_classes = num_classes
        self.world = world
        self.optim = config.optim
        self.ema = make_ema(config.ema, model)
        self.optimizer = make_optimizer(config.optim, model)
        self._seed = config.run.seed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clipped = clipped_parameters(config.optim, model)
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._precision = runtime.precision(world.device)
        self._layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
        scales = self._precision is torch.float16 and world.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scales)
        self._mixer = BatchMixer(augment, num_classes) if augment.mixes else None
        self._smoothing = 0.0 if augment.mixes else augment.smoothing
        self._aux_weight = config.model.aux_weight
        self._network = self._wrap(runtime)

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
        """Everything that the next step depends on."""
        return Checkpoint(
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            optim={"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()},
            meta=meta,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, which another engine with the same settings has written."""
        self.model.load_state_dict(dict(checkpoint.model))
        if self.ema is not None and checkpoint.ema is not None:
            self.ema.module.load_state_dict(dict(checkpoint.ema))
        self.optimizer.load_state_dict(checkpoint.optim["optimizer"])
        self._scaler.load_state_dict(checkpoint.optim["scaler"])

    def _wrap(self, runtime: RuntimeConfig) -> nn.Module:
        network = self.model
        if runtime.compile:
            network = cast(nn.Module, torch.compile(network, dynamic=False))
        if self.world.size == 1:
            return network
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)

    def _backward(self, batches: Sequence[Batch], step: int) -> Tensor:
        losses = []
        for micro, (images, labels, _) in enumerate(batches):
            place = (step, micro, self.world.rank)
            with self._reduce_gradients(micro == len(batches) - 1):
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
            output = self._network(inputs)
        if not self._aux_weight:
            return self._cross_entropy(output, targets)
        main, aux = (self._cross_entropy(output[name], targets) for name in ("main", "aux"))
        return main + self._aux_weight * aux

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self._smoothing)

    def _reduce_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self._network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._network.no_sync()

    def _agree(self, loss: Tensor, norm: Tensor, stop: bool, bad: int) -> Agreement:
        value, size = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        finite = abs(value) + abs(size) < float("inf")
        votes = [value if finite else 0.0, float(not finite), float(stop), float(bad)]
        total, failed, stops, bads = self.world.sum(votes)
        count = self.world.size
        return Agreement(total / count, failed == 0, stops > 0, bads / count)

    def _update(self, step: int, lr: float, norm: Tensor) -> None:
        clip_gradients(self.optim, self._clipped, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._scaler.step(self.optimizer)
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1)

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
