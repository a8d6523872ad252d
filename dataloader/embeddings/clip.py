"""Vectors from a CLIP model, through sentence-transformers; threads read pictures while the model computes."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import ConfigError, DataError
from dataloader.embeddings.pictures import READING, BadPicture, load_rgb
from dataloader.embeddings.sentence import SentenceEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = {"cpu": 32, "cuda": 64}     # pictures in one forward pass; on other devices as on the CPU
SHARD = {"cpu": 256, "cuda": 2048}  # between two writes to the disk
THREADS = 4                         # that read pictures


class Source(NamedTuple):
    """Where a picture lies, and for errors, whose it is and which command mends it."""

    path: Path
    raw_id: str
    fix: str


class ClipEncoder:
    """Takes the sha256 of a file for its content, and gives the vector of the picture in it, in float32.

    sources: sha256 -> where a file with these bytes lies. Raises ConfigError where the model is none for images, and
    DataError where a file is not what it was when its sha256 was written down.
    """

    unit, flag = "images", "--image_model"  # for messages

    def __init__(self, folder: Path, device: str, sources: dict[str, Source]):
        self.sources, self.network = sources, Network(folder, [device], half=False)
        self.shard_size = SHARD.get(device.split(":")[0], SHARD["cpu"])
        # Transformers has an own way of resizing for either library, and takes torchvision where it is there.
        resizer = "torchvision" if find_spec("torchvision") else "pillow"
        self.identity = {**self.network.identity, "encoder": "clip", "reading": READING, "resizer": resizer,
                         "pillow": version("pillow").split(".")[0]}

    def encode(self, hashes: list[str], done: Callable[[int], None]) -> np.ndarray:
        """float32 (len(hashes), D). Raises BatchFailed, or one of the user errors above."""
        with Pictures([(sha256, self.sources[sha256]) for sha256 in hashes]) as pictures:
            return self.network.encode(pictures, done)

    def close(self) -> None:
        self.network.close()


class Network(SentenceEncoder):
    """The model itself, which gets pictures where others get texts."""

    unit, flag = "images", "--image_model"

    @property
    def batch_size(self) -> int:
        return BATCH.get(self.devices[0].split(":")[0], BATCH["cpu"])

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


class Pictures:
    """Pictures that are read when a slice of them is asked for; threads then go on with as many, probably the next."""

    def __init__(self, files: list[tuple[str, Source]]):
        self.files = files
        self.pool = ThreadPoolExecutor(THREADS)
        self.ahead: dict[int, Future] = {}

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice) -> list["Image"]:
        start, stop, _ = rows.indices(len(self))
        for row in range(start, min(stop + stop - start, len(self))):
            if row not in self.ahead:
                self.ahead[row] = self.pool.submit(_read, *self.files[row])
        return [self.ahead.pop(row).result() for row in range(start, stop)]


def _read(sha256: str, source: Source) -> "Image":
    try:
        data = source.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(source.path, f"is not the image that was fetched for item {source.raw_id}",
                            "its sha256 is another one", source.fix)
        return load_rgb(data)
    except (OSError, BadPicture) as error:
        raise DataError(source.path, f"the image of item {source.raw_id} cannot be read", str(error),
                        source.fix) from error
