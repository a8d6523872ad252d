"""Step 5, --suffix cf: item vectors computed from the training events only.

Two items are similar if the same users have interacted with both. Let A be the user-item matrix of the training split
(1 if the user has an event with the item, else 0), and n_u the number of items of user u. The co-occurrence of two
items is

    C_ij = sum over users of A_ui A_uj / (n_u - 1),    C_ii = 0

The factor 1 / (n_u - 1) gives every event the weight 1, in short and in long histories. Row i of C therefore sums to
d_i, the number of events of item i. The matrix that is decomposed is

    S = (D + t)^-1/2 C (D + t)^-1/2,    D = diag(d)

This scaling removes the effect of popularity, as cosine similarity does. The regularization t is a fraction of the mean
of d (Qin and Rohe, Regularized spectral clustering under the degree-corrected stochastic blockmodel, NeurIPS 2013).
Without t, the leading eigenvectors of sparse data represent small groups of rare items that co-occur by chance.

Positive PMI is another common choice. It would need every entry of C, which is nearly dense for data such as MovieLens.
On sparse data, it predicts the next item less well than S.

The item vectors are the rows of V sqrt(L). The columns of V are the eigenvectors of S with the largest eigenvalues, and
L is the diagonal matrix of these eigenvalues. The inner products of these vectors are the best approximation of S with
this number of dimensions. Finally, all vectors are multiplied by one factor, so that their mean squared length is 1.
"""

import logging
from typing import NamedTuple

import numpy as np
from scipy.linalg import qr
from scipy.sparse import csr_matrix

from common.artifacts import DatasetFolder, load_interactions, load_items_meta
from common.errors import DataError
from common.progress import Progress
from common.table_files import SPLITS
from dataloader.options import Collaborative

log = logging.getLogger(__name__)

COLUMNS = 16      # columns of the block multiplied with S at once
ROWS = 65_536     # rows of the block rotated at once
SPREAD = 1e5      # maximum ratio between the amplifications of two eigenvectors by the filter; limited by float32
NOISE = 1e-3      # minimum length of a vector; a shorter vector consists only of rounding and convergence errors

# U users, N items of the dataset, M items that co-occur with another item, K dimensions of the item vectors,
# B columns of the block. The block is the matrix of the approximate eigenvectors.


def item_vectors(folder: DatasetFolder, config: Collaborative, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the embedding cf: the vectors of all N items, float32 (N, K), and a mask, bool (N,).

    The mask is true for the items that have a vector; the vectors of the other items are zero. Raises DataError if no
    user has two different training items. Raises ArtifactError if a table is damaged.
    """
    num_items, events = load_items_meta(folder)["num_items"], load_interactions(folder)
    # Use only the training events. The events of valid and test must not influence the vectors.
    train = events.split == SPLITS.index("train")
    users, items = events.user[train].astype(np.int32), events.item[train].astype(np.int32)
    del events, train  # for 20 million events, these arrays need as much memory as the matrix
    matrix = co_occurrence(users, items, config.smoothing)
    del users, items
    if not len(matrix.items):
        raise DataError(folder.interactions, "no user has two different items in the training split",
                        "The embedding cf is computed from such pairs of items",
                        "leave out the embedding cf, or relax the filters to keep more events")
    log.info("cf: %d of %d items co-occur with another item in a training history", len(matrix.items), num_items)
    values, block = leading_eigenpairs(matrix, config, seed)
    found = _scaled(values, block, config.num_dims)
    vectors, present = np.zeros((num_items, found.shape[1]), dtype=np.float32), np.zeros(num_items, dtype=bool)
    vectors[matrix.items] = found
    present[matrix.items] = np.einsum("mk,mk->m", found, found) > NOISE ** 2
    if num_faint := len(matrix.items) - int(present.sum()):
        log.info("cf: %d items that co-occur with another item get no vector, because their vectors with %d dimensions "
                 "would be nearly 0", num_faint, found.shape[1])
    return vectors, present


class CoOccurrence(NamedTuple):
    """The matrix S (M, M) of the M items that co-occur with another item.

    S itself is not stored. It is F^T F with a diagonal of zeros, where F is the sparse matrix `incidence`.
    """

    items: np.ndarray     # (M,) the item of each row of S; the most popular items come first, for memory locality
    incidence: csr_matrix  # F, float32 (U, M)
    diagonal: np.ndarray  # float32 (M,), the diagonal of F^T F

    def times(self, columns: np.ndarray) -> np.ndarray:
        """Multiply S by a matrix with any number of columns: (M, columns) -> (M, columns)."""
        return self.incidence.T @ (self.incidence @ columns) - self.diagonal[:, None] * columns


def co_occurrence(users: np.ndarray, items: np.ndarray, smoothing: float) -> CoOccurrence:
    """Build the co-occurrence matrix S from the training events.

    users, items: the user and the item of each event, both (num_events,)

    Users with only one item are left out. An item is left out too if all its events belong to such users.
    """
    num_users, num_items = (int(ids.max(initial=-1)) + 1 for ids in (users, items))
    ones = np.ones(len(users), dtype=np.float32)
    incidence = csr_matrix((ones, (users, items)), shape=(num_users, num_items))  # merges repeated events
    incidence = incidence[np.diff(incidence.indptr) > 1]
    counts = np.bincount(incidence.indices, minlength=num_items)
    order = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
    incidence = incidence[:, order]
    incidence.sort_indices()
    lengths, degrees = np.diff(incidence.indptr), counts[order].astype(np.float64)
    scale = (degrees + smoothing * degrees.mean()) ** -0.5 if len(degrees) else degrees
    incidence.data = (np.repeat((lengths - 1.0) ** -0.5, lengths) * scale[incidence.indices]).astype(np.float32)
    diagonal = np.bincount(incidence.indices, weights=incidence.data.astype(np.float64) ** 2, minlength=len(order))
    return CoOccurrence(order, incidence, diagonal.astype(np.float32))


def leading_eigenpairs(matrix: CoOccurrence, config: Collaborative, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the B largest eigenvalues of S, in descending order, and their eigenvectors: (B,) and float32 (M, B).

    B is num_dims + oversampling, but at most M. The method is subspace iteration with Chebyshev filters (Zhou, Saad,
    Tiago and Chelikowsky, Self-consistent-field calculations using Chebyshev-filtered subspace iteration, 2006). The
    Lanczos method needs about twice the memory and takes several times as long, because it multiplies S by one vector
    at a time.
    """
    num_rows = len(matrix.items)
    width = min(num_rows, config.num_dims + config.oversampling)
    # The transpose is in Fortran order, so each column of the block is contiguous in memory, and qr works in place.
    block = np.random.default_rng(seed).standard_normal((width, num_rows), dtype=np.float32).T
    values, block = _project(matrix, block)
    num_products = config.max_products if width < num_rows else 0  # for a square block, the projection is exact
    low = -float(matrix.diagonal.max(initial=0))  # lower bound of the eigenvalues of S; the upper bound is 1
    with Progress("cf: decompose", num_products * width, "products") as progress:
        while num_products > 0:
            # The filter damps the eigenvectors whose eigenvalues are between `low` and `cut`. `cut` is the smallest of
            # the current `values`. In the first round, the block is random, and this value may be close to `low`;
            # therefore `cut` is at least low / 2.
            before, cut = values[:config.num_dims], max(float(values[-1]), low / 2)
            # Limit the degree so that the filter amplifies the first eigenvector at most SPREAD times as much as an
            # eigenvector at the cut. Otherwise, rounding errors along the leading eigenvectors would dominate the
            # columns. `distance` is the distance from the center of the interval to the largest eigenvalue, divided by
            # half the width of the interval.
            distance = (2 * values[0] - low - cut) / (cut - low)
            degree = int(np.arccosh(SPREAD) / np.arccosh(distance)) if distance > 1 else 1
            degree = min(max(1, degree), config.filter_degree, num_products)
            for start in range(0, width, COLUMNS):
                columns = _filtered(matrix, block[:, start:start + COLUMNS], (low, cut), degree)
                block[:, start:start + COLUMNS] = columns / np.linalg.norm(columns, axis=0)
                progress.update(degree * columns.shape[1])
            num_products -= degree
            values, block = _project(matrix, block)
            if (np.abs(values[:config.num_dims] - before) < config.tolerance * np.abs(before)).all():
                break
    return values, block


def _filtered(matrix: CoOccurrence, columns: np.ndarray, interval: tuple[float, float], degree: int) -> np.ndarray:
    """Amplify the eigenvectors of S whose eigenvalues are above `interval`: (M, columns) -> (M, columns).

    The filter is a Chebyshev polynomial of S. It is scaled so that its value at 1 is 1.
    """
    low, cut = interval
    center, half = np.float32((low + cut) / 2), np.float32((cut - low) / 2)
    sigma = first_sigma = half / (1 - center)
    previous = np.ascontiguousarray(columns)
    current = (matrix.times(previous) - center * previous) * (sigma / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first_sigma - sigma)
        step = (matrix.times(current) - center * current) * (2 * following / half)
        previous, current, sigma = current, step - sigma * following * previous, following
    return current


def _project(matrix: CoOccurrence, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute approximate eigenvalues and eigenvectors of S in the span of the block: (M, B) -> (B,) and (M, B).

    The eigenvalues are in descending order. The method is the Rayleigh-Ritz projection. The block is overwritten.
    """
    block, _ = qr(block, mode="economic", overwrite_a=True, check_finite=False)
    projected = np.empty((block.shape[1], block.shape[1]))
    for start in range(0, block.shape[1], COLUMNS):
        columns = matrix.times(np.ascontiguousarray(block[:, start:start + COLUMNS]))
        projected[:, start:start + COLUMNS] = block.T @ columns
    values, rotation = np.linalg.eigh((projected + projected.T) / 2)
    rotation = rotation[:, ::-1].astype(np.float32)
    for start in range(0, len(block), ROWS):
        block[start:start + ROWS] = block[start:start + ROWS] @ rotation
    return values[::-1], block


def _scaled(values: np.ndarray, block: np.ndarray, num_dims: int) -> np.ndarray:
    """Scale the eigenvectors to get item vectors: (M, B) -> float32 (M, K), where K is at most `num_dims`.

    Each eigenvector is multiplied by the square root of its eigenvalue. Then all item vectors are scaled to a mean
    squared length of 1. The sign of an eigenvector is arbitrary, so its entry with the largest absolute value is made
    positive. The block is overwritten.
    """
    kept = min(num_dims, int((values > 1e-5 * values[0]).sum()))
    if kept < num_dims:
        log.info("cf: the vectors have only %d dimensions, because the training events do not provide more", kept)
    block = block[:, :kept]
    signs = np.sign(block[np.abs(block).argmax(axis=0), np.arange(kept)])
    block *= signs * np.sqrt(values[:kept] * len(block) / values[:kept].sum()).astype(np.float32)
    return block
