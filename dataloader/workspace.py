"""The database in which raw files become tables: DuckDB in memory up to a limit, beyond it on disk; gone at the end."""

import shutil
from pathlib import Path

import duckdb

from common.errors import ResourceError


class Workspace:
    """A DuckDB database that spills beyond `memory_limit` into a scratch folder of its own.

    Not a database file: that would compress every table that is used once.
    """

    def __init__(self, folder: Path, memory_limit: str):
        self.folder, self.memory_limit = folder, memory_limit

    def __enter__(self) -> "Workspace":
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed run left; the caller holds the lock
        self.folder.mkdir(parents=True)
        self.connection = duckdb.connect(config={
            "memory_limit": self.memory_limit, "temp_directory": str(self.folder / "spill"),
            "preserve_insertion_order": True})
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, duckdb.OutOfMemoryException):
            raise ResourceError("memory", f"{self.memory_limit} are not enough for this data set", _first_line(error),
                                "a larger --memory_limit") from error
        if isinstance(error, duckdb.IOException) and "No space left" in str(error):
            raise ResourceError(self.folder, "the disk is full", _first_line(error),
                                "free space there, then run the same command again") from error

    def run(self, query: str, *parameters: object) -> list[tuple]:
        """The rows of a query. They are fetched to the end: DuckDB wants that before the next one."""
        return self.connection.execute(query, list(parameters)).fetchall()

    def value(self, query: str, *parameters: object):
        """The one value of a query with one row."""
        [(value, *_)] = self.run(query, *parameters)
        return value

    def count(self, table: str) -> int:
        return self.value(f"SELECT count(*) FROM {table}")

    def copy(self, query: str, path: Path) -> None:
        """Write the rows of a query, in their order, as a Parquet file."""
        self.connection.sql(query).write_parquet(str(path))


def literal(path: Path) -> str:
    """A path as DuckDB's readers take it: not a pattern, and relative to no home."""
    absolute = str(path.resolve())
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in absolute)
    return "'" + escaped.replace("'", "''") + "'"


def text(value: str) -> str:
    """A string as SQL."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]
