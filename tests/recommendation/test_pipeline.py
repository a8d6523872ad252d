"""From artifacts to a run: what is trained on, what is tested, what is written."""

import json
import math

import duckdb
import pandas as pd
import pytest
import torch

from common.artifacts import DatasetFolder, ids_sha256, load_meta, save_array
from common.errors import ArtifactError, DataError
from common.publishing import publish, write_meta
from recommendation.evaluator import predict
from recommendation.inputs import Choice, load_source
from recommendation.main import main
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.pipeline import Pipeline
from tests.errors import refused
from tests.text import lines_with

from .conftest import NUM_ITEMS, SIZES, random_codes

# Raw ids that a careless reader would convert to numbers or to missing values; row i is item or user i.
RAW_ITEMS = [f"000{item}" for item in range(NUM_ITEMS - 1)] + ["NA"]
HISTORIES = [[(3 * user + step * step) % NUM_ITEMS for step in range(4 + user % 5)] for user in range(12)]
ITEMS_SHA256 = ids_sha256(RAW_ITEMS)
RAW_USERS = [f"user {user}" for user in range(len(HISTORIES))]


def write_table(path, frame: pd.DataFrame, meta: dict) -> str:
    return publish(path, lambda staged: duckdb.from_df(frame).write_parquet(str(staged)),
                   {"inputs": {}, "num_items": NUM_ITEMS, "items_sha256": ITEMS_SHA256, **meta})["sha256"]


def write_users(folder: DatasetFolder, num_users: int) -> None:
    raw_ids = [f"user {user}" for user in range(num_users)]
    write_table(folder.users, pd.DataFrame({"user": range(num_users), "raw_id": raw_ids}), {})


def write_data(root, histories: list[list[int]]) -> DatasetFolder:
    """A dataset with semantic IDs; the last two items of every user are valid and test."""
    folder = DatasetFolder(root / "data", "Tiny")
    items = write_table(folder.items, pd.DataFrame({"item": range(NUM_ITEMS), "raw_id": RAW_ITEMS, "title": RAW_ITEMS,
                                                    "text": RAW_ITEMS}), {})
    write_users(folder, len(histories))
    events = [(user, item, time, split) for user, history in enumerate(histories) for time, (item, split) in
              enumerate(zip(history, ["train"] * (len(history) - 2) + ["valid", "test"], strict=False))]
    frame = pd.DataFrame(events, columns=["user", "item", "timestamp", "split"]).assign(rating=5.0)
    write_table(folder.interactions, frame, {})
    save_array(folder.codes("rqvae", "td", None), random_codes(NUM_ITEMS, SIZES).numpy().astype("int32"), {
        "inputs": {"items.parquet": items}, "items_sha256": ITEMS_SHA256, "codebook_sizes": SIZES,
        "disambiguation_level": None, "collision_rate_before": 0.25, "collision_rate_after": 0.0})
    return folder


@pytest.fixture
def execute(tmp_path, make_config):
    """model name, histories, folder name -> (the run's folder, its metrics)."""
    def execute(name: str, histories: list[list[int]], place: str = "one"):
        folder = write_data(tmp_path / place, histories)
        pipeline = Pipeline(make_config(name, top_k=20), folder, Choice(name), tmp_path / place / "runs", "a command")
        return pipeline.run.folder, pipeline.execute(force=False)

    return execute


MODELS = pytest.mark.parametrize("name", ["popularity", "encoder_decoder"])


@pytest.mark.slow
@MODELS
def test_the_predictions_file_has_the_reported_metrics(execute, name):
    run, metrics = execute(name, HISTORIES)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(row["user"], row["target"]) for row in rows] == [
        (user, RAW_ITEMS[history[-1]]) for user, history in zip(RAW_USERS, HISTORIES, strict=True)]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    written = json.loads((run / "ranks.json").read_text())
    assert (written.keys(), written["alone"].keys()) == ({"alone"}, {"all", "unseen"})
    for protocol, items, scores in (("all", "items", "scores"), ("unseen", "unseen", "unseen_scores")):
        assert all(len(row[items]) == len(set(row[items])) == len(row[scores]) == 20 for row in rows)
        ranks = [row[items].index(row["target"]) + 1 if row["target"] in row[items] else math.inf for row in rows]
        assert any(rank <= 10 for rank in ranks)
        test = metrics["alone"]["test"][protocol]
        for cutoff in (5, 10, 20):
            assert test[f"recall@{cutoff}"] == pytest.approx(sum(r <= cutoff for r in ranks) / len(ranks))
            assert test[f"ndcg@{cutoff}"] == pytest.approx(
                sum(1 / math.log2(1 + r) for r in ranks if r <= cutoff) / len(ranks))
        assert written["alone"][protocol] == [0 if rank == math.inf else rank for rank in ranks]
    for row, history in zip(rows, HISTORIES, strict=True):
        seen = {RAW_ITEMS[item] for item in history[:-1]}
        assert not seen & {*row["unseen"]}
        assert [item for item in row["items"] if item not in seen] == row["unseen"][:20 - len(seen & {*row["items"]})]


@pytest.mark.slow
def test_codes_of_one_level_train_a_recommender(execute, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SIZES", [NUM_ITEMS + 3])
    _, metrics = execute("encoder_decoder", HISTORIES)
    for protocol in ("all", "unseen"):
        assert metrics["alone"]["test"][protocol]["num_targets"] == len(HISTORIES)


def test_shared_ids_are_refused_before_anything_is_written(execute, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{__name__}.random_codes", lambda num_items, sizes: torch.zeros(num_items, len(sizes)))
    codes = DatasetFolder(tmp_path / "one" / "data", "Tiny").codes("rqvae", "td", None)
    with refused(ArtifactError, codes, fix=["--disambiguation extra_level"]):
        execute("encoder_decoder", HISTORIES)
    assert not [*tmp_path.rglob("runs")]


def test_missing_codes_of_any_model_are_named_before_the_first_run(tmp_path):
    folder = write_data(tmp_path, HISTORIES)
    codes = folder.codes("opq", "td", None)
    with refused(DataError, codes, fix=["--quantizer_name opq"]):
        main(["--model=popularity,encoder_decoder", "--quantizer_name=opq", "--dataset=Tiny",
              f"--data_root={tmp_path / 'data'}", f"--run_root={tmp_path / 'runs'}"])
    assert not [*tmp_path.rglob("runs")]


@pytest.mark.slow
@MODELS
def test_only_test_metrics_depend_on_test_events(execute, name):
    others = [[*history[:-1], (history[-1] + 11) % NUM_ITEMS] for history in HISTORIES]
    one, first = execute(name, HISTORIES)
    other, second = execute(name, others, place="other")
    assert first["alone"]["valid"] == second["alone"]["valid"]
    assert first["alone"]["test"] != second["alone"]["test"]
    weights = [(run / "checkpoints" / "best.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    lists = [[[json.loads(line)[key] for key in ("items", "unseen")]
              for line in (run / "predictions.jsonl").read_text().splitlines()] for run in (one, other)]
    assert lists[0] == lists[1]


def test_collapsed_semantic_ids_give_a_warning_with_a_fix(tmp_path, caplog):
    folder = write_data(tmp_path, HISTORIES)
    path, choice = folder.codes("rqvae", "td", None), Choice("encoder_decoder")
    load_source(folder, choice)
    assert not caplog.records
    collapse = "level 2 uses 6% of its codes; try --start kmeans"
    write_meta(path, load_meta(path, "") | {"collapse": collapse, "collision_rate_before": 1 - 23 / NUM_ITEMS,
                                            "command": "make the codes"})
    load_source(folder, choice)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert lines_with(record.getMessage(), path.name, NUM_ITEMS, 23, collapse, "make the codes")


@pytest.mark.slow
def test_models_that_read_semantic_ids_report_both_collision_rates(execute):
    _, metrics = execute("encoder_decoder", HISTORIES)
    assert (metrics["collision_rate_before"], metrics["collision_rate_after"]) == (0.25, 0.0)
    _, metrics = execute("popularity", HISTORIES)
    assert "collision_rate_before" not in metrics


@pytest.mark.slow
def test_the_encoders_mask_is_recorded(execute):
    _, metrics = execute("encoder_decoder", HISTORIES)
    assert metrics["encoder_mask"] == "full"


@pytest.mark.slow
def test_a_model_is_prepared_between_training_and_test(execute, monkeypatch):
    calls = []
    monkeypatch.setattr(AbstractRecommender, "prepare", lambda model: calls.append("prepare"))
    for stage in ("trainer", "evaluator"):
        monkeypatch.setattr(f"recommendation.{stage}.predict", lambda *args, stage=stage: calls.append(
            (stage, *args[2::2])) or predict(*args))
    execute("sasrec", HISTORIES)
    assert calls == [*[("trainer", "valid", "unseen")] * 2, "prepare",  # two epochs
                     *(("evaluator", split, protocol) for split in ("valid", "test") for protocol in ("all", "unseen"))]


@pytest.mark.slow
def test_each_model_is_selected_by_the_protocol_of_its_users(tmp_path, make_config):
    folder = write_data(tmp_path, HISTORIES)
    for filter_seen, protocol in (("auto", "unseen"), ("true", "unseen"), ("false", "all")):
        pipeline = Pipeline(make_config("sasrec", filter_seen=filter_seen), folder, Choice("sasrec"),
                            tmp_path / "runs", "a command")
        metrics = pipeline.execute(force=False)
        assert metrics["protocol"] == protocol
        epochs = [json.loads(line) for line in (pipeline.run.folder / "metrics.jsonl").read_text().splitlines()]
        values = {line["epoch"]: line["metrics"]["ndcg@10"] for line in epochs}
        assert values[metrics["best_epoch"]] == max(values.values())
        assert metrics["alone"]["valid"][protocol]["ndcg@10"] == max(values.values())


def test_test_events_without_history_are_skipped_and_counted(tmp_path, make_config, caplog):
    folder = write_data(tmp_path, HISTORIES[:11])
    before = duckdb.read_parquet(str(folder.interactions)).df()
    first = pd.DataFrame([(11, 3, 0, "test", 5.0), (11, 4, 1, "test", 5.0)], columns=before.columns)
    write_table(folder.interactions, pd.concat([before, first]), {})
    write_users(folder, 12)
    pipeline = Pipeline(make_config("markov", top_k=20), folder, Choice("markov"), tmp_path / "runs", "a command")
    metrics = pipeline.execute(force=False)["alone"]
    for protocol in ("all", "unseen"):
        test, valid = metrics["test"][protocol], metrics["valid"][protocol]
        assert (test["num_targets"], test["num_without_history"], valid["num_without_history"]) == (12, 1, 0)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert lines_with(record.getMessage(), 1)


def test_a_dataset_without_held_out_events_is_refused_before_training(execute, tmp_path):
    interactions = DatasetFolder(tmp_path / "one" / "data", "Tiny").interactions
    with refused(DataError, interactions, names=["valid"], fix=["--min_user_interactions 3"]):
        execute("encoder_decoder", [[0, 1], [2, 3]])
    assert not [*tmp_path.rglob("runs")]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_period_of_new_users_only_is_refused_with_its_cause(tmp_path, make_config, split):
    """In a temporal split, users with many events do not help if none of them has an event in the period."""
    folder = write_data(tmp_path, [])
    others = {"valid", "test"} - {split}
    events = [(0, time, time, name) for time, name in enumerate(["train", "train", "train", *others])]
    frame = pd.DataFrame([*events, (1, 5, 9, split)], columns=["user", "item", "timestamp", "split"]).assign(rating=5.0)
    write_table(folder.interactions, frame, {"split_name": "temporal"})
    write_users(folder, 2)
    pipeline = Pipeline(make_config("markov"), folder, Choice("markov"), tmp_path / "runs", "a command")
    with refused(DataError, folder.interactions, names=[split, "It has 1 events"],
                 fix=["--split_dates"]):
        pipeline.execute(force=False)
