"""Functions for commands that torchrun starts as several processes. A single process can call them too.

All processes run the same program and read the same files. Only the first one (rank 0) writes files and prints.
"""

# To make this import fast, torch is imported inside the functions that need it.

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import numpy as np
    import torch

# The maximum time that a process waits for a process that hangs. (If a process ends, the others notice it immediately.)
# This time must be longer than everything that the first process does alone, such as writing the predictions.
PATIENCE = timedelta(minutes=10)


def world_size() -> int:
    """Return the number of processes: 1 if the command was not started by torchrun."""
    # Other programs, such as a job scheduler, may set WORLD_SIZE too.
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return the number of this process. Numbers start at 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the number of this process on its machine. Numbers start at 0. The process uses the GPU of this number."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def is_main() -> bool:
    """Return whether this is the first process, which writes files and prints."""
    return rank() == 0


def rank_seed_parts() -> tuple[int, ...]:
    """Return additional arguments for `derive_seed`, so that each process gets different random numbers.

    If there is only one process, the result is ().
    """
    return (rank(),) if world_size() > 1 else ()


@contextmanager
def process_group(device: "torch.device | None" = None, patience: timedelta = PATIENCE) -> Iterator[None]:
    """Create the process group, and wait for all processes at the end of the `with` block.

    device: the device of tensors that the processes exchange; None: only tensors on the CPU
    patience: the maximum time that a process waits for the others

    The group still exists after the block, and a second call uses it again. `end_process` destroys it. If there is only
    one process, no group is created.
    """
    # Do not destroy the group here: a second group would find the addresses of the first one and hang.
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu:
            import torch

            torch.cuda.set_device(device)
        # Flags and metrics are CPU tensors: gloo sends them without waiting for the GPU.
        with ended_by_sigterm():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    yield  # not in a `try`: after an error the others may be in a collective operation, and the barrier would hang
    barrier()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process at once. Without this, Python handles the signal only when a call in C++ returns.

    If another process fails before the group exists, torchrun would wait 30 seconds for this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def has_process_group() -> bool:
    """Return whether this process is in a process group."""
    if world_size() == 1 or "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def end_process(code: int) -> NoReturn:
    """Leave the process group, and end this process with the exit code `code`."""
    # Skip Python's normal shutdown: there, gloo aborts about a third of the processes that used
    # DistributedDataParallel.
    import torch.distributed as dist

    if code == 0:  # after an error the others may be in a collective operation, and this call would hang
        dist.destroy_process_group()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a broken pipe, or a closed stream
            stream.flush()
    os._exit(code)


def barrier() -> None:
    """Wait until every process has called this function."""
    all_reduce_max(0)


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """For each value, return its maximum over all processes."""
    if world_size() == 1:
        return values
    import torch
    import torch.distributed as dist

    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return tuple(shared.tolist())


def mean(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each number over all processes."""
    if world_size() == 1 or not values:
        return values
    import torch
    import torch.distributed as dist

    shared = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(shared)
    return dict(zip(values, (shared / world_size()).tolist(), strict=True))


def all_gather_rows(*arrays: "np.ndarray") -> None:
    """In each array, fill in the rows that other processes have computed. The arrays are changed in place.

    Each row must be computed by exactly one process. In the other processes, the row must be zero before the call.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    for array in arrays:
        dist.all_reduce(torch.from_numpy(array))  # in place; a sum with zeros is exact


def connection_lost(error: Exception) -> bool:
    """Return whether the error was raised because another process has ended or hangs."""
    return world_size() > 1 and (type(error).__name__.startswith("Dist") or "gloo" in str(error))
