"""The training loop of both stages. It trains a model, saves checkpoints, and selects the best model."""

import hashlib
import json
import logging
import math
import time
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoints, optimizer_state, restore, restore_optimizer
from common.command import stop_request
from common.data_parallel import check_same_model
from common.distributed import all_reduce_max, mean, rank_seed_parts, world_size
from common.errors import ArtifactError, ConfigError, Interrupted, TrainingError, nearest
from common.optimization import GradientDescent
from common.progress import Progress
from common.publishing import write_text
from common.reading import WHY, Record
from common.run import Run

log = logging.getLogger(__name__)


class Task(Protocol):
    """The methods and attributes that the training loop uses. Each stage implements this protocol."""

    descent: GradientDescent
    num_steps: int  # steps per epoch
    name: str       # shown in the progress line

    @property
    def model(self) -> nn.Module:
        """The model to train."""

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Take a step of `descent` on batch `index` of the epoch, and return the losses as scalar tensors.

        If there are several processes, the mean of their losses must be the loss of the batch.
        """

    def end_epoch(self, epoch: int) -> None:
        """Update the model or the data at the end of an epoch."""

    def evaluate(self) -> dict:
        """Return the metrics of the current model."""

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """Return the indices of the items or users in batch `index` of the epoch. They are used to report bad data."""


class Best(NamedTuple):
    """The best model so far."""

    epoch: int     # number of epochs after which this model was saved
    value: float   # the metric `select_by`
    metrics: dict  # all metrics


def derive_seed(*parts: object) -> int:
    """Return a 32-bit seed that depends on all parts, for example on the seed of the run, the epoch and the step."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class EpochLosses:
    """The losses of the steps of an epoch. They stay on the device until `read`, so that no step waits for it."""

    def __init__(self, num_steps: int):
        """num_steps: number of steps per epoch"""
        self.num_steps, self.names = num_steps, tuple[str, ...]()
        self.rows: Tensor | None = None  # (num_steps, number of losses), on the device
        self.reset()

    def reset(self, index: int = 0, totals: dict[str, float] | None = None) -> None:
        """Begin an epoch, or continue it at step `index`. `totals` has the sum of each loss over the steps before."""
        self.num_read, self.totals, self.first_bad = index, totals or {}, -1

    def add(self, index: int, losses: dict[str, Tensor]) -> None:
        """Store the losses of step `index`, as scalars without gradient."""
        if self.rows is None:
            self.names = tuple(losses)
            self.rows = torch.zeros(self.num_steps, len(losses), device=losses["loss_total"].device)
        if tuple(losses) != self.names:
            raise ConfigError("compute_loss", f"returned the losses {', '.join(losses)}, expected "
                              f"{', '.join(self.names)}", fix="return the same losses in every step")
        torch.stack(list(losses.values()), out=self.rows[index])

    def read(self, index: int) -> tuple[dict[str, float], int]:
        """Wait for the device. Return the sum of each loss over the first `index` steps of the epoch, and the first
        step with a loss that is not finite (or -1).
        """
        if index > self.num_read:
            assert self.rows is not None
            rows = self.rows[self.num_read:index].double().cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad) and self.first_bad < 0:
                self.first_bad = self.num_read + int(bad[0])
            # Add one step after the other, so that the sums do not depend on the number of calls.
            before = [self.totals.get(name, 0.0) for name in self.names]
            with np.errstate(invalid="ignore", over="ignore"):
                sums = np.add.accumulate(np.vstack([before, rows]))[-1]
            self.totals, self.num_read = dict(zip(self.names, sums.tolist(), strict=True)), index
        return self.totals, self.first_bad


class TrainingLoop:
    """The training loop of a task. If the run already has a checkpoint, training continues from the newest one.

    A run that was interrupted and continued gives the same model, bit by bit, as a run without interruption. A run can
    be continued with a different number of processes.
    """

    def __init__(self, task: Task, run: Run, params: dict, seed: int):
        self.task, self.run, self.params, self.seed = task, run, params, seed
        self.checkpoints = Checkpoints(run.checkpoints, run.command)
        self.total_steps = task.descent.total_steps
        self.num_epochs = -(-self.total_steps // task.num_steps)
        self.epoch, self.index, self.num_lines = 0, 0, 0
        self.losses = EpochLosses(task.num_steps)
        self.best: Best | None = None
        self.done = False
        self.last_save = time.monotonic()

    def train(self) -> Best:
        """Train the model, and load the best model into the task.

        Training ends after the last epoch, or when the metric `select_by` has not improved for `patience` evaluations.
        Raises ConfigError if the metric `select_by` does not exist. Raises TrainingError if a loss or this metric is
        not finite.
        """
        self._resume()
        with self.task.descent.stream(), stop_request, Progress(
                self.task.name, self.total_steps, "steps",
                self.epoch * self.task.num_steps + self.index) as progress:
            while not self.done and self.epoch < self.num_epochs:
                self._run_epoch(progress)
        if not self.done:
            self.done = True
            self._save()
        if (device := self.task.descent.device).type == "cuda":
            log.info("%s: peak GPU memory %.1f GB", self.task.name, torch.cuda.max_memory_reserved(device) / 1e9)
        self.checkpoints.load_best(self.task.model)
        assert self.best is not None  # the last epoch is always evaluated
        return self.best

    def _run_epoch(self, progress: Progress) -> None:
        self.task.model.train()
        num_steps = min(self.task.num_steps, self.total_steps - self.epoch * self.task.num_steps)
        while self.index < num_steps:
            self._seed(self.epoch, self.index, *rank_seed_parts())
            self.losses.add(self.index, self.task.step(self.epoch, self.index))
            self.index += 1
            progress.update()
            self._save_if_due()
        means = {name: total / num_steps for name, total in self._finite_totals().items()}
        check_same_model(self.task.model)
        self._seed(self.epoch, "end")  # a continued run may start here
        self.task.end_epoch(self.epoch)
        self.task.descent.check_addresses()
        self.epoch, self.index = self.epoch + 1, 0
        self.losses.reset()
        record: dict[str, object] = {"epoch": self.epoch, **means}
        if self.epoch % self.params["eval_every"] == 0 or self.epoch == self.num_epochs:
            metrics, best = self._evaluate()
            record["metrics"] = metrics
            name = self.params["select_by"]
            progress.update(0, **{name: metrics[name], "best": best.value, "of epoch": best.epoch})
        self.run.append_metrics(record)
        self.num_lines += 1
        log.debug("%s", record)
        if self.done:
            self._save()
        self._save_if_due()

    def _evaluate(self) -> tuple[dict, Best]:
        """Evaluate the model, and save it if it is the best so far. Set `done` if training must end early."""
        self.task.model.eval()
        # An evaluation may take minutes, so a stop signal interrupts it. A continued run then repeats the steps since
        # the last checkpoint. If there are several processes, no process may stop alone.
        with torch.no_grad(), stop_request.at_once() if world_size() == 1 else nullcontext():
            metrics = self.task.evaluate()
        name, sign = self.params["select_by"], -1 if self.params["select_mode"] == "min" else 1
        if not isinstance(metrics.get(name), float):
            known = [k for k, v in metrics.items() if isinstance(v, float)]
            raise ConfigError("training_params.select_by", f"unknown metric {name!r}",
                              nearest(name, known), "correct the name")
        if not math.isfinite(metrics[name]):
            raise TrainingError(self.run.folder, f"{name} is not finite after epoch {self.epoch}",
                                fix="use a lower --lr; the last good checkpoint is kept")
        [value] = all_reduce_max(metrics[name])  # rounding errors on GPUs may differ between the processes
        if self.best is None or sign * value > sign * self.best.value:
            self.best = Best(self.epoch, value, metrics)
            self.checkpoints.save_best({"model": self.task.model.state_dict(), "best": list(self.best)})
        patience = self.params["patience"]
        if patience and self.epoch - self.best.epoch >= patience * self.params["eval_every"]:
            log.info("%s: %s has not improved for %d evaluations; stopping after epoch %d", self.task.name, name,
                     patience, self.epoch)
            self.done = True
        return metrics, self.best

    def _seed(self, *parts: object) -> None:
        """Seed the random number generators of the CPU and of the model's device."""
        # `torch.manual_seed` looks for all types of devices, which takes as long as the rest of this loop.
        seed, device = derive_seed(self.seed, *parts), self.task.descent.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):  # the function seeds only the current device
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.manual_seed(seed)

    def _finite_totals(self) -> dict[str, float]:
        """Return the sum of each loss over the steps of this epoch so far, averaged over the processes.

        If a loss is not finite, write the first bad step and its batch to not_finite.json, and raise TrainingError.
        """
        own_totals, bad = self.losses.read(self.index)
        totals = mean(own_totals)
        if all(map(math.isfinite, totals.values())):
            return totals
        # `all_reduce_max` cannot compute a minimum, so take the maximum distance to the end of the epoch.
        [before_end] = all_reduce_max(self.task.num_steps - bad if bad >= 0 else 0)
        step = self.task.num_steps - int(before_end) if before_end else 0
        path = self.run.folder / "not_finite.json"
        write_text(path, json.dumps({"epoch": self.epoch + 1, "step": step + 1,
                                     "batch": self.task.batch_numbers(self.epoch, step)}) + "\n")
        raise TrainingError(self.run.folder, f"the loss of epoch {self.epoch + 1}, step {step + 1} is not finite",
                            ", ".join(f"{name} {total:g}" for name, total in totals.items())
                            + f"; {path.name} lists the batch",
                            "use a lower --lr; the last good checkpoint is kept")

    def _save_if_due(self) -> None:
        due = time.monotonic() - self.last_save >= self.params["checkpoint_seconds"]
        signal_number, due = all_reduce_max(stop_request.signal_number, due)
        if signal_number:
            stop_request.signal_number = int(signal_number)  # another process may have received the signal
            self._save()
            log.info("saved a checkpoint after epoch %d, step %d", self.epoch, self.index)
            raise Interrupted()
        if due:
            self._save()

    def _save(self) -> None:
        totals = self._finite_totals()  # raises an error before a bad state can replace the last good checkpoint
        self.checkpoints.save(self.epoch * self.task.num_steps + self.index, {
            "model": self.task.model.state_dict(),
            "optimizer": optimizer_state(self.task.descent.optimizer),
            "epoch": self.epoch, "index": self.index, "num_lines": self.num_lines, "done": self.done,
            "totals": {name: torch.tensor(total, dtype=torch.float64) for name, total in totals.items()}})
        self.last_save = time.monotonic()

    def _resume(self) -> None:
        if self.checkpoints.load_newest(self._continue_from) is None:
            self.run.truncate_metrics(0)
            return
        # The best model may be newer than this checkpoint. Take its metrics from its own file: if the steps in between
        # are repeated, the metrics may differ slightly (for example on a GPU).
        self.best = self._load_best() if self.done or self.checkpoints.best.exists() else None
        self.run.truncate_metrics(self.num_lines)
        log.info("%s: continuing after epoch %d, step %d", self.task.name, self.epoch, self.index)

    def _continue_from(self, state: Record) -> None:
        """Load the state of a checkpoint. Raises ArtifactError if the state does not fit this training run."""
        epoch, index, totals = state["epoch"], state["index"], state["totals"]
        step = epoch * self.task.num_steps + index
        if not (0 <= epoch <= self.num_epochs and 0 <= index <= self.task.num_steps and step <= self.total_steps
                and state["num_lines"] == epoch):  # each epoch writes one line of metrics
            raise ArtifactError(state.path, f"has an impossible position: epoch {epoch}, step {index}, "
                                f"{state['num_lines']} lines of metrics", f"The training has {self.num_epochs} epochs "
                                f"of {self.task.num_steps} steps, {self.total_steps} steps in all", state.fix)
        if wrong := [name for name, total in totals.items()
                     if total.shape or not total.is_floating_point() or not total.isfinite()]:
            raise ArtifactError(state.path, f"has a sum of losses that is not a finite number: {wrong[0]}", WHY,
                                state.fix)
        restore(self.task.model, state)
        if self.task.descent.optimizer:
            restore_optimizer(self.task.descent.optimizer, state)
        self.epoch, self.index, self.num_lines, self.done = epoch, index, state["num_lines"], state["done"]
        self.losses.reset(index, {name: total.item() for name, total in totals.items()})

    def _load_best(self) -> Best:
        state = self.checkpoints.load_best()
        best = Best(*state["best"])
        if not 0 < best.epoch <= self.num_epochs:
            raise ArtifactError(state.path, f"must be from an epoch between 1 and {self.num_epochs}, got {best.epoch}",
                                WHY, state.fix)
        return best
