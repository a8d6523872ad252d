"""Captured steps of all recommenders equal eager steps. A stand-in on the CPU replays the recorded operations."""

import pytest
import torch

from common.checkpoint import Checkpoints, optimizer_state, restore_optimizer
from tests.recorded_graphs import RecordedGraphs

from .conftest import OPTIONS, take

STEPS = 50


@pytest.mark.parametrize(("name", "own"), OPTIONS, ids=str)
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, graphs = make_task(name, None, **own), RecordedGraphs()
    captured = make_task(name, graphs, **own)
    assert take(captured, range(STEPS)) == pytest.approx(take(eager, range(STEPS)), rel=1e-3)
    assert captured.descent.captured.active
    assert graphs.captures == len(captured.batches.shapes)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


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
