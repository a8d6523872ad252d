"""TIGER (Rajput et al. 2023, arXiv 2305.05065): a T5 that generates the semantic ID of the next item."""

from typing import Literal

import torch
from torch import Tensor

from ..abstract_model import PADDING, Catalogue, Windows
from ..generator import START, AbstractGenerator, PrefixCache
from ..layers import (
    CrossAttention,
    FeedForward,
    RelativeBias,
    RMSNorm,
    SelfAttention,
    as_bias,
    dropout,
    initialize,
    stack,
)
from ..params import Params

# B batch, S length of the longest history, L levels, T = S * L encoder tokens, G targets of a row, K beams, H heads,
# M model width, C codebook size of a level


class EncoderDecoder(AbstractGenerator):
    """A Transformer whose encoder reads the history and whose decoder generates the next item's semantic ID.

    With `train_on: target`, each window has one target. Each encoder token attends to the whole history, as in T5.

    With `train_on: every_position`, every item of a window except the first is a target. Each encoder token attends
    only to tokens of the same item and of earlier items. For each target, the decoder attends only to the items before
    the target. Cross-attention has a relative bias, unlike in T5.

    `t5.py` converts the weights to and from the T5 of transformers. With `train_on: target`, both models compute the
    same scores.
    """

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue, "encoder_decoder")
        params = Params(config, "encoder_decoder")
        self.train_on = params.choice("train_on", "target", "every_position")
        width, num_heads, head_width = (params.count(key) for key in ("d_model", "num_heads", "d_kv"))
        rate, distances, d_ff = params.share("dropout"), params.distances(), params.count("d_ff")
        attention = (width, num_heads, head_width, rate)
        self.dropout = rate
        self.encoder = stack(params.count("num_encoder_layers"), lambda: (
            SelfAttention(*attention), FeedForward(width, d_ff, rate)))
        self.encoder_bias = RelativeBias(num_heads, *distances, bidirectional=True)
        self.encoder_norm = RMSNorm(width)
        self.decoder = stack(params.count("num_decoder_layers"), lambda: (
            SelfAttention(*attention), CrossAttention(*attention), FeedForward(width, d_ff, rate)))
        self.decoder_bias = RelativeBias(num_heads, *distances, bidirectional=False)
        self.decoder_norm = RMSNorm(width)
        # With `every_position`, the encoder output does not contain the distance to the target. This bias adds it.
        self.memory_bias = (RelativeBias(num_heads, *distances, bidirectional=False)
                            if self.train_on == "every_position" else None)
        initialize(self, width, head_width)
        self.initialize_tokens()
        if self.memory_bias is not None:
            self.encoder_bias.start_recent()
            self.memory_bias.start_recent()

    @property
    def training_unit(self) -> Literal["target", "sequence"]:
        return "target" if self.train_on == "target" else "sequence"

    def properties(self) -> dict:
        return {"encoder_mask": "full" if self.train_on == "target" else "causal by item"}

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return the mean cross-entropy of the codes of all targets."""
        items, lengths = windows
        if self.train_on == "target":
            targets = items.gather(1, lengths.unsqueeze(1) - 1)                         # (B, 1)
            history = items.scatter(1, lengths.unsqueeze(1) - 1, PADDING)[:, :-1]
        else:
            history, targets = items[:, :-1], items[:, 1:]
        memory = self.encode(history)
        hidden = self.decode(memory, self._training_bias(history, targets.shape[1]), targets)  # (B, G, L, M)
        return {"loss_total": self.code_loss(hidden, targets)}

    def encode(self, history: Tensor) -> Tensor:
        """Return the output of the encoder (the memory) for each history: (B, S) items -> (B, T, M)."""
        x = dropout(self.embedding(self.tokens[history].flatten(1)), self.dropout, self.training)
        bias = self.encoder_bias(x.shape[1], x.shape[1]) + self._encoder_mask(history)
        for attention, feed_forward in self.encoder:
            x = feed_forward(attention(x, bias))
        return dropout(self.encoder_norm(x), self.dropout, self.training)

    def _encoder_mask(self, history: Tensor) -> Tensor:
        """Return the attention bias of the encoder.

        With `train_on: target`, the bias hides the padding. Its shape is (B, 1, 1, T).
        With `train_on: every_position`, the bias hides later items. Its shape is (1, 1, T, T).
        """
        if self.train_on == "target":
            return self._padding_mask(history)
        # The padding comes after all items, so this mask hides the padding too.
        item = torch.arange(history.shape[1], device=history.device).repeat_interleave(self.num_levels)
        return as_bias(item <= item.unsqueeze(1))[None, None]

    def _padding_mask(self, history: Tensor) -> Tensor:
        """Return the attention bias that hides the padding: (B, S) items -> (B, 1, 1, T)."""
        return as_bias((history != PADDING).repeat_interleave(self.num_levels, dim=1))[:, None, None]

    def _training_bias(self, history: Tensor, num_targets: int) -> Tensor:
        """Return the cross-attention bias for training.

        With `train_on: target`, the bias hides the padding. Its shape is (B, 1, 1, T).
        With `train_on: every_position`, the bias depends on the distance to the target. It hides the target and all
        later items. Its shape is (1, H, G * L, T).
        """
        if self.memory_bias is None:
            return self._padding_mask(history)
        end = torch.arange(1, num_targets + 1, device=history.device) * self.num_levels  # target g is after g + 1 items
        token = torch.arange(history.shape[1] * self.num_levels, device=history.device)
        bias = self.memory_bias.of(token - end.unsqueeze(1)) + as_bias(token < end.unsqueeze(1))
        return bias.repeat_interleave(self.num_levels, dim=2)

    def _recommending_bias(self, histories: Windows) -> Tensor:
        """Return the cross-attention bias for recommending the item after the history.

        The shape is (B, 1, 1, T) with `train_on: target`, and (B, H, 1, T) with `train_on: every_position`.
        """
        padding = self._padding_mask(histories.items)
        if self.memory_bias is None:
            return padding
        token = torch.arange(padding.shape[-1], device=padding.device)
        bias = self.memory_bias.of(token - histories.lengths.unsqueeze(1) * self.num_levels)  # (1, H, B, T)
        return bias.permute(2, 1, 0, 3) + padding

    def decode(self, memory: Tensor, memory_bias: Tensor, targets: Tensor) -> Tensor:
        """Return the hidden states that predict the codes of the targets: (B, G, L, M).

        memory: (B, T, M) output of the encoder
        memory_bias: bias of cross-attention
        targets: (B, G) items
        """
        num_targets = targets.shape[1]
        start = torch.full((*targets.shape, 1), START, device=targets.device)
        inputs = torch.cat([start, self.tokens[targets][..., :-1]], dim=2)               # (B, G, L)
        x = dropout(self.embedding(inputs.flatten(1)), self.dropout, self.training)    # (B, G * L, M)
        level = torch.arange(self.num_levels, device=x.device)
        bias = self.decoder_bias(self.num_levels, self.num_levels) + as_bias(level <= level.unsqueeze(1))
        for self_attention, cross_attention, feed_forward in self.decoder:
            # In self-attention, each target is a row of the batch. So a code attends only to codes of the same target.
            x = self_attention(x.view(-1, self.num_levels, x.shape[-1]), bias).view_as(x)
            # In cross-attention, the targets of a window are query positions that share the memory of the window.
            x = feed_forward(cross_attention(x, cross_attention.project_memory(memory), memory_bias))
        x = dropout(self.decoder_norm(x), self.dropout, self.training)
        return x.unflatten(1, (num_targets, self.num_levels))

    def start_decoding(self, histories: Windows) -> "_DecodingStep":
        return _DecodingStep(self, self.encode(histories.items), self._recommending_bias(histories))


class _DecodingStep:
    """A callable that computes the logits of one level for all beams (see `beam_search.Step`).

    All beams of a user attend to the same keys and values of the encoder output.
    """

    def __init__(self, model: EncoderDecoder, memory: Tensor, memory_bias: Tensor):
        self.model, self.memory_bias = model, memory_bias
        self.memories = [cross.project_memory(memory) for _, cross, _ in model.decoder]
        self.caches = [PrefixCache() for _ in model.decoder]

    def __call__(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """Return the logits of a level for all beams: (B, K, C).

        codes: (B, K) the last code of each beam
        parents: (B, K) for each beam, the index of its parent beam in the previous step
        """
        model = self.model
        tokens = codes + model.first_token[level - 1] if level else torch.full_like(codes, START)
        x = model.embedding(tokens)                                                      # (B, K, M)
        bias = model.decoder_bias(level + 1, level + 1)[:, :, -1:]                       # (1, H, 1, level + 1)
        for (self_attention, cross_attention, feed_forward), cache, memory in zip(model.decoder, self.caches,
                                                                                  self.memories, strict=True):
            query, key, value = self_attention.project(x)                                # (B, H, K, width)
            cache.extend(key, value, parents)
            # In self-attention, each beam attends only to the positions of the same beam.
            attended = cache.mix((cache.scores(query) + bias).softmax(dim=-1)).flatten(2)
            # In cross-attention, the beams of a user are query positions that share the memory of the user.
            x = feed_forward(cross_attention(self_attention.add(x, attended), memory, self.memory_bias))
        return model.heads[level](model.decoder_norm(x))
