"""What every step that makes an embedding does with its vectors: check, transform, publish."""

import logging
from collections.abc import Iterator

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_meta, save_array
from common.errors import ConfigError, DataError, UserError
from common.publishing import meta_path
from dataloader.embeddings.encode import named
from dataloader.options import Embedding, Transform

log = logging.getLogger(__name__)

ROWS = 16_384      # rows that are worked on at once, so that a large embedding is held once
NOTHING = 1e-6     # a spread that is this small a part of the values, or of the largest one, is rounding

# N items, D dimensions


def is_current(target: Embedding, settings: dict, inputs: dict[str, str]) -> bool:
    """Whether the embedding there was made with these settings from these inputs (file name -> sha256)."""
    try:
        meta = load_meta(target.path, "")
    except UserError:
        return False
    recorded = {**settings, "transform": target.transform._asdict()}
    return meta.get("settings") == recorded and inputs.items() <= meta["inputs"].items()


def publish_embedding(target: Embedding, vectors: np.ndarray, settings: dict, command: str,
                      inputs: dict[str, str] | None = None, present: np.ndarray | None = None, **told: dict) -> None:
    """Check, transform and write the vectors of all items, in item order.

    vectors: (N, D), changed in place where that spares memory. `present` (N,) marks the items that have a vector of
    their own; the others get the mean of those, and a mask file says which they are. `inputs` are the files, beside
    items.parquet, that it was made from, each with its sha256. What else is `told` is for the meta alone. Raises
    DataError naming the raw ids of rows that are not finite, or all zero.
    """
    folder, suffix, transform = target
    items = load_meta(folder.items, folder.make_command)
    path, mask = target.path, folder.mask(suffix)
    present = np.ones(len(vectors), dtype=bool) if present is None else present
    if len(vectors) != items["num_items"]:
        raise DataError(path, f"{len(vectors)} vectors were made for {items['num_items']} items",
                        fix=f"{command} --force")
    if not present.any():
        raise DataError(path, "no item has a vector", fix=f"leave {suffix} out")
    refuse_bad_rows(folder, suffix, vectors, present)
    vectors = transformed(vectors, present, transform)
    refuse_bad_rows(folder, suffix, vectors, present, ", after --pca, --zscore or --l2 as asked for")
    of_items = {folder.items.name: items["sha256"]}
    inputs = of_items | (inputs or {})
    shared = {"items_sha256": items["items_sha256"], "command": command,
              "settings": {**settings, "transform": transform._asdict()},
              **{key: value for key, value in told.items() if value}}
    num_missing = int((~present).sum())
    if num_missing:
        inputs[mask.name] = save_array(mask, present, {"inputs": of_items, **shared})["sha256"]
    save_array(path, vectors, {"inputs": inputs, **shared, "dim": vectors.shape[1], "num_missing": num_missing})
    if not num_missing:
        for left in (mask, meta_path(mask)):  # of an earlier embedding that had gaps
            left.unlink(missing_ok=True)
    log.info("embed: wrote %s, %d x %d%s", path, *vectors.shape,
             f"; {num_missing} items have no {suffix} vector of their own: see {mask.name}" if num_missing else "")


def refuse_bad_rows(folder: DatasetFolder, suffix: str, vectors: np.ndarray, present: np.ndarray,
                    when: str = "") -> None:
    """Raise DataError naming the raw ids of present items whose vector is not finite, or all zero."""
    bad = present.copy()
    for part in slices(vectors):
        bad[part] &= ~np.isfinite(vectors[part]).all(axis=1) | ~vectors[part].any(axis=1)
    if bad.any():
        raise DataError(folder.embeddings(suffix),
                        f"no usable vector for {bad.sum()} items: not finite, or all zero{when}",
                        named(load_items(folder)["raw_id"][bad]), "another model or transform, or look at those items")


def transformed(vectors: np.ndarray, present: np.ndarray, transform: Transform) -> np.ndarray:
    """float32 (N, D'): PCA (whitened), z-score, L2, fitted to the present items. Raises ConfigError."""
    vectors = np.require(vectors, np.float32, ["C", "W"])  # a copy only of what cannot be changed in place
    if transform.pca is not None:
        if transform.pca > (most := min(vectors.shape[1], present.sum() - 1)):
            raise ConfigError("--pca", f"asks for {transform.pca} dimensions",
                              f"{present.sum()} items with {vectors.shape[1]} dimensions have at most {most}",
                              "a smaller number")
        vectors = _pca(vectors, present, transform.pca, transform.whiten)
    if transform.zscore:
        mean = mean_of(vectors, present)
        deviation = np.sqrt(mean_of(vectors, present, lambda rows: (rows - mean) ** 2))
        scale = np.where(deviation > NOTHING * np.abs(mean), deviation, np.inf)  # else its values differ by rounding
        for part in slices(vectors):
            vectors[part] = (vectors[part] - mean) / scale
    if transform.l2:
        normalize_rows(vectors)
    if not present.all():
        vectors[~present] = mean_of(vectors, present)
    return vectors


def normalize_rows(vectors: np.ndarray) -> None:
    """Give every row that is not zero length 1, in place."""
    for part in slices(vectors):
        length = np.linalg.norm(vectors[part].astype(np.float64), axis=1, keepdims=True)  # squares may exceed a float32
        vectors[part] /= np.where(length > 0, length, 1)


def _pca(vectors: np.ndarray, present: np.ndarray, num_dims: int, whiten: bool) -> np.ndarray:
    """(N, num_dims) along the directions of largest variance; the sign makes each one's largest entry positive."""
    num_rows, dim = int(present.sum()), vectors.shape[1]
    mean, covariance = mean_of(vectors, present), np.zeros((dim, dim))
    for part in slices(vectors):
        rows = vectors[part][present[part]] - mean
        covariance += rows.T @ rows
    variance, directions = np.linalg.eigh(covariance / num_rows)
    variance, directions = variance[::-1][:num_dims], directions[:, ::-1][:, :num_dims]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(num_dims)])
    if whiten:
        # The unbiased variance, as is usual here; a direction without any stays without any.
        deviation = np.sqrt(np.maximum(variance, 0) * num_rows / (num_rows - 1))
        directions = directions / np.where(deviation > NOTHING * deviation[0], deviation, np.inf)
    reduced = np.empty((len(vectors), num_dims), dtype=np.float32)
    for part in slices(vectors):
        reduced[part] = (vectors[part] - mean) @ directions
    return reduced


def mean_of(vectors: np.ndarray, present: np.ndarray, of=lambda rows: rows) -> np.ndarray:
    """float64 (D,): the mean of the rows that are present, or of a function `of` them; 0 where there are none."""
    total = np.zeros(vectors.shape[1])
    for part in slices(vectors):
        total += of(vectors[part][present[part]]).sum(axis=0, dtype=np.float64)
    return total / max(present.sum(), 1)


def slices(vectors: np.ndarray, num_rows: int | None = None) -> Iterator[slice]:
    for start in range(0, len(vectors), num_rows or ROWS):
        yield slice(start, start + (num_rows or ROWS))
