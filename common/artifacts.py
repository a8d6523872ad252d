"""The names of artifacts, and functions that load and check them.

An artifact is a file that one stage writes and a later stage reads. Each artifact has a meta file next to it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
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
    """Check that an artifact is up to date, and return the content of its meta file.

    `fix` is the command that makes the artifact. It is shown in errors. Raises DataError if the artifact is missing.
    Raises ArtifactError if the artifact is damaged or stale, or has another schema version. An artifact is stale if one
    of its input files has changed.
    """
    finish_publishing(path)
    if not path.exists():
        raise DataError(path, "not found", fix=fix)
    if not meta_path(path).exists():
        raise ArtifactError(path, "has no meta file", f"There is no {meta_path(path).name} in the same folder", fix)
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
        version, size, inputs, _ = meta["schema_version"], meta["size"], dict(meta["inputs"]), meta["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(meta_path(path), "is not a valid meta file", repr(error), fix) from error
    fix = f"{meta['command']} --force" if meta.get("command") else fix
    if version != SCHEMA_VERSION:
        raise ArtifactError(meta_path(path), f"has schema version {version}",
                            f"This code reads schema version {SCHEMA_VERSION}", fix)
    if path.stat().st_size != size:
        raise ArtifactError(path, f"has {path.stat().st_size} bytes, but its meta file says {size} bytes",
                            "The file was changed or damaged", fix)
    for name, sha256 in inputs.items():
        # If the input itself has a problem, this call raises an error with the command that rebuilds the input.
        if load_meta(path.with_name(name), fix)["sha256"] != sha256:
            raise ArtifactError(path, f"is stale: its input {name} has changed", fix=fix)
    return meta


def verify(path: Path, fix: str) -> dict:
    """Like `load_meta`, but also check that the content of the file matches the sha256 in its meta file."""
    meta = load_meta(path, fix)
    fix = f"{meta['command']} --force" if meta.get("command") else fix
    if file_sha256(path) != meta["sha256"]:
        raise ArtifactError(path, "does not match the sha256 in its meta file", "The file was changed or damaged", fix)
    return meta


@dataclass(frozen=True)
class DatasetFolder:
    """The paths of all files of a dataset. They are in the folder `data_root/<name>/`."""

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
    def source_flags(self) -> Path:
        return self.path / "source.yaml"

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
        """The text ` --data_root DIR` to append to a command, or "" if `data_root` is the default."""
        return folder_flag("--data_root", self.data_root, ROOT / "data")

    def require(self) -> None:
        """Raise ConfigError if the dataset does not exist."""
        if self.interactions.exists():
            return
        names = sorted(p.parent.name for p in self.data_root.glob("*/interactions.parquet"))
        known = f"Datasets in {self.data_root}: {', '.join(names)}" if names else f"{self.data_root} has no datasets"
        guess, fix = _suggest(self.name, names, lambda close: f"--dataset {close}", self.make_command)
        raise ConfigError(f"--dataset {self.name}", "unknown dataset",
                          f"{guess} {known}" if guess.endswith("?") else known, fix)

    def suffixes(self) -> list[str]:
        """Return the suffixes of all embeddings in the folder, sorted."""
        return self._variable_parts("emb")

    def variants(self) -> list[str]:
        """Return the variants (see `variant`) of all semantic IDs in the folder, sorted."""
        return self._variable_parts("codes")

    def _variable_parts(self, kind: str) -> list[str]:
        """Find all files `<name>.<kind>-*.npy` in the folder. Return the parts of their names that `*` matches."""
        prefix = f"{self.name}.{kind}-"
        return sorted(path.name.removeprefix(prefix).removesuffix(".npy")
                      for path in self.path.glob(f"{escape(prefix)}*.npy"))


def variant(quantizer: str, suffix: str, tag: str | None) -> str:
    """Return the text `<quantizer>-<suffix>[-<tag>]`, which identifies semantic IDs in file and folder names."""
    return "-".join(filter(None, (quantizer, suffix, tag)))


def _suggest(name: str, known: list[str], flags: Callable[[str], str], make: str) -> tuple[str, str]:
    """Return the texts `why` and `fix` of an error about an unknown name.

    `make` is the command that makes the artifact `name`. If a known name is similar, the fix also shows the
    flags that select the known name: `flags(known name)`.
    """
    if (close := closest(name, known)) is None:
        return nearest(name, known), make
    return f"Did you mean {close!r}?", f"use {flags(close)}, or make {name} with: {make}"


def _rebuild_command(meta: dict, fix: str) -> str:
    """Return the command that makes an artifact again, even if it exists. If the meta has no command, use `fix`."""
    return f"{meta.get('command') or fix} --force"


def filter_lines(steps: list[dict]) -> list[str]:
    """Return one line of text per filter: how many interactions the filter removed, and how many are left.

    steps: the value of `filters` in the meta file of the interactions
    """
    first, left = steps[0], [step["interactions"] for step in steps]
    return [f"{left[0]:,} interactions {first['step']}",
            *(f"{before - after:,} removed by {step['step']}, {after:,} left"
              for step, (before, after) in zip(steps[1:], pairwise(left), strict=True))]


class Interactions(NamedTuple):
    """All events of a dataset, sorted by user, then by time, then by input line. Each array has one entry per event."""

    user: np.ndarray       # int64
    item: np.ndarray       # int64
    timestamp: np.ndarray  # int64, seconds
    split: np.ndarray      # int8, index into SPLITS


def ids_sha256(raw_ids: Iterable[str]) -> str:
    """Return a hash of the raw ids. The hash also changes if the order of the ids changes."""
    digest = hashlib.sha256()
    for raw_id in raw_ids:
        encoded = raw_id.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _rows(path: Path) -> "DuckDBPyRelation":
    import duckdb

    rows = duckdb.sql(f"FROM {parquet_rows(path)}")
    assert rows is not None  # for mypy: only statements without a result give None
    return rows


def load_interactions(folder: DatasetFolder) -> Interactions:
    """Load all events of a dataset.

    Raises DataError if the file is missing. Raises ArtifactError if the file is damaged or stale, or has invalid
    values.
    """
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
    """Load the raw id, the title and the text of every item, in item order.

    Returns a dict with the keys `raw_id`, `title` and `text`. Each value is an object array (num_items,).
    """
    return _load_table(folder, folder.items, "item", ("raw_id", "title", "text"))


def load_image_urls(folder: DatasetFolder) -> np.ndarray:
    """Load the URL of the image of every item, in item order.

    Returns an object array (num_items,). The value is None for an item without an image. Raises DataError if
    `items.parquet` has no column `image_url`.
    """
    load_meta(folder.items, folder.make_command)
    if "image_url" not in _rows(folder.items).columns:
        raise DataError(folder.items, "has no column image_url", "It must contain the URL of each item's image",
                        "add the column (null for items without an image)")
    return _load_table(folder, folder.items, "item", ("image_url",))["image_url"]


def load_users(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """Load the raw id of every user, in user order.

    Returns a dict with the key `raw_id`. The value is an object array (num_users,).
    """
    return _load_table(folder, folder.users, '"user"', ("raw_id",))


def _load_table(folder: DatasetFolder, path: Path, order: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    load_meta(path, folder.make_command)
    rows = _rows(path).order(order).project(", ".join(names)).fetchall()
    return {name: np.array([row[i] for row in rows], dtype=object) for i, name in enumerate(names)}


def load_embeddings(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """Load the embedding vectors of all items, in item order: float32 (num_items, dim).

    Raises DataError if the file is missing, or contains NaN or infinite values. Raises ArtifactError if the file is
    damaged, stale or made for other items.
    """
    fix = f"bash dataloader/run_pipeline.sh --dataset {folder.name} --suffix {suffix}{folder.root_flag}"
    path = folder.embeddings(suffix)
    if not path.exists():
        raise DataError(path, "not found", *_suggest(
            suffix, folder.suffixes(), lambda close: f"--embedding_suffix {close}", fix))
    array = _load_array(folder, path, np.float32, fix)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise DataError(path, "contains NaN or infinite values, for example in the rows "
                        f"{np.flatnonzero(~finite)[:10].tolist()}",
                        fix=_rebuild_command(load_meta(path, fix), fix))
    return np.ascontiguousarray(array)


def load_mask(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """Load the mask of an embedding: bool (num_items,).

    The value is False if the item has no vector of its own; such an item has the mean vector. If the embedding has no
    mask file, the value is True for all items.
    """
    fix = f"bash dataloader/run_pipeline.sh --dataset {folder.name} --suffix {suffix}{folder.root_flag}"
    meta = load_meta(folder.embeddings(suffix), fix)
    if folder.mask(suffix).name not in meta["inputs"]:
        return np.ones(load_meta(folder.items, fix)["num_items"], dtype=bool)
    return _load_array(folder, folder.mask(suffix), bool, fix, ndim=1)


def load_codes(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None,
               distinct: bool = True) -> tuple[np.ndarray, dict]:
    """Load the semantic IDs of all items, and their meta.

    The semantic IDs are an int32 array (num_items, num_levels). The meta is a dict with the keys `codebook_sizes` (one
    size per level), `disambiguation_level` (or None), `collision_rate_before` and `collision_rate_after`.

    Raises DataError if the file is missing. Raises ArtifactError if the file is damaged or stale. If `distinct` is
    True, raises ArtifactError if two items have the same semantic ID.
    """
    fix = f"python quantization/main.py --quantizer_name {quantizer} --dataset_name {folder.name}"
    fix += f" --embedding_suffix {suffix}" + (f" --tag {tag}" if tag else "") + folder.root_flag
    path = folder.codes(quantizer, suffix, tag)
    if not path.exists():
        raise DataError(path, "not found", *_suggest(
            variant(quantizer, suffix, tag), folder.variants(), lambda close: _codes_flags(folder, close), fix))
    codes, meta = _load_array(folder, path, np.int32, fix), load_meta(path, fix)
    sizes = np.array(meta.get("codebook_sizes", []))
    if len(sizes) != codes.shape[1] or (codes < 0).any() or (codes >= sizes).any():
        raise ArtifactError(path, "has codes outside its codebooks", f"The codebook sizes are {sizes.tolist()}",
                            _rebuild_command(meta, fix))
    if distinct and len(np.unique(codes, axis=0)) != len(codes):
        command = re.sub(r" --disambiguation[ =]\S+", "", meta.get("command") or fix)
        raise ArtifactError(path, "gives several items the same semantic ID",
                            "A recommender cannot tell these items apart", f"{command} --disambiguation extra_level")
    return codes, meta


def _codes_flags(folder: DatasetFolder, name: str) -> str:
    """Return the flags that select the semantic IDs with this name, for example `rqvae-td` (see `variant`)."""
    quantizer, _, rest = name.partition("-")
    # A suffix may contain '-' itself, so take the longest of the known suffixes that match.
    suffix = max((known for known in folder.suffixes() if f"{rest}-".startswith(f"{known}-")), key=len, default=rest)
    tag = rest[len(suffix) + 1:]
    return f"--quantizer_name {quantizer} --embedding_suffix {suffix}" + (f" --tag {tag}" if tag else "")


def _load_array(folder: DatasetFolder, path: Path, dtype: type, fix: str, ndim: int = 2) -> np.ndarray:
    meta = load_meta(path, fix)
    items, fix = load_meta(folder.items, folder.make_command), _rebuild_command(meta, fix)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(path, "is not a NumPy array file", str(error), fix) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise ArtifactError(path, f"contains a {array.dtype} array of shape {array.shape}",
                            f"It must be a {np.dtype(dtype)} array of shape "
                            f"{'(items, columns)' if ndim == 2 else '(items,)'}", fix)
    if len(array) != items["num_items"] or meta.get("items_sha256") != items["items_sha256"]:
        raise ArtifactError(path, f"was made for another list of items ({len(array)} rows)",
                            f"{folder.items.name} has {items['num_items']} items", fix)
    return array


def save_array(path: Path, array: np.ndarray, meta: dict) -> dict:
    """Write an array to an .npy file, and write its meta file. Return the content of the meta file."""
    def write(staged: Path) -> None:
        with staged.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    return publish(path, write, meta)
