"""RecBole's atomic files, written from a data set's tables (they are read by `sources/local.py`)."""

import logging
from pathlib import Path

import duckdb

from common.artifacts import DatasetFolder, load_meta
from common.errors import ConfigError, DataError
from dataloader.workspace import literal, text

log = logging.getLogger(__name__)


def export(folder: DatasetFolder, target: Path) -> None:
    """Write `<D>.inter` and `<D>.item` into the folder `target`.

    The format has no way to quote: a raw id with a tab or a line break is a DataError, and in titles and texts they
    become blanks.
    """
    load_meta(folder.interactions, folder.make_command)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--export_recbole {target}", "is not a folder", fix="name a folder")
    tables = {path.stem: f"read_parquet({literal(path)})" for path in (folder.items, folder.users)}
    for table in ("items", "users"):
        if bad := duckdb.execute(f"SELECT raw_id FROM {tables[table]} WHERE regexp_matches(raw_id, '[\\t\\r\\n]') "
                                 "LIMIT 1").fetchall():
            raise DataError(folder.path / f"{table}.parquet", f"the raw id {bad[0][0]!r} holds a tab or a line break",
                            "RecBole's files cannot", "rename it in the raw files")
    target.mkdir(parents=True, exist_ok=True)
    events = f"read_parquet({literal(folder.interactions)}, file_row_number = true)"
    _write(target / f"{folder.name}.inter", f"""
        SELECT u.raw_id AS "user_id:token", i.raw_id AS "item_id:token", e.rating AS "rating:float",
               e."timestamp"::DOUBLE AS "timestamp:float"
        FROM {events} e JOIN {tables['users']} u ON e."user" = u."user" JOIN {tables['items']} i ON e.item = i.item
        ORDER BY e.file_row_number""")
    _write(target / f"{folder.name}.item", f"""
        SELECT raw_id AS "item_id:token", {_one_line('title')} AS "title:token_seq",
               {_one_line('"text"')} AS "text:token_seq"
        FROM {tables['items']} ORDER BY item""")


def _one_line(column: str) -> str:
    return f"regexp_replace({column}, '[\\t\\r\\n]+', ' ', 'g')"


def _write(path: Path, query: str) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    duckdb.execute(f"COPY ({query}) TO {text(str(staged))} (FORMAT csv, DELIMITER '\t', HEADER, QUOTE '', ESCAPE '')")
    staged.replace(path)
    log.info("process: wrote %s", path)
