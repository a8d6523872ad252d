"""What every step that makes an embedding does with its vectors: check, transform, publish."""

import logging
from collections.abc import Iterator

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_meta, save_array
from common.errors import ConfigError, DataError, UserError
from common.publishing import meta_path
from dataloader.options import Embedding, Transform

log = logging.getLogger(__name__)

ROWS = 16_384      # rows that are worked on at once, so that a large embedding is held once
NOTHING = 1e-6     # a spread that is this small a part of the values, or of the largest one, is rounding
NUM_NAMED = 10     # raw ids in an error

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
                      inputs: dict[str, str] | None = None, present: np.ndarray | None = None,
                      encoder: dict | None = None, model_files: dict[str, dict] | None = None) -> None:
    """Check, transform and write the vectors of all items, in item order.

    vectors: (N, D), finite, no row all zero; they are changed in place where that spares memory. `present` (N,) marks
    the items that have a vector of their own; the others get the mean of those, and a mask file beside the embedding
    says which they are. `inputs` are the files, beside items.parquet, that it was made from, each with its sha256.
    `encoder` and the fingerprints of `model_files` are for the meta alone. Raises DataError naming the raw ids of bad
    rows.
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
    refuse_bad_rows(folder, suffix, vectors, present, "after --pca, --zscore or --l2 as asked for")
    inputs_of_mask = {folder.items.name: items["sha256"]}
    inputs = {**inputs_of_mask, **(inputs or {})}
    shared = {"items_sha256": items["items_sha256"], "command": command,
              "settings": {**settings, "transform": transform._asdict()}, **({"encoder": encoder} if encoder else {}),
              **({"model_files": model_files} if model_files else {})}
    num_missing = int((~present).sum())
    if num_missing:
        inputs[mask.name] = save_array(mask, present, {"inputs": inputs_of_mask, **shared})["sha256"]
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
    for part in _slices(vectors):
        bad[part] &= ~np.isfinite(vectors[part]).all(axis=1) | ~vectors[part].any(axis=1)
    if bad.any():
        raw_ids = load_items(folder)["raw_id"][bad]
        more = f" and {len(raw_ids) - NUM_NAMED} more" if len(raw_ids) > NUM_NAMED else ""
        raise DataError(folder.embeddings(suffix), f"no usable vector for {len(raw_ids)} items: not finite, or all zero"
                        + (f", {when}" if when else ""), ", ".join(raw_ids[:NUM_NAMED]) + more,
                        "another model or transform, or look at those items")


def transformed(vectors: np.ndarray, present: np.ndarray, transform: Transform) -> np.ndarray:
    """float32 (N, D'): PCA (whitened), z-score, L2, as asked, fitted to the items that are present.

    The others become the mean of these. Raises ConfigError where PCA asks for more dimensions than there are.
    """
    vectors = np.require(vectors, np.float32, ["C", "W"])  # a copy only of what cannot be changed in place
    if transform.pca is not None:
        vectors = _pca(vectors, present, transform.pca, transform.whiten)
    if transform.zscore:  # a dimension whose values differ by rounding only becomes 0
        mean = _mean(vectors, present)
        deviation = np.sqrt(_mean(vectors, present, lambda rows: (rows - mean) ** 2))
        scale = np.where(deviation > NOTHING * np.abs(mean), deviation, np.inf)
        for part in _slices(vectors):
            vectors[part] = (vectors[part] - mean) / scale
    if transform.l2:
        for part in _slices(vectors):
            length = np.linalg.norm(vectors[part].astype(np.float64), axis=1, keepdims=True)
            vectors[part] /= np.where(length > 0, length, 1)
    if not present.all():
        vectors[~present] = _mean(vectors, present)
    return vectors


def _pca(vectors: np.ndarray, present: np.ndarray, num_dims: int, whiten: bool) -> np.ndarray:
    """(N, num_dims) along the directions of largest variance; the sign makes each one's largest entry positive."""
    num_rows, dim = int(present.sum()), vectors.shape[1]
    if num_dims > min(dim, num_rows - 1):
        raise ConfigError("--pca", f"asks for {num_dims} dimensions",
                          f"{num_rows} items with {dim} dimensions have at most {min(dim, num_rows - 1)}",
                          "a smaller number")
    mean, products = _mean(vectors, present), np.zeros((dim, dim))
    for part in _slices(vectors):
        rows = vectors[part][present[part]] - mean
        products += rows.T @ rows
    variance, directions = np.linalg.eigh(products / num_rows)
    variance, directions = variance[::-1][:num_dims], directions[:, ::-1][:, :num_dims]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(num_dims)])
    if whiten:
        # The unbiased variance, as is usual here; a direction without any stays without any.
        deviation = np.sqrt(np.maximum(variance, 0) * num_rows / (num_rows - 1))
        directions = directions / np.where(deviation > NOTHING * deviation[0], deviation, np.inf)
    reduced = np.empty((len(vectors), num_dims), dtype=np.float32)
    for part in _slices(vectors):
        reduced[part] = (vectors[part] - mean) @ directions
    return reduced


def _mean(vectors: np.ndarray, present: np.ndarray, of=lambda rows: rows) -> np.ndarray:
    """float64 (D,): the mean of the rows that are present, or of a function `of` them."""
    total = np.zeros(vectors.shape[1])
    for part in _slices(vectors):
        total += of(vectors[part][present[part]]).sum(axis=0, dtype=np.float64)
    return total / present.sum()


def _slices(vectors: np.ndarray) -> Iterator[slice]:
    for start in range(0, len(vectors), ROWS):
        yield slice(start, start + ROWS)
