"""Checks that need a GPU: equal codes and metrics on CPU and GPU, steps without synchronization, captured steps.

benchmarks/gpu.md lists the measurements on a GPU.
"""

import warnings

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoints
from quantization.evaluate import EvaluationData, Evaluator
from quantization.trainer import QuantizerTask
from quantization.utils import checked_codes

from .conftest import DOCUMENTED, WIDTH

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ITEMS, STEPS = 512, 6


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def items() -> torch.Tensor:
    """(512, 6)"""
    return torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_task(make_config, make_model, items, device):
    """key=value, ... -> a small RQVAE on the GPU, initialized from the items, before its first step."""
    def make(**own: object) -> QuantizerTask:
        config = make_config("rqvae", codebook_size=32, batch_size=64, **own)
        model, xs = make_model(config, ITEMS).to(device), items.to(device)
        model.initialize(xs, torch.Generator().manual_seed(0))
        model.train()
        return QuantizerTask(model, xs, config.training_params, 0, "rqvae", EvaluationData(None, None))

    return make


@pytest.fixture
def no_synchronization():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_checkpoint_gives_equal_codes_on_cpu_and_gpu(name, make_config, make_model, device, tmp_path):
    trained = make_model(make_config(name, codebook_size=16), ITEMS)
    width, generator = WIDTH * len(trained.embedding_suffixes(trained.config, "td")), torch.Generator()
    xs = torch.randn(ITEMS, width, generator=generator.manual_seed(1)) if width else torch.arange(ITEMS).unsqueeze(1)
    if not trained.fit(xs, generator.manual_seed(0)):
        trained.initialize(xs, generator.manual_seed(0))
    checkpoints = Checkpoints(tmp_path, "a command")
    checkpoints.save_best({"model": trained.state_dict()})
    here, there = (make_model(make_config(name, codebook_size=16), ITEMS).eval() for _ in range(2))
    for model in (here, there):
        model.load_state_dict(checkpoints.load_best()["model"])
    with torch.no_grad():
        codes = checked_codes(there.to(device), xs.to(device))
        assert codes.device.type == "cuda"
        assert torch.equal(codes.cpu(), checked_codes(here, xs))


@pytest.mark.parametrize("own", [{}, {"update": "ema"}, {"distance": "cosine"}, {"gradient": "rotation"},
                                 {"sinkhorn_levels": "[-1]"}, {"clip_norm": 1.0}, {"lr_schedule": "cosine"}])
def test_a_training_step_does_not_synchronize(make_task, no_synchronization, own):
    task = make_task(**own)
    for index in range(task.num_steps):  # initializes cuBLAS and the optimizer
        task.step(0, index)
    no_synchronization()
    losses = [task.step(1, index)["loss_total"] for index in range(task.num_steps)]
    task.model.maintain(task.xs, torch.Generator().manual_seed(0))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.fixture
def make_evaluator(make_config, make_model, items):
    """Device -> an evaluator of the same initialized RQVAE, with all reference data."""
    model = make_model(make_config("rqvae", codebook_size=16, eval_batch_size=100), ITEMS)
    model.initialize(items, torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(items).numpy()
    pairs = np.random.default_rng(0).integers(ITEMS, size=(3000, 2))
    return lambda device: Evaluator(model.to(device).eval(), items.to(device), 100, EvaluationData(directions, pairs))


def test_metrics_are_equal_on_cpu_and_gpu(make_evaluator, device):
    expected, _ = make_evaluator(torch.device("cpu")).evaluate()
    metrics, _ = make_evaluator(device).evaluate()
    floats = {name for name in metrics if name.startswith(("loss", "recon", "quantization", "explained"))}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4 if name in floats else 1e-12), name


def test_an_evaluation_waits_for_the_gpu_at_most_three_times(make_evaluator, device):
    evaluator = make_evaluator(device)
    evaluator.evaluate()  # initializes cuBLAS, and measures the variance of the data
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluator.evaluate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) <= 3


def test_a_captured_step_has_the_same_losses(make_task):
    task, other = make_task(lr=0.001), make_task(lr=0.001)
    expected = [task.step(0, index)["loss_total"].item() for index in range(STEPS)]
    parameters = [parameter for parameter in other.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.params["lr"], weight_decay=task.params["weight_decay"],
                                  fused=True, capturable=True)
    batch = torch.empty_like(other.batches.get(0, 0))

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = other.model.compute_loss(other.model(batch), batch)["loss_total"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses, stream = [], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture may only follow steps on a side stream
        for index in range(3):
            batch.copy_(other.batches.get(0, index))
            losses.append(step().item())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for index in range(3, STEPS):
        batch.copy_(other.batches.get(0, index))
        graph.replay()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)
