"""The weights of a count: transitions, similarities, or both in one matrix."""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from .search import Settings
from .transitions import Pairs


class Weights(NamedTuple):
    """The data from which the matrix of weights is computed. At least one of the two parts is present."""

    pairs: Pairs | None                   # None: no transitions
    similar: dict[str, sparse.csr_matrix]  # source -> (N, N) similarities of each item and its neighbours

    def matrix(self, settings: Settings) -> sparse.csr_matrix:
        """Return T + neighbour_weight * S, (N, N) float32.

        T is the transition matrix, and S has the similarities, scaled to the same sum as T. If one of the parts is
        missing or empty, the result is the other part.
        """
        similar = self.similar.get(settings.neighbours_from)
        if self.pairs is None:
            assert similar is not None
            return similar
        transitions = self.pairs.matrix(settings.pair_distance, settings.distance_decay, settings.backward,
                                        settings.source_exponent, settings.popularity_exponent)
        if similar is None or not similar.nnz or not settings.neighbour_weight:
            return transitions
        if not transitions.nnz:
            return similar
        scale = settings.neighbour_weight * transitions.sum(dtype=np.float64) / similar.sum(dtype=np.float64)
        return transitions + similar * np.float32(scale)
