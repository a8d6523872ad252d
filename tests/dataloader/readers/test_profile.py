"""The content of the columns of a raw file, in every format."""

import ast
import json
from pathlib import Path

import duckdb
import pytest

from dataloader.readers.delimited import Layout
from dataloader.readers.profile import Column, plain, profile, shown
from dataloader.readers.raw import RawTable
from dataloader.workspace import Workspace


@pytest.fixture
def work(tmp_path):
    with Workspace(tmp_path / ".work", "1GB") as work:
        yield work


def columns(work: Workspace, path: Path, text: str, form: str, names: list[str]) -> tuple[int, list[Column]]:
    path.write_text(text, encoding="utf-8")
    return profile(work, RawTable(path, form, {}, layout=Layout()), names)


# The values of a column of a CSV file, its type, and the number of missing values.
@pytest.mark.parametrize(("values", "kind", "num_missing"), [
    (["1", "0020", "-3"], "integer", 0),
    (["1", "2.5", "1e-3"], "number", 0),
    (["2014-01-01", "2014-01-01T10:00:00Z", "2014-01-01 10:00:00.5"], "date", 0),
    (["20140101", "2014-01-01", "x"], "text", 0),
    (["20140101", "2014-01-01", ""], "integer or date", 1),
    (["Cup", "", "1984"], "text", 1),
    (["", "", ""], "", 3)])
def test_the_type_of_a_column_is_that_of_its_values(work, tmp_path, values, kind, num_missing):
    text = "".join(f"{line}\n" for line in ["a,b", *(f"{value},z" for value in values)])
    num_rows, [first, second] = columns(work, tmp_path / "e.csv", text, "csv", ["a", "b"])
    assert num_rows == 3
    assert (first.type, first.num_missing) == (kind, num_missing)
    assert second == Column("b", "text", 0, "'z'")


def test_the_types_of_json_values_are_told_apart(work, tmp_path):
    rows = [{"i": 1, "f": 1.5, "s": " a", "d": "2014-01-01", "l": [], "o": {"x": 2}, "b": True, "m": 1, "n": None},
            {"i": 2, "f": 2, "s": "7", "d": "2014-01-02", "l": ["q"], "o": {}, "b": False, "m": "Cup", "n": ""}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    num_rows, found = columns(work, tmp_path / "e.jsonl", text, "json", [*rows[0], "o.x"])
    assert num_rows == 3
    assert {column.name: column[1:3] for column in found} == {
        "i": ("integer", 1), "f": ("number", 1), "s": ("text", 1), "d": ("date", 1), "l": ("list", 2),
        "o": ("object", 2), "b": ("true/false", 1), "m": ("text", 1), "n": ("", 3), "o.x": ("integer", 2)}
    assert {column.example for column in found} == {
        "1", "1.5", '" a"', '"2014-01-01"', '["q"]', '{"x":2}', "true", "", "2"}


def test_parquet_columns_have_their_own_types(work, tmp_path):
    duckdb.sql("""SELECT 'u' || i AS a, i::SMALLINT AS b, DATE '2014-01-01' + i::INTEGER AS c, nullif(i, 0) * 0.5 AS d,
                         [i] AS e FROM range(3) t(i)""").write_parquet(str(tmp_path / "e.parquet"))
    num_rows, found = profile(work, RawTable(tmp_path / "e.parquet", "parquet", {}), ["a", "b", "c", "d", "e"])
    assert num_rows == 3
    assert [column.num_missing for column in found] == [0, 0, 0, 1, 0]
    assert [column.type.split("(")[0] for column in found] == ["text", "SMALLINT", "DATE", "DECIMAL", "BIGINT[]"]
    assert [column.example for column in found] == ["'u0'", "0", "2014-01-01", "0.5", "[0]"]


def test_an_example_after_many_missing_values_is_found(work, tmp_path):
    text = "a,b\n" + "x,\n" * 3000 + "x,late\n"
    num_rows, [_first, late] = columns(work, tmp_path / "e.csv", text, "csv", ["a", "b"])
    assert (num_rows, late) == (3001, Column("b", "text", 3000, "'late'"))


def test_rows_that_cannot_be_read_count_as_missing(work, tmp_path):
    num_rows, found = columns(work, tmp_path / "e.csv", "a,b\n1,x\n2\n3,y\n", "csv", ["a", "b"])
    assert (num_rows, [column.num_missing for column in found]) == (3, [1, 1])


def test_names_that_differ_only_in_case_are_two_columns(work, tmp_path):
    _rows, found = columns(work, tmp_path / "e.csv", "a,A\n1,x\n", "csv", ["a", "A"])
    assert [(column.name, column.example) for column in found] == [("a", "'1'"), ("A", "'x'")]


@pytest.mark.parametrize("value", ["\x1b[31m", "a\tb", "\u202eabc", "x" * 99, "it's", ""])
def test_a_shown_value_is_short_and_printable(value):
    for text in (shown(value), plain(value)):
        assert text.isprintable()
        assert len(text) < 200
    assert ast.literal_eval(shown(value).removesuffix("…")) == value[:30]
