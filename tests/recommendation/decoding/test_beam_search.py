"""The trie by hand; beam search against scores of every item."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recommendation.decoding.beam_search import beam_search, exact_scores
from recommendation.decoding.top_k import Prior, top_items
from recommendation.decoding.trie import Trie
from tests.brute_force import best_unseen

from ..conftest import padded, random_codes

CODES = torch.tensor([[1, 0, 2], [0, 3, 1], [1, 0, 0], [1, 2, 0]])
SIZES = [2, 4, 3]


def exact_search(step, trie, batch_size, top_k, valid_only=False, seen=None):
    return top_items(exact_scores(step, trie, batch_size, valid_only), top_k, seen)


def children(trie: Trie, level: int, node: int) -> dict[int, int]:
    """code -> child."""
    codes, nodes, exists = (part[0, 0] for part in trie.children_of(level, torch.tensor([[node]])))
    return dict(zip(codes[exists].tolist(), nodes[exists].tolist(), strict=True))


def test_the_trie_leads_from_code_to_code_to_the_item():
    trie = Trie(CODES, SIZES)
    first = children(trie, 0, 0)
    assert list(first) == [0, 1]
    below = [children(trie, 1, first[0]), children(trie, 1, first[1])]
    assert [list(level) for level in below] == [[3], [0, 2]]
    leaves = [children(trie, 2, below[code][following]) for code, following in ((0, 3), (1, 0), (1, 2))]
    items = [{code: int(trie.items_of(torch.tensor(node))) for code, node in level.items()} for level in leaves]
    assert items == [{1: 1}, {0: 2, 2: 0}, {0: 3}]


def test_the_siblings_are_the_codes_that_can_follow_each_prefix():
    trie = Trie(CODES, SIZES)
    codes, (first, num_children, own) = trie.siblings()
    following = [[codes[start:start + count].tolist() for start, count in zip(*level, strict=True)]
                 for level in zip(first.tolist(), num_children.tolist(), strict=True)]
    # One list per level and item. The items 0, 2 and 3 begin with code 1; the items 0 and 2 begin with (1, 0).
    assert following == [[[0, 1]] * 4, [[0, 2], [3], [0, 2], [0, 2]], [[0, 2], [1], [0, 2], [0]]]
    for level, of_level in enumerate(following):
        assert [of_item[place] for of_item, place in zip(of_level, own[level].tolist(), strict=True)
                ] == CODES[:, level].tolist()
    assert codes[-2:].tolist() == [0, 0]  # two entries can be read from any node


def test_the_trie_finds_prefixes_with_one_item():
    trie = Trie(CODES, SIZES)
    # The root has four items, code 0 has one of them, code 1 has three; (0, 3) and (1, 2) have one each.
    has_single_item = [trie.has_single_item(level, torch.arange(size)).tolist() for level, size in enumerate((1, 2, 3))]
    assert has_single_item == [[False], [True, False], [True, False, True]]


def test_the_trie_finds_prefixes_with_only_seen_items():
    trie = Trie(CODES, SIZES)
    leaves = trie.leaves_of(padded([3, 1], [2, 0, 3], []))
    # Nodes of level 1: (0), (1); of level 2: (0, 3), (1, 0), (1, 2); the items in the order of their IDs: 1, 2, 0, 3.
    all_masked = [trie.all_masked(level, torch.arange(size).expand(3, -1), leaves).tolist()
              for level, size in enumerate((1, 2, 3, 4))]
    assert all_masked == [[[False]] * 3,
                      [[True, False], [False, True], [False, False]],
                      [[True, False, True], [False, True, True], [False] * 3],
                      [[True, False, False, True], [False, True, True, True], [False] * 4]]


def test_a_trie_of_one_level_leads_straight_to_the_items():
    trie = Trie(torch.tensor([[2], [0]]), [3])
    assert {code: int(trie.items_of(torch.tensor(node))) for code, node in children(trie, 0, 0).items()} == {0: 1, 2: 0}


def search(codes: torch.Tensor, sizes: list[int], log_probs: list[np.ndarray], num_beams: int, top_k: int,
           valid_only: bool = False, seen: torch.Tensor | None = None, prior: Prior | None = None):
    """Beam search where the log-probabilities (B, C) of a level do not depend on the earlier codes."""
    return beam_search(unconditional(log_probs), Trie(codes, sizes), len(log_probs[0]), num_beams, top_k, valid_only,
                       seen, prior)


def unconditional(log_probs: list[np.ndarray]):
    def step(level, last, parents):
        return torch.from_numpy(log_probs[level]).unsqueeze(1).expand(-1, last.shape[1], -1)

    return step


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


def test_results_longer_than_the_catalogue_are_padded():
    log_probs = [np.zeros((2, size)) for size in SIZES]
    result = search(CODES, SIZES, log_probs, num_beams=10, top_k=10)
    assert result.items.shape == result.scores.shape == (2, 10)
    for items, scores in zip(result.items, result.scores, strict=True):
        assert sorted(items[:4].tolist()) == [0, 1, 2, 3]
        assert items[4:].tolist() == [-1] * 6
        assert scores[:4].isfinite().all()
        assert (scores[4:] == float("-inf")).all()


def test_results_wider_than_the_last_level_are_padded():
    result = search(torch.tensor([[0], [1]]), [2], [np.log([[0.1, 0.9]])], num_beams=5, top_k=5)
    assert result.items.tolist() == [[1, 0, -1, -1, -1]]
    assert result.scores[0, 2:].tolist() == [float("-inf")] * 3


@st.composite
def searches(draw):
    """Codes, the codebook sizes, and two users' log-probabilities, all different."""
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


def test_equally_likely_items_have_the_order_of_their_ids():
    codes = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    even = [np.log(np.full((1, 2), 0.5))] * 2
    for valid_only in (False, True):
        assert search(codes, [2, 2], even, 4, 4, valid_only).items.tolist() == [[0, 1, 2, 3]]
        assert exact_search(unconditional(even), Trie(codes, [2, 2]), 1, 4, valid_only).items.tolist() == [
            [0, 1, 2, 3]]


@given(searches(), st.integers(1, 6))
def test_k_beams_find_k_different_items(case, num_beams):
    codes, sizes, log_probs = case
    result = search(codes, sizes, log_probs, num_beams=num_beams, top_k=num_beams)
    for items, scores in zip(result.items.tolist(), result.scores.tolist(), strict=True):
        found = [item for item in items if item >= 0]
        assert len(found) == len(set(found)) == min(num_beams, len(codes))
        assert all(item < len(codes) for item in found)
        assert items == found + [-1] * (num_beams - len(found))
        assert scores == sorted(scores, reverse=True)


def existing_by_hand(codes: list[list[int]], log_probs: list[np.ndarray], user: int) -> list[float]:
    """Score of each item: the sum over levels of the log of its code's share among all codes after its prefix."""
    scores = []
    for ours in codes:
        score = 0.0
        for level, code in enumerate(ours):
            siblings = {other[level] for other in codes if other[:level] == ours[:level]}
            p = np.exp(log_probs[level][user])
            score += np.log(p[code] / sum(p[sibling] for sibling in siblings))
        scores.append(score)
    return scores


@given(searches())
def test_over_existing_codes_a_full_search_is_exact(case):
    codes, sizes, log_probs = case
    result = search(codes, sizes, log_probs, len(codes), len(codes), valid_only=True)
    for user in range(2):
        exact = existing_by_hand(codes.tolist(), log_probs, user)
        assert np.isclose(np.exp(exact).sum(), 1)
        assert sorted(result.items[user].tolist()) == list(range(len(codes)))
        assert np.allclose(result.scores[user], sorted(exact, reverse=True))
        assert np.allclose([exact[item] for item in result.items[user].tolist()], result.scores[user])


@pytest.mark.slow
@given(searches())
def test_exact_search_agrees_with_a_full_beam_search(case):
    codes, sizes, log_probs = case
    for valid_only in (False, True):
        result = exact_search(unconditional(log_probs), Trie(codes, sizes), 2, len(codes), valid_only)
        searched = search(codes, sizes, log_probs, len(codes), len(codes), valid_only)
        for user in range(2):
            ours, theirs = (dict(zip(r.items[user].tolist(), r.scores[user].tolist(), strict=True))
                            for r in (result, searched))
            assert ours.keys() == theirs.keys() == set(range(len(codes)))
            assert all(np.isclose(ours[item], theirs[item]) for item in ours)


@st.composite
def seen_by_two(draw, num_items: int):
    """Two users' seen items: any set of them, or all."""
    any_items = st.lists(st.integers(0, num_items - 1), unique=True)
    return padded(*(draw(st.one_of(any_items, st.permutations(range(num_items)))) for _ in range(2)))


@pytest.mark.slow
@given(st.data(), searches(), st.booleans())
def test_unseen_items_keep_their_exact_scores(data, case, valid_only):
    codes, sizes, log_probs = case
    num_items, seen = len(codes), data.draw(seen_by_two(len(codes)))
    exact = exact_search(unconditional(log_probs), Trie(codes, sizes), 2, num_items, valid_only)
    results = [search(codes, sizes, log_probs, num_items, num_items, valid_only, seen),
               exact_search(unconditional(log_probs), Trie(codes, sizes), 2, num_items, valid_only, seen)]
    for user in range(2):
        scores = dict(zip(exact.items[user].tolist(), exact.scores[user].tolist(), strict=True))
        items, expected = best_unseen(scores, seen[user].tolist(), num_items)
        for result in results:
            assert sorted(result.items[user].tolist()) == sorted(items)
            assert np.allclose(result.scores[user], expected)


@given(st.data(), searches(), st.integers(1, 6), st.booleans())
def test_k_beams_find_k_unseen_items(data, case, num_beams, valid_only):
    codes, sizes, log_probs = case
    seen = data.draw(seen_by_two(len(codes)))
    result = search(codes, sizes, log_probs, num_beams, num_beams, valid_only, seen)
    for items, of_user in zip(result.items.tolist(), seen.tolist(), strict=True):
        unseen = set(range(len(codes))) - set(of_user)
        found = [item for item in items if item >= 0]
        assert len(found) == len(set(found) & unseen) == min(num_beams, len(unseen))


def test_equally_likely_unseen_items_have_the_order_of_their_ids():
    codes = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    even, seen = [np.log(np.full((1, 2), 0.5))] * 2, padded([1])
    for valid_only in (False, True):
        results = [search(codes, [2, 2], even, 4, 4, valid_only, seen),
                   exact_search(unconditional(even), Trie(codes, [2, 2]), 1, 4, valid_only, seen)]
        for result in results:
            assert result.items.tolist() == [[0, 2, 3, -1]]
            assert np.allclose(result.scores.exp(), [[0.25, 0.25, 0.25, 0]])


def test_a_prefix_with_one_item_is_not_decoded():
    calls = []
    log_probs = [np.log([[0.5, 0.5]]), np.log([[0.5, 0.1, 0.1, 0.3]]), np.log([[0.2, 0.7, 0.1]])]

    def step(level, codes, parents):
        calls.append((level, codes.tolist()))
        return unconditional(log_probs)(level, codes, parents)

    result = beam_search(step, Trie(CODES, SIZES), 1, 4, 4, valid_only=True)
    # Code 0 has only item 1, and (1, 2) has only item 3: decoding continues only from (1) and (1, 0).
    assert calls == [(0, [[0]]), (1, [[1]]), (2, [[0]])]
    # Item 1: .5. Codes 0 and 2 after code 1: .5 / .6 and .1 / .6; codes 0 and 2 after (1, 0): 2 / 3 and 1 / 3.
    assert result.items.tolist() == [[1, 2, 0, 3]]
    assert np.allclose(result.scores.exp(), [[1 / 2, 5 / 18, 5 / 36, 1 / 12]])


@st.composite
def priors(draw, num_items: int) -> Prior:
    """Two users' log-probabilities of the items, some of them very small, and weights."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([0.1, 3.0, 30.0, 300.0]))
    logits = torch.from_numpy(spread * rng.standard_normal((2, num_items)))
    weights = [draw(st.sampled_from([0.0, 0.1, 1.0, 2.5, 8.0])) for _ in range(2)]
    return Prior(logits.log_softmax(dim=1), torch.tensor(weights).double().unsqueeze(1))


def exact_with(prior: Prior, codes, sizes, log_probs, valid_only: bool) -> list[dict[int, float]]:
    """For each user, the exact scores of all items with the prior: item -> score."""
    scores = exact_scores(unconditional(log_probs), Trie(codes, sizes), 2, valid_only)
    return [{item: of_user[item] + weight * log_p[item] for item in range(len(codes))} for of_user, weight, log_p in
            zip(scores.tolist(), prior.weight[:, 0].tolist(), prior.log_probabilities.tolist(), strict=True)]


@pytest.mark.slow
@given(st.data(), searches(), st.booleans(), st.booleans())
def test_a_full_search_with_a_prior_is_exact(data, case, valid_only, with_seen):
    codes, sizes, log_probs = case
    num_items = len(codes)
    prior = data.draw(priors(num_items))
    seen = data.draw(seen_by_two(num_items)) if with_seen else None
    result = search(codes, sizes, log_probs, num_items, num_items, valid_only, seen, prior)
    for user, scores in enumerate(exact_with(prior, codes, sizes, log_probs, valid_only)):
        items, expected = best_unseen(scores, [] if seen is None else seen[user].tolist(), num_items)
        assert sorted(result.items[user].tolist()) == sorted(items)
        assert np.allclose(result.scores[user], expected)
        found = [item for item in result.items[user].tolist() if item >= 0]
        assert np.allclose([scores[item] for item in found], result.scores[user][:len(found)])


@pytest.mark.slow
@given(st.data(), searches(), st.integers(1, 6), st.booleans())
def test_a_narrow_search_with_a_prior_has_exact_scores_and_only_unseen_items(data, case, num_beams, valid_only):
    codes, sizes, log_probs = case
    prior, seen = data.draw(priors(len(codes))), data.draw(seen_by_two(len(codes)))
    result = search(codes, sizes, log_probs, num_beams, num_beams, valid_only, seen, prior)
    for user, scores in enumerate(exact_with(prior, codes, sizes, log_probs, valid_only)):
        unseen = set(range(len(codes))) - {*seen[user].tolist()}
        found = [item for item in result.items[user].tolist() if item >= 0]
        assert len(found) == len(set(found) & unseen) == min(num_beams, len(unseen))
        assert np.allclose([scores[item] for item in found], result.scores[user][:len(found)])
        assert (result.scores[user][len(found):] == float("-inf")).all()


@given(st.data(), searches(), st.integers(1, 6), st.booleans())
def test_a_prior_with_the_weight_zero_changes_no_list(data, case, num_beams, valid_only):
    codes, sizes, log_probs = case
    prior, seen = data.draw(priors(len(codes))), data.draw(st.none() | seen_by_two(len(codes)))
    prior = prior._replace(weight=torch.zeros(2, 1).double())
    plain, result = (search(codes, sizes, log_probs, num_beams, num_beams, valid_only, seen, of)
                     for of in (None, prior))
    assert torch.equal(plain.items, result.items)
    assert torch.equal(plain.scores, result.scores)


def test_a_narrow_beam_follows_the_prior_of_the_unseen_items():
    # The items of code 0 have most of the prior, but both of them are seen; so the search must follow code 1.
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    even = [np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])]
    prior = Prior(torch.tensor([[0.49, 0.49, 0.005, 0.015]]).log(), torch.ones(1, 1))
    result = search(codes, [2, 2], even, 1, 1, seen=padded([0, 1]), prior=prior)
    assert result.items.tolist() == [[3]]
    assert np.allclose(result.scores.exp(), 0.1 * 0.5 * 0.015)
    # If only item 0 is seen, the prefix 0 has .9 * .49 and the prefix 1 has .1 * .02.
    assert search(codes, [2, 2], even, 1, 1, seen=padded([0]), prior=prior).items.tolist() == [[1]]
    # If item 1 is unlikely and item 0 is seen, the prefix 0 has .9 * .001, less than the prefix 1 with .1 * .06.
    prior = Prior(torch.tensor([[0.939, 0.001, 0.02, 0.04]]).log(), torch.ones(1, 1))
    assert search(codes, [2, 2], even, 1, 1, seen=padded([0]), prior=prior).items.tolist() == [[3]]
    assert search(codes, [2, 2], even, 1, 1, prior=prior).items.tolist() == [[0]]


@given(st.data(), searches())
def test_the_mass_of_a_prefix_is_the_sum_over_its_unseen_items(data, case):
    codes, sizes, _ = case
    num_items, trie = len(codes), Trie(codes, sizes)
    log_values = data.draw(priors(num_items)).log_probabilities * data.draw(st.sampled_from([1.0, 8.0]))
    seen = data.draw(st.none() | seen_by_two(num_items))
    masses, paths = trie.log_masses(log_values, seen), trie.paths()
    assert len(masses) == len(sizes)
    for level, mass_of in enumerate(masses):
        found = mass_of.gather(1, paths[:, level].expand(2, -1))
        assert found.isfinite().all()
        prefixes = [tuple(row) for row in codes[:, :level].tolist()]
        for user in range(2):
            hidden = set() if seen is None else {*seen[user].tolist()}
            for item, prefix in enumerate(prefixes):
                below = [value for other, value in enumerate(log_values[user].double().tolist())
                         if prefixes[other] == prefix and other not in hidden]
                if below:
                    smallest = log_values[user].max().item() + math.log(1e-300)
                    assert found[user, item].item() == pytest.approx(max(np.logaddexp.reduce(below), smallest),
                                                                     rel=1e-4, abs=1e-4)


def test_the_mass_by_hand():
    trie = Trie(CODES, SIZES)  # in the order of the IDs, the items are 1, 2, 0 and 3
    log_values = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(2, 1)
    whole, by_first, *_ = trie.log_masses(log_values, padded([], [2, 1]))
    assert torch.allclose(whole.exp(), torch.tensor([[1.0], [0.5]]))
    assert torch.allclose(by_first.exp(), torch.tensor([[0.2, 0.8], [0, 0.5]]))  # of the prefixes (0) and (1)


def test_a_narrow_beam_finds_the_best_item_of_a_prior_with_a_large_weight():
    # The prefix 0 has many items with a small probability, and the prefix 1 has the best item.
    codes = torch.tensor([[0, code] for code in range(9)] + [[1, 0]])
    even = [np.log([[0.5, 0.5]]), np.log([[1 / 9] * 9])]
    prior = Prior(torch.tensor([[0.08] * 9 + [0.28]]).log(), torch.full((1, 1), 8.0))
    assert search(codes, [2, 9], even, 1, 1, prior=prior).items.tolist() == [[9]]
