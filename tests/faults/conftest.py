"""The undisturbed runs, and the counts of each test."""

import pytest

from tests.faults.counts import KEY, Tally
from tests.faults.reference import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory, worker_id):
    folder = tmp_path_factory.getbasetemp()
    reference = Reference((folder if worker_id == "master" else folder.parent) / "faults")
    yield reference
    reference.close()


@pytest.fixture
def tally(record_property):
    tally = Tally()
    yield tally
    record_property(KEY, {**tally.counts, "lost": len(tally.losses)})
