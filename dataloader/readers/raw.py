"""Load raw files of any format into DuckDB tables."""

import itertools
import logging
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import duckdb

from common.errors import ConfigError, DataError
from common.tables import name, parquet_rows, sql_path, text
from dataloader.readers import delimited
from dataloader.readers.delimited import Layout
from dataloader.readers.lines import (
    MAX_LINE,
    NO_RECORD,
    PARSERS,
    column_names,
    compression,
    numbered_lines,
    plain_json,
    rewrite,
    select_rows,
    verifying,
)
from dataloader.workspace import FULL_DISK, Workspace

log = logging.getLogger(__name__)

# Kinds of raw ids. Ids are text, but some writers store whole numbers as floating-point numbers. These become integers,
# so that 1001.0 is the same id as 1001; texts are never changed.
ID = "id"              # in JSON: a number is read like a text, which is fast
EXACT_ID = "exact id"  # in JSON: a number with a fraction or an exponent is read as a number
LARGEST_EXACT = {"DOUBLE": 1 << 53, "FLOAT": 1 << 24}  # up to this number, the type represents every whole number
LONG_LINE = 16 << 20  # maximum bytes of a line for DuckDB, which allocates memory for several such lines
LARGE = 64 << 20      # bytes; reading a larger file line by line takes some time
NUM_FIRST = 1000      # JSON records from which the column names are collected; a single record may lack some of them
# Exceptions of DuckDB for a file that it cannot read; IOException may also mean a full disk.
UNREADABLE = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException,
              duckdb.NotImplementedException)


class RawTable(NamedTuple):
    """A raw file, its format, and the columns that contain each field."""

    path: Path
    format: str                        # "json" or "python" (literals), one record per line; "csv"; "parquet"; "" if
                                       # a check cannot read the file
    columns: dict[str, list[str]]      # field -> its columns; the first column with a value is used
    source: str = ""                   # if `path` was extracted from an archive: the name to use in messages
    layout: Layout = Layout()          # only for "csv"

    @property
    def origin(self) -> str:
        return self.source or str(self.path)

    @property
    def numbered(self) -> bool:
        """Whether --no_header says that the columns have numbers instead of names."""
        return self.layout.header is not None and not self.source

    def all_columns(self) -> list[str]:
        return list(dict.fromkeys(column for columns in self.columns.values() for column in columns))


def load(work: Workspace, table: RawTable, into: str, query: str, types: dict[str, str]) -> None:
    """Load a raw file into the new table `into`, with the rows in file order.

    query: a SELECT statement with the placeholder `{rows}` for the rows of the file. These rows have one column per
        field. A missing or unreadable value is NULL.
    types: field -> type of its column in `{rows}`: VARCHAR, DOUBLE, JSON if the value may be a list, ID or EXACT_ID
        (both VARCHAR). For some files, `{rows}` has VARCHAR instead of DOUBLE, so the query must convert these columns.

    If DuckDB cannot read the file directly, the file is first rewritten line by line. Raises DataError if the file is
    damaged.
    """
    if direct := _rows_in_place(work, table, types):
        try:
            with verifying(table.path) if table.format == "json" else nullcontext():
                _create(work, into, query, direct)
            return
        except UNREADABLE as error:
            reason = _one_line(error)
            if any(words in reason for words in FULL_DISK):
                raise
            if table.format == "parquet":
                raise DataError(table.origin, "cannot be read as Parquet", reason[:300], "replace the file") from error
            log.log(logging.INFO if table.path.stat().st_size > LARGE else logging.DEBUG,
                    "process: reading %s line by line, because DuckDB cannot read it", table.path.name)
    rewritten = work.folder / "rewritten.jsonl"
    if table.format == "csv":
        delimited.rewrite(table.path, table.layout, table.all_columns(), rewritten)
    else:
        rewrite(table.path, rewritten, table.format)
    _create(work, into, query, _rows_of_json(table, rewritten, types))
    rewritten.unlink()


def _create(work: Workspace, into: str, query: str, rows: str) -> None:
    work.run(f"CREATE TABLE {into} AS {query.replace('{rows}', f'({rows})')}")


def repair(work: Workspace, table: RawTable, into: str, query: str, types: dict[str, str], unread: str,
           num_inexact: int = 0) -> None:
    """Repair the rows of the table `into` that `load` could not read correctly.

    query, types: the same as for `load`
    unread: an SQL condition that is true for the rows that DuckDB could not parse
    num_inexact: the number of rows for which `inexact_id` is true. If there are such rows in a JSON file, the whole
        file is loaded again, and the kind ID becomes EXACT_ID.

    Rows that DuckDB could not parse are parsed by Python, which accepts more: for example, a byte order mark, or half
    of a surrogate pair (it becomes `?`). If Python also fails to parse a row, the row does not change.
    """
    if table.format not in PARSERS:
        return
    types = {field: EXACT_ID if kind == ID else kind for field, kind in types.items()}
    if num_inexact:
        work.run(f"DROP TABLE {into}")
        load(work, table, into, query, types)
    if not work.value(f"SELECT count(*) FROM {into} WHERE {unread}"):
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
    work.run(f"""UPDATE {into} SET {', '.join(f'{column} = repaired.{column}' for column in columns)}
        FROM (SELECT unread.record, again.* FROM unread JOIN again ON unread.rowid = again.rowid) repaired
        WHERE {into}.rowid = repaired.record""")
    for temporary in ("unread", "again"):
        work.run(f"DROP TABLE {temporary}")
    again.unlink()


def _rows_in_place(work: Workspace, table: RawTable, types: dict[str, str]) -> str:
    """Return SQL with which DuckDB reads the raw file directly, or "" if DuckDB cannot read such a file."""
    if table.format == "json":
        return _rows_of_json(table, table.path, types, LONG_LINE)
    columns = [] if table.format == "python" else existing_columns(work, table)
    # In a file with one column, DuckDB may or may not read a blank line as a row.
    if not columns or (table.format == "csv" and (
            len(columns) == 1 or not delimited.suits_duckdb(table.path, table.layout))):
        return ""
    sql_names = {column: f"c{place}" if table.format == "csv" else name(column) for place, column in enumerate(columns)}
    stored = column_types(work, table) if table.format == "parquet" else {}
    select = []
    for field, kind in types.items():
        found = [(sql_names[c], stored.get(c, "")) for c in table.columns.get(field, ()) if c in sql_names]
        values = [f"to_json({c})" if kind == "JSON" else _id(c, type_) if kind in (ID, EXACT_ID) else f"{c}::VARCHAR"
                  for c, type_ in found]
        select.append(f"{_first(values, kind)} AS {name(field)}")
    return f"SELECT {', '.join(select)} FROM {reader(table)}"


def _rows_of_json(table: RawTable, path: Path, types: dict[str, str], longest: int = MAX_LINE + 1) -> str:
    kinds: dict[str, str] = {}
    exact = {field for field, kind in types.items() if kind == EXACT_ID}
    types = {field: {ID: "VARCHAR", EXACT_ID: "JSON"}.get(kind, kind) for field, kind in types.items()}
    for field, kind in types.items():
        for column in table.columns.get(field, ()):
            if (root := column.partition(".")[0]) != column:  # such as actor.id
                kinds[root], kind = "JSON", "JSON" if kind == "JSON" else "VARCHAR"
            kinds[column] = kind if kinds.get(column, kind) == kind else "JSON"
    if alike := [c for c in kinds if sum(c.lower() == other.lower() for other in kinds) > 1]:
        raise ConfigError(f"columns {' and '.join(alike)}", "differ only in case", "DuckDB cannot distinguish such "
                          "columns in a JSON file", "rename one of them in the file")
    listed = ", ".join(f"{name(column)}: '{kind}'" for column, kind in kinds.items())
    select = []
    for field, kind in types.items():
        values = []
        for column in table.columns.get(field, ()):
            whole = kind == kinds[column] or "." in column
            values.append(name(column) if whole else f"({name(column)} ->> '$')")
            if "." in column:  # a field with the whole name comes first
                root, *path_in_root = column.split(".")
                path_text = "$" + "".join(f'."{key}"' for key in path_in_root)
                values.append(f"({name(root)} {'->' if kind == 'JSON' else '->>'} {text(path_text)})")
        value = _first(values, kind)
        select.append(f"{_exact_id(value) if field in exact else value} AS {name(field)}")
    # With `ignore_errors`, DuckDB does not skip an invalid line: the line becomes a row of NULLs.
    return (f"SELECT {', '.join(select)} FROM read_json({sql_path(path)}, format = 'newline_delimited', "
            f"hive_partitioning = false, records = true, columns = {{{listed}}}, ignore_errors = true, "
            f"maximum_object_size = {longest}, {compression(path)})")


def _first(values: list[str], kind: str) -> str:
    """Return SQL for the first of these SQL values that is not NULL. An empty list counts as NULL."""
    if kind == "JSON" and len(values) > 1:
        values = [f"CASE WHEN {value}::VARCHAR NOT IN ('[]', '\"\"') THEN {value} END" for value in values]
    return f"coalesce({', '.join(values)})" if values else f"NULL::{'VARCHAR' if kind in (ID, EXACT_ID) else kind}"


def _id(column: str, stored: str) -> str:
    """Return SQL for the raw id in a column of this type; the result is NULL for a value that cannot be an id."""
    if is_nested_type(stored) or stored == "BOOLEAN":
        return "NULL::VARCHAR"
    return _integer(column, LARGEST_EXACT[stored]) if stored in LARGEST_EXACT else f"{column}::VARCHAR"


def _integer(number: str, largest: int) -> str:
    """Return SQL that writes a whole floating-point number as an integer; the result is NULL for any other number."""
    return f"CASE WHEN abs({number}) <= {largest} AND trunc({number}) = {number} THEN {number}::BIGINT::VARCHAR END"


def _exact_id(value: str) -> str:
    """Return SQL for the raw id in a JSON value, or NULL if it is not a text or a whole number.

    DuckDB's json_type is DOUBLE also for integers that need more than 64 bits. These are returned unchanged.
    """
    return rf"""CASE WHEN json_type({value}) IN ('ARRAY', 'OBJECT', 'BOOLEAN') THEN NULL
                    WHEN json_type({value}) = 'DOUBLE' AND NOT regexp_full_match({value}::VARCHAR, '-?\d+')
                    THEN {_integer(f'({value}::DOUBLE)', LARGEST_EXACT['DOUBLE'])} ELSE {value} ->> '$' END"""


def inexact_id(table: RawTable, column: str) -> str:
    """Return an SQL condition that is true if a raw id of the kind ID may be a JSON value that must be read again.

    Such a value is a number that is not an integer, a list, an object, or true or false.
    """
    if table.format not in PARSERS:
        return "false"
    # In a CASE, DuckDB evaluates the slow conditions only where the fast condition is true.
    number = rf"regexp_full_match({column}, '-?(\d+\.\d+(e.*)?|\d+e.*)')"
    return f"""CASE WHEN {column} < ':' THEN CASE WHEN contains({column}, '.') OR contains({column}, 'e') THEN {number}
                                                   ELSE {column} = '-Infinity' END
                    WHEN {column} < '[' THEN {column} IN ('NaN', 'Infinity')
                    ELSE {bracketed(column)} OR {column} IN ('true', 'false') END"""


def bracketed(column: str) -> str:
    """Return an SQL condition that is true if the text in a column begins with `[` or `{`."""
    return f"({column} >= '[' AND ({column} < '\\' OR ({column} >= '{{' AND {column} < '|')))"


def largest_id(work: Workspace, table: RawTable, field: str) -> int:
    """Return the largest whole number that a raw id can be, if it is stored as a floating-point number."""
    return LARGEST_EXACT.get(type_of(work, table, field), LARGEST_EXACT["DOUBLE"])


def reader(table: RawTable) -> str:
    """Return SQL that reads the rows of a Parquet or CSV file."""
    if table.format == "parquet":
        return parquet_rows(table.path, "binary_as_string = true", "file_row_number = true")
    return delimited.reader(table.path, table.layout, delimited.header(table.path, table.layout, table.origin))


def existing_columns(work: Workspace, table: RawTable) -> list[str]:
    """Return the column names of a file. For JSON and Python records, only the first NUM_FIRST records are read."""
    if table.format == "csv":
        return delimited.header(table.path, table.layout, table.origin)
    if table.format == "parquet":
        return list(column_types(work, table))
    columns: dict[str, None] = {}
    for _number, line in itertools.islice(numbered_lines(table.path), NUM_FIRST):
        with suppress(*NO_RECORD):
            columns |= dict.fromkeys(column_names(PARSERS[table.format](line)))
    return sorted(columns, key=lambda column: column.count("."))  # stable: the fields of the records come first


def type_of(work: Workspace, table: RawTable, field: str) -> str:
    """Return the SQL type of the column that contains a field.

    The type is "VARCHAR" if the file is not in Parquet format, or if the column is missing.
    """
    types = column_types(work, table) if table.format == "parquet" else {}
    return next((types[column] for column in table.columns.get(field, ()) if column in types), "VARCHAR")


def is_nested_type(stored: str) -> bool:
    """Return whether a Parquet column of the SQL type `stored` has lists or objects."""
    return stored.endswith("]") or stored.startswith(("STRUCT", "MAP"))


def column_types(work: Workspace, table: RawTable) -> dict[str, str]:
    """Return the SQL type of each column of a Parquet file."""
    try:
        rows = work.run(f"DESCRIBE SELECT * EXCLUDE (file_row_number) FROM {reader(table)}")
    except UNREADABLE as error:
        raise DataError(table.origin, "cannot be read as Parquet", _one_line(error)[:300],
                        "replace the file, or correct its file extension") from error
    return {row[0]: row[1] for row in rows}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
