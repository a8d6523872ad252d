"""Captured training steps: a GPU replays a recorded step, without the work of Python and of launching each kernel.

A step is captured once for each shape of its inputs, as a CUDA graph. This module knows no model: a step is a function
of tensors. It may change other tensors in place, such as parameters, buffers and the state of an optimizer.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from common.errors import ConfigError, ResourceError, out_of_memory

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Step = Callable[..., Losses]

MAX_SHAPES = 32     # further shapes are not captured, because each graph needs memory
NUM_EAGER = 2       # the first steps of a shape are eager: they allocate the state of the optimizer and of libraries
# These replays of a shape are compared with eager steps: the first ones, and some more to find numbers of Python that
# change slowly. In a captured step, they keep their value.
COMPARED = (1, 2, 100, 1000)
LOSS_TOLERANCE = 1e-3
UPDATE_TOLERANCE = 0.1  # of the length of the update: Adam may change a weight by its learning rate due to rounding


class Graphs(Protocol):
    """The operations of a device that captured steps need."""

    def stream(self) -> AbstractContextManager:
        """Return a context in which all steps of a training run must be taken."""

    def no_synchronization(self) -> AbstractContextManager:
        """Return a context in which waiting for the device raises RuntimeError."""

    def fork_random(self) -> AbstractContextManager:
        """Return a context that restores the state of the random number generators at its end."""

    def capture(self, step: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        """Record the step without taking it. Return a function that takes it, and the tensors with its losses."""

    def renew(self) -> None:
        """Forget the memory of all captured steps. They must not be used afterwards."""


class CudaGraphs:
    """CUDA graphs with a common memory pool and a common stream."""

    def __init__(self, device: torch.device):
        self.device, self.side = device, torch.cuda.Stream(device)
        self.renew()

    def renew(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        # Eager steps use this stream too. Otherwise, the gradient accumulation of a captured step could run on another
        # stream, which ends the capture with an error.
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.side)

    @contextmanager
    def no_synchronization(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def fork_random(self) -> AbstractContextManager:
        return torch.random.fork_rng([self.device])

    def capture(self, step: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            losses = step()
        return graph.replay, losses


class _Shape:
    """The captured step of one shape of inputs."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.replay: Callable[[], None] | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.losses: Losses = {}
        self.num_replays = 0


class CapturedSteps:
    """Takes steps, and captures each shape after its first two steps.

    Some replays of a shape are compared with eager steps. If they differ, or if the step waits for the device, all
    later steps are eager. No step is lost, and a warning gives the reason.
    """

    def __init__(self, step: Step, state: Callable[[], list[list[Tensor]]], graphs: Graphs, required: bool = False):
        """Store the step.

        step: takes a step on the inputs, and returns its losses without gradient. It must start without gradients.
        state: returns groups of all tensors that a step changes; the change of a group is compared as a whole
        required: raise ConfigError if the step cannot be captured
        """
        self.step, self.state, self.graphs, self.required = step, state, graphs, required
        self.active = True
        self.addresses: list[int] = []
        self.shapes: dict[tuple, _Shape] = {}

    def __call__(self, *inputs: Tensor) -> Losses:
        """Take a step. The returned tensors may change in the next step."""
        if not self.active:
            return self.step(*inputs)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self.shapes and len(self.shapes) == MAX_SHAPES:
            return self.step(*inputs)
        shape = self.shapes.setdefault(key, _Shape())
        shape.num_steps += 1
        if shape.num_steps < NUM_EAGER:
            return self.step(*inputs)
        if shape.num_steps == NUM_EAGER:
            return self._checked_step(inputs)
        if shape.replay is None:
            self._capture(shape, inputs)
        shape.num_replays += 1
        if shape.num_replays in COMPARED:
            return self._compared_step(shape, inputs)
        return _replayed(shape, inputs)

    def check_addresses(self) -> None:
        """Forget the captured steps if a tensor of the state has moved. Its old memory must not be used any more."""
        if self.active and self.addresses and self.addresses != self._addresses():
            self.addresses, self.shapes = [], {}
            self.graphs.renew()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for group in self.state() for tensor in group]

    def _checked_step(self, inputs: tuple[Tensor, ...]) -> Losses:
        """Take an eager step, and check that it does not wait for the device."""
        before = _copies(self.state())
        with self.graphs.fork_random():
            try:
                with self.graphs.no_synchronization():
                    return self.step(*inputs)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
        self._stop(before, "a training step of this model waits for the GPU",
                   "A captured step cannot run `.item()`, `nonzero` or other code that reads a value")
        return self.step(*inputs)

    def _capture(self, shape: _Shape, inputs: tuple[Tensor, ...]) -> None:
        shape.inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        for own, tensor in zip(shape.inputs, inputs, strict=True):
            own.copy_(tensor)
        try:
            shape.replay, shape.losses = self.graphs.capture(lambda: self.step(*shape.inputs))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # The states of the allocator and of the generator are now undefined, so eager steps could be wrong.
            # The end of the capture raises an error too, which hides the first one.
            cause = error.__context__ or error
            raise ResourceError("capture", "a training step could not be captured as a CUDA graph",
                                (str(cause).splitlines() or [type(cause).__name__])[0],
                                "use --capture false") from error
        self.addresses = self._addresses()

    def _compared_step(self, shape: _Shape, inputs: tuple[Tensor, ...]) -> Losses:
        """Take the same step eagerly and by a replay, and compare the losses and the changes of the state."""
        before = _copies(self.state())
        with self.graphs.fork_random():
            losses = {name: loss.clone() for name, loss in self.step(*inputs).items()}
        eager = _copies(self.state())
        _restore(self.state(), before)
        found = _replayed(shape, inputs)
        if _same_losses(losses, found) and _same_changes(before, eager, self.state()):
            return found
        self._stop(eager, "a captured step gives another result than a normal one",
                   "A captured step cannot depend on numbers of Python that change, such as a counter")
        return losses

    def _stop(self, state: list[list[Tensor]], what: str, why: str) -> None:
        """Restore `state`, and take all further steps eagerly."""
        if self.required:
            raise ConfigError("training_params.capture", what, why, "use --capture auto, or --capture false")
        _restore(self.state(), state)
        self.active, self.shapes = False, {}
        log.warning("capture: %s; training continues without captured steps. %s", what, why)


def _replayed(shape: _Shape, inputs: tuple[Tensor, ...]) -> Losses:
    for own, tensor in zip(shape.inputs, inputs, strict=True):
        own.copy_(tensor)
    assert shape.replay is not None
    shape.replay()
    return shape.losses


@torch.no_grad()
def _copies(state: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.detach().clone() for tensor in group] for group in state]


@torch.no_grad()
def _restore(state: list[list[Tensor]], copies: list[list[Tensor]]) -> None:
    for group, of_group in zip(state, copies, strict=False):  # an optimizer may add groups, and tensors at their ends
        for tensor, copy in zip(group, of_group, strict=False):
            tensor.copy_(copy)


def _same_losses(one: Losses, other: Losses) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(loss, other[name], rtol=LOSS_TOLERANCE, equal_nan=True) for name, loss in one.items())


@torch.no_grad()
def _same_changes(before: list[list[Tensor]], one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    """Return whether two steps have changed each group of the state in the same way, except for rounding errors."""
    if not list(map(len, before)) == list(map(len, one)) == list(map(len, other)):
        return False  # the step has added tensors to the state of the optimizer
    for start, first, second in zip(before, one, other, strict=True):
        limit = UPDATE_TOLERANCE * _length(_differences(start, first)) + 1e-6 * _length(first)
        if math.isfinite(limit) and not _length(_differences(first, second)) <= limit:
            return False
    return True


def _length(group: Iterable[Tensor]) -> float:
    """Return the Euclidean length of all tensors of a group together."""
    return sum(float(tensor.double().square().sum()) for tensor in group) ** 0.5


def _differences(group: list[Tensor], other: list[Tensor]) -> Iterator[Tensor]:
    return (one.double() - two.double() for one, two in zip(group, other, strict=True))
