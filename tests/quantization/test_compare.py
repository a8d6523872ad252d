"""The table of a data set's tokenizers."""

import csv
import json

import numpy as np
import pytest

from common.artifacts import DatasetFolder, load_meta
from common.errors import ArtifactError, DataError
from common.run import Run
from quantization.compare import COLUMNS, compare

from .tiny_data import save_embedding, save_interactions, save_items

FIGURES = {
    "collision_rate": 0.25, "largest_bucket": 7, "utilization": [1.0, 0.5], "dead_codes": [0, 2],
    "perplexity": [4.0, 2.0], "gini": [0.0, 0.5], "explained_variance": 0.81, "prefix_coherence": [2.5, None],
    "behavioural_coherence": 1.75,
}


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    return DatasetFolder(tmp_path / "data", "Tiny")


@pytest.fixture
def finish(tmp_path):
    """A finished run of the tokenizer `name`."""
    def finish(name: str, seed: int = 0, figures: dict = FIGURES, inputs: dict | None = None, **own) -> Run:
        run = Run(tmp_path / "runs/quantization/Tiny" / name, {"common": {"seed": seed}}, inputs or {}, f"make {name}")
        with run.open(force=False):
            run.finish({"figures": figures, "codebook_sizes": [4, 4, 7], "collision_rate_before": 0.25,
                        "collision_rate_after": 0.0, **own})
        return run

    return finish


def rows(tmp_path) -> list[dict[str, str]]:
    with (tmp_path / "runs/quantization/Tiny/compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tokenizers_figures_stand_in_its_row(tmp_path, folder, finish):
    finish("rqvae-td", seed=3)
    compare(folder, tmp_path / "runs")
    [row] = rows(tmp_path)
    assert list(row) == list(COLUMNS)
    assert (row["tokenizer"], row["seed"]) == ("rqvae-td", "3")
    assert (row["collisions"], row["after"], row["largest bucket"]) == ("25.00%", "0.00%", "7")
    assert (row["least used level"], row["perplexity"], row["Gini"]) == ("50%", "3", "0.25")
    assert (row["variance kept"], row["behaviour"]) == ("81%", "1.8")
    assert (row["alike (1 code)"], row["alike (2 codes)"]) == ("2.5", "")


def test_the_text_the_markdown_and_the_csv_hold_the_same_table(tmp_path, folder, finish):
    finish("rqvae-td")
    finish("rkmeans-td-large")
    text = compare(folder, tmp_path / "runs")
    markdown = (tmp_path / "runs/quantization/Tiny/compare.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert "\n".join(lines) in text
    assert "Tiny: 2 tokenizers" in text
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(COLUMNS)
    assert cells[2:] == [list(row.values()) for row in rows(tmp_path)]


def test_tokenizers_are_sorted_by_collisions_as_numbers(tmp_path, folder, finish):
    for name, rate in (("a", 0.1), ("b", 0.02), ("c", 1e-5), ("d", 0.005)):
        finish(name, figures=FIGURES | {"collision_rate": rate}, collision_rate_before=rate)
    compare(folder, tmp_path / "runs")
    assert [row["tokenizer"] for row in rows(tmp_path)] == ["c", "d", "b", "a"]


def test_figures_that_a_tokenizer_does_not_have_stay_empty(tmp_path, folder, finish):
    own = ("explained_variance", "prefix_coherence", "behavioural_coherence")
    finish("random-td", figures={key: value for key, value in FIGURES.items() if key not in own})
    compare(folder, tmp_path / "runs")
    [row] = rows(tmp_path)
    assert {row[name] for name in ("variance kept", "alike (1 code)", "alike (2 codes)", "behaviour")} == {""}


def test_a_run_of_an_earlier_version_has_empty_cells(tmp_path, folder, finish):
    earlier = ("collision_rate", "largest_bucket", "utilization", "perplexity")
    run = finish("old-td")
    summary = {"figures": {key: FIGURES[key] for key in earlier}, "codebook_sizes": [4, 4, 7]}
    (run.folder / "finished.json").write_text(json.dumps(summary))
    compare(folder, tmp_path / "runs")
    [row] = rows(tmp_path)
    assert (row["collisions"], row["largest bucket"], row["perplexity"]) == ("25.00%", "7", "3")
    assert (row["after"], row["Gini"], row["variance kept"]) == ("", "", "")


def test_only_the_latest_finished_run_of_a_tokenizer_counts(tmp_path, folder, finish):
    finish("rqvae-td", seed=1)
    finish("rqvae-td", seed=2)
    unfinished = finish("other-td")
    (unfinished.folder / "finished.json").unlink()
    compare(folder, tmp_path / "runs")
    assert [(row["tokenizer"], row["seed"]) for row in rows(tmp_path)] == [("rqvae-td", "2")]


def test_a_table_that_is_made_again_is_the_same_and_its_own_files_are_no_tokenizer(tmp_path, folder, finish):
    finish("rqvae-td")
    assert compare(folder, tmp_path / "runs") == compare(folder, tmp_path / "runs")


def test_without_a_finished_run_there_is_an_error_with_the_command_that_makes_one(tmp_path, folder):
    with pytest.raises(DataError, match="no finished tokenizer.*Fix: python quantization/main.py --dataset_name Tiny"):
        compare(folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def present(folder) -> dict[str, str]:
    """The inputs of a run on the dataset as it is."""
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
    assert "\n4 tokenizers of earlier inputs are left out." in text
    assert "4 tokenizers of earlier inputs" in (tmp_path / "runs/quantization/Tiny/compare.md").read_text()


def test_if_all_inputs_have_changed_the_fix_is_the_command(tmp_path, folder, finish, present):
    finish("rqvae-td", inputs=present)
    save_items(folder, 5)
    save_embedding(folder, "td", np.eye(5))
    with pytest.raises(DataError) as raised:
        compare(folder, tmp_path / "runs")
    assert raised.value.exit_code == 3
    assert raised.value.fix == (f"python quantization/main.py --dataset_name Tiny --data_root {tmp_path}/data "
                                f"--run_root {tmp_path}/runs")


def test_no_run_is_changed(tmp_path, folder, finish, present):
    first = finish("rqvae-td", seed=1, inputs=present)
    finish("rqvae-td", seed=2, inputs=present)
    (first.parent / "latest").write_text(f"{first.id}\n")
    before = {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")}
    compare(folder, tmp_path / "runs")
    assert {path: path.stat().st_mtime_ns for path in first.parent.rglob("*")} == before
    assert [row["seed"] for row in rows(tmp_path)] == ["1"]


def test_a_folder_that_cannot_be_written_still_shows_the_table(tmp_path, folder, finish):
    finish("rqvae-td")
    (tmp_path / "runs/quantization/Tiny/compare.md").mkdir()
    text = compare(folder, tmp_path / "runs")
    assert "| rqvae-td " in text
    assert "compare.md and .csv could not be written" in text.splitlines()[-1]


def test_a_run_that_cannot_be_read_is_an_error_that_names_it(tmp_path, folder, finish):
    run = finish("rqvae-td")
    (run.folder / "finished.json").write_text('{"figures": ')
    with pytest.raises(ArtifactError, match=r"finished.json: cannot be read.* --force"):
        compare(folder, tmp_path / "runs")
