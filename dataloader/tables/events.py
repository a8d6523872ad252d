"""Raw interactions of any format become events, with integers for users and items; what is no event is named."""

from pathlib import Path

from common.errors import DataError
from dataloader.options import ProcessOptions
from dataloader.readers.bad_rows import bad_id, drop_bad_rows, id_fault, missing_field, number_fault, value_of
from dataloader.readers.raw import LATEST, UNITS, RawTable, load, repair, type_of
from dataloader.sources import refuse_other_source
from dataloader.workspace import Workspace

FIELDS = ("user", "item", "time", "rating")
EARLIEST = 100_000_000  # seconds; 1973. A set whose times are all below it counts in another unit
IMPLICIT_RATING = "1"   # of an event that has none, where its source has no ratings


def read_events(work: Workspace, table: RawTable, options: ProcessOptions, bad_lines: Path) -> int:
    """Fill `events (raw_user, raw_item, time, rating)` in the file's order, `time` in the unit of the options.

    A column of a time type needs no unit. Returns how many lines were left out. Raises DataError naming file and line
    of what is no event.
    """
    unit = options.processing.time_unit
    dates = unit == "date" or type_of(work, table, "time").startswith(("DATE", "TIMESTAMP"))
    # A whole number of its unit, NULL where it is none. Without its zone, a cast would pass over an offset from UTC.
    time = (f"""epoch_us(try_cast("time" AS TIMESTAMPTZ)) // {UNITS['us'] // UNITS[unit]}""" if dates else
            'try_cast(floor(try_cast("time" AS DOUBLE)) AS BIGINT)')
    query = f"""SELECT "user" AS raw_user, item AS raw_item, {time} AS "time",
                       try_cast({'rating' if table.columns.get('rating') else IMPLICIT_RATING} AS DOUBLE) AS rating
                FROM {{rows}}"""
    types = {"user": "VARCHAR", "item": "VARCHAR", "time": "VARCHAR" if dates else "DOUBLE", "rating": "DOUBLE"}
    work.run("SET TimeZone = 'UTC'")  # what dates without a zone are in; else the machine's
    load(work, table, "events", query, types)
    [counts] = work.run('SELECT count(*), count(raw_user), count(raw_item), count("time"), count(rating) FROM events')
    if absent := [field for field, count in zip(FIELDS, counts[1:], strict=True) if counts[0] and not count]:
        refuse_other_source(work, table, "interactions", options.source, absent)
    repair(work, table, "events", query, types, "raw_user IS NULL AND raw_item IS NULL")
    low, high = options.config["rating_range"]
    bad = f"""{bad_id('raw_user')} OR {bad_id('raw_item')} OR "time" IS NULL OR rating IS NULL
              OR "time" NOT BETWEEN 0 AND {LATEST * UNITS[unit]} OR NOT isfinite(rating)
              OR rating NOT BETWEEN {low} AND {high}"""
    num_bad = drop_bad_rows(work, table, "events", bad, lambda values: _fault(
        table, values, None if dates else unit, low, high), options.processing.bad_lines, bad_lines)
    newest = work.value('SELECT coalesce(max("time"), 0) FROM events')
    if unit in ("ms", "us") and 0 < newest < EARLIEST * UNITS[unit]:
        raise DataError(table.origin, f"its newest time is {newest}", f"in {unit} that is 1973 or before",
                        (_hint(newest, unit) or "; another --time_unit, if it counts that")[2:])
    return num_bad


def make_keys(work: Workspace) -> None:
    """Make `kept (user_key, item_key, time, rating, line)` and `user_keys`, `item_keys (raw, key)` from `events`.

    A row's id in `events` is its line in the input. A user's or an item's key is the first line that names it, so that
    everything after is done on integers.
    """
    for side in ("user", "item"):
        work.run(f"""CREATE TABLE {side}_keys AS
            SELECT raw_{side} AS raw, min(rowid)::UINTEGER AS key FROM events GROUP BY ALL""")
    work.run("""CREATE TABLE kept AS
        SELECT u.key AS user_key, i.key AS item_key, e."time", e.rating::FLOAT AS rating, e.rowid::UINTEGER AS line
        FROM events e JOIN user_keys u ON e.raw_user = u.raw JOIN item_keys i ON e.raw_item = i.raw""")
    work.run("DROP TABLE events")


def _fault(table: RawTable, values: dict, unit: str | None, low: float, high: float) -> str:
    """What is wrong with a row's raw values; `unit` is None for dates."""
    if fault := id_fault(table, values, "user") or id_fault(table, values, "item"):
        return fault
    time, rating = (value_of(table, values, field) for field in ("time", "rating"))
    if time is None:
        return missing_field(table, "time")
    fault = number_fault("time", time, 0, LATEST * UNITS[unit], _hint(time, unit)) if unit else ""
    if not fault and rating is not None:
        fault = number_fault("rating", rating, low, high)
    elif not fault and table.columns.get("rating"):
        fault = missing_field(table, "rating")
    no_date = f"has the time {str(time)[:40]!r}, which is no date (ISO 8601) from 1970 to 2100"
    return fault or ("is no event" if unit else no_date)


def _hint(value: object, unit: str) -> str:
    """The unit in which a time that is none would be of our days."""
    try:
        time = float(str(value))
    except ValueError:
        return ""
    fits = [other for other in ("s", "ms", "us") if EARLIEST * UNITS[other] <= time <= LATEST * UNITS[other]]
    return "".join(f"; --time_unit {other}, if that is what it counts" for other in fits if other != unit)
