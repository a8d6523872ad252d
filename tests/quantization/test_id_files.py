"""Files with semantic IDs of other programs: their formats, and the locations of faults."""

import json
from pathlib import Path

import pytest

from common.errors import DataError
from quantization.id_files import parse, read_codes
from tests.errors import refused
from tests.text import lines_with

CODES = {"3": [7, 1], "1": [5, 1], "2": [6, 0]}


def test_a_single_level_needs_no_list(write):
    assert read_codes(write("index.json", {"x": "<a_7>", "y": "8"})) == {"x": [7], "y": [8]}



@pytest.mark.parametrize("value", [
    [1, 20, 3], ["<a_1>", "<b_20>", "<c_3>"], ["1", " 20 ", "<c_3>"],
    ["<|sid_begin|><s_a_1><s_b_20><s_c_3><|sid_end|>"],                # OneRec
    ["<|sid_begin|>", "<s_a_1>", "<s_b_20>", "<s_c_3>", "<|sid_end|>"],
    ["<SID_START> <A1> <B20> <C3>"], ["<|L0-1|><|L1-20|><|L2-3|>"], ["<0_1>", "<1_20>", "<2_3>"],
    ["1,20,3"], [" 1, 20, 3 "], ["1 20 3"], ["[1, 20, 3]"], ["(1, 20, 3)"], ["['<a_1>', \"<b_20>\", '<c_3>']"]])
def test_tokens_and_numbers_have_many_forms(value):
    assert parse(value) == [1, 20, 3]


@pytest.mark.parametrize(("content", "place", "names"), [
    ("{", "index.json", []),
    (b"\xff\xfe", "index.json", []),
    ([["<a_1>"]], "index.json", []),
    ({}, "index.json", []),
    ('{"x": [1], "y": [2], "x": [1]}', "index.json: 'x'", ["'x'"]),
    ('{"x": {"y": 1, "y": 2}}', "index.json: 'y'", ["'y'"]),
    ("[" * 100_000, "index.json", []),
    *(({"x": codes}, "index.json: 'x'", [codes]) for codes in (
        ["<a_1>", "b 2"], [1.5], [-1], [True], [None], ["9999999999"], [], ["<a_-1>"], ["<a_1.5>"], ["<a_>"], ["a_1"],
        ["1,,2"], ["<|sid_begin|>"], [[1, 2]])),
    ({"x": None}, "index.json: 'x'", [[None]]),
    ("", "index.csv", []),
    ("item,code\n", "index.csv", []),
    ("item,code\nx,1\nx,2\n", "index.csv:3", ["'x'"]),
    ("x,1,2,3\ny,1\n", "index.csv:2", [1, 3]),
    ("item,code\nx,1\ny,-1\n", "index.csv:3", [["-1"]]),
    ("x,1\ny\n", "index.csv:2", [[]]),
    ("x,1\ny,1.0\n", "index.csv:2", [["1.0"]]),
    (b"x,1\n\xff,2\n", "index.csv", []),
    ("item_id,code,group\nx,1,new\n", "index.csv:2", [["1", "new"]]),
    ({"x": ["<a_1>", "<b_2>"], "y": ["<b_2>", "<a_1>"]}, "index.json: 'y'", [1, "'b_'", "'a_'"]),
    (",movie_id,cat_id,sid\n0,x,1,2\n", "index.csv:1", ["'movie_id'", "'cat_id'"]),
    ("item_id,code_0,code_1,price\nx,1,2,3\n", "index.csv:1", ["'price'"]),
    ("l1,l2,sku\n1,2,x\n", "index.csv:1", ["'sku'"]), ("item_id,sid,semantic_id\nx,1,2\n", "index.csv:1", ["'sid'"]),
    ("item_id,a1,a2,b1,b2\nx,1,2,3,4\n", "index.csv:1", ["'b2'"]),
    (",code_0,code_1\n0,7,1\n1,5,1\n", "index.csv:1", []), (",sku,first,second\n1,3,7,1\n2,1,5,1\n", "index.csv:1", []),
    ("x,1,2\ny,1,2,3,4\n", "index.csv:2", [2, 4]),
    ('title,code,raw_id\n"two\nlines",1,x\ny,2\n', "index.csv:4", [3, 2]),
])
def test_a_fault_in_the_file_is_located(write, tmp_path, monkeypatch, content, place, names):
    monkeypatch.chdir(tmp_path)  # a relative path adds no digits to the error
    path = Path(write(place.partition(":")[0], content).name)
    with refused(DataError, place, names=names) as raised:
        read_codes(path)
    assert raised.value.fix


@pytest.mark.parametrize("content", [
    "raw_id,code_1,code_2,semantic_id,title\n3,7,1,<a_7><b_1>,\"Lamp, 2\"\n1,5,1,<a_5><b_1>,12\n2,6,0,<a_6><b_0>,\n",
    ",item_id,code_0,code_1\n1,3,7,1\n2,1,5,1\n3,2,6,0\n",             # row numbers of pandas
    "Unnamed: 0,movie_id,0,1\n1,3,7,1\n2,1,5,1\n3,2,6,0\n",
    "item,raw_id,code_1,code_2\n0,3,7,1\n1,1,5,1\n2,2,6,0\n",          # item is a number here, as in items.parquet
    "code_1,code_2,ID\n7,1,3\n5,1,1\n6,0,2\n",
    "item_id:token,codes\n3,\"7,1\"\n1,\"[5, 1]\"\n2,<s_a_6><s_b_0>\n",
    '"","sku","l1","l2"\n"1","3",7,1\n"2","1",5,1\n"3","2",6,0\n',   # row numbers of R
    "id,code_2,code_1\n3,1,7\n1,1,5\n2,0,6\n", ",code_0,code_1\n3,7,1\n1,5,1\n2,6,0\n", ",0,1\n3,7,1\n1,5,1\n2,6,0\n",
    "item_id,category_id,sid\n3,70,<a_7><b_1>\n1,70,<a_5><b_1>\n2,71,<a_6><b_0>\n",
    "item_id,sid,price,top_10\n3,\"7,1\",9.5,0\n1,\"5,1\",8,1\n2,\"6,0\",7,1\n",
    "raw_id;code_1;code_2;title\r\n3;7;1;Lamp, 2\r\n1;5;1;x\r\n2;6;0;\r\n",
    "3\t7\t1\n1\t5\t1\n2\t6\t0\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_selects_the_columns_of_a_csv(write, mark, content):
    assert read_codes(write("ids.csv", mark + content)) == CODES


def test_a_byte_order_mark_in_json_is_skipped(write):
    assert read_codes(write("index.json", "\ufeff" + json.dumps(CODES))) == CODES


@pytest.mark.parametrize(("name", "content"), [
    ("index.json", {"x": [1, 2, 3], "y": [1, 2, 3, 1], "z": [4, 5, 6]}),
    ("index.json", {"z": ["<a_4><b_5><c_6>"], "x": ["<a_1><b_2><c_3><d_0>"], "y": ["<a_1><b_2><c_3><d_1>"]}),
    ("ids.csv", "item_id,a,b,c,d\nx,1,2,3,\ny,1,2,3,1\nz,4,5,6,\n")])
def test_a_last_code_that_only_tells_items_apart_is_cut(write, caplog, name, content):
    path = write(name, content)
    assert read_codes(path) == {"x": [1, 2, 3], "y": [1, 2, 3], "z": [4, 5, 6]}
    [warning] = [record.getMessage() for record in caplog.records]
    assert lines_with(warning, 3, 4)


@pytest.mark.parametrize(("content", "item", "names"), [
    ({"x": [1, 2, 3], "y": [1, 2, 4, 1]}, "y", [3, 4]),                          # no item shares the first codes
    ({"x": [1, 2, 3], "y": [1, 2, 3, 1], "z": [1, 2, 3, 1]}, "z", [3, 4]),       # the last code tells nothing apart
    ({"x": [1, 2, 3], "y": [1, 2, 3, 1], "z": [1, 2, 3, 1, 1]}, "y", [3, 4]),
    ({"x": [1, 2, 3, 0, 0], "y": [1, 2, 3]}, "y", [3, 5])])
def test_other_ids_of_different_lengths_are_refused(write, content, item, names):
    path = write("index.json", content)
    with refused(DataError, f"{path}: '{item}'", names=names):
        read_codes(path)
