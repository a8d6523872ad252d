"""The metrics: each is one function, and the flags, the evaluation and the tables know it from here. Without torch."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# B targets, k results

CUTOFFS = (1, 5, 10, 20)


class RankedLists(NamedTuple):
    """The recommended lists, and the places of the targets in them."""

    ranks: np.ndarray  # (B,) 1 for the best; infinity where the target is not listed
    items: np.ndarray  # (B, k) best first; -1 where there is none
    num_items: int     # in the catalogue


class Metric(NamedTuple):
    compute: Callable         # (lists, cutoff) -> a value for each target, or one of all lists
    columns: tuple[int, ...]  # cutoffs at which tables show it
    of_targets: bool          # whether there is one for each target, so that the mean has a standard error


METRICS: dict[str, Metric] = {}


def metric(*columns: int, of_targets: bool = True) -> Callable:
    """Make a function a metric, which tables show at the cutoffs `columns`."""
    def register(function: Callable) -> Callable:
        METRICS[function.__name__] = Metric(function, columns, of_targets)
        return function

    return register


@metric(5, 10, 20)
def recall(lists: RankedLists, cutoff: int) -> np.ndarray:
    """Whether the target is listed: with one target it equals the hit rate."""
    return (lists.ranks <= cutoff).astype(float)


@metric(5, 10)
def ndcg(lists: RankedLists, cutoff: int) -> np.ndarray:
    """1 / log2(1 + rank)."""
    return np.where(lists.ranks <= cutoff, 1 / np.log2(1 + lists.ranks), 0.0)


@metric(20)
def mrr(lists: RankedLists, cutoff: int) -> np.ndarray:
    """1 / rank."""
    return np.where(lists.ranks <= cutoff, 1 / lists.ranks, 0.0)


@metric(10, of_targets=False)
def coverage(lists: RankedLists, cutoff: int) -> float:
    """The share of the catalogue that is in any list."""
    listed = np.unique(lists.items[:, :cutoff])
    return int((listed >= 0).sum()) / lists.num_items


def names() -> list[str]:
    """Every metric with its cutoff, such as `ndcg@10`."""
    return [f"{name}@{cutoff}" for name in METRICS for cutoff in CUTOFFS]


def columns(cutoffs: tuple[int, ...] = CUTOFFS, kinds: tuple[bool, ...] = (True, False)) -> list[str]:
    """The metrics that a table shows, by cutoff; `kinds` are values of `Metric.of_targets`."""
    return [f"{name}@{cutoff}" for kind in kinds for cutoff in cutoffs for name, metric in METRICS.items()
            if metric.of_targets is kind and cutoff in metric.columns]


def measure(lists: RankedLists) -> dict[str, float]:
    """Every metric at every cutoff; `<metric>@<cutoff>_stderr` is a mean's standard error over the targets."""
    means: dict[str, float] = {}
    shares: dict[str, float] = {}
    for cutoff in CUTOFFS:
        for name, metric in METRICS.items():
            value, key = metric.compute(lists, cutoff), f"{name}@{cutoff}"
            if metric.of_targets:
                means |= {key: float(value.mean()), f"{key}_stderr": float(value.std() / np.sqrt(len(value)))}
            else:
                shares[key] = float(value)
    return means | shares


def mean_and_deviation(runs: list[dict]) -> dict[str, dict[str, float | None]]:
    """`metric -> {mean, deviation}` over seeds; the sample's standard deviation, None for a single seed."""
    values = {name: np.array([run[name] for run in runs]) for name, value in runs[0].items()
              if isinstance(value, float) and not name.endswith("_stderr") and all(name in run for run in runs)}
    return {name: {"mean": float(value.mean()), "deviation": float(value.std(ddof=1)) if len(value) > 1 else None}
            for name, value in values.items()}
