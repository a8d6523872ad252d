"""The optimizer, the learning rate and a step, worked out by hand."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from common.cli import ROOT
from common.errors import ConfigError
from common.optimization import GradientDescent, learning_rate, make_optimizer, total_steps
from tests.errors import refused


@pytest.mark.parametrize(("schedule", "warmup", "step", "rate"), [
    ("constant", 0, 0, 0.8), ("constant", 0, 99, 0.8),
    ("constant", 4, 0, 0.2), ("constant", 4, 1, 0.4), ("constant", 4, 3, 0.8), ("constant", 4, 4, 0.8),
    ("cosine", 0, 0, 0.8), ("cosine", 0, 4, 0.6), ("cosine", 0, 6, 0.4), ("cosine", 0, 8, 0.2), ("cosine", 0, 12, 0.0),
    ("cosine", 4, 0, 0.2), ("cosine", 4, 3, 0.8), ("cosine", 4, 4, 0.8), ("cosine", 4, 8, 0.4), ("cosine", 4, 12, 0.0),
    ("cosine", 4, 20, 0.0), ("cosine", 12, 12, 0.8)])
def test_the_learning_rate_warms_up_and_then_stays_or_falls(schedule, warmup, step, rate):
    # The cosine over twelve steps: cos(60°) = 1/2 a third of the way, 0 half-way, -1/2 two thirds of the way.
    params = {"lr": 0.8, "lr_schedule": schedule, "warmup_steps": warmup}
    assert learning_rate(step, 12, params) == pytest.approx(rate, abs=1e-12)


def take(step: int, start: float = 3.0, **own: object) -> float:
    """Minimize 4 w, whose gradient is 4 everywhere. Return the weight after one step from `start`."""
    params = {"epochs": 5, "lr": 0.5, "lr_schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0, "max_steps": None,
              "optimizer": "SGD", "weight_decay": 0.0, "capture": "auto", **own}
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    descent = GradientDescent(model, lambda: {"loss_total": 4 * model.weight.sum()}, params, num_steps=2)
    descent.step(step, ())
    return round(model.weight.item(), 5)


def test_a_step_follows_the_gradient_at_the_scheduled_rate():
    assert take(0, 3.0) == 1.0                              # 3 - 0.5 * 4
    assert take(0, 1.0, warmup_steps=2) == 0.0              # 1 - 0.25 * 4
    assert take(5, 0.0, lr_schedule="cosine") == -1.0       # step 5 of 10: 0 - 0.25 * 4


def test_clipping_limits_the_norm_of_the_gradient():
    assert take(0, clip_norm=1.0) == 2.5                    # 3 - 0.5 * 1
    assert take(0, clip_norm=100.0) == 1.0


def test_the_named_optimizer_leaves_frozen_weights_out():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, {"optimizer": "SGD", "lr": 0.3, "weight_decay": 0.1})
    assert isinstance(optimizer, torch.optim.SGD)
    [group] = optimizer.param_groups
    assert group["params"] == [model.weight]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_the_steps_are_those_of_pytorch(name):
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    for model in models:
        nn.init.constant_(model.weight, 1.0)
    own = make_optimizer(models[0], {"optimizer": name, "lr": 0.3, "weight_decay": 0.1})
    for model, optimizer in zip(models, [own, getattr(torch.optim, name)(
            models[1].parameters(), lr=0.3, weight_decay=0.1, fused=True)], strict=True):
        for factor in (1.0, -3.0, 0.5):
            optimizer.zero_grad()
            (factor * model(torch.tensor([[2.0, 5.0]]))).sum().backward()
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.slow
def test_a_step_does_not_import_the_compiler():
    code = """
import sys
from torch import nn
from common.optimization import make_optimizer
model = nn.Linear(2, 1)
optimizer = make_optimizer(model, {"optimizer": "AdamW", "lr": 0.3, "weight_decay": 0.1})
optimizer.zero_grad()
optimizer.step()
print("torch._dynamo" in sys.modules)"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False\n"


def test_without_trainable_weights_there_is_no_optimizer():
    frozen = nn.Linear(2, 1).requires_grad_(False)
    assert make_optimizer(frozen, {"optimizer": "AdamW", "lr": 0.3, "weight_decay": 0.1}) is None


@pytest.mark.parametrize(("epochs", "max_steps", "expected"),
                         [(10, None, 100), (10, 35, 35), (10, 40, 40), (2, 400, 20)])
def test_max_steps_limits_the_steps_of_the_epochs(epochs, max_steps, expected):
    assert total_steps(10, {"epochs": epochs, "max_steps": max_steps}) == expected


def test_captured_steps_are_refused_on_the_cpu():
    with refused(ConfigError, "training_params.capture", names=["cpu", "CUDA"], fix=["--capture auto"]):
        take(0, capture=True)


@pytest.mark.parametrize("capture", ["auto", False])
def test_steps_on_the_cpu_are_not_captured(capture, caplog):
    assert take(0, capture=capture) == 1.0
    assert not caplog.records
