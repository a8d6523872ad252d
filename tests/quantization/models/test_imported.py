"""Semantic IDs from a file: its forms, and every fault with its place."""

import json

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError
from quantization.models.imported import IMPORTED, read_codes, table

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
    assert model.codebook_sizes == [13, 4]  # of the items that there are


@pytest.mark.parametrize("heading", ["", "item,first,second\n", "raw_id,,\n", "\ufeffitem,first,second\n", "\ufeff"])
def test_a_csv_is_read_with_and_without_a_heading(write, make, heading):
    text = heading + 'raw-1,5,0\nraw-0, 12 ,3\n\n"elsewhere",99,99\nraw-2,<a_5>,<b_0>\n'
    assert codes_of(make(write("index.csv", text))) == BY_ITEM


def test_numbers_will_do_in_an_index_too(write, make):
    index = {"raw-0": [12, 3], "raw-1": ["5", "0"], "raw-2": [5, "<b_0>"]}
    assert codes_of(make(write("index.json", index))) == BY_ITEM



def test_one_level_needs_no_list(write):
    assert read_codes(write("index.json", {"x": "<a_7>", "y": "8"})) == {"x": [7], "y": [8]}


def test_sizes_may_be_given(write, make):
    assert make(write("index.json", INDEX), codebook_sizes="[16, 8]").codebook_sizes == [16, 8]


@pytest.mark.parametrize(("sizes", "message"), [
    ("[12, 8]", r"is \[12, 8\]\. .*index.json has codes up to \[12, 3\]"),
    ("[16, 3]", r"is \[16, 3\]\. .*index.json has codes up to \[12, 3\]"),
    ("[16]", r"is \[16\]\. .*index.json has 2 levels"), ("[16, 8, 4]", ".*has 2 levels"), ("16", "is 16"),
    ("[16, many]", ".*has 2 levels"), ("[16, 8.0]", ".*has 2 levels"), ("null", "is None")])
def test_sizes_that_do_not_fit_are_an_error(write, make, sizes, message):
    with pytest.raises(ConfigError, match=f"imported.model_params.codebook_sizes: {message}"):
        make(write("index.json", INDEX), codebook_sizes=sizes)


@pytest.mark.parametrize(("name", "content", "place", "message"), [
    ("index.json", "{", "index.json", "is not JSON"),
    ("index.json", b"\xff\xfe", "index.json", "is not JSON"),
    ("index.json", [["<a_1>"]], "index.json", "is not a JSON object"),
    ("index.json", {}, "index.json", "has no entries"),
    ("index.json", {"x": ["<a_1>"], "y": ["<a_1>", "<b_2>"]}, "index.json: 'y'", "has 2 codes.* before it have 1"),
    ("index.json", {"x": ["<a_1>", "b 2"]}, "index.json: 'x'", r"\['<a_1>', 'b 2'\] is no semantic ID"),
    ("index.json", {"x": [1.5]}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": [-1]}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": [True]}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": [None]}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": ["9999999999"]}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": []}, "index.json: 'x'", "is no semantic ID"),
    ("index.json", {"x": None}, "index.json: 'x'", "is no semantic ID"),
    ("index.csv", "", "index.csv", "has no entries"),
    ("index.csv", "item,code\n", "index.csv", "has no entries"),
    ("index.csv", "item,code\nx,1\nx,2\n", "index.csv:3", "item 'x' stands twice"),
    ("index.csv", "x,1,2\ny,1\n", "index.csv:2", "has 1 codes.* before it have 2"),
    ("index.csv", "item,code\nx,1\ny,-1\n", "index.csv:3", r"\['-1'\] is no semantic ID"),
    ("index.csv", "x,1\ny\n", "index.csv:2", "is no semantic ID"),
    ("index.csv", "x,1\ny,1.0\n", "index.csv:2", "is no semantic ID"),
    ("index.csv", b"x,1\n\xff,2\n", "index.csv", "is not a CSV"),
])
def test_a_fault_in_the_file_is_an_error_that_names_its_place(write, name, content, place, message):
    with pytest.raises(DataError, match=f"{place}: .*{message}"):
        read_codes(write(name, content))


def test_items_that_the_file_does_not_know_are_counted_and_named(tmp_path):
    codes = {"a": [1], "b": [2]}
    with pytest.raises(DataError, match="index.json: has no semantic ID for 4 of 5 items. .*'c', 'd', 'e'; "
                                        "the file begins with 'a'"):
        table(tmp_path / "index.json", codes, np.array(["c", "d", "a", "e", "f"], dtype=object))


def test_the_table_is_in_the_order_of_the_items(tmp_path):
    codes = table(tmp_path / "index.json", {"a": [1, 2], "b": [3, 4]}, np.array(["b", "a"], dtype=object))
    assert codes.tolist() == [[3, 4], [1, 2]]
    assert codes.dtype == np.int64


@pytest.mark.parametrize(("file", "message"), [
    ("", "is ''.*names the semantic IDs to import"), ("null", "null is neither"), ("7", "7 is neither"),
    ("index.txt", "index.txt is neither .json nor .csv"), ("nowhere.json", "nowhere.json is not there")])
def test_a_name_that_is_no_such_file_is_an_error(make, file, message):
    with pytest.raises(ConfigError, match=f"imported.model_params.file: {message}"):
        make(file)


def test_a_change_of_the_file_is_another_run(write, make_config):
    path = write("index.json", INDEX)
    assert IMPORTED.other_files(make_config("imported", file=path).values) == [path]
    assert IMPORTED.embedding_suffixes({}, "td") == []
