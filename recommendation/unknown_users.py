"""The error for a user who is not in the dataset. It says whether the filters of the dataset removed the user."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from common.artifacts import DatasetFolder, filter_lines, load_meta
from common.config import load_yaml
from common.errors import DataError, UserError
from common.tables import name, parquet_rows, sql_path, text

USER_COLUMNS = ("user_id", "reviewerID")  # of the user's own files, and of Amazon's files


def unknown_user(folder: DatasetFolder, raw_user: str, guess: tuple[str, str | None], where: str) -> DataError:
    """Return the error for a user who is not in the dataset.

    guess: a hint, and the most similar user of the dataset (see `nearest_id`)
    where: the flag --user, or `file:line`
    """
    steps = load_meta(folder.interactions, folder.make_command).get("filters") or [{"step": "read", "interactions": 0}]
    has_removed, filters = steps[-1]["interactions"] < steps[0]["interactions"], "; ".join(filter_lines(steps))
    found = _raw_events(folder, raw_user) if has_removed else None
    is_flag = where == "--user"
    history = ("pass the raw ids of the user's items with --history" if is_flag else
               f"write {json.dumps({'user': raw_user, 'history': ['id', 'id']})} with the raw ids of the user's items")
    if found and found.num_events:
        return DataError(where, f"the filters removed the user {raw_user!r} from the dataset {folder.name}",
                         f"{found.path} has {found.num_events} events of this user. Filters: {filters}",
                         f"{history}, or make the dataset again with other filters")
    why, close = guess
    fix = (f"use a raw id from {folder.users}" if close is None else
           f"use --user={shlex.quote(close)}" if is_flag else f"use {json.dumps({'user': close})}")
    if has_removed and not found:
        why += f"{'' if why.endswith('?') else '.'} The filters may have removed the user: {filters}"
    if close is None or (has_removed and not found):
        fix += f", or {history}"
    return DataError(where, f"unknown user {raw_user!r} in the dataset {folder.name}", why, fix)


class RawEvents(NamedTuple):
    path: Path       # the raw file
    num_events: int  # number of events of the user in this file


def _raw_events(folder: DatasetFolder, raw_user: str) -> RawEvents | None:
    """Count the events of a user in the raw file of the interactions.

    Returns None if the file cannot be found or read, or is not the file that the dataset was made from.
    """
    import duckdb  # a slow import, and only needed here

    meta = load_meta(folder.interactions, folder.make_command)
    recorded = meta.get("raw", {}).get("interactions", {})
    try:
        flags = load_yaml(folder.source_flags)[0] if folder.source_flags.exists() else {}
        # Step 0 downloads the files of a public dataset into raw/<source>.
        raw_dir = flags.get("raw_dir") or f"raw/{meta.get('settings', {}).get('source')}"
        path = folder.path / (flags.get("interactions") or Path(raw_dir, recorded.get("file", "")))
        if not path.is_file() or path.stat().st_size != recorded.get("size"):
            return None
        columns = [str(flags["user_column"])] if flags.get("user_column") else list(USER_COLUMNS)
        has_header = flags.get("no_header") not in ("interactions", "both")
        return _count(path, columns if has_header else [str(flags.get("user_column") or 1)], raw_user, has_header)
    except (UserError, OSError, TypeError, duckdb.Error):  # TypeError: a value in source.yaml is not text
        return None


def _count(path: Path, columns: list[str], raw_user: str, has_header: bool) -> RawEvents | None:
    """Count the rows of a file in which one of the `columns` has the value `raw_user`.

    columns: names, which may have dots for nested JSON objects; numbers from 1 if a text file has no header

    Returns None if the file has none of the columns. Raises duckdb.Error if the file cannot be read.
    """
    import duckdb

    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    options = "hive_partitioning = false, ignore_errors = true"
    with duckdb.connect() as connection:
        if kind in (".json", ".jsonl", ".ndjson"):
            rows = f"read_json_objects({sql_path(path)}, format = 'newline_delimited', {options})"
            found = [f"json ->> {text('$.' + '.'.join(map(name, column.split('.'))))}" for column in columns]
        else:
            rows = parquet_rows(path) if kind in (".parquet", ".pq") else (
                f"read_csv({sql_path(path)}, header = {has_header}, all_varchar = true, {options})")
            names = [row[0] for row in connection.execute(f"DESCRIBE FROM {rows}").fetchall()]
            # RecBole adds the type to the name of a column, such as user_id:token.
            named = {existing.partition(":")[0]: existing for existing in names} if has_header else {
                str(number): existing for number, existing in enumerate(names, 1)}
            found = [f"{name(named[column])}::VARCHAR" for column in columns if column in named]
        users = f"coalesce({', '.join([*found, 'NULL'])})"
        [(num_events, num_users)] = connection.execute(
            f"SELECT count(*) FILTER ({users} = ?), count({users}) FROM {rows}", [raw_user]).fetchall()
    return RawEvents(path, num_events) if num_users else None
