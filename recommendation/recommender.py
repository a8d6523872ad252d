"""The Python interface to a trained recommender. Users and items are given by their raw ids."""

import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import DatasetFolder
from common.cli import ROOT, check_name
from common.errors import ConfigError
from recommendation.dataset import Sequences
from recommendation.evaluator import Ranking, cannot_rank, evaluate, rank
from recommendation.histories import Histories, Lookup, Query
from recommendation.inputs import Choice
from recommendation.metrics import PROTOCOLS
from recommendation.models import config_path
from recommendation.runs import LoadedRun, load_recommender

log = logging.getLogger(__name__)

SPLITS = ("valid", "test")
NUM_NAMED = 5  # a warning lists at most this many unknown items


class RecommendedItem(NamedTuple):
    raw_id: str
    title: str
    score: float


class Result(NamedTuple):
    """The answer to a query."""

    user: str | None              # the user of the query
    items: list[RecommendedItem]  # best first
    num_known: int                # number of items of the history that are in the catalogue
    unknown: list[str]            # skipped raw ids of the history, which are not in the catalogue
    fallback: bool                # True if the history has no known item; `items` are then the most popular items


class Recommender:
    """A trained recommender, with the items and users of its dataset."""

    def __init__(self, run: LoadedRun, lookup: Lookup):
        self.run, self.lookup = run, lookup

    @classmethod
    def load(cls, dataset: str, model: str = "encoder_decoder", quantizer: str = "rqvae", suffix: str = "td",
             tag: str | None = None, run: str | None = None, data_root: str | Path | None = None,
             run_root: str | Path | None = None, device: str | None = "auto") -> "Recommender":
        """Load the recommender of a finished run.

        run: id of the run; None for the newest finished run
        device: device to compute on; None for the device in the run's configuration

        Raises ConfigError if the dataset or the model is unknown. Raises DataError if no such run exists. Raises
        ArtifactError if the dataset or the semantic IDs have changed since the training.
        """
        for where, name in (("dataset", dataset), ("quantizer", quantizer), ("suffix", suffix), ("tag", tag),
                            ("run", run)):
            check_name(where, name)
        config_path(model)
        folder = DatasetFolder(Path(data_root or ROOT / "data"), dataset)
        folder.require()
        loaded = load_recommender(folder, Path(run_root or ROOT / "runs"), Choice(model, quantizer, suffix, tag),
                                  device, run)
        return cls(loaded, Lookup(folder, Sequences.load(folder, "cpu")))

    def recommend(self, histories: Iterable[Iterable[str]], k: int = 10,
                  filter_seen: bool | None = None) -> list[list[RecommendedItem]]:
        """Return the `k` best items for each history, best first.

        A history is a list of raw item ids, oldest first. Unknown ids are skipped with a warning. If a history has no
        known item, the result is the most popular items. If too few items are available, the result is shorter.

        filter_seen: whether to exclude the items of the history from the result; None to use the run's setting
        """
        queries = [Query(None, _checked(history, number), f"histories[{number}]")
                   for number, history in enumerate(histories)]
        if k < 1:
            raise ConfigError("k", f"must be at least 1, got {k}", fix="pass k=10")
        return [result.items for result in self.answer(queries, k, filter_seen)]

    def evaluate(self, split: str = "test", filter_seen: bool | None = None) -> dict:
        """Evaluate the recommender on a split ("valid" or "test"), and return the metrics.

        filter_seen: whether to exclude the items of the history from the lists; None to use the run's setting
        """
        if split not in SPLITS:
            raise ConfigError("split", f"unknown split {split!r}", fix="pass 'valid' or 'test'")
        self.run.model.prepare()  # as after the training
        sequences = Sequences.load(self.lookup.folder, self.run.device)
        protocol = "unseen" if self._excludes_seen(filter_seen) else "all"
        return evaluate(self.run.ranker, sequences, split, self.run.config.training_params, protocol)[1]

    def _excludes_seen(self, filter_seen: bool | None) -> bool:
        return PROTOCOLS[self.run.protocol] if filter_seen is None else filter_seen

    @cached_property
    def _popularity(self) -> np.ndarray:
        """The number of training events of each item."""
        return self.lookup.sequences.training_counts(len(self.lookup.raw_ids))

    def answer(self, queries: list[Query], k: int, filter_seen: bool | None = None) -> list[Result]:
        """Return one `Result` with the recommended items for each query.

        Logs warnings, for example about unknown items. Raises DataError if a query without a history names an unknown
        user.
        """
        histories, num_items = self.lookup.histories(queries), len(self.lookup.raw_ids)
        if len(queries) > num_items:
            self.run.model.prepare()
        params = self.run.config.training_params
        ranking = rank(self.run.ranker, histories, self._popularity, params, k, self._excludes_seen(filter_seen),
                       self.run.device)
        answered = ~ranking.fallback
        if warning := cannot_rank(self.run.model, ranking.items[answered], ranking.scores[answered]):
            log.warning("%s", warning)
        _warn(histories, ranking, k, num_items, params["max_history"])
        return [Result(histories.users[row], self._items(ranking, row), int(num_known), histories.unknown[row],
                       bool(ranking.fallback[row])) for row, num_known in enumerate(histories.lengths)]

    def _items(self, ranking: Ranking, row: int) -> list[RecommendedItem]:
        """Return the items in one row of the ranking, without the empty positions."""
        found = ranking.items[row] >= 0
        items, scores = ranking.items[row][found], ranking.scores[row][found].astype(float).round(6)
        return [RecommendedItem(self.lookup.raw_ids[item], self.lookup.titles[item], score)
                for item, score in zip(items, scores.tolist(), strict=True)]


def _checked(history: Iterable[str], number: int) -> list[str]:
    """Return the history as a list. Raises ConfigError if the history is not a list of strings."""
    words = [history] if isinstance(history, str) else list(history)
    if isinstance(history, str) or not all(isinstance(word, str) for word in words):
        wrong = next((word for word in words if not isinstance(word, str)), history)
        raise ConfigError(f"histories[{number}]", f"must be a list of raw ids, got {wrong!r}",
                          "Raw ids must be strings", "pass lists of strings, such as [['A', 'B']]")
    return words


def _warn(histories: Histories, ranking: Ranking, k: int, num_items: int, max_history: int) -> None:
    unknown = [raw_id for row in histories.unknown for raw_id in row]
    named = ", ".join([*map(repr, unknown[:NUM_NAMED]), *["…"] * (len(unknown) > NUM_NAMED)])
    num_empty, num_long = int(ranking.fallback.sum()), int((histories.lengths > max_history).sum())
    num_short = int((ranking.items < 0).any(axis=1).sum())
    for what, count, more in (
            ("unknown items skipped", len(unknown), f" ({named})"),
            ("histories without a known item, for which the most popular items are recommended", num_empty, ""),
            (f"histories longer than {max_history} items, in which older items are ignored", num_long, ""),
            (f"histories with fewer than {k} recommendations, because no more items are available", num_short, "")):
        if count:
            log.warning("recommendation: %s: %d%s", what, count, more)
    if k > num_items:
        log.warning("recommendation: %d items per history were requested, but the catalogue has only %d items", k,
                    num_items)
