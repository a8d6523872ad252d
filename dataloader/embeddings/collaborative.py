"""Step 5, --suffix cf: item vectors out of the training events alone.

Two items are alike as far as the same users took both. With A the incidence of users and items in the training
split (a repeated event counts once) and n_u the number of a user's items, the co-occurrence of two items is

    C_ij = sum over users of A_ui A_uj / (n_u - 1),    C_ii = 0

so that every event weighs 1, however long its user's history is: the row sum of C is d_i, the number of the item's
events. What is decomposed is S = (D + t)^-1/2 C (D + t)^-1/2, which takes an item's popularity out as the cosine
does. t, a share of the mean of d, is the regularization of Qin and Rohe (Regularized spectral clustering under the
degree-corrected stochastic blockmodel, NeurIPS 2013): without it the leading eigenvectors of sparse data belong to
handfuls of rare items that hang together by chance. Positive PMI, the other usual choice, needs C itself, which is
nearly dense on data like MovieLens; and on sparse data it finds the next item less often than S does.

The vectors are U sqrt(L), from the largest eigenvalues L of S (S is symmetric: where they are positive, they are its
singular values, and U its singular vectors): of all vectors of so few dimensions, those whose inner products are
nearest to S. One factor common to all makes their mean squared length 1.
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

COLUMNS = 16      # of the search's block that are multiplied with the co-occurrence matrix at once
ROWS = 65_536     # of the block that are rotated at once
SPREAD = 1e5      # how far the search may stretch the block in float32
NOISE = 1e-3      # a vector this much shorter than the others is what rounding and the search's end left of it

# U users, N items of the catalogue, M of them with a co-occurrence, B columns of the search's block, K dimensions


def item_vectors(folder: DatasetFolder, config: Collaborative, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (N, K), and bool (N,): which items have a vector. Raises DataError if no user has two training items."""
    num_items = load_meta(folder.items, folder.make_command)["num_items"]
    # No event of another split is read.
    events = duckdb.sql(f"FROM {parquet_rows(folder.interactions)}").filter("split = 'train'").project(
        '"user"::INTEGER AS "user", item::INTEGER AS item').fetchnumpy()
    users, items = np.asarray(events["user"]), np.asarray(events["item"])
    if len(items) and items.max() >= num_items:
        raise ArtifactError(folder.interactions, f"names item {items.max()}",
                            f"{folder.items.name} has {num_items}", f"{folder.make_command} --force")
    matrix = co_occurrence(users, items, config.smoothing)
    del events, users, items  # of 20 million events they are as large as the matrix
    if not len(matrix.items):
        raise DataError(folder.interactions, "no user has two different items in training", "cf is made of such pairs",
                        "leave cf out, or keep more events")
    log.info("cf: %d of %d items stand beside another one in a training history", len(matrix.items), num_items)
    values, block = leading_eigenpairs(matrix, config, seed)
    found = _scaled(values, block, config.num_dims)
    vectors, present = np.zeros((num_items, found.shape[1]), dtype=np.float32), np.zeros(num_items, dtype=bool)
    vectors[matrix.items] = found
    present[matrix.items] = np.einsum("mk,mk->m", found, found) > NOISE ** 2
    if num_faint := len(matrix.items) - int(present.sum()):
        log.info("cf: %d of them stand too far from the rest to get a vector in %d dimensions", num_faint,
                 found.shape[1])
    return vectors, present


class CoOccurrence(NamedTuple):
    """S of the items that have one, as B^T B less its diagonal: a matrix of items by items is never stored."""

    items: np.ndarray     # (M,) the rows' items, the most popular first: what is read most lies together
    incidence: csr_matrix  # B, float32 (U, M)
    diagonal: np.ndarray  # float32 (M,), of B^T B

    def times(self, columns: np.ndarray) -> np.ndarray:
        """(M, C) -> (M, C)"""
        return self.incidence.T @ (self.incidence @ columns) - self.diagonal[:, None] * columns


def co_occurrence(users: np.ndarray, items: np.ndarray, smoothing: float) -> CoOccurrence:
    """users, items: (events,). A user with a single item, and an item that only such users have, are left out."""
    num_users, num_items = (int(ids.max(initial=-1)) + 1 for ids in (users, items))
    ones = np.ones(len(users), dtype=np.float32)
    incidence = csr_matrix((ones, (users, items)), shape=(num_users, num_items))  # sums what is there twice
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
    """The largest eigenvalues (B,), falling, and their eigenvectors (M, B), float32.

    Subspace iteration from a random block, filtered by Chebyshev polynomials (Zhou, Saad, Tiago and Chelikowsky,
    Self-consistent-field calculations using Chebyshev-filtered subspace iteration, 2006). Beside the matrix it needs
    the block alone, and a few columns: Lanczos' method keeps twice as many vectors, and multiplies one at a time, which
    takes several times as long. Where the block is as wide as the matrix, the first projection is exact.
    """
    num_rows = len(matrix.items)
    width = min(num_rows, config.num_dims + config.oversampling)
    # Drawn a vector at a time; of Fortran's order, for whole columns are read and written, and qr works in place.
    block = np.random.default_rng(seed).standard_normal((width, num_rows), dtype=np.float32).T
    values, block = _project(matrix, block)
    num_products = config.max_products if width < num_rows else 0
    low = -float(matrix.diagonal.max(initial=0))  # the lower bound of the eigenvalues; the upper one is 1
    with Progress("cf: decompose", num_products * width, "products") as progress:
        while num_products > 0:
            # What the filter keeps small: all below the smallest value that was found. A first block is random, and
            # its smallest value may be near the bound; hence half of that at least.
            before, cut = values[:config.num_dims], max(float(values[-1]), low / 2)
            # A filter that makes the largest eigenvalue's part more than SPREAD times as large as those at the cut
            # would drown a column in what rounding has put of the leading vectors into it.
            distance = (2 * values[0] - low - cut) / (cut - low)  # from the interval's centre, its half being 1
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
    """Enlarge what lies above the interval by a Chebyshev polynomial of this degree, scaled to 1 at 1."""
    low, cut = interval
    centre, half = np.float32((low + cut) / 2), np.float32((cut - low) / 2)
    sigma = first_sigma = half / (1 - centre)
    previous = np.ascontiguousarray(columns)
    current = (matrix.times(previous) - centre * previous) * (sigma / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first_sigma - sigma)
        step = (matrix.times(current) - centre * current) * (2 * following / half)
        previous, current, sigma = current, step - sigma * following * previous, following
    return current


def _project(matrix: CoOccurrence, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rayleigh-Ritz: the eigenvalues (B,), falling, and -vectors (M, B) of the matrix within the block's span."""
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
    """U sqrt(L) in place, float32 (M, K), mean squared length 1; the largest entry of each column is positive."""
    kept = min(num_dims, int((values > 1e-5 * values[0]).sum()))
    if kept < num_dims:
        log.info("cf: %d dimensions, for the training events give no more", kept)
    block = block[:, :kept]
    signs = np.sign(block[np.abs(block).argmax(axis=0), np.arange(kept)])
    block *= signs * np.sqrt(values[:kept] * len(block) / values[:kept].sum()).astype(np.float32)
    return block
