"""A GPT-style generator: one causal Transformer over the tokens of the history and of the next item."""

from typing import Literal

import torch
from torch import Tensor

from ..abstract_model import Catalogue, Windows
from ..attention_bias import RelativeBias, as_bias, expand_bias
from ..generator import AbstractGenerator, PrefixCache
from ..layers import (
    FeedForward,
    RMSNorm,
    SelfAttention,
    dropout,
    initialize,
    stack,
)
from ..params import Params

# B batch, W length of the longest window, L levels, T tokens of a window or history, G targets of a row, K beams,
# H heads, M model width, C codebook size of a level


class DecoderOnly(AbstractGenerator):
    """A decoder that predicts each token of a window from all earlier tokens.

    This is a language model (Radford et al. 2018) over semantic IDs. The first item of a window is not a target.
    Positions are relative, because a window may begin anywhere in a user's sequence.
    """

    training_unit: Literal["sequence"] = "sequence"

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue, "decoder_only")
        params = Params(config, "decoder_only")
        width, num_heads, self.dropout = params.count("d_model"), params.count("num_heads"), params.share("dropout")
        head_width = params.count("d_kv")
        self.layers = stack(params.count("num_layers"), lambda: (
            SelfAttention(width, num_heads, head_width, self.dropout),
            FeedForward(width, params.count("d_ff"), self.dropout)))
        self.bias = RelativeBias(num_heads, *params.distances(), bidirectional=False)
        self.norm = RMSNorm(width)
        initialize(self, width, head_width)
        self.initialize_tokens()
        self.bias.start_recent()

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return the mean cross-entropy of the codes of all items except the first item of each window."""
        items = windows.items.T                                                # (W, B)
        hidden = self._read(self._tokens_of(items)[:-1])[self.num_levels - 1:]  # from the last token of the first item
        hidden = dropout(self.norm(hidden), self.dropout, self.training)       # (G * L, B, M)
        by_level = hidden.unflatten(0, (-1, self.num_levels)).transpose(0, 1).flatten(1, 2)    # (L, G * B, M)
        # The hidden states depend on the codes of the next items. A teacher changes only the labels.
        return {"loss_total": self.code_loss(by_level, items[1:].flatten(), windows.distributions())}

    def _tokens_of(self, items: Tensor) -> Tensor:
        """Return the tokens of the items: (W, B) -> (W * L, B)."""
        return self.tokens[self.level, items.unsqueeze(1)].flatten(0, 1)

    def _read(self, tokens: Tensor, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Return the hidden state of each token: (T, B) -> (T, B, M).

        If `keep` is a list, append the keys and values of each layer to this list.
        """
        x = dropout(self.embedding(tokens), self.dropout, self.training)
        bias = expand_bias(self.bias(range(len(tokens)), len(tokens), hide_from=1), x.shape[1])
        for attention, feed_forward in self.layers:
            query, key, value = attention.project(x)
            if keep is not None:
                keep.append((key.contiguous(), value.contiguous()))  # all beams and levels read them
            x = feed_forward(attention.attend(x, query, key, value, bias))
        return x

    def start_decoding(self, histories: Windows) -> "_DecodingStep":
        memories: list[tuple[Tensor, Tensor]] = []
        hidden = self._read(self._tokens_of(histories.items.T), memories)
        end = histories.lengths * self.num_levels                              # number of tokens of each history
        last = hidden[end - 1, torch.arange(len(end), device=end.device)].unsqueeze(0)
        return _DecodingStep(self, last, memories, end)


class _DecodingStep:
    """A callable that computes the logits of one level for all beams (see `beam_search.Step`).

    All beams of a user attend to the same keys and values of the history.
    """

    def __init__(self, model: DecoderOnly, last: Tensor, memories: list[tuple[Tensor, Tensor]], end: Tensor):
        """Store the results of reading the histories.

        last: (1, B, M) hidden state of the last token of each history
        memories: for each layer, the keys and the values of the histories, (B, H, T, width) each
        end: (B,) number of tokens of each history
        """
        self.model, self.last, self.memories, self.end = model, last, memories, end
        self.caches = [PrefixCache() for _ in model.layers]

    def __call__(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """Return the logits of a level for all beams: (B, K, C).

        codes: (B, K) the last code of each beam
        parents: (B, K) for each beam, the index of its parent beam in the previous step
        """
        model, x = self.model, self.last
        if level:
            x = model.embedding(codes.T + model.first_token[level - 1])                 # (K, B, M)
            history_bias, beam_bias = self._biases(level)
            for (attention, feed_forward), memory, cache in zip(model.layers, self.memories, self.caches, strict=True):
                query, key, value = attention.project(x)                                # (B, H, K, width)
                cache.extend(key, value, parents)
                x = feed_forward(attention.add(x, _attend_to_both(query, *memory, history_bias, cache, beam_bias)))
        return model.level_logits(level, model.norm(x))

    def _biases(self, level: int) -> tuple[Tensor, Tensor]:
        """Return two attention biases for the newest token of each beam.

        The first bias, (B, H, 1, T), is for the tokens of the history. The second bias, (H, 1, level), is for the
        tokens of the beam.
        """
        bias, num_tokens = self.model.bias, self.memories[0][0].shape[2]
        token = torch.arange(num_tokens, device=self.end.device)
        to_history = bias.of(token - (self.end + level - 1).unsqueeze(1)).transpose(0, 1).unsqueeze(2)
        to_history = to_history + as_bias(token < self.end.unsqueeze(1))[:, None, None]
        return to_history, bias(range(level - 1, level), level)


def _attend_to_both(query: Tensor, key: Tensor, value: Tensor, history_bias: Tensor, cache: PrefixCache,
                    beam_bias: Tensor) -> Tensor:
    """Attend to the tokens of the history and of the beam, with one softmax over both: (K, B, H * width).

    query: (B, H, K, width) one query per beam
    key, value: (B, H, T, width) keys and values of the history
    cache: keys and values of the beams
    history_bias, beam_bias: the results of `_DecodingStep._biases`
    """
    scores = torch.cat([query @ key.transpose(-1, -2) + history_bias, cache.scores(query) + beam_bias], dim=3)
    history_weights, beam_weights = scores.softmax(dim=-1).tensor_split([key.shape[2]], dim=3)
    return ((history_weights @ value).permute(2, 0, 1, 3) + cache.mix(beam_weights)).flatten(2)
