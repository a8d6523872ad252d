"""Vectors from a CLIP model, through sentence-transformers; threads read pictures while the model computes."""

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

BATCH = {"cpu": 32, "cuda": 64}     # pictures in one forward pass; on other devices as on the CPU
SHARD = {"cpu": 256, "cuda": 2048}  # between two writes to the disk
THREADS = 4                         # that read pictures


class ImageFile(NamedTuple):
    """Where a picture lies, and for errors, whose it is and which command mends it."""

    path: Path
    raw_id: str
    fix: str


class ClipEncoder(SentenceEncoder):
    """Takes the sha256 of a file for its content, and gives the vector of the picture in it, in float32.

    sources: sha256 -> where a file with these bytes lies. Raises ConfigError where the model is none for images, and
    DataError where a file is not what it was when its sha256 was written down.
    """

    unit, flag = "images", "--image_model"

    def __init__(self, folder: Path, device: str, sources: dict[str, ImageFile]):
        super().__init__(folder, [device], half=False)
        self.sources, self.shard_size = sources, for_device(SHARD, device)
        # Transformers has an own way of resizing for either library, and takes torchvision where it is there.
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
        """Some of the pictures. Meanwhile threads go on with as many, which will probably be the next."""
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

        set_verbosity_error()  # it would say that torchvision, which it can do without, is not there
        model = super().model
        if not model.supports("image"):
            raise ConfigError(f"{self.flag} {self.folder}", "is no model for images",
                              f"it takes {', '.join(map(str, model.modalities))}",
                              "name a CLIP model, such as clip-ViT-B-32")
        return model


def _read(sha256: str, source: ImageFile) -> "Image":
    try:
        data = source.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(source.path, f"is not the image that was fetched for item {source.raw_id}",
                            "its sha256 is another one", source.fix)
        return load_rgb(data)
    except (OSError, BadImage) as error:
        raise DataError(source.path, f"the image of item {source.raw_id} cannot be read", str(error),
                        source.fix) from error
