"""Captured steps of all quantizers equal eager steps. A stand-in on the CPU replays the recorded operations."""

import pytest
import torch

from quantization.evaluate import EvaluationData
from quantization.trainer import QuantizerTask
from tests.recorded_graphs import RecordedGraphs

from .conftest import DOCUMENTED, WIDTH

ITEMS, STEPS = 200, 50
OPTIONS = [*((name, {}) for name in DOCUMENTED), ("rqvae", {"update": "ema"}), ("rqvae", {"distance": "cosine"}),
           ("rqvae", {"gradient": "rotation"}), ("rqvae", {"gradient": "gumbel"}),
           ("rqvae", {"sinkhorn_levels": "[0, -1]"}), ("rqvae", {"standardize": "true"}),
           ("rqvae", {"clip_norm": 0.1, "lr_schedule": "cosine", "warmup_steps": 3}), ("rqvae", {"optimizer": "Adam"}),
           ("letter", {"sinkhorn_levels": "[-1]"}), ("rvq", {"update": "gradient"}), ("vqvae", {"update": "ema"})]


@pytest.fixture
def make_task(make_config, make_model):
    """name, graphs, key=value, ... -> the training of a small quantizer with batches of two sizes."""
    def make(name: str, graphs: RecordedGraphs | None, **own: object) -> QuantizerTask:
        config = make_config(name, batch_size=48, epochs=20, lr=0.003, codebook_size=8, **own)
        torch.manual_seed(0)
        model = make_model(config, ITEMS)
        width = WIDTH * len(model.embedding_suffixes(model.config, "td"))
        xs, generator = torch.randn(ITEMS, width, generator=torch.Generator().manual_seed(1)), torch.Generator()
        if not model.trained_by_gradient():
            pytest.skip("fits in one call")
        model.initialize(xs, generator.manual_seed(0))
        return QuantizerTask(model.train(), xs, config.training_params, 0, name, EvaluationData(None, None), graphs)

    return make


def take(task: QuantizerTask, num_steps: int) -> list[float]:
    losses = []
    for number in range(num_steps):
        torch.manual_seed(number)
        epoch, index = divmod(number, task.num_steps)
        losses.append(task.step(epoch, index)["loss_total"].item())
        if index == task.num_steps - 1:
            task.end_epoch(epoch)
            task.descent.check_addresses()
    return losses


@pytest.mark.parametrize(("name", "own"), OPTIONS, ids=str)
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, graphs = make_task(name, RecordedGraphs(), **own), RecordedGraphs()
    eager.descent.captured.active = False
    captured = make_task(name, graphs, **own)
    assert take(captured, STEPS) == pytest.approx(take(eager, STEPS), rel=1e-5)
    assert captured.descent.captured.active
    assert graphs.captures == 2  # no tensor has moved, so each of the two sizes was captured once
