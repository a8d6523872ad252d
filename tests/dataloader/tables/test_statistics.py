"""The numbers of a data set, worked out by hand, and the report that is printed of them."""

import logging

import pytest

from common.artifacts import load_meta
from dataloader.tables.splits import filter_lines, report_lines
from tests.dataloader.processing import run

DAY = 86_400
# Ten users; user n has n + 1 events, of which the last two are with "popular".
EVENTS = [(f"u{n}", "popular" if k > n - 2 else f"i{k}", n * DAY + k) for n in range(10) for k in range(n + 1)]


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


def test_repeated_events_are_counted_beyond_the_first(tmp_path):
    events = [("a", "x", 1)] * 3 + [("a", "y", 1), ("a", "x", 2), ("b", "x", 1)] + [("b", "y", 1)] * 2
    meta = load_meta(run(tmp_path, events).folder.interactions, "")
    assert meta["statistics"]["num_exact_duplicates"] == 3


def test_the_report_says_what_each_filter_removed_and_what_is_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metadata = [repr({"asin": "popular", "title": "Cup"})] * 2
    low = [("u9", "i0", 0, 1.0)] * 2  # rated low, and the same event twice
    options = run(tmp_path, [*EVENTS, *low], "--min_rating=2", "--min_user_interactions=5", metadata=metadata)
    report = [r.message.removeprefix("process: ") for r in caplog.records if r.levelno == logging.INFO]
    # 1 + 2 + 3 + 4 events are those of users with fewer than five.
    assert report[1:] == [
        "57 interactions read",
        "2 removed by --min_rating 2, 55 left",
        "10 removed by the 5/0-core, 45 left",
        "6 users, 9 items, 45 interactions; density 83.3333%",
        "events of a user: mean 7.5, min 5, p25 6, median 7, p75 9, p90 10, p99 10, max 10",
        "events of an item: mean 5, min 1, p25 3, median 5, p75 6, p90 12, p99 12, max 12",
        "1970-01-05 to 1970-01-10; leave_one_out: train 33, valid 6, test 6",
        "2 item records: 1 repeat another, 0 are of items without interactions; 8 items have no record",
    ]
    assert report_lines(load_meta(options.folder.interactions, "")) == report[1:]


def test_repeated_events_that_were_kept_are_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, [("a", "x", 1)] * 3 + [("b", "x", 1)])
    assert "2 events repeat another of the same user, item and time" in caplog.text


def test_large_numbers_are_written_with_commas():
    steps = [{"step": "read", "interactions": 1_234_567}, {"step": "the 5/5-core", "interactions": 1_000}]
    assert filter_lines(steps) == ["1,234,567 interactions read", "1,233,567 removed by the 5/5-core, 1,000 left"]
