"""A dataset with the images of step 1, its vectors, and the expected vectors."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common.artifacts import load_embeddings
from dataloader.embeddings import clip
from dataloader.image_embedding import embed
from dataloader.images import fetch_images
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import Reply

COMMAND = "bash dataloader/4_get_image_emb.sh"


def shop(tmp_path, server, model: Path, bodies: list[bytes | None], *flags: str):
    """Options for a dataset whose items have these images (None: no image), fetched by step 1."""
    urls = [body and server.serve(f"/{n}/{zlib.crc32(body)}.png", Reply(body)) for n, body in enumerate(bodies)]
    options = write_dataset(tmp_path / "data", [f"text {n}" for n in range(len(urls))], "--image_rate", "1000",
                            "--image_model", str(model), "--device", "cpu", *flags, image_urls=urls)
    fetch_images(options.images, "bash dataloader/1_load_figure.sh")
    return options.image


def embedded(options) -> np.ndarray:
    embed(options, COMMAND)
    return load_embeddings(options.folder, "image")


def oracle(model: Path, images: list[Image.Image]) -> np.ndarray:
    """The vectors that transformers computes for these images, one at a time."""
    import torch
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    network, processor = CLIPModel.from_pretrained(model).eval(), CLIPImageProcessorPil.from_pretrained(model)
    with torch.no_grad():
        features = [network.get_image_features(**processor(image, return_tensors="pt")) for image in images]
    return np.stack([getattr(f, "pooler_output", f)[0].numpy() for f in features])


def count_readings(monkeypatch) -> list[str]:
    """The sha256 of every image that is read from now on."""
    read, read_before = [], clip._read

    def reading(sha256, source):
        read.append(sha256)
        return read_before(sha256, source)

    monkeypatch.setattr(clip, "_read", reading)
    return read
