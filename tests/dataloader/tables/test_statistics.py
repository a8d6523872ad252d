"""The statistics of a dataset, worked out by hand, and the printed report."""

import logging
import re

import pytest

from common.artifacts import filter_lines, load_meta
from dataloader.tables.statistics import report_lines
from tests.dataloader.helpers import mentions
from tests.dataloader.processing import run

DAY = 86_400
# Ten users; user n has n + 1 events, of which the last two are with "popular".
EVENTS = [(f"u{n}", "popular" if k > n - 2 else f"i{k}", n * DAY + k) for n in range(10) for k in range(n + 1)]


def numbers(line: str) -> list[float]:
    """The numbers of a line in rising order; p25 and the like are names."""
    return sorted(map(float, re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", line)))


def test_counts_density_and_percentiles(tmp_path):
    statistics = load_meta(run(tmp_path, EVENTS).folder.interactions, "")["statistics"]
    # u0 and u1 have 1 and 2 events, all with "popular"; the others 2 with it and one each with i0, i1, …
    assert (statistics["num_users"], statistics["num_items"], statistics["num_interactions"]) == (10, 9, 55)
    assert statistics["density"] == pytest.approx(55 / 90)
    assert statistics["events_of_a_user"] == {"mean": 5.5, "min": 1, "p25": 3, "median": 5, "p75": 8, "p90": 9,
                                              "p99": 10, "max": 10}
    # "popular" has 19; i0 has u2 to u9, that is 8, i1 has 7, … i7 has 1: 1 2 3 4 5 6 7 8 19
    assert statistics["events_of_an_item"] == {"mean": 6.11, "min": 1, "p25": 3, "median": 5, "p75": 7, "p90": 19,
                                               "p99": 19, "max": 19}
    assert (statistics["first_timestamp"], statistics["last_timestamp"]) == (0, 9 * DAY + 9)
    assert statistics["num_exact_duplicates"] == 0


def test_repeated_events_are_counted_without_the_first(tmp_path):
    events = [("a", "x", 1)] * 3 + [("a", "y", 1), ("a", "x", 2), ("b", "x", 1)] + [("b", "y", 1)] * 2
    meta = load_meta(run(tmp_path, events).folder.interactions, "")
    assert meta["statistics"]["num_exact_duplicates"] == 3
    # At the time 1, "a" has four events and "b" has three: all but the first of each follow an event at the same time.
    assert meta["statistics"]["num_equal_times"] == 3 + 2


def test_the_report_counts_removed_and_remaining_events(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metadata = [repr({"asin": "popular", "title": "Cup"})] * 2
    low = [("u9", "i0", 0, 1.0)] * 2  # rated low, and the same event twice
    options = run(tmp_path, [*EVENTS, *low], "--min_rating=2", "--min_user_interactions=5", metadata=metadata)
    report = [r.message.removeprefix("process: ") for r in caplog.records if r.levelno == logging.INFO]
    # 1 + 2 + 3 + 4 events are those of users with fewer than five.
    read, rating, core, counts, users, items, splits, targets, records = report[1:-1]
    assert numbers(read) == [57]
    assert numbers(rating) == [2, 2, 55]  # removed, the threshold, left
    assert numbers(core) == [0, 5, 10, 45]
    assert numbers(counts) == [6, 9, 45, 83.3333]  # users, items, interactions, percent
    assert mentions(rating, "--min_rating 2")
    assert mentions(core, "5/0")
    names = ("mean", "min", "p25", "median", "p75", "p90", "p99", "max")
    for line, values in ((users, (7.5, 5, 6, 7, 9, 10, 10, 10)), (items, (5, 1, 3, 5, 6, 12, 12, 12))):
        assert mentions(line, *(f"{name} {value}" for name, value in zip(names, values, strict=True)))
    assert mentions(splits, "1970-01-05", "1970-01-10", "leave_one_out", "train 33", "valid 6", "test 6")
    # The last two events of u4 to u9 are valid and test. All are with "popular", which has no event in train.
    assert numbers(targets) == [1, 8, 100]  # cold items, items without a text, percent of repeats
    assert numbers(records) == [0, 1, 2, 8]  # unused ones, repeated ones, all, and items without one
    assert report_lines(load_meta(options.folder.interactions, "")) == report[1:-1]
    assert mentions(report[-1], options.folder.card)


def test_kept_duplicates_are_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    meta = load_meta(run(tmp_path, [("a", "x", 1)] * 3 + [("b", "x", 1)]).folder.interactions, "")
    *others, repeated = report_lines(meta)
    assert numbers(repeated) == [2]
    assert repeated in caplog.text
    meta["statistics"]["num_exact_duplicates"] = 0
    assert report_lines(meta) == others


def test_large_numbers_have_commas():
    steps = [{"step": "read", "interactions": 1_234_567}, {"step": "the 5/5-core", "interactions": 1_000}]
    read, core = filter_lines(steps)
    assert mentions(read, "1,234,567")
    assert mentions(core, "1,233,567", "5/5", "1,000")
