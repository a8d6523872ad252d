"""The table of the tokenizers of a dataset."""

import csv
import errno
import json
import os

import numpy as np
import pytest

from common.artifacts import DatasetFolder, dataset_line, load_meta
from common.errors import ArtifactError, DataError
from common.publishing import SCHEMA_VERSION
from common.run import Run
from quantization.compare import COLUMNS, compare
from tests.errors import refused

from .conftest import numbers
from .tiny_data import save_embedding, save_interactions, save_items

METRICS = {
    "collision_rate": 0.25, "largest_bucket": 7, "utilization": [1.0, 0.5], "num_dead_codes": [0, 2],
    "perplexity": [4.0, 2.0], "gini": [0.0, 0.5], "explained_variance": 0.81, "prefix_coherence": [2.5, None],
    "behavioral_coherence": 1.75,
}
# The keys of the columns by position, because the headings may change.
KEYS = ("tokenizer", "seed", "codes", "collision_rate", "collision_rate_after", "largest_bucket", "least_utilization",
        "perplexity", "gini", "explained_variance", "prefix_coherence_1", "prefix_coherence_2", "behavioral_coherence")


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    return DatasetFolder(tmp_path / "data", "Tiny")


@pytest.fixture
def finish(tmp_path):
    """A finished run of the tokenizer `name`."""
    def finish(name: str, seed: int = 0, metrics: dict = METRICS, inputs: dict | None = None, **own) -> Run:
        run = Run(tmp_path / "runs/quantization/Tiny" / name, {"common": {"seed": seed}}, inputs or {}, f"make {name}")
        with run.open(force=False):
            run.finish({"metrics": metrics, "codebook_sizes": [4, 4, 7], "collision_rate_before": 0.25,
                        "collision_rate_after": 0.0, **own})
        return run

    return finish


def rows(tmp_path) -> list[dict[str, str]]:
    with (tmp_path / "runs/quantization/Tiny/compare.csv").open(newline="") as file:
        heading, *lines = csv.reader(file)
    assert heading == list(COLUMNS)
    return [dict(zip(KEYS, line, strict=True)) for line in lines]


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def counts_around_the_table(text: str, tmp_path) -> list[str]:
    lines = [line.replace(str(tmp_path), "") for line in text.splitlines() if not line.startswith("|")]
    return [number for number in numbers("\n".join(lines)) if number.isdigit()]


def test_a_row_holds_the_metrics_of_its_tokenizer(tmp_path, folder, finish):
    finish("rqvae-td", seed=3)
    compare(folder, tmp_path / "runs")
    [row] = rows(tmp_path)
    assert (row["tokenizer"], row["seed"]) == ("rqvae-td", "3")
    assert (row["collision_rate"], row["collision_rate_after"], row["largest_bucket"]) == ("25.00%", "0.00%", "7")
    assert (row["least_utilization"], row["perplexity"], row["gini"]) == ("50%", "3", "0.25")
    assert (row["explained_variance"], row["behavioral_coherence"]) == ("81%", "1.8")
    assert (row["prefix_coherence_1"], row["prefix_coherence_2"]) == ("2.5", "")


def test_text_markdown_and_csv_hold_the_same_table(tmp_path, folder, finish):
    finish("rqvae-td")
    finish("rkmeans-td-large")
    text = compare(folder, tmp_path / "runs")
    markdown = (tmp_path / "runs/quantization/Tiny/compare.md").read_text()
    lines = table_of(markdown)
    assert table_of(text) == lines
    first = text.splitlines()[0]
    assert "Tiny" in first
    assert numbers(first) == ["2"]
    assert dataset_line(folder) in text.splitlines()
    assert dataset_line(folder) in markdown.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(COLUMNS)
    assert cells[2:] == [list(row.values()) for row in rows(tmp_path)]


def test_tokenizers_are_sorted_by_collisions_as_numbers(tmp_path, folder, finish):
    for name, rate in (("a", 0.1), ("b", 0.02), ("c", 1e-5), ("d", 0.005)):
        finish(name, metrics=METRICS | {"collision_rate": rate}, collision_rate_before=rate)
    compare(folder, tmp_path / "runs")
    assert [row["tokenizer"] for row in rows(tmp_path)] == ["c", "d", "b", "a"]


def test_missing_metrics_are_empty_cells(tmp_path, folder, finish):
    own = ("explained_variance", "prefix_coherence", "behavioral_coherence")
    finish("random-td", metrics={key: value for key, value in METRICS.items() if key not in own})
    compare(folder, tmp_path / "runs")
    [row] = rows(tmp_path)
    empty = ("explained_variance", "prefix_coherence_1", "prefix_coherence_2", "behavioral_coherence")
    assert {row[key] for key in empty} == {""}


def test_runs_of_another_schema_version_are_skipped_or_refused(tmp_path, folder, finish, caplog):
    finish("rqvae-td")
    path = finish("old-td").folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    compare(folder, tmp_path / "runs")
    assert [row["tokenizer"] for row in rows(tmp_path)] == ["rqvae-td"]
    assert str(path) in caplog.text
    (path.parents[2] / "rqvae-td").rename(tmp_path / "elsewhere")
    with refused(ArtifactError, path, names=[1, SCHEMA_VERSION], fix=["--force"]):  # the only one
        compare(folder, tmp_path / "runs")


@pytest.mark.parametrize(("key", "value"), [
    ("collision_rate", "0"), ("largest_bucket", None), ("utilization", []), ("utilization", [1.0] * 4),
    ("utilization", "1.0"), ("perplexity", []), ("perplexity", [None]), ("gini", [None]), ("explained_variance", "x"),
    ("prefix_coherence", 2.5), ("behavioral_coherence", [])])
def test_a_metric_of_wrong_type_is_named_with_its_key(tmp_path, folder, finish, caplog, key, value):
    finish("rqvae-td")
    damaged = finish("other-td", metrics=METRICS | {key: value})
    compare(folder, tmp_path / "runs")
    assert [row["tokenizer"] for row in rows(tmp_path)] == ["rqvae-td"]
    [record] = caplog.records
    assert str(damaged.folder / "finished.json") in record.getMessage()
    assert key in record.getMessage()


@pytest.mark.parametrize("text", [None, "", "common: 5", "common: {seed: x}", "a: &a 1\nb: *a", "\0"])
def test_a_run_with_a_damaged_configuration_is_left_out(tmp_path, folder, finish, caplog, text):
    finish("rqvae-td")
    path = finish("other-td").folder / "config.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    compare(folder, tmp_path / "runs")
    assert [row["tokenizer"] for row in rows(tmp_path)] == ["rqvae-td"]
    [record] = caplog.records
    assert str(path) in record.getMessage()


def test_only_the_latest_finished_run_of_a_tokenizer_counts(tmp_path, folder, finish):
    finish("rqvae-td", seed=1)
    finish("rqvae-td", seed=2)
    unfinished = finish("other-td")
    (unfinished.folder / "finished.json").unlink()
    compare(folder, tmp_path / "runs")
    assert [(row["tokenizer"], row["seed"]) for row in rows(tmp_path)] == [("rqvae-td", "2")]


def test_compare_ignores_its_own_files(tmp_path, folder, finish):
    finish("rqvae-td")
    assert compare(folder, tmp_path / "runs") == compare(folder, tmp_path / "runs")


def test_without_finished_runs_compare_names_the_command_to_train(tmp_path, folder):
    with refused(DataError, tmp_path / "runs/quantization/Tiny",
                 fix=["python quantization/main.py --dataset_name Tiny"]):
        compare(folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def present(folder) -> dict[str, str]:
    """The inputs of a run on the present dataset."""
    save_items(folder, 4)
    save_embedding(folder, "td", np.eye(4))
    save_embedding(folder, "cf", np.eye(4))
    save_interactions(folder, [(0, item, "train") for item in range(4)])
    return {path.name: load_meta(path, "")["sha256"] for path in (folder.interactions, folder.embeddings("td"))}


def test_tokenizers_of_other_inputs_are_left_out_and_counted(tmp_path, folder, finish, present):
    finish("rqvae-td", inputs=present)
    finish("imported-td", inputs=present | {"Tiny.index.json": "moved since"})
    finish("other-catalogue-td", inputs=present | {folder.embeddings("td").name: "of other items"})
    finish("other-events-td", inputs=present | {folder.interactions.name: "of other events"})
    finish("earlier-vectors-td", inputs=present | {folder.embeddings("cf").name: "of another training"})
    finish("measured-before-there-were-texts-cf", inputs={folder.interactions.name: present[folder.interactions.name]})
    text = compare(folder, tmp_path / "runs")
    assert {row["tokenizer"] for row in rows(tmp_path)} == {"rqvae-td", "imported-td"}
    markdown = (tmp_path / "runs/quantization/Tiny/compare.md").read_text()
    assert counts_around_the_table(text, tmp_path).count("4") == 1
    assert counts_around_the_table(markdown, tmp_path).count("4") == 1


def test_changed_inputs_make_the_command_the_fix(tmp_path, folder, finish, present):
    finish("rqvae-td", inputs=present)
    save_items(folder, 5)
    save_embedding(folder, "td", np.eye(5))
    with refused(DataError, tmp_path / "runs/quantization/Tiny") as raised:
        compare(folder, tmp_path / "runs")
    assert raised.value.fix == (f"python quantization/main.py --dataset_name Tiny --data_root {tmp_path}/data "
                                f"--run_root {tmp_path}/runs")


def test_compare_changes_no_run(tmp_path, folder, finish, present):
    first = finish("rqvae-td", seed=1, inputs=present)
    finish("rqvae-td", seed=2, inputs=present)
    (first.parent / "latest").write_text(f"{first.id}\n")
    before = {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")}
    compare(folder, tmp_path / "runs")
    assert {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")} == before
    assert [row["seed"] for row in rows(tmp_path)] == ["1"]


def test_an_unwritable_folder_still_shows_the_table(tmp_path, folder, finish):
    finish("rqvae-td")
    (tmp_path / "runs/quantization/Tiny/compare.md").mkdir()
    text = compare(folder, tmp_path / "runs")
    assert "rqvae-td" in table_of(text)[-1]
    assert str(tmp_path / "runs/quantization/Tiny/compare.md") in text.splitlines()[-1]
    assert os.strerror(errno.EISDIR) in text.splitlines()[-1]


def test_an_unreadable_summary_is_refused(tmp_path, folder, finish):
    run = finish("rqvae-td")
    (run.folder / "finished.json").write_text('{"metrics": ')
    with refused(ArtifactError, run.folder / "finished.json", fix=["--force"]):
        compare(folder, tmp_path / "runs")
