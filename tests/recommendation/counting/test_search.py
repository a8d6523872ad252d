"""The search of settings, and the ranks that it compares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from recommendation.counting import validation
from recommendation.counting.search import GRID, STARTS, Settings, choose_settings, single_moves
from recommendation.counting.validation import Validation, hold_out_last

ALL_AUTO = Settings(*[None] * len(Settings._fields))


def quality(settings: Settings) -> tuple[float, float]:
    """A metric that is best for small distances if all items count, and for large weights of the neighbours if not."""
    return (-float(settings.pair_distance),
            float(settings.neighbour_weight) - abs(settings.recency - 0.3) + (settings.neighbours_from == "td"))


def test_the_search_climbs_to_the_best_of_each_protocol():
    tried = []
    found = choose_settings(ALL_AUTO, 200, 20, ["tfidf", "td"],
                            lambda settings: tried.append(settings) or quality(settings), "search")
    assert found.all_items.pair_distance == 1
    assert (found.unseen_items.neighbour_weight, found.unseen_items.recency) == (4.0, 0.3)
    assert found.unseen_items.neighbours_from == "td"
    assert len(tried) == len(set(tried)) == found.num_trials <= 200
    assert all(value in values for settings in tried
               for value, values in zip(settings[:-1], GRID[:-1], strict=True))
    assert found == choose_settings(ALL_AUTO, 200, 20, ["tfidf", "td"], quality, "search")


def test_only_the_best_first_trials_are_tried_with_another_source():
    tried = []
    choose_settings(ALL_AUTO, len(STARTS) + 2, 20, ["tfidf", "td"],
                    lambda settings: tried.append(settings) or quality(settings), "search")
    first, then = tried[:len(STARTS)], tried[len(STARTS):]
    assert {settings.neighbours_from for settings in first} == {"tfidf"}
    # the start with the smallest distance has the best metric of both protocols, because its neighbours weigh most
    [best] = [settings for settings in first if settings.pair_distance == 5]
    assert then[0] == best._replace(neighbours_from="td")


def test_a_move_to_another_source_gives_its_neighbours_a_weight():
    grid = [[value] for value in (4, 0.1, 0.2, 0.3, 0.4)] + [[0.0, 0.1, 0.3], [6], [0.7], ["tfidf", "td"]]
    without = Settings(4, 0.1, 0.2, 0.3, 0.4, 0.0, 6, 0.7, "tfidf")
    other = without._replace(neighbours_from="td")
    assert single_moves(without, grid) == [other._replace(neighbour_weight=0.1),
                                           without._replace(neighbour_weight=0.1)]
    assert other._replace(neighbour_weight=0.3) in single_moves(without._replace(neighbour_weight=0.3), grid)


def test_fixed_settings_and_limits_are_kept():
    tried = []
    given = ALL_AUTO._replace(backward=0.123, num_newest=7)
    found = choose_settings(given, 15, 2, ["tfidf"],
                            lambda settings: tried.append(settings) or quality(settings), "search")
    assert found.num_trials == len(tried) == 15
    assert {(settings.backward, settings.num_newest) for settings in tried} == {(0.123, 7)}
    assert max(settings.pair_distance for settings in tried) <= 2


def test_fixed_settings_need_no_trial():
    given = Settings(4, 0.1, 0.2, 0.3, 0.4, 0.5, 6, 0.7, "tfidf")
    found = choose_settings(given, 40, 20, ["tfidf", "td"], lambda settings: pytest.fail("a trial"), "search")
    assert found == (given, given, 0)


def test_the_last_event_of_each_sequence_is_held_out():
    held_out = hold_out_last(np.array([5, 6, 7, 8, 9, 1]), np.array([0, 3, 4, 6]))
    assert held_out.items.tolist() == [5, 6, 8, 9]
    assert held_out.offsets.tolist() == [0, 2, 3, 4]
    assert (held_out.starts.tolist(), held_out.ends.tolist()) == ([0, 4], [2, 5])


HISTORIES = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=6), min_size=1, max_size=5)


@given(HISTORIES, st.integers(1, 4), st.sampled_from([0.5, 1.0]), st.integers(0, 20), st.sampled_from([0.0, 0.1]))
def test_ndcg_agrees_with_sorting_all_items(histories, num_newest, recency, seed, dense_share):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 3, (6, 6)) * (rng.random((6, 6)) < 0.4).astype(np.float32)  # with many equal scores
    popularity = rng.integers(0, 3, 6)
    expected: list[list[float]] = [[], []]
    for *history, target in histories:
        scores = sum(recency**lag * matrix[item] for lag, item in enumerate(history[::-1][:num_newest]))
        order = sorted(range(6), key=lambda item: (-scores[item], -popularity[item], item))
        for protocol, ranking in enumerate((order, [item for item in order if item not in history])):
            expected[protocol].append(1 / np.log2(ranking.index(target) + 2) if target in ranking else 0)
    ends = np.cumsum([len(history) for history in histories])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "DENSE_SHARE", dense_share)
        patch.setattr(validation, "DENSE_CELLS", int(10 * dense_share * 100))
        patch.setattr(validation, "BLOCK_EVENTS", 2)
        events = Validation(np.array(sum(histories, [])), np.concatenate([[0], ends[:-1]]), ends - 1, popularity)
        found = events.ndcg(sparse.csr_matrix(matrix, dtype=np.float32), num_newest, recency)
    assert found == pytest.approx(np.mean(expected, axis=1))
