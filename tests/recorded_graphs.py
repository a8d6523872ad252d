"""A stand-in for CUDA graphs on the CPU: it records the operations of a step, and replays them on the same memory.

As on CUDA, a replay repeats operations and not Python code: numbers of Python keep the value that they had in the
recorded step, and every tensor keeps its address. Random numbers come from the default generator, so that each replay
draws new ones.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "_unique2", "unique_dim"}


def name_of(func) -> str:
    return func.name().removeprefix("aten::").partition(".")[0]


def tensors_in(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def written(func, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class NoWaiting(TorchDispatchMode):
    """Raises RuntimeError for an operation that would make the CPU wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name_of(func) in WAITING:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


class Recording(NoWaiting):
    """Records operations. `undo` restores the tensors that existed before and were changed."""

    def __init__(self):
        super().__init__()
        self.operations, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in written(func, args, kwargs or {}):
            if storage(tensor) not in self.own and tensor.data_ptr() not in self.before:
                self.before[tensor.data_ptr()] = (tensor, tensor.detach().clone())
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = {storage(tensor) for tensor in tensors_in((args, kwargs))}
        # None stands for an output that is a view of an input: a replay has nothing to copy.
        fresh = [None if storage(tensor) in inputs else tensor for tensor in tensors_in(outputs)]
        self.own |= {storage(tensor) for tensor in fresh if tensor is not None}
        if not name_of(func).startswith(("empty", "new_empty")):
            self.operations.append((func, args, kwargs or {}, fresh))
        return outputs

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self.operations:
            for old, new in zip(fresh, tensors_in(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


class RecordedGraphs:
    """Implements `common.capture.Graphs`. `captures` counts the captured steps."""

    def __init__(self):
        self.captures = 0

    def stream(self):
        return nullcontext()

    def no_synchronization(self):
        return NoWaiting()

    def fork_random(self):
        return torch.random.fork_rng([])

    def renew(self):
        pass

    def capture(self, step):
        self.captures += 1
        with torch.random.fork_rng([]), Recording() as recording:
            losses = step()
        recording.undo()
        return recording.replay, losses


@contextmanager
def recorded():
    """Yields the list of the names of the operations in the block."""
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        yield names
