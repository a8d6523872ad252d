"""Recommenders on a GPU: captured steps, no synchronization, bfloat16, resuming, and the results of the CPU.

`bash benchmarks/gpu.sh tests` runs these tests. With GPU_TESTS_ON_CPU=1, they run on the CPU.
"""

import itertools
import logging

import pytest
import torch

from common.checkpoint import Checkpoints, optimizer_state, restore, restore_optimizer
from common.data_parallel import WHOLE
from common.precision import matmul_precision
from recommendation.batches import TrainingBatches
from recommendation.counting.teacher import CountTeacher
from recommendation.dataset import Sequences
from recommendation.evaluator import Predictions, predict
from recommendation.metrics import PROTOCOLS
from recommendation.models import find_class, names
from recommendation.models.with_prior import WithPrior
from recommendation.trainer import RecommenderTask
from tests.gpu import DEVICE, MARKS, ON_CPU, graphs, metrics_of_training, num_captured, take_epoch_without_waiting

from .conftest import LOSSES, NUM_ITEMS, OPTIONS, take

pytestmark = MARKS

STEPS = 50
FEW_STEPS = range(6)
TRAINED = [name for name in names() if find_class(name).trained_by_gradient()]
EVERY_LOSS = pytest.mark.parametrize(("name", "normalize_over"), [pair for pair in LOSSES if pair[0] in TRAINED])


@pytest.mark.parametrize(("name", "own"), [option for option in OPTIONS if option[0] in TRAINED], ids=str)
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, captured = (make_task(name, graphs(), DEVICE, **own) for _ in range(2))
    eager.descent.captured.active = False  # with the same optimizer, as Adam amplifies rounding errors
    assert take(captured, range(STEPS)) == pytest.approx(take(eager, range(STEPS)), rel=1e-3)
    assert num_captured(captured.descent) == len(captured.batches.shapes)


@pytest.mark.parametrize(("name", "own"), [*((name, {}) for name in TRAINED),
                                           ("encoder_decoder", {"train_on": "every_position"})], ids=str)
def test_an_epoch_does_not_synchronize(make_task, name, own, tmp_path):
    task = make_task(name, graphs(), DEVICE, **own)
    warm_up(task)
    take_epoch_without_waiting(task, 1 + STEPS // task.num_steps, tmp_path)


@pytest.fixture
def make_teacher(make_model, sequences):
    """device -> a teacher from the training events."""
    def make(device: torch.device | str) -> CountTeacher:
        there = Sequences(sequences.item, sequences.user, sequences.split, device)
        count = make_model("transitions").to(device)
        count.fit(there.training_sequences(), there.validation_events())
        return count.teacher(there.training_events(), 0.6, True, 0.5)

    return make


@pytest.mark.parametrize("name", TRAINED)
def test_an_epoch_with_a_teacher_does_not_synchronize(make_task, make_teacher, name, tmp_path):
    task = make_task(name, graphs(), DEVICE, make_teacher(DEVICE))
    warm_up(task)
    take_epoch_without_waiting(task, 1 + STEPS // task.num_steps, tmp_path)


def test_the_distributions_of_a_teacher_are_those_of_the_cpu(make_teacher, sequences):
    events = torch.from_numpy(sequences.positions("train"))
    found = []
    for device in ("cpu", DEVICE):
        items, shares = make_teacher(device).distributions(events.to(device), torch.zeros_like(events, device=device))
        found.append(torch.zeros(len(events), NUM_ITEMS, device=device).scatter_add(1, items, shares).cpu())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("unit", ["target", "sequence"])
def test_the_batches_are_those_of_the_cpu(sequences, unit):
    there = Sequences(sequences.item, sequences.user, sequences.split, DEVICE)
    here, other = (TrainingBatches(events, unit, 16, 5, seed=0) for events in (sequences, there))
    for epoch, index in itertools.product(range(2), range(here.num_batches)):
        for one, two in zip(here.get(epoch, index, WHOLE)[:3], other.get(epoch, index, WHOLE)[:3], strict=True):
            assert two.device.type == DEVICE.type
            assert torch.equal(one, two.cpu())


def warm_up(task: RecommenderTask) -> None:
    """Capture the steps of all shapes."""
    take(task, range(STEPS))
    assert num_captured(task.descent) == len(task.batches.shapes)


@EVERY_LOSS
def test_bfloat16_steps_have_the_losses_of_float32(make_task, name, normalize_over):
    own = {"normalize_over": normalize_over, "lr": 0.001, "dropout": 0.0}
    expected = take(make_task(name, graphs(), DEVICE, **own), range(20))
    half = take(make_task(name, graphs(), DEVICE, **own, precision="bfloat16"), range(20))
    assert half == pytest.approx(expected, rel=0.03)


@EVERY_LOSS
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-3), ("tf32", 0.02)])
def test_steps_have_the_losses_of_the_cpu(make_task, monkeypatch, name, normalize_over, precision, tolerance):
    monkeypatch.setattr("common.optimization.matmul_precision", lambda _precision: matmul_precision(precision))
    own = {"normalize_over": normalize_over, "dropout": 0.0}
    expected = take(make_task(name, **own), FEW_STEPS)
    assert take(make_task(name, graphs(), DEVICE, **own), FEW_STEPS) == pytest.approx(expected, rel=tolerance)


def test_capture_true_captures(make_task):
    warm_up(make_task("sasrec", graphs(), DEVICE, capture="true"))


@pytest.mark.skipif(ON_CPU, reason="the CPU never captures steps by itself, and says nothing")
def test_sgd_is_not_captured_and_says_so(make_task, caplog):
    with caplog.at_level(logging.INFO, logger="common.optimization"):
        task = make_task("sasrec", None, DEVICE, optimizer="SGD")
    [record] = caplog.records
    assert "SGD" in record.getMessage()
    assert task.descent.captured is None
    assert all(loss > 0 for loss in take(task, FEW_STEPS))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", names())
@torch.no_grad()
def test_the_lists_are_those_of_the_cpu(make_model, make_config, sequences, name, protocol):
    model, params = make_model(name).eval(), make_config(name).training_params
    model.fit(sequences.training_sequences(), sequences.validation_events())
    expected = predict(model, sequences, "valid", params, protocol)
    compare_lists(expected, predict(model.to(DEVICE), on_device(sequences), "valid", params, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["encoder_decoder", "encoder_retrieve", "sasrec"])
@torch.no_grad()
def test_the_lists_with_a_prior_are_those_of_the_cpu(make_model, make_config, sequences, name, protocol):
    model, prior, params = make_model(name).eval(), make_model("counting"), make_config(name).training_params
    prior.fit(sequences.training_sequences(), sequences.validation_events())
    both = WithPrior(model, prior.log_probabilities, dict.fromkeys(PROTOCOLS, 2.5))
    expected = predict(both, sequences, "valid", params, protocol)
    model.to(DEVICE), prior.to(DEVICE)
    compare_lists(expected, predict(both, on_device(sequences), "valid", params, protocol))


def on_device(sequences: Sequences) -> Sequences:
    return Sequences(sequences.item, sequences.user, sequences.split, DEVICE)


def compare_lists(expected: Predictions, found: Predictions) -> None:
    assert found.items.tolist() == expected.items.tolist()
    assert found.scores == pytest.approx(expected.scores, abs=1e-3)


@pytest.mark.parametrize("name", ["encoder_decoder", "sasrec"])
def test_a_resumed_training_has_the_metrics_of_an_undisturbed_one(make_task, tmp_path, name):
    def make():
        return make_task(name, graphs(), DEVICE, epochs=12, eval_every=4)

    undisturbed = metrics_of_training(make, tmp_path / "undisturbed")
    resumed = metrics_of_training(make, tmp_path / "resumed", stop_before=33)
    for line, expected in zip(resumed, undisturbed, strict=True):
        assert line["loss_total"] == pytest.approx(expected["loss_total"], rel=0.01)
        assert ("metrics" in line) == ("metrics" in expected)
        if "metrics" in line:  # ties between two items may be broken in another way
            assert line["metrics"]["ndcg@10"] == pytest.approx(expected["metrics"]["ndcg@10"], abs=0.05)


@pytest.mark.parametrize(("first", "second"), [(DEVICE, "cpu"), ("cpu", DEVICE)], ids=["to the CPU", "from the CPU"])
def test_a_checkpoint_continues_on_another_device(make_task, tmp_path, first, second):
    def start(device: torch.device | str) -> RecommenderTask:
        return make_task("sasrec", graphs() if device == DEVICE else None, device, dropout=0.0)

    expected = take(start("cpu"), range(30))
    before, after = start(first), start(second)
    losses = take(before, range(15))
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a command")
    checkpoints.save(15, {"model": before.model.state_dict(), "optimizer": optimizer_state(before.descent.optimizer)})
    state = checkpoints.load_newest()
    restore(after.model, state)
    restore_optimizer(after.descent.optimizer, state)
    losses += take(after, range(15, 30))
    assert losses == pytest.approx(expected, rel=0.02)  # products in TF32
