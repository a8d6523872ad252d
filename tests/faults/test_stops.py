"""Commands that are killed or stopped at any time, and continue with the same command."""

import signal

import pytest

from tests.errors import Outcome
from tests.faults.world import World
from tests.text import lines_with

pytestmark = pytest.mark.slow


def check_continues(case, world: World, name: str) -> Outcome:
    """Repeat the command, and fail if it does not continue from the checkpoint `name`."""
    repeated = world.run(case.script, *case.repeated)
    case.check_repeated(world, repeated)
    per_epoch = {"rqvae": 2, "encoder_decoder": 3}[case.name.split()[0]]
    epoch, step = divmod(int(name.removeprefix("step-").removesuffix(".safetensors")), per_epoch)
    assert lines_with(repeated.out, epoch, step), repeated.out
    return repeated


@pytest.mark.parametrize(("name", "operation", "part"), [
    ("process", "replace", ".interactions.parquet.meta.json"), ("process", "replace", ".users.parquet"),
    ("text_embedding", "fsync", "emb-td.npy.meta.json"), ("rkmeans", "replace", "codes-rkmeans-td.npy.meta.json")])
def test_a_stage_killed_while_it_publishes_is_repeated(reference, tmp_path, name, operation, part):
    case = reference.case(name, "again")
    world = case.before.copy(tmp_path / "world")
    killed = world.run(case.script, *case.words, fault={"at": case.point(operation, part), "do": "kill"})
    assert killed.code == -signal.SIGKILL, killed.err
    case.check_unharmed(world)
    case.check_repeated(world, world.run(case.script, *case.repeated))


def test_a_killed_training_continues_without_its_damaged_checkpoint(reference, tmp_path):
    case = reference.case("rqvae")
    world = case.before.copy(tmp_path / "world")
    killed = world.run(case.script, *case.words, fault={"at": case.point("open", "step-000000004"), "do": "kill"})
    assert killed.code == -signal.SIGKILL, killed.err
    case.check_unharmed(world)
    earlier, newest = sorted(world.root.glob("runs/**/step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    repeated = check_continues(case, world, earlier.name)
    assert newest.name in repeated.err


@pytest.mark.parametrize(("stop", "code"), [("term", 143), ("int", 130)])
def test_a_stopped_and_moved_training_continues(reference, tmp_path, stop, code):
    case = reference.case("encoder_decoder")
    world = case.before.copy(tmp_path / "world")
    stopped = world.run(case.script, *case.words, fault={"at": case.point("fsync", "step-000000004"), "do": stop})
    assert stopped.code == code, stopped.err
    assert stopped.error.fix
    case.check_unharmed(world)
    newest = max(world.root.glob("runs/**/step-*.safetensors"), key=lambda path: path.name)
    moved = World(world.root.rename(tmp_path / "another place"))
    check_continues(case, moved, newest.name)
