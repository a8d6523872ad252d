"""Times in a wrong unit, dates in other forms, and the order of events within a second."""

import logging

import duckdb
import pytest

from common.errors import ConfigError, DataError
from tests.dataloader.helpers import mentions
from tests.dataloader.reading import events_of, local, refused

NOW = 1_393_545_600  # 2014-02-28, a Friday
FORMAT = "--time_format"
TWITTER, DAY_FIRST = "%a %b %d %H:%M:%S %z %Y", "%d/%m/%Y"


def shop(folder, times: list, *flags: str):
    """The options for events at these times, with items A, B, …"""
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f'u,{chr(65 + n)},"{time}"\n' for n, time in enumerate(times)))
    return local(folder, *flags)


def seconds(folder, times: list, *flags: str) -> list[float]:
    return [event[2] for event in events_of(shop(folder, times, *flags))]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(("unit", "times", "example", "day"), [
    ("s", [20200705, 20200706, 20200704], 20200704, "1970-08-22"),
    ("s", [20200705] * 19 + [NOW], 20200705, "1970-08-22"),       # 95 % are dates
    ("s", ["20200705.0", "20200706.0"], 20200705, "1970-08-22"),
    ("s", [2020070512, 2020070513], 2020070512, "2034-01-05"),    # with the hour
    ("ms", [202007051230, 202007051231], 202007051230, "1976-05-27"),
])
def test_dates_written_as_numbers_are_refused(tmp_path, unit, times, example, day):
    error = refused(shop(tmp_path, times, "--time_unit", unit), DataError, tmp_path / "interactions.csv",
                    names=[example, day], fix=["--time_unit date"])
    assert mentions(error.what, sum(time != NOW for time in times), len(times))


@pytest.mark.parametrize("times", [
    [20200705, 20209999], [20200705] * 9 + [NOW], [19700101 + 1000 * n for n in range(9)]])
def test_fewer_dates_than_nine_tenths_are_seconds(tmp_path, times):
    assert seconds(tmp_path, times) == times


@pytest.mark.parametrize(("unit", "newest"), [("ms", 20200706), ("us", 20200706000000)])
def test_a_date_in_a_small_unit_is_refused(tmp_path, unit, newest):
    refused(shop(tmp_path, [newest - 1, newest], "--time_unit", unit), DataError, tmp_path / "interactions.csv",
            what=[newest], fix=["--time_unit date"])


@pytest.mark.parametrize(("times", "flags", "early", "names"), [
    ([3, 1, 2], [], 3, [3, "--time_unit", FORMAT, "--time_column"]),                 # ranks
    ([18448, 18449, NOW], [], 2, [18449, "1970-01-01", "--time_unit day"]),
    ([2014, 2015], [], 2, [2015, "1970-01-01"]),
    ([10.5, 20.5], ["--time_unit=day"], 2, [20.5, "1970-01-21", "--time_unit"]),
    (["1985-02-03", "1986-02-02"], ["--time_unit=date"], 2, ["1986-02-02", "--time_column"]),
    ([100_000, 200_000, NOW, NOW], [], 2, None),                                     # only half of them
    (["1989-12-31", "1990-01-01"], ["--time_unit=date"], 1, None),
])
def test_mostly_early_events_give_a_warning(tmp_path, caplog, times, flags, early, names):
    assert len(seconds(tmp_path, times, *flags)) == len(times)
    found = warnings(caplog)
    assert len(found) == (names is not None)
    assert names is None or mentions(found[0], early, len(times), *names)


@pytest.mark.parametrize(("times", "unit", "example"), [
    ([0, 0, NOW], "s", 0), ([0, *range(NOW * 1000, NOW * 1000 + 4)], "ms", 0),
    (["1970-01-01", "2014-02-28"], "date", "1970-01-01"),
    ([1, *range(NOW * 1000, NOW * 1000 + 4)], "ms", 1),
    ([NOW, *range(NOW * 1000, NOW * 1000 + 199)], "ms", NOW)])                      # 0.5 % in another unit
def test_a_few_unknown_times_give_a_warning(tmp_path, caplog, times, unit, example):
    assert len(seconds(tmp_path, times, "--time_unit", unit)) == len(times)
    assert len(found := warnings(caplog)) == 1
    assert mentions(found[0], sum(time in (example, 0) for time in times), len(times), example)


@pytest.mark.parametrize(("times", "flags"), [
    ([NOW, NOW * 1000, NOW + 1, NOW * 1000 + 1], []), ([NOW, NOW * 1000] * 2, ["--time_unit=ms"]),
    ([NOW * 1000, NOW * 1_000_000] * 2, ["--time_unit=us"]), ([NOW * 10**6, NOW * 10**9] * 2, ["--time_unit=ns"]),
    ([NOW] + [NOW * 1000] * 20, []), ([NOW * 1000] * 20 + [NOW] * 2, ["--time_unit=ms"]),
    ([NOW, "2014-02-28"] * 2, []), (["28/02/2014"] * 9 + ["02/28/2014"], [FORMAT, DAY_FIRST])])
def test_mixed_units_are_refused_with_both_examples(tmp_path, times, flags):
    error = refused(shop(tmp_path, times, *flags), DataError)
    assert error.where.startswith(str(tmp_path / "interactions.csv"))
    assert "--time" not in error.fix
    first, second = times.index(times[0]), next(n for n, time in enumerate(times) if len(str(time)) != len(
        str(times[0])) or str(time)[:2] != str(times[0])[:2])
    for place in (first, second):
        assert mentions(error.why, f"{tmp_path / 'interactions.csv'}:{place + 2}", repr(str(times[place])))


@pytest.mark.parametrize(("times", "flags", "fix"), [
    ([NOW * 1000 + n for n in range(200)] + ["soon"], [], "--time_unit ms"),
    ([NOW * 10**9, (NOW + 1) * 10**9], [], "--time_unit ns"),
    (["2019-10-01 00:00:00 UTC"] * 2, [], "--time_unit date"),
    ([" 2020-01-01 ", "\t2020-01-02"], [], "--time_unit date"),
    (["05/06/2020"] * 20 + ["06/13/2020"], [FORMAT, DAY_FIRST], f"{FORMAT} '%m/%d/%Y'"),
    (["05/06/2020"] * 20 + ["13/06/2020"], [], f"{FORMAT} '{DAY_FIRST}'"),
    (["05-06-2020", "06-13-2020"], [], f"{FORMAT} '%m-%d-%Y'"), (["1/13/20", "2/1/20"], [], f"{FORMAT} '%m/%d/%y'"),
    (["01-Feb-2020"], [], f"{FORMAT} '%d-%b-%Y'")])
def test_the_fix_reads_nearly_all_times(tmp_path, times, flags, fix):
    error = refused(shop(tmp_path, times, *flags), DataError)
    assert error.fix.startswith(f"use {fix}, or correct ")
    name, _, value = fix.partition(" ")
    valid = [time for time in times if time != "soon"]
    found = seconds(tmp_path, times, name, value.strip("'"), "--bad_lines=skip")
    assert len(found) == len(valid)
    assert all(1_300_000_000 < time < 1_600_000_000 for time in found)


def test_ambiguous_dates_name_both_forms(tmp_path):
    times = [f"{month:02}/01/2020" for month in range(1, 13)]
    refused(shop(tmp_path, times), DataError, f"{tmp_path}/interactions.csv:2",
            fix=[f"{FORMAT} '{DAY_FIRST}'", f"{FORMAT} '%m/%d/%Y'"])
    assert len({int(time) for time in seconds(tmp_path, times, FORMAT, "%m/%d/%Y")}) == 12


@pytest.mark.parametrize("flags", [[], ["--time_unit=date"], ["--time_unit=ms"], ["--time_unit=day"]])
def test_excel_dates_are_named_with_a_conversion(tmp_path, caplog, flags):
    options = shop(tmp_path, [43831, 43832.5], *flags)
    if flags in ([], ["--time_unit=day"]):
        events_of(options)
        message = " ".join(warnings(caplog))
    else:
        message = refused(options, DataError).fix
    assert mentions(message, 25569)
    assert seconds(tmp_path, [43831 - 25569, 43832.5 - 25569], "--time_unit=day") == [1_577_836_800, 1_577_966_400]


def test_nanoseconds_keep_the_order_of_microseconds(tmp_path):
    times = [NOW * 10**9 + n * 1000 for n in (3, 1, 2)]
    found = seconds(tmp_path, times, "--time_unit=ns")
    assert sorted(found) == [found[1], found[2], found[0]]
    assert found == pytest.approx([time / 10**9 for time in times], abs=1e-6)


@pytest.mark.parametrize("times", [[1, 2, 3], [1, 5000, 11000]])
def test_ranks_in_a_small_unit_have_a_fix_that_works(tmp_path, times):
    error = refused(shop(tmp_path, times, "--time_unit=ms"), DataError, tmp_path / "interactions.csv",
                    fix=["--time_unit s"])
    assert "day" not in error.fix
    assert seconds(tmp_path, times, "--time_unit=s") == times


def test_old_dates_of_parquet_have_no_flag_as_fix(tmp_path):
    duckdb.sql("SELECT 'u' AS user_id, 'A' AS item_id, DATE '1969-12-31' AS timestamp").write_parquet(
        str(tmp_path / "interactions.parquet"))
    error = refused(local(tmp_path), DataError, f"{tmp_path}/interactions.parquet: row 1", what=["1969-12-31"])
    assert "--time" not in error.fix


@pytest.mark.parametrize(("times", "flags"), [
    ([f"{NOW}.75", f"{NOW}.5", f"{NOW}.25"], []), ([f"{NOW * 1000}.2", f"{NOW * 1000}.1"], ["--time_unit=ms"]),
    ([18448.75, 18448.5], ["--time_unit=day"]), ([3e-9, 2e-9, 1e-9], []), ([0.3, 0.2], []),
    ([f"2014-02-28 00:00:00.{n:06}" for n in (3, 2, 1)], ["--time_unit=date"]),
    ([NOW * 1_000_000 + n for n in (2, 1, 0)], ["--time_unit=us"])])
def test_fractions_keep_their_order(tmp_path, times, flags):
    found = seconds(tmp_path, times, *flags)
    assert found == sorted(set(found), reverse=True)


@pytest.mark.parametrize(("form", "date", "expected"), [
    (TWITTER, "Fri Feb 28 01:00:00 +0100 2014", NOW), (TWITTER, "Thu Feb 27 16:00:00 -0800 2014", NOW),
    (DAY_FIRST, "28/02/2014", NOW), ("%m %d, %Y", "02 28, 2014", NOW), ("%d.%m.%y %H:%M", "28.02.14 00:01", NOW + 60),
    ("%Y-%m-%d %H:%M:%S.%f", "2014-02-28 00:00:00.25", NOW + 0.25), ("it's %Y%m%d", "it's 20140228", NOW)])
def test_dates_are_read_in_the_given_form(tmp_path, form, date, expected):
    assert seconds(tmp_path, [date], FORMAT, form) == [expected]


def test_an_offset_that_does_not_exist_is_refused(tmp_path):
    refused(shop(tmp_path, ["Fri Feb 28 01:00:00 +9900 2014"], FORMAT, TWITTER), DataError,
            f"{tmp_path}/interactions.csv:2", what=["+9900"])
    assert seconds(tmp_path, ["00:01:00-23 28/02/2014"], FORMAT, "%H:%M:%S-23 %d/%m/%Y") == [NOW + 60]


@pytest.mark.parametrize(("date", "flags", "fix"), [
    ("Fri Feb 28 01:00:00 +0100 2014", [], f"{FORMAT} '{TWITTER}'"),
    ("28/02/2014", ["--time_unit=date"], f"{FORMAT} '{DAY_FIRST}'"),
    ("02/28/2014 10:20", ["--time_unit=ms"], f"{FORMAT} '%m/%d/%Y %H:%M'"),
    ("2/28/2014 8:55:22 AM", [], f"{FORMAT} '%m/%d/%Y %I:%M:%S %p'"),
    ("28.02.2014", [FORMAT, DAY_FIRST], f"{FORMAT} '%d.%m.%Y'"),
    ("2014-02-28", [FORMAT, DAY_FIRST], "--time_unit date"),
    ("the 28th of February", ["--time_unit=date"], FORMAT),
    (f"{NOW}000", [], "--time_unit ms"), (f"{NOW}000000000", [], "--time_unit ns"),
    (16129, ["--time_unit=date"], "--time_unit day"),
])
def test_the_error_names_a_form_that_reads_the_date(tmp_path, date, flags, fix):
    refused(shop(tmp_path, [date], *flags), DataError, f"{tmp_path}/interactions.csv:2", what=[str(date)], fix=[fix])
    if fix != FORMAT:
        name, _, value = fix.partition(" ")
        assert 0 <= seconds(tmp_path, [date], name, value.strip("'"))[0] - NOW < 86_400


def test_a_form_for_a_column_of_timestamps_is_refused(tmp_path):
    duckdb.sql("SELECT 'u' AS user_id, 'A' AS item_id, TIMESTAMP '2014-02-28' AS timestamp").write_parquet(
        str(tmp_path / "interactions.parquet"))
    refused(local(tmp_path, FORMAT, DAY_FIRST), ConfigError, f"{FORMAT} {DAY_FIRST}", names=["TIMESTAMP"])


@pytest.mark.parametrize("sql", ["20140228 + i", "(20140228 + i)::DOUBLE", "(20140228 + i)::VARCHAR"])
def test_compact_dates_of_any_parquet_type_are_read(tmp_path, sql):
    duckdb.sql(f"SELECT 'u' AS user_id, 'A' AS item_id, {sql} AS timestamp FROM range(1) r(i)").write_parquet(
        str(tmp_path / "interactions.parquet"))
    assert [event[2] for event in events_of(local(tmp_path, "--time_unit=date"))] == [NOW]
