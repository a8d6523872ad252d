"""Beam search for the items with the most likely semantic IDs, and the exact scores of all items."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recommendation.decoding.top_k import Prior, Recommendations, in_order
from recommendation.decoding.trie import Trie

# B batch, K beams, C codebook size of the level, J largest number of children of a node of the level,
# P nodes of the level, N items, S largest number of seen items in a history

Step = Callable[[int, Tensor, Tensor], Tensor]
"""A function that runs the model for one level of the search.

`step(level, codes, parents)` returns the logits of all C codes of the level, for each of the K beams: (B, K, C).

codes: (B, K) the last code of each beam
parents: (B, K) for each beam, the index of its parent beam in the previous step

At the first level, K is 1.
"""


class Beams(NamedTuple):
    """The current beams of a search. Each beam is a prefix of a semantic ID. All tensors have the shape (B, K)."""

    scores: Tensor   # sums of the model's log-probabilities; -inf if no item has the prefix
    nodes: Tensor    # nodes of the prefixes in the trie
    codes: Tensor    # last codes of the prefixes
    parents: Tensor  # for each beam, the index of its parent beam in the previous step


def beam_search(step: Step, trie: Trie, batch_size: int, num_beams: int, top_k: int,
                valid_only: bool = False, seen: Tensor | None = None, prior: Prior | None = None) -> Recommendations:
    """Search with `num_beams` beams for the `top_k` most likely items of each history.

    The score of an item is the sum of the log-probabilities of its codes. With a prior, the weighted log-probability
    of the item under the prior is added (see `prefix_values` for the prefixes).

    valid_only: if True, the probabilities of the codes that lead to valid items sum to 1; if False, the probabilities
        of all codes of the codebook sum to 1
    seen: (B, S) items to exclude; the scores of the other items do not change
    """
    # If only one item has a prefix, the remaining codes of this item have probability 1 with `valid_only`. They need no
    # call of `step`.
    root = torch.zeros(batch_size, 1, dtype=torch.int64, device=trie.items.device)
    leaves = None if seen is None else trie.leaves_of(seen)
    beams = Beams(_mask_seen(root.float(), trie, 0, root, leaves), root, root, root)
    masses = [] if prior is None else prefix_values(trie, prior, seen)
    added = None if prior is None else prior.added()

    def total(level: int, beams: Beams) -> Tensor:
        if added is None:
            return beams.scores
        if level < trie.num_levels:
            return beams.scores + masses[level].gather(1, beams.nodes)
        return beams.scores + added.gather(1, trie.items_of(beams.nodes))

    for level in range(trie.num_levels):
        if valid_only:
            beams, settled = _split(trie, level, beams)
            candidates = Beams(*(torch.cat(both, dim=1) for both in
                                 zip(_extend(step, trie, level, beams, True, leaves), settled, strict=True)))
        else:
            candidates = _extend(step, trie, level, beams, False, leaves)
        scores, best = total(level + 1, candidates).topk(min(num_beams, candidates.scores.shape[1]), dim=1)
        beams = Beams(*(part.gather(1, best) for part in candidates))
    items = trie.items_of(beams.nodes).masked_fill(beams.scores == float("-inf"), -1)
    return in_order(items, scores, top_k)


def prefix_values(trie: Trie, prior: Prior, seen: Tensor | None) -> list[Tensor]:
    """Return what a search adds to the score of each prefix, for each level but the last: (B, P) each.

    With a weight w of at most 1, this is w times the log-probability of all unseen items below the prefix. With a
    larger weight, it is the logarithm of the sum of p^w over these items, which is close to the value of the best item.
    There, w * log(sum of p) would prefer prefixes of many items, and a beam would lose good items.
    """
    power = prior.weight.clamp(min=1.0)
    masses = trie.log_masses(power * prior.log_probabilities, seen)
    return [prior.weight / power * mass for mass in masses]


def _mask_seen(scores: Tensor, trie: Trie, level: int, nodes: Tensor, leaves: Tensor | None) -> Tensor:
    """Set the score of a node to -inf if all items below the node are seen.

    leaves: (B, S + 1) leaves of the seen items, from `Trie.leaves_of`; None if no item is excluded
    """
    return scores if leaves is None else scores.masked_fill(trie.all_masked(level, nodes, leaves), float("-inf"))


def _extend(step: Step, trie: Trie, level: int, beams: Beams, valid_only: bool, leaves: Tensor | None) -> Beams:
    """Extend every beam by each code that can follow it: (B, K) -> (B, K * J)."""
    if not beams.nodes.shape[1]:
        return beams
    logits = step(level, beams.codes, beams.parents)
    codes, children, exists = trie.children_of(level, beams.nodes)
    scores = logits.gather(2, codes).masked_fill(~exists, float("-inf"))
    scores = scores.log_softmax(dim=2) if valid_only else scores - logits.logsumexp(dim=2, keepdim=True)
    parents = torch.arange(codes.shape[1], device=codes.device).view(1, -1, 1).expand_as(codes)
    longer = Beams(*(part.flatten(1) for part in (beams.scores.unsqueeze(2) + scores, children, codes, parents)))
    return longer._replace(scores=_mask_seen(longer.scores, trie, level + 1, longer.nodes, leaves))


def _split(trie: Trie, level: int, beams: Beams) -> tuple[Beams, Beams]:
    """Split the beams into open beams and settled beams. A beam is settled if only one item has its prefix.

    Return the open beams, and the settled beams extended by the next code of their item. Unused entries in both results
    have the score -inf.
    """
    is_open = ~trie.has_single_item(level, beams.nodes) & (beams.scores > float("-inf"))
    settled = Beams(beams.scores.masked_fill(is_open, float("-inf")), trie.first_child(level, beams.nodes),
                    *(torch.zeros_like(beams.nodes),) * 2)
    order = is_open.long().argsort(dim=1, descending=True, stable=True)[:, :int(is_open.sum(dim=1).max())]
    opened = beams._replace(scores=beams.scores.masked_fill(~is_open, float("-inf")))
    return Beams(*(part.gather(1, order) for part in opened)), settled


def exact_scores(step: Step, trie: Trie, batch_size: int, valid_only: bool = False) -> Tensor:
    """Return the exact score of every item: (B, N).

    The arguments are those of `beam_search`. `step` is called with all prefixes of the trie as beams.
    """
    codes = parents = torch.zeros(1, dtype=torch.int64, device=trie.items.device)
    scores = torch.zeros(batch_size, 1, device=codes.device)                            # (B, P)
    for level in range(trie.num_levels):
        logits = step(level, codes.expand(batch_size, -1), parents.expand(batch_size, -1))  # (B, P, C)
        codes, parents = trie.level(level)                                  # (P,) one per node of the next level
        chosen = logits[:, parents, codes]
        if valid_only:
            index = parents.expand(batch_size, -1)
            top = chosen.new_full(scores.shape, float("-inf")).scatter_reduce(1, index, chosen, "amax")
            shares = (chosen - top[:, parents]).exp()
            total = torch.zeros_like(top).scatter_add(1, index, shares).log() + top
        else:
            total = logits.logsumexp(dim=2)
        scores = scores[:, parents] + chosen - total[:, parents]
    by_item = torch.empty_like(scores)
    by_item[:, trie.items.long()] = scores
    return by_item
