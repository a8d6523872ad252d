"""Check the files in a dataset's folder (--check): first the content of every file, then the meta files."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import duckdb
import numpy as np

from common.arrays import open_array
from common.artifacts import DatasetFolder, codebook_findings, load_interactions, load_items_meta, load_meta
from common.errors import ArtifactError, DataError, UserError
from common.lock import FolderLock
from common.metas import verify
from common.publishing import content_sha256, meta_path, write_meta
from common.table_files import SPLITS, column_findings, event_findings, id_findings, items_finding, read_events
from common.tables import parquet_rows
from dataloader.options import ProcessOptions
from dataloader.workspace import Workspace, first_line

log = logging.getLogger(__name__)

ARRAYS = {"emb": (np.float32, 2), "mask": (bool, 1), "codes": (np.int32, 2)}
ROWS = 65_536     # number of rows of an array that are checked at once
NUM_NAMED = 10    # maximum number of rows that a finding lists
# For each kind of split, a query that returns one row per finding, and the text of the finding.
SPLIT_FAULTS = {
    "leave_one_out": ("""
        SELECT split, count(*) FROM (
            SELECT split FROM events WHERE split IN ('valid', 'test') GROUP BY "user", split HAVING count(*) > 1)
        GROUP BY split ORDER BY split""", "{1} users have more than one {0} event, but the split is leave-one-out"),
    "temporal": (f"""
        WITH spans AS (SELECT split, list_position({list(SPLITS)}, split) AS place, min("timestamp") AS begins,
                              max("timestamp") AS ends FROM events WHERE split IN {SPLITS} GROUP BY split)
        SELECT a.split, a.ends, b.split, b.begins FROM spans a JOIN spans b ON a.place < b.place AND a.ends >= b.begins
        ORDER BY a.place, b.place""", "{} has events until {}, but {} begins at {}"),
}


def check_folder(options: ProcessOptions) -> None:
    """Check all files in the dataset's folder, and log every problem.

    The content of all files is checked first. With --adopt, if it is valid, missing meta files are then written. The
    meta files are checked last. Raises DataError if the
    content of a file is not valid. Raises ArtifactError if only meta files are missing or wrong.
    """
    folder = options.folder
    if not any(path.exists() for path in _tables(folder)):
        folder.require()
    with tempfile.TemporaryDirectory() as scratch, Workspace(Path(scratch) / ".work", options.memory_limit) as work:
        valid, content = _check_content(work, folder)
        if options.adopt and not content:
            with FolderLock(folder.path):
                _adopt(work, folder)
        items_sha256 = _items_sha256(work, folder) if folder.items in valid else None
    metas = list(_meta_findings(folder, items_sha256, content_is_valid=not content))
    for finding in (*content, *metas):
        log.warning("check: %s", finding)
    if content:
        made = folder.source_flags.exists() or (folder.path / "raw").exists()  # not adopted
        make = f", or make them again with: {folder.make_command} --force" if made else ""
        raise DataError(folder.path, f"the content of the files is not valid ({len(content)} problems)", content[0],
                        f"repair the files{make}")
    if metas:
        raise ArtifactError(folder.path, "the content of the files is valid, but meta files are missing or wrong "
                            f"({len(metas)} problems)", metas[0],
                            "run the command that makes the file; if you made the file yourself, delete its meta file "
                            "(if it has one) and use --check --adopt")
    log.info("check: the folder %s is valid (%d files)", folder.path, len(_files(folder)))


def _tables(folder: DatasetFolder) -> list[Path]:
    return [folder.items, folder.users, folder.interactions]


def _arrays(folder: DatasetFolder) -> list[Path]:
    return [path for kind in ARRAYS for path in sorted(folder.path.glob(f"{folder.name}.{kind}-*.npy"))]


def _files(folder: DatasetFolder) -> list[Path]:
    return [path for path in (*_tables(folder), *_arrays(folder), folder.image_table) if path.exists()]


def _kind_and_suffix(folder: DatasetFolder, path: Path) -> tuple[str, str]:
    """Return the kind of an array file (`emb`, `mask` or `codes`) and its suffix, both taken from the file's name.

    For a table, return ("", "").
    """
    kind, _, suffix = path.name.removeprefix(f"{folder.name}.").removesuffix(".npy").partition("-")
    return (kind, suffix) if path.suffix == ".npy" else ("", "")


def _check_content(work: Workspace, folder: DatasetFolder) -> tuple[list[Path], list[str]]:
    """Check the content of all tables and arrays. Return the valid tables, and one line of text per problem."""
    found, valid, sizes = [], [], dict[Path, int]()
    for path in _tables(folder):
        of_table = _collect(path, _findings(work, column_findings, path), success="")
        if not of_table:
            sizes[path] = work.count(parquet_rows(path))
            of_table = _collect(path, _event_findings(work, folder, sizes) if path == folder.interactions else
                                _findings(work, id_findings, path))
        found += of_table
        valid += [] if of_table else [path]
    num_items = sizes.get(folder.items)
    for path in _arrays(folder):
        found += _collect(path, _array_findings(folder, path, num_items))
    return valid, found


def _collect(path: Path, findings: Iterable[str], success: str = "content ok") -> list[str]:
    """Return one line `path: finding` for each problem in the file. If it has none, log `success`."""
    found = []
    try:
        for finding in findings:
            found.append(f"{path}: {finding}")
    except duckdb.OutOfMemoryException:  # does not mean that the file is invalid
        raise
    except duckdb.Error as error:
        found.append(f"{path}: cannot be read: {first_line(error)}")
    if not found and success:
        log.info("check: %s: %s", path.name, success)
    return found


def _findings(work: Workspace, check: Callable[..., Iterator[str]], path: Path) -> Iterator[str]:
    yield from work.call(lambda connection: list(check(connection, path)))


def _event_findings(work: Workspace, folder: DatasetFolder, sizes: dict[Path, int]) -> Iterator[str]:
    """Yield a message for each kind of problem in the interactions: unknown ids, bad ratings, wrong order, wrong split.

    sizes: number of rows of each readable table
    """
    path = folder.interactions
    events = work.call(lambda connection: read_events(connection, path))
    yield from event_findings(events, sizes.get(folder.users), sizes.get(folder.items))
    work.run(f"CREATE VIEW events AS FROM {parquet_rows(path)}")
    try:
        split_name = load_meta(folder.interactions, "").get("split_name")
    except UserError:  # reported by `_meta_findings`
        return
    if split_name in SPLIT_FAULTS:
        query, finding = SPLIT_FAULTS[split_name]
        yield from (finding.format(*row) for row in work.run(query))


def _array_findings(folder: DatasetFolder, path: Path, num_items: int | None) -> Iterator[str]:
    """Yield a message for each problem in an array file. `num_items` is None if the number of items is unknown."""
    kind, suffix = _kind_and_suffix(folder, path)
    dtype, ndim = ARRAYS[kind]
    try:
        array = open_array(path)
    except (OSError, ValueError) as error:
        yield f"is not a valid .npy file: {error}"
        return
    if array.dtype != dtype or array.ndim != ndim:
        yield f"must be {np.dtype(dtype)} with {ndim} dimensions, got {array.dtype} {array.shape}"
        return
    if num_items is not None and len(array) != num_items:
        yield f"has {len(array)} rows, but there are {num_items} items"
    if ndim == 2 and not array.shape[1]:
        yield "has no columns"
    if kind == "emb":
        yield from _vector_findings(array, _load_present(folder.mask(suffix), len(array)))
    if kind == "codes":
        if (array < 0).any():
            yield "has negative codes"
        if len(np.unique(array, axis=0)) < len(array):
            yield "has the same semantic ID for several items"


def _load_present(mask: Path, num_rows: int) -> np.ndarray:
    """Load a mask file, bool (num_rows,). True means that the row has a vector of its own.

    If the file is missing or invalid, all rows are True.
    """
    try:
        present = open_array(mask)
    except (OSError, ValueError):  # the mask is missing or invalid; `_array_findings` reports an invalid mask
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


def _meta_findings(folder: DatasetFolder, items_sha256: str | None, content_is_valid: bool) -> Iterator[str]:
    """Yield a message for each problem in the meta files.

    If the content of all files is valid, also compare it with the numbers in the meta files.
    """
    for path in _files(folder):
        try:
            meta = verify(path, folder.make_command)
            if path == folder.items and items_sha256 is not None:
                load_items_meta(folder)
            if path == folder.interactions and content_is_valid:
                load_interactions(folder)
        except UserError as error:
            yield str(error)
            continue
        if items_sha256 is not None and path != folder.users and (finding := items_finding(meta, items_sha256)):
            yield f"{path}: {finding}"
        if content_is_valid and _kind_and_suffix(folder, path)[0] == "codes":
            yield from (f"{path}: {finding}" for finding in codebook_findings(
                open_array(path), meta.get("codebook_sizes", [])))


def _items_sha256(work: Workspace, folder: DatasetFolder) -> str:
    return work.ids_sha256(f"SELECT raw_id FROM {parquet_rows(folder.items)} ORDER BY item")


def _adopt(work: Workspace, folder: DatasetFolder) -> None:
    """Write the missing meta files of the tables and arrays, with `local` as the source."""
    shared = {"command": f"bash dataloader/2_process.sh --dataset {folder.name}{folder.root_flag} --check --adopt",
              "settings": {"source": "local", "adopted": True}, "split_name": "own",
              "items_sha256": _items_sha256(work, folder),
              **{f"num_{path.stem}": work.count(parquet_rows(path)) for path in _tables(folder)}}
    for path in [*_tables(folder), *_arrays(folder)]:
        if meta_path(path).exists():
            continue
        kind, suffix = _kind_and_suffix(folder, path)
        inputs = [folder.items] if kind else [folder.items, folder.users] if path == folder.interactions else []
        own = {}  # entries that the next stage reads
        if kind == "emb":
            inputs += [folder.mask(suffix)] * folder.mask(suffix).exists()
            own = {"dim": open_array(path).shape[1]}
        elif kind == "codes":  # valid codes are distinct, so the collision rates are 0
            own = {"codebook_sizes": (open_array(path).max(axis=0) + 1).tolist(), "disambiguation_level": None,
                   "collision_rate_before": 0.0, "collision_rate_after": 0.0}
        write_meta(path, {"inputs": {p.name: content_sha256(p) for p in inputs}, **shared, **own})
        log.info("check: wrote %s", meta_path(path).name)
