"""The base class of the models that count: `transitions`, `neighbours` and `counting`."""

import logging
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from common.errors import DataError
from recommendation.counting.counts import Counts
from recommendation.counting.neighbours import as_matrix
from recommendation.counting.search import GRID, Chosen, Settings, choose_settings
from recommendation.counting.teacher import CountTeacher, UserEvents
from recommendation.counting.transitions import count_pairs, largest_distance
from recommendation.counting.validation import Validation, hold_out_last
from recommendation.counting.weights import Weights

from .abstract_model import AbstractRecommender, Catalogue, HeldOut, Recommendations, Windows, top_items
from .params import Params

log = logging.getLogger(__name__)

# B batch, W length of the longest history, N items, S largest number of seen items of a history

NUM_EVENTS = 8_000         # a trial ranks at most this many validation events
BLOCK_SCORES = 16_000_000  # scores that are computed at a time
# The values of the settings that a model does not have. They also give the type of each setting.
UNUSED = Settings(pair_distance=1, distance_decay=1.0, backward=0.0, source_exponent=0.0, popularity_exponent=0.0,
                  neighbour_weight=0.0, num_newest=1, recency=1.0, neighbours_from="")


class CountingModel(AbstractRecommender):
    """A baseline that adds up the weights between the newest items of the history and each item.

    `Weights.matrix` defines the weights, and `Counts` the scores. `fit` chooses the settings on validation events, once
    for `recommend` and once for `recommend_unseen`, so the two methods may give different scores.
    """

    needs_codes = False
    name: ClassVar[str]                  # key of the model in the configuration
    settings: ClassVar[tuple[str, ...]]  # the settings that the model has

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        params = Params(config, self.name)
        self.given = UNUSED._replace(**{key: params.number_or_auto(key, type(getattr(UNUSED, key)))
                                        for key in self.settings if key != "neighbours_from"})
        if self.needs_neighbours:
            self.given = self.given._replace(neighbours_from=None)
        self.num_trials = params.count("num_trials")
        self.all_items, self.unseen_items = Counts(catalogue.num_items), Counts(catalogue.num_items)
        self.chosen: Chosen | None = None

    def fit(self, sequences: list[Tensor], validation: HeldOut) -> bool:
        items, offsets = (part.cpu().numpy() for part in sequences)
        distance, similar = 0, {}
        if "pair_distance" in self.settings:
            distance = self._largest_distance(offsets)
        if self.needs_neighbours:
            assert self.catalogue.neighbours is not None, "the catalogue has no neighbours"
            similar = {source: as_matrix(*(part.cpu().numpy() for part in of_source))
                       for source, of_source in self.catalogue.neighbours.items()}
        weights = self._weights(items, offsets, distance, similar)
        popularity = np.bincount(items, minlength=self.catalogue.num_items)
        folds = []
        if None in self.given[:-1] or len(similar) > 1:
            held_out = Validation(*_at_most(NUM_EVENTS, *(part.cpu().numpy() for part in validation)), popularity)
            folds = [Fold(weights, held_out)]
            # A few hundred events would be too few to compare settings. So the last training events are a second fold.
            if (num_missing := NUM_EVENTS - len(held_out.ends)) > 0:
                earlier = hold_out_last(items, offsets)
                last = Validation(*_at_most(num_missing, items, earlier.starts, earlier.ends),
                                  np.bincount(earlier.items, minlength=len(popularity)))
                folds.append(Fold(self._weights(earlier.items, earlier.offsets, distance, similar), last))
        num_trials = self.num_trials if any(len(fold.held_out.ends) for fold in folds) else 0
        self.chosen = choose_settings(self.given, num_trials, distance, list(similar),
                                      lambda settings: mean_ndcg(folds, settings), f"search {self.name}")
        for counts, chosen in zip((self.all_items, self.unseen_items), self.chosen[:2], strict=True):
            counts.fill(weights.matrix(chosen), popularity, chosen.num_newest, chosen.recency)
        return True

    def _weights(self, items: np.ndarray, offsets: np.ndarray, distance: int,
                 similar: dict[str, sparse.csr_matrix]) -> Weights:
        return Weights(count_pairs(items, offsets, self.catalogue.num_items, distance) if distance else None, similar)

    def _largest_distance(self, offsets: np.ndarray) -> int:
        """Return the largest distance of a pair of events, so that the pairs fit in the memory.

        Raises DataError if a fixed value of `pair_distance` is too large.
        """
        wanted = self.given.pair_distance or max(GRID.pair_distance)
        largest = largest_distance(offsets, wanted)
        if largest < wanted and self.given.pair_distance:
            raise DataError(f"{self.name}.model_params.pair_distance", f"{wanted} gives too many pairs of events",
                            "They would not fit in the memory", f"use auto, or a value of at most {largest}")
        if largest < wanted:
            log.info("recommendation: %s counts pairs of events at distances up to %d instead of %d, because there "
                     "would be too many pairs for the memory", self.name, largest, wanted)
        return largest

    def find_problem(self) -> str:
        return self.all_items.find_problem() or self.unseen_items.find_problem()

    def score_items(self, histories: Windows) -> Tensor:
        return _with_ties(self.all_items, histories)

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self._best(self.all_items, histories, None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self._best(self.unseen_items, histories, seen, top_k)

    def _best(self, counts: Counts, histories: Windows, seen: Tensor | None, top_k: int) -> Recommendations:
        """Return the best items for each history, for a few histories at a time to save memory."""
        num_rows = max(BLOCK_SCORES // self.catalogue.num_items, 1)
        found = []
        for first in range(0, len(histories.items), num_rows):
            rows = slice(first, first + num_rows)
            scores = _with_ties(counts, Windows(histories.items[rows], histories.lengths[rows]))
            found.append(top_items(scores, top_k, None if seen is None else seen[rows]))
        return Recommendations(*(torch.cat(part) for part in zip(*found, strict=True)))

    def log_probabilities(self, histories: Windows, unseen: bool) -> Tensor:
        """Return the log-probability of every item for each history, (B, N) float32. See `Counts.log_probabilities`.

        unseen: whether to use the settings for `recommend_unseen`; the items of the history keep their probability
        """
        return (self.unseen_items if unseen else self.all_items).log_probabilities(*histories[:2])

    def teacher(self, events: UserEvents, weight: float, unseen: bool, temperature: float) -> CountTeacher:
        """Return a teacher with the settings for `recommend`, or for `recommend_unseen` if `unseen`."""
        return CountTeacher(self.unseen_items if unseen else self.all_items, events, weight, unseen, temperature)

    def properties(self) -> dict:
        if self.chosen is None:
            return {}
        values = {protocol: {key: getattr(settings, key) for key in self.settings}
                  for protocol, settings in zip(Chosen._fields, self.chosen[:2], strict=False)}
        return {"settings": values, "num_trials": self.chosen.num_trials}


def _with_ties(counts: Counts, histories: Windows) -> Tensor:
    """Return the scores of all items for each history, (B, N). If they are equal, the more popular item is better."""
    scores, popularity = counts.scores(*histories[:2]), counts.popularity.double()
    share = popularity / popularity.max().clamp(min=1)
    # The differences must be smaller than those of any two scores, so they are relative to the score.
    return torch.where(scores > 0, scores * (1 + 1e-9 * share), 1e-100 * share)


class Fold(NamedTuple):
    """Events to compare settings on, and the weights that are counted without these events."""

    weights: Weights
    held_out: Validation


def mean_ndcg(folds: list[Fold], settings: Settings) -> tuple[float, float]:
    """Return the mean NDCG@10 over the events of all folds, among all items and among unseen items."""
    values = [fold.held_out.ndcg(fold.weights.matrix(settings), settings.num_newest, settings.recency)
              for fold in folds]
    all_items, unseen_items = np.average(values, axis=0, weights=[len(fold.held_out.ends) for fold in folds]).tolist()
    return all_items, unseen_items


def _at_most(count: int, items: np.ndarray, starts: np.ndarray,
             ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return at most `count` of the events, a fixed random subset. The events are those of `HeldOut`."""
    chosen = np.random.default_rng(0).permutation(len(ends))[:count]
    return items, starts[chosen], ends[chosen]
