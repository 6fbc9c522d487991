from __future__ import annotations

import itertools
from collections import Counter

import pytest

from backbones.training.errors import UsageError
from backbones.training.sampler import EvalBatches, Sample, TrainBatches, TrainOrder


def _flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_an_epoch_is_a_permutation_without_the_rest():
    order = TrainOrder(length=103, batch_size=10, seed=0)
    images = [sample.image for sample in order.epoch(4)]
    assert order.steps_per_epoch == 10
    assert len(images) == len(set(images)) == 100


def test_epochs_and_seeds_differ_and_repeat_themselves():
    order = TrainOrder(64, 8, seed=0)
    assert order.epoch(0) == TrainOrder(64, 8, seed=0).epoch(0)
    assert [s.image for s in order.epoch(0)] != [s.image for s in order.epoch(1)]
    assert order.epoch(0) != TrainOrder(64, 8, seed=1).epoch(0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_holds_the_same_images_for_any_split(world_size, accumulate):
    order = TrainOrder(50, 16, seed=3)
    steps = 2 * order.steps_per_epoch
    whole = [set(batch) for batch in TrainBatches(order, 0, steps)]
    parts = [
        list(TrainBatches(order, 0, steps, rank, world_size, accumulate))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        micro = slice(step * accumulate, (step + 1) * accumulate)
        got = _flat(_flat(part[micro] for part in parts))
        assert len(got) == 16 and set(got) == expected


@pytest.mark.parametrize("start", [0, 1, 5, 6, 11])
def test_a_resumed_run_sees_what_the_first_would_have(start):
    order = TrainOrder(50, 8, seed=1)
    for rank in range(2):
        whole = list(TrainBatches(order, 0, 12, rank, 2, 2))
        rest = TrainBatches(order, start, 12, rank, 2, 2)
        assert list(rest) == whole[start * 2 :]
        assert len(rest) == len(whole) - start * 2


def test_repeats_show_a_third_of_the_images_three_times_each_on_its_own_process():
    order = TrainOrder(90, 30, seed=0, repeats=3)
    counts = Counter(sample.image for sample in order.epoch(0))
    assert set(counts.values()) == {3} and len(counts) == 30
    assert len(set(order.epoch(0))) == 90
    for rank in range(3):
        mine = _flat(TrainBatches(order, 0, 3, rank, 3))
        assert len({sample.image for sample in mine}) == 30


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="use --batch-size 10 or less, not 16"):
        TrainOrder(10, 16, seed=0)
    with pytest.raises(UsageError, match="multiple of 6"):
        TrainBatches(TrainOrder(64, 16, seed=0), 0, 1, 0, 3, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(length, world_size):
    parts = [EvalBatches(length, 4, rank, world_size) for rank in range(world_size)]
    samples = _flat(_flat(parts))
    assert sorted(samples) == [Sample(0, image) for image in range(length)]
    assert all(len(list(part)) == len(part) <= part.rounds for part in parts)
    assert max(len(part) for part in parts) == parts[0].rounds
