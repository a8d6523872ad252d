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
from dataloader.readers.nested import in_text, is_nested, is_several, list_fix, object_fix
from dataloader.readers.raw import RawTable, bracketed, reader
from dataloader.readers.recognition import not_utf8_fix, other_format, quoting_flag
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_ID = 10_000  # bytes; a longer id means that the file is broken
EXCERPT = 80     # characters
AT_ONCE = 1000   # records per query
NUM_EXAMPLES = 3  # rows of each kind that --check shows
UNREAD = "?"     # in place of a fix: the row could not be split into values
BLANKS = " \t\r\n\v\f\xa0\u3000"
SQL_BLANKS = " || ".join(f"chr({ord(blank)})" for blank in BLANKS)
NO_RATINGS = "use --rating_column '' to read the file without ratings"


class BadRows(NamedTuple):
    """All invalid rows of one kind in a file, for the report of --check."""

    kind: str            # such as "have no valid time"
    num: int
    num_rows: int        # all rows of the file
    examples: list[str]  # `file:line: reason` of the first rows
    skipped: bool        # whether `process` would skip these rows


class Advice(NamedTuple):
    """What to do about a column of a file, after all its values were read."""

    why: str = ""  # a fact about the whole column
    fix: str = ""  # makes nearly all rows valid, so it is better than skipping the invalid ones


class Fault(NamedTuple):
    """Why a row is invalid. The reason is "" if the row is valid."""

    reason: str
    fix: str = ""  # makes such rows valid, but may change how all rows are read; or UNREAD or NOT_UTF8
    advice: Callable[[], Advice] = Advice


def drop_bad_rows(work: Workspace, table: RawTable, into: str, kinds: dict[str, str],
                  explain: Callable[[dict], Fault], policy: str, log_path: Path) -> int:
    """Delete the invalid rows from the table `into`, list them in the file `log_path`, and return their number.

    kinds: for each kind of invalid row, a description and an SQL condition that is true for such rows
    explain: called with the raw values of an invalid row (column -> value)
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
        rows = ((where, Fault(values, NOT_UTF8 if values.startswith(NOT_UTF8) else UNREAD)
                 if isinstance(values, str) else explain(values), text[:EXCERPT])
                for where, values, text
                in rows_at(work, table, (record for record, in iter(records.fetchone, None))))
        if stops:
            where, fault, excerpt = next(rows)
            advice = fault.advice()
            limit = "" if policy == "fail" else f", but at most {max_bad_percent(policy):g}% can be skipped"
            why = f"The line is {excerpt!r}; {num_bad:,} of {num_rows:,} lines are invalid{limit}"
            work.stop(DataError(where, fault.reason, ". ".join(filter(None, [why, advice.why])),
                                "leave out --no_header" if where == f"{table.origin}:1" and table.numbered else
                                _fix(table, fault.fix, advice, num_bad, num_rows)))
        elif work.findings is None:
            with log_path.open("a", encoding="utf-8") as file:
                for where, fault, excerpt in rows:
                    file.write(json.dumps({"where": where, "reason": fault.reason, "excerpt": excerpt}) + "\n")
            log.warning("process: skipped %d of %d lines of %s; they are listed in %s", num_bad, num_rows,
                        table.path.name, log_path)
    work.run(f"DELETE FROM {into} WHERE {bad}")
    return num_bad


def _bad_rows_by_kind(work: Workspace, table: RawTable, into: str, kinds: dict[str, str],
                      explain: Callable[[dict], Fault], num_rows: int, skipped: bool) -> Iterator[BadRows]:
    """Yield the invalid rows of each kind. A row of several kinds counts for the first of them."""
    cases = " ".join(f"WHEN {condition} THEN {place}" for place, condition in enumerate(kinds.values()))
    found = work.run(f"""
        SELECT kind, count(*), min(record, {NUM_EXAMPLES}) FROM (SELECT CASE {cases} END AS kind, rowid AS record
                                                                 FROM {into})
        WHERE kind IS NOT NULL GROUP BY kind ORDER BY kind""")
    records = sorted(record for _kind, _num, first in found for record in first)
    reasons = {record: f"{where}: {values if isinstance(values, str) else explain(values).reason}"
               for record, (where, values, _text) in zip(records, rows_at(work, table, iter(records)), strict=True)}
    for kind, num, first in found:
        yield BadRows(list(kinds)[kind], num, num_rows, [reasons[record] for record in first], skipped)


def max_bad_percent(policy: str) -> float:
    """Return the maximum percentage of invalid rows: "fail" -> 0, "skip" -> 1, "skip:2.5%" -> 2.5."""
    kind, _, limit = policy.partition(":")
    return 0 if kind == "fail" else float(limit.removesuffix("%") or 1)


def _fix(table: RawTable, fix: str, advice: Advice, num_bad: int, num_rows: int) -> str:
    """Return what to do about the invalid rows of a file.

    fix: see `Fault`, about the first of these rows

    Raises DataError if most rows are invalid because the file is in another format.
    """
    half, most = 2 * num_bad >= num_rows, 2 * num_bad > num_rows
    correct = f"correct the {'file' if most else 'lines'}"
    if advice.fix:
        return f"{advice.fix}, or {correct}"
    recode = not_utf8_fix(table.path) if fix == NOT_UTF8 else ""
    if most and recode:
        return recode
    if fix in (UNREAD, NOT_UTF8):
        keys = tuple(columns[0] for field, columns in table.columns.items() if field in ("user", "item", "time"))
        if half and (error := other_format(table.path, table.format, keys)):
            raise error
        own_text = table.format == "csv" and not table.source
        flag = quoting_flag(table.path, table.layout, half) if own_text else ""
        fix = f"use {flag}" if flag else ""
    elif (not half and fix != NO_RATINGS) or advice.why:
        fix = ""  # it would change how all lines are read
    fixes = [*filter(None, [fix]), correct]
    if not most:
        percent = math.ceil(100 * num_bad / num_rows)
        fixes.append(f"use --bad_lines skip{'' if percent == 1 else f':{percent}%'} to leave them out")
    return ", or ".join([*fixes, *filter(None, [recode])])


def rows_at(work: Workspace, table: RawTable, records: Iterator[int]) -> Iterator[tuple[str, dict | str, str]]:
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
    """Return an SQL condition that is true if the raw id in a column is missing, blank or too long.

    In a CSV or TSV file, an id with a line break is invalid too: most likely, a quote is not closed.
    """
    several_lines = f" OR contains({column}, chr(10)) OR contains({column}, chr(13))" if table.format == "csv" else ""
    # The comparison comes first, because it is much faster than trimming every id.
    blank = f" OR ({column} < '!' AND trim({column}, {SQL_BLANKS}) = '')"
    return f"(coalesce(strlen({column}), 0) NOT BETWEEN 1 AND {MAX_ID}{several_lines}{blank})"


def id_fault(table: RawTable, values: dict, field: str, largest: int, flag: str = "") -> Fault:
    """Return why the raw id in the field of a row is invalid.

    largest: the largest floating-point number that is a valid id
    flag: the flag that names the column of the ids, "" if there is none
    """
    found = value_of(table, values, field)
    if found is None:
        return Fault(missing_field(table, field))
    if is_nested(found):
        return nested_fault(table, values, field, flag)
    if isinstance(found, bool) or (isinstance(found, float) and not (found.is_integer() and abs(found) <= largest)):
        return Fault(f"{field} must be a text or a whole number, up to {largest:,} if it is a floating-point number, "
                     f"got {found!r}", "use text or integers for the ids")
    value = str(found)
    length = len(value.encode("utf-8", "surrogatepass"))
    if length > MAX_ID:
        return Fault(f"{field} must have at most {MAX_ID:,} bytes, got {length:,} bytes: {value[:20]!r}…")
    if value < "!" and not value.strip(BLANKS):
        return Fault(f"{field} must not be blank, got {value[:40]!r}")
    if table.format == "csv" and set(value) & {"\n", "\r"}:
        return Fault(f"{field} must not contain a line break, got {value[:40]!r}; is a quote not closed?")
    return Fault("" if encodable(value) else f"{field} must be valid Unicode, got {value[:40]!r}")


def nested_fault(table: RawTable, values: dict, field: str, flag: str) -> Fault:
    """Return the fault of a row with a list or an object in a field. `flag` is the same as for `id_fault`."""
    found = value_of(table, values, field)
    if isinstance(found, dict) or isinstance(in_text(found), dict):
        column = next(column for column in table.columns[field] if value_at(values, column) == found)
        return Fault(f"{field} must be one text or number, got the object {str(found)[:40]}",
                     object_fix(table, found if isinstance(found, dict) else {}, column, flag))
    # All lists of an event must be split at the same time.
    lists = [column for each in ("user", "item", "time", "rating") for column in table.columns.get(each, ())
             if isinstance(value := value_at(values, column), list | tuple) or isinstance(in_text(value), list)]
    fix = list_fix(table, list(dict.fromkeys(lists)))
    return Fault(f"{field} must be one text or number, got the list {str(found)[:40]}", "", lambda: Advice(fix=fix))


def check_texts(work: Workspace, table: RawTable) -> None:
    """Search the tables `user_keys` and `item_keys` for ids that are lists of several values, or objects, in a text.

    Raises DataError if most events of a CSV file have such ids. Otherwise logs a warning, because they may be real ids.
    """
    for field in ("user", "item"):  # there are far fewer ids than events
        texts = work.run(f"SELECT raw, key FROM {field}_keys WHERE {bracketed('raw')} ORDER BY key LIMIT {AT_ONCE}")
        found = [(raw, key, value) for raw, key in texts if (value := in_text(raw)) is not None]
        if several := [(raw, key) for raw, key, value in found if is_several(value)]:
            [(num_found, num_texts, num)] = work.run(f"""
                SELECT count(*) FILTER (k.key IN {tuple(key for _raw, key, _value in found + found[:1])}),
                       count(*) FILTER (k.key <= {texts[-1][1]}), count(*)
                FROM kept JOIN {field}_keys k ON {field}_key = k.key WHERE {bracketed('k.raw')}""")
            # This is an estimate if there are very many different texts.
            _report_texts(work, table, field, *several[0], round(num * num_found / num_texts))


def _report_texts(work: Workspace, table: RawTable, field: str, example: str, record: int, num: int) -> None:
    num_events = work.count("kept")
    if table.format != "csv" or 2 * num <= num_events:
        log.warning("process: in %d of %d events in %s, the %s is a text that looks like a list or an object, for "
                    "example %r. Each such text is used as one id", num, num_events, table.origin, field,
                    example[:EXCERPT])
        return
    [(where, values, _text)] = rows_at(work, table, iter([record]))
    assert isinstance(values, dict), "the row was valid before"
    fault = nested_fault(table, values, field, "")
    work.stop(DataError(where, fault.reason, f"In {num:,} of {num_events:,} events, the {field} is a text that "
                        "contains a list or an object", fault.fix or fault.advice().fix))


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
