"""Popularity and Markov by hand and against a brute-force count."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recommendation.models.abstract_model import Catalogue, top_items
from recommendation.models.markov.model import Markov
from recommendation.models.popularity.model import Popularity

from ..conftest import leave_one_out, windows_of


def fitted(model_class, histories: list[list[int]], num_items: int):
    model = model_class({}, Catalogue(num_items, None, []))
    sequences = leave_one_out(histories)
    assert model.fit(sequences.training_sequences(), sequences.validation_events())
    return model


# Training events: [0, 1, 0], [2, 1], [0]; items 3, 4 and 5 have only valid and test events.
HISTORIES = [[0, 1, 0, 3, 4], [2, 1, 4, 4], [0, 4, 5]]


def test_popularity_counts_training_events():
    result = fitted(Popularity, HISTORIES, 6).recommend(windows_of([3], [0, 1]), 3)
    assert result.items.tolist() == [[0, 1, 2]] * 2
    assert result.scores.tolist() == [[3, 2, 1]] * 2


def test_equally_popular_items_have_the_order_of_their_ids():
    model = fitted(Popularity, [[4, 2, 0, 9, 9], [2, 4, 9, 9]], 10)
    assert model.recommend(windows_of([0]), 6).items.tolist() == [[2, 4, 0, 1, 3, 5]]


def test_markov_prefers_what_followed_the_last_item():
    # 0 -> 1 twice, 0 -> 2 once; 1 -> 0 once.
    model = fitted(Markov, [[0, 1, 0, 2, 5, 5], [3, 3, 0, 1, 5, 5]], 6)
    assert model.recommend(windows_of([4, 0]), 3).items.tolist() == [[1, 2, 0]]
    assert model.recommend(windows_of([0, 1]), 1).items.tolist() == [[0]]


def test_markov_breaks_ties_by_popularity():
    # 0 -> 1 once and 0 -> 2 once, but item 2 has three events and item 1 one.
    model = fitted(Markov, [[0, 1, 5, 5], [0, 2, 5, 5], [2, 2, 5, 5]], 6)
    assert model.recommend(windows_of([0]), 2).items.tolist() == [[2, 1]]


def test_one_transition_outweighs_any_popularity():
    model = fitted(Markov, [[0, 1, 9, 9], [2] * 50 + [9, 9]], 10)
    assert model.recommend(windows_of([0]), 2).items.tolist() == [[1, 2]]


def test_markov_falls_back_to_popularity():
    model = fitted(Markov, HISTORIES, 6)
    for last in (3, 5):  # never seen in training
        assert model.recommend(windows_of([0, last]), 4).items.tolist() == [[0, 1, 2, 3]]


def test_markov_has_no_transitions_between_users():
    # In the file, item 2 of the next user follows item 1; within users there are only 0 -> 1 and 2 -> 3.
    model = fitted(Markov, [[0, 1], [2, 3], [4], [4]], 5)
    assert model.recommend(windows_of([1]), 1).items.tolist() == [[4]]  # the most popular
    assert model.recommend(windows_of([3]), 1).items.tolist() == [[4]]
    assert model.counts.tolist() == [1, 1]


def test_markov_counts_only_training_transitions():
    # 1 -> 3 leads to the valid event, 3 -> 2 to the test event.
    model = fitted(Markov, [[0, 1, 3, 2], [4, 4, 0, 0]], 5)
    assert sorted(model.followers.tolist()) == [1, 4]
    assert model.recommend(windows_of([1]), 1).items.tolist() == [[4]]


def test_markov_reads_the_last_item_of_a_padded_history():
    model = fitted(Markov, [[0, 1, 9, 9], [2, 3, 9, 9]], 10)
    assert model.recommend(windows_of([2, 0], [2], [0, 0, 2]), 1).items.tolist() == [[1], [3], [3]]


@pytest.mark.parametrize("seed", range(3))
def test_baselines_agree_with_a_brute_force_count(seed):
    rng = np.random.default_rng(seed)
    num_items = 15
    histories = [rng.integers(num_items, size=size).tolist() for size in rng.integers(1, 9, size=40)]
    trained = [items[:-2] if len(items) > 2 else items for items in histories]
    popularity = Counter(item for items in trained for item in items)
    by_popularity = sorted(range(num_items), key=lambda item: (-popularity[item], item))
    result = fitted(Popularity, histories, num_items).recommend(windows_of([0]), num_items)
    assert result.items[0].tolist() == by_popularity

    markov = fitted(Markov, histories, num_items)
    result = markov.recommend(windows_of(*([item] for item in range(num_items))), num_items)
    for last in range(num_items):
        follows = Counter(after for items in trained for before, after in pairwise(items) if before == last)
        expected = sorted(range(num_items), key=lambda item: (-follows[item], -popularity[item], item))
        assert result.items[last].tolist() == expected


def test_top_items_by_hand():
    result = top_items(torch.tensor([[0.1, 0.5, 0.5], [3.0, -1.0, 2.0]]), 2)
    assert result.items.tolist() == [[1, 2], [0, 2]]
    assert result.scores.tolist() == [[0.5, 0.5], [3.0, 2.0]]


def test_top_items_of_a_small_catalogue_are_padded():
    result = top_items(torch.tensor([[1.0, 2.0]]), 4)
    assert result.items.tolist() == [[1, 0, -1, -1]]
    assert result.scores.tolist() == [[2.0, 1.0, float("-inf"), float("-inf")]]


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.5, float("-inf")]), min_size=7, max_size=7), min_size=1,
                max_size=4), st.integers(1, 9))
def test_top_items_agree_with_sorting_all_items(scores, top_k):
    result = top_items(torch.tensor(scores), top_k)
    for items, values, row in zip(result.items.tolist(), result.scores.tolist(), scores, strict=True):
        expected = sorted(range(7), key=lambda item: (-row[item], item))[:top_k]
        listed = [item for item in expected if row[item] > float("-inf")]
        assert items == listed + [-1] * (top_k - len(listed))
        assert values[:7] == [row[item] for item in expected]
