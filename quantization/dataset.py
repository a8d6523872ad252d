"""Item embeddings, and the batches of an epoch."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DatasetFolder, load_embeddings, load_items_meta, load_mask, load_meta
from common.device import send
from common.errors import DataError
from common.training import derive_seed

MAX_VALUE = 1e15  # with larger values, sums of squares exceed float32


class Embeddings(NamedTuple):
    """The input of a quantizer, and the hashes of the files from which it was loaded."""

    xs: np.ndarray          # embeddings, float32 (num_items, total width); or item indices, int64 (num_items, 1)
    inputs: dict[str, int]  # suffix of an embedding -> its width, in the order of the columns of `xs`
    hashes: dict[str, str]  # file name -> sha256
    items_sha256: str       # hash of the list of items

    @classmethod
    def load(cls, folder: DatasetFolder, suffixes: list[str]) -> "Embeddings":
        """Load the embeddings with these suffixes, and concatenate their columns.

        If `suffixes` is empty, the item indices are the input. If there are several embeddings, and one of them has no
        vector for an item, the item gets zeros in the columns of this embedding. A single embedding is loaded
        unchanged.

        Raises DataError if an embedding has huge values.
        """
        items = load_meta(folder.items, folder.make_command)
        parts = {suffix: load_embeddings(folder, suffix) for suffix in suffixes}
        for suffix, vectors in parts.items():
            if (largest := max(vectors.max(initial=0), -vectors.min(initial=0))) > MAX_VALUE:
                raise DataError(folder.embeddings(suffix), f"has values up to {largest:.3g}",
                                "Sums of their squares are too large for float32",
                                "divide all vectors by the same number")
        if len(parts) > 1:
            for suffix, vectors in parts.items():
                vectors[~load_mask(folder, suffix)] = 0.0
        paths = [folder.embeddings(suffix) for suffix in suffixes] or [folder.items]
        hashes = {path.name: load_meta(path, "")["sha256"] for path in paths}
        if len(parts) == 1:
            [xs] = parts.values()  # no copy: the array may be large
        else:
            xs = (np.concatenate(list(parts.values()), axis=1) if parts else
                  np.arange(load_items_meta(folder)["num_items"])[:, None])
        return cls(xs, {s: p.shape[1] for s, p in parts.items()}, hashes, items["items_sha256"])


class Batches:
    """Batches of the rows of `xs`. The order of the rows depends only on the seed and the epoch."""

    def __init__(self, xs: Tensor, batch_size: int, seed: int):
        self.xs, self.batch_size, self.seed = xs, batch_size, seed
        self.num_batches = -(-len(xs) // batch_size)
        self._epoch, self._order = -1, torch.empty(0)

    def get(self, epoch: int, index: int, rows: slice = slice(None)) -> Tensor:
        """Return batch `index` of the epoch, or only the rows `rows` of this batch: (B, D)."""
        return self.xs[self.numbers(epoch, index)[rows]]

    def numbers(self, epoch: int, index: int) -> Tensor:
        """Return the indices of the items in batch `index` of the epoch: (B,)."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._order = send(torch.randperm(len(self.xs), generator=generator), self.xs.device)
            self._epoch = epoch
        return self._order[index * self.batch_size:(index + 1) * self.batch_size]
