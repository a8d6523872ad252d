"""Import of semantic IDs from a file: codes of each item, offsets, and sizes of codebooks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError
from quantization.models.imported import IMPORTED, table, without_offsets
from tests.errors import refused
from tests.quantization.conftest import numbers, shown
from tests.text import lines_with

INDEX = {"raw-1": ["<a_5>", "<b_0>"], "raw-0": ["<a_12>", "<b_3>"], "elsewhere": ["<a_99>", "<b_99>"],
         "raw-2": ["<a_5>", "<b_0>"]}
BY_ITEM = [[12, 3], [5, 0], [5, 0]]


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


@pytest.mark.parametrize("sizes", ["[1000000000, 8]", "[16, 65537]"])
def test_codebook_sizes_are_bounded_by_the_number_of_items(write, make, sizes):
    with refused(ConfigError, "imported.model_params.codebook_sizes", names=[sizes, 65_536, 3],
                 fix=["--codebook_sizes auto"]):
        make(write("index.json", INDEX), codebook_sizes=sizes)
    assert make(write("index.json", INDEX), codebook_sizes="[65536, 4]").codebook_sizes == [65_536, 4]


@pytest.mark.parametrize(("entry", "code", "level"), [
    (["<a_999999999>", "<b_0>"], 999_999_999, 1), ([0, 65_536], 65_536, 2), ("0,70000", 70_000, 2)])
def test_a_code_beyond_the_number_of_items_is_located(write, make, entry, code, level):
    path = write("index.json", INDEX | {"raw-2": entry})
    with refused(DataError, f"{path}: 'raw-2'", names=[code, f"level {level}", 65_536, 3]):
        make(path)


def test_large_catalogues_may_have_large_codebooks(write, make):
    index = {f"raw-{item}": [item, 0] for item in range(7_000)}
    assert make(write("index.json", index | {"raw-1": [69_999, 0]}), 7_000).codebook_sizes == [70_000, 1]
    path = write("index.json", index | {"raw-1": [70_000, 0]})
    with refused(DataError, f"{path}: 'raw-1'", names=[70_000, 7_000]):
        make(path, 7_000)


OFFSETS = [[0, 256, 512], [5, 260, 515], [7, 257, 513]]


@pytest.mark.parametrize(("codes", "expected"), [
    (OFFSETS, [[0, 0, 0], [5, 4, 3], [7, 1, 1]]),
    ([[1, 9, 17], [8, 16, 17]], [[0, 0, 0], [7, 7, 0]]),            # numbered from 1; all items share the last code
    ([[32_773, 41_000], [32_768, 40_960]], [[5, 40], [0, 0]])])
def test_offsets_of_consecutive_levels_are_subtracted_and_named(caplog, codes, expected):
    assert without_offsets(Path("index.json"), np.array(codes)).tolist() == expected
    [warning] = [record.getMessage() for record in caplog.records]
    assert lines_with(warning, *np.min(codes, axis=0)[1:])


@pytest.mark.parametrize("codes", [
    [[0, 256, 3], [5, 260, 8], [7, 257, 1]],                        # levels 1 and 3 overlap
    [[9, 1], [8, 0]],                                               # no offsets go down
    [[1, 2, 3], [1, 2, 4]], [[1, 2, 3]], [[100], [200]]])           # too few different codes to tell
def test_other_codes_are_not_changed(caplog, codes):
    assert without_offsets(Path("index.json"), np.array(codes)).tolist() == codes
    assert not caplog.records


def test_offset_codes_are_imported_with_small_codebooks(write, make):
    index = {f"raw-{item}": codes for item, codes in enumerate(OFFSETS)} | {"elsewhere": [0, 0, 0]}
    model = make(write("index.json", index))
    assert (codes_of(model), model.codebook_sizes) == ([[0, 0, 0], [5, 4, 3], [7, 1, 1]], [8, 5, 4])
    assert make(write("index.json", index), codebook_sizes="[256, 256, 256]").codebook_sizes == [256] * 3


def test_items_missing_from_the_file_are_counted_and_named():
    codes = {"a": [1], "b": [2]}
    with refused(DataError, "index.json", names=[4, 5, "'c', 'd', 'e'", "'a'"]):
        table(Path("index.json"), codes, np.array(["c", "d", "a", "e", "f"], dtype=object))


@pytest.mark.parametrize(("unused", "is_number"), [("0", True), ("elsewhere", False)])
def test_entries_of_no_item_are_counted_and_named(caplog, unused, is_number):
    codes = {unused: [0], "1": [1], "2": [2], "3": [9]}
    assert table(Path("index.json"), codes, np.array(["1", "2", "3"], dtype=object)).tolist() == [[1], [2], [9]]
    [warning] = [record.getMessage() for record in caplog.records]
    assert lines_with(warning, 1, 4, f"'{unused}'")
    assert ("shifted" in warning) == is_number


def test_a_file_with_only_the_items_gives_no_warning(caplog):
    table(Path("index.json"), {"a": [1], "b": [2]}, np.array(["b", "a"], dtype=object))
    assert not caplog.records


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
