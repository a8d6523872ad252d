"""Layers as in T5 (Raffel et al. 2020, arXiv 1910.10683), with pre-norm, relative positions, and no bias terms."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, Q query positions, T key positions, M model width, H heads, K width of a head


def stack(num_blocks: int, make: Callable[[], Iterable[nn.Module]]) -> Any:
    """Return a ModuleList of `num_blocks` blocks. Each call of `make` returns the layers of one block."""
    # The return type is Any, because type checkers do not know the types of the layers in a ModuleList.
    return nn.ModuleList(nn.ModuleList(make()) for _ in range(num_blocks))


class RMSNorm(nn.Module):
    """Layer normalization by the root mean square, without subtracting the mean and without a bias."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)


class RelativeBias(nn.Module):
    """A learned attention bias that depends on the head and on the distance between query and key.

    Distances are grouped into buckets. Each bucket has one value per head. Half of the buckets contain one small
    distance each. The other buckets contain ranges that grow logarithmically up to `max_distance`. The last bucket also
    contains all larger distances.

    With `bidirectional`, half of all buckets are for keys after the query. Without `bidirectional`, all keys after the
    query are in the bucket of distance 0.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """Return the bias for all pairs of a query and a key: (1, H, Q, T). Positions start at 0."""
        device = self.weight.device
        return self.of(torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device).unsqueeze(1))

    def of(self, distance: Tensor) -> Tensor:
        """Return the bias for the given distances: (Q, T) -> (1, H, Q, T).

        distance: position of the key minus position of the query
        """
        return self.weight[self._bucket(distance)].permute(2, 0, 1).unsqueeze(0)

    @torch.no_grad()
    def start_recent(self) -> None:
        """Initialize the bias such that each query prefers keys shortly before it.

        From one bucket to the next, the bias decreases by 1 in the first head, by 1/2 in the second head, by 1/4 in the
        third head, and so on. The idea is from ALiBi (Press et al. 2022, arXiv 2108.12409).
        """
        num_before = self.num_buckets // (2 if self.bidirectional else 1)
        slopes = 2.0 ** -torch.arange(self.weight.shape[1])
        self.weight.zero_()
        self.weight[:num_before] = -slopes * torch.arange(num_before).unsqueeze(1)

    def _bucket(self, distance: Tensor) -> Tensor:
        num_buckets, offset = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            num_buckets //= 2
            offset = (distance > 0).long() * num_buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        num_exact = num_buckets // 2
        scale = (num_buckets - num_exact) / math.log(self.max_distance / num_exact)
        far = num_exact + (torch.log(distance.clamp(min=1).float() / num_exact) * scale).long()
        return offset + torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Apply dropout. On the CPU, the rate is rounded to a multiple of 1/256."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    # Use one byte of a random 64-bit number per element. One random number per element, as in `F.dropout`, took 40 % of
    # a training step. torch.compile does not support this code.
    threshold = min(round(256 * rate), 255)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    # Convert the bytes to floats first and then compare, because converting booleans to floats is much slower.
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape).float().ge_(threshold)
    return x * kept.mul_(256 / (256 - threshold))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split the last dimension into heads: (B, T, H * K) -> (B, H, T, K)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
           rate: float = 0.0) -> Tensor:
    """Return the attention output: query (B, H, Q, K), key and value (B, H, T, K) -> (B, Q, H * K).

    bias: added to the scores, broadcastable to (B, H, Q, T)
    rate: dropout rate of the attention weights

    As in T5, the scores are not divided by the square root of K. Instead, `initialize` makes the query weights smaller.
    """
    if not torch.is_grad_enabled() and rate == 0.0:
        # The fused kernel saves memory, because it does not store all scores.
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return attended.transpose(1, 2).flatten(2)
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = dropout(scores.softmax(dim=-1), rate, training=rate > 0)
    return (weights @ value).transpose(1, 2).flatten(2)


def as_bias(allowed: Tensor) -> Tensor:
    """Convert a mask to an attention bias. The bias is 0 for True and the most negative float32 for False."""
    # With -inf for False, a row that has only False would give NaN.
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


def causal_bias(num_positions: int, device: torch.device) -> Tensor:
    """Return the bias that lets each position attend only to itself and to earlier positions: (T, T)."""
    position = torch.arange(num_positions, device=device)
    return as_bias(position <= position.unsqueeze(1))


class SelfAttention(nn.Module):
    """Pre-norm self-attention with a residual connection."""

    def __init__(self, width: int, num_heads: int, head_width: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * num_heads * head_width, bias=False)
        self.out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.attend(x, *self.project(x), bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values: (B, T, M) -> (B, H, T, K) each."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return query, key, value

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return self.add(x, attend(query, key, value, bias, self.dropout if self.training else 0.0))

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + dropout(self.out(attended), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Pre-norm attention to the output of an encoder (the memory), with a residual connection.

    Call `project_memory` once per batch, and pass its result to `forward`.
    """

    def __init__(self, width: int, num_heads: int, head_width: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(width)
        self.query = nn.Linear(width, num_heads * head_width, bias=False)
        self.key_value = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.out = nn.Linear(num_heads * head_width, width, bias=False)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of the memory: (B, T, M) -> (B, H, T, K) each."""
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(memory).chunk(2, dim=-1))
        return key, value

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Attend from each position of `x` to the memory: (B, Q, M) -> (B, Q, M).

        memory: the keys and values from `project_memory`, for the same batch
        """
        query = split_heads(self.query(self.norm(x)), self.num_heads)
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


@torch.no_grad()
def initialize(module: nn.Module, width: int, head_width: int) -> None:
    """Initialize all attention, feed-forward and bias layers inside `module` as in T5."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention | CrossAttention):
            nn.init.normal_(layer.out.weight, std=layer.out.in_features**-0.5)
            query_std, std = (width * head_width) ** -0.5, width**-0.5
            if isinstance(layer, SelfAttention):
                nn.init.normal_(layer.qkv.weight, std=std)
                layer.qkv.weight[: len(layer.qkv.weight) // 3] *= query_std / std
            else:
                nn.init.normal_(layer.query.weight, std=query_std)
                nn.init.normal_(layer.key_value.weight, std=std)
        elif isinstance(layer, FeedForward):
            nn.init.normal_(layer.wi.weight, std=width**-0.5)
            nn.init.normal_(layer.wo.weight, std=layer.wo.in_features**-0.5)
        elif isinstance(layer, RelativeBias):
            nn.init.normal_(layer.weight, std=width**-0.5)
