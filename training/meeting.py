"""Processes that find one another in the store they share."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable

import torch.distributed as dist

from .errors import LostProcessError

_ROLL_CALL = 5.0
_PAUSE = 0.05


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """The part of `store` that belongs to the processes that run now.

    torchrun keeps one store for all attempts, with the addresses of the dead in it, and its agents
    do not agree on the number of the attempt: one that restarts because another did does not count.
    So every process leaves a new name, the first one admits the names it finds until everybody has
    followed it, and the first one's own name is that of the attempt.

    Args:
        store: What the processes share, with whatever earlier ones left in it.
        rank: Number of this process.
        size: Number of processes.
        seconds: How long to wait for the others.

    Raises:
        LostProcessError: Some of them did not come.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        _admit(store, name, range(1, size), seconds)
        return dist.PrefixStore(name, store)
    store.set(f"name/{rank}", name)
    _wait_until(lambda: store.check([f"admitted/{name}"]), seconds, lambda: [0], rank == 1)
    attempt = store.get(f"admitted/{name}").decode()
    store.set(f"{attempt}/follows/{rank}", "")
    return dist.PrefixStore(attempt, store)


def call_roll(store: dist.Store, rank: int, size: int) -> list[int]:
    """The ranks that answer within 5 s, in order; every process must call."""
    end = time.monotonic() + _ROLL_CALL
    present: list[int] = []
    # the store outlives the processes under torchrun, otherwise it goes with the first one
    with contextlib.suppress(RuntimeError):
        store.set(f"present/{rank}", "")
        while len(present) < size and time.monotonic() < end:
            time.sleep(_PAUSE)
            present = [other for other in range(size) if store.check([f"present/{other}"])]
    return present


def _admit(store: dist.Store, attempt: str, others: range, seconds: float) -> None:
    def missing() -> list[int]:
        return [rank for rank in others if not store.check([f"{attempt}/follows/{rank}"])]

    def everybody_follows() -> bool:
        ranks = missing()
        for rank in ranks:
            # a name may be that of a dead process: its successor's comes later
            if store.check([f"name/{rank}"]):
                store.set(f"admitted/{store.get(f'name/{rank}').decode()}", attempt)
        return not ranks

    _wait_until(everybody_follows, seconds, missing, speaks=True)


def _wait_until(
    done: Callable[[], bool], seconds: float, missing: Callable[[], list[int]], speaks: bool
) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            ranks = ", ".join(map(str, missing()))
            raise LostProcessError(
                f"process {ranks} did not come within {seconds:g} s: it is gone or hangs; start "
                "the same command again, or wait longer with --timeout",
                speaks=speaks,
            )
        time.sleep(_PAUSE)
