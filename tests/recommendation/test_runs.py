"""A finished run is loaded as it was selected, or refused with what no longer fits."""

import json

import pytest

from common.artifacts import save_array
from common.errors import ArtifactError, DataError
from common.publishing import meta_path
from recommendation.dataset import Sequences
from recommendation.evaluator import predict
from recommendation.runs import Choice, load_recommender

from .conftest import NUM_ITEMS, SIZES, random_codes
from .test_pipeline import HISTORIES, RAW_ITEMS, write_data

AGAIN = "Fix: the training command --force"


def load(trained, name: str):
    return load_recommender(trained.folder, trained.run_root, Choice(name))


def replace_in(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def refused(trained, name: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(trained, name)
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["popularity", "markov", "sasrec", "encoder_decoder"])
def test_what_is_loaded_recommends_what_the_run_predicted(train, name):
    trained = train(name)
    finished = load(trained, name)
    assert (finished.folder, finished.model.training) == (trained.run, False)
    found = predict(finished.model, Sequences.load(trained.folder, "cpu"), "test", finished.config.training_params)
    rows = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    assert [[RAW_ITEMS[item] for item in items] for items in found.items] == [row["items"] for row in rows]
    assert found.scores.astype(float).round(6).tolist() == [row["scores"] for row in rows]


def test_where_no_run_is_finished_the_error_has_the_command(train):
    trained = train("markov")
    with pytest.raises(DataError, match="sasrec/no-codes: has no finished run") as caught:
        load(trained, "sasrec")
    assert caught.value.exit_code == 3
    assert str(caught.value).endswith("Fix: python recommendation/main.py --model=sasrec --category=Tiny "
                                      f"--run_root {trained.run_root} --data_root {trained.folder.data_root}")


def test_where_no_run_is_finished_the_error_names_the_semantic_ids_that_have_one(train):
    trained = train("encoder_decoder")
    with pytest.raises(DataError, match=r"rqave-td: has no finished run. did you mean 'rqvae-td'\? Fix") as caught:
        load_recommender(trained.folder, trained.run_root, Choice("encoder_decoder", "rqave"))
    assert caught.value.fix.startswith("--quantizer_name rqvae; ")


@pytest.mark.parametrize(("choice", "there", "flags"), [
    (("rqvae", "td", None), "rqvae-td-v2", "--tag v2"), (("rqvae", "td", "v1"), "rqvae-td", "without --tag"),
    (("pq", "fused-cat", None), "pq-fused-concat", "--embedding_suffix fused-concat"),
    (("mq", "td", "a-b"), "pq-cf-a-b", "--quantizer_name pq --embedding_suffix cf")])
def test_the_flags_of_other_semantic_ids_by_hand(choice, there, flags):
    assert Choice("encoder_decoder", *choice).flags_of(there) == flags


def test_the_command_names_the_semantic_ids_that_are_not_the_default(tmp_path, train):
    folder = train("markov").folder
    command = Choice("encoder_decoder", "pq", "image", "small").training_command(folder, tmp_path)
    assert "--quantizer_name pq --embedding_suffix image --tag small" in command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["markov", "encoder_decoder"])
def test_a_run_of_other_interactions_is_refused(train, name):
    trained = train(name)
    write_data(trained.folder.data_root.parent, [[*history, 7] for history in HISTORIES])
    message = refused(trained, name)
    assert "was trained on another interactions.parquet" in message
    assert message.endswith("Fix: the training command")


@pytest.mark.slow
def test_a_run_of_other_semantic_ids_is_refused(train):
    trained = train("encoder_decoder")
    path = trained.folder.codes("rqvae", "td", None)
    meta = json.loads(meta_path(path).read_text())
    kept = {key: meta[key] for key in meta if key not in ("sha256", "size")}
    save_array(path, random_codes(NUM_ITEMS, SIZES, seed=1).numpy().astype("int32"), kept)
    assert "was trained on another Tiny.codes-rqvae-td.npy" in refused(trained, "encoder_decoder")


def test_a_checkpoint_of_another_configuration_is_refused_with_both_shapes_and_training_again_mends_it(train):
    trained = train("sasrec", d_model=24)
    replace_in(trained.run / "config.yaml", "d_model: 24", "d_model: 12")
    message = refused(trained, "sasrec")
    assert "best.safetensors: does not fit the model" in message
    assert "items.weight is (30, 24) where the model has (30, 12)" in message
    assert message.endswith(AGAIN)
    assert "size mismatch" not in message
    train("sasrec", d_model=24, force=True)
    assert load(trained, "sasrec").folder == trained.run


def test_a_checkpoint_with_more_layers_than_its_configuration_is_refused_with_the_keys(train):
    trained = train("sasrec", num_layers=2)
    replace_in(trained.run / "config.yaml", "num_layers: 2", "num_layers: 1")
    assert "it also has layers.1.0.norm.weight" in refused(trained, "sasrec")


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "what"), [
    ("d_model: 16", "width: 16", "the model needs 'd_model'"), ("d_model: 16", "d_model: 16\n    width: 3", "width"),
    ("max_history: 5", "longest: 5", "unknown key sasrec.training_params.longest")])
def test_a_configuration_of_another_version_is_refused(train, old, new, what):
    trained = train("sasrec", d_model=16, num_heads=2)
    replace_in(trained.run / "config.yaml", old, new)
    message = refused(trained, "sasrec")
    assert what in message
    assert "of another version of sasrec" in message
    assert message.endswith(AGAIN)


def test_a_checkpoint_of_another_schema_version_is_refused(train):
    trained = train("markov")
    replace_in(trained.run / "checkpoints/best.safetensors.meta.json", '"schema_version": 1', '"schema_version": 0')
    assert "has schema version 0" in refused(trained, "markov")
