"""A trained recommender for use from Python and by recommend.py: raw ids in; raw ids, titles and scores out."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.artifacts import DatasetFolder
from common.cli import ROOT, check_name
from common.errors import ConfigError
from recommendation.dataset import Sequences
from recommendation.evaluator import Ranking, evaluate, rank
from recommendation.histories import Histories, Lookup, Query
from recommendation.models import config_path
from recommendation.runs import Choice, LoadedRun, load_recommender

log = logging.getLogger(__name__)

SPLITS = ("valid", "test")
NUM_NAMED = 5  # unknown items that a warning names


class RecommendedItem(NamedTuple):
    raw_id: str
    title: str
    score: float


class Result(NamedTuple):
    """The answer to a query."""

    user: str | None              # the user of the query
    items: list[RecommendedItem]  # best first
    num_known: int                # known items of the history
    unknown: list[str]            # raw ids of the history that are not in the catalogue; they were skipped
    fallback: bool                # the history has no known item, so these are the most popular items


class Recommender:
    """A finished run of a recommender together with the items and users of its dataset."""

    def __init__(self, run: LoadedRun, lookup: Lookup):
        self.run, self.lookup = run, lookup

    @classmethod
    def load(cls, dataset: str, model: str = "encoder_decoder", quantizer: str = "rqvae", suffix: str = "td",
             tag: str | None = None, run: str | None = None, data_root: str | Path | None = None,
             run_root: str | Path | None = None, device: str | None = "auto") -> "Recommender":
        """Load the run `run`, or the newest finished one. With `device=None` it computes where it was trained.

        Raises ConfigError for an unknown name, DataError if there is no such run, and ArtifactError if the dataset or
        the semantic IDs have changed since the run was trained.
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
                  filter_seen: bool = False) -> list[list[RecommendedItem]]:
        """Return the best `k` items for each history, best first; fewer if the catalogue has fewer.

        A history is a list of raw item ids, oldest first. Unknown ids are skipped with a warning; a history without
        a known item gets the most popular items. `filter_seen` leaves out the items of the history.
        """
        queries = [Query(None, _checked(history, number), f"histories[{number}]")
                   for number, history in enumerate(histories)]
        if k < 1:
            raise ConfigError("k", f"must be at least 1, got {k}", fix="pass k=10")
        return [result.items for result in self.answer(queries, k, filter_seen)]

    def evaluate(self, split: str = "test", filter_seen: bool | None = None) -> dict:
        """Return the metrics of a split ("valid" or "test"), as in the run's `metrics.json`.

        `filter_seen` leaves the items of the history out of every list; None: as the run was trained.
        """
        if split not in SPLITS:
            raise ConfigError("split", f"unknown split {split!r}", fix="pass 'valid' or 'test'")
        params = self.run.config.training_params
        if filter_seen is not None:
            params = {**params, "filter_seen": filter_seen}
        sequences = Sequences.load(self.lookup.folder, self.run.device)
        return evaluate(self.run.model, sequences, split, params)[1]

    def answer(self, queries: list[Query], k: int, filter_seen: bool) -> list[Result]:
        """Return the result of each query, and log warnings for unusual input.

        Raises DataError for a query about an unknown user.
        """
        histories, num_items = self.lookup.histories(queries), len(self.lookup.raw_ids)
        if len(queries) > num_items:
            self.run.model.prepare()
        params = self.run.config.training_params
        popularity = self.lookup.sequences.training_counts(num_items)
        ranking = rank(self.run.model, histories, popularity, params, k, filter_seen, self.run.device)
        _warn(histories, ranking, k, num_items, params["max_history"])
        return [Result(histories.users[row], self._items(ranking, row), int(num_known), histories.unknown[row],
                       bool(ranking.fallback[row])) for row, num_known in enumerate(histories.lengths)]

    def _items(self, ranking: Ranking, row: int) -> list[RecommendedItem]:
        """Return the items of a row of the ranking without its empty positions."""
        found = ranking.items[row] >= 0
        items, scores = ranking.items[row][found], ranking.scores[row][found].astype(float).round(6)
        return [RecommendedItem(self.lookup.raw_ids[item], self.lookup.titles[item], score)
                for item, score in zip(items, scores.tolist(), strict=True)]


def _checked(history: Iterable[str], number: int) -> list[str]:
    """Reject a single id in place of a list, and ids that are not text."""
    words = [history] if isinstance(history, str) else list(history)
    if isinstance(history, str) or not all(isinstance(word, str) for word in words):
        wrong = next((word for word in words if not isinstance(word, str)), history)
        raise ConfigError(f"histories[{number}]", f"must be a list of raw ids, got {wrong!r}", "A raw id is text",
                          "pass lists of strings, such as [['A', 'B']]")
    return words


def _warn(histories: Histories, ranking: Ranking, k: int, num_items: int, max_history: int) -> None:
    unknown = [raw_id for row in histories.unknown for raw_id in row]
    named = ", ".join([*map(repr, unknown[:NUM_NAMED]), *["…"] * (len(unknown) > NUM_NAMED)])
    num_empty, num_long = int(ranking.fallback.sum()), int((histories.lengths > max_history).sum())
    num_short = int((ranking.items < 0).any(axis=1).sum())
    for what, count, more in (
            ("unknown items skipped", len(unknown), f" ({named})"),
            ("histories without a known item, ranked by popularity", num_empty, ""),
            (f"histories longer than {max_history} items, of which only the newest items are used", num_long, ""),
            (f"histories with fewer than {k} recommendations, because no other items are left", num_short, "")):
        if count:
            log.warning("recommendation: %s: %d%s", what, count, more)
    if k > num_items:
        log.warning("recommendation: %d items per history were requested, but the catalogue has only %d", k, num_items)
