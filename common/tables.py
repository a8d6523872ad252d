"""Tables for people, as aligned Markdown or as CSV; and the Parquet files of the stages as DuckDB reads them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line a row, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
             for line in (columns, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    return buffer.getvalue()


def sql_path(path: Path) -> str:
    """A path as an SQL string for DuckDB's readers, which would otherwise take `*`, `?` and `[` as a pattern."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.resolve()))  # resolved: `~` stays a name
    return "'" + escaped.replace("'", "''") + "'"


def parquet_rows(path: Path, *options: str) -> str:
    """SQL for the rows of exactly this Parquet file: `duckdb.sql(f"FROM {parquet_rows(path)}")`.

    Without the option, a parent folder that is named like `item=3` would give every row a column `item`.
    """
    return f"read_parquet({', '.join([sql_path(path), 'hive_partitioning = false', *options])})"
