"""Step 5, --suffix cf: item vectors computed from the training events only.

Two items are similar if the same users have interacted with both. Let A be the user-item matrix of the training split
(1 if the user has an event with the item, else 0), and n_u the number of items of user u. The co-occurrence of two
items is

    C_ij = sum over users of A_ui A_uj / (n_u - 1),    C_ii = 0

The factor gives every event the weight 1, however long the user's history is: the sum of row i is d_i, the number of
events of item i. The matrix that is decomposed is

    S = (D + t)^-1/2 C (D + t)^-1/2,    D = diag(d)

The scaling removes the effect of popularity, like cosine similarity. The regularization t is a fraction of the mean of
d (Qin and Rohe, Regularized spectral clustering under the degree-corrected stochastic blockmodel, NeurIPS 2013).
Without it, the leading eigenvectors of sparse data represent small groups of rare items that co-occur by chance.
Positive PMI, the other common choice, needs C itself, which is nearly dense on data such as MovieLens; on sparse data,
it predicts the next item less well than S.

The vectors are the rows of U sqrt(L), where L are the largest eigenvalues of S and U their eigenvectors. Among all
vectors with so many dimensions, their inner products approximate S best. (S is symmetric; its positive eigenvalues are
also singular values, and their eigenvectors are singular vectors.) All vectors are multiplied by one common factor,
which makes their mean squared length 1.
"""

import logging
from typing import NamedTuple

import duckdb
import numpy as np
from scipy.linalg import qr
from scipy.sparse import csr_matrix

from common.artifacts import DatasetFolder, load_meta
from common.errors import ArtifactError, DataError
from common.progress import Progress
from common.tables import parquet_rows
from dataloader.options import Collaborative

log = logging.getLogger(__name__)

COLUMNS = 16      # columns of the block multiplied with S at once
ROWS = 65_536     # rows of the block rotated at once
SPREAD = 1e5      # maximum ratio between the amplifications of two eigenvectors by the filter (float32)
NOISE = 1e-3      # minimum length of a vector; shorter ones consist of rounding and convergence errors

# U users, N items of the dataset, M items that co-occur with another item, B columns of the block, K dimensions


def item_vectors(folder: DatasetFolder, config: Collaborative, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the item vectors, float32 (N, K), and a mask, bool (N,), of the items that have one.

    Raises DataError if no user has two different training items, and ArtifactError if an event has an unknown item.
    """
    num_items = load_meta(folder.items, folder.make_command)["num_items"]
    # Read only the training events; the others must not influence the vectors.
    events = duckdb.sql(f"FROM {parquet_rows(folder.interactions)}").filter("split = 'train'").project(
        '"user"::INTEGER AS "user", item::INTEGER AS item').fetchnumpy()
    users, items = np.asarray(events["user"]), np.asarray(events["item"])
    if len(items) and items.max() >= num_items:
        raise ArtifactError(folder.interactions, f"contains item {items.max()}",
                            f"{folder.items.name} has only {num_items} items", f"{folder.make_command} --force")
    matrix = co_occurrence(users, items, config.smoothing)
    del events, users, items  # for 20 million events, these arrays need as much memory as the matrix
    if not len(matrix.items):
        raise DataError(folder.interactions, "no user has two different items in the training split",
                        "The embedding cf is computed from such pairs of items", "leave cf out, or keep more events")
    log.info("cf: %d of %d items co-occur with another item in a training history", len(matrix.items), num_items)
    values, block = leading_eigenpairs(matrix, config, seed)
    found = _scaled(values, block, config.num_dims)
    vectors, present = np.zeros((num_items, found.shape[1]), dtype=np.float32), np.zeros(num_items, dtype=bool)
    vectors[matrix.items] = found
    present[matrix.items] = np.einsum("mk,mk->m", found, found) > NOISE ** 2
    if num_faint := len(matrix.items) - int(present.sum()):
        log.info("cf: %d of these items get no vector, because their vectors in %d dimensions are nearly 0", num_faint,
                 found.shape[1])
    return vectors, present


class CoOccurrence(NamedTuple):
    """The matrix S (M, M) of the items that co-occur, stored as B (U, M): S is B^T B without its diagonal."""

    items: np.ndarray     # (M,) the item of each row; the most popular ones first, for memory locality
    incidence: csr_matrix  # B, float32 (U, M)
    diagonal: np.ndarray  # float32 (M,), the diagonal of B^T B

    def times(self, columns: np.ndarray) -> np.ndarray:
        """Multiply S by columns: (M, C) -> (M, C)."""
        return self.incidence.T @ (self.incidence @ columns) - self.diagonal[:, None] * columns


def co_occurrence(users: np.ndarray, items: np.ndarray, smoothing: float) -> CoOccurrence:
    """Build S from the training events. users, items: (num_events,).

    Users with a single item are left out, and so are the items that only such users have.
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
    """Compute the largest eigenvalues (B,) of S, in descending order, and their eigenvectors (M, B), float32.

    The method is subspace iteration from a random block of vectors, filtered by Chebyshev polynomials (Zhou, Saad,
    Tiago and Chelikowsky, Self-consistent-field calculations using Chebyshev-filtered subspace iteration, 2006). Its
    memory is the matrix, the block and a few columns. The Lanczos method stores twice as many vectors and multiplies
    one vector at a time, which takes several times as long. If the block is as wide as the matrix, the first projection
    is exact.
    """
    num_rows = len(matrix.items)
    width = min(num_rows, config.num_dims + config.oversampling)
    # The transpose gives Fortran order: whole columns are read and written, and qr works in place.
    block = np.random.default_rng(seed).standard_normal((width, num_rows), dtype=np.float32).T
    values, block = _project(matrix, block)
    num_products = config.max_products if width < num_rows else 0
    low = -float(matrix.diagonal.max(initial=0))  # lower bound of the eigenvalues; the upper bound is 1
    with Progress("cf: decompose", num_products * width, "products") as progress:
        while num_products > 0:
            # The filter damps the eigenvalues between `low` and `cut`, the smallest value found so far. In the first
            # round, the block is random and this value may be close to `low`, so `cut` is at least low / 2.
            before, cut = values[:config.num_dims], max(float(values[-1]), low / 2)
            # Limit the degree so that the filter amplifies the largest eigenvalue at most SPREAD times as much as
            # those at the cut. Otherwise, rounding errors along the leading eigenvectors would dominate the columns.
            distance = (2 * values[0] - low - cut) / (cut - low)  # from the center of the interval, in half widths
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
    """Amplify the eigenvectors above `interval` with a Chebyshev polynomial of this degree, scaled to be 1 at 1."""
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
    """Return the eigenvalues (B,), in descending order, and eigenvectors (M, B) of S within the span of the block.

    This is the Rayleigh-Ritz projection; it overwrites the block.
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
    """Return U sqrt(L), float32 (M, K), scaled to mean squared length 1, computed in place.

    The sign of each column makes its largest entry positive.
    """
    kept = min(num_dims, int((values > 1e-5 * values[0]).sum()))
    if kept < num_dims:
        log.info("cf: only %d dimensions, because the training events do not give more", kept)
    block = block[:, :kept]
    signs = np.sign(block[np.abs(block).argmax(axis=0), np.arange(kept)])
    block *= signs * np.sqrt(values[:kept] * len(block) / values[:kept].sum()).astype(np.float32)
    return block
