"""Export of semantic IDs to other systems, and their import."""

import csv
import json

import numpy as np
import pytest

from common.artifacts import DatasetFolder
from common.errors import ArtifactError, ConfigError, DataError
from quantization.export import export, tokens
from quantization.id_files import read_codes
from quantization.models.imported import IMPORTED
from tests.errors import refused

from .tiny_data import save_codes, save_interactions, save_items, save_users

CODES = np.array([[0, 12, 0], [3, 0, 0], [3, 0, 1], [255, 7, 0]])
TITLES = ["plain", 'a "quoted", cut title', "two\nlines\r\nof it", "  Überzug; 漢字 |,"]


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    """Four items with awkward titles and their codes."""
    folder = save_items(DatasetFolder(tmp_path / "data", "Tiny"), len(TITLES), TITLES)
    save_codes(folder, CODES, [256, 256, 2])
    save_users(folder, ["u", "é"])
    save_interactions(folder, [(0, 3, "train"), (0, 1, "train"), (0, 3, "valid"), (0, 0, "test"), (1, 2, "train")])
    return folder


def test_tokens_name_the_level_by_a_letter():
    assert tokens(np.array([[12, 0], [3, 255]])) == [["<a_12>", "<b_0>"], ["<a_3>", "<b_255>"]]
    assert tokens(np.zeros((1, 26), dtype=int))[0][-1] == "<z_0>"


def test_after_z_the_letters_go_on_in_pairs():
    row = tokens(np.zeros((1, 53), dtype=int))[0]
    assert (row[26], row[27], row[52]) == ("<aa_0>", "<ab_0>", "<ba_0>")


def test_the_index_gives_every_raw_id_its_tokens(tmp_path, folder):
    index, *_ = export(folder, "q", "td", None, tmp_path / "out")
    assert index == tmp_path / "out/Tiny.index.json"
    assert json.loads(index.read_text(encoding="utf-8")) == {
        "raw 0": ["<a_0>", "<b_12>", "<c_0>"], "raw 1": ["<a_3>", "<b_0>", "<c_0>"],
        "raw 2": ["<a_3>", "<b_0>", "<c_1>"], "raw 3": ["<a_255>", "<b_7>", "<c_0>"]}


def test_items_and_sequences_have_raw_ids_as_keys(tmp_path, folder):
    index, items, sequences, _ = export(folder, "q", "td", None, tmp_path / "out")
    assert [path.name for path in (items, sequences)] == ["Tiny.item.json", "Tiny.inter.json"]
    described = json.loads(items.read_text())
    assert list(described) == list(json.loads(index.read_text()))
    assert described["raw 2"] == {"title": TITLES[2], "description": TITLES[2]}
    assert json.loads(sequences.read_text()) == {"u": ["raw 3", "raw 1", "raw 3", "raw 0"], "é": ["raw 2"]}


def test_a_temporal_split_is_refused(tmp_path, folder):
    save_interactions(folder, [(0, 0, "train"), (1, 2, "test")], split_name="temporal")
    with refused(ConfigError, "--export", names=["Tiny", "temporal"], fix=["--split leave_one_out"]):
        export(folder, "q", "td", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_survives_commas_quotes_and_line_breaks_in_titles(tmp_path, folder):
    *_, sheet = export(folder, "q", "td", None, tmp_path / "out")
    with sheet.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["raw_id", "code_1", "code_2", "code_3", "semantic_id", "title"]
    assert [row["title"] for row in rows] == TITLES
    assert [row["raw_id"] for row in rows] == ["raw 0", "raw 1", "raw 2", "raw 3"]
    assert [[int(row[f"code_{level}"]) for level in (1, 2, 3)] for row in rows] == CODES.tolist()
    assert rows[3]["semantic_id"] == "<a_255><b_7><c_0>"


def test_exported_codes_are_imported_as_the_same_codes(tmp_path, folder, make_config):
    index, *_, sheet = export(folder, "q", "td", None, tmp_path / "out")
    assert list(read_codes(index).values()) == list(read_codes(sheet).values()) == CODES.tolist()
    config = make_config("imported", file=index)
    model = IMPORTED(config.for_model(num_items=4, inputs={}, folder=folder), input_size=1)
    assert model.codes.tolist() == CODES.tolist()
    assert model.codebook_sizes == [256, 13, 2]


def test_shared_codes_are_exported_unchanged(tmp_path, folder):
    save_codes(folder, np.array([[1], [1], [0], [2]]), [3])
    index, *_ = export(folder, "q", "td", None, tmp_path / "out")
    assert json.loads(index.read_text())["raw 1"] == json.loads(index.read_text())["raw 0"] == ["<a_1>"]


def test_an_export_replaces_the_previous_one(tmp_path, folder):
    first = [path.read_bytes() for path in export(folder, "q", "td", None, tmp_path / "out")]
    assert [path.read_bytes() for path in export(folder, "q", "td", None, tmp_path / "out")] == first
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_missing_codes_name_the_command_that_makes_them(tmp_path, folder):
    with refused(DataError, folder.codes("rkmeans", "td", None),
                 fix=["python quantization/main.py --quantizer_name rkmeans --dataset_name Tiny"]):
        export(folder, "rkmeans", "td", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_of_other_items_are_refused(tmp_path, folder):
    save_items(folder, 5)
    with refused(ArtifactError, folder.codes("q", "td", None), names=["items.parquet"],
                 fix=["python quantization/main.py --quantizer_name q --dataset_name Tiny"]):
        export(folder, "q", "td", None, tmp_path / "out")
