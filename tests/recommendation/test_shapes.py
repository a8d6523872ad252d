"""The shapes of training batches, by hand and by brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recommendation.shapes import MAX_SHAPES, Shape, _best_widths, choose_shapes


def cells(shapes: list[Shape]) -> int:
    return sum(shape.capacity * shape.width for shape in shapes)


def test_windows_that_fill_their_batches_need_no_padding():
    counts = np.array([[0, 24, 12, 0, 6]])  # 24 targets of each of the lengths 1, 2 and 4
    assert choose_shapes(counts, 12, one_target=False) == [Shape(12, 1, 2), Shape(6, 2, 2), Shape(3, 4, 2)]
    assert choose_shapes(counts, 6, one_target=True) == [Shape(6, 1, 4), Shape(6, 2, 2), Shape(6, 4, 1)]


def test_windows_that_fill_no_batch_are_moved_to_the_next_width():
    # 15 of the 16 windows of length 1 fill three batches, so the fourth batch has one of them and two of length 2.
    assert choose_shapes(np.array([[0, 16, 2]]), 5, one_target=False) == [Shape(5, 1, 3), Shape(3, 2, 1)]


def test_there_is_room_for_the_largest_draw():
    counts = np.array([[0, 10, 3], [0, 8, 4]])  # both draws have 16 targets
    [small, large] = choose_shapes(counts, 4, one_target=False)
    assert small == Shape(4, 1, 2)
    assert (large.width, large.capacity >= 5) == (2, True)


@pytest.mark.parametrize("one_target", [True, False])
def test_the_widths_have_the_least_padding(one_target):
    counts = np.array([0, 30, 0, 21, 9, 2, 14, 5], dtype=float)
    lengths, batch_size = [1, 3, 4, 5, 6, 7], 8

    def padding(widths):
        total = 0.0
        for before, width in zip((0, *widths), widths, strict=False):
            total += sum(counts[length] * (width - length) for length in range(before + 1, width + 1))
            if before:  # half a batch of the smaller width is moved up
                total += (batch_size if one_target else batch_size / before) / 2 * (width - before)
        return total

    found = _best_widths(counts, batch_size, one_target, 6)
    assert len(found) == 6
    for number, widths in enumerate(found, start=1):
        best = min(padding((*chosen, 7)) for chosen in combinations(lengths[:-1], number - 1))
        assert (len(widths), widths[-1]) == (number, 7)
        assert padding(widths) == pytest.approx(best)


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 300), min_size=12, max_size=12), min_size=1, max_size=4),
       st.integers(1, 200), st.booleans())
def test_all_windows_of_every_draw_fit(draws, batch_size, one_target):
    counts = np.array(draws[:1] if one_target else draws)
    counts[:, 0] = 0
    counts[:, 7] += 1
    shapes = choose_shapes(counts, batch_size, one_target)
    assert len(shapes) <= MAX_SHAPES
    assert [shape.width for shape in shapes] == sorted(shape.width for shape in shapes)
    for draw in counts:
        waiting = 0
        for length in range(len(draw)):
            waiting += draw[length]
            room = sum(shape.capacity for shape in shapes if shape.width == length)
            waiting = max(waiting - room, 0)
        assert waiting == 0
        assert sum(draw) >= sum(shape.num_batches for shape in shapes)
    if one_target:
        assert sum(shape.capacity for shape in shapes) == counts.sum()


def test_a_long_catalogue_of_lengths_needs_few_shapes():
    counts = np.zeros((1, 5001), dtype=int)
    counts[0, 1:] = np.linspace(2000, 1, 5000).astype(int)
    shapes = choose_shapes(counts, 10_000, one_target=False)
    targets = (counts * np.arange(5001)).sum()
    assert len(shapes) <= MAX_SHAPES
    assert (cells(shapes) - targets) / cells(shapes) < 0.1
