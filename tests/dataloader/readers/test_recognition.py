"""Formats that the name of a file does not say."""

import gzip
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from common.errors import DataError
from dataloader.readers.delimited import Layout
from dataloader.readers.lines import first_format
from dataloader.readers.recognition import other_format, quoting_flag, separators

RECORDS = [{"user_id": "u", "item_id": f"i{n}", "timestamp": n} for n in range(3)]
JSON_LINES = "\n".join(map(json.dumps, RECORDS))
TEXT = "user_id,item_id,timestamp\nu,i0,0\nu,i1,1\n"


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("name", "content", "what", "fix"), [
    ("x.csv", JSON_LINES, "JSON", "x.jsonl"),
    ("x.tsv.gz", repr({"a": None}), "Python", "x.jsonl"),
    ("x.jsonl", TEXT, "commas", "x.csv"),
    ("x.json", TEXT.replace(",", "\t"), "tabs", "x.tsv"),
    ("x.csv", b"PAR1\x15\x04", "Parquet", "x.parquet"),
    ("x.csv", b"PK\x03\x04\x14", "Excel", "CSV"),
    ("x.jsonl", JSON_LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
    ("x.csv", TEXT.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
    ("x.csv", TEXT.encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
    ("x.csv", "<!DOCTYPE html>\n<html>", "HTML", "again"),
    ("x.jsonl", json.dumps(RECORDS[0], indent=1), "several lines", "json_lines.py"),
])
def test_another_format_is_named_with_what_to_do(tmp_path, name, content, what, fix):
    path = write(tmp_path / name, content)
    error = other_format(path, "csv" if "sv" in name else "json")
    assert isinstance(error, DataError)
    assert str(error.where) == f"{path}:1"
    assert what in error.what
    assert fix in error.fix


@pytest.mark.slow
@pytest.mark.parametrize("name", ["it's x.json", "x.json.gz", "x.csv"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_command_converts_an_array_to_lines(tmp_path, name, indent):
    path = write(tmp_path / name, json.dumps(RECORDS, indent=indent))
    error = other_format(path, "csv" if "sv" in name else "json")
    assert error is not None
    command = error.fix.partition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    lines = Path(shlex.split(command)[-1]).read_text().splitlines()
    assert list(map(json.loads, lines)) == RECORDS


@pytest.mark.parametrize(("name", "content"), [
    ("x.csv", TEXT), ("x.csv", ""), ("x.csv", "[user],[item]\n1,2\n"), ("x.jsonl", JSON_LINES), ("x.jsonl", ""),
    ("x.jsonl", f"no record\n{JSON_LINES}"), ("x.jsonl", "[1, 2]\nnull\n"), ("x.jsonl.gz", repr(RECORDS[0]))])
def test_a_file_in_the_format_of_its_name_is_accepted(tmp_path, name, content):
    assert other_format(write(tmp_path / name, content), "csv" if "sv" in name else "json") is None


@pytest.mark.parametrize(("lines", "found"), [
    (["a;b;c", "1;2;3"], [";"]), (["a\tb", "1\tx y"], ["\t"]), (["a b c", "1 2 3"], [" "]),
    (["a  b", "   1  2"], [" "]), (["1::a, b::3", "2::c::4"], ["::"]), (["a|b", '1|"x|y"'], ["|"]),
    (["a;b|c", "1;2|3"], [";", "|"]), (["a b", "1", "2 3"], []), (["a,b", "1,2"], [","]), (["id", "a b"], [])])
def test_the_separator_is_found_where_it_is_plain(tmp_path, lines, found):
    assert separators(write(tmp_path / "x.csv", "\n".join(lines)), Layout()) == found


@pytest.mark.parametrize(("lines", "layout", "flag"), [
    (["a,b", r'"x \"y\", z",1', "u,2"], Layout(), "--escape '\\'"),
    (["a,b", '"x"y,1', '"x"z,2'], Layout(), "--quoting none"),
    (["a\tb\tc", '1\t"x\ny\tz"\t2'], Layout("\t", lenient=True), "--quoting double"),
    (["a,b", "1", "2"], Layout(), ""), (["a,b", "1,2"], Layout(), "")])
def test_the_quotes_that_a_file_has_are_named(tmp_path, lines, layout, flag):
    path = write(tmp_path / "x.csv", "\n".join(lines))
    assert quoting_flag(path, layout, most=True) == flag
    assert quoting_flag(path, layout, most=False) == (flag if "escape" in flag else "")


def test_the_first_record_says_the_format(tmp_path):
    assert first_format(write(tmp_path / "x.json", "\n".join(map(repr, RECORDS)))) == "python"
