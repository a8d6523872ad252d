"""RPG (Hou et al. 2025, arXiv 2506.05781): all codes of the next item at once, and items looked up by their codes."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.progress import Progress
from recommendation.decoding.top_k import in_order, in_row

from ..abstract_model import PADDING, AbstractRecommender, Catalogue, Recommendations, Windows, top_items
from ..layers import FeedForward, RMSNorm, SelfAttention, causal_bias, dropout, initialize, stack
from ..params import Params

# B batch, W longest window, M model width, L levels, C largest codebook, N items, K beams, G neighbours in the graph

ROW_BYTES = 2**28  # of similarities that are held at a time while the graph is built
CACHED_ROWS = 64   # of them on the CPU: what all codes add to so many stays in its cache, which makes it twice as fast


class EncoderRetrieve(AbstractRecommender):
    """One causal pass over the items of a history; from each position one head a level predicts the next item's code.

    An item comes in as the sum of its codewords, and a head's logits are its similarities to the same codewords.
    An item's score is the sum over its codes: no order of levels, no search along a prefix. With `normalize_over:
    codebook`, RPG's loss, each code has a probability among its level's, and learns by itself. With `existing` the
    sums become one softmax over the items that there are, which takes (targets, N) scores a step: for catalogues of
    up to some hundred thousand items. `scoring: exact` scores the whole catalogue. `graph` walks a graph that joins
    items of similar codewords, from random items and the newest of the history, and scores what it meets: a hop leads
    to `num_neighbours` items from each of `num_beams`, the first from twice as many. Building the graph costs as much
    as scoring everything for N histories, so the test has it, where there may be as many, and validation does not.
    """

    training_unit: Literal["sequence"] = "sequence"
    rows: Tensor    # (N, L) the codewords of each item
    exists: Tensor  # (L, C) whether a level has the code

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
        # What an item is should outweigh where it stands.
        nn.init.normal_(self.positions.weight, std=0.1 * width**-0.5)
        # Level l's code c is row l * C + c of the codewords; C of all levels alike keeps the heads one product.
        rows = catalogue.codes.cpu() + torch.arange(self.num_levels) * self.num_codes
        self.register_buffer("rows", rows, persistent=False)
        exists = torch.arange(self.num_codes) < torch.tensor(sizes).unsqueeze(1)
        self.register_buffer("exists", exists, persistent=False)
        self.graph: Tensor | None = None  # (N, G), if one is walked

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Mean cross-entropy of every item behind a window's first, or of all of its codes."""
        targets = windows.items[:, 1:]
        logits = self._logits(self._read(windows.items[:, :-1]))                  # (B, W - 1, L, C)
        if self.normalize_over == "valid_items":
            scores = self._sum_over_codes(logits.float().flatten(0, 1).flatten(1))  # a sum of many: not in bfloat16
            return {"loss_total": F.cross_entropy(scores, targets.flatten(), ignore_index=PADDING,
                                                  label_smoothing=self.label_smoothing)}
        codes = self.rows[targets] - torch.arange(self.num_levels, device=targets.device) * self.num_codes
        labels = codes.masked_fill((targets == PADDING).unsqueeze(2), PADDING)
        log_probs = logits.log_softmax(dim=-1)
        loss = F.nll_loss(log_probs.flatten(0, 2), labels.flatten(), ignore_index=PADDING)
        if self.label_smoothing:  # over the codes that exist; F.cross_entropy would count the others, too
            uniform = -log_probs.masked_fill(~self.exists, 0.0).sum(dim=-1) / self.exists.sum(dim=-1)
            present = targets != PADDING
            uniform = (uniform.mean(dim=2) * present).sum() / present.sum()
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        return {"loss_total": loss}

    def _read(self, items: Tensor) -> Tensor:
        """(B, W) items -> hidden states (B, W, M)."""
        rows = self.rows[items.clamp(min=0)]
        x = F.embedding_bag(rows.flatten(0, 1), self.codewords.weight, mode="sum").view(*items.shape, -1)
        x = dropout(x + self.positions.weight[: items.shape[1]], self.dropout, self.training)
        bias = causal_bias(items.shape[1], items.device)  # padding lies behind, where no item looks
        for attention, feed_forward in self.layers:
            x = feed_forward(attention(x, bias))
        return dropout(self.norm(x), self.dropout, self.training)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., M) -> cosine similarities to every level's codewords over the temperature, (..., L, C)."""
        predicted = F.normalize(torch.einsum("...m,lmn->...ln", hidden, self.heads), dim=-1)
        logits = torch.einsum("...ln,lcn->...lc", predicted, self._directions()) / self.temperature
        return logits.masked_fill(~self.exists, float("-inf"))

    def _directions(self) -> Tensor:
        """The codewords at length one, (L, C, M)."""
        return F.normalize(self.codewords.weight, dim=-1).view(self.num_levels, self.num_codes, -1)

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self._best(histories, None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self._best(histories, seen, top_k)

    def _best(self, histories: Windows, seen: Tensor | None, top_k: int) -> Recommendations:
        hidden = self._read(histories.items)
        last = hidden[torch.arange(len(hidden), device=hidden.device), histories.lengths - 1]
        logits, of_items = self._logits(last), self.normalize_over == "valid_items"
        values = (logits if of_items else logits.log_softmax(dim=-1)).flatten(1)  # (B, L * C)
        if self.graph is not None:
            return self._walk(self.graph, values, histories, seen, top_k)
        scores = self._sum_over_codes(values)
        return top_items(scores.log_softmax(dim=1) if of_items else scores, top_k, seen)

    def _sum_over_codes(self, values: Tensor) -> Tensor:
        """Values of every code (B, L * C) -> their sums over each item's codes, (B, N)."""
        return F.embedding_bag(self.rows, values.T.contiguous(), mode="sum").T

    def _walk(self, graph: Tensor, values: Tensor, histories: Windows, seen: Tensor | None,
              top_k: int) -> Recommendations:
        """The best items that a few hops through the graph meet, the best so far going on at each.

        Seen items lead on as the others do, but are not among the results. Over existing IDs the scores are sums of
        logits: log-probabilities would take all items' scores.
        """
        num_beams = min(max(self.num_beams, top_k), len(self.rows))
        beams = self._starts(histories, num_beams)
        found = beams[:, :0]  # the best unseen items so far
        for _ in range(self.num_hops + 1):
            met = torch.cat([beams, found, _rows(graph, beams).flatten(1)], dim=1).sort(dim=1).values
            again = F.pad(met[:, 1:] == met[:, :-1], (1, 0))
            scores = values.gather(1, _rows(self.rows, met).flatten(1)).unflatten(1, (-1, self.num_levels)).sum(dim=2)
            scores = scores.masked_fill(again, float("-inf"))
            best = scores.topk(min(num_beams, met.shape[1]), dim=1)
            beams = met.gather(1, best.indices)
            if seen is not None:
                best = scores.masked_fill(in_row(seen, met), float("-inf")).topk(best.values.shape[1], dim=1)
                found = met.gather(1, best.indices)
        items = (beams if seen is None else found).masked_fill(best.values == float("-inf"), PADDING)
        items, scores = in_order(items, best.values, top_k)
        short = (items == PADDING).any(dim=1)
        if seen is not None and short.any():  # so few unseen items that the walk may have missed some
            items[short], scores[short] = top_items(self._sum_over_codes(values[short]), top_k, seen[short])
        return Recommendations(items, scores)

    def _starts(self, histories: Windows, num_beams: int) -> Tensor:
        """The newest items of the history, and random ones, the same for everybody."""
        generator = torch.Generator().manual_seed(0)
        random = torch.randperm(len(self.rows), generator=generator)[:num_beams].to(histories.items.device)
        place = torch.arange(min(num_beams, histories.items.shape[1]), device=random.device)
        newest = (histories.lengths.unsqueeze(1) - 1 - place).clamp(min=0)
        own = torch.where(place < histories.lengths.unsqueeze(1), histories.items.gather(1, newest),
                          random[: len(place)])
        return torch.cat([own, random.expand(len(own), -1)], dim=1)

    def prepare(self) -> None:
        if self.scoring == "graph":
            self.graph = self._build_graph()

    @torch.no_grad()
    def _build_graph(self) -> Tensor:
        """For each item those whose codewords are most like its own, summed over the levels; itself among them."""
        directions = self._directions()
        similar = directions @ directions.transpose(1, 2)                          # (L, C, C)
        codes = self.rows - torch.arange(self.num_levels, device=self.rows.device) * self.num_codes
        level = torch.arange(self.num_levels, device=self.rows.device)
        most = CACHED_ROWS if codes.device.type == "cpu" else len(codes)
        size = max(min(ROW_BYTES // (4 * len(codes)), most), 1)
        # Written into one tensor: small ones kept between the large ones that come and go would scatter the memory.
        graph = codes.new_empty(len(codes), self.num_neighbours)
        with Progress("graph of similar items", len(codes), "items") as progress:
            for part, rows in zip(codes.split(size), graph.split(size), strict=True):
                scores = self._sum_over_codes(similar[level, part].flatten(1))
                rows.copy_(scores.topk(self.num_neighbours, dim=1).indices)
                progress.update(len(part))
        return graph


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """`table[places]`, (B, K) rows of it, copied whole: on the CPU about twice as fast."""
    return table.index_select(0, places.flatten()).view(*places.shape, -1)
