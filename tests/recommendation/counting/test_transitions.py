"""The transition matrix by hand and against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from recommendation.counting.transitions import Pairs, count_pairs, largest_distance, num_pairs
from tests.errors import refused


def pairs_of(sequences: list[list[int]], num_items: int, max_distance: int, **own) -> Pairs:
    return count_pairs(np.array(sum(sequences, []), dtype=np.int64), offsets_of(sequences), num_items, max_distance,
                       **own)


def offsets_of(sequences: list[list[int]]) -> np.ndarray:
    return np.cumsum([0, *map(len, sequences)])


def by_definition(sequences: list[list[int]], num_items: int, max_distance: int, decay: float, backward: float,
                  source: float, popularity: float) -> np.ndarray:
    counts, num_events = np.zeros((num_items, num_items)), np.zeros(num_items)
    for items in sequences:
        for place, item in enumerate(items):
            num_events[item] += 1
            for distance in range(1, min(max_distance, place) + 1):
                counts[items[place - distance], item] += decay ** (distance - 1)
                counts[item, items[place - distance]] += backward * decay ** (distance - 1)
    np.fill_diagonal(counts, 0)
    row_sums = np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    return counts / row_sums**source / np.maximum(num_events, 1)**popularity


def test_the_counts_of_two_sequences_by_hand():
    pairs = pairs_of([[0, 1, 2], [1, 0]], 3, 2)
    # Forward: 0 -> 1, 1 -> 2 and 1 -> 0 at distance 1, 0 -> 2 at distance 2 with the weight 1/2.
    forward = pairs.matrix(2, 0.5, 0, 0, 0).toarray()
    assert forward.tolist() == [[0, 1, 0.5], [1, 0, 1], [0, 0, 0]]
    # Backward, with the weight 1/4: 1 -> 0, 2 -> 1 and 0 -> 1, and 2 -> 0 with 1/8.
    both = pairs.matrix(2, 0.5, 0.25, 0, 0).toarray()
    assert both.tolist() == [[0, 1.25, 0.5], [1.25, 0, 1], [0.125, 0.25, 0]]
    near = pairs.matrix(1, 0.5, 0, 0, 0).toarray()
    assert near.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_the_exponents_by_hand():
    # Row 0 has the sum 1.5. Items 0 and 1 have two events each, item 2 has one.
    scaled = pairs_of([[0, 1, 2], [1, 0]], 3, 2).matrix(2, 0.5, 0, 1, 1).toarray()
    assert scaled[0].tolist() == pytest.approx([0, 1 / 1.5 / 2, 0.5 / 1.5])


SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=6)


@given(SEQUENCES, st.integers(1, 4), st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 0.3]),
       st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5]), st.sampled_from([1, 7, 10**6]))
def test_the_matrix_agrees_with_its_definition(sequences, distance, decay, backward, source, popularity, block):
    pairs = pairs_of(sequences, 6, 4, block_pairs=block)
    found = pairs.matrix(distance, decay, backward, source, popularity)
    assert found.dtype == np.float32
    assert found.toarray() == pytest.approx(
        by_definition(sequences, 6, distance, decay, backward, source, popularity), rel=1e-5)
    assert (found.data > 0).all()


@given(SEQUENCES)
def test_blocks_give_the_same_pairs_as_one_block(sequences):
    whole, parts = pairs_of(sequences, 6, 3), pairs_of(sequences, 6, 3, block_pairs=1)
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one, other)


def test_the_distance_is_limited_by_the_number_of_pairs():
    offsets = offsets_of([[0] * 5, [0] * 2])
    # At distance 1, the users have 4 + 1 pairs, at distance 2 the first user has 3; two directions each.
    assert [num_pairs(offsets, distance) for distance in (1, 2, 3, 4, 9)] == [10, 16, 20, 22, 22]
    assert largest_distance(offsets, 20, max_pairs=22) == 20
    assert largest_distance(offsets, 3, max_pairs=10**6) == 3
    assert largest_distance(offsets, 20, max_pairs=17) == 2
    with refused(DataError, "interactions.parquet", names=["5"]):
        largest_distance(offsets, 20, max_pairs=9)
