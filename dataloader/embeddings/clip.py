"""Image embeddings from a CLIP model of sentence-transformers. Threads decode images while the model computes."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import ConfigError, DataError
from dataloader.embeddings.image_decoding import READING, BadImage, load_rgb
from dataloader.embeddings.sentence import SentenceEncoder, for_device

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = {"cpu": 32, "cuda": 64}     # images per forward pass; other devices use the value for the CPU
SHARD = {"cpu": 256, "cuda": 2048}  # images per shard of the cache
THREADS = 4                         # threads that decode images


class ImageFile(NamedTuple):
    """The path of an image file, and two values for error messages."""

    path: Path
    raw_id: str  # raw id of the item that the image belongs to
    fix: str     # command that repairs the file


class ClipEncoder(SentenceEncoder):
    """An encoder of images in float32. Instead of texts, its methods get the sha256 of each image file.

    sources: sha256 -> an image file with this sha256

    Raises ConfigError if the model does not support images. Raises DataError if an image file cannot be read, or has
    changed since its sha256 was recorded.
    """

    unit, flag = "images", "--image_model"

    def __init__(self, folder: Path, device: str, sources: dict[str, ImageFile]):
        super().__init__(folder, [device], half=False)
        self.sources, self.shard_size = sources, for_device(SHARD, device)
        # Transformers resizes images with torchvision if it is installed, and with Pillow otherwise. The two libraries
        # compute different pixels.
        resizer = "torchvision" if find_spec("torchvision") else "pillow"
        self.identity |= {"encoder": "clip", "reading": READING, "resizer": resizer,
                          "pillow": version("pillow").split(".")[0]}

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        self.pool, self.ahead = ThreadPoolExecutor(THREADS), {}
        try:
            return super().encode(texts, done)
        finally:
            self.pool.shutdown(cancel_futures=True)

    def inputs(self, texts: list[str], rows: range) -> list["Image"]:
        """Return the decoded images of these rows. In the background, threads begin to decode the next batch."""
        for row in range(rows.start, min(rows.stop + len(rows), len(texts))):
            if row not in self.ahead:
                self.ahead[row] = self.pool.submit(_read, texts[row], self.sources[texts[row]])
        return [self.ahead.pop(row).result() for row in rows]

    @property
    def batch_size(self) -> int:
        return for_device(BATCH, self.devices[0])

    @cached_property
    def model(self):
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()  # without torchvision, which is optional, Transformers would print a warning
        model = super().model
        if not model.supports("image"):
            raise ConfigError(f"{self.flag} {self.folder}", "does not support images",
                              f"The model supports {', '.join(map(str, model.modalities))}",
                              "use a CLIP model, such as clip-ViT-B-32")
        return model


def _read(sha256: str, source: ImageFile) -> "Image":
    try:
        data = source.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(source.path, f"is not the image that was fetched for item {source.raw_id}",
                            "The sha256 of the file has changed", source.fix)
        return load_rgb(data)
    except (OSError, BadImage) as error:
        raise DataError(source.path, f"the image of item {source.raw_id} cannot be read", str(error),
                        source.fix) from error
