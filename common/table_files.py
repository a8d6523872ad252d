"""The tables of a dataset: their columns, and one check of their content for loading and for --check."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.reading import require_regular
from common.tables import parquet_rows

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SPLITS = ("train", "valid", "test")
INTEGER = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
NUMBER = (*INTEGER, "FLOAT", "DOUBLE")
TEXT = ("VARCHAR",)
# name of the table -> column -> allowed types. A column that is not listed here may have any type.
COLUMNS = {"interactions": {"user": INTEGER, "item": INTEGER, "timestamp": INTEGER, "rating": NUMBER, "split": TEXT},
           "items": {"item": INTEGER, "raw_id": TEXT, "title": TEXT, "text": TEXT},
           "users": {"user": INTEGER, "raw_id": TEXT}}


class Events(NamedTuple):
    """The content of interactions.parquet. An array has one entry per event, and is masked if values are missing."""

    user: np.ndarray       # int64
    item: np.ndarray       # int64
    timestamp: np.ndarray  # int64, seconds
    split: np.ndarray      # int8, index into SPLITS; missing if the text is not in SPLITS
    num_bad_ratings: int   # number of ratings that are missing or not finite


def column_findings(connection: "DuckDBPyConnection", path: Path) -> Iterator[str]:
    """Yield a message for each problem with the columns of a table: missing, or of a wrong type."""
    if not path.exists():
        yield "not found"
        return
    try:
        require_regular(path)
    except OSError as error:
        yield f"cannot be read: {error}"
        return
    rows = connection.sql(f"FROM {parquet_rows(path)}")
    types, required = dict(zip(rows.columns, map(str, rows.types), strict=True)), COLUMNS[path.stem]
    if missing := [column for column in required if column not in types]:
        yield f"missing columns: {', '.join(missing)}; the file has the columns {', '.join(types)}"
    for column, allowed in required.items():
        if column in types and types[column] not in allowed:
            yield f"the type of column {column} must be {' or '.join(allowed)}, got {types[column]}"
    if not num_rows(connection, path):
        yield "has no rows"


def num_rows(connection: "DuckDBPyConnection", path: Path) -> int:
    return _first_row(connection, f"SELECT count(*) FROM {parquet_rows(path)}")[0]


def id_findings(connection: "DuckDBPyConnection", path: Path) -> Iterator[str]:
    """Yield a message for each problem with the rows of items.parquet or users.parquet.

    No value may be missing. The ids must be 0, 1, 2, … in any order, and the raw ids must be distinct. The columns must
    be valid (see `column_findings`).
    """
    columns, key = COLUMNS[path.stem], path.stem.removesuffix("s")
    nulls = ", ".join(f'count(*) - count("{column}")' for column in columns)
    num, distinct, low, high, raw_ids, *missing = _first_row(connection, f"""
        SELECT count(*), count(DISTINCT "{key}"), min("{key}"), max("{key}"), count(DISTINCT raw_id), {nulls}
        FROM {parquet_rows(path)}""")
    for column, count in zip(columns, missing, strict=True):
        if count:
            yield f"{count} rows have no {column}"
    if (distinct, low, high) != (num, 0, num - 1):
        yield (f"the column {key} must contain all ids from 0 to {num - 1}, got {distinct} different ids from {low} to "
               f"{high}")
    if raw_ids < num:
        yield f"has duplicate raw ids: only {raw_ids} of {num} are different"


def read_events(connection: "DuckDBPyConnection", path: Path) -> Events:
    """Read interactions.parquet, in the order of the file. The columns must be valid (see `column_findings`)."""
    columns = connection.sql(f"""
        SELECT "user", item, "timestamp"::BIGINT AS "timestamp",
               enum_code(try_cast(split AS ENUM{SPLITS}))::TINYINT AS split FROM {parquet_rows(path)}""").fetchnumpy()
    # NumPy converts faster than DuckDB. An id that is too large for int64 becomes negative, which is reported.
    user, item = (columns[name].astype(np.int64, copy=False) for name in ("user", "item"))
    bad_ratings = f"SELECT count(*) FILTER (rating IS NULL OR NOT isfinite(rating::DOUBLE)) FROM {parquet_rows(path)}"
    return Events(user, item, columns["timestamp"], columns["split"], _first_row(connection, bad_ratings)[0])


def event_findings(events: Events, num_users: int | None, num_items: int | None) -> Iterator[str]:
    """Yield a message for each kind of problem in the events: unknown ids, bad ratings, wrong order, wrong split.

    num_users, num_items: number of rows of the other tables, or None if they are unknown
    """
    user, item, time, split, num_bad_ratings = events
    for name, column in (("user", user), ("item", item), ("timestamp", time)):
        if np.ma.is_masked(column):
            yield f"{np.ma.count_masked(column)} events have no {name}"
    same_user = user[1:] == user[:-1]
    not_sorted = (user[1:] < user[:-1]) | (same_user & (time[1:] < time[:-1]))
    faults = {
        "have a user that is not in users.parquet": _outside(user, num_users),
        "have an item that is not in items.parquet": _outside(item, num_items),
        f"have a split that is not one of {', '.join(SPLITS)}": np.ma.getmask(split),
        "are not sorted by user and time": not_sorted,
        "are in train or valid, although the user's previous event is in a later split (data leakage)":
            same_user & (split[1:] < split[:-1]),
    }
    for text, is_faulty in faults.items():
        if count := np.count_nonzero(np.ma.filled(is_faulty, False)):
            yield f"{count} events {text}"
    if num_bad_ratings:
        yield f"{num_bad_ratings} events have a rating that is missing or not finite"
    # In sorted events, a new user begins wherever the user changes. This is faster than a search for distinct users.
    is_sorted = not np.ma.filled(not_sorted, True).any()
    num_distinct = len(user) - int(np.count_nonzero(same_user)) if is_sorted else len(np.unique(user))
    if num_users is not None and num_distinct < num_users:
        yield f"{num_users - num_distinct} of the {num_users} users in users.parquet have no events"


def fact_findings(meta: dict, events: Events, num_users: int | None, num_items: int | None) -> Iterator[str]:
    """Yield a message for each number in the meta file of the interactions that does not fit the tables.

    A number that the meta file does not have is not checked. The events must be valid (see `event_findings`).
    """
    places = [events.split == place for place in range(len(SPLITS))]
    has_item = [np.bincount(events.item[place], minlength=int(events.item.max()) + 1) > 0 for place in places]
    in_split = {name: int(np.count_nonzero(place)) for name, place in zip(SPLITS, places, strict=True)}
    facts = {"num_interactions": len(events.user), "num_users": num_users, "num_items": num_items,
             "num_in_split": in_split,
             "num_cold_items": {name: int(np.count_nonzero(has & ~has_item[0]))
                                for name, has in zip(SPLITS[1:], has_item[1:], strict=True)}}
    for key, found in facts.items():
        if key in meta and found is not None and meta[key] != found:
            yield f"has other events than its meta file says: {key} is {found}, but the meta file has {meta[key]}"
    repeats = meta.get("num_repeats", {})
    if impossible := [name for name in repeats if repeats[name] > in_split.get(name, 0)]:
        yield f"has fewer {impossible[0]} events than num_repeats in its meta file: {repeats[impossible[0]]}"


def items_finding(meta: dict, items_sha256: str) -> str:
    """Return a message if a file was made for other items, else "". `items_sha256` is the hash of the items."""
    if (found := meta.get("items_sha256")) == items_sha256:
        return ""
    return f"was made for other items (items_sha256 {found}, but items.parquet has {items_sha256})"


def _outside(ids: np.ndarray, count: int | None) -> np.ndarray | np.bool:
    if count is None or (ids.min() >= 0 and ids.max() < count):  # faster than a comparison of each id
        return np.False_
    return (ids < 0) | (ids >= count)


def _first_row(connection: "DuckDBPyConnection", query: str) -> tuple:
    return connection.sql(query).fetchall()[0]


def ids_sha256(raw_ids: Iterable[str]) -> str:
    """Return a hash of the raw ids. The hash also changes if the order of the ids changes."""
    digest = hashlib.sha256()
    for raw_id in raw_ids:
        encoded = raw_id.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
