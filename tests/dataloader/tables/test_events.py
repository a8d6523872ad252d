"""What is an event and what is none: times and their units, ratings, ids; and lines that are left out."""

import json
from pathlib import Path

import duckdb
import pytest

from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.helpers import review, write_gz
from tests.dataloader.reading import bad_lines, events_of, listed, local, read_raw, refused

NOW = 1_393_545_600  # 2014-02-28


def as_csv(folder: Path, rows: list[tuple], *flags: str):
    """Rows of user, item, time and rating, in lines 2, 3, …"""
    text = "user_id,item_id,timestamp,rating\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "interactions.csv").write_text(text, encoding="utf-8")
    return local(folder, *flags)


def as_json(folder: Path, rows: list[tuple], *flags: str):
    """The same as lines of JSON, numbers as numbers, below a blank line, so that they are lines 2, 3, … too."""
    def value(text):
        try:
            json.loads(str(text))
        except ValueError:
            return json.dumps(text)
        return str(text)

    lines = [f'{{"user_id": "{user}", "item_id": "{item}", "timestamp": {value(time)}, "rating": {value(rating)}}}\n'
             for user, item, time, rating in rows]
    (folder / "interactions.jsonl").write_text("\n" + "".join(lines), encoding="utf-8")
    return local(folder, *flags)


def as_parquet(folder: Path, rows: list[tuple], *flags: str):
    duckdb.execute("CREATE OR REPLACE TABLE t (user_id VARCHAR, item_id VARCHAR, timestamp VARCHAR, rating VARCHAR)")
    for row in rows:
        duckdb.execute("INSERT INTO t VALUES (?, ?, ?, ?)", row)
    duckdb.table("t").write_parquet(str(folder / "interactions.parquet"))
    return local(folder, *flags)


FORMATS = pytest.mark.parametrize("write", [as_csv, as_json, as_parquet])
GOOD = ("a", "x", NOW, 5)


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("unit", "raw", "time"), [
    ("s", NOW, NOW), ("s", f"{NOW}.75", NOW), ("s", 0, 0), ("s", "1.3935456e9", NOW),
    ("s", 4_102_444_800, 4_102_444_800),
    ("ms", NOW * 1000 + 7, NOW * 1000 + 7), ("us", NOW * 1_000_000 + 7, NOW * 1_000_000 + 7),
    ("date", "2014-02-28", NOW * 1_000_000), ("date", "2014-02-28T00:00:01Z", (NOW + 1) * 1_000_000),
    ("date", "2014-02-28 01:00:00+01:00", NOW * 1_000_000), ("date", "2014-02-27T16:00:00-0800", NOW * 1_000_000),
    ("date", "2014-02-28 01:00:00 Europe/Berlin", NOW * 1_000_000), ("date", "1970-01-01", 0),
    ("date", "2014-02-28 00:00:00.5", NOW * 1_000_000 + 500_000), ("date", "2014-2-28 00:01", (NOW + 60) * 1_000_000),
])
def test_a_time_counts_in_its_unit_from_1970(tmp_path, write, unit, raw, time):
    # A second event, so that the set is of our days whatever the first one is.
    other = {"date": "2014-03-01", "s": NOW, "ms": NOW * 1000, "us": NOW * 1_000_000}[unit]
    assert events_of(write(tmp_path, [("a", "x", raw, 5), ("b", "y", other, 5)], "--time_unit", unit))[0] == (
        "a", "x", time, 5.0)


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("unit", "raw", "fault"), [
    ("s", "-1", "has the time -1, which is not from 0 to 4,102,444,800"),
    ("s", "4102444801", "has the time 4102444801, which is not from 0 to 4,102,444,800"),
    ("s", "NaN", "has the time nan, which is not finite"),
    ("s", "inf", "has the time inf, which is not finite"),
    ("s", "1e400", "has the time inf, which is not finite"),
    ("s", "yesterday", "has the time 'yesterday', which is no number"),
    ("s", "2014-02-28", "has the time '2014-02-28', which is no number"),
    ("s", "", "lacks the time (timestamp)"),
    ("s", NOW * 1000, f"has the time {NOW * 1000}, which is not from 0 to 4,102,444,800; --time_unit ms, if"),
    ("s", NOW * 1_000_000, f"has the time {NOW * 1_000_000}, which is not from 0 to 4,102,444,800; --time_unit us, if"),
    ("ms", NOW * 1_000_000, "which is not from 0 to 4,102,444,800,000; --time_unit us, if that is what it counts"),
    ("date", NOW, f"has the time '{NOW}', which is no date (ISO 8601) from 1970 to 2100"),
    ("date", "28/02/2014", "has the time '28/02/2014', which is no date (ISO 8601) from 1970 to 2100"),
    ("date", "2014-02-30", "has the time '2014-02-30', which is no date (ISO 8601) from 1970 to 2100"),
    ("date", "1969-12-31", "has the time '1969-12-31', which is no date (ISO 8601) from 1970 to 2100"),
    ("date", "2014-02-28 00:00 Atlantis", "has the time '2014-02-28 00:00 Atlantis', which is no date"),
])
def test_a_time_that_is_none_is_named_with_file_and_line(tmp_path, write, unit, raw, fault):
    good = {"date": "2014-03-01", "s": NOW, "ms": NOW * 1000}[unit]
    error = refused(write(tmp_path, [("a", "x", good, 5), ("b", "y", raw, 5)], "--time_unit", unit))
    file = {as_csv: "interactions.csv:3", as_json: "interactions.jsonl:3", as_parquet: "interactions.parquet: row 2"}
    assert str(error.where) == f"{tmp_path}/{file[write]}"
    assert fault.lower() in error.what.lower().replace("1e400", "inf").replace("infinity", "inf")
    assert "1 of 2 lines are like that" in error.why
    assert "--bad_lines skip" in error.fix


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("raw", "fault"), [
    ("NaN", "which is not finite"), ("-inf", "which is not finite"), ("1e400", "which is not finite"),
    ("1e10", "which is not from -1,000,000,000 to 1,000,000,000"),
    ("five", "has the rating 'five', which is no number"), ("", "lacks the rating (rating)")])
def test_a_rating_that_is_none_is_named_with_file_and_line(tmp_path, write, raw, fault):
    error = refused(write(tmp_path, [GOOD, ("b", "y", NOW, raw)]))
    assert fault in error.what
    assert str(error.where).endswith((":3", "row 2"))


@pytest.mark.parametrize(("source", "rating", "good"), [
    ("amazon14", 5.0, True), ("amazon14", 0.0, True), ("amazon14", 5.5, False), ("amazon14", -1.0, False)])
def test_the_ratings_of_amazon_are_from_0_to_5(tmp_path, source, rating, good):
    write_gz(tmp_path / "raw" / "Baby.json.gz", [review("a", "x", NOW), review("b", "y", NOW, rating)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--source", source)
    if good:
        assert [event[3] for event in events_of(options)] == [5.0, rating]
    else:
        assert f"has the rating {rating}, which is not from 0 to 5" in refused(options).what


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("user", "item", "fault"), [
    ("", "x", "lacks the user (user_id)"), ("a", "", "lacks the item (item_id)"),
    ("a" * 10_001, "x", "has the user 'aaaaaaaaaaaaaaaaaaaa'… of 10,001 bytes; there may be 10,000")])
def test_an_id_that_is_empty_or_endless_is_named_with_file_and_line(tmp_path, write, user, item, fault):
    error = refused(write(tmp_path, [GOOD, (user, item, NOW, 5)]))
    assert (error.what, str(error.where).endswith((":3", "row 2"))) == (fault, True)


@pytest.mark.parametrize(("unit", "newest", "fix"), [
    ("ms", NOW, "--time_unit s, if that is what it counts"), ("us", NOW, "--time_unit s, if that is what it counts"),
    ("us", NOW * 1000, "--time_unit ms, if that is what it counts"), ("ms", 5, "another --time_unit")])
def test_a_unit_by_which_all_was_long_ago_is_refused_and_never_guessed(tmp_path, unit, newest, fix):
    error = refused(as_csv(tmp_path, [("a", "x", newest, 5), ("b", "y", 1, 5)], "--time_unit", unit))
    assert error.what == f"its newest time is {newest}"
    assert f"in {unit} that is 1973 or before" in error.why
    assert error.fix.startswith(fix)


@pytest.mark.slow
@pytest.mark.parametrize(("sql", "seconds"), [
    ("DATE '2014-02-28'", NOW), ("TIMESTAMP '2014-02-28 12:30:00.25'", NOW + 45_000.25),
    ("TIMESTAMP_NS '2014-02-28 12:30:00.25'", NOW + 45_000.25), ("TIMESTAMP_S '2014-02-28 12:30:00'", NOW + 45_000),
    ("TIMESTAMP_MS '2014-02-28 12:30:00.25'", NOW + 45_000.25),
    ("TIMESTAMPTZ '2014-02-28 13:30:00.25+01'", NOW + 45_000.25)])
@pytest.mark.parametrize(("unit", "factor"), [
    (None, 1), ("s", 1), ("ms", 1000), ("us", 1_000_000), ("date", 1_000_000)])
def test_a_column_of_a_time_type_needs_no_unit(tmp_path, monkeypatch, sql, seconds, unit, factor):
    monkeypatch.setenv("TZ", "America/New_York")
    duckdb.sql(f"SELECT 'a' AS user_id, 'x' AS item_id, {sql} AS timestamp").write_parquet(
        str(tmp_path / "interactions.parquet"))
    flags = ("--time_unit", unit) if unit else ()
    assert events_of(local(tmp_path, *flags)) == [("a", "x", int(seconds * factor), 1.0)]


def test_a_moment_that_is_none_in_a_column_of_a_time_type_is_named(tmp_path):
    duckdb.sql("""SELECT * FROM (VALUES ('a', 'x', TIMESTAMP '2014-02-28'), ('b', 'y', TIMESTAMP 'infinity'))
                  v(user_id, item_id, timestamp)""").write_parquet(str(tmp_path / "interactions.parquet"))
    error = refused(local(tmp_path))
    assert str(error).startswith(f"{tmp_path}/interactions.parquet: row 2: has the time '9999-12-31")


def with_faults(num_good: int, num_bad: int) -> list[tuple]:
    """Good rows, with bad ones of several kinds from the second row on."""
    bad = [("", "y", NOW, 5), ("b", "y", "never", 5), ("b", "y", NOW, "NaN")]
    rows = [("a", f"item {n}", NOW + n, 5) for n in range(num_good)]
    rows[1:1] = [bad[n % 3] for n in range(num_bad)]
    return rows


@FORMATS
def test_lines_that_are_left_out_are_counted_and_listed(tmp_path, write):
    options = write(tmp_path, with_faults(397, 3), "--bad_lines", "skip")
    events, _items, num_bad = read_raw(options)
    assert num_bad == 3
    assert [item for _user, item, _time, _rating in events] == [f"item {n}" for n in range(397)]
    reasons = [(Path(str(fault["where"]).replace(": row ", ":")).name.rpartition(":")[2], fault["reason"])
               for fault in listed(options)]
    first = 2 if write is as_parquet else 3
    assert reasons == [(str(first), "lacks the user (user_id)"),
                       (str(first + 1), "has the time 'never', which is no number"),
                       (str(first + 2), reasons[2][1])]
    assert "which is not finite" in reasons[2][1]
    assert all("y" in fault["excerpt"] and len(fault["excerpt"]) <= 80 for fault in listed(options))


@FORMATS
def test_more_than_one_in_a_hundred_is_not_left_out(tmp_path, write):
    error = refused(write(tmp_path, with_faults(296, 3), "--bad_lines", "skip"))
    assert "3 of 299 lines are like that, and more than 1 % is not left out" in error.why
    assert "lacks the user" in error.what
    assert not bad_lines(local(tmp_path)).exists()


@pytest.mark.parametrize(("line", "reason"), [
    ("no record", "is not a JSON record (Expecting value: line 1 column 1 (char 0))"),
    ('{"user_id": "a", ', "is not a JSON record ("),
    ("[1, 2]", "is not a JSON record (it is a list, not a record; a line must hold one record, and not an array)"),
    ("[" * 100_000, "is not a JSON record (maximum recursion depth exceeded"),
])
def test_a_line_that_is_no_json_is_named_with_an_excerpt_of_80_characters(tmp_path, line, reason):
    as_json(tmp_path, [GOOD])
    with (tmp_path / "interactions.jsonl").open("a") as file:
        file.write(f"\n \n{line} {'x' * 100}\n")
    error = refused(local(tmp_path))
    assert str(error.where) == f"{tmp_path}/interactions.jsonl:5"
    assert error.what.startswith(reason.split(" (it")[0])
    assert f"it reads {(line + ' ' + 'x' * 100)[:80]!r}; 1 of 2 lines are like that" in error.why


def test_an_array_of_records_is_told_from_lines_of_them(tmp_path):
    (tmp_path / "interactions.json").write_text('[\n{"user_id": "a", "item_id": "x", "timestamp": 1},\n{}\n]\n')
    assert "a line must hold one record, and not an array" in refused(local(tmp_path)).what


@pytest.mark.parametrize("ratings", [(None, None), ("", 4), (3, 4)])
def test_without_ratings_every_event_counts_one_and_a_column_of_them_is_for_all(tmp_path, ratings):
    records = [{"user_id": "a", "item_id": f"x{n}", "timestamp": NOW, **({} if rating is None else {"rating": rating})}
               for n, rating in enumerate(ratings)]
    (tmp_path / "interactions.jsonl").write_text("\n".join(map(json.dumps, records)))
    if ratings[0] == "":
        assert refused(local(tmp_path)).what == "lacks the rating (rating)"
    else:
        assert [event[3] for event in events_of(local(tmp_path))] == [rating or 1.0 for rating in ratings]


def test_a_rating_that_the_first_record_lacks_is_missed_and_not_made_up(tmp_path):
    records = [{"user_id": "a", "item_id": "x", "timestamp": NOW}, {"user_id": "a", "item_id": "y", "timestamp": NOW,
                                                                    "rating": 2}]
    (tmp_path / "interactions.jsonl").write_text("\n".join(map(json.dumps, records)))
    error = refused(local(tmp_path))
    assert (str(error.where), error.what) == (f"{tmp_path}/interactions.jsonl:1", "lacks the rating (rating)")


@FORMATS
def test_no_event_at_all_is_no_error_of_the_reader(tmp_path, write):
    options = write(tmp_path, [])
    if write is as_json:
        (tmp_path / "interactions.jsonl").write_text("")
    assert events_of(options) == []
