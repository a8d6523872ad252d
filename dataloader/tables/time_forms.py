"""The units and forms of raw times: the SQL that reads each form, and the search for the form of a file."""

import re
import time
from typing import NamedTuple

from common.tables import text
from dataloader.readers.bad_rows import Advice, rows_at
from dataloader.readers.raw import RawTable, load
from dataloader.workspace import Workspace

LATEST = 4_102_444_800  # seconds; the year 2100
USUAL = 631_152_000     # seconds (1990); few datasets have earlier events
YEAR = 366 * 86_400     # seconds
# For each numeric --time_unit, the number of time units per second.
UNITS = {"day": 1 / 86_400, "s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# A date without separators: 20140228, 20140228T0930Z, 20140228093000, or the number 20140228.0.
COMPACT = r"^(\d{8})[T ]?((?:\d\d){0,3})((?:\.\d+)?(?:Z|[+-]\d\d(?::?\d\d)?)?)$"
PADDED = r"^(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)\d* (.*)$"
BLANKS = "' ' || chr(9)"
# DuckDB accepts offsets from UTC that do not exist, such as +15:00, +99:00 and +01:75.
WRONG_OFFSET = r":\d+(\.\d+)? ?[+-](1[5-9]|[2-9]\d|\d\d:?[6-9])"
# Forms of dates that a message can suggest.
FORMS = ("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z",
         *(f"{day}{clock}" for clock in ("", " %H:%M", " %H:%M:%S", " %I:%M:%S %p") for day in (
             "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d %b %Y",
             "%b %d, %Y", "%m %d, %Y")))
EXCEL = "Excel serial dates"  # days since 1899-12-30
EXCEL_1970 = 25_569           # the Excel serial date of 1970-01-01
EXCEL_FIX = f"subtract {EXCEL_1970} from the times, which are {EXCEL}, and use --time_unit day"
NUM_FIRST = 1000  # number of distinct invalid times on which the other forms are tried first
NEARLY_ALL = 0.99


def seconds_of(form: str, date_format: str) -> str:
    """Return SQL for the seconds since 1970 of the raw "time": a DOUBLE, or NULL if the time is invalid.

    form: see `Times`

    The fraction is kept, because it decides the order of events in the same second. Up to the year 2100, a DOUBLE
    distinguishes all microseconds.
    """
    if form == "day":  # a rounding error could move the time into the previous second
        return 'round(try_cast("time" AS DOUBLE) * 86400, 6)'
    if form in UNITS:
        return f'try_cast("time" AS DOUBLE) / {UNITS[form]}'
    has_offset = re.search("%[MSf] ?%z", date_format) is not None
    padded = """("time" < '!' OR "time" LIKE '% ')"""
    # Cast to TIMESTAMPTZ, because a cast to TIMESTAMP would ignore the offset from UTC.
    date = {"typed": 'try_cast("time" AS TIMESTAMPTZ)',
            "format": f"""CASE WHEN NOT {has_offset} OR NOT regexp_matches("time", '{WRONG_OFFSET}')
                               THEN try_strptime("time", {text(date_format)}) END""",
            "date": f"""CASE WHEN {padded} THEN {_iso_date(f'trim("time", {BLANKS})')} ELSE {_iso_date('"time"')}
                        END"""}[form]
    return f"epoch_us({date}) / {UNITS['us']}"


def _iso_date(date: str) -> str:
    # If the fifth character is not a digit, the text is not a compact date. Then skip the slow regular expression.
    return f"""CASE WHEN substr({date}, 5, 1) BETWEEN '0' AND '9' THEN {_cast(_with_separators(date))}
                    ELSE {_cast(date)} END"""


def _with_separators(date: str) -> str:
    """Return SQL that writes a compact date as ISO 8601 with separators. Other texts do not become valid dates."""
    padded = f"""regexp_replace({date}, '{COMPACT}', '\\1\\2000000 \\3')"""
    return f"""regexp_replace({padded}, '{PADDED}', '\\1-\\2-\\3 \\4:\\5:\\6\\7')"""


def _cast(date: str) -> str:
    # DuckDB reads `epoch` as a date. Only a text of 12 or more characters can have an offset.
    return f"""CASE WHEN ltrim({date}) < ':' AND (strlen({date}) < 12 OR NOT regexp_matches({date}, '{WRONG_OFFSET}'))
                    THEN try_cast({date} AS TIMESTAMPTZ) END"""


def latest_usual() -> float:
    """Return the time one year from now, in seconds since 1970. Few datasets have later events."""
    return time.time() + YEAR


def usual_numbers() -> dict[str, str]:
    """Return SQL conditions that are true if the number "time" is from 1990 to next year, for each unit.

    The keys are flags such as "--time_unit ms", and EXCEL. The ranges of the units do not overlap.
    """
    latest = int(latest_usual())
    ranges = {f"--time_unit {unit}": (USUAL * scale, latest * scale) for unit, scale in UNITS.items()}
    ranges[EXCEL] = (EXCEL_1970 + USUAL / 86_400, EXCEL_1970 + latest / 86_400)
    return {form: f'try_cast("time" AS DOUBLE) BETWEEN {low} AND {high}' for form, (low, high) in ranges.items()}


class Form(NamedTuple):
    """A form in which some times of a file are plausible."""

    name: str     # a flag, or EXCEL
    column: str   # its column in the table `fits`, which is true for these times
    seconds: str  # for a form of dates: SQL for their seconds since 1970
    num: int      # the number of these times


def advice(work: Workspace, table: RawTable, current: str, is_valid: str) -> Advice:
    """Return what to do about the times of a file, after trying the other forms on them.

    current: the flag with which the times were read
    is_valid: SQL condition that is true if the raw "time" (a text) is plausible with the flag `current`

    The fix names a flag if at least half of the times are plausible with it, and at most 1 % of the times only with
    others. If several forms are in use, `why` says so.
    """
    load(work, table, "raw_times", 'SELECT "time" FROM {rows}', {"time": "VARCHAR"})
    found, num_times = _compare(work, current, is_valid), work.count("fits")
    best = found[0] if found else None
    if best is None or 2 * best.num < num_times:
        result = Advice()
    else:
        others = " OR ".join(form.column for form in found[1:]) or "false"
        num_others = work.value(f"SELECT count(*) FROM fits WHERE NOT {best.column} AND ({others})")
        if num_others > (0 if best.name == current else (1 - NEARLY_ALL) * num_times):
            result = Advice(_mixture(work, table, found, num_times))
        else:
            result = Advice() if best.name == current else _choice(work, found)
    for temporary in ("fits", "raw_times"):
        work.run(f"DROP TABLE {temporary}")
    return result


def _compare(work: Workspace, current: str, is_valid: str) -> list[Form]:
    """Make the table `fits`, with the row index `record` of each time. Return the forms, the most frequent one first.

    `is_valid` is the condition of the form `current`. If other forms are as frequent, `current` comes first.
    """
    dates = {"--time_unit date": ("date", ""), **{f"--time_format '{form}'": ("format", form) for form in FORMS}}
    seconds = {name: seconds_of(*form) for name, form in dates.items()}
    forms = {current: ""} | usual_numbers() | {name: f"{sql} BETWEEN 0 AND {LATEST}" for name, sql in seconds.items()}
    forms[current] = is_valid
    # Most forms do not read any of the times, and it would take long to try these forms on all times.
    [matches] = work.run(f"""SELECT {', '.join(f'bool_or({condition})' for condition in forms.values())}
        FROM (SELECT DISTINCT "time" FROM raw_times WHERE NOT coalesce({is_valid}, false) LIMIT {NUM_FIRST})""")
    names = [name for name, matched in zip(forms, matches, strict=True) if matched or name == current]
    work.run(f"""CREATE TABLE fits AS SELECT rowid AS record, {', '.join(
        f'coalesce({forms[name]}, false) AS f{place}' for place, name in enumerate(names))}
        FROM raw_times WHERE "time" IS NOT NULL""")
    [counts] = work.run(f"SELECT {', '.join(f'count(*) FILTER (f{place})' for place in range(len(names)))} FROM fits")
    found = [Form(name, f"f{place}", seconds.get(name, ""), num)
             for place, (name, num) in enumerate(zip(names, counts, strict=True)) if num]
    return sorted(found, key=lambda form: -form.num)


def _choice(work: Workspace, found: list[Form]) -> Advice:
    """Return the advice to use the first form, or one of several forms that read the same times differently."""
    different: dict[object, str] = {}
    for form in found:
        if form.num == found[0].num:  # the ranges of numbers do not overlap, so these are forms of dates
            total = work.value(f"SELECT sum(hash({form.seconds or 0})) FROM raw_times")
            different.setdefault(total, form.name)
    first, *others = different.values()
    if not others:
        return Advice(fix=EXCEL_FIX if first == EXCEL else f"use {first}")
    return Advice("The dates are ambiguous: several forms read all of them, but as different days",
                  f"check which number is the day, and use {' or '.join(different.values())}")


def _mixture(work: Workspace, table: RawTable, found: list[Form], num_times: int) -> str:
    """Return a text that says how many raw times have each form, with an example of each form."""
    before, examples = "false", {}
    for form in found:
        num, first = work.run(f"""SELECT count(*), min(record) FROM fits
                                  WHERE {form.column} AND NOT ({before})""")[0]
        if num:
            preposition = "as" if form.name == EXCEL else "with"
            examples[first] = f"{num:,} of {num_times:,} are plausible {preposition} {form.name}"
        before += f" OR {form.column}"
    records = sorted(examples)
    for record, (where, _values, _text) in zip(records, rows_at(work, table, iter(records)), strict=True):
        raw = work.value("SELECT \"time\" FROM raw_times WHERE rowid = ?", record)
        examples[record] += f", such as {raw[:40]!r} at {where}"
    return f"The times are mixed: {'; '.join(examples.values())}. No flag reads all of them"
