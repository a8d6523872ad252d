"""Convert raw times to seconds since 1970, and find times that are read in a wrong unit."""

import logging
import re
from contextlib import suppress
from datetime import UTC, datetime

from common.errors import ConfigError, DataError
from dataloader.options import Processing, timestamp_of
from dataloader.readers.bad_rows import number_fault
from dataloader.readers.raw import RawTable, type_of
from dataloader.workspace import Workspace, text

log = logging.getLogger(__name__)

LATEST = 4_102_444_800  # seconds; the year 2100
EARLIEST = 100_000_000  # seconds (1973); if all times in ms or us are earlier, the unit must be wrong
USUAL = 631_152_000     # seconds (1990); few datasets have earlier events
# For each numeric --time_unit, the number of time units per second.
UNITS = {"day": 1 / 86_400, "s": 1, "ms": 1_000, "us": 1_000_000}
# A date without separators: 20140228, 20140228T0930Z, 20140228093000, or the number 20140228.0.
COMPACT = r"^(\d{8})[T ]?((?:\d\d){0,3})((?:\.\d+)?(?:Z|[+-]\d\d(?::?\d\d)?)?)$"
PADDED = r"^(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)\d* (.*)$"
# DuckDB accepts offsets from UTC that do not exist, such as +15:00, +99:00 and +01:75.
WRONG_OFFSET = r":\d+(\.\d+)? ?[+-](1[5-9]|[2-9]\d|\d\d:?[6-9])"
COMPACT_SHARE = 0.9     # if a larger share of the times look like dates, they are not seconds
# Forms of dates that a message can suggest.
FORMS = ("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z",
         *(f"{day}{time}" for time in ("", " %H:%M", " %H:%M:%S", " %I:%M:%S %p") for day in (
             "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%d %b %Y", "%b %d, %Y", "%m %d, %Y")))
ANY_FORM = "--time_format FORM, such as '%d/%m/%Y %H:%M'"


class Times:
    """The form of the times in a file.

    `form` is a key of UNITS, "date" (ISO 8601), "format" (--time_format) or "typed" (a Parquet column of dates or
    timestamps, which needs no flag). Raises ConfigError if --time_format is given for such a column.
    """

    def __init__(self, work: Workspace, table: RawTable, processing: Processing):
        self.format = processing.time_format or ""
        self.form = "format" if self.format else processing.time_unit
        column_type = type_of(work, table, "time")
        if column_type.startswith(("DATE", "TIMESTAMP")):
            if self.format:
                raise ConfigError(f"--time_format {self.format}", f"has no effect with {table.origin}",
                                  f"The type of the time column is {column_type}", "leave the flag out")
            self.form = "typed"
        self.raw_type = "DOUBLE" if self.form in UNITS else "VARCHAR"  # the type of the column, for `load`

    def seconds(self) -> str:
        """Return SQL for the seconds since 1970 of the raw "time": a DOUBLE, or NULL if the time is invalid.

        The fraction is kept, because it decides the order of events in the same second. Up to the year 2100, a DOUBLE
        distinguishes all microseconds.
        """
        if self.form == "day":  # a rounding error could move the time into the previous second
            return 'round(try_cast("time" AS DOUBLE) * 86400, 6)'
        if self.form in UNITS:
            return f'try_cast("time" AS DOUBLE) / {UNITS[self.form]}'
        has_offset = re.search("%[MSf] ?%z", self.format) is not None
        # Cast to TIMESTAMPTZ, because a cast to TIMESTAMP would ignore the offset from UTC.
        date = {"typed": 'try_cast("time" AS TIMESTAMPTZ)',
                "format": f"""CASE WHEN NOT {has_offset} OR NOT regexp_matches("time", '{WRONG_OFFSET}')
                                   THEN try_strptime("time", {text(self.format)}) END""",
                "date": f"""CASE WHEN substr("time", 5, 1) BETWEEN '0' AND '9' THEN {_cast(_with_separators())}
                                 ELSE {_cast('"time"')} END"""}[self.form]
        return f"epoch_us({date}) / {UNITS['us']}"

    def number_fault(self, value: object) -> tuple[str, str]:
        """Return why a raw time in a numeric unit is invalid, and a flag that would make it valid (or "").

        The reason is "" if the time is valid, or if times are dates: Python cannot check these.
        """
        if self.form not in UNITS:
            return "", ""
        flag = _fitting_flag(value, self.form)
        fault = number_fault("time", value, 0, LATEST * UNITS[self.form], f" (valid with {flag})" if flag else "")
        return fault, flag or ("" if _is_number(value) else ANY_FORM)

    def date_fault(self, value: object) -> tuple[str, str]:
        """Return the reason and the flag for a date that is invalid."""
        flag = _fitting_flag(value, self.form)
        form = f"a date in the form {self.format!r}" if self.format else "an ISO 8601 date"
        return (f"time must be {form} from 1970 to 2100, got {str(value)[:40]!r}" + (
            f" (valid with {flag})" if flag else ""), flag or ANY_FORM)

    def check(self, work: Workspace, table: RawTable) -> int:
        """Check the times of the table `events`, and return the number of events before 1990.

        Raises DataError if the times are certainly in another unit. Logs a warning if most events are before 1990.
        """
        unit = UNITS.get(self.form, 0)
        # 8, 10 or 12 digits. Dates of 14 digits are never valid times in a numeric unit.
        dates = " OR ".join(f"""("time" * {unit} BETWEEN {1970_01_01 * scale} AND {2100_12_32 * scale})"""
                            for scale in (1, 100, 10_000))
        [(num_events, newest, num_early, early, num_dates)] = work.run(f"""
            SELECT count(*), coalesce(max("time"), 0), count(*) FILTER ("time" < {USUAL}),
                   max("time") FILTER ("time" < {USUAL}), count(*) FILTER ({dates}) FROM events""")
        if self.form in ("ms", "us") and 0 < newest < EARLIEST:
            flag = _fitting_flag(newest * unit, self.form)
            work.stop(DataError(table.origin, f"the newest time is {newest * unit:.15g}",
                                f"In the unit {self.form}, this is in 1973 or earlier",
                                f"use {flag}" if flag else "correct the times or --time_unit"))
        if num_dates > COMPACT_SHARE * num_events:
            self._refuse_dates(work, table, num_events)
        if 2 * num_early > num_events:
            read = f"{early * unit:.15g} is read as {_day(early)} (--time_unit {self.form})" if unit else _day(early)
            flag = _fitting_flag(early * unit, self.form) or "--time_unit"
            log.warning("process: %d of %d events in %s are before 1990, for example %s. If the times are not ranks, "
                        "check %s, --time_format and --time_column", num_early, num_events, table.origin, read, flag)
        return num_early

    def _refuse_dates(self, work: Workspace, table: RawTable, num_events: int) -> None:
        """Raise DataError if more than COMPACT_SHARE of the times are dates that are written as numbers."""
        [(num_dates, example)] = work.run(f"""
            SELECT count(*), min("time") FROM events WHERE try_strptime(
                rpad(round("time" * {UNITS[self.form]})::BIGINT::VARCHAR, 14, '0'), '%Y%m%d%H%M%S') IS NOT NULL""")
        if num_dates > COMPACT_SHARE * num_events:
            work.stop(DataError(table.origin, f"{num_dates:,} of {num_events:,} times are dates written as numbers",
                                f"For example, --time_unit {self.form} reads {example * UNITS[self.form]:.15g} as "
                                f"{_day(example)}", "use --time_unit date"))


def _with_separators() -> str:
    """Return SQL that writes a compact date as ISO 8601 with separators. Other texts do not become valid dates."""
    padded = f"""regexp_replace("time", '{COMPACT}', '\\1\\2000000 \\3')"""
    return f"""regexp_replace({padded}, '{PADDED}', '\\1-\\2-\\3 \\4:\\5:\\6\\7')"""


def _cast(date: str) -> str:
    # DuckDB reads `epoch` as a date. Only a text of 12 or more characters can have an offset.
    return f"""CASE WHEN ltrim({date}) < ':' AND (strlen({date}) < 12 OR NOT regexp_matches({date}, '{WRONG_OFFSET}'))
                    THEN try_cast({date} AS TIMESTAMPTZ) END"""


def _fitting_flag(value: object, form: str) -> str:
    """Return a flag for another unit or form in which the value is a plausible time, or "" if there is none."""
    fits = ["date"] if _is_date(str(value)) else []
    with suppress(ValueError):
        time = float(str(value))
        fits += [unit for unit, scale in UNITS.items()
                 if (USUAL if unit == "day" else EARLIEST) * scale <= time <= LATEST * scale]
    flags = [f"--time_unit {unit}" for unit in fits if unit != form]
    flags += [f"--time_format '{other}'" for other in FORMS if not fits and _matches(str(value), other)]
    return flags[0] if flags else ""


def _is_date(value: str) -> bool:
    timestamp = timestamp_of(value)
    if number := re.fullmatch(r"(\d{8}(?:\d\d){0,3})(?:\.0+)?", value):
        with suppress(ValueError):
            timestamp = datetime.strptime(number[1].ljust(14, "0"), "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    return timestamp is not None and 0 <= timestamp <= LATEST


def _matches(date: str, form: str) -> bool:
    with suppress(ValueError):
        return 1970 <= datetime.strptime(date, form).year < 2100
    return False


def _is_number(value: object) -> bool:
    with suppress(ValueError):
        float(str(value))
        return True
    return False


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
