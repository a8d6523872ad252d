"""Files of delimited values, row by row, and as DuckDB reads them."""

import csv
import gzip
import io
import json
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataloader.readers import delimited
from dataloader.readers.delimited import Layout, header, reader, rewrite, rows
from dataloader.readers.lines import MAX_LINE, DamagedError
from tests.dataloader.helpers import mentions
from tests.errors import refused

CSV = Layout()
TSV = Layout("\t")
BARE = Layout("\t", quote="", typed=True)
DOUBLE_COLON = Layout("::", quote="", header=("a", "b"))


def write(folder: Path, content: str | bytes, name: str = "x.csv") -> Path:
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def row_by_row(path: Path, layout: Layout = CSV) -> list[tuple]:
    """Line and values of each row; the values of a bad row are the reason, a string."""
    return [(line, tuple(values.values()) if isinstance(values, dict) else values)
            for line, values, _text in rows(path, layout)]


def by_duckdb(path: Path, layout: Layout = CSV) -> list[tuple]:
    """Rows as DuckDB reads them; it reads an empty value as NULL."""
    found = duckdb.sql(f"SELECT * FROM {reader(path, layout, header(path, layout))}").fetchall()
    return [tuple(value or "" for value in row) for row in found]


@pytest.mark.parametrize(("content", "layout", "expected"), [
    ("a,b\n1,2\n3,4\n", CSV, [(2, ("1", "2")), (3, ("3", "4"))]),
    ("a,b\r\n1,2\r\n\r\n3,4", CSV, [(2, ("1", "2")), (4, ("3", "4"))]),
    ("a,b\r1,2\r3,4\r", CSV, [(2, ("1", "2")), (3, ("3", "4"))]),
    ("\ufeffa,b\n1,2\n", CSV, [(2, ("1", "2"))]),
    ("a,b\n1,2,\n", CSV, [(2, ("1", "2"))]),
    ('a,b\n"x\ny",2\n"say ""hi""",4\n', CSV, [(2, ("x\ny", "2")), (4, ('say "hi"', "4"))]),
    ('a,b\n"x\r\ny","1,2"\n\n5,6\n', CSV, [(2, ("x\r\ny", "1,2")), (5, ("5", "6"))]),
    ('a,b\nx"y,2\n', CSV, [(2, ('x"y', "2"))]),
    ("a,b\n  x , NA \n,\n#c,\\N\n", CSV, [(2, ("  x ", " NA ")), (3, ("", "")), (4, ("#c", "\\N"))]),
    ("a,b\nx\u2028y,\x0bz\x85\n", CSV, [(2, ("x\u2028y", "\x0bz\x85"))]),
    ('a\tb\n"x\ty"\t2\n', TSV, [(2, ("x\ty", "2"))]),
    ('a:token\tb:float\n"x\t2"\n', BARE, [(2, ('"x', '2"'))]),
    ("1::2\n\n3:x::4\n", DOUBLE_COLON, [(1, ("1", "2")), (3, ("3:x", "4"))]),
])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_rows_are_read_alike_by_duckdb_and_row_by_row(tmp_path, content, layout, expected, ending):
    path = write(tmp_path, content, f"x.csv{ending}")
    assert row_by_row(path, layout) == expected
    assert by_duckdb(path, layout) == [values for _line, values in expected]


VALUES = st.text(st.sampled_from('ab ",;\t\n\r|\\#\ufeff\u2028é🍼') | st.characters(exclude_characters="\x00",
                                                                             exclude_categories=["Cs"]), max_size=6)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=5), st.sampled_from([",", "\t"]),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_output_of_a_csv_writer_is_read_back(tmp_path_factory, table, delimiter, end, quoting):
    if any("\r" in value for row in table for value in row):
        quoting = csv.QUOTE_ALL  # the writer does not quote it by itself
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("a", "b"), *table])
    path = write(tmp_path_factory.mktemp("csv"), text.getvalue())
    layout = Layout(delimiter)
    assert [values for _line, values in row_by_row(path, layout)] == table
    try:
        found = by_duckdb(path, layout)
    except duckdb.InvalidInputException:
        return  # another kind of line end within quotes; such a file is read row by row
    assert found == table


@pytest.mark.parametrize(("content", "values"), [
    ("a,b\n1,2\n3\n4,5\n", (1, 2)),      # fields of the row, and of the header
    ("a,b\n1,2\n3,4,5\n4,5\n", (3, 2)),
    ('a,b\n1,2\n"x"y,4\n4,5\n', ()),
    ('a,b\n1,2\n"x" ,4\n4,5\n', ()),
    ('a,b\n1,2\n "x",4\n4,5\n', ()),
    ('a,b\n1,2\n"x,4\n4,5\n', ()),
    ('a,b\n1,2\n"x,3\n"y,4\n4,5\n', ()),
    (b"a,b\n1,2\n\xff,4\n4,5\n", ("UTF-8",)),
    ("a,b\n1,2\nx,\ud800\n4,5\n", ("UTF-8",)),
])
def test_a_bad_row_has_a_reason_and_affects_no_other(tmp_path, content, values):
    found = row_by_row(write(tmp_path, content))
    assert found[0] == (2, ("1", "2"))
    [reason] = [reason for line, reason in found if line == 3]
    assert isinstance(reason, str)
    assert mentions(reason, *values)
    assert found[-1][1] == ("4", "5")


def test_the_text_of_a_row_is_that_of_the_file(tmp_path):
    path = write(tmp_path, 'a,b\r\n"x\r\ny",2\r\n"z,3\r\n')
    assert [text for _line, _values, text in rows(path, CSV)] == ['"x\r\ny",2', '"z,3']


@pytest.mark.parametrize("content", ["", "\n", "\n\na,b\n1,2\n", " ,\t\n", "\ufeff"])
def test_a_file_without_column_names_is_refused(tmp_path, content):
    with refused(DataError, f"{tmp_path}/x.csv:1"):
        header(write(tmp_path, content), CSV)


@pytest.mark.parametrize(("content", "names", "fix"), [
    ("é,b\n".encode("latin-1"), ["UTF-8"], []),
    (b'"a"x,b\n', [], []), (b'"a,b\n1,2\n', [], [])])
def test_an_unreadable_header_is_refused(tmp_path, content, names, fix):
    with refused(DataError, f"{tmp_path}/x.csv:1", names=names, fix=fix):
        header(write(tmp_path, content), CSV)


def test_column_names_may_hold_anything_and_differ_by_case(tmp_path):
    path = write(tmp_path, 'ID,id,"a ""b"", c\nd",,select\n1,2,3,4,5\n')
    assert header(path, CSV) == ["ID", "id", 'a "b", c\nd', "", "select"]
    assert by_duckdb(path) == [("1", "2", "3", "4", "5")]


def test_only_recbole_names_lose_their_type_after_the_colon(tmp_path):
    path = write(tmp_path, "user_id:token\tb:c:d\n")
    assert header(path, BARE) == ["user_id", "b"]
    assert header(path, TSV) == ["user_id:token", "b:c:d"]


@pytest.mark.slow
def test_a_huge_value_is_read_and_a_huge_line_refused(tmp_path):
    path = write(tmp_path, f"a,b\n{'x' * 20_000_000},2\n3,4\n")
    assert [(line, len(values[0])) for line, values in row_by_row(path)] == [(2, 20_000_000), (3, 1)]
    assert [len(value) for value, _other in by_duckdb(path)] == [20_000_000, 1]
    path = write(tmp_path, f"a,b\n{'x' * 70_000_000},2\n3,4\n")
    [(line, reason), good] = row_by_row(path)
    assert (line, good) == (2, (3, ("3", "4")))
    assert mentions(reason, f"{MAX_LINE:,}")


def test_an_unclosed_quote_costs_one_row_and_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_LINE", 1000)
    path = write(tmp_path, "a,b\n" + "1,2\n" * 500 + '"x,2\n' + "3,4\n" * 1500)
    found = row_by_row(path)
    assert len(found) == 2001
    [(line, reason)] = [row for row in found if isinstance(row[1], str)]
    assert line == 502
    assert mentions(reason, "1,000")


def test_a_truncated_file_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "a,b\n" + "".join(f"{n * 7919 % 10_007},2\n" for n in range(5000)), "x.csv.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with refused(DamagedError) as error:
        row_by_row(path)
    file, _, line = str(error.value.where).rpartition(":")
    assert file == str(path)
    assert 1 < int(line) < 5002
    assert mentions(error.value.why, int(line) - 1)


def test_rows_become_json_with_the_wanted_columns(tmp_path):
    path = write(tmp_path, 'a,b,c\n1,"é ""x""",3\n4,,6\nno row\n')
    rewrite(path, CSV, ["a", "b", "none"], tmp_path / "y")
    assert [json.loads(line) for line in (tmp_path / "y").read_text("utf-8").splitlines()] == [
        {"a": "1", "b": 'é "x"'}, {"a": "4"}, {}]
