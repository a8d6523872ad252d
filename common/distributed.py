"""Several processes that do one job, as torchrun starts them. With one process nothing here does anything.

All of them read the same files and run the same program; the first alone writes and speaks. Importing this is cheap:
torch is loaded by those functions that need it.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import numpy as np
    import torch

# How long a process waits for the others in a collective. One that died is noticed at once, by its closed connection;
# this is for one that hangs, and has to outlast what the first does alone, such as writing the predictions.
PATIENCE = timedelta(minutes=10)


def world_size() -> int:
    """The number of processes. A WORLD_SIZE that something else than torchrun has set does not count."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number among those of its machine, which is also its GPU's."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def rank_seed_parts() -> tuple[int, ...]:
    """What a seed depends on beside the step, so that processes drop out different units; nothing for one process."""
    return (rank(),) if world_size() > 1 else ()


@contextmanager
def process_group(device: "torch.device") -> Iterator[None]:
    """The processes can talk to each other inside, and come out together; `end_process` takes them apart.

    One that is there already is used again: made anew, it would find the addresses of the last one, and hang.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
        # Flags and figures go as CPU tensors, which gloo sends without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield  # not in a `try`: after an error the others may be in a collective, and waiting for them would hang
    barrier()


def has_process_group() -> bool:
    """Whether this process is in a process group."""
    if world_size() == 1 or "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def end_process(code: int) -> NoReturn:
    """Leave the process group and end this process without the interpreter's own exit.

    In that one gloo aborts about a third of the processes that used DistributedDataParallel.
    """
    import torch.distributed as dist

    if code == 0:  # after an error the others may be in a collective, and waiting for them would hang
        dist.destroy_process_group()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has left, or it is closed
            stream.flush()
    os._exit(code)


def barrier() -> None:
    """Return when every process has come here."""
    all_reduce_max(0)


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """The largest of all processes' values, one by one."""
    if world_size() == 1:
        return values
    import torch
    import torch.distributed as dist

    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return tuple(shared.tolist())


def mean(values: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The processes' mean of each of these scalars."""
    if world_size() == 1 or not values:
        return values
    import torch
    import torch.distributed as dist

    shared = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(shared)
    return dict(zip(values, (shared / world_size()).unbind(), strict=True))


def all_gather_rows(*arrays: "np.ndarray") -> None:
    """Give every process all rows of arrays that start as zeros, each row written by one process."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    for array in arrays:
        dist.all_reduce(torch.from_numpy(array))  # in place; a sum with zeros is exact


def connection_lost(error: Exception) -> bool:
    """Whether a collective failed because another process has ended or hangs."""
    return world_size() > 1 and (type(error).__name__.startswith("Dist") or "gloo" in str(error))
