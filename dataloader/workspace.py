"""The database in which raw files become tables: DuckDB in memory up to a limit, beyond it on disk; gone at the end."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import duckdb

from common.artifacts import ids_sha256
from common.errors import ResourceError

Result = TypeVar("Result")

IDS_AT_ONCE = 100_000
FULL_DISK = ("No space left", "File too large", "Disk quota exceeded", "max_temp_directory_size")


class Workspace:
    """A DuckDB database that spills beyond `memory_limit` into a scratch folder of its own.

    Not a database file: that would compress every table that is used once. Queries run in a thread of their own, while
    the caller waits in Python, where a signal finds it at once: DuckDB may not look for one before a query's end.
    """

    def __init__(self, folder: Path, memory_limit: str):
        self.folder, self.memory_limit = folder, memory_limit

    def __enter__(self) -> "Workspace":
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed run left; the caller holds the lock
        self.folder.mkdir(parents=True)
        self.connection = duckdb.connect(config={
            "memory_limit": self.memory_limit, "temp_directory": str(self.folder / "spill"),
            "preserve_insertion_order": True})
        self.thread = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.thread.shutdown()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
            if any(words in str(error) for words in FULL_DISK):
                raise ResourceError(self.folder.parent, "the disk is full", first_line(error),
                                    "free space there, then run the same command again") from error
            if isinstance(error, duckdb.OutOfMemoryException):
                raise ResourceError("memory", f"{self.memory_limit} are not enough for this data set",
                                    first_line(error), "a larger --memory_limit") from error

    def _wait_for(self, call: Callable[[], Result]) -> Result:
        future = self.thread.submit(call)
        try:
            return future.result()
        finally:
            if not future.done():  # a signal has ended the waiting
                self.connection.interrupt()
                wait([future])

    def run(self, query: str, *parameters: object) -> list[tuple]:
        """The rows of a query. They are fetched to the end: DuckDB wants that before the next one."""
        return self._wait_for(lambda: self.connection.execute(query, list(parameters)).fetchall())

    def value(self, query: str, *parameters: object):
        """The one value of a query with one row."""
        [(value, *_)] = self.run(query, *parameters)
        return value

    def count(self, table: str) -> int:
        return self.value(f"SELECT count(*) FROM {table}")

    def copy(self, query: str, path: Path) -> None:
        """Write the rows of a query, in their order, as a Parquet file."""
        self._wait_for(lambda: self.connection.sql(query).write_parquet(str(path.resolve())))

    def ids_sha256(self, query: str) -> str:
        """The hash of raw ids, the rows of a query in their order; few of them are in memory at a time."""
        def raw_ids() -> Iterator[str]:
            rows = self.connection.execute(query)
            while some := rows.fetchmany(IDS_AT_ONCE):
                yield from (row[0] for row in some)

        return self._wait_for(lambda: ids_sha256(raw_ids()))


def text(value: str) -> str:
    """A string as SQL."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]
