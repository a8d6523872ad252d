"""Base class of the models that generate semantic IDs code by code."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommendation.decoding.beam_search import Step, beam_search, exact_scores
from recommendation.decoding.top_k import Prior
from recommendation.decoding.trie import Trie

from .abstract_model import PADDING, AbstractRecommender, Catalogue, Recommendations, Windows, top_items
from .layers import IGNORED, masked_cross_entropy, masked_distribution_loss, missing_codes
from .params import Params

# B batch, K beams, L levels, M model width, H heads, C size of the largest codebook, P targets, G targets of a row,
# N items, J largest number of children of a node

# Standard deviation of the initial embedding. T5 uses 1.0. This suits Adafactor, which takes larger steps for
# larger parameters. The steps of AdamW do not depend on the size of the parameters. With 1.0, AdamW needs thousands of
# steps until the learned values outweigh the random initial values. On ml-100k, NDCG@10 after three epochs was .026
# with 1.0, and .038 with 0.05.
EMBEDDING_STD = 0.05
START = 0  # token for padding and for the first decoder input, as in T5
EXACT_BYTES = 2**28  # approximate memory for the logits of exact scoring; larger batches are split


class AbstractGenerator(AbstractRecommender):
    """Base class that has the token embedding, one output head per level, and the search for the best items.

    Code c of level l has the token `first_token[l] + c`.
    """

    heads: Tensor        # (L, C, M) output weights of the codes; the rows of codes that do not exist are zero
    first_token: Tensor  # (L,) token of code 0 of each level
    level: Tensor        # (L, 1) numbers from 0
    tokens: Tensor       # (L, N + 1) tokens of the items; the last column is for PADDING (index -1)
    inputs: Tensor       # (L, N + 1) decoder inputs of the items: START, and the tokens of all levels except the last
    labels: Tensor       # (L, N + 1) codes of the items, and IGNORED for PADDING
    prefixes: Tensor     # (L, N + 1) number of the prefix of each item before the level; -1 for PADDING
    missing: Tensor | None  # (L, 1, C) bool, the codes that do not exist; None if all codebooks have the same size

    # See `Trie.siblings`.
    sibling_codes: Tensor  # codes of all nodes of the trie
    sibling_leaves: Tensor  # (2, nodes) the first leaf below each of these nodes, and the leaf after the last one
    siblings: Tensor       # (3, L, N + 1) children of the prefixes of each item; the last column is for PADDING
    child: Tensor          # (J,) numbers from 0

    def __init__(self, config: dict, catalogue: Catalogue, name: str):
        super().__init__(config, catalogue)
        assert catalogue.codes is not None
        params = Params(config, name)
        self.label_smoothing = config[name]["training_params"]["label_smoothing"]
        self.num_beams = params.count("num_beams")
        self.scoring = params.choice("scoring", "beam", "exact")
        self.normalize_over = params.choice("normalize_over", "codebook", "valid_items")
        sizes, width = catalogue.codebook_sizes, params.count("d_model")
        self.num_levels = len(sizes)
        self.embedding = nn.Embedding(1 + sum(sizes), width)
        # One product computes the logits of all levels.
        self.heads = nn.Parameter(torch.zeros(self.num_levels, max(sizes), width))
        first_token = 1 + torch.tensor([0, *sizes[:-1]]).cumsum(0)
        codes = catalogue.codes.cpu().T                                                        # (L, N)
        self.register_buffer("first_token", first_token, persistent=False)
        tokens = F.pad(codes + first_token.unsqueeze(1), (0, 1), value=START)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("inputs", F.pad(tokens[:-1], (0, 0, 1, 0), value=START), persistent=False)
        self.register_buffer("level", torch.arange(self.num_levels).unsqueeze(1), persistent=False)
        self.register_buffer("labels", F.pad(codes, (0, 1), value=IGNORED), persistent=False)
        missing = missing_codes(sizes)
        self.register_buffer("missing", missing if missing is None else missing.unsqueeze(1), persistent=False)
        self.trie = Trie(catalogue.codes, sizes)
        prefixes = self.trie.paths()[:, :-1].T.contiguous()
        self.register_buffer("prefixes", F.pad(prefixes, (0, 1), value=-1), persistent=False)
        self._register_siblings()

    def _register_siblings(self) -> None:
        """Register the tables of the children of each prefix (see `Trie.siblings`)."""
        codes, siblings = self.trie.siblings()
        # Padding gets the label IGNORED, and one existing code, because a softmax over no codes would give NaN.
        padding = torch.tensor([0, 1, IGNORED])[:, None, None].expand(-1, self.num_levels, 1)
        self.register_buffer("sibling_codes", codes, persistent=False)
        self.register_buffer("siblings", torch.cat([siblings, padding.int()], dim=2), persistent=False)
        self.register_buffer("child", torch.arange(max(self.trie.max_children)), persistent=False)

    @torch.no_grad()
    def initialize_tokens(self) -> None:
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        for head, size in zip(self.heads, self.catalogue.codebook_sizes, strict=True):
            nn.init.normal_(head[:size], std=head.shape[1]**-0.5)

    def code_loss(self, hidden: Tensor, items: Tensor, distributions: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the mean cross-entropy of the codes of the target items. Padding is ignored.

        hidden: (L, P, M) hidden states that predict the codes, given the codes of `items` at the levels before
        items: (P,) target items, or PADDING
        distributions: a distribution of the target for each column, as items and their probabilities. The target of a
            level is then a distribution: of the codes of those items that have the prefix of `items`.
        """
        if distributions is not None:
            return self._distribution_loss(hidden, items, *(part.flatten(0, -2) for part in distributions))
        # Padding has the label IGNORED. Selecting the targets without padding would make the CPU wait for the GPU.
        logits, missing, labels = self.logits(hidden), self.missing, self.labels[:, items]
        if self.normalize_over == "valid_items":
            first, num_children, labels = self.siblings[:, :, items].long()                    # (L, P) each
            logits = logits.gather(2, self.sibling_codes[first.unsqueeze(2) + self.child])     # (L, P, J)
            missing = self.child >= num_children.unsqueeze(2)
        return masked_cross_entropy(logits, labels, missing, self.label_smoothing)

    def _distribution_loss(self, hidden: Tensor, items: Tensor, likely: Tensor, shares: Tensor) -> Tensor:
        """likely, shares: (P, K) items of each distribution and their probabilities"""
        same_prefix = self.prefixes[:, likely] == self.prefixes[:, items].unsqueeze(2)         # (L, P, K)
        # With bfloat16, the logits need the type of the labels.
        logits, missing = self.logits(hidden).to(shares), self.missing                         # (L, P, C)
        labels = torch.zeros_like(logits).scatter_add(2, self.labels[:, likely], shares * same_prefix)
        labels = labels / labels.sum(dim=2, keepdim=True).clamp(min=1e-30)
        if self.normalize_over == "valid_items":
            first, num_children, _ = self.siblings[:, :, items].long()                         # (L, P) each
            codes = self.sibling_codes[first.unsqueeze(2) + self.child]                        # (L, P, J)
            missing = self.child >= num_children.unsqueeze(2)
            logits, labels = logits.gather(2, codes), labels.gather(2, codes).masked_fill(missing, 0.0)
        return masked_distribution_loss(logits, labels, items != PADDING, missing, self.label_smoothing)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of all levels: (L, P, M) -> (L, P, C). The logits of codes that do not exist are 0."""
        return torch.bmm(hidden, self.heads.transpose(1, 2))

    def level_logits(self, level: int, hidden: Tensor) -> Tensor:
        """Return the logits of one level for beams: (K, B, M) -> (B, K, codebook size of the level)."""
        return F.linear(hidden, self.heads[level, :self.catalogue.codebook_sizes[level]]).transpose(0, 1)

    @abstractmethod
    def start_decoding(self, histories: Windows) -> Step:
        """Run the model on the histories, and return a function that computes the logits of one level at a time."""

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self._search(histories, None, None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self._search(histories, None, seen, top_k)

    def recommend_with_prior(self, histories: Windows, prior: Prior, seen: Tensor | None,
                             top_k: int) -> Recommendations:
        return self._search(histories, prior, seen, top_k)

    def _search(self, histories: Windows, prior: Prior | None, seen: Tensor | None, top_k: int) -> Recommendations:
        if self.scoring == "beam":
            return beam_search(self.start_decoding(histories), self.trie, len(histories.items),
                               max(self.num_beams, top_k), top_k, self.normalize_over == "valid_items", seen, prior)
        scores = self.score_items(histories)
        return top_items(scores if prior is None else scores + prior.added(), top_k, seen)

    def score_items(self, histories: Windows) -> Tensor:
        rows = max(EXACT_BYTES // (4 * len(self.trie.items) * max(self.catalogue.codebook_sizes)), 1)
        return torch.cat([
            exact_scores(self.start_decoding(Windows(items, lengths)), self.trie, len(items),
                         self.normalize_over == "valid_items")
            for items, lengths in zip(histories.items.split(rows), histories.lengths.split(rows), strict=True)])


class PrefixCache:
    """A cache of the attention keys and values of the tokens in the beams, for one layer."""

    def __init__(self) -> None:
        # The key and the value of each position, (K, B, H, head width) each. K is 1 if all beams share the position.
        # Each position has separate tensors, so reordering the beams copies whole rows, and copies no shared position.
        self.levels: list[tuple[Tensor, Tensor]] = []

    def extend(self, key: Tensor, value: Tensor, parents: Tensor) -> None:
        """Reorder the cache to match the new beams, and add the keys and values of the newest position.

        key, value: (B, H, K, head width)
        parents: (B, K) for each beam, the index of its parent beam in the previous step
        """
        if self.levels:
            row = parents.T * len(parents) + torch.arange(len(parents), device=parents.device)
            self.levels = [(_rows(old_key, row), _rows(old_value, row)) for old_key, old_value in self.levels]
        self.levels.append((key.permute(2, 0, 1, 3).contiguous(), value.permute(2, 0, 1, 3).contiguous()))

    def scores(self, query: Tensor) -> Tensor:
        """Return the inner products of each beam's query with the keys of the same beam.

        The shapes are (B, H, K, head width) -> (B, H, K, positions).
        """
        query = query.permute(2, 0, 1, 3)
        return torch.stack([(query * key).sum(dim=-1) for key, _ in self.levels], dim=-1).permute(1, 2, 0, 3)

    def mix(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of each beam's values: weights (B, H, K, positions) -> (K, B, H, head width)."""
        first, *others = weights.permute(2, 0, 1, 3).unsqueeze(-1).unbind(dim=3)        # (K, B, H, 1) each
        mixed = first * self.levels[0][1]
        for weight, (_, value) in zip(others, self.levels[1:], strict=True):
            mixed = mixed.addcmul(weight, value)
        return mixed


def _rows(part: Tensor, row: Tensor) -> Tensor:
    """Return the entry of `part` for each new beam: (old beams, B, H, head width) -> (K, B, H, head width).

    A new beam gets the entry of the old beam that it extends. If there is one old beam per user, `part` is returned
    unchanged.

    row: (K, B) for each new beam, the number of the old beam; the old beams of the whole batch are numbered from 0
    """
    if part.shape[0] == 1:
        return part
    return part.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, *part.shape[2:])
