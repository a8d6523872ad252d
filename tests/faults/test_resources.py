"""A full disk, a limit of the memory, and a missing GPU."""

import os
import subprocess

import pytest

from common.errors import ConfigError, ResourceError
from tests.faults.world import RUNS, STAGES, command_line, variables

pytestmark = pytest.mark.slow
MEGABYTE = 1 << 20


@pytest.mark.parametrize(("name", "fault"), [
    ("process", ("open", ".users.parquet.meta.json")), ("process", 2000), ("text_embedding", 1000),
    ("rkmeans", ("open", "run.log")), ("rqvae", ("open", "metrics.jsonl")), ("encoder_decoder", 20_000),
    ("export_recbole", 1000)])
def test_a_full_disk_is_named_and_loses_nothing(reference, tmp_path, name, fault):
    case = reference.case(name, "again" if STAGES[name].other else "fresh")
    world = case.before.copy(tmp_path / "world")
    outcome = world.run(case.script, *case.words, fault={"file_size": fault} if isinstance(fault, int) else
                        {"at": case.point(*fault), "do": "full"})
    world.check_full_disk(outcome)
    case.check_unharmed(world)
    case.check_repeated(world, world.run(case.script, *case.repeated))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_that_cannot_be_written_is_named(reference, tmp_path):
    world = reference.after("rqvae").copy(tmp_path / "world")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command_line("quantization/main.py", *RUNS.split(), "--explain"), stdout=full,
                              stderr=subprocess.PIPE, cwd=world.root, env=variables(None, {}), text=True, check=False)
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert " Fix: " in done.stderr


def test_a_limit_of_the_memory_is_named(reference, tmp_path):
    case = reference.case("rkmeans")
    world = case.before.copy(tmp_path / "world")
    outcome = world.run(case.script, *case.words, fault={"memory": 600 * MEGABYTE})
    outcome.check_error(ResourceError, "memory")
    case.check_unharmed(world)


def test_a_missing_gpu_is_named(reference, tmp_path):
    case = reference.case("rkmeans")
    world = case.before.copy(tmp_path / "world")
    outcome = world.run(case.script, *case.words, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    outcome.check_error(ConfigError, "--device", names=["cuda"], fix=["cpu"])
    assert world.files() == case.before.files()
