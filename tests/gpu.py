"""The device of the tests marked `gpu`.

With GPU_TESTS_ON_CPU=1, these tests run on the CPU: a stand-in replays the captured steps. This tests the tests.
"""

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from common.capture import CudaGraphs, Graphs
from common.command import stop_request
from common.errors import Interrupted
from common.optimization import GradientDescent
from common.run import Run
from common.training import Task, TrainingLoop
from tests.recorded_graphs import NoWaiting, RecordedGraphs

ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device")]


def graphs() -> Graphs | None:
    """Return the graphs of a training with captured steps. On CUDA, the training itself chooses them."""
    return RecordedGraphs() if ON_CPU else None


def no_synchronization() -> AbstractContextManager:
    """Return a context in which waiting for the device raises RuntimeError."""
    return NoWaiting() if ON_CPU else CudaGraphs(DEVICE).no_synchronization()


def num_captured(descent: GradientDescent) -> int:
    """Return the number of shapes whose steps are captured."""
    captured = descent.captured
    if captured is None or not captured.active:
        return 0
    return sum(shape.replay is not None for shape in captured.shapes.values())


def take_epoch_without_waiting(task: Task, epoch: int, folder: Path) -> None:
    """Take the steps of an epoch as the training loop does. Raise RuntimeError if a step waits for the device."""
    loop = TrainingLoop(task, Run(folder, {}, {}, "a command"), task.params, seed=0)
    with task.descent.stream(), no_synchronization():
        for index in range(task.num_steps):
            loop._seed(epoch, index)
            loop.losses.add(index, task.step(epoch, index))
    losses, first_bad = loop.losses.read(task.num_steps)
    assert losses["loss_total"] > 0
    assert first_bad == -1


def metrics_of_training(make: Callable[[], Task], folder: Path, stop_before: int | None = None) -> list[dict]:
    """Train as a command does, and return the lines of metrics.jsonl.

    make: returns a new task
    stop_before: number of a step; a stop signal arrives before this step, and a second training continues the first
    """
    run = Run(folder, {}, {}, "a command")
    if stop_before is not None:
        task = make()
        step = task.step

        def stopped_step(epoch: int, index: int) -> dict[str, torch.Tensor]:
            if epoch * task.num_steps + index == stop_before:
                stop_request.signal_number = signal.SIGTERM
            return step(epoch, index)

        task.step = stopped_step
        with run.open(force=False), pytest.raises(Interrupted):
            TrainingLoop(task, run, task.params, seed=0).train()
        stop_request.signal_number = 0
    task = make()
    with run.open(force=False):
        TrainingLoop(task, run, task.params, seed=0).train()
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]
