"""RecBole's atomic files, written from a data set's tables (they are read by `sources/local.py`)."""

import logging
import tempfile
from pathlib import Path

from common.artifacts import load_meta
from common.errors import DataError
from common.tables import parquet_rows
from dataloader.options import DataOptions
from dataloader.processing.workspace import Workspace, text

log = logging.getLogger(__name__)


def export(options: DataOptions) -> None:
    """Write `<D>.inter` and `<D>.item` into the folder that --export_recbole names.

    The format has no way to quote: a raw id with a tab or a line break is a DataError, and in titles and texts they
    become blanks.
    """
    folder, target = options.folder, options.export_recbole
    load_meta(folder.interactions, folder.make_command)
    items, users = (parquet_rows(path) for path in (folder.items, folder.users))
    events = parquet_rows(folder.interactions, "file_row_number = true")
    with tempfile.TemporaryDirectory() as scratch, Workspace(Path(scratch) / ".work", options.memory_limit) as work:
        for path, rows in ((folder.items, items), (folder.users, users)):
            _refuse_breaks(work, path, rows)
        target.mkdir(parents=True, exist_ok=True)
        _write(work, target / f"{folder.name}.inter", f"""
            SELECT u.raw_id AS "user_id:token", i.raw_id AS "item_id:token", e.rating AS "rating:float",
                   e."timestamp"::DOUBLE AS "timestamp:float"
            FROM {events} e JOIN {users} u ON e."user" = u."user" JOIN {items} i ON e.item = i.item
            ORDER BY e.file_row_number""")
        _write(work, target / f"{folder.name}.item", f"""
            SELECT raw_id AS "item_id:token", {_one_line('title')} AS "title:token_seq",
                   {_one_line('"text"')} AS "text:token_seq"
            FROM {items} ORDER BY item""")


def _refuse_breaks(work: Workspace, path: Path, rows: str) -> None:
    if bad := work.run(f"SELECT raw_id FROM {rows} WHERE regexp_matches(raw_id, '[\\t\\r\\n]') LIMIT 1"):
        raise DataError(path, f"the raw id {bad[0][0]!r} holds a tab or a line break", "RecBole's files cannot",
                        "rename it in the raw files")


def _one_line(column: str) -> str:
    return f"regexp_replace({column}, '[\\t\\r\\n]+', ' ', 'g')"


def _write(work: Workspace, path: Path, query: str) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    work.run(f"COPY ({query}) TO {text(str(staged))} (FORMAT csv, DELIMITER '\t', HEADER, QUOTE '', ESCAPE '')")
    staged.replace(path)
    log.info("process: wrote %s", path)
