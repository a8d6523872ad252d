"""Text embeddings from a sentence-transformers model, with the model's own prompt, maximum length and pooling."""

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common.distributed import world_size
from common.errors import ConfigError, out_of_memory
from dataloader.embeddings.encode import BatchFailed, HalfPrecisionOverflow
from dataloader.embeddings.models import content_sha256, model_files

log = logging.getLogger(__name__)

BATCH = {"cpu": 32, "cuda": 256}  # texts per forward pass; other devices use the value for the CPU
SHARD = 1024                      # texts per shard of the cache, multiplied by the number of devices
# Exceptions that a model raises if it cannot process its input, or if the memory is not sufficient.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
          ValueError)


class SentenceEncoder:
    """An encoder of texts with a model from a folder, in float32, or in float16 if `half` is true.

    If there are several devices, each device has its own process. Because of padding, the vector of a text depends
    slightly on the other texts in its batch. The differences are up to 1e-6 in float32, and about 1e-3 in float16.
    """

    unit, flag = "texts", "--text_model"

    def __init__(self, folder: Path, devices: list[str], half: bool):
        self.folder, self.devices, self.half = folder, devices, half
        self.shard_size = SHARD * len(devices)
        # Another major version of a library may interpret the same model files differently.
        libraries = {name: version(name).split(".")[0] for name in ("sentence-transformers", "transformers")}
        self.identity = {"encoder": "sentence-transformers", "content": content_sha256(model_files(folder)),
                         "precision": "float16" if half else "float32", "major_versions": libraries}
        self._pool: dict | None = None

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """Encode texts as described in `Encoder`. If the texts are sorted by length, less padding is needed.

        Raises HalfPrecisionOverflow if the values are too large for float16. Raises ConfigError if the model cannot be
        loaded.
        """
        vectors = self._encode_in_pool(texts, done) if len(self.devices) > 1 else None
        if vectors is None:  # on one device, the batch that fails can be identified
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
        """Return the model inputs for these rows of the texts."""
        return texts[rows.start:rows.stop]

    @cached_property
    def model(self):
        """The sentence-transformers model, which is loaded when it is first used."""
        import torch
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if world_size() > 1 and self.devices[0].startswith("cuda"):
            torch.cuda.set_device(self.devices[0])  # the code of a model may use the current device
        try:
            # Without this dtype, some models would be loaded in the dtype in which they were saved, even on the CPU.
            model = SentenceTransformer(str(self.folder), device=self.devices[0], local_files_only=True,
                                        model_kwargs={"dtype": torch.float16 if self.half else torch.float32})
        except (*FAULTS, OSError, SafetensorError) as error:
            if out_of_memory(error):
                raise
            raise ConfigError(f"{self.flag} {self.folder}", "cannot be loaded", " ".join(str(error).split())[:300],
                              "use a sentence-transformers model, or a folder that contains one") from error
        if len(model) > 1 and not (self.folder / "modules.json").exists():  # the library has added a pooling layer
            log.info("embed: %s does not specify the pooling; using the mean over all tokens", self.folder)
        return model

    def _encode_here(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """Encode on the first device. If memory runs out, use smaller batches for the rest of the texts."""
        model, parts, start, size = self.model, [], 0, self.batch_size
        while start < len(texts):
            rows = range(start, min(start + size, len(texts)))
            try:
                vectors = model.encode(self.inputs(texts, rows), batch_size=len(rows), show_progress_bar=False,
                                       device=self.devices[0])
            except FAULTS as error:
                no_memory = out_of_memory(error)
                if not no_memory or len(rows) == 1:
                    raise BatchFailed(rows, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                                      no_memory) from error
                vectors = None
            if vectors is None:
                # Free the memory outside the `except` block, because the exception keeps the tensors of the failed
                # batch in memory.
                gc.collect()
                if self.devices[0].startswith("cuda"):
                    import torch

                    torch.cuda.empty_cache()
                size = len(rows) // 2
                log.info("embed: not enough memory for %d %s at once; continuing with %d", len(rows), self.unit, size)
                continue
            parts.append(np.asarray(vectors, dtype=np.float32))
            done(len(rows))
            start = rows.stop
        return np.concatenate(parts)

    def _encode_in_pool(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray | None:
        """Encode on all devices, or return None if that fails."""
        if self._pool is None:
            self._pool = self.model.start_multi_process_pool(self.devices)
        workers, finished = self._pool["processes"], threading.Event()
        threading.Thread(target=_wake_up, args=(self._pool, finished), daemon=True).start()
        vectors = None
        try:
            vectors = self.model.encode(texts, pool=self._pool, batch_size=self.batch_size, chunk_size=self.batch_size,
                                        show_progress_bar=False)
        except FAULTS as error:
            log.warning("embed: encoding on several devices failed (%s); encoding this shard on one device",
                        " ".join(str(error).split())[:200])
        finally:
            finished.set()
        if not all(worker.is_alive() for worker in workers):
            self.close()  # the next shard starts new processes
            return None
        if vectors is not None:
            done(len(texts))
            vectors = np.asarray(vectors, dtype=np.float32)
        return vectors


def for_device(sizes: dict[str, int], device: str) -> int:
    return sizes.get(device.split(":")[0], sizes["cpu"])


def _wake_up(pool: dict, finished: threading.Event) -> None:
    """If a worker process dies, put empty results into the result queue until `finished` is set.

    Without these results, some versions of the library would wait for the dead process forever.
    """
    with suppress(ValueError):  # the pool has been closed in the meantime
        while not finished.wait(1.0):
            if not all(worker.is_alive() for worker in pool["processes"]):
                pool["output"].put([-1, None])
