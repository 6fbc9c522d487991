"""Whole models beside their peers: what is timed, in which order, and how."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.ops import use_reference
from benchmarks import official
from benchmarks._harness import peak
from benchmarks._results import Row
from tests.support import golden

# how far logits may be from those of our reference in float32, relative to their norm: this, or so
# many times as far as the reference is in the same precision
TOLERANCE, ROUNDINGS = 3e-4, 4
PRECISIONS = ("bf16", "tf32", "fp32")
CHECKED_IMAGES = 4
DETECTION = (800, 1216)
# images of the model's own size (None) or of a detector's, and how many; the first matter most
PLACES: tuple[tuple[tuple[int, int] | None, int], ...] = (
    (None, 128),
    (None, 1),
    (DETECTION, 2),
    (None, 32),
    (DETECTION, 1),
)


class Provider(NamedTuple):
    """One way to compute a model.

    Attributes:
        source: "ours", "peer", or "reference": our model on the plain PyTorch form of its ops.
        fused: After `fuse()`.
        compiled: Under `torch.compile`.
    """

    source: str
    fused: bool = False
    compiled: bool = False


PROVIDERS = {
    "ours": Provider("ours"),
    "ours fused": Provider("ours", fused=True),
    "peer": Provider("peer"),
    "peer compiled": Provider("peer", compiled=True),
    "ours compiled": Provider("ours", compiled=True),
    "ours fused compiled": Provider("ours", fused=True, compiled=True),
    "reference compiled": Provider("reference", compiled=True),
}


class Job(NamedTuple):
    """What one provider is to compute.

    Attributes:
        model: Name of our model.
        provider: A key of `PROVIDERS`.
        mode: "inference", or "training": forward and backward with batch statistics, no optimizer.
        precision: "bf16": weights in bfloat16, in training autocast over weights in float32;
            "tf32", "fp32": float32 whose products may, or may not, be rounded to TF32.
        size: Height and width of the images.
        batch: Images of a step.
    """

    model: str
    provider: str
    mode: str
    precision: str
    size: tuple[int, int]
    batch: int

    @property
    def row(self) -> Row:
        """The fields that name its rows; "peer" says what the peer is."""
        return {**self._asdict(), "size": list(self.size), "peer": kind(self.model)}


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Our model and its peer, on the CPU, with the same weights.

    Matrices are as they are created; vectors are lively, as fresh gammas and biases hide branches.
    """
    ours, peer = official.pair(name)
    lively = golden.fill_model(ours)
    weights = {key: lively[key] if v.ndim == 1 else v for key, v in ours.state_dict().items()}
    for model in (ours, peer):
        model.load_state_dict(weights)
    return ours, peer


def kind(name: str) -> str:
    """What the peer of a model is: "timm" or "official"."""
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return "timm" if family in official.TIMM else "official"


def own_size(name: str) -> tuple[int, int]:
    """Height and width of the images that a model is made for."""
    _, height, width = timm.get_pretrained_cfg(name).input_size
    return height, width


def work(names: Sequence[str]) -> Iterator[Job]:
    """All jobs of models, in an order that a budget may cut short: what compiles comes later."""
    for precision in PRECISIONS:
        for size, batch in PLACES:
            for compiled in (False, True):
                for mode in ("inference", "training") if batch > 1 else ("inference",):
                    for provider, name in _turns(names, mode, compiled):
                        yield Job(name, provider, mode, precision, size or own_size(name), batch)


def _turns(names: Sequence[str], mode: str, compiled: bool) -> Iterator[tuple[str, str]]:
    """Pairs of provider and model; the peer of each is timed next to ours where that is quick."""
    chosen = [
        key
        for key, provider in PROVIDERS.items()
        if provider.compiled == compiled and (mode == "inference" or not provider.fused)
    ]
    if compiled:
        yield from ((provider, name) for provider in chosen for name in names)
    else:
        yield from ((provider, name) for name in names for provider in chosen)


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
