"""What training minimises: cross-entropy, and what an auxiliary classifier or a teacher adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from .augment import View
from .config import option, require
from .data import Splits
from .errors import UsageError
from .model import UNUSABLE, checkpoint_meta, create, fit_input_size, load_into


@dataclass(frozen=True)
class DistillConfig:
    """Distillation from a teacher (DeiT, arXiv 2012.12877, section 4)."""

    teacher: str | None = option(None, "learn from this model of backbones or timm too")
    checkpoint: str | None = option(
        None,
        "the teacher's weights: a file, a run folder, a URL, hf-hub:org/repo; none: official ones",
        flag="teacher_checkpoint",
    )
    type: str = option(
        "hard",
        "learn the teacher's best class, or all its probabilities",
        flag="distill_type",
        choices=("hard", "soft"),
    )
    alpha: float = option(0.5, "weight of the teacher beside the labels", flag="distill_alpha")
    tau: float = option(1.0, "temperature of the soft probabilities", flag="distill_tau")

    def __post_init__(self) -> None:
        require(
            self.teacher is not None or self.checkpoint is None,
            "--teacher-checkpoint needs --teacher, the name of its model",
        )
        require(0 <= self.alpha <= 1, f"--distill-alpha must lie in 0..1, not {self.alpha}")
        require(self.tau > 0, f"--distill-tau must be positive, not {self.tau}")


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch.

    Args:
        smoothing: Label smoothing, of labels that are class numbers.
        aux_weight: Weight of the auxiliary classifier's cross-entropy (OverLoCK, arXiv 2502.20087).
        distill: How to learn from the teacher.
    """

    smoothing: float
    aux_weight: float
    distill: DistillConfig

    def __call__(self, output: Any, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """Compute the mean over the batch, a scalar.

        Args:
            output: Logits `(B, classes)`, or what models return in training: `{"main", "aux"}`, or
                those of the labels and those of the teacher.
            targets: Class numbers `(B,)`, or probabilities `(B, classes)`.
            taught: The teacher's logits `(B, classes)`.
        """
        main, student, aux = _parts(output)
        loss = self._cross_entropy(main, targets)
        if aux is not None:
            loss = loss + self.aux_weight * self._cross_entropy(aux, targets)
        if taught is None:
            return loss
        alpha = self.distill.alpha
        return (1 - alpha) * loss + alpha * self._imitation(student.float(), taught.float())

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)

    def _imitation(self, student: Tensor, taught: Tensor) -> Tensor:
        if self.distill.type == "hard":
            return F.cross_entropy(student, taught.argmax(1))
        tau = self.distill.tau
        student, taught = (F.log_softmax(logits / tau, 1) for logits in (student, taught))
        return tau**2 * F.kl_div(student, taught, reduction="batchmean", log_target=True)


class Teacher:
    """A trained model that classifies the student's images.

    Args:
        model: On its device.
        mean: Of the pixels it was trained with, per channel.
        std: Their deviation.
        student: How the student sees images.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], student: View
    ) -> None:
        self.model = model.eval()
        device = next(model.parameters()).device
        theirs, scale, ours, our_scale = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (mean, std, student.mean, student.std)
        )
        self._scale, self._shift = our_scale / scale, (ours - theirs) / scale

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits `(B, classes)` of the student's inputs `(B, 3, H, W)`."""
        logits: Tensor = self.model(torch.addcmul(self._shift, images, self._scale))
        return logits


def build_teacher(
    config: DistillConfig, student: View, splits: Splits, num_classes: int, device: torch.device
) -> Teacher | None:
    """Build the teacher with its weights, none when nobody asks for one.

    Args:
        config: Which one.
        student: How the student sees images.
        splits: The data, whose classes the teacher must know.
        num_classes: How many they are.
        device: Where to put it.

    Raises:
        UsageError: An unknown name, weights that cannot be had, other classes.
    """
    if config.teacher is None:
        return None
    source = config.checkpoint
    try:
        width = num_classes if source else None
        model = create(config.teacher, pretrained=not source, num_classes=width)
        fit_input_size(model, student.size)
        fresh = load_into(model, source) if source else []
    except UNUSABLE as error:
        raise UsageError(f"--teacher: {error}") from error
    meta = checkpoint_meta(source)
    other = splits.classes and meta and meta["classes"] != list(splits.classes)
    if fresh or other or getattr(model, "num_classes", num_classes) != num_classes:
        raise UsageError(
            f"--teacher {config.teacher} does not know the {num_classes} classes of the data: "
            "use --teacher-checkpoint with weights that do"
        )
    seen = resolve_data_config(model=model) | meta.get("view", {})
    return Teacher(model.to(device), seen["mean"], seen["std"], student)


def _parts(output: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of the labels, those of the teacher's classes, and of the auxiliary classifier."""
    if isinstance(output, Mapping):
        return output["main"], output["main"], output["aux"]
    if isinstance(output, Tensor):
        return output, output, None
    labels, taught = output
    return labels, taught, None
