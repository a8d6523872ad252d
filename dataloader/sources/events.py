"""Raw interactions of any format become the table `events`; what is no event is found, named and perhaps left out."""

import logging
from pathlib import Path

from common.config import load_yaml
from common.errors import DataError
from dataloader.options import CONFIGS, SOURCES, DataOptions
from dataloader.sources.tables import (
    LATEST,
    UNITS,
    RawTable,
    first_record,
    lacking,
    load,
    number_fault,
    set_apart,
    value_of,
)
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

FIELDS = ("user", "item", "time", "rating")
EARLIEST_IN_MS = 100_000_000_000  # 1973; a set whose times are all below it counts in seconds
IMPLICIT_RATING = 1.0             # of an event that has none, where its source has no ratings


def read_events(work: Workspace, table: RawTable, options: DataOptions, bad_lines: Path) -> int:
    """Fill `events (raw_user, raw_item, time, rating)` in the file's order, `time` in the unit of the source.

    Returns how many lines were left out. Raises DataError naming file and line of what is no event.
    """
    unit = options.processing.time_unit
    query = f"""SELECT "user" AS raw_user, item AS raw_item, {_time(unit)} AS "time",
                       {'try_cast(rating AS DOUBLE)' if table.columns.get('rating') else IMPLICIT_RATING} AS rating
                FROM {{rows}}"""
    types = {"user": "VARCHAR", "item": "VARCHAR", "time": "VARCHAR" if unit == "date" else "DOUBLE",
             "rating": "DOUBLE"}
    load(work, table, "events", query, ("user", "item"), types)
    _refuse_other_schema(work, table, options.source)
    low, high = options.config["rating_range"]
    latest = LATEST * UNITS[unit]
    bad = f"""coalesce(raw_user, '') = '' OR coalesce(raw_item, '') = '' OR "time" IS NULL OR rating IS NULL
              OR "time" NOT BETWEEN 0 AND {latest} OR NOT isfinite(rating) OR rating NOT BETWEEN {low} AND {high}"""

    def explain(values: dict) -> str:
        return _fault(table, values, unit, low, high)

    num_bad = set_apart(work, table, "events", bad, explain, options.processing.bad_lines, bad_lines)
    newest = work.value('SELECT coalesce(max("time"), 0) FROM events')
    if unit == "ms" and 0 < newest < EARLIEST_IN_MS:
        raise DataError(table.origin, f"its newest time is {newest}", "in milliseconds that is 1973 or before",
                        "--time_unit s, if it counts seconds")
    return num_bad


def _time(unit: str) -> str:
    """SQL for the raw time as a whole number of its unit, NULL where it is none; fractions are cut off."""
    if unit == "date":
        return 'epoch_us(try_cast("time" AS TIMESTAMP))'
    return 'try_cast(floor(try_cast("time" AS DOUBLE)) AS BIGINT)'


def _fault(table: RawTable, values: dict, unit: str, low: float, high: float) -> str:
    """What is wrong with a row's raw values."""
    for field in FIELDS:
        value = value_of(table, values, field)
        if value is None and table.columns.get(field):
            return lacking(table, field)
        fault = ""
        if field == "time" and unit != "date":
            fault = number_fault(field, value, 0, LATEST * UNITS[unit], _hint(value, unit))
        elif field == "rating" and value is not None:
            fault = number_fault(field, value, low, high)
        if fault:
            return fault
    return f"is no event: the time is {value_of(table, values, 'time')!r}" if unit == "date" else "is no event"


def _hint(value: object, unit: str) -> str:
    digits = str(value).lstrip("-").split(".")[0]
    return "; if it counts milliseconds: --time_unit ms" if unit == "s" and len(digits) == 13 else ""


def _refuse_other_schema(work: Workspace, table: RawTable, source: str) -> None:
    """Raise DataError if no row has one of the fields at all: the file is of another kind."""
    [counts] = work.run(
        'SELECT count(*), count(raw_user), count(raw_item), count("time"), count(rating) FROM events')
    absent = [field for field, count in zip(FIELDS, counts[1:], strict=True) if counts[0] and not count]
    if not absent:
        return
    found = list(first_record(work, table))
    if not found:
        return  # no record at all: the first line's own fault says more
    if all(set(table.columns[field]) & set(found) for field in absent):
        return  # they are there, and hold what is no value
    needed = ", ".join(" or ".join(table.columns[field]) for field in FIELDS if table.columns.get(field))
    other = _source_with(found, source)
    raise DataError(table.origin, f"has no {' and no '.join(absent)}",
                    f"needed: {needed}; found: {', '.join(found[:20])}",
                    f"--source {other}" if other else "name the columns: " + " ".join(
                        f"--{field}_column NAME" for field in absent))


def _source_with(found: list[str], source: str) -> str | None:
    """The source whose interactions have these fields."""
    for name in SOURCES:
        columns = load_yaml(CONFIGS / f"{name}.yaml")[0].get("interactions", {}).get("columns", {})
        if name != source and columns and set(columns.values()) <= set(found):
            return name
    return None
