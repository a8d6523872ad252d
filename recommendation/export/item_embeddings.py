"""Export of a recommender's item vectors to an embedding file. Quantizers can read this file."""

import logging
from pathlib import Path

import numpy as np
import torch

from common.artifacts import SUFFIXES, DatasetFolder, load_interactions, load_meta, save_array
from common.errors import ArtifactError, ConfigError, TrainingError
from common.publishing import finish_publishing, meta_path
from common.reading import read_record
from recommendation.inputs import Choice
from recommendation.models import find_class, names
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.runs import load_recommender

log = logging.getLogger(__name__)

# N items, D dimensions


def export_item_embeddings(folder: DatasetFolder, choice: Choice, run_root: Path, suffix: str, device: str | None,
                           command: str, force: bool, run_id: str | None = None) -> Path:
    """Write the item vectors of a finished run to `<dataset>.emb-<suffix>.npy`, and return the path of this file.

    device: device to compute on; None for the device in the run's configuration
    run_id: id of the run; None for the newest finished run

    The vectors are float32 (N, D). If some items have no training events, these items get the mean vector of the other
    items. A mask file then tells which items have training events.

    Raises ConfigError if the model has no item vectors. Unless `force` is set, raises ConfigError if the suffix is a
    name of the data stage, or if an embedding with this suffix exists and was not exported from this model.
    """
    _require_vectors(choice.model)
    _protect_other_embedding(folder.embeddings(suffix), suffix, choice.model, force)
    run = load_recommender(folder, run_root, choice, device, run_id)
    items = load_meta(folder.items, folder.make_command)
    vectors = _item_vectors(run.model, items["num_items"])
    path = _publish(folder, suffix, vectors, {
        "inputs": {folder.items.name: items["sha256"], **run.inputs}, "items_sha256": items["items_sha256"],
        "command": command, "recommender": choice.model, "run": run.folder.name, "dim": vectors.shape[1]})
    log.info("recommendation: wrote %s, %d x %d, from run %s", path, *vectors.shape, run.folder)
    return path


@torch.no_grad()
def _item_vectors(model: AbstractRecommender, num_items: int) -> np.ndarray:
    """Return the vectors of all items: float32 (N, D).

    Raises ConfigError if the model returns vectors of the wrong shape. Raises TrainingError if a value is not finite.
    """
    vectors, where = model.item_embeddings(), f"{type(model).__name__}.item_embeddings"
    if vectors is None or vectors.ndim != 2 or len(vectors) != num_items:
        raise ConfigError(where, f"returned the wrong shape {None if vectors is None else tuple(vectors.shape)}",
                          f"The shape must be ({num_items}, D)", "return one row per item")
    if not vectors.isfinite().all():
        raise TrainingError(where, "returned values that are not finite", fix="train the model again with a lower --lr"
                            if model.trained_by_gradient() else f"correct {where}; --lr has no effect on it")
    return vectors.float().cpu().numpy()


def _publish(folder: DatasetFolder, suffix: str, vectors: np.ndarray, meta: dict) -> Path:
    """Write the vectors and return their path. Also write a mask file if some items have no training event."""
    path, mask = folder.embeddings(suffix), folder.mask(suffix)
    events = load_interactions(folder)
    present = np.bincount(events.item[events.split == 0], minlength=len(vectors)) > 0
    num_missing = int((~present).sum())
    if num_missing:
        vectors = np.where(present[:, None], vectors, vectors[present].mean(axis=0))
        made = save_array(mask, present, {**meta, "inputs": {folder.items.name: meta["inputs"][folder.items.name]}})
        meta = {**meta, "inputs": {**meta["inputs"], mask.name: made["sha256"]}}
    save_array(path, vectors.astype(np.float32), {**meta, "num_missing": num_missing})
    if not num_missing:
        for left in (mask, meta_path(mask)):  # delete the mask of an earlier embedding
            left.unlink(missing_ok=True)
    return path


def _require_vectors(model: str) -> None:
    def has_vectors(name: str) -> bool:
        return find_class(name).item_embeddings is not AbstractRecommender.item_embeddings

    if not has_vectors(model):
        raise ConfigError(f"--model {model}", "cannot export item embeddings", "The model does not implement "
                          "the method item_embeddings",
                          f"use --model {' or '.join(name for name in names() if has_vectors(name))}")


def _protect_other_embedding(path: Path, suffix: str, model: str, force: bool) -> None:
    """Raise ConfigError if the suffix or the file belongs to another kind of embedding, unless `force` is set."""
    if force:
        return
    if suffix in SUFFIXES:
        raise ConfigError(f"--export_item_embeddings {suffix}", "is a name of the data stage", "Other commands would "
                          "take the vectors for text, images or fused embeddings",
                          f"choose another name, such as {model}, or use --force")
    if not path.exists():
        return
    finish_publishing(path)  # an earlier export may have been killed before it renamed the meta file
    try:
        meta: dict = read_record(meta_path(path), "", {}, {"recommender": str, "command": str | None})
    except ArtifactError:
        meta = {}
    if meta.get("recommender") != model:
        raise ConfigError(path, "already exists", f"It was made by: {meta.get('command') or 'an unknown command'}",
                          "choose another name for --export_item_embeddings, or use --force to replace the file")
