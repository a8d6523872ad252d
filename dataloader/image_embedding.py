"""Step 4: the items' images become <D>.emb-image.npy, with a mask of the items that have one."""

import logging
import sys
from contextlib import closing
from typing import NamedTuple

import numpy as np

from common.artifacts import load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import DataError
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.embeddings.embedding import is_current, publish_embedding
from dataloader.embeddings.encoding import Texts, encode_all
from dataloader.embeddings.text_models import find_model, model_settings
from dataloader.embeddings.vector_cache import VectorCache
from dataloader.images.figure_table import Figures, load_figures, make_command, refuse_missing
from dataloader.images.pictures import set_up_pillow
from dataloader.options import DataOptions, parse_options

log = logging.getLogger(__name__)

SUFFIX = "image"


class Made(NamedTuple):
    vectors: np.ndarray  # float32 (num_items, D); rows of items without an image are zero
    encoder: dict        # what made them, for the artifact to tell


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Embed the images of the items.")
    log_to_console()
    embed(options, command_line("bash dataloader/4_get_image_emb.sh", argv))


def embed(options: DataOptions, command: str) -> None:
    """Publish a vector for every item's image, float32 (num_items, D); reuse what was made in the same way.

    Items without an image get the mean vector and are marked in the mask file. With --force the images are encoded
    again even if the cache has them. Raises DataError where figures.parquet is not there, where no item has an image,
    and under --missing_images error where one has none.
    """
    set_up_pillow()
    folder = options.folder
    folder.require()
    figures, fetched = load_figures(folder), load_meta(folder.figures, make_command(folder))
    if options.image.missing == "error":
        refuse_missing(folder)
    if not figures.present.any():
        raise DataError(folder.figures, "no item has an image", "all that were fetched are placeholders",
                        "a smaller --min_image_side for step 1, or leave the modality image out")
    inputs = {folder.figures.name: fetched["sha256"]}
    settings, files = model_settings("image_model", options.image.model, folder.embeddings(SUFFIX))
    if not options.force and is_current(options, SUFFIX, settings, inputs):
        log.info("embed: reusing %s", folder.embeddings(SUFFIX))
        return
    with FolderLock(folder.path):
        made = _make_vectors(options, figures)
        publish_embedding(options, SUFFIX, made.vectors, settings, command, inputs, figures.present, made.encoder,
                          files)


def _make_vectors(options: DataOptions, figures: Figures) -> Made:
    """Images with the same bytes are encoded once, and those that the cache has are not encoded at all."""
    from common.device import resolve_device
    from dataloader.encoders.clip import ClipEncoder, Source

    folder, present = options.folder, figures.present
    device = resolve_device(options.device, "--device")
    model = find_model(options.image.model, options, "--image_model")
    log.info("embed: %s from %s, on %s", options.image.model, model, device)
    hashes, raw_ids = figures.sha256[present], figures.raw_id[present]
    fix = f"{make_command(folder)} --force, which checks all images and fetches what is damaged"
    sources = {sha256: Source(folder.images / file, raw_id, fix)
               for sha256, file, raw_id in zip(hashes, figures.file[present], raw_ids, strict=True)}
    with closing(ClipEncoder(model, str(device), sources)) as encoder:
        cache = VectorCache(folder.data_root, encoder.identity)
        found = encode_all(encoder, Texts(hashes, raw_ids, folder.embeddings(SUFFIX)), cache, fresh=options.force)
    return Made(_spread(found, present), encoder.identity)


def _spread(vectors: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The vectors in the rows of their items, and zeros in the others."""
    if present.all():
        return vectors
    rows = np.zeros((len(present), vectors.shape[1]), dtype=np.float32)
    rows[present] = vectors
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main))
