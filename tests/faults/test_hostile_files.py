"""Files that would run code are never run, and stale artifacts and artifacts of other versions are refused."""

import json
import pickle

import numpy as np
import pytest
import yaml

from common.errors import ArtifactError
from common.publishing import file_sha256, meta_path
from tests.faults.hostile import HOSTILE, bare_pickle, tag
from tests.faults.world import STAGES

pytestmark = pytest.mark.slow
SHORT = ("embedding of objects", "checkpoint of torch.save", "YAML of a model", "YAML of the raw files",
         "quantizer in another folder", "recommender in the current folder")


def test_the_hostile_values_create_the_canary_elsewhere(tmp_path):
    pickle.loads(bare_pickle(tmp_path / "pickled"))  # noqa: S301 (our own bytes)
    yaml.unsafe_load(tag(tmp_path / "tagged"))       # noqa: S506
    assert (tmp_path / "pickled").exists()
    assert (tmp_path / "tagged").exists()


def check_refused(world, canary, name, run) -> None:
    """Run the command of a hostile file. Fail if it runs the file, is not refused, or changes a file."""
    hostile = HOSTILE[name]
    hostile.write(world, canary)
    before = world.files()
    outcome = run(world, hostile.script, hostile.flags.split())
    assert not canary.exists()
    assert outcome.code == hostile.code, outcome.err
    assert outcome.error.fix, outcome.err
    now = world.files()
    assert [file for file, content in before.items() if now.get(file) != content] == []


@pytest.mark.parametrize("name", SHORT)
def test_a_hostile_file_is_refused_and_never_run(reference, tmp_path, name):
    world = reference.after("encoder_decoder").copy(tmp_path / "world")
    check_refused(world, tmp_path / "canary", name, lambda world, script, words: world.run(script, *words))


@pytest.mark.faults
def test_no_hostile_file_is_ever_run(reference, tmp_path, tally):
    for number, name in enumerate(HOSTILE):
        with tally.case("hostile files", name):
            world = reference.after("encoder_decoder").copy(tmp_path / f"world {number}")
            check_refused(world, tmp_path / "canary", name,
                          lambda world, script, words: reference.run(world, script, words, {}))
    tally.check()


def test_an_artifact_of_an_older_version_is_refused(reference, tmp_path):
    world, stage = reference.after("text_embedding").copy(tmp_path / "world"), STAGES["rkmeans"]
    path = meta_path(world.data("tea.emb-td.npy"))
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    before = world.files()
    world.run(stage.script, *stage.flags.split()).check_error(
        ArtifactError, path.relative_to(world.root), names=[1, 2], fix=["dataloader/3_get_text_emb.sh", "--force"])
    assert world.files() == before


def test_a_run_of_an_older_version_is_refused(reference, tmp_path):
    world, stage = reference.after("encoder_decoder").copy(tmp_path / "world"), STAGES["recommend"]
    [path] = world.root.glob("runs/recommendation/tea/encoder_decoder/*/*/finished.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
    before = world.files()
    world.run(stage.script, *stage.flags.split()).check_error(
        ArtifactError, path.relative_to(world.root), names=[1, 2], fix=["recommendation/main.py", "--force"])
    assert world.files() == before


def test_stale_codes_are_refused_with_the_command_that_rebuilds_them(reference, tmp_path):
    world, stage = reference.after("rqvae").copy(tmp_path / "world"), STAGES["encoder_decoder"]
    embedding = world.data("tea.emb-td.npy")
    np.save(embedding, np.load(embedding)[:, ::-1].copy())
    meta = meta_path(embedding)
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "sha256": file_sha256(embedding)}))
    world.run(stage.script, *stage.flags.split()).check_error(
        ArtifactError, world.data("tea.codes-rqvae-td.npy").relative_to(world.root), names=["tea.emb-td.npy"],
        fix=["python quantization/main.py", "--quantizer_name rqvae", "--force"])
