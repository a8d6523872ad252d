"""Step 3: make the text embedding of the items (<D>.emb-<suffix>.npy, by default <D>.emb-td.npy)."""

import sys
from pathlib import Path

if not __package__:  # started as a file: Python would find http.py of this folder instead of its own package http
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from importlib.metadata import version

import numpy as np

from common.artifacts import dataset_line, load_items, load_meta
from common.cli import command_line
from common.command import run_command
from common.distributed import world_size
from common.errors import ConfigError
from common.run import log_to_console
from dataloader.embeddings import sentence
from dataloader.embeddings.api import ApiEncoder, endpoint
from dataloader.embeddings.encode import HalfPrecisionOverflow, Texts, encode_once
from dataloader.embeddings.models import find_model, model_settings
from dataloader.embeddings.processes import (
    decided_by_first,
    done_by_first,
    embedding_processes,
    first_before_others,
    locked_by_first,
    same_error,
)
from dataloader.embeddings.tfidf import tfidf_vectors
from dataloader.embeddings.transform import is_current, publish_embedding
from dataloader.options import TextOptions, parse_options

log = logging.getLogger(__name__)

DESCRIPTION = """Embed the texts of the items.

Several processes: torchrun --nproc_per_node N dataloader/text_embedding.py, with the same flags"""

API = "api:"


def main(argv: list[str]) -> None:
    options = parse_options(argv, DESCRIPTION).text
    log_to_console()
    embed(options, command_line("bash dataloader/3_get_text_emb.sh", argv))


def embed(options: TextOptions, command: str) -> None:
    """Make and publish the text embedding, or reuse it if it is up to date.

    The embedding is float32 (num_items, D). With --force, cached vectors are not used. If there are several processes,
    they encode the texts together, and the first one publishes the embedding.
    """
    target, folder = options.target, options.folder
    folder.require()
    log.info("embed: %s", dataset_line(folder))
    items = load_meta(folder.items, folder.make_command)
    settings, files = _settings(options)
    with embedding_processes():
        if not options.force and decided_by_first(
                lambda: is_current(target, settings, {folder.items.name: items["sha256"]})):
            log.info("embed: reusing %s", target.path)
            return
        with locked_by_first(folder.path):
            columns = load_items(folder)
            vectors, encoder = _make_vectors(options, Texts(columns["text"], columns["raw_id"], target.path))
            done_by_first(lambda: publish_embedding(target, vectors, settings, command, encoder=encoder,
                                                    model_files=files))


def _settings(options: TextOptions) -> tuple[dict, dict[str, dict]]:
    """Return the model's settings for the meta file, and the fingerprints of the model's files.

    The fingerprints are a dict (file name -> fingerprint), which is empty unless the model is a local folder.
    """
    if options.model in ("", API):
        raise ConfigError(f"--text_model {options.model}", "the name of the model is missing",
                          fix=f"use --text_model {options.model}<name>")
    if options.model == "tfidf":
        return {"text_model": options.model}, {}
    if options.model.startswith(API):
        return {"text_model": options.model, "api_url": endpoint(options.api_url)}, {}
    return model_settings("text_model", options.model, options.target.path)


def _make_vectors(options: TextOptions, texts: Texts) -> tuple[np.ndarray | None, dict]:
    """Encode the texts. Return the vectors, float32 (num_items, D), and the encoder's settings for the meta file.

    Only the first of several processes returns the vectors; the others return None.
    """
    if options.model == "tfidf":  # one computation over all texts, which cannot be shared
        vectors = done_by_first(lambda: tfidf_vectors(texts.texts))
        return vectors, {"encoder": options.model, "scikit-learn": version("scikit-learn")}
    if options.model.startswith(API):
        encoder = ApiEncoder(options.model.removeprefix(API), options.api_url, options.api_rate / world_size())
        return encode_once(encoder, texts, options.folder.data_root, options.force)
    from common.device import resolve_device

    with same_error():
        device = resolve_device(options.device, "--device")
    folder = first_before_others(lambda: find_model(options.model, options.folder.data_root, options.mirror))
    devices = [str(device)]
    if options.device == "auto" and device.type == "cuda" and world_size() == 1:
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    log.info("embed: using the model %s in %s, on %s", options.model, folder, ", ".join(devices))
    data_root, force = options.folder.data_root, options.force
    if device.type == "cuda":
        try:
            return encode_once(sentence.SentenceEncoder(folder, devices, half=True), texts, data_root, force)
        except HalfPrecisionOverflow:  # raised in all processes
            log.warning("embed: half precision overflows with %s; encoding all texts in float32", folder)
    return encode_once(sentence.SentenceEncoder(folder, devices, half=False), texts, data_root, force)


if __name__ == "__main__":
    sys.exit(run_command(main))
