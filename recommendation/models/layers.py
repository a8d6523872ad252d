"""Layers as in T5 (Raffel et al. 2020, arXiv 1910.10683), with pre-norm, relative positions, and no bias terms.

On a GPU, a training step of a small model takes as long as the launches of its kernels. So these layers need few
operations:

- The positions are the first dimension of all hidden states, (T, B, M), and the parts of a head (query, key and value)
  are next to each other. Then the heads of all rows are a strided view of a projection, which the batched matrix
  product reads without a copy.
- Masks and tables that depend only on shapes are made once per shape (see `constant`).
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, Q query positions, T key positions, M model width, H heads, K width of a head, D distances

# Whether training uses the fused attention of PyTorch too. A learned bias is then expanded to (B, H, Q, T).
FUSED_ATTENTION = False

IGNORED = -100        # label of padding; the loss ignores this label
NUM_CONSTANTS = 64    # number of cached results of each function with `constant`; the oldest are dropped
HIDDEN = torch.finfo(torch.float32).min  # attention bias of hidden positions; with -inf, rows of only -inf give NaN
EPSILON = 1e-6        # of RMSNorm, as in T5

RMSNorm = partial(nn.RMSNorm, eps=EPSILON)

Result = TypeVar("Result")


def constant(make: Callable[..., Result]) -> Callable[..., Result]:
    """Cache the tensors that `make` returns for its arguments: shapes, a device and a type.

    A captured CUDA graph reads the cached tensors at every replay, so they must stay in memory. Only training needs
    the cache. Without gradients, `make` is called each time, because recommending has many shapes and would drop the
    tensors of training.
    """
    cached = lru_cache(maxsize=NUM_CONSTANTS)(make)

    @wraps(make)
    def call(*args: Any) -> Result:
        return cached(*args) if torch.is_grad_enabled() else make(*args)

    return call


def stack(num_blocks: int, make: Callable[[], Iterable[nn.Module]]) -> Any:
    """Return a ModuleList of `num_blocks` blocks. Each call of `make` returns the layers of one block."""
    # The return type is Any, because type checkers do not know the types of the layers in a ModuleList.
    return nn.ModuleList(nn.ModuleList(make()) for _ in range(num_blocks))


class Buckets(NamedTuple):
    """Groups of distances between a query and a key.

    Half of the buckets contain one small distance each. The other buckets contain ranges that grow logarithmically up
    to `max_distance`. The last bucket also contains all larger distances.

    With `bidirectional`, half of all buckets are for keys after the query. Without `bidirectional`, all keys after the
    query are in the bucket of distance 0.
    """

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def of(self, distance: Tensor) -> Tensor:
        """Return the bucket of each distance: the position of the key minus the position of the query."""
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


@constant
def _distance_tables(buckets: Buckets, distances: range, hide_from: float, device: torch.device,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tables for D consecutive distances.

    The first table, (num_buckets, D), has 1 at the bucket of each distance. The second table, (1, D), is the attention
    bias that hides the distances from `hide_from`.
    """
    distance = torch.arange(distances.start, distances.stop, device=device)
    one_hot = buckets.of(distance) == torch.arange(buckets.num_buckets, device=device).unsqueeze(1)
    return one_hot.to(dtype), as_bias(distance < hide_from).to(dtype).unsqueeze(0)


class RelativeBias(nn.Module):
    """A learned attention bias that depends on the head and on the distance between query and key.

    Distances are grouped into buckets (see `Buckets`). Each bucket has one value per head.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__()
        self.buckets = Buckets(num_buckets, max_distance, bidirectional)
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def forward(self, num_queries: int, num_keys: int, start: int = 0, step: int = 1,
                hide_from: float = math.inf) -> Tensor:
        """Return the bias for all pairs of a query and a key: (H, Q, T). The keys are at the positions 0 to T - 1.

        start, step: query i is at position `start + i * step`
        hide_from: hide the keys at this distance from the query and at larger distances; 1 hides all keys after it
        """
        distances = range(-start - (num_queries - 1) * step, num_keys - start)
        one_hot, hidden = _distance_tables(self.buckets, distances, hide_from, self.weight.device, self.weight.dtype)
        # The backward pass of this product is a product too. The backward pass of an index would sort on CUDA.
        with full_precision(self.weight.device):
            by_distance = torch.addmm(hidden, self.weight.T, one_hot)                          # (H, D)
        # The bias of a query is a window of the distances. The last query has the first window.
        return by_distance.unfold(1, num_keys, step).flip(1)

    def of(self, distance: Tensor) -> Tensor:
        """Return the bias for the given distances, for use without gradients: (Q, T) -> (H, Q, T).

        distance: position of the key minus position of the query
        """
        return self.weight[self.buckets.of(distance)].permute(2, 0, 1)

    @torch.no_grad()
    def start_recent(self) -> None:
        """Initialize the bias such that each query prefers keys shortly before it.

        From one bucket to the next, the bias decreases by 1 in the first head, by 1/2 in the second head, by 1/4 in the
        third head, and so on. The idea is from ALiBi (Press et al. 2022, arXiv 2108.12409).
        """
        num_before = self.buckets.num_buckets // (2 if self.buckets.bidirectional else 1)
        slopes = 2.0 ** -torch.arange(self.weight.shape[1])
        self.weight.zero_()
        self.weight[:num_before] = -slopes * torch.arange(num_before).unsqueeze(1)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context that turns autocast off. The meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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


def as_bias(allowed: Tensor) -> Tensor:
    """Convert a mask to an attention bias. The bias is 0 for True and the most negative float32 for False."""
    return ~allowed * HIDDEN


def expand_bias(bias: Tensor, num_rows: int) -> Tensor:
    """Return a view of the bias with one bias per row of the batch: (H, Q, T) or (B, ..., T) -> (B, ..., T)."""
    # If the layers share the view, the backward pass adds the gradients of the layers first, and then sums over the
    # rows once. Otherwise, it sums over the rows in each layer.
    return bias.expand(num_rows, *bias.shape[-3:])


@constant
def causal_bias(num_positions: int, device: torch.device, group: int = 1) -> Tensor:
    """Return the bias that lets each position attend only to its own group and to earlier groups: (T, T).

    group: number of positions in a group; with 1, each position attends to itself and to earlier positions
    """
    number = torch.arange(num_positions, device=device) // group
    return as_bias(number <= number.unsqueeze(1))


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
