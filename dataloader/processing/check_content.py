"""What can be wrong with the content of a data set's files. Each finding is a sentence about its file."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np

from common.artifacts import SPLITS, DatasetFolder
from common.tables import parquet_rows
from dataloader.processing.workspace import Workspace, first_line, name

INTEGER = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
NUMBER = (*INTEGER, "FLOAT", "DOUBLE")
TEXT = ("VARCHAR",)
COLUMNS = {"interactions": {"user": INTEGER, "item": INTEGER, "timestamp": INTEGER, "rating": NUMBER, "split": TEXT},
           "items": {"item": INTEGER, "raw_id": TEXT, "title": TEXT, "text": TEXT},
           "users": {"user": INTEGER, "raw_id": TEXT}}
ARRAYS = {"emb": (np.float32, 2), "mask": (bool, 1), "codes": (np.int32, 2)}
NO_ARRAY = (ValueError, OSError, OverflowError)  # what numpy raises where a file is not what its header says
ROWS = 65_536     # rows of an array that are looked at together
NUM_NAMED = 10    # rows in a finding


def is_table(work: Workspace, path: Path) -> bool:
    """Whether the file has rows, and columns that can be read as what they should be."""
    return not list(_column_findings(work, path))


def table_findings(work: Workspace, path: Path) -> Iterator[str]:
    """A table by itself: its columns, values that are lacking, ids that are not 0, 1, 2, … or stand twice."""
    wrong = list(_column_findings(work, path))
    yield from wrong
    if not wrong:
        try:
            yield from _row_findings(work, path)
        except duckdb.Error as error:
            yield _unreadable(error)


def _column_findings(work: Workspace, path: Path) -> Iterator[str]:
    if not path.exists():
        yield "is not there"
        return
    try:
        there = {row[0]: row[1] for row in work.run(f"DESCRIBE FROM {parquet_rows(path)}")}
        num_rows = work.count(parquet_rows(path))
    except duckdb.Error as error:
        yield _unreadable(error)
        return
    wanted = COLUMNS[path.stem]
    if lacking := [column for column in wanted if column not in there]:
        yield f"lacks the columns {', '.join(lacking)}; it has {', '.join(there)}"
    for column, types in wanted.items():
        if column in there and there[column] not in types:
            yield f"has the column {column} as {there[column]}, wanted {' or '.join(types)}"
    if not num_rows:
        yield "has no rows"


def _unreadable(error: duckdb.Error) -> str:
    if isinstance(error, duckdb.OutOfMemoryException):
        raise error  # that is no fault of the file
    return f"cannot be read: {first_line(error)}"


def _row_findings(work: Workspace, path: Path) -> Iterator[str]:
    rows, columns = parquet_rows(path), COLUMNS[path.stem]
    counts = ", ".join(f"count(*) - count({name(column)})" for column in columns)
    for column, nulls in zip(columns, work.run(f"SELECT {counts} FROM {rows}")[0], strict=True):
        if nulls:
            yield f"{nulls} rows have no {column}"
    if path.stem == "interactions":
        return
    key = path.stem.removesuffix("s")
    [(num, distinct, low, high, raw_ids)] = work.run(f"""
        SELECT count(*), count(DISTINCT {name(key)}), min({name(key)}), max({name(key)}), count(DISTINCT raw_id)
        FROM {rows}""")
    if (distinct, low, high) != (num, 0, num - 1):
        yield f"the {key}s are not 0 to {num - 1}: there are {distinct} different ones from {low} to {high}"
    if raw_ids < num:
        yield f"only {raw_ids} of {num} raw ids are different"


def event_findings(work: Workspace, folder: DatasetFolder, split_name: str | None) -> Iterator[str]:
    """The interactions as a whole, where all three tables are readable: ids, order, splits."""
    num_users, num_items = (work.count(parquet_rows(path)) for path in (folder.users, folder.items))
    work.run(f"CREATE OR REPLACE VIEW events AS FROM {parquet_rows(folder.interactions)}")
    try:
        yield from _value_findings(work, num_users, num_items)
        yield from _order_findings(work)
        yield from _split_findings(work, split_name)
    except duckdb.Error as error:
        yield _unreadable(error)


def _value_findings(work: Workspace, num_users: int, num_items: int) -> Iterator[str]:
    [(users, items, splits, ratings, distinct)] = work.run(f"""
        SELECT count(*) FILTER ("user" < 0 OR "user" >= {num_users}),
               count(*) FILTER (item < 0 OR item >= {num_items}),
               count(*) FILTER (split NOT IN {SPLITS}), count(*) FILTER (NOT isfinite(rating::DOUBLE)),
               count(DISTINCT "user") FROM events""")
    for count, what in ((users, "name a user that users.parquet lacks"), (items, "name an item that items.parquet "
                        "lacks"), (splits, f"have a split that is none of {', '.join(SPLITS)}"),
                        (ratings, "have a rating that is not finite")):
        if count:
            yield f"{count} events {what}"
    if distinct < num_users:
        yield f"{num_users - distinct} of the {num_users} users of users.parquet have no event"


def _order_findings(work: Workspace) -> Iterator[str]:
    # A window without an order goes through the rows as they lie in the file, and sorts nothing.
    [(unsorted, behind)] = work.run(f"""
        WITH pairs AS (SELECT "user" AS u, "timestamp" AS t, list_position({list(SPLITS)}, split) AS p,
                              lag("user") OVER () AS before_u, lag("timestamp") OVER () AS before_t,
                              lag(list_position({list(SPLITS)}, split)) OVER () AS before_p FROM events)
        SELECT count(*) FILTER (before_u > u OR (before_u = u AND before_t > t)),
               count(*) FILTER (before_u = u AND before_p > p) FROM pairs""")
    if unsorted:
        yield f"{unsorted} events are not in order of user and time"
    if behind:
        yield f"{behind} events of train or valid stand behind one of a later split of the same user: it would leak"


def _split_findings(work: Workspace, split_name: str | None) -> Iterator[str]:
    if split_name == "leave_one_out":
        for split, num_users in work.run("""SELECT split, count(*) FROM (
                SELECT split FROM events WHERE split IN ('valid', 'test') GROUP BY "user", split HAVING count(*) > 1)
                GROUP BY split ORDER BY split"""):
            yield f"{num_users} users have several {split} events, which is not leave-one-out"
    if split_name == "temporal":
        spans = {split: (first, last) for split, first, last in work.run(
            'SELECT split, min("timestamp"), max("timestamp") FROM events GROUP BY split')}
        for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
            if earlier in spans and later in spans and spans[earlier][1] >= spans[later][0]:
                yield f"{earlier} goes on until {spans[earlier][1]}, and {later} begins at {spans[later][0]}"


def array_kind(folder: DatasetFolder, path: Path) -> tuple[str, str]:
    """`emb`, `mask` or `codes`, and the suffix behind it."""
    kind, suffix = path.name.removeprefix(f"{folder.name}.").removesuffix(".npy").split("-", 1)
    return kind, suffix


def array_findings(folder: DatasetFolder, path: Path, num_items: int | None) -> Iterator[str]:
    """An array by itself, and against the number of items, if that is known."""
    kind, suffix = array_kind(folder, path)
    dtype, ndim = ARRAYS[kind]
    try:
        array = _mapped(path)
    except NO_ARRAY as error:
        yield f"is not a numpy array file: {error}"
        return
    if array.dtype != dtype or array.ndim != ndim:
        yield f"holds {array.dtype} {array.shape}, wanted {np.dtype(dtype)} with {ndim} dimensions"
        return
    if num_items is not None and len(array) != num_items:
        yield f"has {len(array)} rows, and there are {num_items} items"
    if kind == "emb":
        yield from _vector_findings(array, _present(folder.mask(suffix), len(array)))
    if kind == "codes":
        if (array < 0).any():
            yield "has negative codes"
        if len(np.unique(array, axis=0)) < len(array):
            yield "gives several items the same semantic ID"


def _mapped(path: Path) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="r")  # never an archive or a pickle, as `np.load` may take one for


def _present(mask: Path, num_rows: int) -> np.ndarray:
    """Which rows have a vector of their own; all of them where there is no mask, or none that can be used."""
    try:
        present = _mapped(mask)
    except NO_ARRAY:  # if it is there, it is a finding of its own
        present = np.zeros(0)
    return present if present.dtype == bool and present.shape == (num_rows,) else np.ones(num_rows, dtype=bool)


def _vector_findings(array: np.ndarray, present: np.ndarray) -> Iterator[str]:
    bad = {"not finite": [], "all zero": []}
    for start in range(0, len(array), ROWS):
        rows = array[start:start + ROWS]
        of_zeros = ~rows.any(axis=1) & present[start:start + ROWS]
        for what, marked in (("not finite", ~np.isfinite(rows).all(axis=1)), ("all zero", of_zeros)):
            bad[what] += (np.flatnonzero(marked) + start).tolist()
    for what, rows in bad.items():
        if rows:
            more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
            yield f"rows {rows[:NUM_NAMED]}{more} are {what}"
