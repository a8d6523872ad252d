"""Scores and probabilities of a count, by hand and against their definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from recommendation.counting.counts import Counts

from ..conftest import windows_of

MATRIX = np.array([[0, 2, 1, 0], [0, 0, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
POPULARITY = np.array([3, 2, 1, 0])


def filled(matrix: np.ndarray, popularity: np.ndarray, num_newest: int, recency: float) -> Counts:
    counts = Counts(len(matrix))
    counts.fill(sparse.csr_matrix(matrix), popularity, num_newest, recency)
    return counts


def test_scores_by_hand():
    counts = filled(MATRIX, POPULARITY, 2, 0.5)
    scores = counts.scores(*windows_of([0, 1], [1, 0], [0, 2, 3], [2])[:2])
    # The newest item has the weight 1, the item before it 1/2, and older items are not used.
    assert scores.tolist() == [[0, 1, 4.5, 0], [0, 2, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scores.dtype == torch.float64
    assert counts.row_sums().tolist() == [3, 4, 0, 0]


def test_probabilities_by_hand():
    found = filled(MATRIX, POPULARITY, 2, 0.5).log_probabilities(*windows_of([1, 0], [2])[:2])
    smoothed = [0.4, 0.3, 0.2, 0.1]  # (count + 1) / 10
    mixed = [0.98 * score / 5 + 0.02 * share for score, share in zip([0, 2, 3, 0], smoothed, strict=True)]
    assert found[0].tolist() == pytest.approx([math.log(p) for p in mixed], rel=1e-5)
    assert found[1].tolist() == pytest.approx([math.log(p) for p in smoothed], rel=1e-5)  # no transitions
    assert found.exp().sum(dim=1).tolist() == pytest.approx([1, 1], rel=1e-5)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 7),
       st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
def test_scores_agree_with_their_definition(histories, num_newest, recency, seed):
    rng = np.random.default_rng(seed)
    matrix = (rng.random((5, 5)) * (rng.random((5, 5)) < 0.4)).astype(np.float32)
    counts = filled(matrix, np.arange(5), num_newest, recency)
    found = counts.scores(*windows_of(*histories)[:2])
    for scores, history in zip(found.tolist(), histories, strict=True):
        newest_first = history[::-1][:num_newest]
        expected = sum(recency**lag * matrix[item].astype(float) for lag, item in enumerate(newest_first))
        assert scores == pytest.approx(expected.tolist())
    assert counts.find_problem() == ""
    log_probabilities = counts.log_probabilities(*windows_of(*histories)[:2])
    assert log_probabilities.exp().sum(dim=1).tolist() == pytest.approx([1] * len(histories), rel=1e-5)


DAMAGE = {
    "negative columns": ("columns", lambda old: -old - 1), "huge columns": ("columns", lambda old: old + 10**9),
    "fewer columns": ("columns", lambda old: old[1:]), "matrix": ("columns", lambda old: old.reshape(1, -1)),
    "fewer values": ("values", lambda old: old[1:]), "negative values": ("values", lambda old: -old),
    "negative starts": ("row_starts", lambda old: -old), "huge starts": ("row_starts", lambda old: old * 10**9),
    "reversed starts": ("row_starts", lambda old: old.flip(0)),
    "negative popularity": ("popularity", lambda old: -old), "no newest item": ("num_newest", lambda old: old * 0),
    "growing weights": ("recency", lambda old: old + 1)}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_buffers_are_found(case):
    counts, (name, change) = filled(MATRIX, POPULARITY, 2, 0.5), DAMAGE[case]
    assert counts.find_problem() == ""
    setattr(counts, name, change(getattr(counts, name)))
    assert counts.find_problem()
