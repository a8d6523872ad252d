"""TIGER (Rajput et al. 2023, arXiv 2305.05065): a T5 that reads semantic IDs and writes the next one."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError

from ..abstract_model import PADDING, AbstractRecommender, Catalogue, Recommendations, Windows
from ..beam_search import Trie, beam_search
from ..layers import CrossAttention, FeedForward, RelativeBias, RMSNorm, SelfAttention, attend, dropout, initialize

# B batch, S items of a history, L levels, T = S * L encoder tokens, G targets of a row, K beams,
# M model width, C codebook size of a level

# T5 starts its embedding at 1.0, for Adafactor, whose steps grow with the parameter. AdamW's do not: from 1.0 it
# takes thousands of steps before what was learned outweighs the random start (ml-100k: NDCG@10 .026 against .038
# after three epochs).
EMBEDDING_STD = 0.05
IGNORED = -100  # a label that no loss counts
START = 0  # the token that padding and the decoder's first input share, as in T5


class EncoderDecoder(AbstractRecommender):
    """Encoder over the history's tokens; decoder over the levels of the next item's ID.

    With `train_on: target` a window has one target and the encoder sees its whole history, as in T5.
    With `train_on: every_position` each item of a window is the target of those before it: a token
    sees the items up to its own, and a target's decoder rows see the memory of earlier items alone.
    One pass then learns all targets of the window. As such an encoder cannot tell how far its tokens
    are from a target, cross-attention gets a relative bias of its own (which T5 has no need of). Mask
    and bias are part of the model: they are the same when recommending.
    """

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        params = config["encoder_decoder"]["model_params"]
        self.train_on, self.num_beams = params["train_on"], params["num_beams"]
        if self.train_on not in ("target", "every_position"):
            raise ConfigError("encoder_decoder.model_params.train_on", f"is {self.train_on!r}",
                              fix="target or every_position")
        self.label_smoothing = config["encoder_decoder"]["training_params"]["label_smoothing"]
        width, num_heads, head_width = params["d_model"], params["num_heads"], params["d_kv"]
        rate, distance = params["dropout"], (params["num_buckets"], params["max_distance"])
        attention = (width, num_heads, head_width, rate)
        sizes = catalogue.codebook_sizes
        self.num_levels, self.num_heads, self.dropout = len(sizes), num_heads, rate

        self.embedding = nn.Embedding(1 + sum(sizes), width)
        self.encoder = nn.ModuleList(
            nn.ModuleList([SelfAttention(*attention), FeedForward(width, params["d_ff"], rate)])
            for _ in range(params["num_encoder_layers"]))
        self.encoder_bias = RelativeBias(num_heads, *distance, bidirectional=True)
        self.encoder_norm = RMSNorm(width)
        self.decoder = nn.ModuleList(
            nn.ModuleList([SelfAttention(*attention), CrossAttention(*attention),
                           FeedForward(width, params["d_ff"], rate)])
            for _ in range(params["num_decoder_layers"]))
        self.decoder_bias = RelativeBias(num_heads, *distance, bidirectional=False)
        self.decoder_norm = RMSNorm(width)
        self.memory_bias = (RelativeBias(num_heads, *distance, bidirectional=False)
                            if self.train_on == "every_position" else None)
        # One head a level: each softmax runs over its own codebook only.
        self.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        initialize(self, width, head_width)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        for head in self.heads:
            nn.init.normal_(head.weight, std=width**-0.5)
        if self.memory_bias is not None:
            self.encoder_bias.start_recent()
            self.memory_bias.start_recent()

        # Level l's code c is token first_token[l] + c; an extra last row serves PADDING (index -1).
        first_token = 1 + torch.tensor([0, *sizes[:-1]]).cumsum(0)
        tokens = torch.cat([catalogue.codes.cpu() + first_token, torch.full((1, self.num_levels), START)])
        self.register_buffer("first_token", first_token, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.trie = Trie(catalogue.codes, sizes)

    @property
    def training_unit(self) -> Literal["target", "sequence"]:
        return "target" if self.train_on == "target" else "sequence"

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Mean cross-entropy of the targets' codes."""
        items, lengths = windows
        if self.train_on == "target":
            targets = items.gather(1, lengths.unsqueeze(1) - 1)                         # (B, 1)
            history = items.scatter(1, lengths.unsqueeze(1) - 1, PADDING)[:, :-1]
        else:
            history, targets = items[:, :-1], items[:, 1:]
        memory = self.encode(history)
        hidden = self.decode(memory, self._training_bias(history, targets.shape[1]), targets)  # (B, G, L, M)
        # Padding is ignored by its label: picking rows instead would wait for the device.
        labels = self.catalogue_codes(targets).masked_fill((targets == PADDING).unsqueeze(2), IGNORED)
        hidden, labels = hidden.flatten(0, 1), labels.flatten(0, 1)                     # (B * G, L, M), (B * G, L)
        losses = [F.cross_entropy(head(hidden[:, level]), labels[:, level], ignore_index=IGNORED,
                                  label_smoothing=self.label_smoothing) for level, head in enumerate(self.heads)]
        return {"loss_total": torch.stack(losses).mean()}

    def catalogue_codes(self, items: Tensor) -> Tensor:
        """(...,) items -> (..., L) codes."""
        return self.tokens[items] - self.first_token

    def encode(self, history: Tensor) -> Tensor:
        """(B, S) items -> memory (B, T, M)."""
        x = dropout(self.embedding(self.tokens[history].flatten(1)), self.dropout, self.training)
        bias = self.encoder_bias(x.shape[1], x.shape[1]) + self._encoder_mask(history)
        for attention, feed_forward in self.encoder:
            x = feed_forward(attention(x, bias))
        return dropout(self.encoder_norm(x), self.dropout, self.training)

    def _encoder_mask(self, history: Tensor) -> Tensor:
        """0 where a token may look, -inf elsewhere; (1, 1, T, T) by position or (B, 1, 1, T) by padding."""
        if self.train_on == "target":
            return self._padding_mask(history)
        # Padding lies behind every item, so looking at earlier items alone never meets it.
        item = torch.arange(history.shape[1], device=history.device).repeat_interleave(self.num_levels)
        return _as_bias(item <= item.unsqueeze(1))[None, None]

    def _padding_mask(self, history: Tensor) -> Tensor:
        """(B, 1, 1, T)."""
        return _as_bias((history != PADDING).repeat_interleave(self.num_levels, dim=1))[:, None, None]

    def _training_bias(self, history: Tensor, num_targets: int) -> Tensor:
        """Cross-attention's bias for the rows of each target: (B, 1, 1, T), or (1, H, G * L, T)."""
        if self.memory_bias is None:
            return self._padding_mask(history)
        end = torch.arange(1, num_targets + 1, device=history.device) * self.num_levels  # target g follows g + 1 items
        token = torch.arange(history.shape[1] * self.num_levels, device=history.device)
        bias = self.memory_bias.of(token - end.unsqueeze(1)) + _as_bias(token < end.unsqueeze(1))
        return bias.repeat_interleave(self.num_levels, dim=2)

    def _recommending_bias(self, histories: Windows) -> Tensor:
        """Cross-attention's bias behind each whole history: (B, 1 or H, 1, T)."""
        padding = self._padding_mask(histories.items)
        if self.memory_bias is None:
            return padding
        token = torch.arange(padding.shape[-1], device=padding.device)
        bias = self.memory_bias.of(token - histories.lengths.unsqueeze(1) * self.num_levels)  # (1, H, B, T)
        return bias.permute(2, 1, 0, 3) + padding

    def decode(self, memory: Tensor, memory_bias: Tensor, targets: Tensor) -> Tensor:
        """memory (B, T, M), targets (B, G) items -> hidden states that predict their codes, (B, G, L, M)."""
        num_targets = targets.shape[1]
        start = torch.full((*targets.shape, 1), START, device=targets.device)
        inputs = torch.cat([start, self.tokens[targets][..., :-1]], dim=2)               # (B, G, L)
        x = dropout(self.embedding(inputs.flatten(1)), self.dropout, self.training)    # (B, G * L, M)
        level = torch.arange(self.num_levels, device=x.device)
        bias = self.decoder_bias(self.num_levels, self.num_levels) + _as_bias(level <= level.unsqueeze(1))
        for self_attention, cross_attention, feed_forward in self.decoder:
            # A target's rows attend to its own prefix only: targets are batch rows here ...
            x = self_attention(x.view(-1, self.num_levels, x.shape[-1]), bias).view_as(x)
            # ... and query positions over the row's one memory there.
            x = feed_forward(cross_attention(x, cross_attention.project_memory(memory), memory_bias))
        x = dropout(self.decoder_norm(x), self.dropout, self.training)
        return x.unflatten(1, (num_targets, self.num_levels))

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        history = histories.items
        step = _DecodingStep(self, self.encode(history), self._recommending_bias(histories))
        return beam_search(step, self.trie, self.num_levels, len(history), max(self.num_beams, top_k), top_k,
                           history.device)


class _DecodingStep:
    """One level for all beams: they are query positions over their user's memory, projected once."""

    def __init__(self, model: EncoderDecoder, memory: Tensor, memory_bias: Tensor):
        self.model, self.memory_bias = model, memory_bias
        self.memories = [cross.project_memory(memory) for _, cross, _ in model.decoder]
        self.caches: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, (B, K, H, levels so far, width)

    def __call__(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """The beams' last codes (B, K) and the beams they continue (B, K) -> log-probabilities (B, K, C)."""
        model = self.model
        tokens = codes + model.first_token[level - 1] if level else torch.full_like(codes, START)
        x = model.embedding(tokens)                                                      # (B, K, M)
        bias = model.decoder_bias(level + 1, level + 1)[:, :, -1:]                       # (1, H, 1, level + 1)
        for index, (self_attention, cross_attention, feed_forward) in enumerate(model.decoder):
            x = self._attend_to_prefix(index, self_attention, x, parents, bias)
            x = feed_forward(cross_attention(x, self.memories[index], self.memory_bias))
        return model.heads[level](model.decoder_norm(x)).log_softmax(dim=-1)

    def _attend_to_prefix(self, index: int, attention: SelfAttention, x: Tensor, parents: Tensor,
                          bias: Tensor) -> Tensor:
        """Self-attention of each beam's newest position over its own earlier ones, kept in the cache."""
        query, key, value = (part.transpose(1, 2).unsqueeze(3) for part in attention.project(x))  # (B, K, H, 1, width)
        if index < len(self.caches):
            row = torch.arange(len(x), device=x.device).unsqueeze(1)
            key, value = (torch.cat([cached[row, parents], new], dim=3)
                          for cached, new in zip(self.caches[index], (key, value), strict=True))
            self.caches[index] = (key, value)
        else:
            self.caches.append((key, value))
        attended = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias)
        return attention.add(x, attended.view(*x.shape[:2], -1))


def _as_bias(allowed: Tensor) -> Tensor:
    """True -> 0, False -> -inf (the largest negative number, so that a row of it stays finite)."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)
