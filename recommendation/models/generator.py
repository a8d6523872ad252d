"""Base class of the models that generate semantic IDs code by code."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommendation.decoding.beam_search import Step, beam_search, exact_search
from recommendation.decoding.trie import Trie

from .abstract_model import PADDING, AbstractRecommender, Catalogue, Recommendations, Windows
from .params import Params

# B batch, K beams, L levels, M model width, H heads, C codebook size of a level, J largest number of children of a node

# Standard deviation of the initial embedding. T5 uses 1.0. This suits Adafactor, which takes larger steps for
# larger parameters. The steps of AdamW do not depend on the size of the parameters. With 1.0, AdamW needs thousands of
# steps until the learned values outweigh the random initial values. On ml-100k, NDCG@10 after three epochs was .026
# with 1.0, and .038 with 0.05.
EMBEDDING_STD = 0.05
IGNORED = -100  # label of padding; the loss ignores this label
START = 0       # token for padding and for the first decoder input, as in T5
EXACT_BYTES = 2**28  # approximate memory for the logits of exact scoring; larger batches are split


class AbstractGenerator(AbstractRecommender):
    """Base class that has the token embedding, one output head per level, and the search for the best items.

    Code c of level l has the token `first_token[l] + c`.
    """

    heads: Any           # one Linear per level, with one logit per code of the level
    first_token: Tensor  # (L,) token of code 0 of each level
    tokens: Tensor       # (N + 1, L) tokens of the items; the last row is for PADDING (index -1)
    paths: Tensor        # (N + 1, L + 1) trie nodes from the root to each item; only with `normalize_over: valid_items`

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
        self.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        first_token = 1 + torch.tensor([0, *sizes[:-1]]).cumsum(0)
        tokens = torch.cat([catalogue.codes.cpu() + first_token, torch.full((1, self.num_levels), START)])
        self.register_buffer("first_token", first_token, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.trie = Trie(catalogue.codes, sizes)
        if self.normalize_over == "valid_items":  # the last row is for PADDING and is zero
            self.register_buffer("paths", F.pad(self.trie.paths(), (0, 0, 0, 1)), persistent=False)

    @torch.no_grad()
    def initialize_tokens(self) -> None:
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        for head in self.heads:
            nn.init.normal_(head.weight, std=head.in_features**-0.5)

    def code_loss(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Return the mean cross-entropy of the codes of the target items. Padding is ignored.

        hidden: (..., L, M) hidden states that predict the codes
        items: (...) target items, or PADDING
        """
        # Give padding the label IGNORED. Selecting the rows without padding would make the CPU wait for the GPU.
        labels = (self.tokens[items] - self.first_token).masked_fill((items == PADDING).unsqueeze(-1), IGNORED)
        hidden, labels = hidden.flatten(0, -3), labels.flatten(0, -2)
        logits = [head(hidden[:, level]) for level, head in enumerate(self.heads)]
        if self.normalize_over == "valid_items":
            paths = self.paths[items.flatten()]
            of_levels = [self._loss_over_valid_items(level, of_level, paths[:, level:level + 2], labels[:, level])
                         for level, of_level in enumerate(logits)]
            return torch.stack(of_levels).mean()
        return torch.stack([F.cross_entropy(of_level, labels[:, level], ignore_index=IGNORED,
                                            label_smoothing=self.label_smoothing)
                            for level, of_level in enumerate(logits)]).mean()

    def _loss_over_valid_items(self, level: int, logits: Tensor, path: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy at one level. The softmax is over the codes that can follow each prefix.

        logits: (T, C), where T is the number of targets
        path: (T, 2) the trie node of each target's prefix, and the trie node of the prefix extended by the label
        labels: (T,) codes of the targets at this level, or IGNORED for padding
        """
        codes, children, exists = (part[0] for part in self.trie.children_of(level, path[None, :, 0]))  # (T, J)
        # Use float32, as autocast does for F.cross_entropy in a bfloat16 step.
        logs = logits.gather(1, codes).float().masked_fill(~exists, float("-inf")).log_softmax(dim=1)
        losses = -logs.masked_fill(~exists | (children != path[:, 1:]), 0).sum(dim=1)
        if self.label_smoothing:
            uniform = -logs.masked_fill(~exists, 0).sum(dim=1) / exists.sum(dim=1)
            losses = torch.lerp(losses, uniform, self.label_smoothing)
        counted = labels != IGNORED
        return (losses * counted).sum() / counted.sum()

    @abstractmethod
    def start_decoding(self, histories: Windows) -> Step:
        """Run the model on the histories, and return a function that computes the logits of one level at a time."""

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self._search(histories, None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self._search(histories, seen, top_k)

    def _search(self, histories: Windows, seen: Tensor | None, top_k: int) -> Recommendations:
        valid_only = self.normalize_over == "valid_items"
        if self.scoring == "beam":
            return beam_search(self.start_decoding(histories), self.trie, len(histories.items),
                               max(self.num_beams, top_k), top_k, valid_only, seen)
        rows = max(EXACT_BYTES // (4 * len(self.trie.items) * max(self.catalogue.codebook_sizes)), 1)
        parts = [exact_search(self.start_decoding(Windows(histories.items[part], histories.lengths[part])), self.trie,
                              len(histories.items[part]), top_k, valid_only, None if seen is None else seen[part])
                 for part in (slice(start, start + rows) for start in range(0, len(histories.items), rows))]
        return Recommendations(*map(torch.cat, zip(*parts, strict=True)))


class PrefixCache:
    """A cache of the attention keys and values of the tokens in the beams, for one layer."""

    def __init__(self) -> None:
        # The key and the value of each position, (B, K, H, head width) each. K is 1 if all beams share the position.
        # Each position has separate tensors, so reordering the beams copies whole rows, and copies no shared position.
        self.levels: list[tuple[Tensor, Tensor]] = []

    def extend(self, key: Tensor, value: Tensor, parents: Tensor) -> None:
        """Reorder the cache to match the new beams, and add the keys and values of the newest position.

        key, value: (B, H, K, head width)
        parents: (B, K) for each beam, the index of its parent beam in the previous step
        """
        if self.levels:
            num_before = self.levels[-1][0].shape[1]
            row = parents + num_before * torch.arange(len(parents), device=parents.device).unsqueeze(1)
            self.levels = [(_rows(old_key, row), _rows(old_value, row)) for old_key, old_value in self.levels]
        self.levels.append((key.transpose(1, 2), value.transpose(1, 2)))

    def scores(self, query: Tensor) -> Tensor:
        """Return the inner products of each beam's query with the keys of the same beam.

        The shapes are (B, H, K, head width) -> (B, H, K, positions).
        """
        query = query.transpose(1, 2)
        return torch.stack([(query * key).sum(dim=-1) for key, _ in self.levels], dim=-1).transpose(1, 2)

    def mix(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of each beam's values: weights (B, H, K, positions) -> (B, K, H, head width)."""
        first, *others = weights.transpose(1, 2).unsqueeze(-1).unbind(dim=3)            # (B, K, H, 1) each
        mixed = first * self.levels[0][1]
        for weight, (_, value) in zip(others, self.levels[1:], strict=True):
            mixed = mixed.addcmul(weight, value)
        return mixed


def _rows(part: Tensor, row: Tensor) -> Tensor:
    """Return the entry of `part` for each new beam: (B, old beams, H, head width) -> (B, K, H, head width).

    A new beam gets the entry of the old beam that it extends. If there is one old beam per user, `part` is returned
    unchanged.

    row: (B, K) for each new beam, the number of the old beam; the old beams of the whole batch are numbered from 0
    """
    if part.shape[1] == 1:
        return part
    return part.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, *part.shape[2:])
