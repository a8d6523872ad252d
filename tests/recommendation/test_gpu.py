"""Recommenders on a GPU: the same losses and lists as on the CPU, bfloat16, and compiled steps.

benchmarks/gpu.md lists the measurements on a GPU.
"""

import pytest
import torch

from recommendation.evaluator import predict
from recommendation.models import names
from recommendation.trainer import RecommenderTask

from .conftest import LOSSES

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

STEPS = 6


@pytest.fixture
def make_task(make_config, make_model, sequences):
    """name, device, key=value, ... -> a recommender ready for its first step; skips those that fit in one call."""
    def make(name: str, device: str = "cuda", **own: object) -> RecommenderTask:
        model = make_model(name, **own).to(device).train()
        sequences.device_items = sequences.device_items.to(device)
        if model.fit(sequences.training_sequences()):
            pytest.skip("fits in one call")
        return RecommenderTask(model, sequences, make_config(name, **own).training_params, 0, name)

    return make


def losses(task: RecommenderTask) -> list[float]:
    return [task.step(index // task.num_steps, index % task.num_steps)["loss_total"].item() for index in range(STEPS)]


STEP = pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
NAMES = pytest.mark.parametrize("name", names())


@STEP
def test_steps_have_the_losses_of_the_cpu(make_task, name, normalize_over):
    expected = losses(make_task(name, "cpu", normalize_over=normalize_over))
    assert losses(make_task(name, normalize_over=normalize_over)) == pytest.approx(expected, rel=1e-3)


@STEP
def test_a_step_does_not_synchronize(make_task, name, normalize_over):
    task = make_task(name, normalize_over=normalize_over)
    losses(task)  # initializes cuBLAS and the optimizer
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = [task.step(2, index)["loss_total"] for index in range(task.num_steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(after).isfinite().all()


@STEP
def test_bfloat16_steps_have_the_float32_losses(make_task, name, normalize_over):
    expected = losses(make_task(name, normalize_over=normalize_over))
    half = losses(make_task(name, normalize_over=normalize_over, precision="bfloat16"))
    assert half == pytest.approx(expected, rel=0.03)


@STEP
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_steps_have_the_same_losses(make_task, name, normalize_over, precision):
    own = {"normalize_over": normalize_over, "precision": precision}
    expected = losses(make_task(name, **own))
    compiled = losses(make_task(name, **own, compile="true"))
    assert compiled == pytest.approx(expected, rel=1e-3 if precision == "float32" else 0.03)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_dropout_can_be_compiled(make_task, name):
    assert all(loss > 0 for loss in losses(make_task(name, dropout=0.1, compile="true", precision="bfloat16")))


@NAMES
@torch.no_grad()
def test_the_lists_agree_with_the_cpu(make_model, make_config, sequences, name):
    model, params = make_model(name).eval(), make_config(name).training_params
    model.fit(sequences.training_sequences())
    expected = predict(model, sequences, "valid", params)
    sequences.device_items = sequences.device_items.to("cuda")
    there = predict(model.to("cuda"), sequences, "valid", params)
    assert there.items.tolist() == expected.items.tolist()
    assert there.scores == pytest.approx(expected.scores, abs=1e-3)
