"""Step 5: several embeddings become one, <D>.emb-fused-*.npy; or the collaborative one is made, <D>.emb-cf.npy.

Every part's vectors get length 1 first, and every part its weight w (--fusion_weights):

  fused-concat  the parts side by side, each times sqrt(w), so that the inner product of two items is the weighted sum
                of their parts' cosines
  fused-pca     the same, reduced to --fusion_dim dimensions
  fused-align   a linear map a part, trained so that an item's parts agree; the mean of the maps' unit vectors, weighted

An item that lacks a part: in concat and pca the mean of the other items' unit vectors stands in, which is as near to
every item as the others are on average (a vector of length 1 would make all that lack the part each other's
neighbours); in align the mean is over the parts that it has. An item that lacks all parts is masked.
"""

import logging
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import load_embeddings, load_mask, load_meta
from common.cli import command_line, parse
from common.command import run_command
from common.errors import ArtifactError, ConfigError, DataError, closest
from common.lock import FolderLock
from common.run import Run, log_to_console
from dataloader.embeddings.embedding import is_current, publish_embedding, refuse_bad_rows, transformed
from dataloader.embeddings.fusion_config import load_alignment, load_collaborative
from dataloader.flags import FUSIONS, make_parser
from dataloader.options import DataOptions, Transform, modality_of, resolve_options

log = logging.getLogger(__name__)

SCRIPT = "bash dataloader/5_fusion_embeddings.sh"
ROWS = 65_536  # that are normalized at once

# N items, D_p dimensions of part p


class Part(NamedTuple):
    """An embedding that is fused."""

    vectors: np.ndarray  # float32 (N, D_p), of length 1; where it is not present, the mean of the others
    present: np.ndarray  # bool (N,)
    weight: float


def main(argv: list[str]) -> None:
    args = parse(make_parser("Fuse embeddings, or make the collaborative one."), argv)
    args.suffix = args.suffix or FUSIONS[0]
    options = resolve_options(args)
    log_to_console()
    fuse(options, command_line(SCRIPT, argv))


def fuse(options: DataOptions, command: str) -> None:
    """Make the embedding that --suffix names, unless it is current. Raises ConfigError if it is not of this step."""
    if options.suffix not in ("cf", *FUSIONS):
        close = None if options.suffix in ("td", "image") else closest(options.suffix, ["cf", *FUSIONS])
        raise ConfigError(f"--suffix {options.suffix}", "is not made by step 5", f"it makes cf, {', '.join(FUSIONS)}",
                          f"--suffix {close}" if close else make_command(options, options.suffix))
    options.folder.require()
    for load in (load_alignment, load_collaborative):  # a mistake in them shows before any work
        load()
    with FolderLock(options.folder.path):
        if options.suffix == "cf":
            _make_collaborative(options, command)
            return
        if "cf" in options.fusion.parts:
            _require_collaborative(options)
        _make_fusion(options, command)


def make_command(options: DataOptions, suffix: str) -> str:
    """The step that makes this embedding."""
    script = {"image": "bash dataloader/4_get_image_emb.sh", "text": "bash dataloader/3_get_text_emb.sh"}.get(
        modality_of(suffix), SCRIPT)
    flag = "" if suffix in ("td", "image") else f" --suffix {suffix}"
    return f"{script} --dataset {options.folder.name}{flag}{options.folder.root_flag}"


def _make_collaborative(options: DataOptions, command: str) -> None:
    from dataloader.embeddings.collaborative import make_collaborative

    make_collaborative(options, command)


def _require_collaborative(options: DataOptions) -> None:
    """The events have no other step that makes vectors of them: where there is no sound cf, this one does it."""
    command = make_command(options, "cf") + (f" --seed {options.seed}" if options.seed else "")
    try:
        load_meta(options.folder.embeddings("cf"), command)
    except (ArtifactError, DataError) as error:
        log.info("fuse: cf first, for %s: %s", error.where, error.what)
        _make_collaborative(options, command)


def _make_fusion(options: DataOptions, command: str) -> None:
    suffix, fusion = options.suffix, options.fusion
    paths = {part: options.folder.embeddings(part) for part in fusion.parts}
    inputs = {path.name: load_meta(path, make_command(options, part))["sha256"] for part, path in paths.items()}
    settings = _settings(options)
    if not options.force and is_current(options, suffix, settings, inputs):
        log.info("fuse: reusing %s", options.folder.embeddings(suffix))
        return
    parts = [_load_part(options, part, weight) for part, weight in zip(fusion.parts, fusion.weights, strict=True)]
    log.info("fuse: %s of %s", suffix, ", ".join(
        f"{name} ({part.vectors.shape[1]} dimensions, {int(part.present.sum())} items)"
        for name, part in zip(fusion.parts, parts, strict=True)))
    present = np.logical_or.reduce([part.present for part in parts])
    if suffix == "fused-align":
        vectors = _aligned(options, parts, settings, inputs, command)
    elif suffix == "fused-pca":
        _check_dim(fusion.dim, sum(part.vectors.shape[1] for part in parts), int(present.sum()))
        vectors = transformed(concatenated(parts), present, Transform(fusion.dim, whiten=False, zscore=False, l2=False))
    else:
        vectors = concatenated(parts)
    publish_embedding(options, suffix, vectors, settings, command, inputs, present)
    shutil.rmtree(_checkpoints(options), ignore_errors=True)  # nothing is left to continue


def _settings(options: DataOptions) -> dict:
    """What the fusion depends on beside its parts, as its meta records it (and JSON gives it back)."""
    fusion = options.fusion
    settings = {"parts": list(fusion.parts), "weights": list(fusion.weights)}
    if options.suffix != "fused-concat":
        settings["dim"] = fusion.dim
    if options.suffix == "fused-align":
        settings |= {options.suffix: load_alignment()._asdict(), "seed": options.seed}
    return settings


def _load_part(options: DataOptions, name: str, weight: float) -> Part:
    """Raises ArtifactError where it belongs to another list of items, and DataError where a row is all zero."""
    vectors, present = load_embeddings(options.folder, name), load_mask(options.folder, name)
    refuse_bad_rows(options, options.folder.embeddings(name), vectors, present)
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), ROWS):
        rows = vectors[start:start + ROWS]
        length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # squares may exceed a float32
        rows /= np.where(length > 0, length, 1)
        total += rows[present[start:start + ROWS]].sum(axis=0, dtype=np.float64)
    if not present.all():
        vectors[~present] = total / max(int(present.sum()), 1)
    return Part(vectors, present, weight)


def concatenated(parts: list[Part]) -> np.ndarray:
    """float32 (N, sum of D_p). Takes the parts out of the list, so that their memory is free when they are copied."""
    vectors = np.empty((len(parts[0].vectors), sum(part.vectors.shape[1] for part in parts)), dtype=np.float32)
    start = 0
    while parts:
        part = parts.pop(0)
        end = start + part.vectors.shape[1]
        np.multiply(part.vectors, np.float32(part.weight ** 0.5), out=vectors[:, start:end])
        start = end
    return vectors


def _check_dim(dim: int, num_dims: int, num_items: int) -> None:
    if dim > min(num_dims, num_items - 1):
        raise ConfigError(f"--fusion_dim {dim}", "is more than there are",
                          f"{num_items} items whose parts have {num_dims} dimensions give at most "
                          f"{min(num_dims, num_items - 1)}", "a smaller number")


def _aligned(options: DataOptions, parts: list[Part], settings: dict, inputs: dict[str, str],
             command: str) -> np.ndarray:
    """float32 (N, --fusion_dim); an alignment that was interrupted continues from its checkpoint."""
    from common.device import resolve_device
    from dataloader.embeddings.alignment import align

    device = resolve_device(options.device, "--device")
    if options.force:
        shutil.rmtree(_checkpoints(options), ignore_errors=True)
    run = Run(_checkpoints(options), settings, inputs, command)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    vectors, best = align(parts, options.fusion.dim, load_alignment(), options.seed, device, run)
    log.info("fuse: a part of an item is nearest to the item's other part in %.1f %% of cases, among %d items "
             "(after epoch %d)", 100 * best.metrics["top1"], best.metrics["num_held_out"], best.epoch)
    return vectors


def _checkpoints(options: DataOptions) -> Path:
    return options.folder.path / f".{options.suffix}"


if __name__ == "__main__":
    sys.exit(run_command(main))
