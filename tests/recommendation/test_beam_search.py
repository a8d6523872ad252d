"""The trie by hand; beam search against scoring every item."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recommendation.models.beam_search import Trie, beam_search

from .conftest import random_codes

CODES = torch.tensor([[1, 0, 2], [0, 3, 1], [1, 0, 0], [1, 2, 0]])
SIZES = [2, 4, 3]


def test_the_trie_leads_from_code_to_code_to_the_item():
    trie = Trie(CODES, SIZES)
    root = torch.tensor([[0]])
    first = trie.child_nodes(0, root)[0, 0]
    assert (first >= 0).tolist() == [True, True]
    second = trie.child_nodes(1, first.long().unsqueeze(0))[0]  # (2, 4): below code 0, below code 1
    assert (second >= 0).tolist() == [[False, False, False, True], [True, False, True, False]]
    third = [trie.child_nodes(2, second[code, following].long().view(1, 1))[0, 0].tolist()
             for code, following in ((0, 3), (1, 0), (1, 2))]
    assert third == [[-1, 1, -1], [2, -1, 0], [3, -1, -1]]


def test_a_trie_of_one_level_leads_straight_to_the_items():
    assert Trie(torch.tensor([[2], [0]]), [3]).child_nodes(0, torch.tensor([[0]])).tolist() == [[[1, -1, 0]]]


def search(codes: torch.Tensor, sizes: list[int], log_probs: list[np.ndarray], num_beams: int, top_k: int):
    """Beam search of users whose log-probabilities (B, C) of a level do not depend on the codes before it."""
    def step(level, last, parents):
        return torch.from_numpy(log_probs[level]).unsqueeze(1).expand(-1, last.shape[1], -1)

    return beam_search(step, Trie(codes, sizes), len(sizes), len(log_probs[0]), num_beams, top_k, torch.device("cpu"))


def test_the_likeliest_items_come_first_by_hand():
    log_probs = [np.log([[0.5, 0.5]]), np.log([[0.5, 0.1, 0.1, 0.3]]), np.log([[0.2, 0.7, 0.1]])]
    result = search(CODES, SIZES, log_probs, num_beams=4, top_k=4)
    # Item 0: .5 * .5 * .1, item 1: .5 * .3 * .7, item 2: .5 * .5 * .2, item 3: .5 * .1 * .2
    assert result.items.tolist() == [[1, 2, 0, 3]]
    assert np.allclose(result.scores.exp(), [[0.105, 0.05, 0.025, 0.01]])


def test_a_code_without_items_is_never_chosen():
    log_probs = [np.log([[0.5, 0.5]]), np.log([[0.01, 0.97, 0.01, 0.01]]), np.log([[0.01, 0.01, 0.98]])]
    result = search(CODES, SIZES, log_probs, num_beams=1, top_k=1)
    assert result.items[0, 0] >= 0
    assert result.scores[0, 0].isfinite()


def test_where_fewer_items_exist_the_tail_says_so():
    log_probs = [np.zeros((2, size)) for size in SIZES]
    result = search(CODES, SIZES, log_probs, num_beams=10, top_k=10)
    assert result.items.shape == result.scores.shape == (2, 10)
    for items, scores in zip(result.items, result.scores, strict=True):
        assert sorted(items[:4].tolist()) == [0, 1, 2, 3]
        assert items[4:].tolist() == [-1] * 6
        assert scores[:4].isfinite().all()
        assert (scores[4:] == float("-inf")).all()


def test_the_tail_is_the_same_when_the_last_level_is_narrower_than_the_result():
    result = search(torch.tensor([[0], [1]]), [2], [np.log([[0.1, 0.9]])], num_beams=5, top_k=5)
    assert result.items.tolist() == [[1, 0, -1, -1, -1]]
    assert result.scores[0, 2:].tolist() == [float("-inf")] * 3


@st.composite
def searches(draw):
    """Codes, their sizes, and log-probabilities of two users that are all different."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    num_items = draw(st.integers(1, int(np.prod(sizes))))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    return random_codes(num_items, sizes, seed), sizes, [np.log(rng.dirichlet(np.ones(s), size=2)) for s in sizes]


@given(searches())
def test_with_a_beam_for_every_item_the_search_is_exact(case):
    codes, sizes, log_probs = case
    result = search(codes, sizes, log_probs, num_beams=len(codes), top_k=len(codes))
    for user in range(2):
        exact = [sum(level[user, code] for level, code in zip(log_probs, row, strict=True)) for row in codes.tolist()]
        assert sorted(result.items[user].tolist()) == list(range(len(codes)))
        assert np.allclose(result.scores[user], sorted(exact, reverse=True))
        assert np.allclose([exact[item] for item in result.items[user].tolist()], result.scores[user])


@given(searches(), st.integers(1, 6))
def test_k_beams_find_k_different_items_if_there_are_as_many(case, num_beams):
    codes, sizes, log_probs = case
    result = search(codes, sizes, log_probs, num_beams=num_beams, top_k=num_beams)
    for items, scores in zip(result.items.tolist(), result.scores.tolist(), strict=True):
        found = [item for item in items if item >= 0]
        assert len(found) == len(set(found)) == min(num_beams, len(codes))
        assert all(item < len(codes) for item in found)
        assert items == found + [-1] * (num_beams - len(found))
        assert scores == sorted(scores, reverse=True)
