"""Every file that crosses a stage: its name, reader, writer and checks.

A file is published together with `<file>.meta.json`, whole or not at all. The next stage reads
these files and their metas, and nothing else of the stage before.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import ROOT
from common.distributed import is_main
from common.errors import ArtifactError, ConfigError, DataError, nearest

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")


def publish(path: Path, write: Callable[[Path], None], meta: dict) -> dict:
    """Write `path` through `write(staged path)` with its meta beside it; returns the completed meta.

    Both are staged and synced before either gets its name. If the process dies between the two
    renames, the staged meta still lies there and describes the new content: the next reader
    finishes the publishing (`_finish_publishing`). So the old pair or the new pair can always be read.
    Of several processes the first one writes.
    """
    if not is_main():
        return {"schema_version": SCHEMA_VERSION, **meta}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    staged_meta = path.with_name(f".{meta_path(path).name}.tmp-{os.getpid()}")
    try:
        write(staged)
        meta = {"schema_version": SCHEMA_VERSION, "sha256": file_sha256(staged), "size": staged.stat().st_size, **meta}
        staged_meta.write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.chmod(staged_meta.stat().st_mode)  # safetensors makes its files readable by their owner alone
        for file in (staged, staged_meta):
            _sync(file)
        os.replace(staged, path)
    except BaseException:
        if staged.exists():  # else the content has its name already, and a reader needs the staged meta
            staged.unlink()
            staged_meta.unlink(missing_ok=True)
        raise
    with suppress(FileNotFoundError):  # a reader has finished the publishing already
        os.replace(staged_meta, meta_path(path))
    _sync(path.parent)
    _sweep(path)
    return meta


def write_meta(path: Path, meta: dict) -> None:
    """Give a file that is there already, made elsewhere, the meta that other stages ask for."""
    meta = {"schema_version": SCHEMA_VERSION, "sha256": file_sha256(path), "size": path.stat().st_size, **meta}
    write_text(meta_path(path), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a small text file that has no meta, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file that has no meta, whole or not at all; when this returns it is on the disk.

    Of several processes the first one writes.
    """
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        staged.write_bytes(content)
        _sync(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def publish_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make the flat folder `path` through `write(staged folder)`, whole or not at all.

    A folder that is there is moved aside first and removed when its successor has the name.
    """
    staged, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    try:
        staged.mkdir(parents=True)
        write(staged)
        for part in staged.iterdir():
            part.chmod(staged.stat().st_mode & 0o666)
        for part in (*staged.iterdir(), staged):
            _sync(part)
        if path.exists():
            path.rename(old)
        staged.rename(path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    for left in (*path.parent.glob(f".{path.name}.tmp-*"), *path.parent.glob(f".{path.name}.old-*")):
        if left == old or not Path("/proc", left.name.rsplit("-", 1)[1]).exists():  # or of a writer that was killed
            shutil.rmtree(left)


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish_publishing(path: Path) -> None:
    """Give the meta its name if a writer died after it had replaced the content."""
    staged = list(path.parent.glob(f".{meta_path(path).name}.tmp-*"))
    if not staged or not path.exists():
        return
    sha256 = file_sha256(path)
    for candidate in staged:
        try:
            complete = json.loads(candidate.read_text(encoding="utf-8"))["sha256"] == sha256
        except (OSError, ValueError, KeyError):
            continue  # another writer's half-written or just renamed stage
        if complete:
            with suppress(FileNotFoundError):  # its writer or another reader was faster
                os.replace(candidate, meta_path(path))


def _sweep(path: Path) -> None:
    """Remove what earlier writers of this file left behind when they were killed."""
    for name in (path.name, meta_path(path).name):
        for left in path.parent.glob(f".{name}.tmp-*"):
            if not Path("/proc", left.name.rsplit("-", 1)[1]).exists():
                left.unlink(missing_ok=True)


def load_meta(path: Path, fix: str) -> dict:
    """The meta of an artifact whose recorded inputs are still what lies beside it.

    `fix` is the command that makes the artifact. Raises DataError where there is none, and
    ArtifactError where it is damaged, of another schema, or made from inputs that changed since.
    """
    _finish_publishing(path)
    if not path.exists():
        raise DataError(path, "not there", fix=fix)
    if not meta_path(path).exists():
        raise ArtifactError(path, "has no meta", f"{meta_path(path).name} is missing beside it", fix)
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
        version, size, inputs, _ = meta["schema_version"], meta["size"], dict(meta["inputs"]), meta["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(meta_path(path), "is not a valid meta", repr(error), fix) from error
    fix = f"{meta['command']} --force" if meta.get("command") else fix
    if version != SCHEMA_VERSION:
        raise ArtifactError(meta_path(path), f"has schema version {version}", f"this code reads {SCHEMA_VERSION}", fix)
    if path.stat().st_size != size:
        raise ArtifactError(path, f"has {path.stat().st_size} bytes", f"its meta says {size}", fix)
    for name, sha256 in inputs.items():
        # The input's own rebuild command is in its own meta, which is read (and checked) first.
        if load_meta(path.with_name(name), fix)["sha256"] != sha256:
            raise ArtifactError(path, "is stale", f"{name} has changed since it was made", fix)
    return meta


def verify(path: Path, fix: str) -> dict:
    """Like `load_meta`, and the content is hashed again."""
    meta = load_meta(path, fix)
    fix = f"{meta['command']} --force" if meta.get("command") else fix
    if file_sha256(path) != meta["sha256"]:
        raise ArtifactError(path, "does not match the sha256 in its meta", "it was changed or damaged", fix)
    return meta


@dataclass(frozen=True)
class DatasetFolder:
    """Names of a data set's artifacts under `data_root/<name>/`."""

    data_root: Path
    name: str

    @property
    def path(self) -> Path:
        return self.data_root / self.name

    @property
    def interactions(self) -> Path:
        return self.path / "interactions.parquet"

    @property
    def items(self) -> Path:
        return self.path / "items.parquet"

    @property
    def users(self) -> Path:
        return self.path / "users.parquet"

    def embeddings(self, suffix: str) -> Path:
        return self.path / f"{self.name}.emb-{suffix}.npy"

    def mask(self, suffix: str) -> Path:
        return self.path / f"{self.name}.mask-{suffix}.npy"

    @property
    def figures(self) -> Path:
        return self.path / "figures.parquet"

    @property
    def images(self) -> Path:
        return self.path / "images"

    def codes(self, quantizer: str, suffix: str, tag: str | None) -> Path:
        return self.path / f"{self.name}.codes-{variant(quantizer, suffix, tag)}.npy"

    @property
    def make_command(self) -> str:
        return f"bash dataloader/run_pipeline.sh --dataset {self.name}{self.root_flag}"

    @property
    def root_flag(self) -> str:
        """` --data_root DIR` for commands that would not look there by themselves, else nothing."""
        return "" if self.data_root.resolve() == ROOT / "data" else f" --data_root {shlex.quote(str(self.data_root))}"

    def require(self) -> None:
        """Raise ConfigError unless the data part has been run for this name."""
        if self.interactions.exists():
            return
        there = sorted(p.parent.name for p in self.data_root.glob("*/interactions.parquet"))
        known = f"in {self.data_root} there are" + (f": {', '.join(there)}" if there else " no data sets yet")
        if (guess := nearest(self.name, there)).startswith("did you mean"):
            known = f"{guess} {known}"
        raise ConfigError(f"--dataset {self.name}", "there is no such data set", known, self.make_command)


def variant(quantizer: str, suffix: str, tag: str | None) -> str:
    """`<quantizer>-<suffix>[-<tag>]`, as in file and folder names."""
    return "-".join(filter(None, (quantizer, suffix, tag)))


class Interactions(NamedTuple):
    """All events, sorted by user, then time, then input line; each array has one entry an event."""

    user: np.ndarray       # int64
    item: np.ndarray       # int64
    timestamp: np.ndarray  # int64, seconds
    split: np.ndarray      # int8, index into SPLITS


def ids_sha256(raw_ids: Iterable[str]) -> str:
    """A hash of raw ids in their order, so that files about other items are told apart."""
    digest = hashlib.sha256()
    for raw_id in raw_ids:
        encoded = raw_id.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def load_interactions(folder: DatasetFolder) -> Interactions:
    import duckdb

    load_meta(folder.interactions, folder.make_command)
    columns = duckdb.read_parquet(str(folder.interactions)).project(
        f"""user::BIGINT AS "user", item::BIGINT AS item, timestamp::BIGINT AS "timestamp",
            (list_position({list(SPLITS)}, split) - 1)::TINYINT AS split""").fetchnumpy()
    for name, column in columns.items():
        if np.ma.is_masked(column):
            raise ArtifactError(folder.interactions, f"{np.ma.count_masked(column)} events have no valid {name}",
                                fix=f"{folder.make_command} --force")
    return Interactions(*(np.asarray(columns[name]) for name in Interactions._fields))


def load_items(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """`raw_id`, `title` and `text` of every item, as object arrays in item order."""
    return _load_table(folder, folder.items, "item", ("raw_id", "title", "text"))


def load_image_urls(folder: DatasetFolder) -> np.ndarray:
    """The address of every item's image, an object array in item order; None where an item has none.

    Raises DataError if the items were made elsewhere, without that column.
    """
    import duckdb

    load_meta(folder.items, folder.make_command)
    if "image_url" not in duckdb.read_parquet(str(folder.items)).columns:
        raise DataError(folder.items, "has no column image_url", "it says where the images are",
                        "add the column, empty where an item has no image")
    return _load_table(folder, folder.items, "item", ("image_url",))["image_url"]


def load_users(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """`raw_id` of every user, in user order."""
    return _load_table(folder, folder.users, '"user"', ("raw_id",))


def _load_table(folder: DatasetFolder, path: Path, order: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    import duckdb

    load_meta(path, folder.make_command)
    rows = duckdb.read_parquet(str(path)).order(order).project(", ".join(names)).fetchall()
    return {name: np.array([row[i] for row in rows], dtype=object) for i, name in enumerate(names)}


def load_embeddings(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """float32 (num_items, dim), finite, one row an item of `items.parquet`."""
    fix = f"bash dataloader/run_pipeline.sh --dataset {folder.name} --suffix {suffix}{folder.root_flag}"
    path = folder.embeddings(suffix)
    array = _load_array(folder, path, np.float32, fix)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise DataError(path, f"rows {np.flatnonzero(~finite)[:10].tolist()} are not finite", fix=fix)
    return np.ascontiguousarray(array)


def load_mask(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """bool (num_items,): which items have a vector of their own in this embedding."""
    fix = f"bash dataloader/run_pipeline.sh --dataset {folder.name} --suffix {suffix}{folder.root_flag}"
    meta = load_meta(folder.embeddings(suffix), fix)
    if folder.mask(suffix).name not in meta["inputs"]:
        return np.ones(load_meta(folder.items, fix)["num_items"], dtype=bool)
    return _load_array(folder, folder.mask(suffix), bool, fix, ndim=1)


def load_codes(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None,
               distinct: bool = True) -> tuple[np.ndarray, dict]:
    """int32 (num_items, num_levels) semantic IDs, no two alike if they must be `distinct`, and their meta.

    The meta holds `codebook_sizes` (one a level), `disambiguation_level` (or null), and the
    collision rates before and after it.
    """
    fix = f"python quantization/main.py --quantizer_name {quantizer} --dataset_name {folder.name}"
    fix += f" --embedding_suffix {suffix}" + (f" --tag {tag}" if tag else "") + folder.root_flag
    path = folder.codes(quantizer, suffix, tag)
    if not path.exists():
        there = [other.name.removeprefix(f"{folder.name}.codes-").removesuffix(".npy")
                 for other in folder.path.glob(f"{folder.name}.codes-*.npy")]
        raise DataError(path, "not there", nearest(variant(quantizer, suffix, tag), there), fix)
    codes, meta = _load_array(folder, path, np.int32, fix), load_meta(path, fix)
    sizes = np.array(meta.get("codebook_sizes", []))
    if len(sizes) != codes.shape[1] or (codes < 0).any() or (codes >= sizes).any():
        raise ArtifactError(path, "has codes outside its codebooks", f"sizes {sizes.tolist()}", fix)
    if distinct and len(np.unique(codes, axis=0)) != len(codes):
        raise ArtifactError(path, "gives several items the same semantic ID",
                            "a recommender could not tell them apart", f"{fix} --disambiguation extra_level")
    return codes, meta


def _load_array(folder: DatasetFolder, path: Path, dtype: type, fix: str, ndim: int = 2) -> np.ndarray:
    meta = load_meta(path, fix)
    items = load_meta(folder.items, folder.make_command)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(path, "is not a numpy array file", str(error), fix) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise ArtifactError(path, f"holds {array.dtype} {array.shape}",
                            f"wanted {np.dtype(dtype)} {'(items, columns)' if ndim == 2 else '(items,)'}", fix)
    if len(array) != items["num_items"] or meta.get("items_sha256") != items["items_sha256"]:
        raise ArtifactError(path, f"belongs to another list of items ({len(array)} rows)",
                            f"{folder.items.name} has {items['num_items']}", fix)
    return array


def save_array(path: Path, array: np.ndarray, meta: dict) -> dict:
    def write(staged: Path) -> None:
        with staged.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    return publish(path, write, meta)
