"""The choice of the settings of a count on validation events, for all items and for unseen items."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from common.progress import Progress


class Settings(NamedTuple):
    """The settings of a count. `config.yaml` of the model `counting` explains them."""

    pair_distance: Any
    distance_decay: Any
    backward: Any
    source_exponent: Any
    popularity_exponent: Any
    neighbour_weight: Any
    num_newest: Any
    recency: Any
    neighbours_from: Any  # the source of the neighbours, see the training parameter of this name


class Chosen(NamedTuple):
    """The best settings for each protocol, and the number of trials."""

    all_items: Settings
    unseen_items: Settings
    num_trials: int


# The values that the search tries for each setting. The sources of neighbours depend on the dataset.
GRID = Settings([1, 2, 3, 5, 10, 20], [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.0, 0.1, 0.3, 0.5, 0.7, 1.0],
                [0.0, 0.3, 0.5, 0.65, 0.8, 1.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7],
                [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0], [1, 2, 3, 5, 10, 20, 50],
                [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [])
# The first trials: settings that had a high validation NDCG@10 on datasets of different density.
STARTS = [Settings(20, 0.9, 0.3, 0.5, 0.1, 0.3, 20, 0.6, None), Settings(20, 0.9, 0.7, 0.65, 0.5, 0.0, 50, 0.8, None),
          Settings(20, 0.8, 0.1, 0.8, 0.2, 0.0, 20, 0.7, None), Settings(5, 0.6, 0.3, 0.5, 0.0, 1.0, 10, 0.6, None),
          Settings(20, 0.9, 0.1, 0.0, 0.1, 0.3, 3, 0.5, None)]

Evaluate = Callable[[Settings], tuple[float, float]]


def choose_settings(given: Settings, num_trials: int, largest_distance: int, sources: list[str], evaluate: Evaluate,
                    title: str) -> Chosen:
    """Search the settings that are None in `given`, separately for all items and for unseen items.

    largest_distance: largest value of `pair_distance` to try
    sources: values of `neighbours_from` to try
    evaluate: function that returns the metric of the settings for both protocols; one call is one trial
    title: title of the progress bar

    The first trials are the settings in `STARTS` with the first source of neighbours, and then the best of these with
    the other sources. Every further trial changes one setting of the best settings so far by one step of `GRID`, in
    turn for each protocol. The search is deterministic.
    """
    tries = GRID._replace(pair_distance=[distance for distance in GRID.pair_distance if distance <= largest_distance],
                          neighbours_from=sources)
    grid = [values if value is None else [value] for value, values in zip(given, tries, strict=True)]
    starts = [Settings._make([*(min(values, key=lambda value: abs(value - wanted))
                                for values, wanted in zip(grid[:-1], start[:-1], strict=True)), grid[-1][0]])
              for start in STARTS]
    if num_trials == 0 or all(len(values) == 1 for values in grid):
        return Chosen(starts[0], starts[0], 0)
    generator = np.random.default_rng(0)
    tried: dict[Settings, tuple[float, float]] = {}
    with Progress(title, num_trials, "trials") as progress:
        def attempt(settings: Settings) -> None:
            if settings not in tried and len(tried) < num_trials:
                tried[settings] = evaluate(settings)
                progress.update(all_items=tried[best_of(tried, 0)][0], unseen_items=tried[best_of(tried, 1)][1])

        for start in starts:
            attempt(start)
        for best in [best_of(tried, protocol) for protocol in (0, 1)]:
            for other in other_sources(best, grid):
                attempt(other)
        while len(tried) < num_trials:
            moves = [[move for move in single_moves(best_of(tried, protocol), grid) if move not in tried]
                     for protocol in (0, 1)]
            if not any(moves):
                break  # no single change can be better
            for of_protocol in filter(None, moves):
                attempt(of_protocol[generator.integers(len(of_protocol))])
    return Chosen(best_of(tried, 0), best_of(tried, 1), len(tried))


def best_of(tried: dict[Settings, tuple[float, float]], protocol: int) -> Settings:
    """Return the settings with the best metric; if several are equal, the first of them."""
    return max(tried, key=lambda settings: tried[settings][protocol])


def single_moves(settings: Settings, grid: list[list]) -> list[Settings]:
    """Return the settings that differ from `settings` by another source, or by one step of one other setting."""
    moves = other_sources(settings, grid)
    for name, before, values in zip(Settings._fields[:-1], settings[:-1], grid[:-1], strict=True):
        place = values.index(before)
        moves += [settings._replace(**{name: value})
                  for value in values[max(place - 1, 0):place] + values[place + 1:place + 2]]
    return moves


def other_sources(settings: Settings, grid: list[list]) -> list[Settings]:
    """Return `settings` with each other source of neighbours.

    If neighbours have no weight, another source has an effect only together with the smallest weight.
    """
    weights = grid[Settings._fields.index("neighbour_weight")]
    weight = settings.neighbour_weight or min(weights, key=lambda value: (value == 0, value))
    return [settings._replace(neighbours_from=source, neighbour_weight=weight)
            for source in grid[-1] if source != settings.neighbours_from]
