"""Rows that are no event or no item: found in the table, looked up in the raw file, named or set apart."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import DataError
from dataloader.readers import delimited
from dataloader.readers.lines import NAMES, NO_RECORD, PARSERS, encodable, numbered_lines, select_rows
from dataloader.readers.raw import RawTable, reader
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.01
MAX_ID = 10_000  # bytes; one that is longer is no id, but what came of a fault in the file
EXCERPT = 80
AT_ONCE = 1000  # records that one query looks up


def drop_bad_rows(work: Workspace, table: RawTable, into: str, bad: str, explain: Callable[[dict], str], policy: str,
              log_path: Path) -> int:
    """Leave out the rows of `into` that are `bad` (SQL), and count them. Raises DataError by the policy."""
    num_bad, num_rows = work.value(f"SELECT count(*) FROM {into} WHERE {bad}"), work.count(into)
    if not num_bad:
        return 0
    with work.connection.cursor() as cursor:
        records = cursor.execute(f"SELECT rowid FROM {into} WHERE {bad} ORDER BY rowid")
        rows = ((where, values if isinstance(values, str) else explain(values), text[:EXCERPT]) for where, values, text
                in _rows_at(work, table, (record for record, in iter(records.fetchone, None))))
        if policy == "fail" or num_bad > MAX_BAD_SHARE * num_rows:
            where, reason, excerpt = next(rows)
            why, fix = "", "mend the line, or --bad_lines skip, which leaves out up to 1 % of the lines"
            if policy == "skip":
                why, fix = ", and more than 1 % is not left out", "mend the file"
            raise DataError(where, reason,
                            f"it reads {excerpt!r}; {num_bad:,} of {num_rows:,} lines are like that{why}", fix)
        with log_path.open("a", encoding="utf-8") as file:
            for where, reason, excerpt in rows:
                file.write(json.dumps({"where": where, "reason": reason, "excerpt": excerpt}) + "\n")
    log.warning("process: %d of %d lines of %s are left out; %s lists them", num_bad, num_rows, table.path.name,
                log_path)
    work.run(f"DELETE FROM {into} WHERE {bad}")
    return num_bad


def _rows_at(work: Workspace, table: RawTable, records: Iterator[int]) -> Iterator[tuple[str, dict | str, str]]:
    """Of the raw rows with these numbers where they are, their values by column (or why they have none), their text."""
    if table.format == "csv":
        for line, values, text in select_rows(delimited.rows(table.path, table.layout), records):
            yield f"{table.origin}:{line}", values, text
    elif table.format == "parquet":
        while some := list(itertools.islice(records, AT_ONCE)):
            with work.connection.cursor() as cursor:
                found = cursor.execute(f"SELECT * FROM {reader(table)} WHERE file_row_number IN "
                                       f"({', '.join(map(str, some))}) ORDER BY file_row_number")
                names = [column[0] for column in found.description]
                for values in found.fetchall():
                    row = dict(zip(names, values, strict=True))
                    yield f"{table.origin}: row {row.pop('file_row_number') + 1}", row, str(row)
    else:
        for number, line in select_rows(numbered_lines(table.path), records):
            try:
                values = PARSERS[table.format](line)
            except NO_RECORD as error:
                # An array of records is a frequent mistake: that its first line is no record says little.
                array = "; a line must hold one record, and not an array" if line.lstrip()[:1] == b"[" else ""
                reason = f"{str(error)[:100] or type(error).__name__}{array}"
                values = f"is not a {NAMES[table.format]} record ({reason})"
            yield f"{table.origin}:{number}", values, line.decode("utf-8", "replace").strip()


def value_of(table: RawTable, values: dict, field: str) -> object:
    """The raw value of one of our fields in a row, None where it has none."""
    return next((values[c] for c in table.columns.get(field, ()) if values.get(c) not in (None, "")), None)


def bad_id(column: str) -> str:
    """SQL that holds for a raw id of no use."""
    return f"coalesce(strlen({column}), 0) NOT BETWEEN 1 AND {MAX_ID}"


def id_fault(table: RawTable, values: dict, field: str) -> str:
    """Why a row has no useful raw id, or nothing."""
    if value_of(table, values, field) is None:
        return missing_field(table, field)
    value = str(value_of(table, values, field))
    length = len(value.encode("utf-8", "surrogatepass"))
    if length > MAX_ID:
        return f"has the {field} {value[:20]!r}… of {length:,} bytes; there may be {MAX_ID:,}"
    return "" if encodable(value) else f"has the {field} {value[:40]!r}, which holds half a character"


def missing_field(table: RawTable, field: str) -> str:
    return f"lacks the {field} ({' or '.join(table.columns.get(field, ('?',)))})"


def number_fault(field: str, value: object, low: float, high: float, hint: str = "") -> str:
    """Why a raw value is no number from `low` to `high`, or nothing."""
    value = str(value)
    try:
        number = float(value)
    except ValueError:
        return f"has the {field} {value[:40]!r}, which is no number"
    if not math.isfinite(number):
        return f"has the {field} {value[:40]}, which is not finite"
    return "" if low <= number <= high else (
        f"has the {field} {value[:40]}, which is not from {low:,.16g} to {high:,.16g}{hint}")
