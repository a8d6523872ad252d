"""Every file that crosses a stage: its name, reader, writer and checks.

The next stage reads these files and their metas, and nothing else of the stage before.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.cli import ROOT, folder_flag
from common.errors import ArtifactError, ConfigError, DataError, closest, nearest
from common.publishing import SCHEMA_VERSION, file_sha256, finish_publishing, meta_path, publish
from common.tables import parquet_rows

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

SPLITS = ("train", "valid", "test")


def load_meta(path: Path, fix: str) -> dict:
    """The meta of an artifact whose recorded inputs are still what lies beside it.

    `fix` is the command that makes the artifact. Raises DataError where there is none, and
    ArtifactError where it is damaged, of another schema, or made from inputs that changed since.
    """
    finish_publishing(path)
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
    def image_table(self) -> Path:
        return self.path / "images.parquet"

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
        return folder_flag("--data_root", self.data_root, ROOT / "data")

    def require(self) -> None:
        """Raise ConfigError unless the data part has been run for this name."""
        if self.interactions.exists():
            return
        there = sorted(p.parent.name for p in self.data_root.glob("*/interactions.parquet"))
        known = f"in {self.data_root} there are" + (f": {', '.join(there)}" if there else " no data sets yet")
        guess, fix = _nearest_or_made(self.name, there, lambda close: f"--dataset {close}", self.make_command)
        raise ConfigError(f"--dataset {self.name}", "there is no such data set",
                          f"{guess} {known}" if guess.endswith("?") else known, fix)

    def suffixes(self) -> list[str]:
        """Of the embeddings that are there."""
        return self._between("emb")

    def variants(self) -> list[str]:
        """Of the codes that are there."""
        return self._between("codes")

    def _between(self, kind: str) -> list[str]:
        prefix = f"{self.name}.{kind}-"
        return sorted(path.name.removeprefix(prefix).removesuffix(".npy")
                      for path in self.path.glob(f"{escape(prefix)}*.npy"))


def variant(quantizer: str, suffix: str, tag: str | None) -> str:
    """`<quantizer>-<suffix>[-<tag>]`, as in file and folder names."""
    return "-".join(filter(None, (quantizer, suffix, tag)))


def _nearest_or_made(name: str, there: list[str], flags: Callable[[str], str], make: str) -> tuple[str, str]:
    """Why, and the fix, where there is nothing of this name: `flags` for the nearest one, and the command `make`."""
    if (close := closest(name, there)) is None:
        return nearest(name, there), make
    return f"did you mean {close!r}?", f"{flags(close)}, or to make {name}: {make}"


def _again(meta: dict, fix: str) -> str:
    """The command that makes an artifact again; without --force it would be taken for current."""
    return f"{meta.get('command') or fix} --force"


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


def _rows(path: Path) -> "DuckDBPyRelation":
    """The rows of a Parquet file."""
    import duckdb

    rows = duckdb.sql(f"FROM {parquet_rows(path)}")
    assert rows is not None  # a query has rows, maybe none
    return rows


def load_interactions(folder: DatasetFolder) -> Interactions:
    load_meta(folder.interactions, folder.make_command)
    columns = _rows(folder.interactions).project(
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
    load_meta(folder.items, folder.make_command)
    if "image_url" not in _rows(folder.items).columns:
        raise DataError(folder.items, "has no column image_url", "it says where the images are",
                        "add the column, empty where an item has no image")
    return _load_table(folder, folder.items, "item", ("image_url",))["image_url"]


def load_users(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """`raw_id` of every user, in user order."""
    return _load_table(folder, folder.users, '"user"', ("raw_id",))


def _load_table(folder: DatasetFolder, path: Path, order: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    load_meta(path, folder.make_command)
    rows = _rows(path).order(order).project(", ".join(names)).fetchall()
    return {name: np.array([row[i] for row in rows], dtype=object) for i, name in enumerate(names)}


def load_embeddings(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """float32 (num_items, dim), finite, one row an item of `items.parquet`."""
    fix = f"bash dataloader/run_pipeline.sh --dataset {folder.name} --suffix {suffix}{folder.root_flag}"
    path = folder.embeddings(suffix)
    if not path.exists():
        raise DataError(path, "not there", *_nearest_or_made(
            suffix, folder.suffixes(), lambda close: f"--embedding_suffix {close}", fix))
    array = _load_array(folder, path, np.float32, fix)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise DataError(path, f"rows {np.flatnonzero(~finite)[:10].tolist()} are not finite",
                        fix=_again(load_meta(path, fix), fix))
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
        raise DataError(path, "not there", *_nearest_or_made(
            variant(quantizer, suffix, tag), folder.variants(), lambda close: _codes_flags(folder, close), fix))
    codes, meta = _load_array(folder, path, np.int32, fix), load_meta(path, fix)
    sizes = np.array(meta.get("codebook_sizes", []))
    if len(sizes) != codes.shape[1] or (codes < 0).any() or (codes >= sizes).any():
        raise ArtifactError(path, "has codes outside its codebooks", f"sizes {sizes.tolist()}", _again(meta, fix))
    if distinct and len(np.unique(codes, axis=0)) != len(codes):
        command = re.sub(r" --disambiguation[ =]\S+", "", meta.get("command") or fix)
        raise ArtifactError(path, "gives several items the same semantic ID",
                            "a recommender could not tell them apart", f"{command} --disambiguation extra_level")
    return codes, meta


def _codes_flags(folder: DatasetFolder, name: str) -> str:
    """The flags that choose codes by their `variant`, whose suffix may have a '-' of its own."""
    quantizer, _, rest = name.partition("-")
    suffix = max((known for known in folder.suffixes() if f"{rest}-".startswith(f"{known}-")), key=len, default=rest)
    tag = rest[len(suffix) + 1:]
    return f"--quantizer_name {quantizer} --embedding_suffix {suffix}" + (f" --tag {tag}" if tag else "")


def _load_array(folder: DatasetFolder, path: Path, dtype: type, fix: str, ndim: int = 2) -> np.ndarray:
    meta = load_meta(path, fix)
    items, fix = load_meta(folder.items, folder.make_command), _again(meta, fix)
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
