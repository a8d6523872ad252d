"""--check: is a data set's folder sound? Looks at the content of every file, with or without metas beside them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np

from common.artifacts import (
    SPLITS,
    DatasetFolder,
    file_sha256,
    ids_sha256,
    load_meta,
    meta_path,
    verify,
    write_meta,
)
from common.errors import ArtifactError, DataError, UserError
from dataloader.workspace import literal

log = logging.getLogger(__name__)

ROWS = 65_536
COLUMNS = {"interactions": ("user", "item", "timestamp", "rating", "split"),
           "items": ("item", "raw_id", "title", "text"), "users": ("user", "raw_id")}


class Finding(Exception):
    """What is wrong with a file."""


def check_folder(folder: DatasetFolder, adopt: bool) -> None:
    """Print a line a check; raise at the end if any has failed: DataError for content, ArtifactError for metas alone.

    `adopt` gives files that have no meta, and whose content is sound, the meta that other stages ask for.
    """
    folder.require()
    files = _files(folder)
    content = [problem for path in files for problem in _examine(folder, path)]
    content += [] if content else list(_events(folder))
    for problem in content:
        log.warning("check: %s", problem)
    if content:
        raise DataError(folder.path, f"{len(content)} checks have failed", content[0], "mend the files, or make them "
                        f"again: {folder.make_command} --force")
    if adopt:
        for path in files:
            if not meta_path(path).exists():
                _adopt(folder, path)
    metas = [problem for path in files for problem in _meta(path, folder)]
    for problem in metas:
        log.warning("check: %s", problem)
    if metas:
        raise ArtifactError(folder.path, f"the content is sound, {len(metas)} metas are not", metas[0],
                            "run the command that makes the file; for files of your own: --check --adopt")
    log.info("check: %s is sound: %d files", folder.path, len(files))


def _files(folder: DatasetFolder) -> list[Path]:
    arrays = [path for kind in ("emb", "mask", "codes")
              for path in sorted(folder.path.glob(f"{folder.name}.{kind}-*.npy"))]
    return [folder.items, folder.users, folder.interactions, *arrays]


def _examine(folder: DatasetFolder, path: Path) -> Iterator[str]:
    """What is wrong with a file by itself, and in what its rows stand for."""
    try:
        if not path.exists():
            raise Finding("is not there")
        if path.suffix == ".npy":
            _array(folder, path)
        else:
            _table(path)
        log.info("check: %s: content ok", path.name)
    except Finding as finding:
        yield f"{path}: {finding}"


def _table(path: Path) -> None:
    kind = path.stem
    try:
        rows = duckdb.sql(f"FROM read_parquet({literal(path)})")
    except duckdb.Error as error:
        raise Finding(f"cannot be read: {str(error).splitlines()[0][:200]}") from error
    if lacking := [column for column in COLUMNS[kind] if column not in rows.columns]:
        raise Finding(f"lacks the columns {', '.join(lacking)}; it has {', '.join(rows.columns)}")
    for column in COLUMNS[kind]:
        if nulls := _value(rows, f'count(*) - count("{column}")'):
            raise Finding(f"{nulls} rows have no {column}")
    if kind == "interactions":
        return
    key = "item" if kind == "items" else "user"
    _contiguous(rows, key)
    if _value(rows, "count(*) - count(DISTINCT raw_id)"):
        raise Finding("a raw_id stands in several rows")


def _value(rows: duckdb.DuckDBPyRelation, expression: str):
    return rows.aggregate(expression).fetchall()[0][0]


def _contiguous(rows: duckdb.DuckDBPyRelation, key: str) -> None:
    count, distinct, low, high = rows.aggregate(
        f'count(*), count(DISTINCT "{key}"), min("{key}"), max("{key}")').fetchall()[0]
    if (distinct, low, high) != (count, 0, count - 1):
        raise Finding(f"the {key}s are not 0 to {count - 1}: {distinct} different ones from {low} to {high}")


def _events(folder: DatasetFolder) -> Iterator[str]:
    """What is wrong with the interactions as a whole: ids, order, splits."""
    path = literal(folder.interactions)
    query = f"""
        SELECT count(*), count(*) FILTER ("user" < 0 OR "user" >= {_num(folder.users)}),
               count(*) FILTER (item < 0 OR item >= {_num(folder.items)}),
               count(*) FILTER (split NOT IN {SPLITS}), count(*) FILTER (NOT isfinite(rating)),
               count(DISTINCT "user"), count(DISTINCT item),
               max("timestamp") FILTER (split = 'train'), min("timestamp") FILTER (split = 'test')
        FROM read_parquet({path})"""
    num, users, items, splits, ratings, num_users, num_items, last_train, first_test = duckdb.execute(query).fetchone()
    for count, what in ((users, "name a user that users.parquet lacks"),
                        (items, "name an item that items.parquet lacks"),
                        (splits, f"have a split that is none of {', '.join(SPLITS)}"),
                        (ratings, "have a rating that is not finite")):
        if count:
            yield f"{folder.interactions}: {count} of {num} events {what}"
    for found, table in ((num_users, folder.users), (num_items, folder.items)):
        if found < _num(table):
            yield f"{folder.interactions}: {_num(table) - found} rows of {table.name} have no event"
    yield from _order(folder, path, _split_name(folder), last_train, first_test)


def _split_name(folder: DatasetFolder) -> str | None:
    try:
        return load_meta(folder.interactions, "")["split_name"]
    except (UserError, KeyError):
        return None


def _order(folder: DatasetFolder, path: str, split_name: str | None, last_train: int | None,
           first_test: int | None) -> Iterator[str]:
    unsorted, behind, most_tests = duckdb.execute(f"""
        WITH events AS (SELECT *, list_position({list(SPLITS)}, split) AS part, file_row_number AS row
                        FROM read_parquet({path}, file_row_number = true)),
             pairs AS (SELECT *, lag("user") OVER in_order AS u, lag("timestamp") OVER in_order AS t,
                              lag(part) OVER in_order AS p FROM events WINDOW in_order AS (ORDER BY row))
        SELECT count(*) FILTER (u > "user" OR (u = "user" AND t > "timestamp")),
               count(*) FILTER (u = "user" AND p > part),
               (SELECT max(n) FROM (SELECT count(*) AS n FROM events WHERE part > 1 GROUP BY "user", part))
        FROM pairs""").fetchone()
    if unsorted:
        yield f"{folder.interactions}: {unsorted} events are not in order of user and time"
    if behind:
        yield (f"{folder.interactions}: {behind} events of train or valid stand behind a later split's event of the "
               "same user: the test split would leak")
    if split_name == "leave_one_out" and (most_tests or 0) > 1:
        yield f"{folder.interactions}: a user has {most_tests} events in one split, which is not leave-one-out"
    if split_name == "temporal" and None not in (last_train, first_test) and last_train >= first_test:
        yield f"{folder.interactions}: training goes on until {last_train}, and the test begins at {first_test}"


def _num(table: Path) -> int:
    return duckdb.execute(f"SELECT count(*) FROM read_parquet({literal(table)})").fetchone()[0]


def _array(folder: DatasetFolder, path: Path) -> None:
    kind, suffix = path.name.removeprefix(f"{folder.name}.").removesuffix(".npy").split("-", 1)
    dtype, ndim = {"emb": (np.float32, 2), "mask": (bool, 1), "codes": (np.int32, 2)}[kind]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Finding(f"is not a numpy array file: {error}") from error
    if array.dtype != dtype or array.ndim != ndim:
        raise Finding(f"holds {array.dtype} {array.shape}, wanted {np.dtype(dtype)} with {ndim} dimensions")
    if folder.items.exists() and len(array) != (num_items := _num(folder.items)):
        raise Finding(f"has {len(array)} rows, and there are {num_items} items")
    if kind == "emb":
        mask = folder.mask(suffix)
        present = np.load(mask, allow_pickle=False) if mask.exists() else np.ones(len(array), dtype=bool)
        for start in range(0, len(array), ROWS):
            rows = array[start:start + ROWS]
            bad = ~np.isfinite(rows).all(axis=1) | (~rows.any(axis=1) & present[start:start + ROWS])
            if bad.any():
                raise Finding(f"rows {(np.flatnonzero(bad)[:10] + start).tolist()} are all zero or not finite")
    if kind == "codes":
        if (array < 0).any():
            raise Finding("has negative codes")
        if len(np.unique(array, axis=0)) < len(array):
            raise Finding("gives several items the same semantic ID")


def _meta(path: Path, folder: DatasetFolder) -> Iterator[str]:
    """What is wrong with a file's meta: hashes of content and inputs, and of the list of items."""
    try:
        meta = verify(path, folder.make_command)
    except UserError as error:
        yield str(error)
        return
    if path != folder.users and meta.get("items_sha256") != (wanted := _items_sha256(folder)):
        yield f"{path}: its meta belongs to another list of items ({meta.get('items_sha256')}, not {wanted})"


def _items_sha256(folder: DatasetFolder) -> str:
    rows = duckdb.execute(f"SELECT raw_id FROM read_parquet({literal(folder.items)}) ORDER BY item").fetchall()
    return ids_sha256(row[0] for row in rows)


def _adopt(folder: DatasetFolder, path: Path) -> None:
    inputs = {folder.items: [], folder.users: [], folder.interactions: [folder.items, folder.users]}.get(
        path, [folder.items])
    meta = {"inputs": {p.name: file_sha256(p) for p in inputs}, "command": folder.make_command,
            "settings": {"source": "own files"}, "num_items": _num(folder.items), "num_users": _num(folder.users),
            "num_interactions": _num(folder.interactions), "items_sha256": _items_sha256(folder)}
    if path.suffix == ".npy":
        meta["dim"] = int(np.load(path, mmap_mode="r", allow_pickle=False).shape[-1])
    write_meta(path, meta)
    log.info("check: wrote %s", meta_path(path).name)
