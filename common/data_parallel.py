"""One model trained by several processes: each computes a part of every batch, and the gradients are averaged.

The gradients are those of the whole batch, so that the number of processes changes a run's speed and its roundings,
nothing else. The averaging is PyTorch's DistributedDataParallel. What a model does with a batch beside a mean over
its rows, such as counting the codes that were chosen, it does through `all_reduce_sum` and `all_gather`.
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

# B rows of a batch, P rows of this process's part of it, W processes


class Shard(NamedTuple):
    """What one process computes of a batch."""

    rows: slice     # of the batch
    num_shards: int  # 1: the whole batch
    num_rows: int   # of the whole batch, B

    def weighted(self, losses: dict[str, Tensor], own: int, whole: int) -> dict[str, Tensor]:
        """Means over `own` things, scaled such that the processes' mean of them is the one over `whole`.

        DistributedDataParallel averages gradients over the processes, and their parts are not equally large.
        """
        if self.num_shards == 1:
            return losses
        return {name: loss * (own * self.num_shards / whole) for name, loss in losses.items()}


WHOLE = Shard(slice(None), 1, 0)
_current = WHOLE


@contextmanager
def shard_batch(num_rows: int) -> Iterator[Shard]:
    """This process's part of a batch, which `all_reduce_sum` and the others know of inside.

    Every W-th row, so that rows sorted by length are shared evenly. Of fewer rows than processes nobody could get
    none, as a mean over no rows is no number: everybody computes them all then.
    """
    global _current
    split = 1 < world_size() <= num_rows
    _current = Shard(slice(rank(), None, world_size()), world_size(), num_rows) if split else WHOLE
    try:
        yield _current
    finally:
        _current = WHOLE


@torch.no_grad()
def all_reduce_sum(values: Tensor) -> Tensor:
    """The parts' values summed up; has no gradient."""
    if _current.num_shards == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def all_gather(rows: Tensor) -> Tensor:
    """(P, ...) -> (B, ...) all rows of the batch in their order; has no gradient. Own ones are at `shard_rows()`."""
    if _current.num_shards == 1:
        return rows
    longest = -(-_current.num_rows // _current.num_shards)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(_current.num_shards)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:_current.num_rows]


def shard_rows() -> slice:
    """Where this process's rows are among those of the batch."""
    return _current.rows


def mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """(P,), which is 0 for rows that are not present, -> (): the mean over the batch's present rows.

    A part's share in it, to be averaged by the part's number of rows as the means over all rows are.
    """
    total = values.sum() / all_reduce_sum(present.sum()).clamp(min=1)
    return total if _current.num_shards == 1 else total * (_current.num_rows / len(values))


class _Losses(nn.Module):
    """The trainable parameters, and a forward that calls what computes losses from them.

    DistributedDataParallel averages the gradients of a module's parameters, and sends its buffers around before each
    step. Recommenders have large ones that never change, so it gets to see the parameters alone.
    """

    def __init__(self, parameters: list[nn.Parameter], compute: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.trainable, self.compute = nn.ParameterList(parameters), compute

    def forward(self, *batch) -> dict[str, Tensor]:
        # Only the total is differentiated; what another loss alone depended on would be waited for in vain.
        return {name: loss if name == "loss_total" else loss.detach() for name, loss in self.compute(*batch).items()}


def data_parallel(model: nn.Module, compute: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """`compute`, which returns a dict of losses; the processes then average the gradient of `loss_total`."""
    if world_size() == 1:
        return compute
    sync(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        return compute
    # A model need not use all of its parameters. With a static graph, which ones is found out in the first step, where
    # `find_unused_parameters` would look for them in each; one that uses others from step to step ends in an error.
    return DistributedDataParallel(_Losses(trainable, compute), static_graph=True)


@torch.no_grad()
def sync(model: nn.Module) -> None:
    """Give every process the first one's model. On GPUs the same sums need not round alike."""
    if world_size() > 1:
        for value in _state(model).values():
            shared = value.contiguous()
            dist.broadcast(_as_bytes(shared), 0)
            value.copy_(shared)


def check_same_model(model: nn.Module) -> None:
    """Raise ConfigError if the processes' models have come apart, as by batch normalization or own moving averages."""
    if world_size() == 1:
        return
    state = _state(model)
    digests = [int.from_bytes(hashlib.sha256(_as_bytes(value.cpu().contiguous()).numpy().data).digest()[:4], "little")
               for value in state.values()]
    highest, lowest = all_reduce_max(*digests), all_reduce_max(*(-digest for digest in digests))
    apart = [name for name, one, other in zip(state, highest, lowest, strict=True) if one != -other]
    if apart:
        raise ConfigError(type(model).__name__, f"{', '.join(apart[:3])} {'is' if len(apart) == 1 else 'are'} not the "
                          "same in all processes", "it was computed from a part of the batch; a model that does more "
                          "with a batch than a mean over its rows uses common/data_parallel.py for it",
                          "one process: python instead of torchrun")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and value.numel()}


def _as_bytes(value: Tensor) -> Tensor:
    """A contiguous tensor's own memory as uint8, which every backend can send."""
    return value.flatten().view(torch.uint8)
