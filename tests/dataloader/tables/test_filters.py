"""Which events the filters keep, and the integers of users and items."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader.tables.filters import Report, apply_filters, drop_items_without_text, k_core, number
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions
from tests.dataloader.processing import fill, kept, processing

#        user, item, time; d falls first, then z, then c
EVENTS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("c", "y", 1), ("c", "z", 2), ("d", "z", 1)]
MANY = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("pqrst"), st.integers(0, 3)), min_size=1,
                max_size=30)
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture
def work(tmp_path):
    with Workspace(tmp_path / ".work", "1GB") as work:
        yield work


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One database for all the examples of a property."""
    with Workspace(tmp_path_factory.mktemp("shared") / ".work", "1GB") as work:
        yield work


def filtered(work: Workspace, events, **flags) -> tuple[str, Report]:
    """`user+item` of the kept events, in the order of the lines, and the report."""
    fill(work, events)
    report = Report(work)
    apply_filters(work, processing(**flags), report)
    return " ".join(user + item for user, item, _time in kept(work)), report


@pytest.mark.slow
@pytest.mark.parametrize(("min_user", "min_item", "left"), [
    (2, 2, "ax ay bx by"),           # d has one event; without it z has one; without that c has one
    (2, 0, "ax ay bx by cy cz"),
    (0, 2, "ax ay bx by cy cz dz"),
    (0, 3, "ay by cy"),
    (1, 1, "ax ay bx by cy cz dz"),
    (0, 0, "ax ay bx by cy cz dz"),
    (3, 3, ""),
])
def test_the_k_core_drops_users_and_items_repeatedly(work, min_user, min_item, left):
    assert filtered(work, EVENTS, min_user_interactions=min_user, min_item_interactions=min_item)[0] == left


def check_report(report: Report, *steps: tuple) -> None:
    """The report has a line for each step, with these values."""
    for line, values in zip(report.lines(), steps, strict=True):
        assert mentions(line, *values)


def suggested(report: Report) -> list[str]:
    """The flags that an error suggests to relax."""
    return re.findall(r"--\w+", report.how_to_keep_more())


def k_core_by_hand(events, min_user, min_item):
    while True:
        users, items = [e[0] for e in events], [e[1] for e in events]
        left = [e for e in events if users.count(e[0]) >= min_user and items.count(e[1]) >= min_item]
        if left == events:
            return left
        events = left


@pytest.mark.slow
@PROPERTY
@given(MANY, st.integers(0, 4), st.integers(0, 4))
def test_the_k_core_equals_a_simple_loop(shared, events, min_user, min_item):
    fill(shared, events)
    k_core(shared, min_user, min_item, Report(shared))
    assert kept(shared) == k_core_by_hand(events, min_user, min_item)


@pytest.mark.parametrize(("threshold", "left"), [(3.0, "ay az"), (3.01, "az"), (-1.0, "ax ay az"), (5.5, "")])
def test_only_events_rated_below_the_threshold_are_removed(work, threshold, left):
    assert filtered(work, [("a", "x", 1, 2.5), ("a", "y", 2, 3.0), ("a", "z", 3, 4.0)], min_rating=threshold)[0] == left


@pytest.mark.parametrize("rating", [0.1, 1.1, 4.1, 4.3])  # as a float, 4.1 is a little less than 4.1
def test_an_inexact_float_rating_passes_its_own_threshold(work, rating):
    assert filtered(work, [("a", "x", 1, rating)], min_rating=rating)[0] == "ax"


REPEATED = [("a", "x", 5), ("a", "x", 3), ("b", "x", 5), ("a", "x", 5), ("a", "y", 5), ("a", "x", 3)]


@pytest.mark.parametrize(("which", "lines"), [
    ("keep", [0, 1, 2, 3, 4, 5]),
    ("exact", [0, 1, 2, 4]),      # of the two events at 5, and of the two at 3, the first
    ("user_item", [1, 2, 4]),     # of a's four with x the earliest, and of the two earliest the first
])
def test_all_duplicates_or_the_first_one_are_kept(work, which, lines):
    fill(work, REPEATED)
    apply_filters(work, processing(duplicates=which), Report(work))
    assert work.run("SELECT line FROM kept ORDER BY line") == [(line,) for line in lines]


def without_duplicates(events, which):
    if which == "exact":
        return [e for n, e in enumerate(events) if e not in events[:n]]
    earliest = {}
    for line, (user, item, time) in enumerate(events):
        earliest.setdefault((user, item), []).append((time, line))
    return [events[line] for line in sorted(min(events_of)[1] for events_of in earliest.values())]


@pytest.mark.slow
@PROPERTY
@given(MANY, st.sampled_from(["exact", "user_item"]))
def test_removed_duplicates_equal_those_of_a_loop(shared, events, which):
    fill(shared, events)
    apply_filters(shared, processing(duplicates=which), Report(shared))
    assert kept(shared) == without_duplicates(events, which)


def test_the_report_has_the_filters_in_their_order(work):
    # Without the low rating a has two events, without the repetition one, too few for the core.
    events = [("a", "x", 1, 1.0), ("a", "y", 2, 5.0), ("a", "y", 2, 5.0), ("b", "x", 1, 5.0), ("b", "y", 2, 5.0)]
    left, report = filtered(work, events, min_rating=2.0, duplicates="exact", min_user_interactions=2)
    assert left == "bx by"
    check_report(report, (5,), (1, "--min_rating 2", 4), (1, "--duplicates exact", 3), (1, "2/0", 2))
    assert suggested(report) == ["--min_rating", "--duplicates", "--min_user_interactions"]


def test_a_filter_without_effect_is_reported_but_not_suggested(work):
    _left, report = filtered(work, [("a", "x", 1)], min_rating=2.0, min_item_interactions=2)
    check_report(report, (1,), (0, "--min_rating 2", 1), (1, "0/2", 0))
    assert suggested(report) == ["--min_item_interactions"]


@pytest.mark.parametrize("minimum", [0, 1])
def test_disabled_filters_are_not_reported(work, minimum):
    _left, report = filtered(work, EVENTS, min_user_interactions=minimum, min_item_interactions=minimum)
    check_report(report, (7,))
    assert suggested(report) == []


def test_events_of_items_without_text_are_removed(work):
    fill(work, [("a", "described", 1), ("a", "empty", 2), ("b", "unknown", 3), ("b", "described", 4)])
    work.run("CREATE TABLE described AS FROM (VALUES ('described', 'A cup'), ('empty', '')) AS t(raw_id, \"text\")")
    report = Report(work)
    drop_items_without_text(work, report)
    assert kept(work) == [("a", "described", 1), ("b", "described", 4)]
    check_report(report, (4,), (2, "--drop_items_without_text"))


def numbered(work: Workspace, events) -> list[tuple]:
    """user, item, timestamp, place, length of each event, in the order of the output."""
    fill(work, events)
    for table in ("user_numbers", "users", "item_numbers", "items", "sorted"):
        work.run(f"DROP TABLE IF EXISTS {table}")
    work.run("DROP VIEW IF EXISTS numbered")
    number(work)
    return work.run('SELECT "user", item, "timestamp", place, length FROM numbered')


def test_users_and_items_are_numbered_by_first_appearance(work):
    fill(work, [("z", "q", 9), ("d", "y", 8), *EVENTS])  # z and q fall; of the others y and d come first
    k_core(work, 2, 2, Report(work))
    number(work)
    assert work.run("SELECT id, raw_id FROM users") == [(0, "d"), (1, "a"), (2, "b"), (3, "c")]
    assert work.run("SELECT id, raw_id FROM items") == [(0, "y"), (1, "x"), (2, "z")]


def numbered_by_hand(events):
    users, items = list(dict.fromkeys(e[0] for e in events)), list(dict.fromkeys(e[1] for e in events))
    rows = sorted((users.index(user), time, line, items.index(item))
                  for line, (user, item, time) in enumerate(events))
    found = []
    for user in range(len(users)):
        own = [row for row in rows if row[0] == user]
        found += [(user, item, time, place, len(own)) for place, (_user, time, _line, item) in enumerate(own)]
    return found


@pytest.mark.slow
@PROPERTY
@given(MANY)
def test_numbers_order_and_places_equal_a_sort_in_python(shared, events):
    assert numbered(shared, events) == numbered_by_hand(events)


def test_fractions_order_events_and_whole_seconds_are_published(work):
    events = [("a", "late", 1.999), ("a", "early", 1.001), ("a", "between", 1.5), ("a", "before", 0.999)]
    late, early, between, before = range(4)
    assert numbered(work, events) == [(0, before, 0, 0, 4), (0, early, 1, 1, 4), (0, between, 1, 2, 4),
                                      (0, late, 1, 3, 4)]
