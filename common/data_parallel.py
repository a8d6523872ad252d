"""Data-parallel training: each process computes a shard of every batch, and the gradients are averaged.

The averaged gradients equal the gradients of the whole batch. The number of processes therefore changes only the speed
and the rounding errors. If a model needs more than a mean over the rows of a batch, for example the number
of rows with each code, it must call `all_reduce_sum` or `all_gather`.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import all_reduce_max, rank, world_size
from common.errors import ConfigError

# B rows in the batch, P rows in this process's shard, W processes


class Shard(NamedTuple):
    """The part of a batch that one process computes."""

    rows: slice      # rows of the batch in this shard
    num_shards: int  # 1 if the shard is the whole batch
    num_rows: int    # rows in the whole batch, B

    def weight(self, own: int, whole: int) -> float:
        """Return the factor for the losses of this shard, so that their mean over all processes is the batch's loss.

        own: number of elements (such as rows) in this shard; each loss is a mean over elements
        whole: number of elements in the whole batch
        """
        # Shards can have different sizes, but DistributedDataParallel gives all processes the same weight.
        return own * self.num_shards / whole if self.num_shards > 1 else 1.0


WHOLE = Shard(slice(None), 1, 0)
_current = WHOLE


@contextmanager
def shard_batch(num_rows: int) -> Iterator[Shard]:
    """Split a batch of `num_rows` rows into one shard per process, and yield the shard of this process.

    Inside the `with` block, the functions of this module use this shard. If there are fewer rows than processes, every
    process computes the whole batch; an empty shard would give NaN.
    """
    global _current
    # With W processes, a shard has every W-th row. This distributes rows evenly if they are sorted by length.
    split = 1 < world_size() <= num_rows
    _current = Shard(slice(rank(), None, world_size()), world_size(), num_rows) if split else WHOLE
    try:
        yield _current
    finally:
        _current = WHOLE


@torch.no_grad()
def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum of `values` over all shards, without gradient."""
    if _current.num_shards == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def all_gather(rows: Tensor) -> Tensor:
    """Return the rows of the whole batch, in order and without gradient: (P, ...) -> (B, ...).

    rows: the rows of this process's shard
    """
    if _current.num_shards == 1:
        return rows
    longest = -(-_current.num_rows // _current.num_shards)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(_current.num_shards)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:_current.num_rows]


def shard_rows() -> slice:
    """Return the slice that selects the rows of this process's shard from the batch."""
    return _current.rows


def mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """Return the mean of `values` over the marked rows of the batch, as a scalar.

    values: one value for each of the P rows of this process's shard, (P,); it must be 0 if the row is not marked
    present: whether each row is marked, (P,) bool

    If there are several shards, the result is only the part of this shard. Multiply it by `Shard.weight` of the
    number of rows in the shard and in the batch. The mean over all processes is then the mean over the whole batch.
    """
    total = values.sum() / all_reduce_sum(present.sum()).clamp(min=1)
    return total if _current.num_shards == 1 else total * (_current.num_rows / len(values))


class _Losses(nn.Module):
    """A module with the trainable parameters of a model. The forward pass returns the losses that `compute` returns."""

    # DistributedDataParallel wraps this module instead of the model. It broadcasts all buffers of a module before each
    # step. Recommenders have large buffers that never change; this module has no buffers.

    def __init__(self, parameters: list[nn.Parameter], compute: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.trainable, self.compute = nn.ParameterList(parameters), compute

    def forward(self, *batch) -> dict[str, Tensor]:
        # The backward pass starts only from `loss_total`. The other losses are detached, because otherwise
        # DistributedDataParallel would wait for gradients of parameters that affect only the other losses.
        return {name: loss if name == "loss_total" else loss.detach() for name, loss in self.compute(*batch).items()}


def data_parallel(model: nn.Module, compute: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Wrap the function `compute`, so that the backward pass averages the gradients over all processes.

    `compute` returns a dict of losses. The backward pass must start from `loss_total`. This function also copies the
    model of the first process to the other processes.
    """
    if world_size() == 1:
        return compute
    sync(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        return compute
    # Some models do not use all of their parameters. With a static graph, PyTorch finds the unused ones only once, in
    # the first step. If other parameters are unused in a later step, PyTorch raises an error.
    return DistributedDataParallel(_Losses(trainable, compute), static_graph=True)


@torch.no_grad()
def sync(model: nn.Module) -> None:
    """Copy the parameters and buffers of the model from the first process to all other processes."""
    # Without the copy, the models could differ: on GPUs, the same computation may give different rounding errors.
    if world_size() > 1:
        for value in _state(model).values():
            shared = value.contiguous()
            dist.broadcast(_as_bytes(shared), 0)
            value.copy_(shared)


def check_same_model(model: nn.Module) -> None:
    """Raise ConfigError if the models of the processes differ.

    A typical cause is batch normalization, because each process computes the statistics from its own shard.
    """
    if world_size() == 1:
        return
    state = _state(model)
    digests = [int.from_bytes(hashlib.sha256(_as_bytes(value.cpu().contiguous()).numpy().data).digest()[:4], "little")
               for value in state.values()]
    highest, lowest = all_reduce_max(*digests), all_reduce_max(*(-digest for digest in digests))
    apart = [name for name, one, other in zip(state, highest, lowest, strict=True) if one != -other]
    if apart:
        raise ConfigError(type(model).__name__, f"{', '.join(apart[:3])} {'is' if len(apart) == 1 else 'are'} not the "
                          "same in all processes", "Each process used only its own part of the batch. A model that "
                          "computes more than a mean over the rows must use the functions of common/data_parallel.py",
                          "use one process (python instead of torchrun)")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and value.numel()}


def _as_bytes(value: Tensor) -> Tensor:
    """View a contiguous tensor as uint8. Every backend can send this type."""
    return value.flatten().view(torch.uint8)
