"""Good and bad events: times and their units, ratings, ids; and skipped lines."""

import json
import re
from pathlib import Path

import duckdb
import pytest

from common.errors import DataError
from tests.dataloader.helpers import mentions, review, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import bad_lines, events_of, listed, local, read_raw, refused

NOW = 1_393_545_600  # 2014-02-28


def as_csv(folder: Path, rows: list[tuple], *flags: str):
    """Rows of user, item, time and rating, in lines 2, 3, …"""
    text = "user_id,item_id,timestamp,rating\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "interactions.csv").write_text(text, encoding="utf-8")
    return local(folder, *flags)


def as_json(folder: Path, rows: list[tuple], *flags: str):
    """The same as lines of JSON, numbers as numbers. A blank line comes first, so that they are lines 2, 3, … too."""
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
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t (user_id VARCHAR, item_id VARCHAR, timestamp VARCHAR, rating VARCHAR)")
        for row in rows:
            connection.execute("INSERT INTO t VALUES (?, ?, ?, ?)", row)
        connection.table("t").write_parquet(str(folder / "interactions.parquet"))
    return local(folder, *flags)


FORMATS = pytest.mark.parametrize("write", [as_csv, as_json, as_parquet])
GOOD = ("a", "x", NOW, 5)
MAX_TIME = "4,102,444,800"


def second(folder: Path, write) -> str:
    """The place of the second row."""
    file = {as_csv: "interactions.csv:3", as_json: "interactions.jsonl:3", as_parquet: "interactions.parquet: row 2"}
    return f"{folder}/{file[write]}"


def same_infinity(text: str) -> str:
    """Write what the formats make of 1e400 in one way."""
    return text.lower().replace("1e400", "inf").replace("infinity", "inf")


TIMES = [
    ("s", NOW, NOW), ("s", f"{NOW}.75", NOW + 0.75), ("s", 0, 0), ("s", "1.3935456e9", NOW),
    ("s", 4_102_444_800, 4_102_444_800), ("ms", NOW * 1000 + 7, NOW + 0.007), ("ms", f"{NOW * 1000}.5", NOW + 0.0005),
    ("us", NOW * 1_000_000 + 7, NOW + 0.000_007), ("day", 16_129, NOW), ("day", 16_129.25, NOW + 21_600),
    ("day", 16_129 + 1 / 86_400, NOW + 1),
    ("date", "2014-02-28", NOW), ("date", "2014-02-28T00:00:01Z", NOW + 1),
    ("date", "2014-02-28 01:00:00+01:00", NOW), ("date", "2014-02-27T16:00:00-0800", NOW),
    ("date", "2014-02-28 01:00:00 Europe/Berlin", NOW), ("date", "1970-01-01", 0),
    ("date", "2014-02-28 00:00:00.5", NOW + 0.5), ("date", "2014-2-28 00:01", NOW + 60),
    ("date", "2014-02-28 14:30:00+14:30", NOW), ("date", "20140228", NOW), ("date", "20140228.0", NOW),
    ("date", "2014022801", NOW + 3600), ("date", "201402280101", NOW + 3660), ("date", "20140228000001", NOW + 1),
    ("date", "20140228T000001Z", NOW + 1), ("date", "20140227T230001-0100", NOW + 1),
    ("date", "20140228 0001", NOW + 60),
]


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("unit", "kind"), sorted({(unit, type(raw).__name__) for unit, raw, _ in TIMES}))
def test_times_count_in_their_unit_from_1970(tmp_path, write, unit, kind):
    # The last, recent event is there because a dataset of old times alone is refused.
    recent = {"date": "2014-03-01", "s": NOW, "ms": NOW * 1000, "us": NOW * 1_000_000, "day": 16_129}[unit]
    times = [(raw, time) for of, raw, time in TIMES if (of, type(raw).__name__) == (unit, kind)]
    events = [(f"user{number:02d}", "x", raw, 5) for number, (raw, _) in enumerate(times)]
    found = events_of(write(tmp_path, [*events, ("v", "y", type(times[0][0])(recent), 5)], "--time_unit", unit))
    assert found[:-1] == [(*event[:2], time, 5.0) for event, (_, time) in zip(events, times, strict=True)]


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("unit", "raw", "values"), [
    ("s", "-1", ["-1", 0, MAX_TIME]),
    ("s", "4102444801", ["4102444801", 0, MAX_TIME]),
    ("s", "NaN", ["nan"]),
    ("s", "inf", ["inf"]),
    ("s", "1e400", ["inf"]),
    ("s", "yesterday", ["'yesterday'"]),
    ("s", "2014-02-28", ["'2014-02-28'"]),
    ("s", "", ["timestamp"]),
    ("s", NOW * 1000, [NOW * 1000, MAX_TIME]),
    ("s", NOW * 1_000_000, [NOW * 1_000_000, MAX_TIME]),
    ("ms", NOW * 1_000_000, [f"{MAX_TIME},000"]),
    ("date", NOW, [f"'{NOW}'", 1970, 2100]),
    ("date", "28/02/2014", ["'28/02/2014'", 1970, 2100]),
    ("date", "2014-02-30", ["'2014-02-30'", 1970, 2100]),
    ("date", "1969-12-31", ["'1969-12-31'", 1970, 2100]),
    ("date", "2014-02-28 00:00 Atlantis", ["'2014-02-28 00:00 atlantis'"]),
    ("date", "epoch", ["'epoch'"]), ("date", " Epoch", ["' epoch'"]), ("date", "infinity", ["'inf'"]),
    ("date", "2014-02-28T00:00:00+99:00", ["'2014-02-28t00:00:00+99:00'"]),
    ("date", "2014-02-28 00:00-2400", ["'2014-02-28 00:00-2400'"]),
    ("date", "2014-02-28 00:00:00.5 +15", ["'2014-02-28 00:00:00.5 +15'"]),
    ("date", "2014-02-28 00:00:00+01:75", ["'2014-02-28 00:00:00+01:75'"]),
    ("date", "20140228T000000+9900", ["'20140228t000000+9900'"]),
    ("date", "20141328", ["'20141328'"]), ("date", "201402281", ["'201402281'"]),
    ("s", "20140228093000", [20140228093000]), ("day", "20140228", ["47,482"]),
    ("day", NOW, ["47,482"]), ("date", "16129", ["'16129'"]),
])
def test_a_bad_time_is_named_with_file_and_line(tmp_path, write, unit, raw, values):
    good = {"date": "2014-03-01", "s": NOW, "ms": NOW * 1000, "day": 16_129}[unit]
    error = refused(write(tmp_path, [("a", "x", good, 5), ("b", "y", raw, 5)], "--time_unit", unit), DataError,
                    second(tmp_path, write), fix=["--bad_lines skip"])
    assert mentions(same_infinity(error.what), *values)
    assert mentions(error.why, 1, 2)  # of two lines


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("raw", "values"), [
    ("NaN", ["nan"]), ("-inf", ["-inf"]), ("1e400", ["inf"]), ("1e10", ["-1,000,000,000", "1,000,000,000"]),
    ("five", ["'five'"]), ("", ["rating"])])
def test_a_bad_rating_is_named_with_file_and_line(tmp_path, write, raw, values):
    error = refused(write(tmp_path, [GOOD, ("b", "y", NOW, raw)]), DataError, second(tmp_path, write))
    assert mentions(same_infinity(error.what), *values)


@pytest.mark.parametrize(("source", "rating", "good"), [
    ("amazon14", 5.0, True), ("amazon14", 0.0, True), ("amazon14", 5.5, False), ("amazon14", -1.0, False)])
def test_the_ratings_of_amazon_are_from_0_to_5(tmp_path, source, rating, good):
    write_gz(tmp_path / "raw" / "Baby.json.gz", [review("a", "x", NOW), review("b", "y", NOW, rating)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--source", source)
    if good:
        assert [event[3] for event in events_of(options)] == [5.0, rating]
    else:
        error = refused(options, DataError, f"{tmp_path}/raw/Baby.json.gz:2")
        assert mentions(error.what, rating, 0, 5)


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize(("user", "item", "values"), [
    ("", "x", ["user_id"]), ("a", "", ["item_id"]), ("a" * 10_001, "x", [f"'{'a' * 20}'", "10,001", "10,000"])])
def test_a_bad_id_is_named_with_file_and_line(tmp_path, write, user, item, values):
    error = refused(write(tmp_path, [GOOD, (user, item, NOW, 5)]), DataError, second(tmp_path, write))
    assert mentions(error.what, *values)


@pytest.mark.parametrize(("unit", "newest", "fix"), [
    ("ms", NOW, ["s"]), ("us", NOW, ["s"]), ("us", NOW * 1000, ["ms"]), ("ms", 5, ["s"])])
def test_a_unit_that_makes_all_times_old_is_refused(tmp_path, unit, newest, fix):
    events = [("a", "x", newest, 5), ("b", "y", newest - 1, 5)]
    error = refused(as_csv(tmp_path, events, "--time_unit", unit), DataError,
                    tmp_path / "interactions.csv", fix=["--time_unit"])
    assert mentions(error.what, newest)
    assert mentions(error.why, unit, 1973)
    assert set(re.findall(r"--time_unit (\w+)", error.fix)) == set(fix)


@pytest.mark.slow
@pytest.mark.parametrize(("sql", "seconds"), [
    ("DATE '2014-02-28'", NOW), ("TIMESTAMP '2014-02-28 12:30:00.25'", NOW + 45_000.25),
    ("TIMESTAMP_NS '2014-02-28 12:30:00.25'", NOW + 45_000.25), ("TIMESTAMP_S '2014-02-28 12:30:00'", NOW + 45_000),
    ("TIMESTAMP_MS '2014-02-28 12:30:00.25'", NOW + 45_000.25),
    ("TIMESTAMPTZ '2014-02-28 13:30:00.25+01'", NOW + 45_000.25)])
@pytest.mark.parametrize("unit", [None, "s", "ms", "date"])
def test_a_column_of_a_time_type_needs_no_unit(tmp_path, monkeypatch, sql, seconds, unit):
    monkeypatch.setenv("TZ", "America/New_York")
    duckdb.sql(f"SELECT 'a' AS user_id, 'x' AS item_id, {sql} AS timestamp").write_parquet(
        str(tmp_path / "interactions.parquet"))
    flags = ("--time_unit", unit) if unit else ()
    assert events_of(local(tmp_path, *flags)) == [("a", "x", seconds, 1.0)]


def test_an_infinite_time_of_a_time_type_is_refused(tmp_path):
    duckdb.sql("""SELECT * FROM (VALUES ('a', 'x', TIMESTAMP '2014-02-28'), ('b', 'y', TIMESTAMP 'infinity'))
                  v(user_id, item_id, timestamp)""").write_parquet(str(tmp_path / "interactions.parquet"))
    refused(local(tmp_path), DataError, second(tmp_path, as_parquet), what=["'9999-12-31"])


def with_faults(num_good: int, num_bad: int) -> list[tuple]:
    """Good rows, with bad ones of several kinds from the second row on."""
    bad = [("", "y", NOW, 5), ("b", "y", "never", 5), ("b", "y", NOW, "NaN")]
    rows = [("a", f"item {n}", NOW + n, 5) for n in range(num_good)]
    rows[1:1] = [bad[n % 3] for n in range(num_bad)]
    return rows


@FORMATS
def test_skipped_lines_are_counted_and_listed(tmp_path, write):
    options = write(tmp_path, with_faults(397, 3), "--bad_lines", "skip")
    events, _items, num_bad = read_raw(options)
    assert num_bad == 3
    assert [item for _user, item, _time, _rating in events] == [f"item {n}" for n in range(397)]
    faults, place = listed(options), second(tmp_path, write)
    assert [fault["where"] for fault in faults] == [f"{place[:-1]}{int(place[-1]) + n}" for n in range(3)]
    for fault, value in zip(faults, ["user_id", "'never'", "nan"], strict=True):
        assert mentions(fault["reason"].lower(), value)
    assert all("y" in fault["excerpt"] and len(fault["excerpt"]) <= 80 for fault in faults)


@FORMATS
def test_more_than_one_percent_is_not_skipped(tmp_path, write):
    error = refused(write(tmp_path, with_faults(296, 3), "--bad_lines", "skip"), DataError, second(tmp_path, write),
                    what=["user_id"])
    assert mentions(error.why, 3, 299, 1)  # 1 %
    assert "--bad_lines skip:2%" in error.fix
    assert not bad_lines(local(tmp_path)).exists()


@pytest.mark.parametrize(("limit", "num_bad"), [("5%", 5), ("12.5%", 12), ("50%", 50)])
def test_another_limit_of_bad_lines_can_be_set(tmp_path, limit, num_bad):
    flags = ("--bad_lines", f"skip:{limit}")
    assert read_raw(as_csv(tmp_path, with_faults(100 - num_bad, num_bad), *flags))[2] == num_bad
    error = refused(as_csv(tmp_path, with_faults(99 - num_bad, num_bad + 1), *flags))
    assert mentions(error.why, num_bad + 1, limit)
    assert f"--bad_lines skip:{num_bad + 1}%" in error.fix or num_bad == 50  # then most lines are bad


@pytest.mark.parametrize("line", ["no record", '{"user_id": "a", ', "[1, 2]", "[" * 100_000])
def test_a_bad_json_line_is_named_with_80_characters(tmp_path, line):
    as_json(tmp_path, [GOOD])
    with (tmp_path / "interactions.jsonl").open("a") as file:
        file.write(f"\n \n{line} {'x' * 100}\n")
    error = refused(local(tmp_path), DataError, f"{tmp_path}/interactions.jsonl:5",
                    names=[repr((line + " " + "x" * 100)[:80])])
    assert mentions(error.why, 1, 2)  # of two lines


def test_an_array_of_records_has_its_own_message(tmp_path):
    def message(first_line: str) -> str:
        """The error of a file with this bad first line, without the message of the parser."""
        (tmp_path / "interactions.json").write_text(
            f'{first_line}\n{{"user_id": "a", "item_id": "x", "timestamp": 1}},\n{{}}\n]\n')
        with pytest.raises(json.JSONDecodeError) as parser:
            json.loads(first_line)
        return refused(local(tmp_path), DataError, f"{tmp_path}/interactions.json:1").what.replace(
            str(parser.value), "")

    assert message("[") != message("{") == message("-")


@pytest.mark.parametrize("ratings", [(None, None), ("", 4), (3, 4)])
def test_ratings_are_1_or_given_for_all(tmp_path, ratings):
    records = [{"user_id": "a", "item_id": f"x{n}", "timestamp": NOW, **({} if rating is None else {"rating": rating})}
               for n, rating in enumerate(ratings)]
    (tmp_path / "interactions.jsonl").write_text("\n".join(map(json.dumps, records)))
    if ratings[0] == "":
        refused(local(tmp_path), DataError, f"{tmp_path}/interactions.jsonl:1", what=["rating"])
    else:
        assert [event[3] for event in events_of(local(tmp_path))] == [rating or 1.0 for rating in ratings]


def test_a_rating_missing_in_the_first_record_is_refused(tmp_path):
    records = [{"user_id": "a", "item_id": "x", "timestamp": NOW}, {"user_id": "a", "item_id": "y", "timestamp": NOW,
                                                                    "rating": 2}]
    (tmp_path / "interactions.jsonl").write_text("\n".join(map(json.dumps, records)))
    refused(local(tmp_path), DataError, f"{tmp_path}/interactions.jsonl:1", what=["rating"])


@FORMATS
def test_the_reader_accepts_a_file_without_events(tmp_path, write):
    options = write(tmp_path, [])
    if write is as_json:
        (tmp_path / "interactions.jsonl").write_text("")
    assert events_of(options) == []
