"""Tables as Markdown or CSV, and SQL expressions to read Parquet files with DuckDB."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
             for line in (columns, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    return buffer.getvalue()


def percent(share: float) -> str:
    """Return a share as text, such as `31 %`. A share below 0.5 % or above 99.5 % never becomes 0 % or 100 %."""
    if 0 < share < 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def text(value: str) -> str:
    """Return the SQL literal of a string."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """Return the quoted SQL identifier of a column."""
    return '"' + column.replace('"', '""') + '"'


def utf8_path(path: Path) -> str:
    """Return an absolute path as DuckDB needs it. Raises ConfigError if the path cannot be written in UTF-8."""
    # DuckDB would expand `~` in a relative path. In an ASCII locale, Python escapes the other characters of a path.
    try:
        return os.fsencode(path.resolve()).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(path, "has a name that is not valid UTF-8", fix="rename the file or its folder") from None


def sql_path(path: Path) -> str:
    """Return a path as an SQL string for DuckDB. Raises ConfigError if the path cannot be written in UTF-8."""
    # DuckDB would read `*`, `?` and `[` as a pattern.
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in utf8_path(path))
    return text(escaped)


def parquet_rows(path: Path, *options: str) -> str:
    """Return an SQL expression for the rows of a Parquet file.

    options: further arguments of DuckDB's function read_parquet

    Example: `duckdb.sql(f"FROM {parquet_rows(path)}")`
    """
    # With Hive partitioning, DuckDB would add a column `item` if a parent folder has a name such as `item=3`.
    return f"read_parquet({', '.join([sql_path(path), 'hive_partitioning = false', *options])})"
