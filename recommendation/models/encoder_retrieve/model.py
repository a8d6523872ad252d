"""RPG (Hou et al. 2025, arXiv 2506.05781), a model that predicts all codes of the next item at the same time."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.progress import Progress
from recommendation.decoding.top_k import Prior, in_order, in_row

from ..abstract_model import PADDING, AbstractRecommender, Catalogue, Recommendations, Windows, top_items
from ..attention_bias import causal_bias
from ..item_loss import item_loss
from ..layers import (
    IGNORED,
    FeedForward,
    RMSNorm,
    SelfAttention,
    dropout,
    initialize,
    masked_cross_entropy,
    missing_codes,
    stack,
)
from ..params import Params

# B batch, W length of the longest window, P positions, M model width, L levels, C size of the largest codebook,
# N items, K beams, G neighbors of an item in the graph

ROW_BYTES = 2**28  # maximum memory for similarities while the graph is built
CACHED_ROWS = 64   # maximum items per step on the CPU; such small steps fit into the CPU cache and are twice as fast


class EncoderRetrieve(AbstractRecommender):
    """Causal self-attention over the items of a history, with one output head for each level of the next semantic ID.

    The input vector of an item is the sum of the codewords of its semantic ID. The logits of a head are the
    similarities between the output of the head and the codewords of the level. The score of an item is the sum of
    the logits or log-probabilities of its codes.

    `normalize_over: codebook` is the loss of RPG. It has a separate softmax over the codes of each level.
    `normalize_over: valid_items` uses one softmax over the scores of all items. It computes a score for
    every item and target, so use it only for catalogues of up to a few hundred thousand items.

    `scoring: exact` scores all items. `scoring: graph` walks through a graph that connects similar items, and scores
    only the items that the walk reaches. The walk starts at random items and at the newest items of the history. Each
    hop goes from the `num_beams` best items to the `num_neighbours` neighbors of each of these items. The
    evaluations during the training do not use the graph.
    """

    training_unit: Literal["sequence"] = "sequence"
    rows: Tensor    # (N, L) for each code of an item, the row in `codewords`
    labels: Tensor  # (N + 1, L) codes of the items, and IGNORED for PADDING
    missing: Tensor | None  # (L, C) bool, the codes that do not exist; None if all codebooks have the same size

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        assert catalogue.codes is not None
        params, training = Params(config, "encoder_retrieve"), config["encoder_retrieve"]["training_params"]
        self.label_smoothing, self.dropout = training["label_smoothing"], params.share("dropout")
        self.temperature = params.positive("temperature")
        self.scoring = params.choice("scoring", "exact", "graph")
        self.normalize_over = params.choice("normalize_over", "codebook", "valid_items")
        self.num_beams, self.num_hops = params.count("num_beams"), params.count("num_hops")
        self.num_neighbours = min(params.count("num_neighbours"), catalogue.num_items)
        (width, num_heads), sizes = params.heads(), catalogue.codebook_sizes
        self.num_levels, self.num_codes = len(sizes), max(sizes)
        self.codewords = nn.Embedding(self.num_levels * self.num_codes, width)
        self.positions = nn.Embedding(training["max_history"], width)
        self.layers = stack(params.count("num_layers"), lambda: (
            SelfAttention(width, num_heads, width // num_heads, self.dropout),
            FeedForward(width, params.count("d_ff"), self.dropout)))
        self.norm = RMSNorm(width)
        self.heads = nn.Parameter(torch.empty(self.num_levels, width, width))
        initialize(self, width, width // num_heads)
        for weight in (self.codewords.weight, self.heads):
            nn.init.normal_(weight, std=width**-0.5)
        # At the start, items should matter more than their positions.
        nn.init.normal_(self.positions.weight, std=0.1 * width**-0.5)
        # The codeword of code c of level l is row l * C + c. C is the same for all levels, so that one matrix product
        # computes the logits of all heads.
        rows = catalogue.codes.cpu() + torch.arange(self.num_levels) * self.num_codes
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("labels", F.pad(catalogue.codes.cpu(), (0, 0, 0, 1), value=IGNORED), persistent=False)
        self.register_buffer("missing", missing_codes(sizes), persistent=False)
        self.graph: Tensor | None = None  # (N, G), built by `prepare`

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return the mean cross-entropy of all items except the first item of each window.

        With `normalize_over: codebook`, this is the mean cross-entropy of the codes of these items.
        """
        hidden = self._read(windows.items.T[:-1])                        # (W - 1, B, M)
        predicted = self._predict(hidden.flatten(0, 1))                  # (L, P, M)
        if self.normalize_over == "valid_items":
            # With the positions last, all steps of the sum over codes read and write whole rows.
            logits = self._directions() @ predicted.transpose(1, 2)      # (L, C, P)
            scores = self._sum_over_codes(logits.float().flatten(0, 1))  # bfloat16 is too inexact for sums
            scores = scores.T.unflatten(0, hidden.shape[:2])
            return {"loss_total": item_loss(scores, windows, self.label_smoothing)}
        logits = predicted @ self._directions().transpose(1, 2)          # (L, P, C)
        labels = self.labels[windows.next_items().T.flatten()].T
        missing = None if self.missing is None else self.missing.unsqueeze(1)
        return {"loss_total": masked_cross_entropy(logits, labels, missing, self.label_smoothing)}

    def _read(self, items: Tensor) -> Tensor:
        """Return the hidden state at each position: (W, B) items -> (W, B, M)."""
        rows = self.rows[items.clamp(min=0)]
        x = F.embedding_bag(rows.flatten(0, 1), self.codewords.weight, mode="sum").view(*items.shape, -1)
        x = dropout(x + self.positions.weight[:len(items)].unsqueeze(1), self.dropout, self.training)
        bias = causal_bias(len(items), items.device)  # also hides the padding, which comes after all items
        for attention, feed_forward in self.layers:
            x = feed_forward(attention(x, bias))
        return dropout(self.norm(x), self.dropout, self.training)

    def _predict(self, hidden: Tensor) -> Tensor:
        """Return the output of each head, (P, M) -> (L, P, M).

        Its product with the direction of a codeword is the logit of the code: the cosine similarity of the two, divided
        by the temperature.
        """
        by_level = self.heads.permute(1, 0, 2).flatten(1)                                      # (M, L * M)
        predicted = (hidden @ by_level).unflatten(1, (self.num_levels, -1)).transpose(0, 1)
        return F.normalize(predicted, dim=-1) / self.temperature

    def _directions(self) -> Tensor:
        """Return all codewords, each scaled to length 1: (L, C, M)."""
        return F.normalize(self.codewords.weight, dim=-1).view(self.num_levels, self.num_codes, -1)

    def score_items(self, histories: Windows) -> Tensor:
        scores = self._sum_over_codes(self._values(histories)).T
        return scores.log_softmax(dim=1) if self.normalize_over == "valid_items" else scores

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self._best(histories, None, None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self._best(histories, None, seen, top_k)

    def recommend_with_prior(self, histories: Windows, prior: Prior, seen: Tensor | None,
                             top_k: int) -> Recommendations:
        return self._best(histories, prior.added(), seen, top_k)

    def _best(self, histories: Windows, added: Tensor | None, seen: Tensor | None, top_k: int) -> Recommendations:
        if self.graph is not None:
            return self._walk(self.graph, histories, added, seen, top_k)
        scores = self.score_items(histories)
        return top_items(scores if added is None else scores + added, top_k, seen)

    def _values(self, histories: Windows) -> Tensor:
        """Return the value of each code, of which the score of an item is the sum: (L * C, B)."""
        hidden = self._read(histories.items.T)
        last = histories.newest(hidden)
        logits = self._directions() @ self._predict(last).transpose(1, 2)
        if self.normalize_over == "codebook":
            if self.missing is not None:
                logits = logits.masked_fill(self.missing.unsqueeze(2), float("-inf"))
            logits = logits.log_softmax(dim=1)
        return logits.flatten(0, 1)

    def _sum_over_codes(self, values: Tensor) -> Tensor:
        """For each item, return the sum of the values of its codes: (L * C, B) -> (N, B)."""
        return F.embedding_bag(self.rows, values, mode="sum")

    def _walk(self, graph: Tensor, histories: Windows, added: Tensor | None, seen: Tensor | None,
              top_k: int) -> Recommendations:
        """Return the best items that a walk through the graph reaches.

        added: (B, N) added to the scores of the items, or None

        The walk may go through seen items, but the result does not contain them. With `normalize_over: valid_items`,
        the scores are sums of logits instead of log-probabilities.
        """
        values, num_beams = self._values(histories).T.contiguous(), min(max(self.num_beams, top_k), len(self.rows))
        beams = self._starts(histories, num_beams)
        found = beams[:, :0]  # the best unseen items so far
        for _ in range(self.num_hops + 1):
            reached = torch.cat([beams, found, _rows(graph, beams).flatten(1)], dim=1).sort(dim=1).values
            is_duplicate = F.pad(reached[:, 1:] == reached[:, :-1], (1, 0))
            scores = values.gather(1, _rows(self.rows, reached).flatten(1))
            scores = scores.unflatten(1, (-1, self.num_levels)).sum(dim=2)
            scores = scores if added is None else scores + added.gather(1, reached)
            scores = scores.masked_fill(is_duplicate, float("-inf"))
            best = scores.topk(min(num_beams, reached.shape[1]), dim=1)
            beams = reached.gather(1, best.indices)
            if seen is not None:
                best = scores.masked_fill(in_row(seen, reached), float("-inf")).topk(best.values.shape[1], dim=1)
                found = reached.gather(1, best.indices)
        items = (beams if seen is None else found).masked_fill(best.values == float("-inf"), PADDING)
        items, scores = in_order(items, best.values, top_k)
        short = (items == PADDING).any(dim=1)
        if seen is not None and short.any():  # the walk reached too few unseen items, so score all items
            every = self._sum_over_codes(values[short].T.contiguous()).T
            every = every if added is None else every + added[short]
            items[short], scores[short] = top_items(every, top_k, seen[short])
        return Recommendations(items, scores)

    def _starts(self, histories: Windows, num_beams: int) -> Tensor:
        """Return the items from which the walk of each history starts.

        These are the newest items of the history (at most `num_beams`), and `num_beams` random items. The random items
        are the same for all histories.
        """
        generator = torch.Generator().manual_seed(0)
        random = torch.randperm(len(self.rows), generator=generator)[:num_beams].to(histories.items.device)
        place = torch.arange(min(num_beams, histories.items.shape[1]), device=random.device)
        newest = (histories.lengths.unsqueeze(1) - 1 - place).clamp(min=0)
        own = torch.where(place < histories.lengths.unsqueeze(1), histories.items.gather(1, newest),
                          random[: len(place)])
        return torch.cat([own, random.expand(len(own), -1)], dim=1)

    def prepare(self) -> None:
        if self.scoring == "graph":  # this takes as long as scoring all items for `num_items` histories
            self.graph = self._build_graph()

    @torch.no_grad()
    def _build_graph(self) -> Tensor:
        """For each item, return the `num_neighbours` most similar items, including the item itself: (N, G).

        The similarity of two items is the sum of the cosine similarities of their codewords.
        """
        directions = self._directions()
        similar = directions @ directions.transpose(1, 2)                          # (L, C, C)
        codes = self.rows - torch.arange(self.num_levels, device=self.rows.device) * self.num_codes
        level = torch.arange(self.num_levels, device=self.rows.device)
        max_rows = CACHED_ROWS if codes.device.type == "cpu" else len(codes)
        size = max(min(ROW_BYTES // (4 * len(codes)), max_rows), 1)
        # Write all results into one tensor. Many small results between large temporary tensors would fragment memory.
        graph = codes.new_empty(len(codes), self.num_neighbours)
        with Progress("graph of similar items", len(codes), "items") as progress:
            for part, rows in zip(codes.split(size), graph.split(size), strict=True):
                scores = self._sum_over_codes(similar[level, part].flatten(1).T.contiguous()).T
                rows.copy_(scores.topk(self.num_neighbours, dim=1).indices)
                progress.update(len(part))
        return graph


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """Return `table[places]` for `places` (B, K)."""
    # On the CPU, `index_select` copies whole rows and is about twice as fast as indexing.
    return table.index_select(0, places.flatten()).view(*places.shape, -1)
