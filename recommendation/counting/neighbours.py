"""Items with similar content: the nearest neighbours of each item, by its text or by its embedding."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.progress import Progress

# N items, G neighbours of an item, D dimensions of an embedding, R rows of a block, X other items of a row

NUM_NEAREST = 30
BLOCK_CELLS = 20_000_000  # similarities that are computed at a time

log = logging.getLogger(__name__)

# A function that returns the cosines of the items from `first` to `end - 1` with other items, (R, X), and which items
# these are, (R, X). The other items may be all items in order: then the second result is None, and X = N.
Block = Callable[[int, int], tuple[Tensor, Tensor | None]]


def neighbours_of_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the items with the most similar TF-IDF vectors: (N, G) int64 items and (N, G) float32 weights.

    A weight is a squared cosine similarity. An item with the weight 0 has no meaning: fewer texts have a common word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        # Without words of a single item and without words of more than a fifth of the items.
        vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.2, dtype=np.float32).fit_transform(texts)
    except ValueError:  # no word is left
        log.warning("recommendation: WARNING: the texts of the %d items have no words from which TF-IDF could compute "
                    "their similarity, so it finds no neighbours", len(texts))
        return _nearest(lambda first, end: (torch.zeros(end - first, len(texts)), None), len(texts))
    vectors = vectors.tocsr()
    transposed = vectors.T.tocsr()

    def similar(first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the items that have a word in common. Shorter rows end with the cosine 0."""
        cosines = vectors[first:end] @ transposed
        sizes = np.diff(cosines.indptr).tolist()
        values, items = (pad_sequence(torch.from_numpy(part).split(sizes), batch_first=True)
                         for part in (cosines.data, cosines.indices))
        return values, items

    return _nearest(similar, len(texts))


def neighbours_of_vectors(vectors: np.ndarray, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the items with the most similar vectors: (N, G) int64 items and (N, G) float32 squared cosines.

    vectors: (N, D)
    known: (N,) bool, which items have a vector of their own; the weights of the other items are 0
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    if known is not None:
        unit[~known] = 0
    return _nearest(lambda first, end: (torch.from_numpy(unit[first:end] @ unit.T), None), len(unit))


def _nearest(cosines: Block, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest neighbours of all items, and their squared cosines; a negative cosine counts as 0."""
    num_nearest = min(NUM_NEAREST, num_items - 1)
    items = np.zeros((num_items, num_nearest), np.int64)
    weights = np.zeros(items.shape, np.float32)
    step = max(BLOCK_CELLS // num_items, 1)
    with Progress("nearest neighbours", num_items, "items", kept=False) as progress:
        for first in range(0, num_items if num_nearest else 0, step):
            end = min(first + step, num_items)
            cosine, others = cosines(first, end)
            # `topk` is much faster here than `np.argpartition`. The item itself may be among the best ones, so find one
            # more.
            best, found = cosine.topk(min(num_nearest + 1, cosine.shape[1]), dim=1)
            found = found if others is None else others.gather(1, found).long()
            best = best.masked_fill(found == torch.arange(first, end).unsqueeze(1), -torch.inf)
            best, order = best.topk(min(num_nearest, best.shape[1]), dim=1)
            items[first:end, :best.shape[1]] = found.gather(1, order).numpy()
            weights[first:end, :best.shape[1]] = best.clamp(min=0).square().numpy()
            progress.update(end - first)
    return items, weights


def as_matrix(items: np.ndarray, weights: np.ndarray) -> sparse.csr_matrix:
    """Return the sparse matrix (N, N) float32 with the weights of the neighbours."""
    size, num_nearest = items.shape
    starts = np.arange(0, size * num_nearest + 1, num_nearest) if num_nearest else np.zeros(size + 1, np.int64)
    matrix = sparse.csr_matrix((weights.ravel(), items.ravel().astype(np.int32), starts), (size, size), copy=True)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix
