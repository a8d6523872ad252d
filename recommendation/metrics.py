"""Definitions of all metrics. This module does not import torch."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.errors import ConfigError

# B targets, k items in a list

CUTOFFS = (1, 5, 10, 20)
PROTOCOLS = {"all": False, "unseen": True}  # name -> whether the items of the history are excluded

# The parts of metrics.json with metrics: the model alone, and with a prior also the prior alone and both together.
# Users get the last part.
RANKERS = ("alone", "prior", "both")
SORTED_BY = "ndcg@10"  # the validation metric that sorts comparisons


class RankedLists(NamedTuple):
    """For each target, a list of recommended items, and the rank of the target in this list."""

    ranks: np.ndarray  # (B,) 1 is the best; infinity if the target is not in the list
    items: np.ndarray  # (B, k) best first; -1 is an empty position
    num_items: int     # number of items in the catalogue


class Metric(NamedTuple):
    """A metric: how to compute it, and at which cutoffs tables show it."""

    compute: Callable         # (lists, cutoff) -> one value per target, (B,), or one number for all lists
    columns: tuple[int, ...]  # cutoffs at which tables show the metric
    per_target: bool          # whether `compute` returns one value per target
    bounds: tuple[float, float]  # the smallest and the largest possible value


METRICS: dict[str, Metric] = {}


def metric(*columns: int, per_target: bool = True, bounds: tuple[float, float] = (0, 1)) -> Callable:
    """Decorator that registers a function as a metric. Tables show the metric at the cutoffs in `columns`."""
    def register(function: Callable) -> Callable:
        METRICS[function.__name__] = Metric(function, columns, per_target, bounds)
        return function

    return register


@metric(5, 10, 20)
def recall(lists: RankedLists, cutoff: int) -> np.ndarray:
    """1 if the rank of the target is at most `cutoff`, else 0."""
    return (lists.ranks <= cutoff).astype(float)


@metric(5, 10)
def ndcg(lists: RankedLists, cutoff: int) -> np.ndarray:
    """1 / log2(1 + rank) if the rank of the target is at most `cutoff`, else 0."""
    return np.where(lists.ranks <= cutoff, 1 / np.log2(1 + lists.ranks), 0.0)


@metric(20)
def mrr(lists: RankedLists, cutoff: int) -> np.ndarray:
    """1 / rank if the rank of the target is at most `cutoff`, else 0."""
    return np.where(lists.ranks <= cutoff, 1 / lists.ranks, 0.0)


@metric(10, per_target=False)
def coverage(lists: RankedLists, cutoff: int) -> float:
    """Share of the catalogue that occurs in the first `cutoff` positions of at least one list."""
    listed = np.unique(lists.items[:, :cutoff])
    return int((listed >= 0).sum()) / lists.num_items


CODE_HITS = ("code_recall@10", "code_ndcg@10")


def code_metrics(items: np.ndarray, targets: np.ndarray, group_of: np.ndarray) -> dict[str, float]:
    """Return Recall@10 and NDCG@10 in which all items with the target's semantic ID before disambiguation are hits.

    items: (B, k) best first; -1 is an empty position
    targets: (B,)
    group_of: (N,) number of the semantic ID of each item before disambiguation

    A list of items becomes a list of different IDs. This is what a model without disambiguation would generate.
    """
    groups = np.where(items >= 0, group_of[items], -1)
    is_first = np.ones(groups.shape, dtype=bool)
    for place in range(1, groups.shape[1]):
        is_first[:, place] = (groups[:, :place] != groups[:, place:place + 1]).all(axis=1)
    hit = groups == group_of[targets][:, None]
    ranks = np.where(hit.any(axis=1), np.take_along_axis(is_first.cumsum(axis=1), hit.argmax(axis=1)[:, None], 1)[:, 0],
                     np.inf)
    lists = RankedLists(ranks, items, len(group_of))
    return {"code_recall@10": float(recall(lists, 10).mean()), "code_ndcg@10": float(ndcg(lists, 10).mean())}


def names() -> list[str]:
    """Return the names of all metrics with all cutoffs, such as `ndcg@10`."""
    return [f"{name}@{cutoff}" for name in METRICS for cutoff in CUTOFFS]


def columns(cutoffs: tuple[int, ...] = CUTOFFS, kinds: tuple[bool, ...] = (True, False)) -> list[str]:
    """Return the names of the metrics that tables show, such as `ndcg@10`, sorted by kind and then by cutoff.

    kinds: True for the metrics with one value per target, False for the metrics with one value for all lists
    """
    return [f"{name}@{cutoff}" for kind in kinds for cutoff in cutoffs for name, metric in METRICS.items()
            if metric.per_target is kind and cutoff in metric.columns]


def measure(lists: RankedLists) -> dict[str, float]:
    """Return the value of every metric at every cutoff, as a dict with keys such as `ndcg@10`.

    For a metric with one value per target, this is the mean over the targets. The dict also has the standard error of
    the mean, with a key such as `ndcg@10_stderr`. Raises ConfigError if a value is not within the bounds of its metric.
    """
    means: dict[str, float] = {}
    shares: dict[str, float] = {}
    for cutoff in CUTOFFS:
        for name, metric in METRICS.items():
            value, key = metric.compute(lists, cutoff), f"{name}@{cutoff}"
            (low, high), array = metric.bounds, np.asarray(value)
            if not (np.isfinite(array) & (array >= low) & (array <= high)).all():
                raise ConfigError(f"{__name__}.{name}", f"returned a value that is not from {low} to {high}",
                                  fix="correct the metric, or write @metric(..., bounds=(smallest, largest)) above it")
            if metric.per_target:
                means |= {key: float(value.mean()), f"{key}_stderr": float(value.std() / np.sqrt(len(value)))}
            else:
                shares[key] = float(value)
    return means | shares


def mean_and_deviation(runs: list[dict]) -> dict[str, dict[str, float | None]]:
    """Return the mean and the standard deviation of each metric over runs with different seeds.

    The keys are the metrics that all runs have. The values are dicts with the keys `mean` and `deviation`. `deviation`
    is the sample standard deviation, or None for a single run.
    """
    values = {name: np.array([run[name] for run in runs]) for name, value in runs[0].items()
              if isinstance(value, float) and not name.endswith("_stderr") and all(name in run for run in runs)}
    return {name: {"mean": float(value.mean()), "deviation": float(value.std(ddof=1)) if len(value) > 1 else None}
            for name, value in values.items()}


def mean_over_runs(runs: list[dict]) -> dict[str, dict[str, dict]]:
    """Return the results of `mean_and_deviation` for runs with different seeds: ranker -> split -> protocol -> metric.

    runs: the contents of metrics.json
    """
    return {ranker: {split: {protocol: mean_and_deviation([run[ranker][split][protocol] for run in runs])
                             for protocol in PROTOCOLS} for split in ("valid", "test")}
            for ranker in RANKERS if ranker in runs[0]}
