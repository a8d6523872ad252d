"""A cache of vectors on disk, shared by all datasets.

    <data_root>/.embeddings/<key of the encoder>/<number>-<unique>.safetensors

Each file is a shard. It contains two arrays for n texts: `keys`, uint8 (n, 16), and `vectors`, float32 (n, D). The key
of a text is the first 16 bytes of its sha256. For an image, the sha256 of its file is used as the text. A complete
shard never changes, so no lock is needed: two processes that encode the same texts write two shards. The processes of
torchrun write their shards into the same folder.
"""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.publishing import sweep, write_bytes, write_text

log = logging.getLogger(__name__)

FORMAT = 1          # version of the shard format; each version has its own cache
KEY = np.dtype("S16")
SHARD_NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}\.safetensors")


def text_keys(texts: list[str]) -> np.ndarray:
    """Return the key of each text: (n,) of dtype KEY. Different texts have different keys."""
    digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY.itemsize] for text in texts)
    # NumPy ignores trailing zero bytes when it compares S16 values. This is harmless for keys of the same length.
    return np.frombuffer(b"".join(digests), dtype=KEY)


class VectorCache:
    """The cached shards of one encoder.

    identity: all settings of the encoder that affect the vectors; each identity has its own folder
    """

    def __init__(self, data_root: Path, identity: dict):
        content = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self.folder = data_root / ".embeddings" / hashlib.sha256(content.encode()).hexdigest()[:16]
        self.identity = identity

    def shards(self, after: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the keys (n,) and vectors (n, D) of each shard whose number is larger than `after`.

        The newest shard comes first. If a text is in several shards, the first vector is therefore the newest one.
        """
        for path in sorted(self._paths(), key=_number, reverse=True):
            if _number(path) > after and (shard := self._read(path)) is not None:
                yield shard

    def write(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Write a shard with these vectors. When this method returns, the shard is safely on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "encoder.json").exists():  # tells users which encoder made the vectors
            write_text(self.folder / "encoder.json", json.dumps(self.identity, indent=2, sort_keys=True) + "\n")
        content = {"keys": np.ascontiguousarray(keys).view(np.uint8).reshape(-1, KEY.itemsize),
                   "vectors": np.ascontiguousarray(vectors, dtype=np.float32)}
        write_bytes(self.folder / f"{self.newest() + 1:06d}-{secrets.token_hex(4)}.safetensors",
                    save(content, metadata={"sha256": _digest(**content)}), by_all=True)
        sweep(self.folder, "*.safetensors")

    def newest(self) -> int:
        """Return the number of the newest shard, or 0 if there is none."""
        return max(map(_number, self._paths()), default=0)

    def drop_superseded(self, newest: int, keys: np.ndarray) -> None:
        """Delete the old shards whose texts have all been encoded again.

        newest: the number of the newest shard before the texts were encoded again; shards with a larger number are kept
        keys: the keys of the texts that have been encoded again
        """
        for path in self._paths():
            if _number(path) <= newest and (shard := self._read(path)) is not None and np.isin(shard[0], keys).all():
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("*.safetensors") if SHARD_NAME.fullmatch(path.name)]

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the keys and vectors of a shard, or None if it is damaged.

        A damaged shard is deleted, so that its texts are encoded again.
        """
        why = "the content does not match the recorded sha256"
        try:
            with safe_open(path, "np") as file:
                keys, vectors = (file.get_tensor(name) for name in ("keys", "vectors"))
                written = (file.metadata() or {}).get("sha256")
            fits = vectors.ndim == 2 and vectors.dtype == np.float32 and keys.dtype == np.uint8
            if fits and keys.shape == (len(vectors), KEY.itemsize) and written == _digest(keys, vectors):
                return np.ascontiguousarray(keys).view(KEY).ravel(), vectors
        except FileNotFoundError:  # another process has deleted the shard since it was listed
            return None
        except SafetensorError as error:
            why = str(error)
        log.warning("embed: %s is damaged and was deleted (%s); its texts will be encoded again", path, why)
        path.unlink(missing_ok=True)
        return None


def _number(path: Path) -> int:
    return int(SHARD_NAME.fullmatch(path.name)[1])


def _digest(keys: np.ndarray, vectors: np.ndarray) -> str:
    """Return the sha256 of the dtypes, shapes and bytes of both arrays. The header of a shard contains this sha256."""
    digest = hashlib.sha256(f"{keys.dtype} {keys.shape} {vectors.dtype} {vectors.shape}".encode())
    digest.update(keys)
    digest.update(vectors)
    return digest.hexdigest()
