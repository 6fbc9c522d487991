"""Windows that never leave the map, against their definition."""

import itertools

import pytest
import torch

from backbones.ops._neighborhood import (
    check_windows,
    own_slots,
    pair,
    window_pixels,
    window_positions,
    window_starts,
)

AXES = [
    (length, size, dilation)
    for size, dilation in itertools.product((3, 5, 7, 13), (1, 2, 3))
    for length in range(size * dilation, size * dilation + 9)
]


def start(i: int, length: int, size: int, dilation: int) -> int:
    """Of the neighbors of i, the first of the `size` that are nearest to the middle."""
    neighbors = list(range(i % dilation, length, dilation))
    first = min(max(neighbors.index(i) - size // 2, 0), len(neighbors) - size)
    return neighbors[first]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_starts_equal_the_definition(axis):
    length, size, dilation = axis
    starts = window_starts(*axis)
    assert starts.tolist() == [start(i, *axis) for i in range(length)]
    assert starts.min() >= 0 and starts.max() + (size - 1) * dilation < length


@pytest.mark.parametrize("axis", [(9, 5, 1), (14, 3, 3)], ids=str)
def test_every_position_is_in_its_window(axis):
    length, size, _ = axis
    positions, own = window_positions(*axis), own_slots(*axis)
    assert torch.equal(positions.gather(1, own[:, None])[:, 0], torch.arange(length))
    assert set(own.tolist()) == set(range(size))


def test_pixels_are_counted_row_by_row():
    pixels = window_pixels(5, 8, (3, 5), (1, 1)).view(5, 8, 3, 5)
    assert pixels[0, 0].tolist() == [list(range(row, row + 5)) for row in (0, 8, 16)]
    assert pixels[4, 7].tolist() == [list(range(row, row + 5)) for row in (19, 27, 35)]


def test_a_pair_may_be_one_number():
    assert pair(3) == pair((3, 3)) == (3, 3) and pair((3, 5)) == (3, 5)


@pytest.mark.parametrize(
    "size, dilation, message",
    [
        ((4, 5), (1, 1), r"kernel_size \(4, 5\) must be odd, and 3 or more"),
        ((1, 1), (1, 1), r"kernel_size \(1, 1\) must be odd, and 3 or more"),
        ((3, 3), (0, 1), r"dilation \(0, 1\) must be positive"),
        ((3, 5), (3, 1), "at least 9 x 5, this one is 8 x 9: resize"),
        ((3, 5), (1, 2), "at least 3 x 10, this one is 8 x 9: resize"),
    ],
)
def test_windows_that_do_not_fit_are_named(size, dilation, message):
    with pytest.raises(ValueError, match=message):
        check_windows("kernel_size", 8, 9, size, dilation)
    check_windows("kernel_size", 8, 9, (3, 3), (2, 3))
