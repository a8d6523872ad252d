"""The table of results by hand, and what is shown beside it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from common.errors import ArtifactError, DataError
from recommendation.main import main as train_by_command
from recommendation.pipeline import Pipeline
from recommendation.report import examples, main, report, table
from recommendation.runs import Choice

from .test_pipeline import write_data, write_table


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


def test_a_run_that_finishes_in_between_is_not_in_the_report(train, tmp_path):
    trained, listed = train("markov"), tmp_path / "list"
    train_by_command(trained.argv("--model=popularity", f"--run_list={listed}"))
    train_by_command(trained.argv("--model=markov", f"--run_list={listed}"))
    train_by_command(trained.argv("--model=markov", "--filter_seen"))  # another process, before the report
    main(trained.argv(f"--run_list={listed}"))
    text = (trained.run_root / "recommendation" / "Tiny" / "report.md").read_text()
    assert "nothing filtered" in text
    assert all("run_list" not in (Path(run) / "finished.json").read_text() for run in listed.read_text().splitlines())
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == ["model", "popularity", "markov"]
    main(trained.argv("--models=markov"))  # which asks for the newest run
    assert "items of the history filtered" in (trained.run_root / "recommendation" / "Tiny" / "report.md").read_text()


def test_a_list_without_runs_is_an_error(train, tmp_path):
    (tmp_path / "list").touch()
    with pytest.raises(DataError) as caught:
        main(train("markov").argv(f"--run_list={tmp_path / 'list'}"))
    assert (caught.value.where, caught.value.exit_code) == (tmp_path / "list", 3)


def test_the_history_that_is_shown_ends_before_the_test_item_of_its_line(tmp_path, make_config):
    folder = write_data(tmp_path, [])
    splits = ["train", "train", "valid", "test", "test", "test"]
    events = [(user, user * 10 + time, time, split) for user in (0, 1) for time, split in enumerate(splits)]
    frame = pd.DataFrame(events, columns=["user", "item", "timestamp", "split"])
    write_table(folder.interactions, frame, {"split_name": "temporal"})
    pipeline = Pipeline(make_config("markov", top_k=20), folder, "rqvae", "td", None, tmp_path / "runs", "train")
    pipeline.execute(force=False)
    text = examples(folder, pipeline.run.folder, "markov")
    # Of six test events the first, the third and the last, as three are shown.
    assert [part.split("  markov recommends")[0].splitlines()[1:] for part in text.split("User ")[1:]] == [
        [f"    000{item}" for item in history] for history in ([0, 1, 2], [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])]
    assert re.findall("the test item is: (.*)", text) == ["0003", "0005", "00015"]
