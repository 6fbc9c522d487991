"""Processes that find one another."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from training.errors import LostProcessError
from training.meeting import call_roll, meet

SIZE = 3


def _meet(store, pool, ranks, seconds=20.0):
    """Those of `ranks` that run, each in a thread; the others are dead."""
    return [pool.submit(meet, store, rank, SIZE, seconds) for rank in ranks]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(SIZE) as threads:
        yield threads


def test_all_processes_get_the_same_part_of_the_store(pool):
    parts = [future.result() for future in _meet(dist.HashStore(), pool, range(SIZE))]
    parts[0].set("key", "value")
    assert [part.get("key") for part in parts] == [b"value"] * SIZE


def test_a_second_attempt_does_not_find_what_the_first_one_left(pool):
    store = dist.HashStore()
    first = _meet(store, pool, range(SIZE))[0].result()
    first.set("address", "of the dead")
    parts = [future.result() for future in _meet(store, pool, range(SIZE))]
    assert not any(part.check(["address"]) for part in parts)


def test_the_first_process_waits_for_the_successor_of_a_dead_one(pool):
    store = dist.HashStore()
    _meet(store, pool, range(SIZE))[0].result()
    # the store has the last attempt's name of process 2, which starts late
    early = _meet(store, pool, (0, 1))
    time.sleep(0.3)
    assert not early[0].done()
    parts = [future.result() for future in [*early, *_meet(store, pool, (2,))]]
    parts[2].set("key", "value")
    assert [part.get("key") for part in parts] == [b"value"] * SIZE


def test_others_wait_for_the_successor_of_a_dead_first_process(pool):
    store = dist.HashStore()
    _meet(store, pool, range(SIZE))[0].result()
    early = _meet(store, pool, (1, 2))
    time.sleep(0.3)
    assert not any(future.done() for future in early)
    parts = [future.result() for future in [*_meet(store, pool, (0,)), *early]]
    parts[0].set("key", "value")
    assert [part.get("key") for part in parts] == [b"value"] * SIZE


@pytest.mark.parametrize(("present", "missing"), [((0,), "1, 2"), ((0, 2), "1"), ((1,), "0")])
def test_who_does_not_come_is_named(pool, present, missing):
    futures = _meet(dist.HashStore(), pool, present, seconds=0.3)
    with pytest.raises(LostProcessError, match=f"process {missing} did not come within 0.3 s") as e:
        futures[0].result()
    assert e.value.speaks


def test_the_roll_names_who_answers():
    store = dist.HashStore()
    store.set("present/2", "")
    assert call_roll(store, 0, SIZE) == [0, 2]
