"""Whole models beside their peers: how one is checked and timed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.ops import use_reference
from benchmarks._harness import peak
from benchmarks._models import PROVIDERS, Job, Provider, pair
from benchmarks._results import Row

# how far logits may be from those of our reference in float32, relative to their norm: this, or so
# many times as far as the reference is in the same precision
TOLERANCE, ROUNDINGS = 3e-4, 4
CHECKED_IMAGES = 4


def measure(job: Job, device: str) -> list[Row]:
    """Check and, on a GPU, time a job without and with a CUDA graph; failures are rows too."""
    _forget(device)
    rows: list[Row] = []
    base: Row = {**job.row, "graph": False}
    try:
        expected, allowed = _expected(job._replace(provider="reference compiled"), device)
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        with _scope(job):
            subject, base["channels_last"] = _subject(job, device, PROVIDERS[job.provider])
            base["difference"] = _difference(subject.logits(), expected)
            if not base["difference"] <= allowed:
                raise ArithmeticError(f"differs from the reference by more than {allowed:.1e}")
            if device != "cuda":
                return [base | _prove(subject)]
            rows.append(base | _time(subject.step, job.batch))
            extra = torch.cuda.memory_allocated() - held
            rows[0]["peak_mib"] = round((peak(subject.step) + extra) / 2**20, 1)
            base["graph"] = True
            rows.append(base | _time(_captured(subject.step), job.batch))
    # a peer may lack a size, run out of memory or not compile; the others go on
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        rows.append({**base, "error": message[:400]})
    return rows


def _forget(device: str) -> None:
    """Give back what the job before held."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _scope(job: Job) -> Iterator[None]:
    """What float32 products may lose, and which form of the ops is called."""
    reference = PROVIDERS[job.provider].source == "reference"
    with float32_products(job.precision != "fp32"), use_reference(reference):
        yield


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Allow or forbid that float32 products, cuDNN's convolutions included, are in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Subject:
    """A model on a device, its images and labels, and what is timed of it.

    Args:
        module: The model, in the mode to measure.
        images: `(B, C, H, W)`.
        autocast: Whether autocast to bfloat16 is on.
    """

    def __init__(self, module: nn.Module, images: Tensor, autocast: bool) -> None:
        self.module, self.images, self.autocast = module, images, autocast
        self.labels = torch.arange(len(images), device=images.device)
        self.call: Callable[[Tensor], Tensor] = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def logits(self, keep_graph: bool = True) -> Tensor:
        """Logits `(B, classes)`; in training with what the backward pass needs."""
        device = self.images.device.type
        with (
            torch.autocast(device, torch.bfloat16, enabled=self.autocast),
            torch.set_grad_enabled(self.module.training and keep_graph),
        ):
            return self.call(self.images)

    def step(self) -> Any:
        """What is timed: logits, in training the gradients of all parameters."""
        logits = self.logits()
        if not self.module.training:
            return logits
        loss = F.cross_entropy(logits.float(), self.labels)
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)


def _images(job: Job, device: str) -> Tensor:
    """Normal random images, the same for all providers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(job.batch, 3, *job.size, generator=generator).to(device)


@cache
def _expected(job: Job, device: str) -> tuple[Tensor, float]:
    """Logits of our reference in float32, and how far others may be from them."""
    exact = _reference(job._replace(precision="fp32"), device)
    rounding = _difference(_reference(job, device), exact)
    return exact, max(TOLERANCE, ROUNDINGS * rounding)


def _reference(job: Job, device: str) -> Tensor:
    """Logits of our reference; in inference of the first images only."""
    with _scope(job):
        subject, _ = _subject(job, device, Provider("reference"))
        if job.mode == "inference":
            subject.images = subject.images[:CHECKED_IMAGES]
        return subject.logits(keep_graph=False).cpu()


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Distance to the expected logits, relative to their norm."""
    value = logits[: len(expected)].detach().float().cpu()
    return round(float((value - expected).norm() / expected.norm()), 9)


def _subject(job: Job, device: str, provider: Provider) -> tuple[Subject, bool]:
    """Put a provider on a device; also whether it got weights and images in channels-last.

    Ours converts images itself. A peer gets the layout in which it is faster in eager mode.
    """
    module = copy.deepcopy(pair(job.model)[provider.source == "peer"])
    module = module.fuse() if provider.fused else module
    training = job.mode == "training"
    half = job.precision == "bf16"
    dtype = torch.bfloat16 if half and not training else torch.float32
    module = module.train(training).to(device, dtype)
    images = _images(job, device).to(dtype)
    subject = Subject(module, images, autocast=half and training)
    channels_last = (
        provider.source == "peer" and device == "cuda" and _prefers_channels_last(subject)
    )
    if provider.compiled:
        backend = "inductor" if device == "cuda" else "aot_eager"
        subject.call = torch.compile(module, dynamic=False, backend=backend)
    return subject, channels_last


def _prefers_channels_last(subject: Subject) -> bool:
    """Leave a model in the layout, channels-last or planes, in which it is faster."""
    from triton.testing import do_bench

    planes = do_bench(subject.step, warmup=20, rep=100, return_mode="median")
    _lay_out(subject, torch.channels_last)
    if do_bench(subject.step, warmup=20, rep=100, return_mode="median") < planes:
        return True
    _lay_out(subject, torch.contiguous_format)
    return False


def _lay_out(subject: Subject, memory_format: torch.memory_format) -> None:
    subject.module.to(memory_format=memory_format)
    subject.images = subject.images.contiguous(memory_format=memory_format)


def _prove(subject: Subject) -> Row:
    """Run once more; gradients must be finite."""
    results = subject.step()
    tensors = (results,) if isinstance(results, Tensor) else results
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None):
        raise ArithmeticError("not finite")
    return {}


def _time(step: Callable[[], Any], images: int) -> Row:
    """Time a step; the L2 cache is emptied before each."""
    from triton.testing import do_bench

    p20, median, p80 = do_bench(step, warmup=100, rep=1000, quantiles=[0.2, 0.5, 0.8])
    times = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
    rate = {"images_per_s": round(images / median * 1e3, 1)}
    return {name: round(value, 4) for name, value in times.items()} | rate


def _captured(step: Callable[[], Any]) -> Callable[[], None]:
    """Record a step as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
