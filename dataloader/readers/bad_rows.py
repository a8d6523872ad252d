"""Report or skip the rows of a raw file that are not valid events or items."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from dataloader.readers import delimited
from dataloader.readers.lines import (
    NAMES,
    NO_RECORD,
    NOT_UTF8,
    PARSERS,
    encodable,
    numbered_lines,
    select_rows,
    value_at,
)
from dataloader.readers.raw import RawTable, reader
from dataloader.readers.recognition import not_utf8_fix, other_format, quoting_flag
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_ID = 10_000  # bytes; a longer id means that the file is broken
EXCERPT = 80     # characters
AT_ONCE = 1000   # records per query
NUM_EXAMPLES = 3  # rows of each kind that --check shows
UNREAD = "?"     # in place of a flag: the row could not be split into values
NO_RATINGS = "--rating_column '' to read the file without ratings"


class BadRows(NamedTuple):
    """All invalid rows of one kind in a file, for the report of --check."""

    kind: str            # such as "have no valid time"
    num: int
    num_rows: int        # all rows of the file
    examples: list[str]  # `file:line: reason` of the first rows
    skipped: bool        # whether `process` would skip these rows


def drop_bad_rows(work: Workspace, table: RawTable, into: str, kinds: dict[str, str],
                  explain: Callable[[dict], tuple[str, str]], policy: str, log_path: Path) -> int:
    """Delete the invalid rows from the table `into`, list them in the file `log_path`, and return their number.

    kinds: for each kind of invalid row, a description and an SQL condition that is true for such rows
    explain: called with the raw values of an invalid row (column -> value). Returns the reason, and a flag that would
        make the row valid, or other words that follow "use" ("" if there are none).
    policy: the value of --bad_lines

    Raises DataError about the first invalid row if `policy` is "fail", or if it does not allow so many invalid rows.
    """
    bad = " OR ".join(f"({condition})" for condition in kinds.values())
    num_bad, num_rows = work.value(f"SELECT count(*) FROM {into} WHERE {bad}"), work.count(into)
    if not num_bad:
        return 0
    stops = 100 * num_bad > max_bad_percent(policy) * num_rows
    if work.findings is not None:
        work.findings.bad_rows += _bad_rows_by_kind(work, table, into, kinds, explain, num_rows, not stops)
    with work.connection.cursor() as cursor:
        records = cursor.execute(f"SELECT rowid FROM {into} WHERE {bad} ORDER BY rowid")
        rows = ((where, *((values, NOT_UTF8 if values.startswith(NOT_UTF8) else UNREAD) if isinstance(values, str)
                          else explain(values)), text[:EXCERPT])
                for where, values, text
                in _rows_at(work, table, (record for record, in iter(records.fetchone, None))))
        if stops:
            where, reason, flag, excerpt = next(rows)
            limit = "" if policy == "fail" else f", but at most {max_bad_percent(policy):g}% can be skipped"
            work.stop(DataError(where, reason,
                                f"The line is {excerpt!r}; {num_bad:,} of {num_rows:,} lines are invalid{limit}",
                                "leave out --no_header" if where == f"{table.origin}:1" and table.numbered else
                                _fix(table, flag, num_bad, num_rows)))
        elif work.findings is None:
            with log_path.open("a", encoding="utf-8") as file:
                for where, reason, _flag, excerpt in rows:
                    file.write(json.dumps({"where": where, "reason": reason, "excerpt": excerpt}) + "\n")
            log.warning("process: skipped %d of %d lines of %s; they are listed in %s", num_bad, num_rows,
                        table.path.name, log_path)
    work.run(f"DELETE FROM {into} WHERE {bad}")
    return num_bad


def _bad_rows_by_kind(work: Workspace, table: RawTable, into: str, kinds: dict[str, str],
                      explain: Callable[[dict], tuple[str, str]], num_rows: int, skipped: bool) -> Iterator[BadRows]:
    """Yield the invalid rows of each kind. A row of several kinds counts for the first of them."""
    cases = " ".join(f"WHEN {condition} THEN {place}" for place, condition in enumerate(kinds.values()))
    found = work.run(f"""
        SELECT kind, count(*), min(record, {NUM_EXAMPLES}) FROM (SELECT CASE {cases} END AS kind, rowid AS record
                                                                 FROM {into})
        WHERE kind IS NOT NULL GROUP BY kind ORDER BY kind""")
    records = sorted(record for _kind, _num, first in found for record in first)
    reasons = {record: f"{where}: {values if isinstance(values, str) else explain(values)[0]}"
               for record, (where, values, _text) in zip(records, _rows_at(work, table, iter(records)), strict=True)}
    for kind, num, first in found:
        yield BadRows(list(kinds)[kind], num, num_rows, [reasons[record] for record in first], skipped)


def max_bad_percent(policy: str) -> float:
    """Return the maximum percentage of invalid rows: "fail" -> 0, "skip" -> 1, "skip:2.5%" -> 2.5."""
    kind, _, limit = policy.partition(":")
    return 0 if kind == "fail" else float(limit.removesuffix("%") or 1)


def _fix(table: RawTable, flag: str, num_bad: int, num_rows: int) -> str:
    """Return what to do about the invalid rows of a file.

    flag: a flag that would make the first of these rows valid, or "" if there is none; UNREAD or NOT_UTF8 if the row
        has no values

    Raises DataError if most rows are invalid because the file is in another format.
    """
    half, most = 2 * num_bad >= num_rows, 2 * num_bad > num_rows
    recode = not_utf8_fix(table.path) if flag == NOT_UTF8 else ""
    if most and recode:
        return recode
    if flag in (UNREAD, NOT_UTF8):
        keys = tuple(columns[0] for field, columns in table.columns.items() if field in ("user", "item", "time"))
        if half and (error := other_format(table.path, table.format, keys)):
            raise error
        own_text = table.format == "csv" and not table.source
        flag = quoting_flag(table.path, table.layout, half) if own_text else ""
    elif not half and flag != NO_RATINGS:
        flag = ""  # it would change how all lines are read
    fixes = [f"use {flag}"] * bool(flag) + [f"correct the {'file' if most else 'lines'}"]
    if not most:
        percent = math.ceil(100 * num_bad / num_rows)
        fixes.append(f"use --bad_lines skip{'' if percent == 1 else f':{percent}%'} to leave them out")
    return ", or ".join([*fixes, *filter(None, [recode])])


def _rows_at(work: Workspace, table: RawTable, records: Iterator[int]) -> Iterator[tuple[str, dict | str, str]]:
    """Yield (`file:line`, values, text) for some rows of the raw file.

    records: the indices of these rows, from 0, in ascending order

    `values` is a dict (column -> value), or the reason why the row cannot be parsed (a string).
    """
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
                # A frequent mistake is a file with one JSON array of all records. The parser's message does not say so.
                array = "; expected one record per line, not an array" if line.lstrip()[:1] == b"[" else ""
                reason = f"{str(error)[:100] or type(error).__name__}{array}"
                values = f"is not a {NAMES[table.format]} record ({reason})"
                if isinstance(error, UnicodeDecodeError):
                    values = f"{NOT_UTF8} ({error})"
            yield f"{table.origin}:{number}", values, line.decode("utf-8", "replace").strip()


def value_of(table: RawTable, values: dict, field: str) -> object:
    """Return the raw value of a field in a row, or None if the value is missing or empty."""
    found = (value_at(values, column) for column in table.columns.get(field, ()))
    return next((value for value in found if value not in (None, "")), None)


def bad_id(column: str, table: RawTable) -> str:
    """Return an SQL condition that is true if the raw id in a column is missing or too long.

    In a CSV or TSV file, an id with a line break is invalid too: most likely, a quote is not closed.
    """
    several_lines = f" OR contains({column}, chr(10)) OR contains({column}, chr(13))" if table.format == "csv" else ""
    return f"(coalesce(strlen({column}), 0) NOT BETWEEN 1 AND {MAX_ID}{several_lines})"


def id_fault(table: RawTable, values: dict, field: str, largest: int) -> tuple[str, str]:
    """Return why the raw id in the field of a row is invalid, and what to use instead; or ("", "") if the id is valid.

    largest: the largest floating-point number that is a valid id
    """
    found = value_of(table, values, field)
    if found is None:
        return missing_field(table, field), ""
    if isinstance(found, float) and not (found.is_integer() and abs(found) <= largest):
        return (f"{field} must be a text or a whole number, up to {largest:,} if it is a floating-point number, "
                f"got {found!r}", "text or integers for the ids")
    value = str(found)
    length = len(value.encode("utf-8", "surrogatepass"))
    if length > MAX_ID:
        return f"{field} must have at most {MAX_ID:,} bytes, got {length:,} bytes: {value[:20]!r}…", ""
    if table.format == "csv" and set(value) & {"\n", "\r"}:
        return f"{field} must not contain a line break, got {value[:40]!r}; is a quote not closed?", ""
    return "" if encodable(value) else f"{field} must be valid Unicode, got {value[:40]!r}", ""


def missing_field(table: RawTable, field: str) -> str:
    return f"has no {field} ({' or '.join(table.columns.get(field, ('?',)))})"


def number_fault(field: str, value: object, low: float, high: float, hint: str = "") -> str:
    """Return why a raw value is not a number from `low` to `high`, or "" if it is valid."""
    value = str(value)
    try:
        number = float(value)
    except ValueError:
        return f"{field} must be a number, got {value[:40]!r}{hint}"
    if not math.isfinite(number):
        return f"{field} must be finite, got {value[:40]}"
    return "" if low <= number <= high else (
        f"{field} must be from {low:,.16g} to {high:,.16g}, got {value[:40]}{hint}")
