"""Convert raw interactions to events with integer user and item keys, and report invalid rows."""

from pathlib import Path
from typing import NamedTuple

from dataloader.options import ProcessOptions
from dataloader.readers.bad_rows import (
    NO_RATINGS,
    Fault,
    bad_id,
    drop_bad_rows,
    id_fault,
    missing_field,
    nested_fault,
    number_fault,
    value_of,
)
from dataloader.readers.nested import in_text, is_nested, is_several
from dataloader.readers.raw import ID, RawTable, inexact_id, largest_id, load, repair
from dataloader.sources import refuse_other_source
from dataloader.tables.time_forms import LATEST
from dataloader.tables.times import Times
from dataloader.workspace import Workspace

FIELDS = ("user", "item", "time", "rating")
IMPLICIT_RATING = "1"   # the rating of all events of a file without ratings


class EventCounts(NamedTuple):
    """The number of invalid lines that were skipped, and of valid events with an unusually early time."""

    num_bad: int
    num_before_1990: int


def read_events(work: Workspace, table: RawTable, options: ProcessOptions, bad_lines: Path) -> EventCounts:
    """Load the valid interactions into the table `events (raw_user, raw_item, time, rating)`, in file order.

    `time` is in seconds, with a fraction. Raises DataError if --bad_lines does not allow skipping the invalid lines
    (the error names the first of them), or if the times are certainly in another unit than --time_unit.
    """
    times = Times(work, table, options.processing)
    query = f"""SELECT "user" AS raw_user, item AS raw_item, {times.seconds()} AS "time",
                       try_cast({'rating' if table.columns.get('rating') else IMPLICIT_RATING} AS DOUBLE) AS rating
                FROM {{rows}}"""
    types = {"user": ID, "item": ID, "time": times.raw_type, "rating": "DOUBLE"}
    work.run("SET TimeZone = 'UTC'")  # dates without a time zone are in UTC; DuckDB's default is the machine's zone
    load(work, table, "events", query, types)
    [(num_events, *counts, num_inexact)] = work.run(f"""
        SELECT count(*), count(raw_user), count(raw_item), count("time"), count(rating),
               count(*) FILTER ({inexact_id(table, 'raw_user')} OR {inexact_id(table, 'raw_item')}) FROM events""")
    if absent := [field for field, count in zip(FIELDS, counts, strict=True) if num_events and not count]:
        refuse_other_source(work, table, "interactions", options.source, absent)
    repair(work, table, "events", query, types, "raw_user IS NULL AND raw_item IS NULL", num_inexact)
    low, high = options.config["rating_range"]
    kinds = {"cannot be read": 'raw_user IS NULL AND raw_item IS NULL AND "time" IS NULL',
             "have no valid user": bad_id("raw_user", table), "have no valid item": bad_id("raw_item", table),
             "have no valid time": '"time" IS NULL',
             "have a time that is not from 1970 to 2100": f'"time" NOT BETWEEN 0 AND {LATEST}',
             "have no valid rating": "rating IS NULL OR NOT isfinite(rating)",
             f"have a rating that is not from {low:,g} to {high:,g}": f"rating NOT BETWEEN {low} AND {high}"}
    largest = {field: largest_id(work, table, field) for field in ("user", "item")}

    def explain(values: dict) -> Fault:
        return _fault(work, table, values, times, largest, (low, high), options.source == "local")

    num_bad = drop_bad_rows(work, table, "events", kinds, explain, options.processing.bad_lines, bad_lines)
    return EventCounts(num_bad, times.check(work, table))


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


def _fault(work: Workspace, table: RawTable, values: dict, times: Times, largest: dict[str, int],
           rating_range: tuple[float, float], local: bool) -> Fault:
    """Return why a row with these raw values is invalid."""
    for field in ("user", "item"):
        fault = id_fault(table, values, field, largest[field], f"--{field}_column" if local else "")
        if fault.reason:
            return fault
    time, rating = (value_of(table, values, field) for field in ("time", "rating"))
    if time is None:
        return Fault(missing_field(table, "time"))
    if is_nested(time) or is_several(in_text(time)):
        return nested_fault(table, values, "time", "--time_column" if local else "")
    if reason := times.number_fault(time):
        return Fault(reason, times.fix_for(time), lambda: times.advice(work, table))
    reason = ""
    if rating is not None:
        reason = number_fault("rating", rating, *rating_range)
    elif table.columns.get("rating"):
        reason = missing_field(table, "rating")
    if reason:
        return Fault(reason, NO_RATINGS if local else "")
    if times.raw_type == "DOUBLE":
        return Fault("is not a valid event")
    return Fault(times.date_fault(time), times.fix_for(time), lambda: times.advice(work, table))
