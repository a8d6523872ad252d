"""Layers as in T5 (Raffel et al. 2020, arXiv 1910.10683), with pre-norm, relative positions, and no bias terms.

On a GPU, a training step of a small model takes as long as the launches of its kernels. So these layers need few
operations:

- The positions are the first dimension of all hidden states, (T, B, M), and the parts of a head (query, key and value)
  are next to each other. Then the heads of all rows are a strided view of a projection, which the batched matrix
  product reads without a copy.
- Masks and tables that depend only on shapes are made once per shape (see attention_bias.py).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_bias import RelativeBias

# B batch, Q query positions, T key positions, M model width, H heads, K width of a head

# Whether training uses the fused attention of PyTorch too. A learned bias is then expanded to (B, H, Q, T).
FUSED_ATTENTION = False

IGNORED = -100  # label of padding; the loss ignores this label
EPSILON = 1e-6  # of RMSNorm, as in T5

RMSNorm = partial(nn.RMSNorm, eps=EPSILON)


def stack(num_blocks: int, make: Callable[[], Iterable[nn.Module]]) -> Any:
    """Return a ModuleList of `num_blocks` blocks. Each call of `make` returns the layers of one block."""
    # The return type is Any, because type checkers do not know the types of the layers in a ModuleList.
    return nn.ModuleList(nn.ModuleList(make()) for _ in range(num_blocks))


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Apply dropout. On the CPU, the rate is rounded to a multiple of 1/256."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    # Use one byte of a random 64-bit number per element. One random number per element, as in `F.dropout`, took 40 % of
    # a training step.
    threshold = min(round(256 * rate), 255)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    # Convert the bytes to floats first and then compare, because converting booleans to floats is much slower.
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape).float().ge_(threshold)
    return x * kept.mul_(256 / (256 - threshold))


def split_heads(x: Tensor, num_heads: int, num_parts: int = 1) -> tuple[Tensor, ...]:
    """Split the last dimension into heads, and each head into parts: (T, B, H * parts * K) -> (B, H, T, K) each."""
    # B and H are neighbors in memory, so a matrix product can use each part without a copy.
    return tuple(part.permute(1, 2, 0, 3) for part in x.unflatten(-1, (num_heads, -1)).chunk(num_parts, dim=-1))


def split_weight(weight: Tensor, num_heads: int, num_parts: int) -> list[Tensor]:
    """Return the weights of each part of a projection: (H * parts * K, M) -> (H * K, M) each. See `split_heads`."""
    return [part.flatten(0, 1) for part in weight.unflatten(0, (num_heads, num_parts, -1)).unbind(1)]


def join_weights(parts: list[Tensor], num_heads: int) -> Tensor:
    """The inverse of `split_weight`: (H * K, M) each -> (H * parts * K, M)."""
    return torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], dim=1).flatten(0, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rate: float = 0.0) -> Tensor:
    """Return the attention output: query (B, H, Q, K), key and value (B, H, T, K) -> (Q, B, H * K).

    bias: added to the scores, broadcastable to (B, H, Q, T)
    rate: dropout rate of the attention weights

    As in T5, the scores are not divided by the square root of K. Instead, `initialize` makes the query weights smaller.
    """
    if FUSED_ATTENTION or (not torch.is_grad_enabled() and rate == 0.0):
        # The fused kernel saves memory, because it does not store all scores.
        expanded = None if bias is None else bias.expand(*query.shape[:-1], key.shape[2])
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=expanded, dropout_p=rate, scale=1.0)
    else:
        scores = query @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        attended = dropout(scores.softmax(dim=-1), rate, training=rate > 0) @ value
    return attended.permute(2, 0, 1, 3).flatten(2)


class SelfAttention(nn.Module):
    """Pre-norm self-attention with a residual connection.

    The rows of `qkv.weight` are ordered by heads. Each head has the weights of its query, key and value.
    """

    def __init__(self, width: int, num_heads: int, head_width: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * num_heads * head_width, bias=False)
        self.out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.attend(x, *self.project(x), bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values: (T, B, M) -> (B, H, T, K) each."""
        query, key, value = split_heads(self.qkv(self.norm(x)), self.num_heads, 3)
        return query, key, value

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return self.add(x, attend(query, key, value, bias, self.dropout if self.training else 0.0))

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + dropout(self.out(attended), self.dropout, self.training)


class Memory(nn.Module):
    """The keys and values of an encoder's output (the memory) for the cross-attention of all decoder layers.

    The rows of `key_value.weight` are ordered by heads. Each head has the weights of its key and value of each layer.
    """

    def __init__(self, width: int, num_heads: int, head_width: int, num_layers: int):
        super().__init__()
        self.num_heads, self.num_layers = num_heads, num_layers
        self.key_value = nn.Linear(width, 2 * num_layers * num_heads * head_width, bias=False)

    def forward(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and the values for each layer: (T, B, M) -> (B, H, T, K) each."""
        parts = split_heads(self.key_value(memory), self.num_heads, 2 * self.num_layers)
        return list(zip(parts[::2], parts[1::2], strict=True))


class CrossAttention(nn.Module):
    """Pre-norm attention to the output of an encoder, with a residual connection."""

    def __init__(self, width: int, num_heads: int, head_width: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(width)
        self.query = nn.Linear(width, num_heads * head_width, bias=False)
        self.out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Attend from each position of `x` to the memory: (Q, B, M) -> (Q, B, M).

        memory: the keys and values of this layer from `Memory`, for the same batch
        """
        [query] = split_heads(self.query(self.norm(x)), self.num_heads)
        attended = attend(query, *memory, bias, self.dropout if self.training else 0.0)
        return x + dropout(self.out(attended), self.dropout, self.training)


class FeedForward(nn.Module):
    """A pre-norm network of two linear layers, with a residual connection."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm = RMSNorm(width)
        self.wi = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = dropout(self.wi(self.norm(x)).relu_(), self.dropout, self.training)
        return x + dropout(self.wo(hidden), self.dropout, self.training)


def missing_codes(sizes: list[int]) -> Tensor | None:
    """Return which of the C codes of the largest codebook each level lacks: (L, C) bool. None if no code is missing."""
    missing = torch.arange(max(sizes)) >= torch.tensor(sizes).unsqueeze(1)
    return missing if missing.any() else None


def masked_cross_entropy(logits: Tensor, labels: Tensor, missing: Tensor | None, smoothing: float) -> Tensor:
    """Return the mean cross-entropy over all labels except IGNORED.

    logits: (..., C)
    labels: (...)
    missing: bool, broadcastable to the logits, whether a class does not exist; None if all classes exist
    smoothing: share of the target probability that is spread evenly over the classes that exist
    """
    if missing is not None:
        logits = logits.masked_fill(missing, float("-inf"))
    if missing is None or not smoothing:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)
    log_probs = logits.log_softmax(dim=-1)
    loss = F.nll_loss(log_probs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    even = -log_probs.masked_fill(missing, 0.0).sum(dim=-1) / (~missing).sum(dim=-1)
    counted = labels != IGNORED
    return torch.lerp(loss, (even * counted).sum() / counted.sum(), smoothing)


def masked_distribution_loss(logits: Tensor, labels: Tensor, counted: Tensor, missing: Tensor | None,
                             smoothing: float) -> Tensor:
    """Return the mean cross-entropy of distributions over classes.

    logits, labels: (L, P, C)
    counted: (P,) bool, whether to count the distributions of a column
    missing, smoothing: as in `masked_cross_entropy`
    """
    exists = torch.ones_like(logits) if missing is None else (~missing).to(logits).expand(logits.shape)
    if missing is not None:
        logits = logits.masked_fill(missing, torch.finfo(logits.dtype).min)
    labels = torch.lerp(labels, exists / exists.sum(dim=2, keepdim=True).clamp(min=1), smoothing)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none").view(labels.shape[:2])
    return (losses * counted).sum() / (counted.sum() * len(logits))


@torch.no_grad()
def initialize(module: nn.Module, width: int, head_width: int) -> None:
    """Initialize all attention, feed-forward and bias layers inside `module` as in T5."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention | CrossAttention):
            nn.init.normal_(layer.out.weight, std=layer.out.in_features**-0.5)
            query_std, std = (width * head_width) ** -0.5, width**-0.5
            if isinstance(layer, SelfAttention):
                nn.init.normal_(layer.qkv.weight, std=std)
                layer.qkv.weight.unflatten(0, (layer.num_heads, 3, -1))[:, 0] *= query_std / std
            else:
                nn.init.normal_(layer.query.weight, std=query_std)
        elif isinstance(layer, Memory):
            nn.init.normal_(layer.key_value.weight, std=width**-0.5)
        elif isinstance(layer, FeedForward):
            nn.init.normal_(layer.wi.weight, std=width**-0.5)
            nn.init.normal_(layer.wo.weight, std=layer.wo.in_features**-0.5)
        elif isinstance(layer, RelativeBias):
            nn.init.normal_(layer.weight, std=width**-0.5)
