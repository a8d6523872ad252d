"""Convert raw times to seconds since 1970, and find times that are read in a wrong unit."""

import logging
from contextlib import suppress
from datetime import UTC, datetime

from common.errors import ConfigError, DataError
from dataloader.options import Processing
from dataloader.readers.bad_rows import Advice, number_fault
from dataloader.readers.raw import RawTable, type_of
from dataloader.tables.time_forms import (
    EXCEL,
    EXCEL_1970,
    EXCEL_FIX,
    LATEST,
    NEARLY_ALL,
    UNITS,
    USUAL,
    advice,
    latest_usual,
    seconds_of,
    usual_numbers,
)
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

EARLIEST = 100_000_000  # seconds (1973); if all times in a small unit are earlier, the unit must be wrong
DAY = 86_400            # seconds; programs write the first day of 1970 for unknown times
SMALL_UNITS = ("ms", "us", "ns")
COMPACT_SHARE = 0.9     # if a larger share of the times are dates written as numbers, the unit is wrong
RANKS = "--time_unit s if the times are ranks"
ANY_FORM = "use --time_format FORM, such as '%d/%m/%Y %H:%M'"


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
        self.flag = f"--time_format '{self.format}'" if self.format else f"--time_unit {self.form}"

    def seconds(self) -> str:
        """Return SQL for the seconds since 1970 of the raw "time": a DOUBLE, or NULL if the time is invalid."""
        return seconds_of(self.form, self.format)

    def number_fault(self, value: object) -> str:
        """Return why a raw time in a numeric unit is invalid.

        The reason is "" if the time is valid, or if times are dates: Python cannot check these.
        """
        return number_fault("time", value, 0, LATEST * UNITS[self.form]) if self.form in UNITS else ""

    def date_fault(self, value: object) -> str:
        """Return why a raw date is invalid."""
        form = {"format": f"a date in the form {self.format!r}", "date": "an ISO 8601 date"}.get(self.form, "a date")
        return f"time must be {form} from 1970 to 2100, got {str(value)[:40]!r}"

    def fix_for(self, value: object) -> str:
        """Return a fix for an invalid time, or "" if there is none. It is used if `advice` has no fix."""
        with suppress(ValueError):
            number = float(str(value))
            return f"use {RANKS}" if 0 <= number <= LATEST and self.form in ("date", "format") else ""
        return "" if self.form == "typed" else ANY_FORM

    def advice(self, work: Workspace, table: RawTable) -> Advice:
        """Return what to do about the invalid times of a file. All times are read again, in every form."""
        if self.form == "typed":
            return Advice()
        return advice(work, table, self.flag, f"{self.seconds()} BETWEEN 0 AND {LATEST}")

    def check(self, work: Workspace, table: RawTable) -> int:
        """Check the times of the table `events`, and return the number of events before 1990.

        Raises DataError if the times are certainly in another unit, or in several units. Logs a warning if most events
        are before 1990, or if some have a time that usually means an unknown time.
        """
        unit = UNITS.get(self.form, 0)
        # Dates of 8, 10 or 12 digits. Dates of 14 digits are never valid times in a numeric unit.
        dates = " OR ".join(f"""("time" * {unit} BETWEEN {1970_01_01 * scale} AND {2100_12_32 * scale})"""
                            for scale in (1, 100, 10_000))
        odd = EARLIEST if self.form in SMALL_UNITS else DAY
        [(num_events, newest, num_early, early, num_odd, num_dates)] = work.run(f"""
            SELECT count(*), coalesce(max("time"), 0), count(*) FILTER ("time" < {USUAL}),
                   max("time") FILTER ("time" < {USUAL}), count(*) FILTER ("time" < {odd}), count(*) FILTER ({dates})
            FROM events""")
        if self.form in SMALL_UNITS and 0 < newest < EARLIEST:
            self._refuse_small(work, table, newest)
        elif self.form in SMALL_UNITS and num_odd:
            self._refuse_mixture(work, table, num_events)
        if num_dates > COMPACT_SHARE * num_events:
            self._refuse_dates(work, table, num_events)
        if 2 * num_early > num_events:
            likely = self._likely(work, num_events)
            fix = likely if likely == EXCEL_FIX else f"check {likely}, --time_format and --time_column"
            log.warning("process: %d of %d events in %s are before 1990, for example %s. If the times are not ranks, "
                        "%s", num_early, num_events, table.origin, self._read(early), fix)
        elif num_odd:
            example = work.value(f'SELECT max("time") FROM events WHERE "time" < {odd}')
            log.warning("process: %d of %d events in %s are before %s, for example %s. If such a time means that the "
                        "time is unknown, leave these events out", num_odd, num_events, table.origin,
                        _day(odd), self._read(example))
        if self.form == "day" and newest > latest_usual() and self._likely(work, num_events) == EXCEL_FIX:
            log.warning("process: the times in %s are far in the future, for example %s. If they are %s, subtract %d",
                        table.origin, self._read(newest), EXCEL, EXCEL_1970)
        return num_early

    def _read(self, seconds: float) -> str:
        """Format a time for a message: the number in the file, and the day."""
        unit = UNITS.get(self.form)
        return f"{seconds * unit:.15g} is read as {_day(seconds)} ({self.flag})" if unit else _day(seconds)

    def _likely(self, work: Workspace, num_events: int) -> str:
        """Return the flag for the warning about unusual times: one with which nearly all times are plausible, if any.

        Returns EXCEL_FIX for the serial dates of Excel.
        """
        unit = UNITS.get(self.form)
        if not unit:
            return "--time_unit"
        others = {form: condition for form, condition in usual_numbers().items() if form != self.flag}
        [counts] = work.run(f"""SELECT {', '.join(f'count(*) FILTER ({condition})' for condition in others.values())}
                                FROM (SELECT "time" * {unit} AS "time" FROM events)""")
        num, flag = max(zip(counts, others, strict=True))
        if num < NEARLY_ALL * num_events:
            preposition = "as" if flag == EXCEL else "with"
            return f"--time_unit (only {num} of the times are plausible {preposition} {flag})" if num else "--time_unit"
        return EXCEL_FIX if flag == EXCEL else flag

    def _refuse_small(self, work: Workspace, table: RawTable, newest: float) -> None:
        """Raise DataError about times that are all before 1973 in a small unit."""
        unit = UNITS[self.form]
        found = advice(work, table, self.flag, usual_numbers()[self.flag])
        ranks = f"use {RANKS}, or " if newest * unit <= LATEST else ""
        work.stop(DataError(table.origin, f"the newest time is {newest * unit:.15g}",
                            ". ".join(filter(None, [f"In the unit {self.form}, this is in 1973 or earlier",
                                                    found.why])),
                            found.fix or f"{ranks}correct the times or --time_unit"))

    def _refuse_mixture(self, work: Workspace, table: RawTable, num_events: int) -> None:
        """Raise DataError if over 1 % of the times are before 1973 in a small unit, but plausible in another unit."""
        others = " OR ".join(condition for form, condition in usual_numbers().items() if form != self.flag)
        num_others = work.value(f"""SELECT count(*) FROM (
            SELECT "time" * {UNITS[self.form]} AS "time" FROM events WHERE "time" < {EARLIEST}) WHERE {others}""")
        if num_others > (1 - NEARLY_ALL) * num_events:
            found = advice(work, table, self.flag, f'{self.seconds()} BETWEEN {EARLIEST} AND {LATEST}')
            work.stop(DataError(table.origin, f"{num_others:,} of {num_events:,} times are not in the unit {self.form}",
                                found.why or f"They are before 1973 with {self.flag}",
                                found.fix or "correct the file, so that all times are in one unit"))

    def _refuse_dates(self, work: Workspace, table: RawTable, num_events: int) -> None:
        """Raise DataError if more than COMPACT_SHARE of the times are dates that are written as numbers."""
        [(num_dates, example)] = work.run(f"""
            SELECT count(*), min("time") FROM events WHERE try_strptime(
                rpad(round("time" * {UNITS[self.form]})::BIGINT::VARCHAR, 14, '0'), '%Y%m%d%H%M%S') IS NOT NULL""")
        if num_dates > COMPACT_SHARE * num_events:
            work.stop(DataError(table.origin, f"{num_dates:,} of {num_events:,} times are dates written as numbers",
                                f"For example, --time_unit {self.form} reads {example * UNITS[self.form]:.15g} as "
                                f"{_day(example)}", "use --time_unit date"))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
