"""Beam search over existing semantic IDs, for all users of a batch at once."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .abstract_model import Recommendations

# B batch, K beams, C codebook size of a level, N items, L levels


class Trie(nn.Module):
    """The existing IDs as one table a level: (node, code) -> child node, or -1; the last level's are items."""

    def __init__(self, codes: Tensor, codebook_sizes: list[int]):
        super().__init__()
        codes = codes.cpu().numpy()
        node = np.zeros(len(codes), dtype=np.int64)  # of each item, at the current level
        for level, size in enumerate(codebook_sizes):
            child = np.arange(len(codes))
            if level < len(codebook_sizes) - 1:
                child = np.unique(node * size + codes[:, level], return_inverse=True)[1].reshape(-1)
            table = np.full((node.max() + 1, size), -1, dtype=np.int32)
            table[node, codes[:, level]] = child
            self.register_buffer(f"level_{level}", torch.from_numpy(table), persistent=False)
            node = child

    def child_nodes(self, level: int, nodes: Tensor) -> Tensor:
        """(B, K) nodes -> (B, K, C) children."""
        return self.get_buffer(f"level_{level}")[nodes]


def beam_search(step: Callable[[int, Tensor, Tensor], Tensor], trie: Trie, num_levels: int, batch_size: int,
                num_beams: int, top_k: int, device: torch.device) -> Recommendations:
    """The likeliest items, by the sum of their codes' log-probabilities.

    `step(level, codes, parents)` gets the codes (B, K) that the beams chose last and the beams (B, K)
    that they were chosen in, and returns log-probabilities (B, K, C) of the level. The first level
    has one beam, as all would be alike there.
    """
    scores = torch.zeros(batch_size, 1, device=device)
    nodes = codes = parents = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    for level in range(num_levels):
        log_probs = step(level, codes, parents)                             # (B, K, C)
        children = trie.child_nodes(level, nodes)                              # (B, K, C)
        total = (scores.unsqueeze(2) + log_probs).masked_fill(children < 0, float("-inf")).flatten(1)
        scores, best = total.topk(min(num_beams, total.shape[1]), dim=1)    # (B, K')
        size = log_probs.shape[2]
        parents, codes = best // size, best % size
        # A dead beam keeps its score of -inf; node 0 stands in for the one it lacks.
        nodes = children.flatten(1).gather(1, best).long().clamp(min=0)
    items = nodes.masked_fill(scores == float("-inf"), -1)
    missing = (batch_size, max(top_k - items.shape[1], 0))
    return Recommendations(torch.cat([items, items.new_full(missing, -1)], dim=1)[:, :top_k],
                           torch.cat([scores, scores.new_full(missing, float("-inf"))], dim=1)[:, :top_k])
