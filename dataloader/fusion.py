"""Step 5: make a fused embedding, <D>.emb-fused-*.npy, or the collaborative embedding, <D>.emb-cf.npy.

A fused embedding combines several embeddings, which are called its parts. First, the vectors of each part are scaled to
length 1. Each part p has a weight w_p (--fusion_weights). There are three ways to combine the parts:

  fused-concat  multiplies the vectors of each part p by sqrt(w_p) and concatenates the parts. The inner product of two
                items is then the weighted sum of the cosine similarities in the parts.
  fused-pca     reduces the vectors of fused-concat to --fusion_dim dimensions by PCA.
  fused-align   trains one linear map per part so that the mapped parts of an item are similar. Each mapped part is
                scaled to length 1. The vector of an item is the weighted mean of its mapped parts.

An item may have no vector in a part. fused-concat and fused-pca then use the mean of the other items' vectors. They do
not scale this mean to length 1, because long equal vectors would make all items without the part neighbors of each
other. fused-align averages only the parts in which the item has a vector. The mask is True for the items that have a
vector in at least one part.
"""

import logging
import shutil
import sys
from typing import NamedTuple

import numpy as np

from common.artifacts import FUSIONS, DatasetFolder, dataset_line, load_embeddings, load_mask, load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import ArtifactError, ConfigError, DataError, closest
from common.lock import FolderLock
from common.run import Run, log_to_console
from dataloader.embeddings import transform
from dataloader.options import Embedding, FusionOptions, Transform, modality_of, parse_options

log = logging.getLogger(__name__)

SCRIPT = "bash dataloader/5_fusion_embeddings.sh"

# N items, D_p dimensions of part p


class Part(NamedTuple):
    """An embedding to fuse."""

    vectors: np.ndarray  # float32 (N, D_p), scaled to length 1; items without a vector have the mean of the others
    present: np.ndarray  # bool (N,), whether the item has a vector of its own
    weight: float


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Fuse embeddings, or make the collaborative embedding.", FUSIONS[0]).fusion
    log_to_console()
    fuse(options, command_line(SCRIPT, argv))


def fuse(options: FusionOptions, command: str) -> None:
    """Make the embedding that --suffix names, or reuse it if it is up to date.

    Raises ConfigError if step 5 does not make this embedding.
    """
    folder, suffix = options.folder, options.target.suffix
    if suffix not in ("cf", *FUSIONS):
        close = None if suffix in ("td", "image") else closest(suffix, ["cf", *FUSIONS])
        raise ConfigError(f"--suffix {suffix}", "is not made by step 5", f"Step 5 makes cf, {', '.join(FUSIONS)}",
                          f"--suffix {close}" if close else make_command(options, suffix))
    folder.require()
    log.info("fuse: %s", dataset_line(folder))
    with FolderLock(folder.path):
        if suffix == "cf":
            _make_collaborative(options, options.target, command)
            return
        if "cf" in options.parts:
            # No other step makes cf, so make it here if it is missing, damaged or stale.
            make = make_command(options, "cf") + (f" --seed {options.seed}" if options.seed else "")
            try:
                load_meta(folder.embeddings("cf"), make)
            except (ArtifactError, DataError) as error:
                log.info("fuse: making cf first (%s: %s)", error.where, error.what)
                _make_collaborative(options, Embedding(folder, "cf", Transform()), make)
        _make_fusion(options, command)


def make_command(options: FusionOptions, suffix: str) -> str:
    """Return the command that makes the embedding with this suffix."""
    script = {"image": "bash dataloader/4_get_image_emb.sh", "text": "bash dataloader/3_get_text_emb.sh"}.get(
        modality_of(suffix), SCRIPT)
    flag = "" if suffix in ("td", "image") else f" --suffix {suffix}"
    return f"{script} --dataset {options.folder.name}{flag}{options.folder.root_flag}"


def _make_collaborative(options: FusionOptions, target: Embedding, command: str) -> None:
    from dataloader.embeddings.collaborative import item_vectors

    folder, settings = options.folder, {target.suffix: options.cf._asdict(), "seed": options.seed}
    inputs = {folder.interactions.name: load_meta(folder.interactions, folder.make_command)["sha256"]}
    if not options.force and transform.is_current(target, settings, inputs):
        log.info("cf: reusing %s", target.path)
        return
    vectors, present = item_vectors(folder, options.cf, options.seed)
    transform.publish_embedding(target, vectors, settings, command, inputs, present)


def _make_fusion(options: FusionOptions, command: str) -> None:
    target, folder, suffix = options.target, options.folder, options.target.suffix
    inputs = {folder.embeddings(part).name: load_meta(folder.embeddings(part), make_command(options, part))["sha256"]
              for part in options.parts}
    settings = {"parts": list(options.parts), "weights": list(options.weights)}
    if suffix != "fused-concat":
        settings["dim"] = options.dim
    if suffix == "fused-align":
        settings |= {suffix: options.align._asdict(), "seed": options.seed}
    if not options.force and transform.is_current(target, settings, inputs):
        log.info("fuse: reusing %s", target.path)
        return
    parts = [_load_part(folder, part, weight) for part, weight in zip(options.parts, options.weights, strict=True)]
    log.info("fuse: making %s from %s", suffix, ", ".join(
        f"{name} ({part.vectors.shape[1]} dimensions, {int(part.present.sum())} items)"
        for name, part in zip(options.parts, parts, strict=True)))
    present = np.logical_or.reduce([part.present for part in parts])
    checkpoints = folder.path / f".{suffix}"
    if suffix == "fused-align":
        if options.force:
            shutil.rmtree(checkpoints, ignore_errors=True)
        vectors = _align_parts(options, parts, Run(checkpoints, settings, inputs, command))
    else:
        num_dims, num_items = sum(part.vectors.shape[1] for part in parts), int(present.sum())
        reduced = Transform(pca=options.dim if suffix == "fused-pca" else None)
        if reduced.pca and reduced.pca > (max_dims := min(num_dims, num_items - 1)):
            raise ConfigError(f"--fusion_dim {options.dim}", f"must be at most {max_dims}",
                              f"The parts have {num_dims} dimensions, and PCA of {num_items} items gives fewer than "
                              f"{num_items} dimensions", "use a smaller number")
        vectors = transform.transformed(concatenated(parts), present, reduced)
    transform.publish_embedding(target, vectors, settings, command, inputs, present)
    shutil.rmtree(checkpoints, ignore_errors=True)  # no longer needed


def _load_part(folder: DatasetFolder, name: str, weight: float) -> Part:
    """Load the embedding `name` as a part of a fused embedding.

    Raises ArtifactError if the embedding was made for other items. Raises DataError if the vector of an item is all
    zero or not finite, unless the mask says that the item has no vector.
    """
    vectors, present = load_embeddings(folder, name), load_mask(folder, name)
    transform.refuse_bad_rows(folder, name, vectors, present)
    transform.normalize_rows(vectors)
    if not present.all():
        vectors[~present] = transform.mean_of(vectors, present)
    return Part(vectors, present, weight)


def concatenated(parts: list[Part]) -> np.ndarray:
    """Concatenate the parts, each multiplied by the square root of its weight: float32 (N, sum of D_p).

    To save memory, each part is removed from the list `parts` when it is copied.
    """
    vectors = np.empty((len(parts[0].vectors), sum(part.vectors.shape[1] for part in parts)), dtype=np.float32)
    start = 0
    while parts:
        part = parts.pop(0)
        end = start + part.vectors.shape[1]
        np.multiply(part.vectors, np.float32(part.weight ** 0.5), out=vectors[:, start:end])
        start = end
    return vectors


def _align_parts(options: FusionOptions, parts: list[Part], run: Run) -> np.ndarray:
    """Train the linear maps of fused-align, and return the fused vectors: float32 (N, --fusion_dim).

    If there is a checkpoint of this training, the training continues from it.
    """
    from common.device import resolve_device
    from dataloader.embeddings.alignment import align

    device = resolve_device(options.device, "--device")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    vectors, best = align(parts, options.dim, options.align, options.seed, device, run)
    log.info("fuse: the top-1 accuracy is %.1f %% on %d items (how often the nearest vector in another part belongs to "
             "the same item; epoch %d)",
             100 * best.metrics["top1"], best.metrics["num_held_out"], best.epoch)
    return vectors


if __name__ == "__main__":
    sys.exit(run_command(main))
