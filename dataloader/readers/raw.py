"""Raw tables of any format, and how DuckDB reads them."""

import itertools
import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import duckdb

from common.errors import ConfigError, DataError
from common.tables import parquet_rows, sql_path
from dataloader.readers import delimited
from dataloader.readers.delimited import Layout
from dataloader.readers.lines import MAX_LINE, NO_RECORD, PARSERS, numbered_lines, plain_json, rewrite, select_rows
from dataloader.workspace import FULL_DISK, Workspace, name, text

log = logging.getLogger(__name__)

LATEST = 4_102_444_800  # seconds; the year 2100
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "date": 1_000_000}  # a second, in what the table `events` counts
LONG_LINE = 16 << 20     # bytes; DuckDB takes memory for several of the longest
NUM_FIRST = 1000  # records of JSON that are asked which columns there are: one may lack what others have
# What DuckDB raises for a file that it cannot read; IOException also stands for a full disk.
UNREADABLE = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException)


class RawTable(NamedTuple):
    """One raw file, and which of its columns are which of our fields."""

    path: Path
    format: str                        # json or python (literals), one a line; csv; parquet
    columns: dict[str, list[str]]      # our field -> its columns, of which the first that has a value counts
    source: str = ""                   # for messages, where `path` was taken out of something
    layout: Layout = Layout()          # of csv

    @property
    def origin(self) -> str:
        return self.source or str(self.path)

    def all_columns(self) -> list[str]:
        return list(dict.fromkeys(column for columns in self.columns.values() for column in columns))


def load(work: Workspace, table: RawTable, into: str, query: str, types: dict[str, str]) -> None:
    """Create the table `into` by a query over `{rows}`: the raw rows in their order, one column for each of our fields.

    `types` gives each field VARCHAR, DOUBLE (which the query must be ready to get as text), or JSON where it may be a
    list; where a row has none, or cannot be read, it is NULL. DuckDB reads the file, which is fast; one that it cannot
    read is first written anew line by line. Raises DataError if the file is damaged.
    """
    if direct := _rows_in_place(work, table, types):
        try:
            _create(work, into, query, direct)
            return
        except UNREADABLE as error:
            reason = _one_line(error)
            if any(words in reason for words in FULL_DISK):
                raise
            if table.format == "parquet":
                raise DataError(table.origin, "cannot be read as parquet", reason[:300], "correct the file") from error
            log.info("process: reading %s line by line: %s", table.path.name, reason[:120])
    rewritten = work.folder / "rewritten.jsonl"
    if table.format == "csv":
        delimited.rewrite(table.path, table.layout, table.all_columns(), rewritten)
    else:
        rewrite(table.path, rewritten, table.format)
    _create(work, into, query, _rows_of_json(table, rewritten, types))
    rewritten.unlink()


def _create(work: Workspace, into: str, query: str, rows: str) -> None:
    work.run(f"CREATE TABLE {into} AS {query.replace('{rows}', f'({rows})')}")


def repair(work: Workspace, table: RawTable, into: str, query: str, types: dict[str, str], unread: str) -> None:
    """Read again the rows of lines for which `unread` (SQL) holds, by parsers that take more than DuckDB's.

    Such as a byte order mark, half a pair of surrogates (which becomes `?`), or literals that JSON has not. What they
    cannot read either stays as it is. `query` and `types` are those of `load`.
    """
    if table.format not in PARSERS or not work.value(f"SELECT count(*) FROM {into} WHERE {unread}"):
        return
    work.run(f"CREATE TABLE unread AS SELECT rowid AS record FROM {into} WHERE {unread} ORDER BY rowid")
    again = work.folder / "again.jsonl"
    ids = [column for field in ("user", "item") for column in table.columns.get(field, ())]
    with work.connection.cursor() as cursor, again.open("wb") as out:
        records = iter(cursor.execute("SELECT record FROM unread ORDER BY record").fetchone, None)
        for _number, line in select_rows(numbered_lines(table.path), (record for record, in records)):
            try:
                out.write(plain_json(PARSERS[table.format](line), table.all_columns(), ids))
            except NO_RECORD:
                out.write(b"{}\n")
    _create(work, "again", query, _rows_of_json(table, again, types))
    columns = [name(row[0]) for row in work.run(f"DESCRIBE {into}")]
    work.run(f"""UPDATE {into} SET {', '.join(f'{column} = mended.{column}' for column in columns)}
        FROM (SELECT unread.record, again.* FROM unread JOIN again ON unread.rowid = again.rowid) mended
        WHERE {into}.rowid = mended.record""")
    for done in ("unread", "again"):
        work.run(f"DROP TABLE {done}")
    again.unlink()


def _rows_in_place(work: Workspace, table: RawTable, types: dict[str, str]) -> str:
    """SQL for the rows of the raw file itself, or nothing where DuckDB cannot read such files."""
    if table.format == "json":
        return _rows_of_json(table, table.path, types, LONG_LINE)
    there = [] if table.format == "python" else existing_columns(work, table)
    # In a file of one column a blank line may or may not be a row to DuckDB.
    if not there or (table.format == "csv" and len(there) == 1):
        return ""
    there = {column: f"c{place}" if table.format == "csv" else name(column) for place, column in enumerate(there)}
    select = []
    for field, kind in types.items():
        found = [there[c] for c in table.columns.get(field, ()) if c in there]
        values = [f"to_json({c})" if kind == "JSON" else f"{c}::VARCHAR" for c in found]
        select.append(f"{_first(values, kind)} AS {name(field)}")
    return f"SELECT {', '.join(select)} FROM {reader(table)}"


def _rows_of_json(table: RawTable, path: Path, types: dict[str, str], longest: int = MAX_LINE + 1) -> str:
    kinds: dict[str, str] = {}
    for field, kind in types.items():
        for column in table.columns.get(field, ()):
            kinds[column] = kind if kinds.get(column, kind) == kind else "JSON"
    if alike := [c for c in kinds if sum(c.lower() == other.lower() for other in kinds) > 1]:
        raise ConfigError(f"columns {' and '.join(alike)}", "differ by their case alone", "in JSON they cannot be told "
                          "apart", "rename one in the file")
    listed = ", ".join(f"{name(column)}: '{kind}'" for column, kind in kinds.items())
    select = []
    for field, kind in types.items():
        values = [name(c) if kinds[c] == kind else f"({name(c)} ->> '$')" for c in table.columns.get(field, ())]
        select.append(f"{_first(values, kind)} AS {name(field)}")
    # With `ignore_errors` a line that is no record is not left out: it becomes a row of NULL.
    return (f"SELECT {', '.join(select)} FROM read_json({sql_path(path)}, format = 'newline_delimited', "
            f"hive_partitioning = false, records = true, columns = {{{listed}}}, ignore_errors = true, "
            f"maximum_object_size = {longest}, compression = {text('gzip' if path.suffix == '.gz' else 'none')})")


def _first(values: list[str], kind: str) -> str:
    """SQL for the first of these that is there. Of lists, one that is empty is as good as none."""
    if kind == "JSON" and len(values) > 1:
        values = [f"CASE WHEN {value}::VARCHAR NOT IN ('[]', '\"\"') THEN {value} END" for value in values]
    return f"coalesce({', '.join(values)})" if values else f"NULL::{kind}"


def reader(table: RawTable) -> str:
    """SQL for the rows of a file of columns."""
    if table.format == "parquet":
        return parquet_rows(table.path, "binary_as_string = true", "file_row_number = true")
    return delimited.reader(table.path, table.layout, delimited.header(table.path, table.layout, table.origin))


def existing_columns(work: Workspace, table: RawTable) -> list[str]:
    """The columns of a file, by the names that they can be called by; of JSON, those of its first records."""
    if table.format == "csv":
        return delimited.header(table.path, table.layout, table.origin)
    if table.format == "parquet":
        return list(_parquet_types(work, table))
    columns: dict[str, None] = {}
    for _number, line in itertools.islice(numbered_lines(table.path), NUM_FIRST):
        with suppress(*NO_RECORD):
            columns |= dict.fromkeys(PARSERS[table.format](line))
    return list(columns)


def type_of(work: Workspace, table: RawTable, field: str) -> str:
    """The type of a field's column in a file that has types, else VARCHAR."""
    types = _parquet_types(work, table) if table.format == "parquet" else {}
    return next((types[column] for column in table.columns.get(field, ()) if column in types), "VARCHAR")


def _parquet_types(work: Workspace, table: RawTable) -> dict[str, str]:
    try:
        rows = work.run(f"DESCRIBE SELECT * EXCLUDE (file_row_number) FROM {reader(table)}")
    except UNREADABLE as error:
        raise DataError(table.origin, "cannot be read as parquet", _one_line(error)[:300],
                        "correct the file, or its name's ending") from error
    return {row[0]: row[1] for row in rows}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
