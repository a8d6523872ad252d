"""The comparison of runs, the summary of seeds, and the report of one job."""

import itertools
import json
import logging
import math
import os
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest

from common.artifacts import dataset_line
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import publish
from recommendation.inputs import Choice
from recommendation.main import main
from recommendation.metrics import mean_and_deviation, mean_over_runs
from recommendation.pipeline import Pipeline, run_seeds
from recommendation.report import examples, label_of, mean_cell, report, seeds_table, table
from recommendation.results import main as report_by_command
from recommendation.runs import read_metrics, read_ranks
from tests.errors import refused

from .test_pipeline import write_data, write_table, write_users

METRICS = {"num_targets": 1, "ndcg@10": 0.5}


def content_with(place: str, changed: object) -> dict:
    """A valid metrics.json in which the value at `place`, a path with dots, is replaced (Ellipsis: removed)."""
    content = {"alone": {split: {protocol: dict(METRICS) for protocol in ("all", "unseen")}
                         for split in ("valid", "test")}, "num_parameters": 1, "protocol": "all"}
    *parents, last = place.split(".")
    of_place = content
    for key in parents:
        of_place = of_place[key]
    of_place[last] = changed
    if changed is ...:
        del of_place[last]
    return content


def test_valid_metrics_are_accepted(tmp_path):
    content = content_with("alone.test.all.by_popularity", {"cold": {}}) | {"weights": {"all": 0.5, "unseen": 0}}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert read_metrics(tmp_path, "train --force") == content


@pytest.mark.parametrize(("key", "value"), [
    ("alone", ...), ("alone", []), ("alone.test", ...), ("alone.test", []), ("alone.valid.unseen", ...),
    ("num_parameters", ...), ("num_parameters", "1"), ("num_parameters", 10**400), ("protocol", ...),
    ("protocol", "seen"), ("weights", {"all": -1}), ("weights", {"all": math.nan}), ("both", {}),
    *((f"alone.{split}.{protocol}.num_targets", value) for split in ("valid", "test") for protocol in ("all", "unseen")
      for value in (..., 1.5, -1)),
    *((f"alone.test.all.{key}", value) for key in ("ndcg@10", "recall@5_stderr", "invalid_share", "unknown@10")
      for value in (math.nan, math.inf, 10**400)),
    *((f"alone.test.unseen.{key}", -9) for key in ("ndcg@10", "coverage@5", "ndcg@10_stderr", "duplicate_share")),
    *(("alone.valid.all.ndcg@10", value) for value in (..., "0.5", 1.5))])
def test_a_metric_of_wrong_type_is_named_with_its_key(tmp_path, key, value):
    (tmp_path / "metrics.json").write_text(json.dumps(content_with(key, value)))
    with refused(ArtifactError, tmp_path / "metrics.json", names=[key], fix=["train --force"]):
        read_metrics(tmp_path, "train --force")


@pytest.mark.parametrize("content", [
    None, "[", "{}", {"alone": []}, {"alone": {"all": [1, 0]}}, {"alone": {"all": [1, 0], "unseen": [1]}},
    {"alone": {"all": [1, 0], "unseen": [1, -1]}}, {"alone": {"all": [1, 0], "unseen": [1, 0.5]}}], ids=str)
def test_damaged_ranks_are_refused_with_their_path(tmp_path, content):
    (tmp_path / "metrics.json").write_text(json.dumps(
        {"alone": {split: dict.fromkeys(("all", "unseen"), METRICS | {"num_targets": 2})
                   for split in ("valid", "test")}, "num_parameters": 1, "protocol": "all"}))
    metrics = read_metrics(tmp_path, "train --force")
    (tmp_path / "ranks.json").write_text(json.dumps({"alone": {"all": [1, 0], "unseen": [3, 2]}}))
    assert {key: ranks.tolist() for key, ranks in read_ranks(tmp_path, metrics, "")["alone"].items()} == {
        "all": [1, 0], "unseen": [3, 2]}
    (tmp_path / "ranks.json").unlink()
    if content is not None:
        (tmp_path / "ranks.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(ArtifactError, tmp_path / "ranks.json", fix=["train --force"]):
        read_ranks(tmp_path, metrics, "train --force")


LINE = {"user": "user 0", "target": "0001", "items": ["0002"], "unseen": ["0002"]}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    None, b"", b"\xff\n" * 12, b"{}\n" * 12, b"[" * 99_999, [LINE] * 11, [LINE | {"items": None}] * 12,
    [{key: LINE[key] for key in ("user", "target", "items")}] * 12, [LINE | {"unseen": ["gone"]}] * 12,
    [LINE | {"user": 5}] * 12, [LINE | {"target": "gone"}] * 12, [LINE | {"items": ["gone"]}] * 12, [LINE] * 12],
    ids=["missing", "empty", "binary", "no keys", "deep", "too few", "no items", "no unseen", "unseen item", "number",
         "target", "item", "others"])
def test_damaged_predictions_are_refused_with_their_path(train, damage):
    trained = train("markov")
    path = trained.run / "predictions.jsonl"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage if isinstance(damage, bytes) else "".join(
            json.dumps(line) + "\n" for line in damage).encode())
    with refused(ArtifactError, path, fix=["the training command --force"]):
        report(trained.folder, trained.run_root, [trained.run])


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"user": "user 1"}, {"target": "0001"}])
def test_predictions_for_other_test_events_are_refused(train, change):
    trained = train("markov")
    path = trained.run / "predictions.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    with refused(ArtifactError, path, fix=["the training command --force"]):
        report(trained.folder, trained.run_root, [trained.run])


@pytest.mark.slow
def test_a_list_shows_all_runs_of_a_model(shop, tmp_path, caplog):
    folder, runs, pipeline = shop
    listed = tmp_path / "list"
    folders = []
    for seed in (1, 2):
        one = pipeline("sasrec", seed=seed)
        one.execute(False)
        folders.append(one.run.folder)
    listed.write_text("".join(f"{run}\n" for run in (*folders, folders[0])))
    report_by_command([f"--run_list={listed}", "--dataset=Tiny", f"--data_root={folder.data_root}",
                       f"--run_root={runs}"])
    text = (runs / "recommendation" / "Tiny" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| sasrec")]
    assert [re.findall(r"seed (\d)", row) for row in rows] == [["1"], ["2"]]
    assert [run.name in row for run, row in zip(folders, rows, strict=True)] == [True, True]


@pytest.mark.parametrize("line", ["/", ".", "", "\0", "x" * 5_000, "{parent}", "{run}/../.."])
def test_a_line_that_is_not_a_run_is_named(train, tmp_path, line):
    trained, listed = train("markov"), tmp_path / "list"
    line = line.format(parent=trained.run.parent, run=trained.run)
    listed.write_text(f"{trained.run}\n{line}\n")
    with refused(DataError, f"{listed}:2") as raised:
        report_by_command(trained.argv(f"--run_list={listed}"))
    assert "delete" not in raised.value.fix


@pytest.mark.parametrize("models", ["../x", "markof", "", "markov,../markov"])
def test_unknown_models_are_refused_with_their_name(train, models):
    with refused(ConfigError, f"--models {models.rpartition(',')[2]}", fix=["markov"]):
        report_by_command(train("markov").argv(f"--models={models}"))


def test_a_list_of_runs_must_be_a_text_file(train, tmp_path):
    listed = tmp_path / "list"
    os.mkfifo(listed)
    with refused(DataError, listed):
        report_by_command(train("markov").argv(f"--run_list={listed}"))


@pytest.mark.slow
def test_seeds_are_run_one_by_one_and_reused(shop, caplog, make_config):
    _, _, pipeline = shop
    caplog.set_level(logging.INFO)
    settings = make_config("sasrec")
    made = []

    def make() -> Pipeline:
        made.append(pipeline("sasrec", seed=settings["common"]["seed"]))
        return made[-1]

    summary = run_seeds(settings, [5, 6], make, force=False)
    assert [one.config["common"]["seed"] for one in made] == [5, 6]
    assert summary["runs"] == [one.run.id for one in made]
    for one, other in (made, made[::-1]):  # each run's log is its own
        text = (one.run.folder / "run.log").read_text()
        assert one.run.id in text
        assert other.run.id not in text
    for split, protocol in itertools.product(("valid", "test"), ("all", "unseen")):
        singles = [pipeline("sasrec", seed=seed).execute(False)["alone"][split][protocol]["recall@10"]
                   for seed in (5, 6)]
        assert summary["alone"][split][protocol]["recall@10"] == {
            "mean": pytest.approx(statistics.mean(singles)), "deviation": pytest.approx(statistics.stdev(singles))}
    assert summary["protocol"] == "unseen"
    assert json.loads((made[0].run.parent / "seeds.json").read_text()) == summary


def test_a_metric_that_a_seed_lacks_is_left_out():
    older, newer = {"ndcg@10": 0.1}, {"ndcg@10": 0.3, "mrr@20": 0.2}
    for runs in ([newer, older], [older, newer]):
        assert list(mean_and_deviation(runs)) == ["ndcg@10"]
    assert mean_cell(mean_and_deviation([newer, older]).get("mrr@20")) == ""


def metrics_json(valid: float, *values: tuple[float, float], protocol: str = "all") -> dict:
    """Validation ndcg@10 of the protocol; mean and standard error of the four columns."""
    places = [(of, name) for of in ("all", "unseen") for name in ("recall@10", "ndcg@10")]
    test = {of: {"recall@20": 0.9, "recall@20_stderr": 0.9, "num_targets": 7} for of in ("all", "unseen")}
    for (of, name), (mean, error) in zip(places, values, strict=True):
        test[of] |= {name: mean, f"{name}_stderr": error}
    return {"alone": {"valid": {of: {"ndcg@10": valid if of == protocol else 0.9} for of in test}, "test": test},
            "protocol": protocol}


MARKOV = metrics_json(0.25, (0.01234, 0.001), (0.5, 0.00126), (1.0, 0.0), (0.0, 0.0))
TRAINED = metrics_json(0.125, (0.2, 0.03), (0.1, 0.02), (0.4, 0.01), (0.3, 0.04), protocol="unseen")


def test_the_table_by_hand():
    rows = {"markov": MARKOV, "sasrec": TRAINED}
    assert table(rows, dict.fromkeys(rows, "none")) == """\
| model  | validation ndcg@10 | recall@10 (all)  | ndcg@10 (all)    | recall@10 (unseen) | ndcg@10 (unseen) |
|--------|--------------------|------------------|------------------|--------------------|------------------|
| markov | 0.2500             | 0.0123 (±0.0010) | 0.5000 (±0.0013) | 1.0000 (±0.0000)   | 0.0000 (±0.0000) |
| sasrec | 0.1250             | 0.2000 (±0.0300) | 0.1000 (±0.0200) | 0.4000 (±0.0100)   | 0.3000 (±0.0400) |"""


def first_cells(text: str) -> list[tuple[str, str]]:
    """The model and the first metric of each row of a table."""
    return [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines()[2:]]


def test_a_prior_has_rows_of_its_own():
    with_prior = TRAINED | {"prior": MARKOV["alone"], "both": TRAINED["alone"]}
    expected = [("sasrec", "0.1250"), ("markov", "0.9000"), ("sasrec + markov", "0.1250")]
    assert first_cells(table({"sasrec": with_prior}, {"sasrec": "markov"})) == expected
    # A baseline that has a row of its own is not shown again.
    rows = {"markov": MARKOV, "sasrec": with_prior}
    assert first_cells(table(rows, {"markov": "none", "sasrec": "markov"})) == [("markov", "0.2500"), *expected[::2]]
    # A baseline with other settings is not the prior, so both are shown.
    other = MARKOV | {"alone": TRAINED["alone"]}
    named = [expected[0], ("markov (prior of sasrec)", "0.9000"), expected[2]]
    for names in (("markov", "sasrec"), ("sasrec", "markov")):
        rows = {name: {"markov": other, "sasrec": with_prior}[name] for name in names}
        found = first_cells(table(rows, {"markov": "none", "sasrec": "markov"}))
        assert sorted(found) == sorted([("markov", "0.9000"), *named])
    assert [label_of("sasrec", "markov", part) for part in with_prior if part != "protocol"] == [
        "sasrec", "markov", "sasrec + markov"]


def test_the_table_of_seeds_by_hand():
    other = metrics_json(0.375, (0.4, 0.03), (0.3, 0.02), (0.8, 0.01), (0.5, 0.04), protocol="unseen")
    summary = {"seeds": [3, 4], "protocol": "unseen"} | mean_over_runs([TRAINED, other])
    heading, _, row = seeds_table("sasrec", summary, "none").splitlines()
    assert heading.split("|")[-2].strip() == "seeds"
    # The deviation of two values is their difference over the square root of two.
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "sasrec", "0.2500 ± 0.1768", "0.3000 ± 0.1414", "0.2000 ± 0.1414", "0.6000 ± 0.2828", "0.4000 ± 0.1414",
        "3, 4"]


def test_short_names_get_a_column_as_wide_as_its_heading():
    first, _, row = table({"bpr": TRAINED}, {"bpr": "none"}).splitlines()
    assert first.startswith("| model | ")
    assert row.startswith("| bpr   | ")


def test_a_run_of_earlier_interactions_is_refused(train):
    trained = train("markov")
    publish(trained.folder.interactions, lambda staged: staged.write_bytes(b"others"), {"inputs": {}})
    with refused(ArtifactError, trained.run, names=["interactions.parquet"], fix=["the training command"]):
        report(trained.folder, trained.run_root, [trained.run])


@pytest.mark.parametrize(("repeats", "sentence"), [
    (0, "No test event repeats an item of the history, so a seen item is never right."),
    (3, "25 % of the test events repeat an item of the history; lists of unseen items always miss them.")])
def test_the_report_says_whether_seen_items_can_be_right(tmp_path, make_config, repeats, sentence):
    folder = write_data(tmp_path, [])
    # In the test, the first users choose the item of their training event again.
    events = [(user, user if time == 2 and user < repeats else user + time, time, split) for user in range(12)
              for time, split in enumerate(["train", "valid", "test"])]
    frame = pd.DataFrame(events, columns=["user", "item", "timestamp", "split"]).assign(rating=5.0)
    write_table(folder.interactions, frame, {"num_in_split": {"train": 12, "valid": 12, "test": 12},
                                             "num_repeats": {"valid": 0, "test": repeats}})
    write_users(folder, 12)
    pipeline = Pipeline(make_config("popularity", top_k=20), folder, Choice("popularity"), tmp_path / "runs", "train")
    pipeline.execute(force=False)
    assert sentence in report(folder, tmp_path / "runs", [pipeline.run.folder])


@pytest.mark.slow
def test_the_report_has_only_the_listed_runs(train, tmp_path, caplog):
    trained, listed = train("markov"), tmp_path / "list"
    with caplog.at_level(logging.INFO):
        main(trained.argv("--model=popularity", f"--run_list={listed}"))
    assert dataset_line(trained.folder) in caplog.text
    main(trained.argv("--model=markov", f"--run_list={listed}"))
    main(trained.argv("--model=markov", "--filter_seen=false"))  # another process, before the report
    report_by_command(trained.argv(f"--run_list={listed}"))
    path = trained.run_root / "recommendation" / "Tiny" / "report.md"
    text, runs = path.read_text(), [Path(line) for line in listed.read_text().splitlines()]
    rows = {run.parent.parent.name: json.loads((run / "metrics.json").read_text()) for run in runs}
    assert table(rows, dict.fromkeys(rows, "none")) in text
    assert all("run_list" not in (run / "finished.json").read_text() for run in runs)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == ["model", "popularity", "markov"]
    report_by_command(trained.argv("--models=markov"))  # the newest run, whose users get all items
    other = path.read_text()
    for shown, protocol in ((text, "unseen"), (other, "all")):
        assert shown.splitlines()[0].endswith(f"{protocol} items.")
    lists = [json.loads(line) for line in (runs[-1] / "predictions.jsonl").read_text().splitlines()]
    user = lists[0]["user"]
    for shown, key in ((text, "unseen"), (other, "items")):
        part = shown[shown.index(f"User {user}:"):]
        assert re.findall(r"^ +\d+\. (\w+)", part, re.MULTILINE)[:10] == lists[0][key][:10]
    assert lists[0]["unseen"] != lists[0]["items"]


@pytest.mark.slow
def test_a_list_without_runs_is_refused(train, tmp_path):
    listed = tmp_path / "list"
    listed.touch()
    with refused(DataError, listed, fix=[f"python recommendation/main.py --model=M --run_list {listed}"]):
        report_by_command(train("markov").argv(f"--run_list={listed}"))


def test_an_examples_history_ends_before_its_test_item(tmp_path, make_config):
    folder = write_data(tmp_path, [])
    splits = ["train", "train", "valid", "test", "test", "test"]
    events = [(user, user * 10 + time, time, split) for user in (0, 1) for time, split in enumerate(splits)]
    frame = pd.DataFrame(events, columns=["user", "item", "timestamp", "split"]).assign(rating=5.0)
    write_table(folder.interactions, frame, {"split_name": "temporal"})
    write_users(folder, 2)
    pipeline = Pipeline(make_config("markov", top_k=20), folder, Choice("markov"), tmp_path / "runs", "train")
    pipeline.execute(force=False)
    text = examples(folder, pipeline.run.folder, "markov", "all")
    # Three of the six test events are shown: the first, the third and the last. Items are alone in their lines.
    parts = text.split("\n\n")
    assert [re.findall(r"^ +(\d+)$", part, re.MULTILINE) for part in parts] == [
        [f"000{item}" for item in history] for history in ([0, 1, 2], [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])]
    assert [part.split()[-1] for part in parts] == ["0003", "0005", "00015"]


def test_by_default_the_models_with_a_run_are_shown(train):
    trained = train("markov")
    report_by_command(trained.argv())
    assert [line.split("|")[1].strip() for line in
            (trained.run_root / "recommendation" / trained.folder.name / "report.md").read_text().splitlines()
            if line.startswith(("| markov", "| sasrec"))] == ["markov"]
