"""Captured steps of all recommenders equal eager steps. A stand-in on the CPU replays the recorded operations."""

import numpy as np
import pytest
import torch
from scipy import sparse

from common.checkpoint import Checkpoints, optimizer_state, restore_optimizer
from common.data_parallel import WHOLE
from recommendation.counting.counts import Counts
from recommendation.counting.teacher import CountTeacher
from tests.recorded_graphs import RecordedGraphs, recorded

from .conftest import NUM_ITEMS, OPTIONS, take

STEPS = 18


@pytest.mark.parametrize(("name", "own"), OPTIONS, ids=str)
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, graphs = make_task(name, RecordedGraphs(), **own), RecordedGraphs()
    eager.descent.captured.active = False  # with the same optimizer, as Adam amplifies rounding errors
    captured = make_task(name, graphs, **own)
    assert take(captured, range(STEPS)) == pytest.approx(take(eager, range(STEPS)), rel=1e-5)
    assert captured.descent.captured.active
    assert graphs.captures == len(captured.batches.shapes)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "own"), [
    ("sasrec", {}), ("decoder_only", {}), ("encoder_retrieve", {}), ("encoder_decoder", {"train_on": "target"}),
    ("encoder_decoder", {"train_on": "every_position"}),
    ("encoder_decoder", {"train_on": "every_position", "normalize_over": "valid_items"})], ids=str)
def test_captured_steps_with_a_teacher_have_the_losses_of_eager_steps(make_task, sequences, name, own):
    def teacher() -> CountTeacher:
        counts = Counts(NUM_ITEMS)
        matrix = sparse.random(NUM_ITEMS, NUM_ITEMS, 0.3, "csr", random_state=0)
        counts.fill(matrix, np.arange(NUM_ITEMS), num_newest=3, recency=0.7)
        return CountTeacher(counts, sequences.training_events(), 0.6, True, 0.5)

    eager = make_task(name, RecordedGraphs(), teacher=teacher(), **own)
    eager.descent.captured.active = False
    captured = make_task(name, RecordedGraphs(), teacher=teacher(), **own)
    losses = take(eager, range(12))
    assert take(captured, range(12)) == pytest.approx(losses, rel=1e-5)
    assert captured.descent.captured.active
    assert take(make_task(name, None, **own), range(3)) != pytest.approx(losses[:3], rel=1e-3)  # without the teacher


@pytest.mark.parametrize("name", ["sasrec", "decoder_only", "encoder_retrieve", "encoder_decoder"])
def test_two_steps_of_a_shape_issue_the_same_operations_on_the_same_memory(make_task, name):
    task = make_task(name, None)
    take(task, range(2))  # creates the state of the optimizer
    shape = task.batches.shapes[-1]
    batches = [next(windows for index in range(task.num_steps)
                    if (windows := task.batches.get(epoch, index, WHOLE)).items.shape == (shape.rows, shape.width + 1))
               for epoch in range(2)]
    inputs = [tensor.clone() for tensor in batches[0][:3]]
    addresses = [tensor.data_ptr() for group in task.descent._state() for tensor in group]
    lists = []
    for number, windows in enumerate(batches):
        for tensor, of_batch in zip(inputs, windows[:3], strict=True):
            tensor.copy_(of_batch)
        torch.manual_seed(number)
        with recorded() as operations:
            task.descent._take(*inputs)
        lists.append(operations)
    assert lists[0] == lists[1]
    assert len(lists[0]) > 50
    assert [tensor.data_ptr() for group in task.descent._state() for tensor in group] == addresses


def test_a_checkpoint_of_captured_steps_continues_with_eager_steps(make_task, tmp_path):
    """A run on CUDA continues on the CPU, and the other way round."""
    whole = take(make_task("sasrec", None), range(30))
    for graphs, others in ((RecordedGraphs(), None), (None, RecordedGraphs())):
        first = make_task("sasrec", graphs)
        losses = take(first, range(15))
        checkpoints = Checkpoints(tmp_path / str(others), "a command")
        checkpoints.save(15, {"model": first.model.state_dict(),
                              "optimizer": optimizer_state(first.descent.optimizer)})
        second = make_task("sasrec", others)
        state = checkpoints.load_newest()
        second.model.load_state_dict(state["model"])
        restore_optimizer(second.descent.optimizer, state)
        [group] = second.descent.optimizer.param_groups
        assert group["capturable"] == isinstance(group["lr"], torch.Tensor) == (others is not None)
        losses += take(second, range(15, 30))
        assert losses == pytest.approx(whole, rel=1e-5)
