"""Captured steps, with a stand-in for CUDA graphs that records and replays the operations of the CPU."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.capture import CapturedSteps
from common.errors import ConfigError, ResourceError
from common.optimization import GradientDescent
from tests.errors import refused
from tests.recorded_graphs import RecordedGraphs

PARAMS = {"epochs": 10, "lr": 0.05, "lr_schedule": "cosine", "warmup_steps": 3, "optimizer": "AdamW",
          "weight_decay": 0.01, "clip_norm": 1.0, "max_steps": None, "capture": "auto"}
STEPS = 30
ROWS = [5, 3]  # two shapes


class Net(nn.Module):
    """Dropout, a buffer that counts rows, and whatever `harm` adds to the loss."""

    def __init__(self, harm=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        self.register_buffer("seen", torch.zeros(4))
        self.harm, self.number = harm, 0

    def compute_losses(self, xs):
        self.number += 1
        with torch.no_grad():
            self.seen += xs.abs().sum(dim=0)
        hidden = F.dropout(self.layers[1](self.layers[0](xs)), 0.3)
        loss = (self.layers[2](hidden).squeeze(1) - xs.sum(dim=1)).square().mean()
        return {"loss_total": loss if self.harm is None else loss + self.harm(self, loss), "half": loss / 2}


def train(graphs, harm=None, **own):
    """Returns the losses of each step, the model, and the object that took the steps."""
    torch.manual_seed(0)
    model = Net(harm)
    descent = GradientDescent(model, model.compute_losses, PARAMS | own, STEPS, graphs)
    losses = []
    for number in range(STEPS):
        xs = torch.randn(ROWS[number % 2], 4, generator=torch.Generator().manual_seed(number))
        torch.manual_seed(100 + number)
        losses.append({name: loss.item() for name, loss in descent.step(number, (xs,)).items()})
    return losses, model, descent


@pytest.fixture(scope="module")
def eager():
    return train(None, capture=False)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam"])
def test_captured_steps_equal_eager_steps_with_dropout(optimizer):
    expected, model, _ = train(None, capture=False, optimizer=optimizer)
    graphs = RecordedGraphs()
    found, captured, descent = train(graphs, optimizer=optimizer)
    assert graphs.captures == len(ROWS)
    assert descent.captured.active
    assert found == [pytest.approx(losses, rel=1e-5) for losses in expected]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value)
    # After the warm-up, Python code runs in the recorded step and in the steps that are compared.
    assert captured.number == len(ROWS) * (2 + 1 + 2)


def test_a_model_without_weights_is_captured():
    def compute_losses(xs):
        model.mean.lerp_(xs.mean(dim=0), 0.1)
        return {"loss_total": xs.mean()}

    model, graphs = nn.Module(), RecordedGraphs()
    model.register_buffer("mean", torch.zeros(4))
    descent = GradientDescent(model, compute_losses, PARAMS, STEPS, graphs)
    for number in range(6):
        descent.step(number, (torch.full((5, 4), float(number)),))
    assert (graphs.captures, descent.captured.active) == (1, True)
    mean = 0.0
    for number in range(6):
        mean += 0.1 * (number - mean)
    assert model.mean.tolist() == pytest.approx([mean] * 4)


HARM = {"reads a value": lambda net, loss: 0.0 * loss.item(),
        "has another number in each step": lambda net, loss: loss * (net.number % 7)}


@pytest.mark.parametrize("harm", HARM)
def test_a_step_that_cannot_be_captured_continues_eagerly_without_a_loss(harm, caplog):
    expected, model, _ = train(None, HARM[harm], capture=False)
    found, other, descent = train(RecordedGraphs(), HARM[harm])
    assert not descent.captured.active
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()
    assert record.getMessage().startswith("capture: ")
    if harm == "reads a value":  # the other model counts its own calls, so its numbers differ
        assert found == [pytest.approx(losses, rel=1e-5) for losses in expected]
        assert torch.allclose(model.layers[0].weight, other.layers[0].weight)
    assert other.seen.tolist() == pytest.approx(model.seen.tolist())


@pytest.mark.parametrize("harm", HARM)
def test_capture_true_refuses_such_a_step(harm):
    with refused(ConfigError, "training_params.capture", fix=["--capture auto", "--capture false"]):
        train(RecordedGraphs(), HARM[harm], capture=True)


def test_a_learning_rate_that_is_frozen_is_noticed(eager, caplog):
    """The comparison finds a number of Python that changes from step to step."""
    rates = iter(torch.linspace(0.01, 0.9, 100).tolist())

    def step(xs):
        weight.sub_(xs.mean() * next(rates))
        return {"loss_total": xs.mean()}

    weight = torch.zeros(3)
    steps = CapturedSteps(step, lambda: [[weight]], RecordedGraphs())
    for number in range(8):
        steps(torch.full((2,), number + 1.0))
    assert not steps.active
    assert len(caplog.records) == 1


def test_a_number_that_changes_slowly_is_noticed(caplog):
    def compute_losses(xs):
        return {"loss_total": model.layers(xs).square().mean() * (1 + 1e-4 * number)}

    model = Net()
    descent = GradientDescent(model, compute_losses, PARAMS | {"lr": 0.0}, STEPS, RecordedGraphs())
    for number in range(110):
        assert descent.captured.active == (number < 102)  # the replay 100 is step 102
        descent.step(number, (torch.ones(5, 4),))
    assert len(caplog.records) == 1


def test_a_replay_that_is_not_finite_is_noticed():
    class Broken(RecordedGraphs):
        def capture(self, step):
            replay, losses = super().capture(step)

            def poisoned():
                replay()
                with torch.no_grad():
                    descent.model.layers[0].weight[0, 0] = torch.nan

            return poisoned, losses

    torch.manual_seed(0)
    model = Net()
    descent = GradientDescent(model, model.compute_losses, PARAMS, STEPS, Broken())
    losses = [descent.step(number, (torch.ones(5, 4),))["loss_total"].item() for number in range(6)]
    assert not descent.captured.active
    assert torch.tensor(losses).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_weight_that_is_used_later_is_noticed(caplog):
    def compute_losses(xs):
        model.number += 1
        loss = model.layers(xs).square().mean()
        return {"loss_total": loss + (late.square().sum() if model.number > 3 else 0.0)}

    model, late = Net(), nn.Parameter(torch.ones(3))
    model.late = late
    descent = GradientDescent(model, compute_losses, PARAMS, STEPS, RecordedGraphs())
    for number in range(8):
        descent.step(number, (torch.ones(5, 4),))
    assert not descent.captured.active
    assert len(caplog.records) == 1
    assert (late < 1).all()


@pytest.mark.parametrize("message", ["CUDA error: operation not permitted when stream is capturing\nmore lines", ""])
def test_a_failed_capture_ends_the_run(message):
    class Broken(RecordedGraphs):
        def capture(self, step):
            try:
                raise RuntimeError(message)
            finally:  # as the end of a capture does
                raise RuntimeError("operation failed due to a previous error during capture")

    names = [message.partition("\n")[0] or "RuntimeError"]
    with refused(ResourceError, "capture", names=names, fix=["--capture false"]) as raised:
        train(Broken())
    assert "more lines" not in str(raised.value)


def test_a_tensor_that_moves_is_captured_again(eager):
    torch.manual_seed(0)
    model, graphs = Net(), RecordedGraphs()
    descent = GradientDescent(model, model.compute_losses, PARAMS, STEPS, graphs)
    losses = []
    for number in range(STEPS):
        if number == 14:
            model.seen = model.seen.clone()  # as a plug-in might do at the end of an epoch
            descent.check_addresses()
        xs = torch.randn(ROWS[number % 2], 4, generator=torch.Generator().manual_seed(number))
        torch.manual_seed(100 + number)
        losses.append({name: loss.item() for name, loss in descent.step(number, (xs,)).items()})
    assert graphs.captures == 2 * len(ROWS)
    assert losses == [pytest.approx(of_step, rel=1e-5) for of_step in eager[0]]
    assert model.seen.tolist() == pytest.approx(eager[1].seen.tolist())


def test_only_a_limited_number_of_shapes_is_captured(monkeypatch):
    monkeypatch.setattr("common.capture.MAX_SHAPES", 1)
    graphs = RecordedGraphs()
    _, _, descent = train(graphs)
    assert graphs.captures == 1
    assert descent.captured.active
