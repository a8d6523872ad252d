"""Attention biases: numbers that are added to the scores of attention. They express positions, and hide keys."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

# B batch, Q query positions, T key positions, H heads

HIDDEN = torch.finfo(torch.float32).min  # bias of hidden keys; with -inf, rows in which all keys are hidden give NaN
NUM_CONSTANTS = 256  # number of cached results of each function with `constant`; the oldest are dropped

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


class Pairs(NamedTuple):
    """All pairs of a query and a key. See `RelativeBias.forward`."""

    queries: range
    num_keys: int
    hide_from: float
    group: int

    def of(self, buckets: Buckets, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the bucket of each pair, and `hidden`, the attention bias that hides pairs: (Q, T) each."""
        query = torch.arange(self.queries.start, self.queries.stop, self.queries.step, device=device).unsqueeze(1)
        key = torch.arange(self.num_keys, device=device)
        return buckets.of(key - query), as_bias(key - query // self.group * self.group < self.hide_from)


@constant
def _pair_tables(buckets: Buckets, pairs: Pairs, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tables for all pairs: 1 at the bucket of each pair, (num_buckets, Q * T), and `hidden`, (1, Q * T)."""
    bucket, hidden = pairs.of(buckets, device)
    one_hot = bucket.flatten() == torch.arange(buckets.num_buckets, device=device).unsqueeze(1)
    return one_hot.to(dtype), hidden.to(dtype).view(1, -1)


class RelativeBias(nn.Module):
    """A learned attention bias that depends on the head and on the distance between query and key.

    Distances are grouped into buckets (see `Buckets`). Each bucket has one value per head.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__()
        self.buckets = Buckets(num_buckets, max_distance, bidirectional)
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def forward(self, queries: range, num_keys: int, hide_from: float = math.inf, group: int = 1) -> Tensor:
        """Return the bias for all pairs of a query and a key: (H, Q, T). The keys are at the positions 0 to T - 1.

        queries: the positions of the queries
        hide_from: hide the keys at this distance from the query and at larger distances; 1 hides all keys after it
        group: positions form groups of this size, and `hide_from` counts from the first position of the query's group
        """
        pairs, weight = Pairs(queries, num_keys, hide_from, group), self.weight
        if not torch.is_grad_enabled():
            bucket, hidden = pairs.of(self.buckets, weight.device)
            return weight[bucket].permute(2, 0, 1) + hidden
        # The backward pass of this product is a product too. The backward pass of an index would sort on CUDA.
        one_hot, hidden = _pair_tables(self.buckets, pairs, weight.device, weight.dtype)
        with full_precision(weight.device):
            return torch.addmm(hidden, weight.T, one_hot).view(-1, len(queries), num_keys)

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


def as_bias(allowed: Tensor) -> Tensor:
    """Convert a mask to an attention bias. The bias is 0 for True and the most negative float32 for False."""
    return ~allowed * HIDDEN


def expand_bias(bias: Tensor, num_rows: int) -> Tensor:
    """Return a view of the bias with one bias per row of the batch: (H, Q, T) or (B, ..., T) -> (B, ..., T)."""
    # If the layers share the view, the backward pass adds the gradients of the layers first, and then sums over the
    # rows once. Otherwise, it sums over the rows in each layer.
    return bias.expand(num_rows, *bias.shape[-3:])


@constant
def causal_bias(num_positions: int, device: torch.device) -> Tensor:
    """Return the bias that lets each position attend only to itself and to earlier positions: (T, T)."""
    position = torch.arange(num_positions, device=device)
    return as_bias(position <= position.unsqueeze(1))
