"""Rows that are no event or no item: found in the table, looked up in the raw file, named or set apart."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from dataloader.readers import delimited
from dataloader.readers.lines import NAMES, NO_RECORD, PARSERS, encodable, numbered_lines
from dataloader.readers.raw import RawTable, reader
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.01
MAX_ID = 10_000  # bytes; one that is longer is no id, but what came of a fault in the file
EXCERPT = 80
AT_ONCE = 1000  # records that one query looks up


class Row(NamedTuple):
    """A row as it stands in the raw file."""

    where: str           # `file:line`, or `file: row` where there are no lines
    values: dict | str   # by column; or why it has none
    text: str


def set_apart(work: Workspace, table: RawTable, into: str, bad: str, explain: Callable[[dict], str], policy: str,
              log_path: Path) -> int:
    """Find the rows of table `into` for which `bad` (SQL) holds; fail at the first, or leave out and list them all.

    `explain` says what is wrong with a row's raw values. Returns how many were left out. Raises DataError at the first
    (policy fail), or beyond 1 % (policy skip).
    """
    num_bad, num_rows = work.value(f"SELECT count(*) FROM {into} WHERE {bad}"), work.count(into)
    if not num_bad:
        return 0
    if policy == "fail" or num_bad > MAX_BAD_SHARE * num_rows:
        first = work.value(f"SELECT min(rowid) FROM {into} WHERE {bad}")
        row, share = next(rows_at(work, table, iter([first]))), f"{num_bad:,} of {num_rows:,} lines are like that"
        fix = "mend the line, or --bad_lines skip, which leaves out up to 1 % of the lines"
        if policy == "skip":
            share, fix = f"{share}, and more than 1 % is not left out", "mend the file"
        raise DataError(row.where, _reason(row, explain), f"it reads {row.text[:EXCERPT]!r}; {share}", fix)
    with work.connection.cursor() as cursor, log_path.open("a", encoding="utf-8") as file:
        bad_rows = cursor.execute(f"SELECT rowid FROM {into} WHERE {bad} ORDER BY rowid")
        for row in rows_at(work, table, (record for record, in iter(bad_rows.fetchone, None))):
            file.write(json.dumps({"where": row.where, "reason": _reason(row, explain), "excerpt": row.text[:EXCERPT]})
                       + "\n")
    log.warning("process: %d of %d lines of %s are left out; %s lists them", num_bad, num_rows, table.path.name,
                log_path)
    work.run(f"DELETE FROM {into} WHERE {bad}")
    return num_bad


def _reason(row: Row, explain: Callable[[dict], str]) -> str:
    return row.values if isinstance(row.values, str) else explain(row.values)


def rows_at(work: Workspace, table: RawTable, records: Iterator[int]) -> Iterator[Row]:
    """The raw rows with these numbers (from 0, ascending, blank lines not counted)."""
    if table.format == "parquet":
        return _parquet_rows(work, table, records)
    if table.format == "csv":
        return (Row(f"{table.origin}:{line}", values, text) for line, values, text in _at(
            delimited.rows(table.path, table.layout), records))
    return (Row(f"{table.origin}:{number}", _parsed(table, line), line.decode("utf-8", "replace").strip())
            for number, line in _at(numbered_lines(table.path), records))


def _at(rows: Iterator[tuple], records: Iterator[int]) -> Iterator[tuple]:
    passed = 0
    for record in records:
        yield next(itertools.islice(rows, record - passed, None))
        passed = record + 1


def _parsed(table: RawTable, line: bytes) -> dict | str:
    try:
        return PARSERS[table.format](line)
    except NO_RECORD as error:
        # An array of records is a frequent mistake: that its first line is no record says little.
        array = "; a line must hold one record, and not an array" if line.lstrip()[:1] == b"[" else ""
        return f"is not a {NAMES[table.format]} record ({str(error)[:100] or type(error).__name__}{array})"


def _parquet_rows(work: Workspace, table: RawTable, records: Iterator[int]) -> Iterator[Row]:
    while some := list(itertools.islice(records, AT_ONCE)):
        with work.connection.cursor() as cursor:
            found = cursor.execute(f"SELECT * FROM {reader(table)} WHERE file_row_number IN "
                                   f"({', '.join(map(str, some))}) ORDER BY file_row_number")
            names = [column[0] for column in found.description]
            for values in found.fetchall():
                row = dict(zip(names, values, strict=True))
                record = row.pop("file_row_number")
                yield Row(f"{table.origin}: row {record + 1}", row, str(row))


def value_of(table: RawTable, values: dict, field: str) -> object:
    """The raw value of one of our fields in a row, None where it has none."""
    return next((values[c] for c in table.columns.get(field, ()) if values.get(c) not in (None, "")), None)


def bad_id(column: str) -> str:
    """SQL that holds for a raw id of no use."""
    return f"coalesce(strlen({column}), 0) NOT BETWEEN 1 AND {MAX_ID}"


def id_fault(table: RawTable, values: dict, field: str) -> str:
    """Why a row has no useful raw id, or nothing."""
    value = value_of(table, values, field)
    if value is None:
        return lacking(table, field)
    length = len(str(value).encode("utf-8", "surrogatepass"))
    if length > MAX_ID:
        return f"has the {field} {str(value)[:20]!r}… of {length:,} bytes; there may be {MAX_ID:,}"
    return "" if encodable(str(value)) else f"has the {field} {str(value)[:40]!r}, which holds half a character"


def lacking(table: RawTable, field: str) -> str:
    return f"lacks the {field} ({' or '.join(table.columns.get(field, ('?',)))})"


def number_fault(field: str, value: object, low: float, high: float, hint: str = "") -> str:
    """Why a raw value is no number from `low` to `high`, or nothing."""
    try:
        number = float(str(value))
    except ValueError:
        return f"has the {field} {str(value)[:40]!r}, which is no number"
    if not math.isfinite(number):
        return f"has the {field} {str(value)[:40]}, which is not finite"
    if not low <= number <= high:
        return f"has the {field} {str(value)[:40]}, which is not from {low:,.16g} to {high:,.16g}{hint}"
    return ""
