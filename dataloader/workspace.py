"""A temporary DuckDB database for the conversion of raw files to tables."""

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import duckdb

from common.artifacts import ids_sha256
from common.errors import ConfigError, DataError, ResourceError, UserError
from common.machine import free_space
from common.tables import utf8_path

Result = TypeVar("Result")

IDS_AT_ONCE = 100_000
LIMIT = re.compile(r"/[\d.]+ \w+ used")  # in DuckDB's message if the data needs more than `memory_limit`
FULL_DISK = ("No space left", "File too large", "Disk quota exceeded", "max_temp_directory_size")


@dataclass
class Findings:
    """Findings of --check in the raw files."""

    errors: list[UserError] = field(default_factory=list)  # the reasons why `process` would stop
    bad_rows: list = field(default_factory=list)           # a `BadRows` for each kind of invalid row in a file

    def add(self, error: UserError) -> None:
        if str(error) not in map(str, self.errors):  # two steps may find the same fault of a file
            self.errors.append(error)


class Workspace:
    """An in-memory DuckDB database. Data beyond `memory_limit` is spilled to the scratch folder `folder`.

    Queries run in a separate thread, so that Ctrl-C takes effect immediately. `findings` collects the errors of a
    check. Outside of a check, it is None, and the first error is raised. `target` is the folder that the queries write
    to, for errors.
    """

    def __init__(self, folder: Path, memory_limit: str, findings: Findings | None = None, target: Path | None = None):
        self.folder, self.memory_limit, self.findings = folder, memory_limit, findings
        self.target = folder.parent if target is None else target

    def __enter__(self) -> "Workspace":
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a killed run; the caller holds the folder's lock
        self.folder.mkdir(parents=True)
        # Do not store the database in a file: DuckDB would compress every table, although each table is used only once.
        self.connection = duckdb.connect(config={
            "memory_limit": self.memory_limit, "temp_directory": utf8_path(self.folder / "spill"),
            "preserve_insertion_order": True})
        # In the caller's thread, DuckDB might delay a signal until the end of the query.
        self.thread = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.thread.shutdown()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
            if any(words in str(error) for words in FULL_DISK):
                raise ResourceError(self.target, "the disk is full",
                                    "; ".join([first_line(error), *free_space(self.target)]),
                                    "free some disk space and run the same command again") from error
            # Otherwise the system has no memory; a larger --memory_limit would not help.
            if isinstance(error, duckdb.OutOfMemoryException) and LIMIT.search(str(error)):
                raise ResourceError("memory", f"{self.memory_limit} is not enough for this dataset",
                                    first_line(error), "use a larger --memory_limit") from error

    def stop(self, error: UserError) -> None:
        """Raise an error. In a check, record it instead and return, so that the check finds later errors too."""
        if self.findings is None:
            raise error
        self.findings.add(error)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In a check, record an error that the `with` block raises, and continue after the block."""
        try:
            yield
        except (ConfigError, DataError) as error:
            self.stop(error)

    def _wait_for(self, call: Callable[[], Result]) -> Result:
        future = self.thread.submit(call)
        try:
            return future.result()
        finally:
            if not future.done():  # a signal has interrupted the wait
                self.connection.interrupt()
                wait([future])

    def run(self, query: str, *parameters: object) -> list[tuple]:
        """Run a query and return all its rows."""
        return self._wait_for(lambda: self.connection.execute(query, list(parameters)).fetchall())

    def call(self, function: Callable[[duckdb.DuckDBPyConnection], Result]) -> Result:
        """Call a function with the connection of this workspace, and return its result."""
        return self._wait_for(lambda: function(self.connection))

    def value(self, query: str, *parameters: object):
        """Run a query that returns one row, and return the first value in this row."""
        [(value, *_)] = self.run(query, *parameters)
        return value

    def count(self, table: str) -> int:
        return self.value(f"SELECT count(*) FROM {table}")

    def copy(self, query: str, path: Path) -> None:
        """Run a query and write its rows, in the order of the query, to a Parquet file."""
        self._wait_for(lambda: self.connection.sql(query).write_parquet(utf8_path(path)))

    def ids_sha256(self, query: str) -> str:
        """Return the sha256 of the raw ids that a query selects, in the order of the query.

        The ids are fetched in batches, because they may not fit in memory.
        """
        def raw_ids() -> Iterator[str]:
            result = self.connection.execute(query)
            while rows := result.fetchmany(IDS_AT_ONCE):
                yield from (row[0] for row in rows)

        return self._wait_for(lambda: ids_sha256(raw_ids()))


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]
