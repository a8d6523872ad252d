"""Raw files read to events and item records by the readers alone, without the steps that follow."""

import atexit
import importlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import duckdb

from common.errors import DataError, UserError
from common.tables import name
from dataloader.options import ProcessOptions
from dataloader.readers.raw import RawTable, load, repair
from dataloader.tables.events import read_events
from dataloader.tables.items import read_items
from dataloader.workspace import Workspace
from tests import errors
from tests.dataloader.helpers import process_options as make_options

# Ids that some readers take for a number, an empty value or two values, or change.
ODD_IDS = ["0001048791", "NA", "null", "NULL", "None", "nan", "true", "00", "1e5", "-0", "Ünï-日本-🍼", " two  spaces ",
           "tab\there", "line\nbreak", "carriage\rreturn", "a,b;c|d", 'say "hi"', "it's", "#hash", "back\\slash", "\\N",
           "e\u0301", "\u00e9", "\u202eolleh\u202c", "a\u2028b", "[1]", "{}", "A" * 5000]


def local(folder: Path, *flags: str) -> ProcessOptions:
    """The options for a user's own files in this folder."""
    return make_options(folder / "data", "--dataset", "shop", "--source", "local", "--raw_dir", str(folder), *flags)


@cache
def _workspace() -> Workspace:
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    scratch = until_exit.enter_context(tempfile.TemporaryDirectory())
    return until_exit.enter_context(Workspace(Path(scratch) / ".work", "1GB"))


@contextmanager
def empty_workspace() -> Iterator[Workspace]:
    """An empty workspace. All tests of a process share it, because opening a database takes longer than most tests."""
    work = _workspace()
    try:
        yield work
    finally:
        for table, in work.run("SELECT table_name FROM duckdb_tables()"):
            work.run(f"DROP TABLE {name(table)}")
        for function in ("unescape", "list_in_cell"):  # of `dataloader.tables.cells`
            with suppress(duckdb.Error):  # this reader does not need it
                work.connection.remove_function(function)
        for path in work.folder.iterdir():
            if path.is_file():  # not the folder to which DuckDB spills
                path.unlink()


def read_raw(options: ProcessOptions, wanted: str | None = None) -> tuple[list[tuple], list[dict], int]:
    """Events as (user, item, time, rating), item records by field, and the number of lines left out.

    `wanted`: SQL for the raw ids whose records are needed; all by default.
    """
    reader = importlib.import_module(f"dataloader.sources.{options.config['reader']}")
    with empty_workspace() as work:
        tables = reader.raw_tables(options, reader.raw_paths(options), work)
        log = bad_lines(options)
        log.parent.mkdir(parents=True, exist_ok=True)
        num_bad = read_events(work, tables[0], options, log).num_bad
        events = work.run('SELECT raw_user, raw_item, "time", rating FROM events ORDER BY rowid')
        if len(tables) == 1:
            return events, [], num_bad
        num_bad += read_items(work, tables[1], options, wanted or _all_ids(work, tables[1]), log)
        rows = work.connection.execute("SELECT * FROM metadata ORDER BY rowid")
        names = [column[0] for column in rows.description]
        return events, [dict(zip(names, row, strict=True)) for row in rows.fetchall()], num_bad


def _all_ids(work: Workspace, table: RawTable) -> str:
    query, types = "SELECT item AS raw_id FROM {rows}", {"item": "VARCHAR"}
    load(work, table, "all_ids", query, types)
    repair(work, table, "all_ids", query, types, "raw_id IS NULL")
    return "SELECT raw_id FROM all_ids WHERE raw_id IS NOT NULL"


def events_of(options: ProcessOptions) -> list[tuple]:
    return read_raw(options)[0]


def items_of(options: ProcessOptions) -> list[dict]:
    """The records without the columns that no test of a text needs."""
    records = read_raw(options)[1]
    return [{key: value for key, value in record.items()
             if key not in ("wanted", "nested") and not key.endswith("_note")} for record in records]


def bad_lines(options: ProcessOptions) -> Path:
    return options.folder.path / "bad_lines.jsonl"


def listed(options: ProcessOptions) -> list[dict]:
    return [json.loads(line) for line in bad_lines(options).read_text(encoding="utf-8").splitlines()]


def refused(options: ProcessOptions, kind: type[UserError] = DataError, where: object = None, *,
            what: Iterable[object] = (), names: Iterable[object] = (), fix: Iterable[object] = ()) -> UserError:
    """Reading the raw files raises exactly `kind` at `where`, on one line, and names these values.

    `what`: those named before the reason, which may quote the bad line and so hold any value of that line.
    """
    with errors.refused(kind, where, names=names, fix=fix) as raised:
        read_raw(options)
    error = raised.value
    assert str(error).isprintable()
    assert not [value for value in what if str(value) not in error.what], error
    return error
