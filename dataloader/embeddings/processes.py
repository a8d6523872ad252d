"""Steps 3 and 4 in several processes (torchrun): the first one decides, locks, downloads and publishes.

All processes encode. A single process can call these functions too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from common.distributed import all_reduce_max, is_main, process_group, rank, world_size
from common.errors import UserError
from common.lock import FolderLock
from common.machine import machine_error

T = TypeVar("T")

# The maximum time that a process waits for the others. To download a model, or to encode a shard, may take hours.
PATIENCE = timedelta(days=1)


def embedding_processes():
    """Return a context manager that connects the processes, and waits for all of them at its end."""
    return process_group(patience=PATIENCE)


@contextmanager
def same_error(*kinds: type[Exception]) -> Iterator[None]:
    """Raise the error of one process in all processes, at the end of the `with` block.

    If several processes have an error, all of them raise the error of the lowest rank. The errors are UserErrors,
    errors of the machine such as a full disk, and exceptions of `kinds`. Any other exception is raised only in its own
    process. The block must not communicate with other processes.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised if isinstance(raised, (UserError, *kinds)) else machine_error(raised)
        if world_size() == 1 or error is None:
            raise
    for number, other in enumerate(_all_gather(error)):
        if other is not None:
            raise error if number == rank() else other  # its own error has a traceback


def _all_gather(error: Exception | None) -> list[Exception | None]:
    """Return the error, or None, of each process."""
    if world_size() == 1:
        return []
    import torch.distributed as dist

    errors: list[Exception | None] = [None] * world_size()
    # PyTorch pickles the errors. This is safe, because they come only from the processes of this command.
    dist.all_gather_object(errors, error)
    return errors


def decided_by_first(decide: Callable[[], bool]) -> bool:
    """Return the result of `decide` in the first process. The other processes do not call it."""
    with same_error():
        decision = is_main() and decide()
    return bool(all_reduce_max(decision)[0])


def done_by_first(work: Callable[[], T]) -> T | None:
    """Call `work` in the first process while the others wait. Return its result there, and None in the others."""
    with same_error():
        return work() if is_main() else None


def first_before_others(work: Callable[[], T]) -> T:
    """Call `work` in the first process, and then in the others, and return its result."""
    result = done_by_first(work)
    with same_error():
        return work() if result is None else result


@contextmanager
def locked_by_first(folder: Path) -> Iterator[None]:
    """Lock the folder in the first process until the end of the `with` block."""
    with same_error():
        lock = FolderLock(folder) if is_main() else nullcontext()
    with lock:
        yield
