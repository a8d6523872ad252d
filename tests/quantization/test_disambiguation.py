"""Disambiguation of semantic IDs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import ConfigError
from quantization.disambiguation import DistinctIDs, disambiguate, estimated_distances, has_shared_id, ranks, reassign
from tests.errors import refused

code_arrays = arrays.arrays(
    st.sampled_from([np.int64, np.int32, np.uint8]), st.tuples(st.integers(1, 40), st.integers(1, 4)),
    elements=st.integers(0, 3))


class Plugin:
    """A quantizer that can only return the distances of its last level (N, K), or None."""

    def __init__(self, distances=None, has_ordered_levels=True):
        self.distances, self.has_ordered_levels = distances, has_ordered_levels

    def last_distances(self, xs):
        """`xs` are the items' numbers (M, 1)."""
        return None if self.distances is None else torch.as_tensor(self.distances)[xs[:, 0]]


def made_distinct(method, codes, sizes=None, model=None, content=None) -> DistinctIDs:
    codes = np.asarray(codes)
    sizes = sizes or [int(size) + 1 for size in codes.max(axis=0)]
    return disambiguate(method, codes, sizes, model or Plugin(), torch.arange(len(codes)).unsqueeze(1), content)


def test_the_extra_level_numbers_items_with_equal_codes():
    ids = made_distinct("extra_level", [[1, 2], [0, 0], [1, 2], [3, 3], [1, 2], [0, 0]], [4, 5])
    assert ids.codes.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [3, 3, 0], [1, 2, 2], [0, 0, 1]]
    assert (ids.codebook_sizes, ids.level) == ([4, 5, 3], 2)


TWO_SHARE = [[0, 1], [0, 1], [1, 1]]


@pytest.mark.parametrize(("ordered", "codes", "method"), [
    (True, [[0, 1, 0], [0, 1, 1], [1, 1, 0]], "extra_level"),
    (False, [[0, 1], [0, 0], [1, 1]], "reassign"),
])
def test_auto_reassigns_if_the_levels_have_no_order(ordered, codes, method):
    ids = made_distinct("auto", TWO_SHARE, [2, 2], Plugin(has_ordered_levels=ordered))
    assert (ids.codes.tolist(), ids.method) == (codes, method)


def test_auto_adds_a_level_if_the_last_one_has_too_few_codes(caplog):
    caplog.set_level("INFO")
    ids = made_distinct("auto", [*TWO_SHARE, [0, 0]], [2, 2], Plugin(has_ordered_levels=False))
    assert (ids.codes.tolist(), ids.method) == ([[0, 1, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]], "extra_level")
    [line] = caplog.messages
    assert "3 items have the same codes in all levels but the last, which has 2 codes" in line


@pytest.mark.parametrize("method", ["extra_level", "reassign", "none"])
def test_distinct_codes_stay_as_they_are(method):
    codes = [[1, 2, 3], [1, 2, 4], [0, 2, 3]]
    ids = made_distinct(method, codes, [4, 4, 5])
    assert (ids.codes.tolist(), ids.codebook_sizes, ids.level) == (codes, [4, 4, 5], None)


def test_none_keeps_shared_codes():
    ids = made_distinct("none", [[1, 2], [1, 2]], [2, 3])
    assert (ids.codes.tolist(), ids.codebook_sizes, ids.level) == ([[1, 2], [1, 2]], [2, 3], None)


def test_the_extra_level_may_exceed_every_codebook():
    ids = made_distinct("extra_level", np.zeros((1000, 2), dtype=np.int64))
    assert ids.codes[:, -1].tolist() == list(range(1000))
    assert ids.codebook_sizes[-1] == 1000


def test_a_bucket_may_outgrow_the_integers_that_hold_the_codes():
    assert made_distinct("extra_level", np.zeros((300, 1), dtype=np.uint8)).codes[:, -1].tolist() == list(range(300))


@given(code_arrays)
def test_the_extra_level_makes_codes_distinct_and_keeps_the_others(codes):
    result = made_distinct("extra_level", codes).codes
    assert len({tuple(row) for row in result.tolist()}) == len(codes)
    assert result[:, :codes.shape[1]].tolist() == codes.tolist()


@given(code_arrays)
def test_the_extra_level_has_the_size_of_the_largest_bucket(codes):
    rows = [tuple(row) for row in codes.tolist()]
    largest = max(rows.count(row) for row in rows)
    ids = made_distinct("extra_level", codes)
    if largest == 1:
        assert ids.codes.shape == codes.shape
    else:
        assert sorted(set(ids.codes[:, -1].tolist())) == list(range(largest))
        assert ids.codebook_sizes[-1] == largest


@pytest.mark.slow
@given(code_arrays)
def test_within_a_bucket_the_items_keep_their_order(codes):
    seen: dict[tuple, int] = {}
    for row, rank in zip(codes.tolist(), ranks(codes).tolist(), strict=True):
        assert rank == seen.get(tuple(row), 0)
        seen[tuple(row)] = rank + 1


@given(code_arrays)
def test_items_share_if_another_one_has_their_codes(codes):
    rows = codes.tolist()
    assert has_shared_id(codes).tolist() == [rows.count(row) > 1 for row in rows]


def reassigned(codes, distances) -> list[list[int]]:
    """Codes reassigned by the distances (N, K) of all items."""
    codes = np.asarray(codes)
    shared = has_shared_id(codes)
    return reassign(codes, shared, np.asarray(distances, dtype=np.float32)[shared]).tolist()


def test_the_nearest_item_stays_and_the_other_moves():
    # Both are nearest to code 0; its second choice, code 1, belongs to the third item, so the first takes code 3.
    codes = [[5, 0], [5, 0], [5, 1]]
    distances = [[0.2, 0.3, 0.9, 0.4], [0.1, 0.2, 0.3, 0.4], [9, 0, 9, 9]]
    assert reassigned(codes, distances) == [[5, 3], [5, 0], [5, 1]]


def test_the_nearer_of_two_gets_the_free_code():
    codes = [[0], [0], [0]]
    distances = [[0.0, 0.5, 0.7], [0.1, 0.4, 0.9], [0.2, 0.3, 0.5]]
    # Item 0 stays; 1 and 2 ask for code 1, which goes to item 2.
    assert reassigned(codes, distances) == [[0], [2], [1]]


def test_equally_near_items_stay_and_go_in_their_order():
    assert reassigned([[0], [0], [0]], np.zeros((3, 3))) == [[0], [1], [2]]


def test_a_code_is_taken_under_one_prefix_only():
    codes = [[0, 0], [0, 0], [1, 0], [1, 0], [1, 1]]
    distances = [[0.0, 0.1, 0.2], [0.1, 0.2, 0.3]] * 2 + [[9, 0, 9]]
    assert reassigned(codes, distances) == [[0, 0], [0, 1], [1, 0], [1, 2], [1, 1]]


@st.composite
def crowded(draw) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, L) with at least two equal rows, and distances (N, K) to enough codes, many of them equal."""
    codes = draw(arrays.arrays(np.int64, st.tuples(st.integers(2, 14), st.integers(1, 3)), elements=st.integers(0, 2))
                 .filter(lambda codes: has_shared_id(codes).any()))
    num_codes = max(3, len(codes))
    return codes, draw(arrays.arrays(np.float32, (len(codes), num_codes), elements=st.integers(0, 5)))


@given(crowded())
def test_reassign_changes_only_last_codes_of_sharing_items(drawn):
    codes, distances = drawn
    result = np.array(reassigned(codes, distances))
    assert len({tuple(row) for row in result.tolist()}) == len(codes)
    assert result[:, :-1].tolist() == codes[:, :-1].tolist()
    assert ((result[:, -1] >= 0) & (result[:, -1] < distances.shape[1])).all()
    shared = has_shared_id(codes)
    assert result[~shared].tolist() == codes[~shared].tolist()


@given(crowded())
def test_the_nearest_item_keeps_a_shared_id(drawn):
    codes, distances = drawn
    result = reassigned(codes, distances)
    buckets: dict[tuple, list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        buckets.setdefault(tuple(row), []).append(item)
    for row, items in buckets.items():
        nearest = min(items, key=lambda item: (distances[item, row[-1]], item))
        assert [item for item in items if result[item] == list(row)] == [nearest]


@given(crowded())
def test_a_moved_item_left_no_free_code_that_is_nearer(drawn):
    codes, distances = drawn
    result = reassigned(codes, distances)
    taken = {tuple(row) for row in result}
    for item, row in enumerate(result):
        if row != codes[item].tolist():
            nearer = [code for code in range(distances.shape[1]) if distances[item, code] < distances[item, row[-1]]]
            assert all((*row[:-1], code) in taken for code in nearer)


@pytest.mark.parametrize("codes", [[[7, 0], [7, 0], [7, 1], [7, 1], [2, 0]], [[0], [0], [1], [1]]],
                         ids=["several levels", "single level"])
def test_too_many_items_under_a_prefix_are_refused(codes):
    with refused(ConfigError, "common.disambiguation", names=[4, 3],
                 fix=["--codebook_size 4", "--disambiguation extra_level"]):
        reassigned(codes, np.zeros((len(codes), 3)))


def test_as_many_items_under_a_prefix_as_codes_fit():
    result = reassigned([[7, 0], [7, 0], [7, 1], [7, 1]], np.zeros((4, 4)))
    assert sorted(result) == [[7, 0], [7, 1], [7, 2], [7, 3]]


def test_reassign_uses_the_distances_of_the_quantizer():
    told = np.array([[9.0, 9, 9, 9], [0, 3, 2, 1], [0, 1, 2, 3], [9, 9, 9, 9]])
    ids = made_distinct("reassign", [[0, 1], [1, 0], [1, 0], [1, 2]], [2, 4], Plugin(told))
    # Item 2 asks for code 1; its distance of 0 is no smaller than that of item 1, which comes first and stays.
    assert ids.codes.tolist() == [[0, 1], [1, 0], [1, 1], [1, 2]]
    assert (ids.codebook_sizes, ids.level) == ([2, 4], None)


# Codewords 0, 10, 20, 30 of one level on a line.
LINE = np.array([[0.0], [0.0], [10.0], [10.0], [20.0], [30.0]])
LINE_CODES = np.array([[0], [0], [1], [1], [2], [3]])


def test_the_estimate_finds_the_codewords_near_the_items():
    distances = estimated_distances(LINE_CODES, LINE, 5)
    assert distances[:, :4] == pytest.approx((LINE - [[0, 10, 20, 30]]) ** 2, abs=1e-3)


def test_the_estimate_works_with_several_levels():
    # A coarse codeword of 0 or 100 and a fine one of 0, 1 or 3 add up to the content.
    codes = np.array([[coarse, fine] for coarse in (0, 1) for fine in (0, 1, 2)])
    content = (np.array([[0.0], [100.0]])[codes[:, 0]] + np.array([[0.0], [1.0], [3.0]])[codes[:, 1]])
    distances = estimated_distances(codes, content, 3)
    assert distances.argmin(axis=1).tolist() == codes[:, 1].tolist()
    assert np.argsort(distances[0]).tolist() == [0, 1, 2]
    assert np.argsort(distances[2]).tolist() == [2, 1, 0]


def test_reassign_estimates_distances_that_a_quantizer_lacks():
    # Prefix 0 has two items with code 1 (10), the second nearer to 20; prefix 1 tells the positions of codes 0 to 3.
    codes = [[1, 0], [1, 1], [1, 2], [1, 3], [0, 1], [0, 1]]
    content = np.array([[0.0], [10.0], [20.0], [30.0], [10.0], [14.0]])
    ids = made_distinct("reassign", codes, [2, 4], Plugin(), content)
    assert ids.codes.tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [0, 1], [0, 2]]


def test_reassign_works_without_distances_or_content():
    ids = made_distinct("reassign", [[1, 1], [1, 1], [1, 0]], [2, 3])
    assert ids.codes.tolist() == [[1, 1], [1, 2], [1, 0]]
