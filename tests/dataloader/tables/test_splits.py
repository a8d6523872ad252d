"""Which events train a model and which evaluate it."""

import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataloader.options import timestamp_of
from dataloader.tables.filters import Report, number
from dataloader.tables.splits import make_split
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions
from tests.dataloader.processing import fill, processing
from tests.errors import refused

RAW = Path("reviews.json.gz")
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with Workspace(tmp_path_factory.mktemp("splits") / ".work", "1GB") as work:
        yield work


def split(work: Workspace, events, **flags) -> tuple[list[tuple], dict]:
    """user, second, split of every event, in their order; and the recorded info of the split."""
    fill(work, events)
    for table in ("user_numbers", "users", "item_numbers", "items", "sorted"):
        work.run(f"DROP TABLE IF EXISTS {table}")
    work.run("DROP VIEW IF EXISTS numbered")
    report = Report(work)
    number(work)
    made = make_split(work, processing(**flags), report, RAW)
    return work.run(f'SELECT "user", "timestamp", {made.expression} FROM numbered'), made.info


def splits_in(text: str) -> list[str]:
    return re.findall(r"\b(?:train|valid|test)\b", text)


def at(*times: float) -> list[tuple[str, str, float]]:
    """One event at each of these times, each of its own user and item."""
    return [(f"user {n}", f"item {n}", time) for n, time in enumerate(times)]


def test_the_last_two_events_are_valid_and_test(work):
    events = [(user, f"item {n}", n) for user, count in (("one", 1), ("two", 2), ("three", 3), ("five", 5))
              for n in range(count)]
    found, info = split(work, events)
    assert [[s for u, _time, s in found if u == user] for user in range(4)] == [
        ["train"], ["train", "train"], ["train", "valid", "test"], ["train", "train", "train", "valid", "test"]]
    # Item 3 is only the valid event of "five", and item 4 only its test event.
    assert info == {"split_name": "leave_one_out", "num_in_split": {"train": 7, "valid": 2, "test": 2},
                    "num_repeats": {"valid": 0, "test": 0}, "num_cold_items": {"valid": 1, "test": 1}}


def test_repeats_and_cold_items_of_both_splits_are_counted(work):
    events = [("a", "p", 1), ("a", "q", 2), ("a", "p", 3), ("a", "p", 4),    # valid and test repeat p
              ("b", "q", 1), ("b", "new", 2), ("b", "new", 3),               # valid is new, and test repeats it
              ("c", "q", 1), ("c", "late", 2), ("c", "p", 3),                # another user's p is not in the history
              ("d", "q", 1), ("d", "late", 2)]                               # a user without targets: late is in train
    info = split(work, events)[1]
    assert info["num_in_split"] == {"train": 6, "valid": 3, "test": 3}
    assert info["num_repeats"] == {"valid": 1, "test": 2}
    assert info["num_cold_items"] == {"valid": 1, "test": 1}


def test_one_item_only_is_always_a_repeat(work):
    info = split(work, [("a", "x", time) for time in range(5)])[1]
    assert info["num_repeats"] == {"valid": 1, "test": 1}
    assert info["num_cold_items"] == {"valid": 0, "test": 0}


def test_the_history_of_a_temporal_target_has_all_earlier_events(work):
    events = [("a", "x", 1), ("b", "y", 1), ("a", "z", 5), ("a", "z", 5), ("a", "x", 9), ("b", "w", 9), ("b", "w", 9)]
    begins = ("1970-01-01T00:00:05", "1970-01-01T00:00:09")
    info = split(work, events, split="temporal", split_dates=begins)[1]
    # The second z at the time 5 repeats the first; so does the second w at the time 9.
    assert info["num_repeats"] == {"valid": 1, "test": 2}
    assert info["num_cold_items"] == {"valid": 1, "test": 1}


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("pqrst"), st.integers(0, 5)), min_size=3,
                  max_size=20)


@pytest.mark.slow
@PROPERTY
@given(EVENTS)
def test_leave_one_out_equals_a_loop_over_sorted_events(work, events):
    assume(any(sum(e[0] == user for e in events) >= 3 for user in "abc"))
    users = list(dict.fromkeys(e[0] for e in events))
    expected = []
    for user in users:
        times = sorted((time, line) for line, (owner, _item, time) in enumerate(events) if owner == user)
        held_out = ["valid", "test"] if len(times) > 2 else []
        splits = ["train"] * (len(times) - len(held_out)) + held_out
        expected += [(users.index(user), time, s) for (time, _line), s in zip(times, splits, strict=True)]
    assert split(work, events)[0] == expected


@pytest.mark.parametrize(("ratios", "num_train", "num_valid"), [
    ((0.8, 0.1, 0.1), 8, 1), ((0.5, 0.3, 0.2), 5, 3),
    ((0.7, 0.1, 0.2), 7, 1),  # 0.7 + 0.1 is a little less than 0.8 to a computer
    ((0.6, 0.1, 0.3), 6, 1), ((1 / 3, 1 / 3, 1 / 3), 3, 3), ((0.05, 0.9, 0.05), None, None)])
def test_ratios_count_events_in_the_order_of_time(work, ratios, num_train, num_valid):
    events = at(*reversed(range(100, 110)))
    if num_train is None:
        with refused(DataError, RAW, fix=["--split_ratios"]) as error:
            split(work, events, split="temporal", split_ratios=ratios)
        assert splits_in(error.value.what) == ["train"]
        return
    found, info = split(work, events, split="temporal", split_ratios=ratios)
    assert {time: s for _user, time, s in found} == {
        100 + n: "train" if n < num_train else "valid" if n < num_train + num_valid else "test" for n in range(10)}
    assert info["split_begins"] == {"valid": 100 + num_train, "test": 100 + num_train + num_valid}
    assert info["num_in_split"] == {"train": num_train, "valid": num_valid, "test": 10 - num_train - num_valid}


def test_events_of_one_moment_are_in_one_split(work):
    found, _info = split(work, at(1, 2, 3, 3, 3, 3, 4, 4, 5, 5), split="temporal", split_ratios=(0.4, 0.3, 0.3))
    # The fourth and the seventh event would be borders; their moments, 3 and 4, belong to the later split whole.
    assert [s for _user, _time, s in found] == ["train"] * 2 + ["valid"] * 4 + ["test"] * 4


def test_a_border_within_a_second_moves_to_its_start(work):
    found, _info = split(work, at(1, 2, 2.001, 2.999, 3), split="temporal", split_ratios=(0.4, 0.4, 0.2))
    assert [(time, s) for _user, time, s in found] == [(1, "train"), (2, "valid"), (2, "valid"), (2, "valid"),
                                                       (3, "test")]


@pytest.mark.slow
@PROPERTY
@given(st.lists(st.integers(0, 12), min_size=3, max_size=30),
       st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.1, 0.2), (0.2, 0.3, 0.5)]))
def test_training_events_are_earlier_than_test_events(work, times, ratios):
    in_order, count = sorted(times), len(times)
    # In twentieths of the events: the shares are whole numbers of them.
    train, valid = (round(20 * share) for share in ratios[:2])
    begins = [in_order[count * twentieths // 20] for twentieths in (train, train + valid)]
    expected = ["train" if t < begins[0] else "valid" if t < begins[1] else "test" for t in times]
    try:
        found, info = split(work, at(*times), split="temporal", split_ratios=ratios)
    except DataError:
        assert set(expected) < {"train", "valid", "test"}
        return
    assert [s for _user, _time, s in found] == expected
    assert list(info["split_begins"].values()) == begins
    spans = {name: [t for _user, t, s in found if s == name] for name in ("train", "valid", "test")}
    assert max(spans["train"]) < min(spans["valid"]) <= max(spans["valid"]) < min(spans["test"])
    assert len(spans["train"]) <= count * train // 20


def test_split_dates_begin_valid_and_test(work):
    day = 86_400
    begin = timestamp_of("2014-01-01")
    assert begin == 16_071 * day  # 44 years of 365 days, and 11 leap days, after 1970
    found, info = split(work, at(begin - 1, begin, begin + 59 * day - 1, begin + 59 * day), split="temporal",
                        split_dates=("2014-01-01", "2014-03-01"))
    assert [s for _user, _time, s in found] == ["train", "valid", "valid", "test"]
    assert info == {"split_name": "temporal", "split_begins": {"valid": begin, "test": begin + 59 * day},
                    "num_in_split": {"train": 1, "valid": 2, "test": 1}, "num_repeats": {"valid": 0, "test": 0},
                    "num_cold_items": {"valid": 2, "test": 1}}


@pytest.mark.parametrize(("date", "second"), [
    ("1970-01-02", 86_400), ("1970-01-01T01:00", 3600), ("1970-01-01 00:00:07", 7), ("1970-01-01T01:00:00+01:00", 0),
    ("1970-01-01T00:00:00Z", 0), ("1969-12-31T23:59:59", -1), ("2014-02-30", None), ("yesterday", None), ("", None)])
def test_a_date_is_a_moment_in_utc(date, second):
    assert timestamp_of(date) == second


@pytest.mark.parametrize(("dates", "empty"), [
    (("2013-01-01", "2013-02-01"), ["train", "valid"]), (("2015-01-01", "2016-01-01"), ["valid", "test"]),
    (("2013-01-01", "2016-01-01"), ["train", "test"])])
def test_dates_that_leave_a_split_empty_are_refused(work, dates, empty):
    events = at(*[timestamp_of("2014-01-01") + n for n in range(5)])
    with refused(DataError, RAW, fix=["--split_ratios", "--split_dates"]) as error:
        split(work, events, split="temporal", split_dates=dates)
    assert splits_in(error.value.what) == empty
    assert mentions(error.value.why, *map(timestamp_of, dates), 5)


def test_all_events_at_one_moment_cannot_be_split_by_time(work):
    with refused(DataError, RAW) as error:
        split(work, at(*[7] * 20), split="temporal")
    assert splits_in(error.value.what) == ["train", "valid"]


def test_no_user_with_three_events_is_refused(work):
    with refused(DataError, RAW) as error:
        split(work, [("a", "x", 1), ("a", "y", 2), ("b", "x", 1)])
    assert splits_in(error.value.what) == ["valid", "test"]
    assert mentions(error.value.why, 3)  # interactions
    assert "--" not in error.value.fix  # no filter removed any
