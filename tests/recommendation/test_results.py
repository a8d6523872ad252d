"""The comparison of runs, the summary of seeds, and the report of one job."""

import csv
import errno
import json
import logging
import math
import os
import re
import shlex
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.artifacts import dataset_line, load_meta, save_array
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import meta_path, publish
from recommendation.main import main
from recommendation.metrics import mean_and_deviation
from recommendation.models import DEFAULTS, baselines, config_path
from recommendation.pipeline import Pipeline, run_seeds
from recommendation.results import cell, compare, examples, report, table
from recommendation.results import main as report_by_command
from recommendation.runs import Choice, read_metrics
from tests.errors import refused
from tests.small import small_config
from tests.text import lines_with

from .conftest import SMALL
from .test_pipeline import HISTORIES, write_data, write_table, write_users


@pytest.fixture
def shop(tmp_path):
    """A dataset, the folder of its runs, and `pipeline(name, key=value)`."""
    folder = write_data(tmp_path, HISTORIES)

    def pipeline(name: str, **own: object) -> Pipeline:
        return Pipeline(config(name, **own), folder, Choice(name), tmp_path / "runs", f"python main.py {name}")

    return folder, tmp_path / "runs", pipeline


def config(name: str, **own: object):
    return small_config(name, config_path(name), DEFAULTS, SMALL | own)


def rows_of(folder, runs) -> list[dict]:
    with (runs / "recommendation" / folder.name / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def headings(text: str) -> list[str]:
    """The line above each table."""
    return [above for above, line in pairwise(filter(None, text.splitlines())) if line.startswith("| model")]


def training_command(name: str, folder, runs) -> str:
    return (f"python recommendation/main.py --model={name} --category=Tiny --run_root {runs} "
            f"--data_root {folder.data_root}")


@pytest.mark.slow
def test_seeds_of_one_configuration_share_a_row(shop):
    folder, runs, pipeline = shop
    for baseline in baselines():
        pipeline(baseline).execute(False)
    ndcg = [pipeline("sasrec", seed=seed).execute(False)["test"]["ndcg@10"] for seed in (3, 4)]
    pipeline("sasrec", seed=3, lr=0.5).execute(False)
    text = compare(folder, runs)
    rows = rows_of(folder, runs)
    assert sorted(row["model"] for row in rows) == sorted([*baselines(), "sasrec", "sasrec"])
    assert [float(row["ndcg@10"]) for row in rows] == sorted((float(row["ndcg@10"]) for row in rows), reverse=True)
    [both] = [row for row in rows if row["seeds"] == "3, 4"]
    assert float(both["ndcg@10"]) == pytest.approx(statistics.mean(ndcg))
    [other] = [row for row in rows if row["seeds"] == "3"]
    assert "lr=0.5" in other["settings"].split()
    assert "lr=0.01" in both["settings"].split()  # the YAML has another one
    assert "epochs=2" in both["settings"].split()
    assert f"| {statistics.mean(ndcg):.4f} ± {statistics.stdev(ndcg):.4f} " in text
    assert float(both["ndcg@10_deviation"]) == pytest.approx(statistics.stdev(ndcg))
    assert both["ndcg@10_stderr"] == other["ndcg@10_deviation"] == ""
    assert f"{float(other['ndcg@10']):.4f} (± {float(other['ndcg@10_stderr']):.4f})" in text
    assert all(row["filter_seen"] == "false" for row in rows)
    [heading] = headings(text)
    assert lines_with(heading, 12)  # test events
    assert dataset_line(folder) in text.splitlines()
    assert text.splitlines()[0] in (runs / "recommendation" / folder.name / "compare.md").read_text()


@pytest.mark.slow
def test_runs_of_a_seed_on_two_devices_count_once(shop):
    folder, runs, pipeline = shop
    for device in ("auto", "cpu"):
        pipeline("sasrec", device=device).execute(False)
    compare(folder, runs)
    [row] = [row for row in rows_of(folder, runs) if row["model"] == "sasrec"]
    assert (row["seeds"], row["ndcg@10_deviation"]) == ("0", "")
    assert float(row["ndcg@10_stderr"]) > 0


@pytest.mark.slow
def test_a_run_of_earlier_codes_is_marked(shop):
    def settings() -> list[str]:
        compare(folder, runs)
        return [row["settings"] for row in rows_of(folder, runs)]

    folder, runs, pipeline = shop
    pipeline("decoder_only").execute(False)
    [plain] = settings()
    path = folder.codes("rqvae", "td", None)
    meta = load_meta(path, "")
    save_array(path, np.roll(np.load(path), 1, axis=0), {key: meta[key] for key in meta if key not in (
        "sha256", "size", "schema_version")})
    [marked] = settings()
    assert marked.startswith(f"{plain} ")
    pipeline("decoder_only").execute(False)
    assert sorted(settings()) == [plain, marked]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", None), ("config.yaml", ""), ("config.yaml", "a: [1"), ("finished.json", "{}"),
    ("finished.json", "[]"), ("metrics.json", "{}"), ("times.json", "{")])
def test_a_damaged_run_is_left_out_and_named(shop, caplog, name, content):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)
    damaged = pipeline("sasrec")
    damaged.execute(False)
    (damaged.run.folder / name).unlink()
    if content is not None:
        (damaged.run.folder / name).write_text(content)
    text = compare(folder, runs)
    assert "| popularity |" in text
    assert "| sasrec" not in text
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(damaged.run.folder / name) in record.getMessage()


@pytest.mark.parametrize(("content", "key"), [
    ({}, "test"), ({"test": [], "num_parameters": 1}, "test"), ({"test": {}, "num_parameters": 1}, "test.num_targets"),
    ({"test": {"num_targets": 1}, "num_parameters": "1"}, "num_parameters"),
    ({"test": {"num_targets": 1, "ndcg@10": "0.5"}, "num_parameters": 1}, "test.ndcg@10"),
    ({"test": {"num_targets": 1.5}, "num_parameters": 1}, "test.num_targets"),
    ({"test": {"num_targets": -1}, "num_parameters": 1}, "test.num_targets"),
    ({"test": {"num_targets": 1}, "num_parameters": 10**400}, "num_parameters"),
    *(({"test": {"num_targets": 1, key: value}, "num_parameters": 1}, f"test.{key}")
      for key in ("ndcg@10", "recall@5_stderr", "invalid_share", "unknown@10")
      for value in (math.nan, math.inf, 10**400)),
    *(({"test": {"num_targets": 1, key: -9}, "num_parameters": 1}, f"test.{key}")
      for key in ("ndcg@10", "coverage@5", "ndcg@10_stderr", "duplicate_share")),
    ({"test": {"num_targets": 1, "ndcg@10": 1.5}, "num_parameters": 1}, "test.ndcg@10")])
def test_a_metric_of_wrong_type_is_named_with_its_key(tmp_path, content, key):
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with refused(ArtifactError, tmp_path / "metrics.json", names=[key], fix=["train --force"]):
        read_metrics(tmp_path, "train --force")


LINE = {"user": "user 0", "target": "0001", "items": ["0002"]}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    None, b"", b"\xff\n" * 12, b"{}\n" * 12, b"[" * 99_999, [LINE] * 11, [LINE | {"items": None}] * 12,
    [LINE | {"user": 5}] * 12, [LINE | {"target": "gone"}] * 12, [LINE | {"items": ["gone"]}] * 12, [LINE] * 12],
    ids=["missing", "empty", "binary", "no keys", "deep", "too few", "no items", "number", "target", "item", "others"])
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
def test_filtered_runs_have_their_own_table(shop):
    folder, runs, pipeline = shop
    pipeline("popularity", filter_seen="true").execute(False)
    [filtered] = headings(compare(folder, runs))
    pipeline("markov").execute(False)
    text = compare(folder, runs)
    assert headings(text)[1] == filtered != headings(text)[0]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == [
        "model", "markov", "model", "popularity"]
    assert [row["filter_seen"] for row in rows_of(folder, runs)] == ["false", "true"]


@pytest.mark.slow
def test_comparing_gives_commands_of_missing_baselines_and_trains_nothing(shop):
    folder, runs, pipeline = shop
    pipeline("sasrec").execute(False)
    pipeline("markov").execute(False)
    pipeline("popularity", filter_seen="true").execute(False)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
              and path.is_file()}
    text = compare(folder, runs)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
            and path.is_file()} == before
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    missing = {(name, flag) for name in baselines() for flag in ("", " --filter_seen")}
    missing -= {("markov", ""), ("popularity", " --filter_seen")}
    assert sorted(commands) == sorted(training_command(name, folder, runs) + flag for name, flag in missing)
    for command in commands:
        main(shlex.split(command)[2:])
    text = compare(folder, runs)
    assert "    python " not in text
    assert sorted(f"{row['model']} {row['filter_seen']}" for row in rows_of(folder, runs)) == sorted(
        [*(f"{name} {filtered}" for name in baselines() for filtered in ("false", "true")), "sasrec false"])


def test_a_folder_without_write_permission_still_shows_its_table(shop, monkeypatch):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)

    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("common.run.write_text", refuse)  # root may write anywhere
    text = compare(folder, runs)
    assert "| popularity |" in text
    last = text.splitlines()[-1]
    assert str(runs / "recommendation" / "Tiny" / "compare.md") in last
    assert "Permission denied" in last


def test_interactions_that_their_meta_does_not_describe_are_refused(shop):
    folder, runs, pipeline = shop
    path = meta_path(folder.interactions)
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_interactions": 5}))
    pipeline("popularity")
    with refused(ArtifactError, folder.interactions, names=["num_interactions", 5]):
        compare(folder, runs)


def test_runs_of_earlier_interactions_are_left_out_and_counted(shop):
    folder, runs, pipeline = shop
    for baseline in ("markov", "popularity"):
        pipeline(baseline).execute(False)
    write_data(folder.data_root.parent, [[*history, 7] for history in HISTORIES])
    command = training_command("encoder_decoder", folder, runs)
    with refused(DataError, runs / "recommendation" / "Tiny", fix=[command]):
        compare(folder, runs)
    pipeline("popularity").execute(False)
    text = compare(folder, runs)
    assert [row["model"] for row in rows_of(folder, runs)] == ["popularity"]
    assert [line for line in text.splitlines() if re.findall(r"\d+", line) == ["2"]]  # the number of earlier runs


def test_without_any_run_the_error_has_the_command(shop):
    folder, runs, _ = shop
    command = training_command("encoder_decoder", folder, runs)
    with refused(DataError, runs / "recommendation" / "Tiny", fix=[command]):
        compare(folder, runs)


@pytest.mark.slow
def test_seeds_are_run_one_by_one_and_reused(shop, caplog):
    _, _, pipeline = shop
    caplog.set_level(logging.INFO)
    settings = config("sasrec")
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
    singles = [pipeline("sasrec", seed=seed).execute(False)["test"]["recall@10"] for seed in (5, 6)]
    assert summary["test"]["recall@10"] == {"mean": pytest.approx(statistics.mean(singles)),
                                            "deviation": pytest.approx(statistics.stdev(singles))}
    assert (made[0].run.parent / "seeds.json").exists()


def test_a_metric_that_a_seed_lacks_is_left_out():
    older, newer = {"ndcg@10": 0.1}, {"ndcg@10": 0.3, "mrr@20": 0.2}
    assert list(mean_and_deviation([newer, older])) == ["ndcg@10"]
    assert cell([newer, older], "mrr@20") == cell([older, newer], "mrr@20") == ""


def metrics_json(*values: tuple[float, float]) -> dict:
    """Mean and standard error of the four columns."""
    names = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
    test = {"recall@20": 0.9, "recall@20_stderr": 0.9, "num_targets": 7}
    for name, (mean, error) in zip(names, values, strict=True):
        test |= {name: mean, f"{name}_stderr": error}
    return {"test": test, "valid": dict.fromkeys(test, 0.5)}


def test_the_table_by_hand():
    rows = {
        "markov": metrics_json((0.01234, 0.001), (0.5, 0.00126), (1.0, 0.0), (0.0, 0.0)),
        "encoder_decoder": metrics_json((0.2, 0.03), (0.1, 0.02), (0.4, 0.01), (0.3, 0.04)),
    }
    assert table(rows) == """\
| model           | recall@5         | ndcg@5           | recall@10        | ndcg@10          |
|-----------------|------------------|------------------|------------------|------------------|
| markov          | 0.0123 (±0.0010) | 0.5000 (±0.0013) | 1.0000 (±0.0000) | 0.0000 (±0.0000) |
| encoder_decoder | 0.2000 (±0.0300) | 0.1000 (±0.0200) | 0.4000 (±0.0100) | 0.3000 (±0.0400) |"""


def test_short_names_get_a_column_as_wide_as_its_heading():
    first, _, row = table({"bpr": metrics_json(*[(0.0, 0.0)] * 4)}).splitlines()
    assert first.startswith("| model | ")
    assert row.startswith("| bpr   | ")


def test_a_run_of_earlier_interactions_is_refused(train):
    trained = train("markov")
    publish(trained.folder.interactions, lambda staged: staged.write_bytes(b"others"), {"inputs": {}})
    with refused(ArtifactError, trained.run, names=["interactions.parquet"], fix=["the training command"]):
        report(trained.folder, trained.run_root, [trained.run])


@pytest.mark.slow
def test_the_report_has_only_the_listed_runs(train, tmp_path, caplog):
    trained, listed = train("markov"), tmp_path / "list"
    with caplog.at_level(logging.INFO):
        main(trained.argv("--model=popularity", f"--run_list={listed}"))
    assert dataset_line(trained.folder) in caplog.text
    main(trained.argv("--model=markov", f"--run_list={listed}"))
    main(trained.argv("--model=markov", "--filter_seen"))  # another process, before the report
    report_by_command(trained.argv(f"--run_list={listed}"))
    path = trained.run_root / "recommendation" / "Tiny" / "report.md"
    text, runs = path.read_text(), [Path(line) for line in listed.read_text().splitlines()]
    assert table({run.parent.parent.name: json.loads((run / "metrics.json").read_text()) for run in runs}) in text
    assert all("run_list" not in (run / "finished.json").read_text() for run in runs)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == ["model", "popularity", "markov"]
    report_by_command(trained.argv("--models=markov"))  # the newest run, which filters seen items
    assert path.read_text().splitlines()[0] != text.splitlines()[0]


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
    text = examples(folder, pipeline.run.folder, "markov")
    # Three of the six test events are shown: the first, the third and the last. Items are alone in their lines.
    parts = text.split("\n\n")
    assert [re.findall(r"^ +(\d+)$", part, re.MULTILINE) for part in parts] == [
        [f"000{item}" for item in history] for history in ([0, 1, 2], [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])]
    assert [part.split()[-1] for part in parts] == ["0003", "0005", "00015"]
