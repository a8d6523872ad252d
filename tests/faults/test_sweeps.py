"""The long form: a fault at every point of every stage. `bash run_tests.sh --faults` runs these tests."""

import random
import shutil
import signal
import sys
import time

import pytest

from common.publishing import finish_publishing
from tests.faults.world import STAGES, World

pytestmark = [pytest.mark.slow, pytest.mark.faults,
              pytest.mark.skipif(sys.platform != "linux", reason="the tests fork a process with many libraries")]

TRAINED = ("rqvae", "encoder_decoder", "sasrec")
CREATING = ("create", "open", "fsync", "mkdir", "replace", "rename")
NUM_RANDOM_KILLS = 20


def in_parts(cases: list[tuple[str, str]]) -> list[tuple[str, str, int, int]]:
    """Return the name and the kind of each case, a part and the number of parts. Long cases have several parts."""
    return [(name, kind, part, parts) for name, kind in cases
            for parts in [4 if name in TRAINED else 1] for part in range(parts)]


@pytest.fixture
def worlds(tmp_path):
    """A function that returns a new copy of a world, and deletes the previous copy."""
    def copy(world: World) -> World:
        shutil.rmtree(tmp_path / "world", ignore_errors=True)
        return world.copy(tmp_path / "world")
    return copy


@pytest.mark.parametrize(("name", "kind", "part", "parts"), in_parts(
    [(name, "again") for name in STAGES] + [(name, "fresh") for name in STAGES if name not in TRAINED]
    + [("rqvae", "forced")]))
def test_a_kill_at_any_point_loses_nothing(reference, worlds, tally, name, kind, part, parts):
    case = reference.case(name, kind)
    for number in case.points()[part::parts]:
        with tally.case("kill points", f"{case.name}, killed before {case.operations[number - 1]}"):
            world = worlds(case.before)
            killed = reference.run(world, case.script, case.words, {"at": number, "do": "kill"})
            assert killed.code == -signal.SIGKILL, killed.err
            case.check_unharmed(world)
            if number % 2:  # a reader comes before the repeated command
                for artifact in world.artifacts():
                    finish_publishing(artifact)
            case.check_repeated(world, reference.run(world, case.script, case.repeated, {}))
            tally.counts["resumes"] += 1
    tally.check()


@pytest.mark.parametrize("name", STAGES)
def test_kills_at_random_times_lose_nothing(reference, worlds, tally, name):
    case, started = reference.case(name), time.monotonic()
    reference.run(worlds(case.before), case.script, case.words, {})
    duration = time.monotonic() - started
    for seed in range(NUM_RANDOM_KILLS):
        seconds, code = random.Random(f"{name} {seed}").random() * duration, 0
        with tally.case("random kills", f"{case.name}, killed after {seconds:.3f} s"):
            while code == 0:  # the command may end before the kill
                world = worlds(case.before)
                code = reference.forks.run(case.script, case.words, world.root, {}, kill_after=seconds).code
                seconds /= 2
            assert code == -signal.SIGKILL
            case.check_unharmed(world)
            case.check_repeated(world, reference.run(world, case.script, case.repeated, {}))
            tally.counts["resumes"] += 1
    tally.check()


@pytest.mark.parametrize(("name", "kind", "part", "parts"), in_parts(
    [(name, "again" if stage.other else "fresh") for name, stage in STAGES.items()]))
def test_a_full_disk_at_any_point_loses_nothing(reference, worlds, tally, name, kind, part, parts):
    case = reference.case(name, kind)
    before, after = case.before.files(), case.after.files()
    sizes = {len(content) for file, content in after.items() if before.get(file) != content}
    faults = [{"at": number, "do": "full"} for number in case.points(*CREATING)]
    faults += [{"file_size": size - 1} for size in sorted(sizes)]
    for fault in faults[part::parts]:
        where = case.operations[fault["at"] - 1] if "at" in fault else f"{fault['file_size']} bytes"
        with tally.case("disk-full points", f"{case.name}, full disk at {where}"):
            world = worlds(case.before)
            outcome = reference.run(world, case.script, case.words, fault)
            world.check_full_disk(outcome)
            case.check_unharmed(world)
            case.check_repeated(world, reference.run(world, case.script, case.repeated, {}))
    tally.check()
