"""Import of semantic IDs from a file: its formats, and the locations of faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError
from quantization.id_files import read_codes
from quantization.models.imported import IMPORTED, table
from tests.errors import refused
from tests.quantization.conftest import numbers, shown

INDEX = {"raw-1": ["<a_5>", "<b_0>"], "raw-0": ["<a_12>", "<b_3>"], "elsewhere": ["<a_99>", "<b_99>"],
         "raw-2": ["<a_5>", "<b_0>"]}
BY_ITEM = [[12, 3], [5, 0], [5, 0]]


@pytest.fixture
def write(tmp_path):
    """name, content -> its path."""
    def write(name: str, content: object):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else
                         (content if isinstance(content, str) else json.dumps(content)).encode())
        return path

    return write


@pytest.fixture
def make(make_config, make_model):
    """path, number of items, key=value, ... -> the model."""
    def make(path, num_items: int = 3, **own):
        return make_model(make_config("imported", file=path, **own), num_items)

    return make


def codes_of(model, num_items: int = 3) -> list[list[int]]:
    return model.get_codes(torch.arange(num_items).unsqueeze(1)).tolist()


def test_an_index_is_read_by_raw_id(write, make):
    model = make(write("index.json", INDEX))
    assert codes_of(model) == BY_ITEM
    assert model.codebook_sizes == [13, 4]  # counts only the codes of existing items


@pytest.mark.parametrize("heading", ["", "item,first,second\n", "raw_id,,\n", "\ufeffitem,first,second\n", "\ufeff"])
def test_a_csv_is_read_with_and_without_a_heading(write, make, heading):
    text = heading + 'raw-1,5,0\nraw-0, 12 ,3\n\n"elsewhere",99,99\nraw-2,<a_5>,<b_0>\n'
    assert codes_of(make(write("index.csv", text))) == BY_ITEM


def test_an_index_may_hold_numbers(write, make):
    index = {"raw-0": [12, 3], "raw-1": ["5", "0"], "raw-2": [5, "<b_0>"]}
    assert codes_of(make(write("index.json", index))) == BY_ITEM


def test_a_single_level_needs_no_list(write):
    assert read_codes(write("index.json", {"x": "<a_7>", "y": "8"})) == {"x": [7], "y": [8]}


def test_sizes_may_be_given(write, make):
    assert make(write("index.json", INDEX), codebook_sizes="[16, 8]").codebook_sizes == [16, 8]


@pytest.mark.parametrize("sizes", ["[12, 8]", "[16, 3]"])
def test_codebook_sizes_below_the_codes_are_refused(write, make, sizes):
    path = write("index.json", INDEX)
    with refused(ConfigError, "imported.model_params.codebook_sizes", names=[sizes, path, [12, 3]],
                 fix=["--codebook_sizes auto"]):
        make(path, codebook_sizes=sizes)


@pytest.mark.parametrize("sizes", ["[16]", "[16, 8, 4]", "16", "[16, many]", "[16, 8.0]", "null"])
def test_codebook_sizes_must_be_a_number_per_level(write, make, sizes):
    path = write("index.json", INDEX)
    with refused(ConfigError, "imported.model_params.codebook_sizes", names=[shown(sizes), path],
                 fix=["--codebook_sizes auto"]) as raised:
        make(path, codebook_sizes=sizes)
    assert "2" in numbers(raised.value.why.replace(str(path), ""))


@pytest.mark.parametrize(("content", "place", "names"), [
    ("{", "index.json", []),
    (b"\xff\xfe", "index.json", []),
    ([["<a_1>"]], "index.json", []),
    ({}, "index.json", []),
    ({"x": ["<a_1>"], "y": ["<a_1>", "<b_2>"]}, "index.json: 'y'", [1, 2]),
    *(({"x": codes}, "index.json: 'x'", [codes]) for codes in (
        ["<a_1>", "b 2"], [1.5], [-1], [True], [None], ["9999999999"], [])),
    ({"x": None}, "index.json: 'x'", [[None]]),
    ("", "index.csv", []),
    ("item,code\n", "index.csv", []),
    ("item,code\nx,1\nx,2\n", "index.csv:3", ["'x'"]),
    ("x,1,2,3\ny,1\n", "index.csv:2", [1, 3]),
    ("item,code\nx,1\ny,-1\n", "index.csv:3", [["-1"]]),
    ("x,1\ny\n", "index.csv:2", [[]]),
    ("x,1\ny,1.0\n", "index.csv:2", [["1.0"]]),
    (b"x,1\n\xff,2\n", "index.csv", []),
])
def test_a_fault_in_the_file_is_located(write, tmp_path, monkeypatch, content, place, names):
    monkeypatch.chdir(tmp_path)  # a relative path adds no digits to the error
    path = Path(write(place.partition(":")[0], content).name)
    with refused(DataError, place, names=names) as raised:
        read_codes(path)
    assert raised.value.fix


def test_items_missing_from_the_file_are_counted_and_named():
    codes = {"a": [1], "b": [2]}
    with refused(DataError, "index.json", names=[4, 5, "'c', 'd', 'e'", "'a'"]):
        table(Path("index.json"), codes, np.array(["c", "d", "a", "e", "f"], dtype=object))


def test_the_table_is_in_the_order_of_the_items(tmp_path):
    codes = table(tmp_path / "index.json", {"a": [1, 2], "b": [3, 4]}, np.array(["b", "a"], dtype=object))
    assert codes.tolist() == [[3, 4], [1, 2]]
    assert codes.dtype == np.int64


@pytest.mark.parametrize(("file", "names"), [
    ("", ["''"]), ("null", ["null", ".json", ".csv"]), ("7", ["7", ".json", ".csv"]),
    ("index.txt", ["index.txt", ".json", ".csv"]), ("nowhere.json", ["nowhere.json"])])
def test_an_unusable_file_name_is_refused(make, file, names):
    with refused(ConfigError, "imported.model_params.file", names=names, fix=["--file"]):
        make(file)


def test_the_file_is_an_input_of_the_run(write, make_config):
    path = write("index.json", INDEX)
    assert IMPORTED.other_files(make_config("imported", file=path).values) == [path]
    assert IMPORTED.embedding_suffixes({}, "td") == []
