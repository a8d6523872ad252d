"""A small dataset with embeddings to fuse."""

import numpy as np

from common.artifacts import load_embeddings
from dataloader.embeddings.transform import publish_embedding
from dataloader.fusion import fuse
from dataloader.options import Embedding, Transform
from tests.dataloader.dataset import write_dataset

COMMAND = "bash dataloader/5_fusion_embeddings.sh"
EVENTS = [(user, item, item, "train" if item < user % 3 + 4 else "test") for user in range(9) for item in range(8)]


def shop(tmp_path, parts: dict[str, np.ndarray], *flags: str, missing: dict[str, list[int]] | None = None,
         suffix: str = "fused-concat"):
    """Return the options for a dataset with these embeddings; the `missing` items have no vector of their own."""
    num_items = len(next(iter(parts.values()))) if parts else 8
    options = write_dataset(tmp_path, [f"text {n}" for n in range(num_items)], "--suffix", suffix, "--device", "cpu",
                            *flags, events=EVENTS).fusion
    for name, vectors in parts.items():
        present = ~np.isin(np.arange(num_items), (missing or {}).get(name, []))
        publish_embedding(Embedding(options.folder, name, Transform()), np.asarray(vectors, dtype=np.float32), {},
                          f"make {name}", present=present)
    return options


def fused(options) -> np.ndarray:
    fuse(options, COMMAND)
    return load_embeddings(options.folder, options.target.suffix)


def random_parts(num_items: int = 8, dims: tuple[int, ...] = (5, 3), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("td", "image", "mine")
    return {name: rng.standard_normal((num_items, dim)) for name, dim in zip(names, dims, strict=False)}


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
