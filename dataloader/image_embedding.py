"""Step 4: make the image embedding of the items (<D>.emb-image.npy) and the mask of the items that have an image."""

import sys
from pathlib import Path

if not __package__:  # started as a file: Python would find http.py of this folder instead of its own package http
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging

import numpy as np

from common.artifacts import dataset_line, load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import DataError
from common.run import log_to_console
from dataloader.embeddings.clip import ClipEncoder, ImageFile
from dataloader.embeddings.encode import Texts, encode_once
from dataloader.embeddings.image_decoding import set_up_pillow
from dataloader.embeddings.models import find_model, model_settings
from dataloader.embeddings.processes import (
    decided_by_first,
    done_by_first,
    embedding_processes,
    first_before_others,
    locked_by_first,
    same_error,
)
from dataloader.embeddings.transform import is_current, publish_embedding
from dataloader.images import ImageTable, load_image_table, make_command, refuse_missing
from dataloader.options import ImageOptions, parse_options

log = logging.getLogger(__name__)

DESCRIPTION = """Embed the images of the items.

Several processes: torchrun --nproc_per_node N dataloader/image_embedding.py, with the same flags"""


def main(argv: list[str]) -> None:
    options = parse_options(argv, DESCRIPTION).image
    log_to_console()
    embed(options, command_line("bash dataloader/4_get_image_emb.sh", argv))


def embed(options: ImageOptions, command: str) -> None:
    """Make and publish the image embedding and its mask, or reuse them if they are up to date.

    The embedding is float32 (num_items, D), and the mask is bool (num_items,). No mask is written if all items have an
    image. If there are several processes, they encode the images together, and the first one publishes the embedding.
    """
    set_up_pillow()
    target, folder = options.target, options.folder
    folder.require()
    log.info("embed: %s", dataset_line(folder))
    table, fetched = load_image_table(folder), load_meta(folder.image_table, make_command(folder))
    if options.missing == "error":
        refuse_missing(folder)
    if not table.present.any():
        raise DataError(folder.image_table, "no item has an image",
                        "All downloaded images are smaller than --min_image_side",
                        "run step 1 with a smaller --min_image_side, or leave out the modality image")
    inputs = {folder.image_table.name: fetched["sha256"]}
    settings, files = model_settings("image_model", options.model, target.path)

    def publish() -> None:
        vectors = np.zeros((len(table.present), found.shape[1]), dtype=np.float32)
        vectors[table.present] = found
        publish_embedding(target, vectors, settings, command, inputs, table.present, encoder=encoder,
                          model_files=files)

    with embedding_processes():
        if not options.force and decided_by_first(lambda: is_current(target, settings, inputs)):
            log.info("embed: reusing %s", target.path)
            return
        with locked_by_first(folder.path):
            found, encoder = _make_vectors(options, table)
            done_by_first(publish)


def _make_vectors(options: ImageOptions, table: ImageTable) -> tuple[np.ndarray | None, dict]:
    """Encode the images. Return the vectors, and the encoder's settings for the meta file.

    The vectors are float32 (number of items with an image, D). Only the first of several processes returns them; the
    others return None.
    """
    from common.device import resolve_device

    folder, present = options.folder, table.present
    with same_error():
        device = resolve_device(options.device, "--device")
    model = first_before_others(lambda: find_model(options.model, folder.data_root, options.mirror, "--image_model"))
    log.info("embed: using the model %s in %s, on %s", options.model, model, device)
    hashes, raw_ids = table.sha256[present], table.raw_id[present]
    fix = f"{make_command(folder)} --force (checks all images and fetches the damaged ones again)"
    sources = {sha256: ImageFile(folder.images / file, raw_id, fix)
               for sha256, file, raw_id in zip(hashes, table.file[present], raw_ids, strict=True)}
    texts = Texts(hashes, raw_ids, options.target.path)
    return encode_once(ClipEncoder(model, str(device), sources), texts, folder.data_root, options.force)


if __name__ == "__main__":
    sys.exit(run_command(main))
