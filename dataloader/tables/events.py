"""Convert raw interactions to events with integer user and item keys, and report invalid rows."""

from pathlib import Path

from common.errors import DataError
from dataloader.options import ProcessOptions, timestamp_of
from dataloader.readers.bad_rows import bad_id, drop_bad_rows, id_fault, missing_field, number_fault, value_of
from dataloader.readers.raw import LATEST, UNITS, RawTable, load, repair, type_of
from dataloader.sources import refuse_other_source
from dataloader.workspace import Workspace

FIELDS = ("user", "item", "time", "rating")
EARLIEST = 100_000_000  # seconds (1973); if all times are earlier, --time_unit must be wrong
IMPLICIT_RATING = "1"   # the rating of all events of a file without ratings


def read_events(work: Workspace, table: RawTable, options: ProcessOptions, bad_lines: Path) -> int:
    """Load the valid interactions into the table `events (raw_user, raw_item, time, rating)`, in file order.

    `time` is in the unit of --time_unit, or in microseconds with `--time_unit date`. Returns the number of invalid
    lines that were skipped. Raises DataError if --bad_lines does not allow skipping them; the error names the first
    invalid line.
    """
    unit = options.processing.time_unit
    dates = unit == "date" or type_of(work, table, "time").startswith(("DATE", "TIMESTAMP"))
    # The time becomes a whole number, or NULL if it is invalid. Dates are cast to TIMESTAMPTZ, because a cast to
    # TIMESTAMP would ignore their offset from UTC.
    time = (f"""epoch_us(try_cast("time" AS TIMESTAMPTZ)) // {UNITS['us'] // UNITS[unit]}""" if dates else
            'try_cast(floor(try_cast("time" AS DOUBLE)) AS BIGINT)')
    query = f"""SELECT "user" AS raw_user, item AS raw_item, {time} AS "time",
                       try_cast({'rating' if table.columns.get('rating') else IMPLICIT_RATING} AS DOUBLE) AS rating
                FROM {{rows}}"""
    types = {"user": "VARCHAR", "item": "VARCHAR", "time": "VARCHAR" if dates else "DOUBLE", "rating": "DOUBLE"}
    work.run("SET TimeZone = 'UTC'")  # dates without a time zone are in UTC; DuckDB's default is the machine's zone
    load(work, table, "events", query, types)
    [counts] = work.run('SELECT count(*), count(raw_user), count(raw_item), count("time"), count(rating) FROM events')
    if absent := [field for field, count in zip(FIELDS, counts[1:], strict=True) if counts[0] and not count]:
        refuse_other_source(work, table, "interactions", options.source, absent)
    repair(work, table, "events", query, types, "raw_user IS NULL AND raw_item IS NULL")
    low, high = options.config["rating_range"]
    bad = f"""{bad_id('raw_user', table)} OR {bad_id('raw_item', table)} OR "time" IS NULL OR rating IS NULL
              OR "time" NOT BETWEEN 0 AND {LATEST * UNITS[unit]} OR NOT isfinite(rating)
              OR rating NOT BETWEEN {low} AND {high}"""
    num_bad = drop_bad_rows(work, table, "events", bad, lambda values: _fault(
        table, values, "date" if dates else unit, low, high), options.processing.bad_lines, bad_lines)
    newest = work.value('SELECT coalesce(max("time"), 0) FROM events')
    if unit in ("ms", "us") and 0 < newest < EARLIEST * UNITS[unit]:
        flag = _fitting_flag(newest, unit)
        raise DataError(table.origin, f"the newest time is {newest}", f"In the unit {unit}, this is in 1973 or earlier",
                        f"use {flag}" if flag else "correct the times or --time_unit")
    return num_bad


def make_keys(work: Workspace) -> None:
    """Replace `events` by the table `kept (user_key, item_key, time, rating, line)`, with integer keys for raw ids.

    `line` is the row id of the event in `events`. The tables `user_keys (raw, key)` and `item_keys (raw, key)` map raw
    ids to keys. The key of a user or item is the `line` of its first event.
    """
    for side in ("user", "item"):
        work.run(f"""CREATE TABLE {side}_keys AS
            SELECT raw_{side} AS raw, min(rowid)::UINTEGER AS key FROM events GROUP BY ALL""")
    work.run("""CREATE TABLE kept AS
        SELECT u.key AS user_key, i.key AS item_key, e."time", e.rating::FLOAT AS rating, e.rowid::UINTEGER AS line
        FROM events e JOIN user_keys u ON e.raw_user = u.raw JOIN item_keys i ON e.raw_item = i.raw""")
    work.run("DROP TABLE events")


def _fault(table: RawTable, values: dict, unit: str, low: float, high: float) -> tuple[str, str]:
    """Return why a row with these raw values is invalid, and a --time_unit flag that would make it valid (or "")."""
    if fault := id_fault(table, values, "user") or id_fault(table, values, "item"):
        return fault, ""
    time, rating = (value_of(table, values, field) for field in ("time", "rating"))
    if time is None:
        return missing_field(table, "time"), ""
    flag = _fitting_flag(time, unit)
    hint = f" (valid with {flag})" if flag else ""
    if unit != "date" and (fault := number_fault("time", time, 0, LATEST * UNITS[unit], hint)):
        return fault, flag
    if rating is not None:
        fault = number_fault("rating", rating, low, high)
    elif table.columns.get("rating"):
        fault = missing_field(table, "rating")
    if fault or unit != "date":
        return fault or "is not a valid event", ""
    return f"time must be an ISO 8601 date from 1970 to 2100, got {str(time)[:40]!r}{hint}", flag


def _fitting_flag(value: object, unit: str) -> str:
    """Return a --time_unit flag for another unit in which the value is a plausible time, or "" if there is none."""
    try:
        time = float(str(value))
    except ValueError:
        timestamp = timestamp_of(str(value))
        fits = ["date"] if timestamp is not None and 0 <= timestamp <= LATEST else []
    else:
        fits = [other for other in ("s", "ms", "us") if EARLIEST * UNITS[other] <= time <= LATEST * UNITS[other]]
    return "".join(f"--time_unit {other}" for other in fits if other != unit)
