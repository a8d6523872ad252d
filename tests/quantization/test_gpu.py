"""Quantizers on a GPU: captured steps, no synchronization, resuming, and the codes and metrics of the CPU.

`bash benchmarks/gpu.sh tests` runs these tests. With GPU_TESTS_ON_CPU=1, they run on the CPU.
"""

import warnings

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoints
from common.precision import matmul_precision
from quantization.evaluate import EvaluationData, Evaluator
from quantization.models import find_class
from quantization.utils import checked_codes
from tests.gpu import DEVICE, MARKS, ON_CPU, graphs, metrics_of_training, num_captured, take_epoch_without_waiting

from .conftest import DOCUMENTED, OPTIONS, WIDTH, seeded, take

pytestmark = MARKS

ITEMS, STEPS = 512, range(50)
FEW_STEPS = range(6)
NUM_SIZES = 2  # sizes of batches
TRAINED = [option for option in OPTIONS if find_class(option[0]).trained_by_gradient()]
EVERY_OPTION = pytest.mark.parametrize(("name", "own"), TRAINED, ids=str)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_checkpoint_gives_equal_codes_on_cpu_and_gpu(name, make_config, make_model, tmp_path):
    trained = make_model(make_config(name, codebook_size=16), ITEMS)
    width, generator = WIDTH * len(trained.embedding_suffixes(trained.config, "td")), seeded(1)
    xs = torch.randn(ITEMS, width, generator=generator) if width else torch.arange(ITEMS).unsqueeze(1)
    if not trained.fit(xs, seeded()):
        trained.initialize(xs, seeded())
    checkpoints = Checkpoints(tmp_path, "a command")
    checkpoints.save_best({"model": trained.state_dict()})
    here, there = (make_model(make_config(name, codebook_size=16), ITEMS).eval() for _ in range(2))
    for model in (here, there):
        model.load_state_dict(checkpoints.load_best()["model"])
    with torch.no_grad():
        codes = checked_codes(there.to(DEVICE), xs.to(DEVICE))
        assert codes.device.type == DEVICE.type
        assert torch.equal(codes.cpu(), checked_codes(here, xs))


@EVERY_OPTION
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, captured = (make_task(name, graphs(), DEVICE, **own) for _ in range(2))
    eager.descent.captured.active = False  # with the same optimizer, as Adam amplifies rounding errors
    assert take(captured, STEPS) == pytest.approx(take(eager, STEPS), rel=1e-3)
    assert num_captured(captured.descent) == NUM_SIZES


@EVERY_OPTION
def test_an_epoch_does_not_synchronize(make_task, name, own, tmp_path):
    task = make_task(name, graphs(), DEVICE, **own)
    take(task, range(25))
    assert num_captured(task.descent) == NUM_SIZES
    take_epoch_without_waiting(task, 25 // task.num_steps, tmp_path)


@EVERY_OPTION
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-3), ("tf32", 0.05)])
def test_steps_have_the_losses_of_the_cpu(make_task, monkeypatch, name, own, precision, tolerance):
    if own.get("gradient") == "gumbel":
        pytest.skip("draws random numbers, which differ between the devices")
    monkeypatch.setattr("common.optimization.matmul_precision", lambda _precision: matmul_precision(precision))
    here, there = make_task(name, **own), make_task(name, graphs(), DEVICE, **own)
    there.model.load_state_dict(here.model.state_dict())  # k-means may start in another way
    assert take(there, FEW_STEPS) == pytest.approx(take(here, FEW_STEPS), rel=tolerance)


def test_capture_true_captures(make_task):
    task = make_task("rqvae", graphs(), DEVICE, capture="true")
    take(task, range(25))
    assert num_captured(task.descent) == NUM_SIZES


def test_a_resumed_training_has_the_metrics_of_an_undisturbed_one(make_task, tmp_path):
    def make():
        return make_task("rqvae", graphs(), DEVICE, epochs=12, eval_every=4)

    undisturbed = metrics_of_training(make, tmp_path / "undisturbed")
    resumed = metrics_of_training(make, tmp_path / "resumed", stop_before=33)
    for line, expected in zip(resumed, undisturbed, strict=True):
        assert line["loss_total"] == pytest.approx(expected["loss_total"], rel=0.01)
        assert ("metrics" in line) == ("metrics" in expected)
        if "metrics" in line:
            assert line["metrics"]["loss_total"] == pytest.approx(expected["metrics"]["loss_total"], rel=0.01)


@pytest.fixture
def make_evaluator(make_config, make_model):
    """Device -> an evaluator of the same initialized RQVAE, with all reference data."""
    model = make_model(make_config("rqvae", codebook_size=16), ITEMS)
    items = torch.randn(ITEMS, WIDTH, generator=seeded(1))
    model.initialize(items, seeded())
    directions = torch.nn.functional.normalize(items + 1).numpy()
    pairs = np.random.default_rng(0).integers(ITEMS, size=(3000, 2))
    return lambda device: Evaluator(model.to(device).eval(), items.to(device), 100, EvaluationData(directions, pairs))


def test_metrics_are_equal_on_cpu_and_gpu(make_evaluator):
    expected, _ = make_evaluator("cpu").evaluate()
    metrics, _ = make_evaluator(DEVICE).evaluate()
    floats = {name for name in metrics if name.startswith(("loss", "recon", "quantization", "explained"))}
    for name, value in expected.items():  # metrics without a value are None
        found, wanted = (np.array(number, dtype=float) for number in (metrics[name], value))
        np.testing.assert_allclose(found, wanted, rtol=1e-4 if name in floats else 1e-9, err_msg=name)


@pytest.mark.skipif(ON_CPU, reason="only CUDA counts how often the CPU waits")
def test_an_evaluation_waits_for_the_gpu_at_most_three_times(make_evaluator):
    evaluator = make_evaluator(DEVICE)
    evaluator.evaluate()  # initializes cuBLAS, and measures the variance of the data
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluator.evaluate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) <= 3
