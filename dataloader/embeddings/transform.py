"""Check, transform and publish embedding vectors. Steps 3, 4 and 5 share this code."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_meta, save_array
from common.errors import ArtifactError, ConfigError, DataError, UserError
from common.publishing import finish_publishing, meta_path
from common.reading import parse_json, read_text
from dataloader.embeddings.encode import named
from dataloader.options import Embedding, Transform

log = logging.getLogger(__name__)

ROWS = 16_384      # rows processed at once, so that no second copy of a large embedding is needed
# A standard deviation below this fraction of the mean, or of the largest standard deviation, is only a rounding error.
NOTHING = 1e-6

# N items, D dimensions


def is_current(target: Embedding, settings: dict, inputs: dict[str, str]) -> bool:
    """Return whether the embedding exists and was made with these settings and inputs (file name -> sha256).

    Without --force, no step replaces an embedding that the user has adopted, or that a recommender has exported. If
    such an embedding is valid, return True for all settings and inputs. If it is damaged or stale, raise ArtifactError.
    """
    try:
        meta = load_meta(target.path, "")
    except UserError as error:
        if _made_elsewhere(_recorded(target.path)):
            raise ArtifactError(error.where, error.what, "It was adopted, or exported by a recommender. Only --force "
                                "replaces it", f"delete {meta_path(target.path)}, write the vectors of the current "
                                "items, and adopt or export them again; or use --force") from error
        return False
    if _made_elsewhere(meta):
        log.warning("embed: keeping %s, which was made by another command (%s). The flags for this embedding have no "
                    "effect; use --force to replace the embedding", target.path, meta["command"])
        return True
    recorded = {**settings, "transform": target.transform._asdict()}
    return meta.get("settings") == recorded and inputs.items() <= meta["inputs"].items()


def _recorded(path: Path) -> dict:
    """Return the content of the meta file, even if the artifact is stale. Return {} if there is no valid meta file."""
    finish_publishing(path)
    try:
        meta = parse_json(read_text(meta_path(path))) if path.exists() else {}
    except (OSError, ValueError):
        meta = {}
    return meta if isinstance(meta, dict) else {}


def _made_elsewhere(meta: dict) -> bool:
    settings = meta.get("settings")
    return (isinstance(settings, dict) and bool(settings.get("adopted"))) or "recommender" in meta


def publish_embedding(target: Embedding, vectors: np.ndarray, settings: dict, command: str,
                      inputs: dict[str, str] | None = None, present: np.ndarray | None = None,
                      **more_meta: dict) -> None:
    """Check, transform and write the vectors of all items.

    vectors: (N, D), in item order; they are changed in place where this saves memory
    settings: how the vectors were made, for the meta file
    inputs: the files (file name -> sha256) from which the vectors were made, in addition to items.parquet
    present: bool (N,), true for the items that have a vector of their own. All other items get the mean vector, and
        `present` is written to a mask file. By default, all items have a vector.
    more_meta: other entries of the meta file

    Raises DataError if no item has a vector, or if the vector of a present item is all zero or not finite.
    """
    folder, suffix, transform = target
    items = load_meta(folder.items, folder.make_command)
    path, mask = target.path, folder.mask(suffix)
    present = np.ones(len(vectors), dtype=bool) if present is None else present
    if len(vectors) != items["num_items"]:
        raise DataError(path, f"needs one vector per item, got {len(vectors)} vectors for {items['num_items']} items",
                        fix=f"{command} --force")
    if not present.any():
        raise DataError(path, "no item has a vector", fix=f"leave out the embedding {suffix}")
    refuse_bad_rows(folder, suffix, vectors, present)
    vectors = transformed(vectors, present, transform)
    refuse_bad_rows(folder, suffix, vectors, present, ", after --pca, --zscore or --l2")
    of_items = {folder.items.name: items["sha256"]}
    inputs = of_items | (inputs or {})
    shared = {"items_sha256": items["items_sha256"], "command": command,
              "settings": {**settings, "transform": transform._asdict()},
              **{key: value for key, value in more_meta.items() if value}}
    num_missing = int((~present).sum())
    if num_missing:
        inputs[mask.name] = save_array(mask, present, {"inputs": of_items, **shared})["sha256"]
    save_array(path, vectors, {"inputs": inputs, **shared, "dim": vectors.shape[1], "num_missing": num_missing})
    if not num_missing:
        for leftover in (mask, meta_path(mask)):  # the mask of an earlier version of this embedding
            leftover.unlink(missing_ok=True)
    log.info("embed: wrote %s, %d x %d%s", path, *vectors.shape,
             f"; {num_missing} items have no {suffix} vector of their own (see {mask.name})" if num_missing else "")


def refuse_bad_rows(folder: DatasetFolder, suffix: str, vectors: np.ndarray, present: np.ndarray,
                    when: str = "") -> None:
    """Raise DataError if the vector of a present item is all zero or not finite. The error names the raw ids."""
    bad = present.copy()
    for part in slices(vectors):
        bad[part] &= ~np.isfinite(vectors[part]).all(axis=1) | ~vectors[part].any(axis=1)
    if bad.any():
        raise DataError(folder.embeddings(suffix),
                        f"the vectors of {bad.sum()} items are unusable (not finite, or all zero){when}",
                        f"Items: {named(load_items(folder)['raw_id'][bad])}",
                        "use another model or transform, or check these items")


def transformed(vectors: np.ndarray, present: np.ndarray, transform: Transform) -> np.ndarray:
    """Return the transformed vectors of all items, float32. With PCA, they have fewer dimensions.

    The transforms are PCA (optionally with whitening), z-score and L2 normalization, in this order. They are fitted to
    the present items. All other items get the mean of the transformed vectors. `vectors` may be changed in place.
    Raises ConfigError if PCA gives fewer dimensions than requested.
    """
    vectors = np.require(vectors, np.float32, ["C", "W"])  # copies only if the array cannot be changed in place
    if transform.pca is not None:
        if transform.pca > (most := min(vectors.shape[1], present.sum() - 1)):
            raise ConfigError("--pca", f"must be at most {most}, got {transform.pca}",
                              f"{present.sum()} items with {vectors.shape[1]} dimensions have only {most} principal "
                              "components", "use a smaller number")
        vectors = _pca(vectors, present, transform.pca, transform.whiten)
    if transform.zscore:
        mean = mean_of(vectors, present)
        deviation = np.sqrt(mean_of(vectors, present, lambda rows: (rows - mean) ** 2))
        # A dimension that is constant, up to rounding, becomes 0.
        scale = np.where(deviation > NOTHING * np.abs(mean), deviation, np.inf)
        for part in slices(vectors):
            vectors[part] = (vectors[part] - mean) / scale
    if transform.l2:
        normalize_rows(vectors)
    if not present.all():
        vectors[~present] = mean_of(vectors, present)
    return vectors


def normalize_rows(vectors: np.ndarray) -> None:
    """Scale every row to length 1 in place; rows of zeros do not change."""
    for part in slices(vectors):
        length = np.linalg.norm(vectors[part].astype(np.float64), axis=1, keepdims=True)  # squares may overflow float32
        vectors[part] /= np.where(length > 0, length, 1)


def _pca(vectors: np.ndarray, present: np.ndarray, num_dims: int, whiten: bool) -> np.ndarray:
    """Project the vectors onto the directions of largest variance: (N, D) -> (N, num_dims).

    The sign of a direction is arbitrary, so its entry with the largest absolute value is made positive. With `whiten`,
    each dimension is also divided by its standard deviation.
    """
    num_rows, dim = int(present.sum()), vectors.shape[1]
    mean, covariance = mean_of(vectors, present), np.zeros((dim, dim))
    for part in slices(vectors):
        rows = vectors[part][present[part]] - mean
        covariance += rows.T @ rows
    variance, directions = np.linalg.eigh(covariance / num_rows)
    variance, directions = variance[::-1][:num_dims], directions[:, ::-1][:, :num_dims]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(num_dims)])
    if whiten:
        # Use the unbiased variance, as usual for whitening. Dimensions without variance become 0.
        deviation = np.sqrt(np.maximum(variance, 0) * num_rows / (num_rows - 1))
        directions = directions / np.where(deviation > NOTHING * deviation[0], deviation, np.inf)
    reduced = np.empty((len(vectors), num_dims), dtype=np.float32)
    for part in slices(vectors):
        reduced[part] = (vectors[part] - mean) @ directions
    return reduced


def mean_of(vectors: np.ndarray, present: np.ndarray, of=lambda rows: rows) -> np.ndarray:
    """Return the mean of the present rows: float64 (D,), or zeros if no row is present.

    of: a function that is applied to the rows before the mean is computed
    """
    total = np.zeros(vectors.shape[1])
    for part in slices(vectors):
        total += of(vectors[part][present[part]]).sum(axis=0, dtype=np.float64)
    return total / max(present.sum(), 1)


def slices(vectors: np.ndarray, num_rows: int | None = None) -> Iterator[slice]:
    """Yield slices that cover all rows, each with at most `num_rows` rows (default: ROWS)."""
    for start in range(0, len(vectors), num_rows or ROWS):
        yield slice(start, start + (num_rows or ROWS))
