"""Step 3: the items' texts become <D>.emb-td.npy."""

import logging
import sys
from contextlib import closing
from importlib.metadata import version

import numpy as np

from common.artifacts import load_items, load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import ConfigError
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.embeddings.cache import VectorCache
from dataloader.embeddings.encode import Encoder, Texts, encode_all
from dataloader.embeddings.models import find_model, model_settings
from dataloader.embeddings.transform import is_current, publish_embedding
from dataloader.options import TextOptions, parse_options

log = logging.getLogger(__name__)

API = "api:"


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Embed the items' texts.").text
    log_to_console()
    embed(options, command_line("bash dataloader/3_get_text_emb.sh", argv))


def embed(options: TextOptions, command: str) -> None:
    """Publish a vector for every item's text, float32 (num_items, D); reuse what was made in the same way.

    With --force the texts are encoded again even if the cache has them: that mends a cache that is suspected.
    """
    target, folder = options.target, options.folder
    folder.require()
    items = load_meta(folder.items, folder.make_command)
    settings, files = _settings(options)
    if not options.force and is_current(target, settings, {folder.items.name: items["sha256"]}):
        log.info("embed: reusing %s", target.path)
        return
    with FolderLock(folder.path):
        columns = load_items(folder)
        vectors, encoder = _make_vectors(options, Texts(columns["text"], columns["raw_id"], target.path))
        publish_embedding(target, vectors, settings, command, encoder=encoder, model_files=files)


def _settings(options: TextOptions) -> tuple[dict, dict[str, dict]]:
    """Which model it is, as the artifact records it; and its files, if it lies in a folder."""
    if options.model in ("", API):
        raise ConfigError(f"--text_model {options.model}", "names no model", fix=f"--text_model {options.model}<name>")
    if options.model == "tfidf":
        return {"text_model": options.model}, {}
    if options.model.startswith(API):
        from dataloader.embeddings.api import endpoint

        return {"text_model": options.model, "api_url": endpoint(options.api_url)}, {}
    return model_settings("text_model", options.model, options.target.path)


def _make_vectors(options: TextOptions, texts: Texts) -> tuple[np.ndarray, dict]:
    """float32 (num_items, D), and what made them, precision and versions included, for the artifact to tell."""
    name = options.model
    if name == "tfidf":
        from dataloader.embeddings.tfidf import tfidf_vectors

        return tfidf_vectors(texts.texts), {"encoder": name, "scikit-learn": version("scikit-learn")}
    if name.startswith(API):
        from dataloader.embeddings.api import ApiEncoder

        return _encode(options, texts, ApiEncoder(name.removeprefix(API), options.api_url, options.api_rate))
    from common.device import resolve_device
    from dataloader.embeddings.sentence import HalfPrecisionOverflow, SentenceEncoder

    device = resolve_device(options.device, "--device")
    folder = find_model(options.model, options.folder.data_root, options.mirror)
    devices = [str(device)]
    if options.device == "auto" and device.type == "cuda":
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    log.info("embed: %s from %s, on %s", options.model, folder, ", ".join(devices))
    if device.type == "cuda":
        try:
            return _encode(options, texts, SentenceEncoder(folder, devices, half=True))
        except HalfPrecisionOverflow:
            log.warning("embed: half precision cannot hold the numbers of %s: all texts are encoded in float32", folder)
    return _encode(options, texts, SentenceEncoder(folder, devices, half=False))


def _encode(options: TextOptions, texts: Texts, encoder: Encoder) -> tuple[np.ndarray, dict]:
    cache = VectorCache(options.folder.data_root, encoder.identity)
    with closing(encoder):
        return encode_all(encoder, texts, cache, fresh=options.force), encoder.identity


if __name__ == "__main__":
    sys.exit(run_command(main))
