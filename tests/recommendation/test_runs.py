"""A finished run is loaded with its best checkpoint, or refused if it no longer fits."""

import json
import re

import pytest

from common.artifacts import save_array
from common.errors import ArtifactError, DataError
from common.publishing import meta_path
from recommendation.dataset import Sequences
from recommendation.evaluator import predict
from recommendation.runs import Choice, load_recommender
from tests.errors import refused

from .conftest import NUM_ITEMS, SIZES, random_codes
from .test_pipeline import HISTORIES, RAW_ITEMS, write_data

AGAIN = "the training command --force"


def load(trained, name: str):
    return load_recommender(trained.folder, trained.run_root, Choice(name))


def replace_in(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def digest_of(path) -> str:
    return json.loads(meta_path(path).read_text())["sha256"][:12]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["popularity", "markov", "sasrec", "encoder_decoder"])
def test_a_loaded_run_recommends_what_it_predicted(train, name):
    trained = train(name)
    finished = load(trained, name)
    assert (finished.folder, finished.model.training) == (trained.run, False)
    found = predict(finished.model, Sequences.load(trained.folder, "cpu"), "test", finished.config.training_params)
    rows = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    assert [[RAW_ITEMS[item] for item in items] for items in found.items] == [row["items"] for row in rows]
    assert found.scores.astype(float).round(6).tolist() == [row["scores"] for row in rows]


def test_a_missing_run_gives_the_training_command(train):
    trained = train("markov")
    command = (f"python recommendation/main.py --model=sasrec --category=Tiny --run_root {trained.run_root} "
               f"--data_root {trained.folder.data_root}")
    with refused(DataError, trained.run_root / "recommendation/Tiny/sasrec/no-codes", fix=[command]):
        load(trained, "sasrec")


def test_a_missing_run_names_semantic_ids_with_a_run(train):
    trained = train("encoder_decoder")
    command = "python recommendation/main.py --model=encoder_decoder --category=Tiny --quantizer_name rqave"
    with refused(DataError, trained.run_root / "recommendation/Tiny/encoder_decoder/rqave-td", names=["'rqvae-td'"],
                 fix=["--quantizer_name rqvae", command]):
        load_recommender(trained.folder, trained.run_root, Choice("encoder_decoder", "rqave"))


@pytest.mark.parametrize(("choice", "other", "flags"), [
    (("rqvae", "td", None), "rqvae-td-v2", "--tag v2"),
    (("pq", "fused-cat", None), "pq-fused-concat", "--embedding_suffix fused-concat"),
    (("mq", "td", "a-b"), "pq-cf-a-b", "--quantizer_name pq --embedding_suffix cf")])
def test_the_flags_of_other_semantic_ids_by_hand(choice, other, flags):
    assert Choice("encoder_decoder", *choice).flags_of(other) == flags


def test_a_tag_that_other_semantic_ids_lack_is_named():
    flags = Choice("encoder_decoder", "rqvae", "td", "v1").flags_of("rqvae-td")
    assert re.findall(r"--\w+", flags) == ["--tag"]
    assert "v1" not in flags


def test_the_command_has_the_flags_of_other_semantic_ids(tmp_path, train):
    folder = train("markov").folder
    command = Choice("encoder_decoder", "pq", "image", "small").training_command(folder, tmp_path)
    assert "--quantizer_name pq --embedding_suffix image --tag small" in command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["markov", "encoder_decoder"])
def test_a_run_of_other_interactions_is_refused(train, name):
    trained = train(name)
    before = digest_of(trained.folder.interactions)
    write_data(trained.folder.data_root.parent, [[*history, 7] for history in HISTORIES])
    names = ["interactions.parquet", before, digest_of(trained.folder.interactions)]
    with refused(ArtifactError, trained.run, names=names, fix=["the training command"]) as raised:
        load(trained, name)
    assert "--force" not in raised.value.fix


@pytest.mark.slow
def test_a_run_of_other_semantic_ids_is_refused(train):
    trained = train("encoder_decoder")
    path = trained.folder.codes("rqvae", "td", None)
    meta = json.loads(meta_path(path).read_text())
    kept = {key: meta[key] for key in meta if key not in ("sha256", "size")}
    save_array(path, random_codes(NUM_ITEMS, SIZES, seed=1).numpy().astype("int32"), kept)
    with refused(ArtifactError, trained.run, names=["Tiny.codes-rqvae-td.npy"], fix=["the training command"]):
        load(trained, "encoder_decoder")


def test_a_checkpoint_of_another_configuration_is_refused_until_retrained(train):
    trained = train("sasrec", d_model=24)
    replace_in(trained.run / "config.yaml", "d_model: 24", "d_model: 12")
    with refused(ArtifactError, trained.run / "checkpoints/best.safetensors",
                 names=["items.weight", "(30, 24)", "(30, 12)"], fix=[AGAIN]) as raised:
        load(trained, "sasrec")
    assert "\n" not in str(raised.value)
    train("sasrec", d_model=24, force=True)
    assert load(trained, "sasrec").folder == trained.run


def test_a_checkpoint_with_additional_layers_is_refused(train):
    trained = train("sasrec", num_layers=2)
    replace_in(trained.run / "config.yaml", "num_layers: 2", "num_layers: 1")
    with refused(ArtifactError, trained.run / "checkpoints/best.safetensors", names=["layers.1.0.norm.weight"],
                 fix=[AGAIN]):
        load(trained, "sasrec")


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "line", "key"), [
    ("d_model: 16", "width: 16", "model_params:", "'d_model'"),
    ("d_model: 16", "d_model: 16\n    width: 3", "width: 3", "sasrec.model_params.width"),
    ("max_history: 5", "longest: 5", "longest: 5", "sasrec.training_params.longest")])
def test_a_configuration_of_another_version_is_refused(train, old, new, line, key):
    trained = train("sasrec", d_model=16, num_heads=2)
    path = trained.run / "config.yaml"
    replace_in(path, old, new)
    number = 1 + [text.strip() for text in path.read_text().splitlines()].index(line)
    with refused(ArtifactError, f"{path}:{number}", names=[key, "sasrec"], fix=[AGAIN]):
        load(trained, "sasrec")


def test_a_checkpoint_of_another_schema_version_is_refused(train):
    trained = train("markov")
    path = trained.run / "checkpoints/best.safetensors.meta.json"
    replace_in(path, '"schema_version": 2', '"schema_version": 907')
    with refused(ArtifactError, path, names=[907], fix=[AGAIN]):
        load(trained, "markov")
