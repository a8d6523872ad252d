"""TIGER (Rajput et al. 2023, arXiv 2305.05065): a T5 that generates the semantic ID of the next item."""

from typing import Literal

import torch
from torch import Tensor, nn

from recommendation.counting.teacher import draw

from ..abstract_model import Catalogue, Windows
from ..attention_bias import RelativeBias, as_bias, expand_bias
from ..generator import START, AbstractGenerator, PrefixCache
from ..layers import (
    CrossAttention,
    FeedForward,
    Memory,
    RMSNorm,
    SelfAttention,
    dropout,
    initialize,
    stack,
)
from ..params import Params

# B batch, S length of the longest history, L levels, E codes per encoder position (1 or L), T = S * L / E encoder
# positions, G targets of a row, K beams, H heads, M model width, C codebook size of a level


class EncoderDecoder(AbstractGenerator):
    """A Transformer whose encoder reads the history and whose decoder generates the next item's semantic ID.

    With `encoder_positions: code`, the encoder has one position for each code of the history, as in T5. With
    `encoder_positions: item`, it has one position for each item: a linear projection of the item's code embeddings.

    With `train_on: target`, each window has one target. Each encoder position attends to the whole history, as in T5.

    With `train_on: every_position`, every item of a window except the first is a target. Each encoder position attends
    only to positions of the same item and of earlier items. For each target, the decoder attends only to the items
    before the target. Cross-attention has a relative bias, unlike in T5.

    `t5.py` converts the weights to and from the T5 of transformers, if `encoder_positions` is `code`. If also
    `train_on` is `target`, both models compute the same scores.
    """

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue, "encoder_decoder")
        params = Params(config, "encoder_decoder")
        self.train_on = params.choice("train_on", "target", "every_position")
        width, num_heads, head_width = (params.count(key) for key in ("d_model", "num_heads", "d_kv"))
        rate, distances, d_ff = params.share("dropout"), params.distances(), params.count("d_ff")
        attention = (width, num_heads, head_width, rate)
        self.dropout = rate
        by_item = params.choice("encoder_positions", "item", "code") == "item"
        self.codes_per_position = self.num_levels if by_item else 1
        self.positions_per_item = self.num_levels // self.codes_per_position
        self.projection = nn.Linear(self.num_levels * width, width, bias=False) if by_item else nn.Identity()
        self.encoder = stack(params.count("num_encoder_layers"), lambda: (
            SelfAttention(*attention), FeedForward(width, d_ff, rate)))
        self.encoder_bias = RelativeBias(num_heads, *distances, bidirectional=True)
        self.encoder_norm = RMSNorm(width)
        num_decoder_layers = params.count("num_decoder_layers")
        self.memory = Memory(width, num_heads, head_width, num_decoder_layers)
        self.decoder = stack(num_decoder_layers, lambda: (
            SelfAttention(*attention), CrossAttention(*attention), FeedForward(width, d_ff, rate)))
        self.decoder_bias = RelativeBias(num_heads, *distances, bidirectional=False)
        self.decoder_norm = RMSNorm(width)
        # With `every_position`, the encoder output does not contain the distance to the target. This bias adds it.
        self.memory_bias = (RelativeBias(num_heads, *distances, bidirectional=False)
                            if self.train_on == "every_position" else None)
        initialize(self, width, head_width)
        self.initialize_tokens()
        for weight in self.projection.parameters():  # keeps the variance of the embeddings
            nn.init.normal_(weight, std=(self.num_levels * width)**-0.5)
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
        distributions = None
        if self.train_on == "target":
            history, targets = windows.split_last()
        else:
            history, distributions = windows.items[:, :-1], windows.distributions()
            targets = (windows.next_items() if distributions is None else
                       draw(*distributions, windows.items[:, 1:].T).T)
        history, targets = history.T, targets.T                                          # (S, B) and (G, B)
        # Look up all embeddings at once, because the backward pass of a lookup is slow.
        tokens, inputs = self._history_tokens(history), self.inputs[:, targets]          # (T, B, E) and (L, G, B)
        x, y = self._embed(torch.cat([tokens.flatten(), inputs.flatten()])).split([tokens.numel(), inputs.numel()])
        memory = self._encode(x, tokens)
        y = y.view(-1, history.shape[1], y.shape[1])                                     # (L * G, B, M)
        hidden = self._decode(y, memory, self._training_bias(len(targets), tokens))
        return {"loss_total": self.code_loss(hidden, targets.flatten(), distributions)}

    def encode(self, history: Tensor) -> Tensor:
        """Return the output of the encoder (the memory) for each history: (B, S) items -> (T, B, M)."""
        tokens = self._history_tokens(history.T)
        return self._encode(self._embed(tokens.flatten()), tokens)

    def _history_tokens(self, history: Tensor) -> Tensor:
        """Return the tokens of each encoder position: (S, B) items -> (T, B, E)."""
        tokens = self.tokens[self.level, history.unsqueeze(1)]                           # (S, L, B)
        return tokens.unflatten(1, (-1, self.codes_per_position)).transpose(2, 3).flatten(0, 1)

    def _embed(self, tokens: Tensor) -> Tensor:
        return dropout(self.embedding(tokens), self.dropout, self.training)

    def _encode(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return the output of the encoder: (T, B, M).

        x: (T * B * E, M) embeddings of the tokens
        tokens: (T, B, E)
        """
        x = self.projection(x.view(*tokens.shape[:2], -1))
        bias = expand_bias(self._encoder_bias(tokens), x.shape[1])
        for attention, feed_forward in self.encoder:
            x = feed_forward(attention(x, bias))
        return dropout(self.encoder_norm(x), self.dropout, self.training)

    def _encoder_bias(self, tokens: Tensor) -> Tensor:
        """Return the attention bias of the encoder.

        With `train_on: target`, the bias hides the padding. Its shape is (B, H, T, T).
        With `train_on: every_position`, the bias hides later items. Its shape is (H, T, T).
        """
        positions = range(len(tokens))
        if self.train_on == "target":
            return self.encoder_bias(positions, len(tokens)) + _padding_mask(tokens)
        # The padding comes after all items, so this mask hides the padding too.
        return self.encoder_bias(positions, len(tokens), hide_from=self.positions_per_item,
                                 group=self.positions_per_item)

    def _training_bias(self, num_targets: int, tokens: Tensor) -> Tensor:
        """Return the cross-attention bias for training.

        With `train_on: target`, the bias hides the padding. Its shape is (B, 1, 1, T).
        With `train_on: every_position`, the bias depends on the distance to the target. It hides the target and all
        later items. Its shape is (H, L * G, T).
        """
        if self.memory_bias is None:
            return _padding_mask(tokens)
        # Target g is at its own first encoder position, after g + 1 items.
        step = self.positions_per_item
        first_positions = range(step, (num_targets + 1) * step, step)
        return self.memory_bias(first_positions, len(tokens), hide_from=0).repeat(1, self.num_levels, 1)

    def _recommending_bias(self, histories: Windows) -> Tensor:
        """Return the cross-attention bias for recommending the item after the history.

        The shape is (B, 1, 1, T) with `train_on: target`, and (B, H, 1, T) with `train_on: every_position`.
        """
        tokens = self._history_tokens(histories.items.T)
        padding = _padding_mask(tokens)
        if self.memory_bias is None:
            return padding
        position = torch.arange(len(tokens), device=padding.device)
        bias = self.memory_bias.of(position - histories.lengths.unsqueeze(1) * self.positions_per_item)  # (H, B, T)
        return bias.transpose(0, 1).unsqueeze(2) + padding

    def _decode(self, x: Tensor, memory: Tensor, memory_bias: Tensor) -> Tensor:
        """Return the hidden states that predict the codes of the targets: (L, G * B, M).

        x: (L * G, B, M) embedded inputs; all inputs of the first level come first
        memory: (T, B, M) output of the encoder
        memory_bias: bias of cross-attention
        """
        by_window, by_target = x.shape, x.view(self.num_levels, -1, x.shape[2]).shape
        bias = expand_bias(self.decoder_bias(range(self.num_levels), self.num_levels, hide_from=1), by_target[1])
        memory_bias = expand_bias(memory_bias, by_window[1])
        # In self-attention, each target is a row of the batch. So a code attends only to codes of the same target.
        # In cross-attention, the targets of a window are query positions that share the memory of the window.
        for (self_attention, cross_attention, feed_forward), keys_and_values in zip(
                self.decoder, self.memory(memory), strict=True):
            x = self_attention(x.view(by_target), bias).view(by_window)
            x = feed_forward(cross_attention(x, keys_and_values, memory_bias))
        return dropout(self.decoder_norm(x), self.dropout, self.training).view(by_target)

    def start_decoding(self, histories: Windows) -> "_DecodingStep":
        return _DecodingStep(self, self.encode(histories.items), self._recommending_bias(histories))


def _padding_mask(tokens: Tensor) -> Tensor:
    """Return the attention bias that hides the padding: (T, B, E) tokens -> (B, 1, 1, T)."""
    return as_bias(tokens[:, :, 0].T != START)[:, None, None]  # a position has the tokens of one item


class _DecodingStep:
    """A callable that computes the logits of one level for all beams (see `beam_search.Step`).

    All beams of a user attend to the same keys and values of the encoder output.
    """

    def __init__(self, model: EncoderDecoder, memory: Tensor, memory_bias: Tensor):
        self.model, self.memory_bias = model, memory_bias
        # Copies, because all beams and levels read them, and reading neighboring positions is faster.
        self.memories = [(key.contiguous(), value.contiguous()) for key, value in model.memory(memory)]
        self.caches = [PrefixCache() for _ in model.decoder]

    def __call__(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """Return the logits of a level for all beams: (B, K, C).

        codes: (B, K) the last code of each beam
        parents: (B, K) for each beam, the index of its parent beam in the previous step
        """
        model = self.model
        tokens = codes + model.first_token[level - 1] if level else torch.full_like(codes, START)
        x = model.embedding(tokens.T)                                                    # (K, B, M)
        bias = model.decoder_bias(range(level, level + 1), level + 1)                    # (H, 1, level + 1)
        for (self_attention, cross_attention, feed_forward), cache, memory in zip(model.decoder, self.caches,
                                                                                  self.memories, strict=True):
            query, key, value = self_attention.project(x)                                # (B, H, K, width)
            cache.extend(key, value, parents)
            # In self-attention, each beam attends only to the positions of the same beam.
            attended = cache.mix((cache.scores(query) + bias).softmax(dim=-1)).flatten(2)
            # In cross-attention, the beams of a user are query positions that share the memory of the user.
            x = feed_forward(cross_attention(self_attention.add(x, attended), memory, self.memory_bias))
        return model.level_logits(level, model.decoder_norm(x))
