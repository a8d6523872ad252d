"""Captured steps of all quantizers equal eager steps. A stand-in on the CPU replays the recorded operations."""

import pytest

from tests.recorded_graphs import RecordedGraphs

from .conftest import OPTIONS, take

STEPS = range(30)


@pytest.mark.parametrize(("name", "own"), OPTIONS, ids=str)
def test_captured_steps_have_the_losses_of_eager_steps(make_task, name, own):
    eager, graphs = make_task(name, RecordedGraphs(), **own), RecordedGraphs()
    eager.descent.captured.active = False
    captured = make_task(name, graphs, **own)
    assert take(captured, STEPS) == pytest.approx(take(eager, STEPS), rel=1e-5)
    assert captured.descent.captured.active
    assert graphs.captures == 2  # no tensor has moved, so each of the two sizes was captured once
