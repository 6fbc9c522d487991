"""The machine: device, processes, precision."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn

import backbones

from .config import option, require
from .errors import LostProcessError, UsageError
from .meeting import call_roll, meet

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
# what gloo and PyTorch say when a process does not answer
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how precisely to compute."""

    device: str = option(
        "auto", "auto takes an accelerator if there is one", choices=DEVICES, may_change=True
    )
    processes: int | None = option(
        None,
        "processes on a CPU without torchrun; none: 2 if there are 2 cores (Linux)",
        may_change=True,
    )
    amp: str = option(
        "auto",
        "mixed precision; auto: bf16 on GPUs that have it",
        choices=("auto", "none", "bf16", "fp16"),
    )
    channels_last: bool = option(True, "NHWC memory layout")
    compile: bool = option(False, "torch.compile the model")
    timeout: float = option(
        10.0, "minutes that a process may keep the others waiting", may_change=True
    )

    def __post_init__(self) -> None:
        require(
            self.processes is None or self.processes >= 1,
            f"--processes must be at least 1, not {self.processes}",
        )
        require(self.timeout > 0, f"--timeout must be positive, not {self.timeout}")

    def precision(self, device: torch.device) -> torch.dtype | None:
        """The autocast type on `device`, none for full precision."""
        if self.amp == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            return torch.bfloat16 if has_bf16 else None
        return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]


@dataclass(frozen=True)
class World:
    """The processes of a run and this one among them.

    Args:
        device: Where this process computes.
        rank: Number of this process.
        size: Number of processes.
        store: What the processes share outside of collectives.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    def __str__(self) -> str:
        plural = "" if self.size == 1 else "es"
        return f"{self.size} process{plural} on {self.device.type}"

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over the processes, the same everywhere to the last bit."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """The first process's `value`, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._object_device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers (batch norm statistics), as checkpoints do."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """Name the processes that are gone or hang, when the others wait for them in vain.

        Args:
            where: Says how far this process has come.

        Raises:
            LostProcessError: A collective has failed.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.store is None or not is_lost(error):
                raise
            present = call_roll(self.store, self.rank, self.size)
            missing = ", ".join(str(rank) for rank in range(self.size) if rank not in present)
            raise LostProcessError(
                f"no answer from process {missing or 'unknown'} of {self.size} at {where()}: it is "
                "gone or hangs; start the same command again to go on from the last checkpoint",
                speaks=self.rank == min(present, default=-1),
            ) from error

    @property
    def _object_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")


@contextlib.contextmanager
def join(config: RuntimeConfig) -> Iterator[World]:
    """Join the other processes of the run, if it has any, and leave them at the end.

    Reads the environment that torchrun sets (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
    `MASTER_PORT`). CPUs talk through gloo, NVIDIA GPUs through NCCL.

    Raises:
        UsageError: The device that is asked for is absent.
        LostProcessError: Not all of them came.
    """
    device = _pick_device(config.device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    torch.set_num_threads(1)
    timeout = timedelta(minutes=config.timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = meet(store, rank, size, timeout.total_seconds())
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    try:
        yield World(device, rank, size, store)
    finally:
        dist.destroy_process_group()


def run_processes(command: Callable[[], int], config: RuntimeConfig, batch_size: int) -> int:
    """Run `command` in this process and, on a CPU without torchrun, in a second one.

    Two processes of one thread each are faster than one of two threads. This process is rank 0; the
    others are forked from it, follow it through the collectives, and die with it.

    Args:
        command: The program of one process; returns its exit code.
        config: How many processes are asked for.
        batch_size: Images per step, which the processes must be able to share.
    """
    count = _process_count(config, batch_size)
    if count == 1:
        return command()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    helpers = [context.Process(target=_help, args=(command, rank)) for rank in range(1, count)]
    for helper in helpers:
        helper.start()
    code = 1
    try:
        code = command()
    finally:
        for helper in helpers:
            # after a failure the others wait in a collective that never comes
            helper.join(20 if code in (0, 75) else 0)
            helper.kill()
    return code


def is_lost(error: Exception) -> bool:
    """Whether `error` means that another process does not answer."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "backbones": backbones.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _help(command: Callable[[], int], rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    parent = os.getppid()
    try:
        sys.exit(command())
    except RuntimeError:
        # without its first process the run is over: nothing to report
        if os.getppid() == parent:
            raise


def _process_count(config: RuntimeConfig, batch_size: int) -> int:
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if "RANK" in os.environ or not on_cpu:
        return 1
    if config.processes is not None:
        return config.processes
    # elsewhere a process that has loaded PyTorch is not safe to fork
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return 2 if cores >= 2 and batch_size % 2 == 0 else 1


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}
    if name != "cpu" and not available[name].is_available():
        raise UsageError(f"this machine has no {name} device: use --device cpu, or --device auto")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
