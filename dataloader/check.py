"""--check: is a data set's folder sound? Every file's content, with or without metas beside them; then the metas."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np

from common.artifacts import SPLITS, DatasetFolder, load_meta, verify
from common.errors import ArtifactError, DataError, UserError
from common.lock import FolderLock
from common.publishing import file_sha256, meta_path, write_meta
from common.tables import parquet_rows
from dataloader.options import ProcessOptions
from dataloader.workspace import Workspace, first_line, name

log = logging.getLogger(__name__)


def check_folder(options: ProcessOptions) -> None:
    """Print every finding; raise if there is any: DataError for content, ArtifactError for metas alone.

    --adopt gives files that have no meta, and whose content is sound, the meta that other stages ask for; nothing else
    is written.
    """
    folder = options.folder
    if not any(path.exists() for path in _tables(folder)):
        folder.require()
    with tempfile.TemporaryDirectory() as scratch, Workspace(Path(scratch) / ".work", options.memory_limit) as work:
        content = _content(work, folder)
        if options.adopt and not content:
            with FolderLock(folder.path):
                _adopt(work, folder)
        metas = list(_metas(work, folder, not content))
    for finding in (*content, *metas):
        log.warning("check: %s", finding)
    if content:
        raise DataError(folder.path, f"{len(content)} findings in the content of its files", content[0],
                        f"mend the files, or make them again: {folder.make_command} --force")
    if metas:
        raise ArtifactError(folder.path, f"the content is sound, {len(metas)} metas are not", metas[0],
                            "run the command that makes the file; for files of your own: --check --adopt")
    log.info("check: %s is sound: %d files", folder.path, len(_files(folder)))


def _tables(folder: DatasetFolder) -> list[Path]:
    return [folder.items, folder.users, folder.interactions]


def _arrays(folder: DatasetFolder) -> list[Path]:
    return [path for kind in ARRAYS for path in sorted(folder.path.glob(f"{folder.name}.{kind}-*.npy"))]


def _files(folder: DatasetFolder) -> list[Path]:
    return [*_tables(folder), *_arrays(folder), *([folder.figures] if folder.figures.exists() else [])]


def _content(work: Workspace, folder: DatasetFolder) -> list[str]:
    """What is wrong with the files' content, a sentence each that begins with the file."""
    tables, found = _tables(folder), []

    def report(path: Path, findings: Iterator[str], good: str = "content ok") -> None:
        those = [f"{path}: {finding}" for finding in findings]
        found.extend(those)
        if not those:
            log.info("check: %s: %s", path.name, good)

    for path in tables:
        report(path, table_findings(work, path))
    readable = [path for path in tables if is_table(work, path)]
    if readable == tables:
        split_name = None
        with suppress(UserError):  # it has no meta, or one that is a finding of its own
            split_name = load_meta(folder.interactions, "").get("split_name")
        report(folder.interactions, event_findings(work, folder, split_name), "events ok")
    num_items = work.count(parquet_rows(folder.items)) if folder.items in readable else None
    for path in _arrays(folder):
        report(path, array_findings(folder, path, num_items))
    return found


def _metas(work: Workspace, folder: DatasetFolder, sound: bool) -> Iterator[str]:
    """What is wrong with the metas: the hashes of content and inputs, and of the list of items.

    `sound`: whether the content is, so that it can be compared with what the metas say of it.
    """
    wanted = _items_sha256(work, folder) if is_table(work, folder.items) else None
    for path in _files(folder):
        if not path.exists():
            continue
        try:
            meta = load_meta(path, folder.make_command)
            # Without --force its command would find the recorded hashes in order, and reuse the file.
            verify(path, f"{meta.get('command') or folder.make_command} --force")
        except UserError as error:
            yield str(error)
            continue
        found = meta.get("items_sha256")
        if wanted is not None and path != folder.users and found != wanted:
            yield f"{path}: its meta is of another list of items ({found}, and items.parquet has {wanted})"
        if sound and path.suffix == ".npy" and array_kind(folder, path)[0] == "codes":
            codes, sizes = _mapped(path), np.array(meta.get("codebook_sizes", []))
            if len(sizes) != codes.shape[1] or (codes >= sizes).any():
                yield f"{path}: its meta has codebooks of {sizes.tolist()} codes, and there are others in it"


def _items_sha256(work: Workspace, folder: DatasetFolder) -> str:
    return work.ids_sha256(f"SELECT raw_id FROM {parquet_rows(folder.items)} ORDER BY item")


def _adopt(work: Workspace, folder: DatasetFolder) -> None:
    """Write the metas that are lacking. That the tables are a user's own is recorded as their source."""
    shared = {"command": f"bash dataloader/2_process.sh --dataset {folder.name}{folder.root_flag} --check --adopt",
              "settings": {"source": "local", "adopted": True}, "split_name": "own",
              "items_sha256": _items_sha256(work, folder),
              **{f"num_{path.stem}": work.count(parquet_rows(path)) for path in _tables(folder)}}
    for path in [*_tables(folder), *_arrays(folder)]:
        if meta_path(path).exists():
            continue
        inputs, own = [folder.items, folder.users] if path == folder.interactions else [], {}
        if path.suffix == ".npy":  # what the stage that reads an array asks its meta for
            (kind, suffix), array, inputs = array_kind(folder, path), _mapped(path), [folder.items]
            if kind == "emb":
                own = {"dim": array.shape[1]}
                inputs += [folder.mask(suffix)] * folder.mask(suffix).exists()
            elif kind == "codes":  # all of a file that is sound are different
                own = {"codebook_sizes": (array.max(axis=0) + 1).tolist(), "disambiguation_level": None,
                       "collision_rate_before": 0.0, "collision_rate_after": 0.0}
        write_meta(path, {"inputs": {p.name: file_sha256(p) for p in inputs}, **shared, **own})
        log.info("check: wrote %s", meta_path(path).name)


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
    try:
        yield from wrong or _row_findings(work, path)
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
        yield from _split_findings(work, split_name)
    except duckdb.Error as error:
        yield _unreadable(error)


def _value_findings(work: Workspace, num_users: int, num_items: int) -> Iterator[str]:
    """Values, and the order of the rows."""
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
        yield from _vector_findings(array, folder.mask(suffix))
    if kind == "codes":
        if (array < 0).any():
            yield "has negative codes"
        if len(np.unique(array, axis=0)) < len(array):
            yield "gives several items the same semantic ID"


def _mapped(path: Path) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="r")  # never an archive or a pickle, as `np.load` may take one for


def _vector_findings(array: np.ndarray, mask: Path) -> Iterator[str]:
    present = np.ones(len(array), dtype=bool)  # which rows have a vector of their own
    with suppress(*NO_ARRAY):  # if it is there, it is a finding of its own
        found = _mapped(mask)
        present = found if found.dtype == bool and found.shape == (len(array),) else present
    bad: dict[str, list[int]] = {"not finite": [], "all zero": []}
    for start in range(0, len(array), ROWS):
        rows = array[start:start + ROWS]
        of_zeros = ~rows.any(axis=1) & present[start:start + ROWS]
        for what, marked in (("not finite", ~np.isfinite(rows).all(axis=1)), ("all zero", of_zeros)):
            bad[what] += (np.flatnonzero(marked) + start).tolist()
    for what, rows in bad.items():
        if rows:
            more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
            yield f"rows {rows[:NUM_NAMED]}{more} are {what}"
