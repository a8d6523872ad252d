"""Runs side by side, seeds together, and the report of one job."""

import csv
import errno
import logging
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.artifacts import load_meta, save_array
from common.errors import ArtifactError, DataError
from common.publishing import publish
from recommendation.main import main
from recommendation.metrics import mean_and_deviation
from recommendation.models import DEFAULTS, config_path
from recommendation.pipeline import Pipeline, run_seeds
from recommendation.results import cell, compare, examples, report, table
from recommendation.results import main as report_by_command
from recommendation.runs import Choice
from tests.small import small_config

from .conftest import SMALL
from .test_pipeline import HISTORIES, write_data, write_table


@pytest.fixture
def shop(tmp_path):
    """A data set, and `pipeline(name, key=value)` for it."""
    folder = write_data(tmp_path, HISTORIES)

    def pipeline(name: str, **own: object) -> Pipeline:
        return Pipeline(config(name, **own), folder, Choice(name), tmp_path / "runs", f"python main.py {name}")

    return folder, tmp_path / "runs", pipeline


def config(name: str, **own: object):
    return small_config(name, config_path(name), DEFAULTS, SMALL | own)


def rows_of(folder, runs) -> list[dict]:
    with (runs / "recommendation" / folder.name / "compare.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_seeds_of_one_configuration_share_a_row(shop):
    folder, runs, pipeline = shop
    for baseline in ("markov", "popularity"):
        pipeline(baseline).execute(False)
    ndcg = [pipeline("sasrec", seed=seed).execute(False)["test"]["ndcg@10"] for seed in (3, 4)]
    pipeline("sasrec", seed=3, lr=0.5).execute(False)
    text = compare(folder, runs)
    rows = rows_of(folder, runs)
    assert sorted(row["model"] for row in rows) == ["markov", "popularity", "sasrec", "sasrec"]
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
    assert "Nothing filtered (12 targets)" in text
    assert text.splitlines()[0] in (runs / "recommendation" / folder.name / "compare.md").read_text()


@pytest.mark.slow
def test_a_seed_that_was_run_on_two_devices_is_one_seed(shop):
    folder, runs, pipeline = shop
    for device in ("auto", "cpu"):
        pipeline("sasrec", device=device).execute(False)
    compare(folder, runs)
    [row] = [row for row in rows_of(folder, runs) if row["model"] == "sasrec"]
    assert (row["seeds"], row["ndcg@10_deviation"]) == ("0", "")
    assert float(row["ndcg@10_stderr"]) > 0


@pytest.mark.slow
def test_a_run_of_codes_that_are_no_longer_there_says_so(shop):
    folder, runs, pipeline = shop
    pipeline("decoder_only").execute(False)
    path = folder.codes("rqvae", "td", None)
    meta = load_meta(path, "")
    save_array(path, np.roll(np.load(path), 1, axis=0), {key: meta[key] for key in meta if key not in (
        "sha256", "size", "schema_version")})
    pipeline("decoder_only").execute(False)
    compare(folder, runs)
    settings = [row["settings"] for row in rows_of(folder, runs) if row["model"] == "decoder_only"]
    assert sorted("earlier codes" in text for text in settings) == [False, True]


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
    assert f"left out: {damaged.run.folder / name}" in caplog.text


@pytest.mark.slow
def test_filtered_runs_have_a_table_of_their_own(shop):
    folder, runs, pipeline = shop
    pipeline("popularity", filter_seen="true").execute(False)
    text = compare(folder, runs)
    assert "Items of the history filtered" in text
    assert "Nothing filtered" not in text
    assert [row["filter_seen"] for row in rows_of(folder, runs)] == ["true"]


@pytest.mark.slow
def test_comparing_trains_nothing_and_names_missing_baselines_with_their_command(shop):
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
    roots = f"--run_root {runs} --data_root {folder.data_root}"
    assert commands == [f"python recommendation/main.py --model=popularity --category=Tiny {roots}",
                        f"python recommendation/main.py --model=markov --category=Tiny {roots} --filter_seen"]
    for command in commands:
        main(shlex.split(command)[2:])
    text = compare(folder, runs)
    assert "    python " not in text
    assert sorted(f"{row['model']} {row['filter_seen']}" for row in rows_of(folder, runs)) == [
        "markov false", "markov true", "popularity false", "popularity true", "sasrec false"]


def test_a_folder_that_cannot_be_written_still_shows_its_table(shop, monkeypatch):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)

    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("recommendation.results.write_text", refuse)  # root may write anywhere
    text = compare(folder, runs)
    assert "| popularity |" in text
    last = text.splitlines()[-1]
    assert str(runs / "recommendation" / "Tiny" / "compare.md") in last
    assert "Permission denied" in last


def test_runs_of_earlier_interactions_are_left_out_and_counted(shop):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)
    content = folder.interactions.read_bytes()
    publish(folder.interactions, lambda staged: staged.write_bytes(content + b" "), {
        "inputs": {}, "num_items": 30, "items_sha256": "abc"})
    with pytest.raises(DataError, match="no finished run of these interactions"):
        compare(folder, runs)


def test_no_run_at_all_is_an_error_with_the_command(shop):
    folder, runs, _ = shop
    with pytest.raises(DataError, match="Fix: python recommendation/main.py .*--category=Tiny --run_root"):
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
        assert f"run {one.run.id}: " in text
        assert other.run.id not in text
    singles = [pipeline("sasrec", seed=seed).execute(False)["test"]["recall@10"] for seed in (5, 6)]
    assert summary["test"]["recall@10"] == {"mean": pytest.approx(statistics.mean(singles)),
                                            "deviation": pytest.approx(statistics.stdev(singles))}
    assert (made[0].run.parent / "seeds.json").exists()


def test_a_figure_that_a_seed_lacks_is_left_out_of_the_table():
    older, newer = {"ndcg@10": 0.1}, {"ndcg@10": 0.3, "mrr@20": 0.2}
    assert list(mean_and_deviation([newer, older])) == ["ndcg@10"]
    assert cell([newer, older], "mrr@20") == cell([older, newer], "mrr@20") == ""


def metrics_json(*figures: tuple[float, float]) -> dict:
    """Mean and standard error of the four columns."""
    names = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
    test = {"recall@20": 0.9, "recall@20_stderr": 0.9, "num_targets": 7}
    for name, (mean, error) in zip(names, figures, strict=True):
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
    with pytest.raises(ArtifactError, match="trained on another interactions.parquet.* Fix: python .*--model=markov"):
        report(trained.folder, trained.run_root, {Choice("markov"): trained.run})


@pytest.mark.slow
def test_a_run_that_finishes_in_between_is_not_in_the_report(train, tmp_path):
    trained, listed = train("markov"), tmp_path / "list"
    main(trained.argv("--model=popularity", f"--run_list={listed}"))
    main(trained.argv("--model=markov", f"--run_list={listed}"))
    main(trained.argv("--model=markov", "--filter_seen"))  # another process, before the report
    report_by_command(trained.argv(f"--run_list={listed}"))
    text = (trained.run_root / "recommendation" / "Tiny" / "report.md").read_text()
    assert "nothing filtered" in text
    assert all("run_list" not in (Path(run) / "finished.json").read_text() for run in listed.read_text().splitlines())
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == ["model", "popularity", "markov"]
    report_by_command(trained.argv("--models=markov"))  # which asks for the newest run
    assert "items of the history filtered" in (trained.run_root / "recommendation" / "Tiny" / "report.md").read_text()


@pytest.mark.slow
def test_a_list_without_runs_is_an_error(train, tmp_path):
    (tmp_path / "list").touch()
    with pytest.raises(DataError) as caught:
        report_by_command(train("markov").argv(f"--run_list={tmp_path / 'list'}"))
    assert (caught.value.where, caught.value.exit_code) == (tmp_path / "list", 3)


def test_the_history_that_is_shown_ends_before_the_test_item_of_its_line(tmp_path, make_config):
    folder = write_data(tmp_path, [])
    splits = ["train", "train", "valid", "test", "test", "test"]
    events = [(user, user * 10 + time, time, split) for user in (0, 1) for time, split in enumerate(splits)]
    frame = pd.DataFrame(events, columns=["user", "item", "timestamp", "split"])
    write_table(folder.interactions, frame, {"split_name": "temporal"})
    pipeline = Pipeline(make_config("markov", top_k=20), folder, Choice("markov"), tmp_path / "runs", "train")
    pipeline.execute(force=False)
    text = examples(folder, pipeline.run.folder, "markov")
    # Of six test events the first, the third and the last, as three are shown.
    assert [part.split("  markov recommends")[0].splitlines()[1:] for part in text.split("User ")[1:]] == [
        [f"    000{item}" for item in history] for history in ([0, 1, 2], [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])]
    assert re.findall("the test item is: (.*)", text) == ["0003", "0005", "00015"]
