"""A finished run is loaded with its best checkpoint, or refused if it no longer fits."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from common.artifacts import save_array
from common.checkpoint import load_state, save_state
from common.errors import ArtifactError, DataError
from common.publishing import meta_path
from recommendation.dataset import Sequences
from recommendation.evaluator import predict
from recommendation.inputs import Choice, load_source
from recommendation.runs import load_recommender, read_run
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
    assert (finished.ranker, finished.protocol) == (finished.model, "unseen")
    rows = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    for protocol, items, scores in (("all", "items", "scores"), ("unseen", "unseen", "unseen_scores")):
        found = predict(finished.ranker, Sequences.load(trained.folder, "cpu"), "test",
                        finished.config.training_params, protocol)
        assert [[RAW_ITEMS[item] for item in row] for row in found.items] == [row[items] for row in rows]
        assert found.scores.astype(float).round(6).tolist() == [row[scores] for row in rows]


def test_a_missing_run_gives_the_training_command(train):
    trained = train("markov")
    command = (f"python recommendation/main.py --model=sasrec --category=Tiny --run_root {trained.run_root} "
               f"--data_root {trained.folder.data_root}")
    with refused(DataError, trained.run_root / "recommendation/Tiny/sasrec/no-codes", names=["--model markov"],
                 fix=[command]):
        load(trained, "sasrec")


def test_a_missing_run_names_the_flags_of_other_models(train):
    trained = train("encoder_decoder")
    parent = trained.run_root / "recommendation/Tiny"
    (parent / "encoder_decoder/rqvae-td").rename(parent / "encoder_decoder/opq-fused-concat")
    with refused(DataError, parent / "decoder_only/rqvae-td", names=[
            "--model encoder_decoder --quantizer_name opq --embedding_suffix fused-concat"]):
        load_recommender(trained.folder, trained.run_root, Choice("decoder_only"))


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


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "key"), [
    ("d_kv: 4", "d_kv: 99999999999999999999", "d_kv"), ("d_model: 16", "d_model: 1000000000", "d_model"),
    ("num_encoder_layers: 2", "num_encoder_layers: 10000000", "num_encoder_layers"),
    ("lr: 0.01", f"lr: {'9' * 400}", "lr"), ("top_k: 20", "top_k: 1000000000", "top_k"),
    ("device: auto", 'device: "cpu\\0"', None), ("device: auto", "device: gpu", None)])
def test_an_absurd_value_in_the_configuration_is_refused(train, old, new, key):
    trained = train("encoder_decoder")
    path = trained.run / "config.yaml"
    replace_in(path, old, new)
    number = 1 + [text.strip() for text in path.read_text().splitlines()].index(new)
    with refused(ArtifactError, f"{path}:{number}", names=[key or "device"], fix=[AGAIN]):
        load(trained, "encoder_decoder")


def damage_checkpoint(trained, **tensors: torch.Tensor) -> Path:
    path = trained.run / "checkpoints/best.safetensors"
    state = load_state(path, "")
    save_state(path, {**state, "model": state["model"] | tensors}, "the training command")
    return path


MARKOV = {  # name -> a change of one tensor
    "negative followers": ("followers", lambda old: -old - 1), "huge followers": ("followers", lambda old: old + 10**9),
    "float followers": ("followers", lambda old: old.double()), "matrix": ("followers", lambda old: old.reshape(1, -1)),
    "fewer followers": ("followers", lambda old: old[1:]), "reversed starts": ("row_starts", lambda old: old.flip(0)),
    "negative starts": ("row_starts", lambda old: -old), "huge starts": ("row_starts", lambda old: old * 10**9),
    "shuffled starts": ("row_starts", lambda old: torch.cat([old[:1], old[1:-1].flip(0), old[-1:]])),
    "fewer counts": ("counts", lambda old: old[1:]), "bfloat16": ("counts", lambda old: old.bfloat16())}


@pytest.mark.parametrize("case", MARKOV)
def test_damaged_transitions_are_refused(train, case):
    trained, (name, change) = train("markov"), MARKOV[case]
    path = damage_checkpoint(trained, **{name: change(load(trained, "markov").model.state_dict()[name])})
    with refused(ArtifactError, path, fix=[AGAIN]):
        load(trained, "markov")


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_counts_of_another_type_are_refused(train, dtype):
    trained = train("popularity")
    path = damage_checkpoint(trained, counts=torch.ones(NUM_ITEMS).to(dtype))
    with refused(ArtifactError, path, names=[str(dtype).removeprefix("torch.")], fix=[AGAIN]):
        load(trained, "popularity")


def test_a_forged_reason_of_a_collapse_is_one_line(train, caplog):
    trained = train("markov")
    path = meta_path(trained.folder.codes("rqvae", "td", None))
    path.write_text(json.dumps({**json.loads(path.read_text()), "collapse": "x\nerror: forged" + "y" * 99_999,
                                "command": "make codes\nerror: forged"}))
    load_source(trained.folder, Choice("encoder_decoder"))
    [record] = caplog.records
    assert len(record.getMessage().splitlines()) == 1
    assert len(record.getMessage()) < 10_000


@pytest.mark.parametrize(("name", "key", "value"), [
    ("times.json", "training", math.nan), ("times.json", "training", 10**400), ("times.json", "training", -1),
    ("finished.json", "users_per_second", 10**400), ("finished.json", "users_per_second", math.nan)])
def test_a_number_out_of_range_is_named_with_its_key(train, name, key, value):
    trained = train("markov")
    path = trained.run / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with refused(ArtifactError, path, names=[key]):
        read_run(trained.run)


def test_a_checkpoint_of_another_schema_version_is_refused(train):
    trained = train("markov")
    path = trained.run / "checkpoints/best.safetensors.meta.json"
    replace_in(path, '"schema_version": 2', '"schema_version": 907')
    with refused(ArtifactError, path, names=[907], fix=[AGAIN]):
        load(trained, "markov")
