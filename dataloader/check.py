"""--check: is a data set's folder sound? Every file's content, with or without metas beside them; then the metas."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
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
# What no sound event is (SQL over `pairs`, in which `u`, `t` and `p` are the user, time and split of the event, and
# `before_…` those of the one before it in the file), and the finding.
EVENT_FAULTS = {
    "u < 0 OR u >= {num_users}": "name a user that users.parquet lacks",
    "item < 0 OR item >= {num_items}": "name an item that items.parquet lacks",
    f"split NOT IN {SPLITS}": f"have a split that is none of {', '.join(SPLITS)}",
    "NOT isfinite(rating::DOUBLE)": "have a rating that is not finite",
    "before_u > u OR (before_u = u AND before_t > t)": "are not in order of user and time",
    "before_u = u AND before_p > p":
        "of train or valid stand behind one of a later split of the same user: it would leak",
}
# For each kind of split, a query whose every row is a finding.
SPLIT_FAULTS = {
    "leave_one_out": ("""
        SELECT split, count(*) FROM (
            SELECT split FROM events WHERE split IN ('valid', 'test') GROUP BY "user", split HAVING count(*) > 1)
        GROUP BY split ORDER BY split""", "{1} users have several {0} events, which is not leave-one-out"),
    "temporal": (f"""
        WITH spans AS (SELECT split, list_position({list(SPLITS)}, split) AS place, min("timestamp") AS begins,
                              max("timestamp") AS ends FROM events WHERE split IN {SPLITS} GROUP BY split)
        SELECT a.split, a.ends, b.split, b.begins FROM spans a JOIN spans b ON a.place < b.place AND a.ends >= b.begins
        ORDER BY a.place, b.place""", "{} goes on until {}, and {} begins at {}"),
}


def check_folder(options: ProcessOptions) -> None:
    """Print every finding; raise DataError for content, ArtifactError for metas alone. --adopt writes lacking metas."""
    folder = options.folder
    if not any(path.exists() for path in _tables(folder)):
        folder.require()
    with tempfile.TemporaryDirectory() as scratch, Workspace(Path(scratch) / ".work", options.memory_limit) as work:
        readable, content = _content(work, folder)
        if options.adopt and not content:
            with FolderLock(folder.path):
                _adopt(work, folder)
        items_sha256 = _items_sha256(work, folder) if folder.items in readable else None
    metas = list(_meta_findings(folder, items_sha256, sound=not content))
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
    return [path for path in (*_tables(folder), *_arrays(folder), folder.image_table) if path.exists()]


def _kind(folder: DatasetFolder, path: Path) -> tuple[str, str]:
    """`emb`, `mask` or `codes`, and the suffix behind it; of a table, nothing."""
    kind, _, suffix = path.name.removeprefix(f"{folder.name}.").removesuffix(".npy").partition("-")
    return (kind, suffix) if path.suffix == ".npy" else ("", "")


def _content(work: Workspace, folder: DatasetFolder) -> tuple[list[Path], list[str]]:
    """The tables that can be read, and what is wrong with all files, a sentence each that begins with the file."""
    found, readable = [], []
    for path in _tables(folder):
        unreadable = _reported(path, _column_findings(work, path), good="")
        found += unreadable or _reported(path, _row_findings(work, path))
        readable += [] if unreadable else [path]
    if readable == _tables(folder):
        found += _reported(folder.interactions, _event_findings(work, folder), "events ok")
    num_items = work.count(parquet_rows(folder.items)) if folder.items in readable else None
    for path in _arrays(folder):
        found += _reported(path, _array_findings(folder, path, num_items))
    return readable, found


def _reported(path: Path, findings: Iterable[str], good: str = "content ok") -> list[str]:
    found = []
    try:
        for finding in findings:
            found.append(f"{path}: {finding}")
    except duckdb.OutOfMemoryException:  # that is no fault of the file
        raise
    except duckdb.Error as error:
        found.append(f"{path}: cannot be read: {first_line(error)}")
    if not found and good:
        log.info("check: %s: %s", path.name, good)
    return found


def _column_findings(work: Workspace, path: Path) -> Iterator[str]:
    if not path.exists():
        yield "is not there"
        return
    there = {row[0]: row[1] for row in work.run(f"DESCRIBE FROM {parquet_rows(path)}")}
    wanted = COLUMNS[path.stem]
    if lacking := [column for column in wanted if column not in there]:
        yield f"lacks the columns {', '.join(lacking)}; it has {', '.join(there)}"
    for column, types in wanted.items():
        if column in there and there[column] not in types:
            yield f"has the column {column} as {there[column]}, wanted {' or '.join(types)}"
    if not work.count(parquet_rows(path)):
        yield "has no rows"


def _row_findings(work: Workspace, path: Path) -> Iterator[str]:
    """Values that are lacking, ids that are not 0, 1, 2, … or stand twice."""
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


def _event_findings(work: Workspace, folder: DatasetFolder) -> Iterator[str]:
    """The interactions as a whole, where all three tables are readable: ids, order, splits."""
    num_users, num_items = (work.count(parquet_rows(path)) for path in (folder.users, folder.items))
    work.run(f"CREATE VIEW events AS FROM {parquet_rows(folder.interactions)}")
    # A window without an order goes through the rows as they lie in the file, and sorts nothing.
    counts = ", ".join(f"count(*) FILTER ({fault.format(num_users=num_users, num_items=num_items)})"
                       for fault in EVENT_FAULTS)
    [(*counts, distinct)] = work.run(f"""
        WITH places AS (SELECT item, rating, split, "user" AS u, "timestamp" AS t,
                               list_position({list(SPLITS)}, split) AS p FROM events),
             pairs AS (SELECT *, lag(u) OVER () AS before_u, lag(t) OVER () AS before_t, lag(p) OVER () AS before_p
                       FROM places)
        SELECT {counts}, count(DISTINCT u) FROM pairs""")
    for count, finding in zip(counts, EVENT_FAULTS.values(), strict=True):
        if count:
            yield f"{count} events {finding}"
    if distinct < num_users:
        yield f"{num_users - distinct} of the {num_users} users of users.parquet have no event"
    try:
        split_name = load_meta(folder.interactions, "").get("split_name")
    except UserError:  # it has no meta, or one that is a finding of its own
        return
    if split_name in SPLIT_FAULTS:
        query, finding = SPLIT_FAULTS[split_name]
        yield from (finding.format(*row) for row in work.run(query))


def _array_findings(folder: DatasetFolder, path: Path, num_items: int | None) -> Iterator[str]:
    """An array by itself, and against the number of items, if that is known."""
    kind, suffix = _kind(folder, path)
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
        bad["not finite"] += (np.flatnonzero(~np.isfinite(rows).all(axis=1)) + start).tolist()
        bad["all zero"] += (np.flatnonzero(~rows.any(axis=1) & present[start:start + ROWS]) + start).tolist()
    for what, rows in bad.items():
        if rows:
            more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
            yield f"rows {rows[:NUM_NAMED]}{more} are {what}"


def _meta_findings(folder: DatasetFolder, items_sha256: str | None, sound: bool) -> Iterator[str]:
    """What is wrong with the metas; if the content is `sound`, it is compared with what they say of it, too."""
    for path in _files(folder):
        try:
            meta = load_meta(path, folder.make_command)
            # Without --force its command would find the recorded hashes in order, and reuse the file.
            verify(path, f"{meta.get('command') or folder.make_command} --force")
        except UserError as error:
            yield str(error)
            continue
        found = meta.get("items_sha256")
        if items_sha256 is not None and path != folder.users and found != items_sha256:
            yield f"{path}: its meta is of another list of items ({found}, and items.parquet has {items_sha256})"
        if sound and _kind(folder, path)[0] == "codes":
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
        kind, suffix = _kind(folder, path)
        inputs = [folder.items] if kind else [folder.items, folder.users] if path == folder.interactions else []
        own = {}  # what the stage that reads an array asks its meta for
        if kind == "emb":
            inputs += [folder.mask(suffix)] * folder.mask(suffix).exists()
            own = {"dim": _mapped(path).shape[1]}
        elif kind == "codes":  # all of a file that is sound are different
            own = {"codebook_sizes": (_mapped(path).max(axis=0) + 1).tolist(), "disambiguation_level": None,
                   "collision_rate_before": 0.0, "collision_rate_after": 0.0}
        write_meta(path, {"inputs": {p.name: file_sha256(p) for p in inputs}, **shared, **own})
        log.info("check: wrote %s", meta_path(path).name)
