"""The names of artifacts, and functions that load and check them.

An artifact is a file that one stage writes and a later stage reads. Each artifact has a meta file next to it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.arrays import open_array
from common.cli import ROOT, folder_flag
from common.errors import ArtifactError, ConfigError, DataError, UserError, closest, nearest, one_line
from common.metas import load_meta
from common.publishing import meta_path, publish
from common.reading import Record, shortened
from common.table_files import (
    column_findings,
    event_findings,
    fact_findings,
    id_findings,
    ids_sha256,
    items_finding,
    num_rows,
    read_events,
)
from common.tables import parquet_rows, percent

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FUSIONS = ("fused-concat", "fused-pca", "fused-align")
SUFFIXES = ("td", "image", "cf", *FUSIONS)  # embeddings of the data stage; texts may also have any other suffix
MAX_CODES = 1 << 20  # maximum size of a codebook that has more codes than there are items


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
    def card(self) -> Path:
        return self.path / "card.md"

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

    def embedding_command(self, suffix: str) -> str:
        """Return the command that makes the embedding with this suffix."""
        return f"bash dataloader/run_pipeline.sh --dataset {self.name} --suffix {suffix}{self.root_flag}"

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


def dataset_line(folder: DatasetFolder) -> str:
    """Return one line of text about a dataset, from the meta file of its interactions, for logs and tables of results.

    If this meta file is not valid, the line says why. A fact that the meta file does not have is left out.
    """
    try:
        meta = load_meta(folder.interactions, folder.make_command)
    except UserError as error:  # each command itself checks the files that it reads
        return f"{folder.name}: {folder.interactions.name} {error.what}"
    head = [counts(meta), one_line(meta.get("split_name", ""))]
    return f"{folder.name}: " + "; ".join(filter(None, [", ".join(filter(None, head)), facts(meta)]))


def counts(meta: dict) -> str:
    return ", ".join(f"{meta[f'num_{name}']:,} {name}" for name in ("users", "items", "interactions")
                     if f"num_{name}" in meta)


def facts(meta: dict) -> str:
    """Return facts about a dataset that limit the meaning of its metrics, or "" if the meta file has none of them."""
    found = []
    if (share := share_of_repeats(meta)) is not None:
        found.append(f"{percent(share)} of the test events repeat an item")
    if "num_cold_items" in meta:
        found.append(f"{meta['num_cold_items']['test']:,} cold items")
    if "num_without_text" in meta:
        found.append(f"{meta['num_without_text']:,} items without text")
    return ", ".join(found)


def share_of_repeats(meta: dict) -> float | None:
    """Return the share of the test events whose user has an earlier event with the same item; None: not counted.

    meta: the meta file of the interactions
    """
    if "num_repeats" not in meta or not meta["num_in_split"]["test"]:
        return None
    return meta["num_repeats"]["test"] / meta["num_in_split"]["test"]


def filter_lines(steps: list[dict]) -> list[str]:
    """Return one line of text per filter: how many interactions the filter removed, and how many are left.

    steps: the value of `filters` in the meta file of the interactions
    """
    first, left = steps[0], [step["interactions"] for step in steps]
    return [f"{left[0]:,} interactions {one_line(first['step'])}",
            *(f"{before - after:,} removed by {one_line(step['step'])}, {after:,} left"
              for step, (before, after) in zip(steps[1:], pairwise(left), strict=True))]


class Interactions(NamedTuple):
    """All events of a dataset, sorted by user, then by time, then by input line. Each array has one entry per event."""

    user: np.ndarray       # int64
    item: np.ndarray       # int64
    timestamp: np.ndarray  # int64, seconds
    split: np.ndarray      # int8, index into SPLITS


def load_interactions(folder: DatasetFolder) -> Interactions:
    """Load all events of a dataset.

    Raises DataError if the file is missing. Raises ArtifactError if the file is damaged or stale, has invalid values,
    was made for other items, or does not have the events that its meta file describes.
    """
    path, meta = folder.interactions, load_meta(folder.interactions, folder.make_command)
    fix = meta.fix
    if folder.items.is_file():
        items_sha256 = load_meta(folder.items, folder.make_command)["items_sha256"]
        _refuse(path, filter(None, [items_finding(meta, items_sha256)]), fix)
    with reading_table(path, fix) as connection:
        _refuse(path, column_findings(connection, path), fix)
        events = read_events(connection, path)
        num_users, num_items = (num_rows(connection, table) if table.is_file() else None
                                for table in (folder.users, folder.items))
        _refuse(path, event_findings(events, num_users, num_items), fix)
        _refuse(path, fact_findings(meta, events, num_users, num_items), fix)
    return Interactions(*(np.asarray(getattr(events, name)) for name in Interactions._fields))


def load_items(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """Load the raw id, the title and the text of every item, in item order.

    Returns a dict with the keys `raw_id`, `title` and `text`. Each value is an object array (num_items,). Raises
    DataError if the file is missing. Raises ArtifactError if the file is damaged or stale, or has invalid values.
    """
    return _load_items(folder, "title", "text")


def load_image_urls(folder: DatasetFolder) -> np.ndarray:
    """Load the URL of the image of every item, in item order.

    Returns an object array (num_items,). The value is None for an item without an image. Raises DataError if
    `items.parquet` has no column `image_url`.
    """
    fix = load_meta(folder.items, folder.make_command).fix
    with reading_table(folder.items, fix) as connection:
        columns = connection.sql(f"FROM {parquet_rows(folder.items)}").columns
    if "image_url" not in columns:
        raise DataError(folder.items, "has no column image_url", "It must contain the URL of each item's image",
                        "add the column (null for items without an image)")
    return _load_items(folder, "image_url")["image_url"]


def load_users(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """Load the raw id of every user, in user order.

    Returns a dict with the key `raw_id`. The value is an object array (num_users,). Raises the errors of `load_items`.
    """
    return _load_table(folder, folder.users, "user", "raw_id")[0]


def load_items_meta(folder: DatasetFolder) -> Record:
    """Return the meta of items.parquet, with the number of items in `num_items`.

    Raises ArtifactError if the file is damaged or stale, or has another number of rows.
    """
    meta = load_meta(folder.items, folder.make_command)
    with reading_table(folder.items, meta.fix) as connection:
        if (found := num_rows(connection, folder.items)) != meta["num_items"]:
            raise ArtifactError(meta_path(folder.items), f"num_items must be {found}, got {meta['num_items']}",
                                f"{folder.items.name} has {found} rows", meta.fix)
    return meta


def _load_items(folder: DatasetFolder, *columns: str) -> dict[str, np.ndarray]:
    """Load `raw_id` and other columns of items.parquet. Also compare the raw ids with the meta file."""
    items, meta = _load_table(folder, folder.items, "item", "raw_id", *columns)
    num_items, found = len(items["raw_id"]), ids_sha256(items["raw_id"])
    if (num_items, found) != (meta["num_items"], meta["items_sha256"]):
        raise ArtifactError(folder.items, "does not have the items that its meta file describes",
                            f"The file has {num_items} items with the hash {found[:12]}, the meta file says "
                            f"{meta['num_items']} items with the hash {meta['items_sha256'][:12]}",
                            meta.fix)
    return items


def _load_table(folder: DatasetFolder, path: Path, key: str, *columns: str) -> tuple[dict[str, np.ndarray], Record]:
    """Load columns of a table, in the order of its column `key`. Also return the meta of the table."""
    meta = load_meta(path, folder.make_command)
    with reading_table(path, meta.fix) as connection:
        _refuse(path, column_findings(connection, path), meta.fix)
        _refuse(path, id_findings(connection, path), meta.fix)
        rows = connection.sql(f"""SELECT {", ".join(columns)} FROM {parquet_rows(path)} ORDER BY "{key}" """).fetchall()
    return {name: np.array([row[i] for row in rows], dtype=object) for i, name in enumerate(columns)}, meta


@contextmanager
def reading_table(path: Path, fix: str) -> Iterator["DuckDBPyConnection"]:
    """Yield a DuckDB connection to read the table `path`. If DuckDB cannot read the table, raise ArtifactError."""
    import duckdb

    try:
        yield duckdb.default_connection()
    except duckdb.OutOfMemoryException:  # does not mean that the file is damaged
        raise
    except duckdb.Error as error:
        raise ArtifactError(path, "cannot be read", shortened(str(error)), fix) from error


def _refuse(path: Path, findings: Iterable[str], fix: str) -> None:
    """Raise ArtifactError for the first finding."""
    for finding in findings:
        raise ArtifactError(path, finding, fix=fix)


def load_embeddings(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """Load the embedding vectors of all items, in item order: float32 (num_items, dim).

    Raises DataError if the file is missing, or contains NaN or infinite values. Raises ArtifactError if the file is
    damaged, stale or made for other items.
    """
    fix = folder.embedding_command(suffix)
    path = folder.embeddings(suffix)
    if not path.exists():
        raise DataError(path, "not found", *_suggest(
            suffix, folder.suffixes(), lambda close: f"--embedding_suffix {close}", fix))
    array = _load_array(folder, path, np.float32, fix)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise DataError(path, "contains NaN or infinite values, for example in the rows "
                        f"{np.flatnonzero(~finite)[:10].tolist()}",
                        fix=load_meta(path, fix).fix)
    return array


def load_mask(folder: DatasetFolder, suffix: str) -> np.ndarray:
    """Load the mask of an embedding: bool (num_items,).

    The value is False if the item has no vector of its own; such an item has the mean vector. If the embedding has no
    mask file, the value is True for all items.
    """
    fix = folder.embedding_command(suffix)
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
    _refuse(path, codebook_findings(codes, meta.get("codebook_sizes", [])), meta.fix)
    if distinct and len(np.unique(codes, axis=0)) != len(codes):
        command = re.sub(r" --disambiguation[ =]\S+", "", meta.get("command") or fix)
        raise ArtifactError(path, "gives several items the same semantic ID",
                            "A recommender cannot tell these items apart", f"{command} --disambiguation extra_level")
    return codes, meta


def codebook_findings(codes: np.ndarray, sizes: list[int]) -> Iterator[str]:
    """Yield a message if the semantic IDs do not fit the codebook sizes in their meta file."""
    # A recommender has a vector for every code of a codebook, so a wrong size could fill the memory.
    if sizes and max(sizes) > (limit := max(MAX_CODES, len(codes))):
        yield f"a codebook of {max(sizes)} codes is too large for {len(codes)} items; the largest allowed is {limit}"
    elif len(sizes) != codes.shape[1] or (codes < 0).any() or (codes >= np.array(sizes)).any():
        yield f"has codes outside its codebooks; its meta file has the codebook sizes {sizes}"


def _codes_flags(folder: DatasetFolder, name: str) -> str:
    """Return the flags that select the semantic IDs with this name, for example `rqvae-td` (see `variant`)."""
    quantizer, _, rest = name.partition("-")
    # A suffix may contain '-' itself, so take the longest of the known suffixes that match.
    suffix = max((known for known in folder.suffixes() if f"{rest}-".startswith(f"{known}-")), key=len, default=rest)
    tag = rest[len(suffix) + 1:]
    return f"--quantizer_name {quantizer} --embedding_suffix {suffix}" + (f" --tag {tag}" if tag else "")


def _load_array(folder: DatasetFolder, path: Path, dtype: type, fix: str, ndim: int = 2) -> np.ndarray:
    meta = load_meta(path, fix)
    items, fix = load_meta(folder.items, folder.make_command), meta.fix
    try:
        array = open_array(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(path, "is not a valid .npy file", str(error), fix) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise ArtifactError(path, f"contains a {array.dtype} array of shape {array.shape}",
                            f"It must be a {np.dtype(dtype)} array of shape "
                            f"{'(items, columns)' if ndim == 2 else '(items,)'}", fix)
    if ndim == 2 and not array.shape[1]:
        raise ArtifactError(path, f"has no columns: its shape is {array.shape}", fix=fix)
    if len(array) != items["num_items"] or meta.get("items_sha256") != items["items_sha256"]:
        raise ArtifactError(path, f"was made for another list of items ({len(array)} rows)",
                            f"{folder.items.name} has {items['num_items']} items", fix)
    return np.array(array, order="C")


def save_array(path: Path, array: np.ndarray, meta: dict) -> dict:
    """Write an array to an .npy file, and write its meta file. Return the content of the meta file."""
    def write(staged: Path) -> None:
        with staged.open("wb") as file:
            # np.save would write to a real file through a buffer of C, and a full disk could cut off its end silently.
            buffered: Any = SimpleNamespace(write=file.write)
            np.save(buffered, array, allow_pickle=False)

    return publish(path, write, meta, array.nbytes)
