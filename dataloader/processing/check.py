"""--check: is a data set's folder sound? Every file's content, with or without metas beside them; then the metas."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_meta, verify
from common.errors import ArtifactError, DataError, UserError
from common.lock import FolderLock
from common.publishing import file_sha256, meta_path, write_meta
from common.tables import parquet_rows
from dataloader.options import DataOptions
from dataloader.processing.check_content import (
    ARRAYS,
    array_findings,
    array_kind,
    event_findings,
    is_table,
    table_findings,
)
from dataloader.processing.workspace import Workspace

log = logging.getLogger(__name__)


def check_folder(options: DataOptions) -> None:
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
    return [path for kind in ARRAYS
            for path in sorted(folder.path.glob(f"{folder.name}.{kind}-*.npy"))]


def _files(folder: DatasetFolder) -> list[Path]:
    return [*_tables(folder), *_arrays(folder), *([folder.figures] if folder.figures.exists() else [])]


def _content(work: Workspace, folder: DatasetFolder) -> list[str]:
    """What is wrong with the files' content, a sentence each that begins with the file."""
    tables, found = _tables(folder), []
    for path in tables:
        found += _reported(path, table_findings(work, path))
    readable = [path for path in tables if is_table(work, path)]
    if readable == tables:
        found += _reported(folder.interactions, event_findings(work, folder, _split_name(folder)), "events ok")
    num_items = work.count(parquet_rows(folder.items)) if folder.items in readable else None
    for path in _arrays(folder):
        found += _reported(path, array_findings(folder, path, num_items))
    return found


def _reported(path: Path, findings: Iterator[str], good: str = "content ok") -> list[str]:
    found = [f"{path}: {finding}" for finding in findings]
    if not found:
        log.info("check: %s: %s", path.name, good)
    return found


def _split_name(folder: DatasetFolder) -> str | None:
    try:
        return load_meta(folder.interactions, "").get("split_name")
    except UserError:
        return None  # it has no meta, or one that is a finding of its own


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
            yield from _codes_meta(path, meta)


def _codes_meta(path: Path, meta: dict) -> Iterator[str]:
    codes = np.load(path, mmap_mode="r", allow_pickle=False)
    sizes = np.array(meta.get("codebook_sizes", []))
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
        if not meta_path(path).exists():
            inputs = {p.name: file_sha256(p) for p in _inputs(folder, path)}
            own = _array_meta(folder, path) if path.suffix == ".npy" else {}
            write_meta(path, {"inputs": inputs, **shared, **own})
            log.info("check: wrote %s", meta_path(path).name)


def _inputs(folder: DatasetFolder, path: Path) -> list[Path]:
    if path.suffix != ".npy":
        return [folder.items, folder.users] if path == folder.interactions else []
    kind, suffix = array_kind(folder, path)
    return [folder.items, *([folder.mask(suffix)] if kind == "emb" and folder.mask(suffix).exists() else [])]


def _array_meta(folder: DatasetFolder, path: Path) -> dict:
    """What the stage that reads an array asks its meta for. All codes of a file that is sound are different."""
    kind, _suffix = array_kind(folder, path)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if kind == "codes":
        return {"codebook_sizes": (array.max(axis=0) + 1).tolist(), "disambiguation_level": None,
                "collision_rate_before": 0.0, "collision_rate_after": 0.0}
    return {"dim": array.shape[1]} if kind == "emb" else {}
