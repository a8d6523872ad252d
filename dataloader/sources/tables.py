"""Raw tables of any format: how DuckDB reads them, and what stands in a row that is no event or no item."""

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb

from common.errors import DataError
from dataloader.sources.lines import DAMAGED, NO_RECORD, PARSERS, convert, damaged, numbered_lines, open_binary
from dataloader.workspace import Workspace, literal, name, text

log = logging.getLogger(__name__)

LATEST = 4_102_444_800  # seconds; the year 2100
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "date": 1_000_000}  # a second, in what the table `events` counts
MAX_BAD_SHARE = 0.01
EXCERPT = 80
MAX_LINE = 16_000_000  # bytes of a line of CSV


class RawTable(NamedTuple):
    """One raw file, and which of its columns are which of our fields."""

    path: Path
    format: str                          # json, python (literals), csv or parquet
    columns: dict[str, list[str]]        # our field -> its columns, of which the first that has a value counts
    source: str = ""                     # for messages, where `path` was taken out of something
    delimiter: str = ","
    quote: str = '"'
    header: tuple[str, ...] | None = None  # names of the columns, where the file has none
    encoding: str = "utf-8"

    @property
    def origin(self) -> str:
        return self.source or str(self.path)

    def all_columns(self) -> list[str]:
        return list(dict.fromkeys(column for columns in self.columns.values() for column in columns))


class Fault(NamedTuple):
    """A row that is no event or no item."""

    record: int  # from 1, blank lines not counted
    where: str   # `file:line`, where lines can be counted
    reason: str
    excerpt: str


def load(work: Workspace, table: RawTable, into: str, query: str, ids: tuple[str, ...], types: dict[str, str]) -> None:
    """Create the table `into` by a query over `{rows}`: the raw rows in their order, one column for each of our fields.

    `types` gives each field VARCHAR, DOUBLE (which the query must be ready to get as text), or JSON where it may be a
    list; where a row has none it is NULL. DuckDB reads the file, which is fast; where it cannot read a line, all go
    through a parser that looks at each line alone, and those that are no records become rows of NULL. Raises DataError
    if the file is damaged.
    """
    if table.format != "python":
        rows = _rows_of_json(table, table.path, types) if table.format == "json" else _rows_of_columns(
            work, table, types)
        try:
            work.run(f"CREATE TABLE {into} AS {query.replace('{rows}', f'({rows})')}")
            return
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            reason = " ".join(str(error).split())
            if table.format == "parquet":
                raise DataError(table.origin, "cannot be read as parquet", reason[:300], "correct the file") from error
            log.info("process: reading %s line by line: %s", table.path.name, reason[:120])
    converted = work.folder / f"{table.path.name}.json"
    if table.format == "csv":
        _convert_csv(table, converted)
    else:
        convert(table.path, converted, table.format, table.all_columns(), [c for f in ids for c in table.columns[f]])
    texts = {field: "VARCHAR" if kind == "DOUBLE" else kind for field, kind in types.items()}
    rows = _rows_of_json(table, converted, texts)
    work.run(f"CREATE TABLE {into} AS {query.replace('{rows}', f'({rows})')}")
    converted.unlink()


def _convert_csv(table: RawTable, target: Path) -> None:
    """The rows as JSON lines; one that has not as many fields as the header becomes `{}`."""
    wanted = set(table.all_columns())
    with target.open("w", encoding="utf-8") as out:
        for _record, _where, values, _excerpt in _csv_rows(table):
            kept = {} if isinstance(values, str) else {k: v for k, v in values.items() if k in wanted and v != ""}
            out.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _rows_of_json(table: RawTable, path: Path, types: dict[str, str]) -> str:
    kinds = {column: types[field] for field in types for column in table.columns.get(field, ())}
    listed = ", ".join(f"{name(column)}: '{kind}'" for column, kind in kinds.items())
    select = [f"{_first(map(name, table.columns.get(field, ())), kind)} AS {name(field)}"
              for field, kind in types.items()]
    return (f"SELECT {', '.join(select)} FROM read_json({literal(path)}, format = 'newline_delimited', "
            f"columns = {{{listed}}})")


def _rows_of_columns(work: Workspace, table: RawTable, types: dict[str, str]) -> str:
    there = _real_names(work, table)
    select = []
    for field, kind in types.items():
        found = [name(there[c]) for c in table.columns.get(field, ()) if c in there]
        values = [f"to_json({c})" if kind == "JSON" else f"{c}::VARCHAR" for c in found]
        select.append(f"{_first(values, kind)} AS {name(field)}")
    return f"SELECT {', '.join(select)} FROM {_reader(table)}"


def _first(values: Iterable[str], kind: str) -> str:
    return f"coalesce({listed})" if (listed := ", ".join(values)) else f"NULL::{kind}"


def _reader(table: RawTable) -> str:
    if table.format == "parquet":
        return f"read_parquet({literal(table.path)})"
    options = {"delim": text(table.delimiter), "quote": text(table.quote), "escape": text(table.quote),
               "header": str(table.header is None), "auto_detect": "false", "encoding": text(table.encoding),
               "max_line_size": str(MAX_LINE),
               "columns": "{" + ", ".join(f"{text(c)}: 'VARCHAR'" for c in _header(table)) + "}"}
    return f"read_csv({literal(table.path)}, {', '.join(f'{k} = {v}' for k, v in options.items())})"


def _header(table: RawTable) -> tuple[str, ...]:
    if table.header is not None:
        return table.header
    with open_binary(table.path) as file:
        first = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace").readline().rstrip("\r\n")
    return tuple(next(csv.reader([first], delimiter=table.delimiter), ())) if table.quote else tuple(
        first.split(table.delimiter))


def columns_there(work: Workspace, table: RawTable) -> list[str]:
    """The columns of a file, by the names that they can be called by."""
    if table.format == "json":
        return list(first_record(work, table))
    return list(_real_names(work, table))


def _real_names(work: Workspace, table: RawTable) -> dict[str, str]:
    """The file's columns; RecBole's carry their type behind a colon, and go by the name before it too."""
    try:
        rows = work.run(f"DESCRIBE SELECT * FROM {_reader(table)}")
    except duckdb.Error as error:
        raise DataError(table.origin, f"cannot be read as {table.format}", " ".join(str(error).split())[:300],
                        "correct the file, or its name's ending") from error
    columns = [row[0] for row in rows]
    return {**{column.split(":")[0]: column for column in columns}, **{column: column for column in columns}}


def faults(work: Workspace, table: RawTable, records: list[int], explain: Callable[[dict], str]) -> Iterator[Fault]:
    """What is wrong with these records (from 1, ascending); `explain` says it of a row's raw values."""
    wanted = iter(records)
    target = next(wanted, None)
    for record, where, values, excerpt in _raw_rows(work, table):
        if record == target:
            reason = values if isinstance(values, str) else explain(values)
            yield Fault(record, where, reason, excerpt[:EXCERPT])
            target = next(wanted, None)
            if target is None:
                return


def _raw_rows(work: Workspace, table: RawTable) -> Iterator[tuple[int, str, dict | str, str]]:
    """Record number, `file:line`, its columns (or why it has none), and the line itself, one row after another."""
    if table.format == "parquet":
        rows = work.connection.execute(f"SELECT * FROM {_reader(table)}").fetchall()
        names = [column[0] for column in work.connection.description]
        for record, row in enumerate(rows, start=1):
            yield record, f"{table.origin}: row {record}", dict(zip(names, row, strict=True)), str(row)
    elif table.format == "csv":
        yield from _csv_rows(table)
    else:
        parse = PARSERS[table.format]
        for record, (number, line) in enumerate(numbered_lines(table.path), start=1):
            try:
                values = parse(line)
            except NO_RECORD as error:
                values = f"is not a {table.format} record ({str(error) or type(error).__name__})"
            yield record, f"{table.origin}:{number}", values, line.decode("utf-8", "replace").strip()


def _csv_rows(table: RawTable) -> Iterator[tuple[int, str, dict | str, str]]:
    quoting = {"quotechar": table.quote} if table.quote else {"quoting": csv.QUOTE_NONE}
    names = [column.split(":")[0] for column in _header(table)]
    # The csv module takes delimiters of one character alone.
    single = table.delimiter if len(table.delimiter) == 1 else "\x1f"
    record, start, rows = 0, 1, None
    try:
        with open_binary(table.path) as file:
            lines = io.TextIOWrapper(file, encoding=table.encoding, errors="replace", newline="")
            rows = csv.reader((line.replace(table.delimiter, single) for line in lines), delimiter=single, **quoting)
            for row in rows:
                number, start = start, rows.line_num + 1
                if not row or (table.header is None and number == 1):
                    continue
                record += 1
                values = dict(zip(names, row, strict=False)) if len(row) == len(names) else (
                    f"has {len(row)} fields, and the header {len(names)}")
                yield record, f"{table.origin}:{number}", values, table.delimiter.join(row)
    except (csv.Error, *DAMAGED) as error:
        raise damaged(table.path, start, error) from error


def set_apart(work: Workspace, table: RawTable, into: str, bad: str, explain: Callable[[dict], str], policy: str,
              log_path: Path) -> int:
    """Find the rows of table `into` for which `bad` (SQL) holds; fail at the first, or skip and list them all.

    Returns how many were skipped. Raises DataError at the first (policy fail), or beyond 1 % (policy skip).
    """
    num_bad = work.value(f"SELECT count(*) FROM {into} WHERE {bad}")
    if not num_bad:
        return 0
    num_rows = work.count(into)
    if policy == "fail" or num_bad > MAX_BAD_SHARE * num_rows:
        first = work.value(f"SELECT min(rowid) + 1 FROM {into} WHERE {bad}")
        fault = next(faults(work, table, [first], explain))
        share = f"{num_bad:,} of {num_rows:,} lines are like that"
        if policy == "fail":
            raise DataError(fault.where, fault.reason, f"it reads {fault.excerpt!r}; {share}",
                            "mend the line, or --bad_lines skip, which leaves out up to 1 % of the lines")
        raise DataError(fault.where, fault.reason, f"{share}, and more than 1 % is not skipped", "mend the file")
    records = [row[0] for row in work.run(f"SELECT rowid + 1 FROM {into} WHERE {bad} ORDER BY rowid")]
    with log_path.open("a", encoding="utf-8") as file:
        for fault in faults(work, table, records, explain):
            file.write(json.dumps({"where": fault.where, "reason": fault.reason, "excerpt": fault.excerpt}) + "\n")
    log.warning("process: %d of %d lines of %s are left out; %s lists them", num_bad, num_rows, table.path.name,
                log_path)
    work.run(f"DELETE FROM {into} WHERE {bad}")
    return num_bad


def first_record(work: Workspace, table: RawTable) -> dict:
    """The raw values of the first row, by column; nothing where there is none."""
    _record, _where, values, _excerpt = next(_raw_rows(work, table), (0, "", {}, ""))
    return {} if isinstance(values, str) else values


def value_of(table: RawTable, values: dict, field: str) -> object:
    """The raw value of one of our fields in a row, None where it has none."""
    return next((values[c] for c in table.columns.get(field, ()) if values.get(c) not in (None, "")), None)


def lacking(table: RawTable, field: str) -> str:
    return f"lacks the {field} ({' or '.join(table.columns.get(field, ('?',)))})"


def number_fault(field: str, value: object, low: float, high: float, hint: str = "") -> str:
    """Why a raw value is no number from `low` to `high`, or nothing."""
    try:
        number = float(str(value))
    except ValueError:
        return f"has the {field} {str(value)[:40]!r}, which is no number"
    if not math.isfinite(number):
        return f"has the {field} {value}, which is not finite"
    if not low <= number <= high:
        return f"has the {field} {value}, which is not from {low:,.12g} to {high:,.12g}{hint}"
    return ""

