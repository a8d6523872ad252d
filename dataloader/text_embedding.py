"""Step 3: the items' texts become <D>.emb-td.npy."""

import logging
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import load_items, load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import ConfigError
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.embeddings.embedding import is_current, publish_embedding
from dataloader.embeddings.encoding import Texts, encode_all
from dataloader.embeddings.text_models import find_model, model_settings
from dataloader.embeddings.vector_cache import VectorCache
from dataloader.encoders import Encoder
from dataloader.options import DataOptions, parse_options

log = logging.getLogger(__name__)

API = "api:"


class Made(NamedTuple):
    vectors: np.ndarray  # float32 (num_items, D)
    encoder: dict        # what made them, precision and versions included, for the artifact to tell


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Embed the items' texts.")
    log_to_console()
    embed(options, command_line("bash dataloader/3_get_text_emb.sh", argv))


def embed(options: DataOptions, command: str) -> None:
    """Publish a vector for every item's text, float32 (num_items, D); reuse what was made in the same way.

    With --force the texts are encoded again even if the cache has them: that mends a cache that is suspected.
    """
    folder = options.folder
    folder.require()
    items = load_meta(folder.items, folder.make_command)
    suffix = options.text_suffix
    settings, files = _settings(options, folder.embeddings(suffix))
    if not options.force and is_current(options, suffix, settings, {folder.items.name: items["sha256"]}):
        log.info("embed: reusing %s", folder.embeddings(suffix))
        return
    with FolderLock(folder.path):
        made = _make_vectors(options, _load_texts(options))
        publish_embedding(options, suffix, made.vectors, settings, command, encoder=made.encoder,
                          model_files=files)


def _settings(options: DataOptions, artifact: Path) -> tuple[dict, dict[str, dict]]:
    """Which model it is, as the artifact records it; and its files, if it lies in a folder."""
    name = options.text.model
    if name in ("", API):
        raise ConfigError(f"--text_model {name}", "names no model", fix=f"--text_model {name}<name>")
    if name == "tfidf":
        return {"text_model": name}, {}
    if name.startswith(API):
        from dataloader.encoders.api import endpoint

        return {"text_model": name, "api_url": endpoint(options.text.api_url)}, {}
    return model_settings("text_model", name, artifact)


def _load_texts(options: DataOptions) -> Texts:
    items = load_items(options.folder)
    return Texts(items["text"], items["raw_id"], options.folder.embeddings(options.text_suffix))


def _make_vectors(options: DataOptions, texts: Texts) -> Made:
    name = options.text.model
    if name == "tfidf":
        from dataloader.encoders.tfidf import tfidf_vectors

        return Made(tfidf_vectors(texts.texts), {"encoder": name, "scikit-learn": version("scikit-learn")})
    if name.startswith(API):
        from dataloader.encoders.api import ApiEncoder

        return _encode(options, texts, ApiEncoder(name.removeprefix(API), options.text.api_url, options.text.api_rate))
    return _encode_by_model(options, texts)


def _encode_by_model(options: DataOptions, texts: Texts) -> Made:
    from common.device import resolve_device
    from dataloader.encoders.sentence import HalfPrecisionOverflow, SentenceEncoder

    device = resolve_device(options.device, "--device")
    folder = find_model(options.text.model, options)
    devices = _all_gpus() if options.device == "auto" and device.type == "cuda" else [str(device)]
    log.info("embed: %s from %s, on %s", options.text.model, folder, ", ".join(devices))
    if device.type == "cuda":
        try:
            return _encode(options, texts, SentenceEncoder(folder, devices, half=True))
        except HalfPrecisionOverflow:
            log.warning("embed: half precision cannot hold the numbers of %s: all texts are encoded in float32", folder)
    return _encode(options, texts, SentenceEncoder(folder, devices, half=False))


def _all_gpus() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _encode(options: DataOptions, texts: Texts, encoder: Encoder) -> Made:
    cache = VectorCache(options.folder.data_root, encoder.identity)
    with closing(encoder):
        return Made(encode_all(encoder, texts, cache, fresh=options.force), encoder.identity)


if __name__ == "__main__":
    sys.exit(run_command(main))
