"""Vectors from a sentence-transformers model: prompt, maximum length and pooling are the model's own."""

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from dataloader.embeddings.encode import BatchFailed
from dataloader.embeddings.models import content_sha256, model_files

log = logging.getLogger(__name__)

BATCH = {"cpu": 32, "cuda": 256}  # texts in one forward pass; on other devices as on the CPU
SHARD = 1024                      # texts a device, between two writes to the disk
# What a model's code raises on input that it cannot deal with, or where memory runs out.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
          ValueError)


class HalfPrecisionOverflow(Exception):
    """The model's numbers do not fit into half precision."""


class SentenceEncoder:
    """A model in a folder, in float32, or with `half` in float16; on several devices in a process each.

    In float32 a vector depends on its text alone, to 1e-6; what it is padded with makes no more difference than that.
    In float16 the difference is of the order of 1e-3.
    """

    unit, flag = "texts", "--text_model"

    def __init__(self, folder: Path, devices: list[str], half: bool):
        self.folder, self.devices, self.half = folder, devices, half
        self.shard_size = SHARD * len(devices)
        # Another major version may read the same files in another way.
        libraries = {name: version(name).split(".")[0] for name in ("sentence-transformers", "transformers")}
        self.identity = {"encoder": "sentence-transformers", "content": content_sha256(model_files(folder)),
                         "precision": "float16" if half else "float32", "major_versions": libraries}
        self._pool: dict | None = None

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """As `Encoder` says, for texts sorted by length. Raises HalfPrecisionOverflow, and ConfigError."""
        vectors = self._encode_in_pool(texts, done) if len(self.devices) > 1 else None
        if vectors is None:
            vectors = self._encode_here(texts, done)
        if self.half and not np.isfinite(vectors).all():
            raise HalfPrecisionOverflow(str(self.folder))
        return vectors

    def close(self) -> None:
        if self._pool is not None:
            self.model.stop_multi_process_pool(self._pool)
            self._pool = None

    @property
    def batch_size(self) -> int:
        return for_device(BATCH, self.devices[0])

    def inputs(self, texts: list[str], rows: range) -> list:
        """What the model gets for some of the texts."""
        return texts[rows.start:rows.stop]

    @cached_property
    def model(self):
        """The model, loaded when it is first needed."""
        import torch
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            # Without a dtype some models would come in the one in which they were saved, also on the CPU.
            model = SentenceTransformer(str(self.folder), device=self.devices[0], local_files_only=True,
                                        model_kwargs={"dtype": torch.float16 if self.half else torch.float32})
        except (*FAULTS, OSError, SafetensorError) as error:
            if _is_out_of_memory(error):
                raise
            raise ConfigError(f"{self.flag} {self.folder}", "cannot be loaded", " ".join(str(error).split())[:300],
                              "name a sentence-transformers model, or a folder that holds one") from error
        if len(model) > 1 and not (self.folder / "modules.json").exists():  # then a pooling was added to it
            log.info("embed: %s does not say how to pool; its tokens' mean is taken", self.folder)
        return model

    def _encode_here(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """Batch by batch on the first device; if memory runs out, in smaller batches until the end of the shard."""
        model, parts, start, size = self.model, [], 0, self.batch_size
        while start < len(texts):
            rows = range(start, min(start + size, len(texts)))
            try:
                vectors = model.encode(self.inputs(texts, rows), batch_size=len(rows), show_progress_bar=False,
                                       device=self.devices[0])
            except FAULTS as error:
                out_of_memory = _is_out_of_memory(error)
                if not out_of_memory or len(rows) == 1:
                    raise BatchFailed(rows, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                                      out_of_memory) from error
                vectors = None
            if vectors is None:
                # Only now that the exception is gone, which held the tensors of the failed attempt.
                gc.collect()
                if self.devices[0].startswith("cuda"):
                    import torch

                    torch.cuda.empty_cache()
                size = len(rows) // 2
                log.info("embed: not enough memory for %d %s at once, going on with %d", len(rows), self.unit, size)
                continue
            parts.append(np.asarray(vectors, dtype=np.float32))
            done(len(rows))
            start = rows.stop
        return np.concatenate(parts)

    def _encode_in_pool(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray | None:
        """The vectors from all devices; None if anything went wrong there: here it is known which batch it was."""
        if self._pool is None:
            self._pool = self.model.start_multi_process_pool(self.devices)
        workers, finished = self._pool["processes"], threading.Event()
        threading.Thread(target=_wake_up, args=(self._pool, finished), daemon=True).start()
        vectors = None
        try:
            vectors = self.model.encode(texts, pool=self._pool, batch_size=self.batch_size, chunk_size=self.batch_size,
                                        show_progress_bar=False)
        except FAULTS as error:
            log.warning("embed: the processes of the several devices failed (%s); this part is encoded on one device",
                        " ".join(str(error).split())[:200])
        finally:
            finished.set()
        if not all(worker.is_alive() for worker in workers):
            self.close()  # the next shard starts new ones
            return None
        if vectors is not None:
            done(len(texts))
            vectors = np.asarray(vectors, dtype=np.float32)
        return vectors


def for_device(sizes: dict[str, int], device: str) -> int:
    return sizes.get(device.split(":")[0], sizes["cpu"])


def _wake_up(pool: dict, finished: threading.Event) -> None:
    """Give results in place of workers that have died: some versions of the library would wait for them for ever."""
    with suppress(ValueError):  # the pool was closed meanwhile
        while not finished.wait(1.0):
            if not all(worker.is_alive() for worker in pool["processes"]):
                pool["output"].put([-1, None])


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises its OutOfMemoryError on a GPU (or its libraries say so), and a bare RuntimeError on the CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
