"""A GPT-style generator: one causal stack over the history's tokens and those of the next item."""

from typing import Literal

import torch
from torch import Tensor

from ..abstract_model import Catalogue, Windows
from ..generator import AbstractGenerator, PrefixCache
from ..layers import FeedForward, RelativeBias, RMSNorm, SelfAttention, as_bias, causal_bias, dropout, initialize, stack
from ..params import Params

# B batch, S items of a history, L levels, T = S * L tokens, K beams, H heads, M model width, C codes of a level


class DecoderOnly(AbstractGenerator):
    """Every token of a window is predicted from those before it; its items behind the first are what is learned.

    The language model's recipe (Radford et al. 2018) over semantic IDs. Positions are relative, so that a window
    may begin anywhere in a user's sequence.
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
        """Mean cross-entropy of the codes of every item behind a window's first."""
        tokens = self.tokens[windows.items].flatten(1)[:, :-1]                 # (B, W * L - 1)
        hidden = self._read(tokens)[:, self.num_levels - 1:]                   # from the first item's last token on
        hidden = dropout(self.norm(hidden), self.dropout, self.training)
        return {"loss_total": self.code_loss(hidden.unflatten(1, (-1, self.num_levels)), windows.items[:, 1:])}

    def _read(self, tokens: Tensor, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """(B, T) tokens -> hidden states (B, T, M); each layer's keys and values are appended to `keep`."""
        x = dropout(self.embedding(tokens), self.dropout, self.training)
        bias = self.bias(tokens.shape[1], tokens.shape[1]) + causal_bias(tokens.shape[1], tokens.device)
        for attention, feed_forward in self.layers:
            query, key, value = attention.project(x)
            if keep is not None:
                keep.append((key, value))
            x = feed_forward(attention.attend(x, query, key, value, bias))
        return x

    def start_decoding(self, histories: Windows) -> "_DecodingStep":
        memories: list[tuple[Tensor, Tensor]] = []
        hidden = self._read(self.tokens[histories.items].flatten(1), memories)
        end = histories.lengths * self.num_levels                              # padding lies behind it
        last = hidden[torch.arange(len(end), device=end.device), end - 1].unsqueeze(1)
        return _DecodingStep(self, last, memories, end)


class _DecodingStep:
    """One level for all beams: they are query positions over their user's history, which was read once."""

    def __init__(self, model: DecoderOnly, last: Tensor, memories: list[tuple[Tensor, Tensor]], end: Tensor):
        """`last` (B, 1, M) the hidden state of each history's last token; `end` (B,) the number of its tokens."""
        self.model, self.last, self.memories, self.end = model, last, memories, end
        self.caches = [PrefixCache() for _ in model.layers]

    def __call__(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """The beams' last codes (B, K) and the beams they continue (B, K) -> logits (B, K, C)."""
        model, x = self.model, self.last
        if level:
            x = model.embedding(codes + model.first_token[level - 1])                   # (B, K, M)
            far, near = self._biases(level)
            for (attention, feed_forward), memory, cache in zip(model.layers, self.memories, self.caches, strict=True):
                query, key, value = attention.project(x)                                # (B, H, K, width)
                cache.extend(key, value, parents)
                x = feed_forward(attention.add(x, _attend_to_both(query, *memory, far, cache, near)))
        return model.heads[level](model.norm(x))

    def _biases(self, level: int) -> tuple[Tensor, Tensor]:
        """The newest position's: towards the history, (B, H, 1, T), and its own beam's positions, (1, H, 1, l)."""
        bias, num_tokens = self.model.bias, self.memories[0][0].shape[2]
        token = torch.arange(num_tokens, device=self.end.device)
        far = bias.of(token - (self.end + level - 1).unsqueeze(1)).permute(2, 1, 0, 3)  # (B, H, 1, T)
        far = far + as_bias(token < self.end.unsqueeze(1))[:, None, None]
        return far, bias(level, level)[:, :, -1:]


def _attend_to_both(query: Tensor, key: Tensor, value: Tensor, far: Tensor, own: PrefixCache, near: Tensor) -> Tensor:
    """One softmax over the history's positions and the beam's own.

    query (B, H, K, width); key, value (B, H, T, width) -> (B, K, H * width).
    """
    scores = torch.cat([query @ key.transpose(-1, -2) + far, own.scores(query) + near], dim=3)
    far_weights, near_weights = scores.softmax(dim=-1).tensor_split([key.shape[2]], dim=3)
    return ((far_weights @ value).transpose(1, 2) + own.mix(near_weights)).flatten(2)
