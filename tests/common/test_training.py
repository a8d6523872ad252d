import json
import math
import signal
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import nn

from common.checkpoint import Checkpoints, load_state, save_state
from common.command import stop_request
from common.errors import ArtifactError, ConfigError, Interrupted, TrainingError
from common.optimization import GradientDescent, learning_rate
from common.run import Run
from common.training import Best, TrainingLoop, derive_seed
from tests.common.helpers import numbers
from tests.errors import refused

PARAMS = {"epochs": 4, "lr": 0.05, "lr_schedule": "cosine", "warmup_steps": 2, "optimizer": "AdamW",
          "weight_decay": 0.01, "clip_norm": 1.0, "capture": "auto", "eval_every": 2, "patience": None,
          "max_steps": None, "select_by": "loss", "select_mode": "min", "checkpoint_seconds": 3600}
NUM_STEPS = 3  # in an epoch: 12 in all


class Crash(Exception):
    """The process dies."""


class Tiny:
    """Four inputs, dropout, one output. `at(step number)` may do harm after each step; all randomness is torch's."""

    name = "tiny"
    num_steps = NUM_STEPS

    def __init__(self, params: dict, at=lambda step: None, values=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.model.register_buffer("noise", torch.zeros(2))
        self.params, self.at, self.values = params, at, values
        self.descent = GradientDescent(self.model, self.compute_losses, params, NUM_STEPS)
        self.evaluated = []

    def step(self, epoch, index):
        xs = torch.randn(5, 4, generator=torch.Generator().manual_seed(derive_seed("batch", epoch, index)))
        number = epoch * self.num_steps + index
        harm = self.at(number + 1)
        return self.descent.step(number, (xs, torch.tensor(1.0 if harm is None else harm)))

    def compute_losses(self, xs, harm):
        loss = (self.model(xs) - xs.sum(dim=1, keepdim=True)).square().mean() * harm
        return {"loss_total": loss, "loss_half": loss / 2}

    def end_epoch(self, epoch):
        self.model.noise.normal_()  # as random as the restart of a dead code

    def evaluate(self):
        assert not self.model.training
        self.evaluated.append(self.model[0].weight.detach().clone())
        if self.values is not None:
            return {"loss": self.values.pop(0), "count": 3}
        xs = torch.linspace(-1, 1, 12).reshape(3, 4)
        return {"loss": (self.model(xs) - xs.sum(dim=1, keepdim=True)).square().mean().item(), "count": 3}

    def batch_numbers(self, epoch, index):
        return [epoch, index]


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.publishing._sync", lambda path: None)
        yield


@pytest.fixture
def start(tmp_path):
    """Trains a new Tiny in the run folder `name`, as a new process would; returns (task, best)."""
    seeds = count()

    def start(name="run", at=lambda step: None, values=None, **changes):
        stop_request.signal_number = 0
        params = {**PARAMS, **changes}
        task, run = Tiny(params, at, values), new_run(tmp_path, name)
        torch.manual_seed(next(seeds))  # as in two processes, the state of the generator differs
        with run.open(force=False):
            return task, TrainingLoop(task, run, params, seed=7).train()
    return start


def new_run(tmp_path, name="run") -> Run:
    return Run(tmp_path / name, {}, {}, "train")


def results(tmp_path, name="run") -> tuple[bytes, bytes]:
    run = new_run(tmp_path, name)
    return (run.checkpoints / "best.safetensors").read_bytes(), run.metrics.read_bytes()


def stop_at(*numbers):
    def at(step):
        if step in numbers:
            stop_request.signal_number = signal.SIGTERM
    return at


def crash_at(number):
    def at(step):
        if step == number:
            raise Crash()
    return at


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in new_run(tmp_path).metrics.read_text().splitlines()]


def test_a_run_records_every_epoch_and_evaluates_every_second(start, tmp_path):
    task, best = start()
    lines = records(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert ["metrics" in line for line in lines] == [False, True, False, True]
    assert all(line["loss_half"] == pytest.approx(line["loss_total"] / 2) for line in lines)
    assert best.value == min(line["metrics"]["loss"] for line in lines if "metrics" in line)
    assert len(task.evaluated) == 2


def test_the_last_epoch_is_always_evaluated(start, tmp_path):
    start(epochs=3, eval_every=2)
    assert ["metrics" in line for line in records(tmp_path)] == [False, True, True]


def test_two_runs_end_with_the_same_bytes(start, tmp_path):
    start("one")
    start("two")
    assert results(tmp_path, "one") == results(tmp_path, "two")


def test_the_result_depends_on_the_random_numbers(start, tmp_path, monkeypatch):
    start("one")
    monkeypatch.setattr("common.training.derive_seed", lambda *parts: derive_seed("other", *parts))
    start("two")
    assert results(tmp_path, "one")[0] != results(tmp_path, "two")[0]


def test_the_task_ends_with_the_best_model(start):
    task, best = start(eval_every=1, values=[3.0, 1.0, 2.0, 2.5])
    assert best == Best(2, 1.0, {"loss": 1.0, "count": 3})
    assert torch.equal(task.model[0].weight, task.evaluated[1])


@pytest.mark.parametrize(("mode", "values", "epoch"), [
    ("min", [3.0, 1.0, 1.0, 2.0], 2), ("max", [0.1, 0.3, 0.3, 0.2], 2), ("min", [0.0, 1.0, 2.0, 3.0], 1),
    ("max", [-3.0, -2.0, -1.0, -0.5], 4)])
def test_the_first_of_the_best_is_selected(start, mode, values, epoch):
    assert start(eval_every=1, select_mode=mode, values=values)[1].epoch == epoch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = new_run(folder)
    with run.open(force=False):
        TrainingLoop(Tiny(PARAMS), run, PARAMS, seed=7).train()
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 4 * NUM_STEPS + 1))
def test_an_interrupted_run_continues_to_the_same_bytes(start, tmp_path, undisturbed, step):
    with pytest.raises(Interrupted):
        start(at=stop_at(step))
    taken = []
    start(at=taken.append)
    assert taken == list(range(step + 1, 13))
    assert results(tmp_path) == undisturbed


def test_interruptions_at_every_step_leave_the_same_bytes(start, tmp_path, undisturbed):
    for step in range(1, 13):
        with pytest.raises(Interrupted):
            start(at=stop_at(step))
    start()
    assert results(tmp_path) == undisturbed


def test_a_stop_does_not_wait_for_an_evaluation(start, tmp_path, undisturbed, monkeypatch):
    evaluate = Tiny.evaluate

    def stop_and_evaluate(task):
        if len(task.evaluated) == 1:
            stop_request._receive(signal.SIGTERM, None)
        return evaluate(task)

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "evaluate", stop_and_evaluate)
        with pytest.raises(Interrupted):
            start()
    assert len(records(tmp_path)) == 3  # the second evaluation follows the fourth epoch
    start()
    assert results(tmp_path) == undisturbed


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_interrupted_evaluation_leaves_the_same_bytes(start, tmp_path, undisturbed, monkeypatch, evaluation):
    evaluate = Tiny.evaluate

    def evaluate_and_stop(task):
        metrics = evaluate(task)
        if len(task.evaluated) == evaluation:
            stop_request.signal_number = signal.SIGINT
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "evaluate", evaluate_and_stop)
        with pytest.raises(Interrupted):
            start()
    start()
    assert results(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "crashed"), [(None, 2), (None, 11), (2, 3), (3, 7), (4, 8), (5, 12), (7, 11)])
def test_a_crash_after_a_checkpoint_leaves_the_same_bytes(start, tmp_path, undisturbed, saved, crashed):
    if saved:
        with pytest.raises(Interrupted):
            start(at=stop_at(saved))
    with pytest.raises(Crash):
        start(at=crash_at(crashed))
    start()
    assert results(tmp_path) == undisturbed


def test_a_run_that_saves_every_step_repeats_none(start, tmp_path, undisturbed):
    with pytest.raises(Crash):
        start(at=crash_at(8), checkpoint_seconds=0)
    taken = []
    start(at=taken.append, checkpoint_seconds=0)
    assert taken == [8, 9, 10, 11, 12]
    assert results(tmp_path) == undisturbed


def test_a_damaged_newest_checkpoint_leaves_the_same_bytes(start, tmp_path, undisturbed):
    with pytest.raises(Crash):
        start(at=crash_at(8), checkpoint_seconds=0)
    newest = Checkpoints(new_run(tmp_path).checkpoints, "train").numbered()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    taken = []
    start(at=taken.append)
    assert taken == [7, 8, 9, 10, 11, 12]
    assert results(tmp_path) == undisturbed


def change_state(path, **entries) -> None:
    save_state(path, {**load_state(path, ""), **entries}, "train")


IMPOSSIBLE = [{"epoch": 10**18}, {"epoch": 5}, {"epoch": -3}, {"index": 10**12}, {"index": -(10**12)}, {"index": 4},
              {"num_lines": -3}, {"num_lines": 0}, {"totals": {"loss_total": torch.ones(2, 2)}},
              {"totals": {"loss_total": torch.tensor(math.nan)}}, {"totals": {"loss_total": torch.tensor(1)}},
              {"model": {}}, {"optimizer": {}}]


@pytest.mark.parametrize("entries", IMPOSSIBLE, ids=str)
def test_an_impossible_state_gives_the_previous_checkpoint(start, tmp_path, undisturbed, entries):
    with pytest.raises(Crash):
        start(at=crash_at(8), checkpoint_seconds=0)
    newest, previous = Checkpoints(new_run(tmp_path).checkpoints, "train").numbered()
    change_state(newest, **entries)
    if "optimizer" not in entries and "model" not in entries:
        taken = []
        start(at=taken.append)
        assert taken == [7, 8, 9, 10, 11, 12]
        assert results(tmp_path) == undisturbed
        return
    change_state(previous, **entries)
    with refused(ArtifactError, previous, fix=["train --force"]):
        start()


def test_a_best_model_of_an_impossible_epoch_is_refused(start, tmp_path):
    start()
    best = new_run(tmp_path).checkpoints / "best.safetensors"
    change_state(best, best=[9, 0.5, {}])
    with refused(ArtifactError, best, names=[9, 4], fix=["train --force"]):
        start()


def test_a_finished_training_takes_no_more_steps(start, tmp_path, undisturbed):
    _, first = start()
    taken = []
    task, again = start(at=taken.append)
    assert taken == []
    assert again == first
    assert results(tmp_path) == undisturbed
    best = Checkpoints(new_run(tmp_path).checkpoints, "train").load_best()["model"]
    assert torch.equal(task.model[0].weight, best["0.weight"])


def test_a_damaged_best_model_is_an_error(start, tmp_path):
    start()
    best = new_run(tmp_path).checkpoints / "best.safetensors"
    size = best.stat().st_size
    best.write_bytes(best.read_bytes()[:-1])
    with refused(ArtifactError, best, fix=["train --force"]) as raised:
        start()
    assert numbers(raised) >= {str(size), str(size - 1)}


def test_patience_ends_a_training_that_stops_improving(start, tmp_path):
    values = [5.0, 4.0, 4.5, 4.0, 1.0]
    _, best = start(epochs=9, eval_every=1, patience=2, values=values)
    assert best.epoch == 2
    assert [line["epoch"] for line in records(tmp_path)] == [1, 2, 3, 4]
    assert values == [1.0]  # not evaluated


def test_patience_counts_evaluations_and_not_epochs(start, tmp_path):
    _, best = start(epochs=20, eval_every=2, patience=2, values=[4.0, 3.0, 3.5, 2.0, 9.0, 9.0, 9.0])
    assert best.epoch == 8
    assert len(records(tmp_path)) == 12


def test_without_patience_a_training_never_stops_early(start, tmp_path):
    start(epochs=6, eval_every=1, patience=None, values=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert len(records(tmp_path)) == 6


def test_a_training_that_stopped_early_takes_no_more_steps(start, tmp_path):
    early = {"epochs": 9, "eval_every": 1, "patience": 2}
    _, best = start(**early, values=[5.0, 4.0, 4.5, 4.25])
    before = results(tmp_path)
    taken = []
    task, again = start(**early, at=taken.append, values=[])
    assert (taken, again) == ([], best)
    assert results(tmp_path) == before
    assert len(records(tmp_path)) == 4


def test_an_interruption_keeps_the_count_of_patience(start, tmp_path):
    early = {"epochs": 9, "eval_every": 1, "patience": 2}
    with pytest.raises(Interrupted):
        start(**early, at=stop_at(12), values=[5.0, 4.0, 4.5])
    start(**early, values=[4.25])
    assert [line["metrics"]["loss"] for line in records(tmp_path)] == [5.0, 4.0, 4.5, 4.25]


def poison(number):
    return lambda step: math.nan if step == number else None


def not_finite(tmp_path) -> dict:
    return json.loads((new_run(tmp_path).folder / "not_finite.json").read_text())


@contextmanager
def refused_loss(tmp_path, epoch: int, step: int, *named: str):
    """The block raises a TrainingError that names the epoch and the step, and writes both with the batch."""
    with refused(TrainingError, new_run(tmp_path).folder, names=["not_finite.json", *named], fix=["--lr"]) as raised:
        yield
    assert numbers(raised) >= {str(epoch), str(step)}
    assert not_finite(tmp_path) == {"epoch": epoch, "step": step, "batch": [epoch - 1, step - 1]}


@pytest.mark.parametrize("seconds", [0, 3600], ids=["saving at every step", "saving at the end"])
@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_loss_that_is_not_finite_keeps_a_good_checkpoint(start, tmp_path, step, seconds):
    with pytest.raises(Interrupted):
        start(at=stop_at(3), eval_every=1, checkpoint_seconds=seconds)
    with refused_loss(tmp_path, 2, step - 3):
        start(at=poison(step), eval_every=1, checkpoint_seconds=seconds)
    checkpoints = Checkpoints(new_run(tmp_path).checkpoints, "train")
    for state in (checkpoints.load_newest(), checkpoints.load_best()):
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert [line["epoch"] for line in records(tmp_path)] == [1]


@pytest.mark.parametrize(("bad", "step"), [({7, 8, 9}, 1), ({8, 9}, 2), ({9}, 3)])
def test_the_first_step_that_is_not_finite_is_named(start, tmp_path, bad, step):
    with refused_loss(tmp_path, 3, step):
        start(at=lambda number: math.inf if number in bad else None)


def test_the_named_step_is_right_after_an_interruption(start, tmp_path):
    with pytest.raises(Interrupted):
        start(at=stop_at(7))
    with refused_loss(tmp_path, 3, 2):
        start(at=poison(8))


def test_any_loss_that_is_not_finite_ends_the_training(start, tmp_path, monkeypatch):
    take_step = Tiny.step

    def step(task, epoch, index):
        losses = take_step(task, epoch, index)
        return losses | ({"loss_half": losses["loss_half"] / 0} if (epoch, index) == (1, 1) else {})

    monkeypatch.setattr(Tiny, "step", step)
    with refused_loss(tmp_path, 2, 2, "loss_half inf"):
        start()


def test_a_finite_training_writes_no_batch(start, tmp_path):
    start()
    assert not (new_run(tmp_path).folder / "not_finite.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_ends_the_training(start, tmp_path, value):
    with refused(TrainingError, new_run(tmp_path).folder, names=["loss"], fix=["--lr"]) as raised:
        start(eval_every=1, values=[1.0, value])
    assert "2" in numbers(raised)
    assert not (new_run(tmp_path).folder / "not_finite.json").exists()
    assert Checkpoints(new_run(tmp_path).checkpoints, "train").load_best()


def test_selecting_by_an_unknown_metric_is_an_error(start):
    with refused(ConfigError, "training_params.select_by", names=["'los'", "'loss'"]):
        start(select_by="los", eval_every=1)
    with refused(ConfigError, "training_params.select_by", names=["'count'", "loss"]):
        start("other", select_by="count", eval_every=1)


def test_a_seed_depends_on_every_part_and_on_nothing_else():
    assert len({derive_seed(*parts) for parts in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 12), (0, "1", 2), ()]}) == 6
    # The first four bytes of sha256("(0, 1, 2)") are ea e0 f0 6c.
    assert derive_seed(0, 1, 2) == 0x6CF0E0EA


class Average:
    """A moving average of its inputs, which needs no gradient."""

    name, num_steps = "average", NUM_STEPS

    def __init__(self, at=lambda step: None):
        self.model, self.at = nn.BatchNorm1d(2, affine=False), at
        self.descent = GradientDescent(self.model, lambda xs: {"loss_total": self.model(xs).mean()}, PARAMS, NUM_STEPS)

    def step(self, epoch, index):
        self.at(epoch * self.num_steps + index + 1)
        return self.descent.step(epoch * self.num_steps + index, (torch.randn(5, 2) + 3,))

    def end_epoch(self, epoch):
        pass

    def evaluate(self):
        return {"loss": (self.model.running_mean - 3).abs().sum().item()}

    def batch_numbers(self, epoch, index):
        return []


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_model_without_an_optimizer_continues_with_equal_bytes(tmp_path, step):
    def train(name, at=lambda step: None):
        stop_request.signal_number = 0
        run = new_run(tmp_path, name)
        with run.open(force=False):
            return TrainingLoop(Average(at), run, PARAMS, seed=7).train()

    best = train("undisturbed")
    assert best.epoch == 4
    with pytest.raises(Interrupted):
        train("run", stop_at(step))
    assert train("run") == best
    assert results(tmp_path) == results(tmp_path, "undisturbed")


def test_max_steps_ends_an_epoch_with_an_evaluation(start, tmp_path):
    taken = []
    task, best = start(at=lambda step: taken.append(step), max_steps=NUM_STEPS + 2)
    losses = records(tmp_path)
    assert taken == [1, 2, 3, 4, 5]
    assert [(record["epoch"], "metrics" in record) for record in losses] == [(1, False), (2, True)]
    assert len(task.evaluated) == 1
    assert best.epoch == 2
    assert task.descent.optimizer.param_groups[0]["lr"] == learning_rate(4, 5, PARAMS)


def test_the_best_metric_belongs_to_the_saved_model(start, tmp_path):
    """The process dies after it saved the best model; the repeated steps then give another value."""
    with pytest.raises(Interrupted):
        start(at=stop_at(5))
    with pytest.raises(Crash):
        start(at=crash_at(8), values=[0.5])  # evaluated after step 6
    _, best = start(values=[0.6, 0.7])
    assert (best.epoch, best.value) == (2, 0.5)
    assert Checkpoints(new_run(tmp_path).checkpoints, "train").load_best()["best"][1] == 0.5
