"""Find ids and times that are lists or objects, and give the command that writes plain values."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from common.tables import name
from dataloader.readers import delimited
from dataloader.readers.delimited import Layout
from dataloader.readers.lines import (
    NO_RECORD,
    PARSERS,
    column_names,
    is_gzip,
    numbered_lines,
    python_as_json,
    value_at,
)
from dataloader.readers.raw import NUM_FIRST, RawTable, column_types, is_nested_type, reader
from dataloader.workspace import Workspace

NUM_CELLS = 20  # rows of a CSV or Parquet file in which columns of lists are searched
# A Python program for JSON lines. Columns that are lists must have the same length in a line.
PROGRAM = ("import {modules}, sys; C = {columns}; [print(json.dumps({{**r, **dict(zip(C, v))}})) "
           "for r in map({parse}, sys.stdin) for v in zip(*(r[c] if isinstance(r[c], (list, tuple)) else [r[c]] "
           "for c in C), strict=True)]")


def is_nested(value: object) -> bool:
    return isinstance(value, list | tuple | dict)


def in_text(value: object) -> list | dict | None:
    """Return the list of scalars or the object that a text contains in JSON or Python notation, or None."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return None
    for convert in (bytes, python_as_json):
        with suppress(*NO_RECORD):
            found = json.loads(convert(value.encode()))
            return None if isinstance(found, list) and any(map(is_nested, found)) else found
    return None


def is_several(value: object) -> bool:
    """Return whether a value in a text is an object, or a list of several values. `[1]` and `{}` may be ids."""
    return isinstance(value, list | dict) and len(value) > isinstance(value, list)


def nested_columns(work: Workspace, table: RawTable) -> dict[str, list]:
    """Return the columns that have lists or objects in the first rows of a file, with these values."""
    found: dict[str, list] = {}
    for row in _first_rows(work, table):
        for column, value in row.items():
            if is_nested(value):
                found.setdefault(column, []).append(value)
    return found


def aligned(nested: dict[str, list], column: str) -> list[str]:
    """Return `column`, and then the other columns whose lists have the same lengths."""
    lengths = [len(value) for value in nested[column]]
    return [column, *(other for other, values in nested.items() if other != column and isinstance(values[0], list)
                      and [len(value) for value in values] == lengths)]


def _first_rows(work: Workspace, table: RawTable) -> Iterator[dict]:
    if table.format == "parquet":
        columns = [column for column, stored in column_types(work, table).items() if is_nested_type(stored)]
        select = ", ".join(map(name, columns)) or "NULL"
        for values in work.run(f"SELECT {select} FROM {reader(table)} LIMIT {NUM_CELLS}"):
            yield dict(zip(columns, values, strict=False))
    elif table.format == "csv":
        typed = sequences(table.path, table.layout) if table.layout.typed else {}
        for _line, values, _text in islice(delimited.rows(table.path, table.layout), NUM_CELLS):
            cells = values.items() if isinstance(values, dict) else ()
            yield {column: cell.split(" ") if column in typed else found for column, cell in cells
                   if is_several(found := in_text(cell)) or column in typed}
    else:
        for _number, line in islice(numbered_lines(table.path), NUM_FIRST):
            with suppress(*NO_RECORD):
                record = PARSERS[table.format](line)
                yield {column: value_at(record, column) for column in column_names(record)}


def sequences(path: Path, layout: Layout) -> dict[str, str]:
    """Return the columns of a RecBole file that have several values per line: name -> name and type."""
    names = [column.partition(":") for column in delimited.first_row(path, layout)]
    return {column: f"{column}:{kind}" for column, _, kind in names if kind.endswith("_seq")}


def object_fix(table: RawTable, value: dict, column: str, flag: str) -> str:
    """Return the fix for an id or time that is an object: a flag or a command that takes a value from it.

    flag: the flag that names the column, such as --user_column, or "" if there is none
    """
    inside = [key for key in column_names({column: value}) if isinstance(value_at({column: value}, key), str | int)]
    named = sorted(inside, key=lambda key: "id" not in key.rpartition(".")[2].lower())  # an id comes first
    if named and table.format in PARSERS and flag:
        return f"use {flag} {shlex.quote(named[0])}"
    if named and table.format == "parquet":
        path = "".join(f".{name(key)}" for key in named[0].removeprefix(f"{column}.").split("."))
        command, target = _by_duckdb(table, f"* REPLACE (({name(column)}){path} AS {name(column)})")
        return f"take a value from the object with: {command} (then use {target})"
    return "write a text or a number instead of the object"


def list_fix(table: RawTable, columns: list[str]) -> str:
    """Return the fix for a file whose lines have lists in these columns: a command, if one is known."""
    command, target = _conversion(table, columns)
    each = "write one line for each member of the lists"
    return f"{each} with: {command} (then use {target})" if command else each


def _conversion(table: RawTable, columns: list[str]) -> tuple[str, str]:
    """Return the command that makes one line for each member of the lists, and the file that it writes."""
    if table.source or table.numbered:
        return "", ""
    if table.format in PARSERS:
        if any("." in column for column in columns):
            return "", ""
        is_json = table.format == "json"
        program = PROGRAM.format(modules="json" if is_json else "ast, json", columns=json.dumps(columns),
                                 parse="json.loads" if is_json else "ast.literal_eval")
        source, target = shlex.quote(str(table.path)), _target(table.path, ".jsonl")
        read, less = (f"gzip -dc {source} | ", "") if is_gzip(table.path) else ("", f" < {source}")
        return f"{read}python -c {shlex.quote(program)}{less} > {shlex.quote(target)}", target
    return _by_duckdb(table, _selection(table, columns))


def _by_duckdb(table: RawTable, select: str) -> tuple[str, str]:
    """Return the command that applies a SELECT list to a CSV or Parquet file, and the file that it writes."""
    target, separator = _target(table.path), f", sep={json.dumps(table.layout.delimiter)}"
    # DuckDB would read `*`, `?` and `[` as a pattern.
    source = json.dumps(re.sub(r"([*?[])", r"[\1]", str(table.path)), ensure_ascii=False)
    read, writer = f"read_parquet({source})", f"write_parquet({json.dumps(target, ensure_ascii=False)})"
    if table.format == "csv":
        read = f'read_csv({source}, header=True, all_varchar=True, quotechar="\\""{separator})'
        writer = f"write_csv({json.dumps(target, ensure_ascii=False)}{separator})"
    program = f"import duckdb; duckdb.{read}.project({json.dumps(select, ensure_ascii=False)}).{writer}"
    return f"python -c {shlex.quote(program)}", target


def _target(path: Path, ending: str = "") -> str:
    """Return the path of the converted file, with its own or another extension."""
    named = Path(path.name.removesuffix(".gz"))
    return str(path.with_name(f"{named.stem}-events{ending or named.suffix}"))


def _selection(table: RawTable, columns: list[str]) -> str:
    """Return DuckDB's SELECT list that makes one row for each member of the lists."""
    if table.layout.typed:
        typed = {column: full for column, full in sequences(table.path, table.layout).items() if column in columns}
        lists = ", ".join(f"unnest(string_split({name(full)}, chr(32))) AS {name(full.removesuffix('_seq'))}"
                          for full in typed.values())
        return f"* EXCLUDE ({', '.join(map(name, typed.values()))}), {lists}"
    if table.format == "csv":
        return f"* REPLACE ({', '.join(_unnest_text(name(column)) for column in columns)})"
    return f"* REPLACE ({', '.join(f'unnest({name(column)}) AS {name(column)}' for column in columns)})"


def _unnest_text(column: str) -> str:
    return f"unnest(coalesce(try_cast({column} AS VARCHAR[]), [{column}])) AS {column}"
