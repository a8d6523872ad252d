"""Quotes that are text, escapes, and long lines: files that DuckDB alone would read differently."""

import gzip
from pathlib import Path

import duckdb
import pytest

from dataloader.readers import delimited
from dataloader.readers.delimited import Layout, header, reader, rows, suits_duckdb
from dataloader.readers.lines import DamagedError
from tests.errors import refused

TSV = Layout("\t", lenient=True)
CSV = Layout()
SPARK = Layout(escape="\\")
HEADER = "user\titem\ttime\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def read(path: Path, layout: Layout) -> list[tuple | int]:
    """The values of each row, or the line number of a bad row. DuckDB, if it may, must read the same values."""
    found = [tuple(values.values()) if isinstance(values, dict) else line for line, values, _text in rows(path, layout)]
    if suits_duckdb(path, layout):
        try:
            by_duckdb = duckdb.sql(f"FROM {reader(path, layout, header(path, layout))}").fetchall()
        except duckdb.InvalidInputException:  # then the file is read row by row
            return found
        assert [tuple(value or "" for value in row) for row in by_duckdb] == found
    return found


U, B, V = ("u", "B", "2"), ("u\tB\t2\n"), ("v", "Y", "9")


@pytest.mark.parametrize(("text", "expected"), [
    # A lone quote is text, whether or not a later quote could close it.
    ('u\t"Weird\t1\nu\tB\t2\nu\tAl"\t3\n', [("u", '"Weird', "1"), U, ("u", 'Al"', "3")]),
    ('u\t"Weird\t1\nu\tAl"\t3\n', [("u", '"Weird', "1"), ("u", 'Al"', "3")]),
    ('u\t"Weird\t1\nu\tB\t2\nu\tAl" x\t3\n', [("u", '"Weird', "1"), U, ("u", 'Al" x', "3")]),
    ('u\tB\t2\n"u\tx\t1', [U, ('"u', "x", "1")]),
    ('u\t"\t1\nu\t"\t3\nu\tB\t2\n', [("u", '"', "1"), ("u", '"', "3"), U]),
    ('u\t5" disk\t1\nu\t"x"y\t2\n', [("u", '5" disk', "1"), ("u", '"x"y', "2")]),
    ('u\t "x"\t1\nu\t"x" \t2\n', [("u", ' "x"', "1"), ("u", '"x" ', "2")]),
    ('u\t"Weird\tAl"\n', [("u", '"Weird', 'Al"')]),
    # A bad line with a quote costs only itself.
    ('u\t"Weird\nu\tB\t2\nv\tAl"\t3\n', [2, U, ("v", 'Al"', "3")]),
    # Quotes around a whole field, as pandas and Spark write them.
    ('u\t"say ""hi"""\t1\nu\t"a\tb"\t2\n', [("u", 'say "hi"', "1"), ("u", "a\tb", "2")]),
    ('u\t"two\nlines"\t1\nv\tY\t9\n', [("u", "two\nlines", "1"), V]),
    ('"two\n\nlines"\tx\t"1"\nv\tY\t9\n', [("two\n\nlines", "x", "1"), V]),
    ('u\t"two\r\nlines"\t"1\n2"\r\nv\tY\t9\r\n', [("u", "two\r\nlines", "1\n2"), V]),
    ('u\t"a\tb\nc"\t1\nv\tY\t9\n', [("u", "a\tb\nc", "1"), V]),
    ('u\t""\t1\n', [("u", "", "1")]),
])
@pytest.mark.parametrize("copies", [0, 3])
def test_a_quote_in_tsv_is_text_unless_enclosing_a_field(tmp_path, text, expected, copies):
    path = write(tmp_path / "x.tsv", HEADER + B * copies + text)
    assert [row if isinstance(row, tuple) else row - copies for row in read(path, TSV)] == [U] * copies + expected


def test_quotes_are_text_or_values_as_the_layout_says(tmp_path):
    path = write(tmp_path / "x.tsv", 'a\tb\n"x\ty"\n"p"\t"q"\n')
    assert read(path, TSV) == [('"x', 'y"'), ("p", "q")]
    assert read(path, Layout("\t", quote="")) == [('"x', 'y"'), ('"p"', '"q"')]
    assert read(path, Layout("\t")) == [2, ("p", "q")]


@pytest.mark.parametrize("separator", ["|", "::", " ", "\x01"])
def test_lone_quotes_are_text_with_any_separator(tmp_path, separator):
    lines = [["a", "b", "c"], ["u", '"Weird', "1"], ["u", '"x"', "2"], ["u", 'Al"', "3"]]
    path = write(tmp_path / "x.txt", "".join(separator.join(line) + "\n" for line in lines))
    assert read(path, Layout(separator, lenient=True)) == [("u", '"Weird', "1"), ("u", "x", "2"), ("u", 'Al"', "3")]


@pytest.mark.parametrize(("field", "value"), [
    (r'"say \"hi\", you"', 'say "hi", you'), (r'"C:\dir, x"', r"C:\dir, x"), (r'"ends in \\"', "ends in \\"),
    (r"C:\\dir", r"C:\\dir"), (r'"\"', None), ('"two\n\\"lines\\""', 'two\n"lines"')])
def test_an_escape_counts_before_quotes_and_itself(tmp_path, field, value):
    found = read(write(tmp_path / "x.csv", f"a,b\n{field},1\nx,2\n"), SPARK)
    assert found[0] == ((value, "1") if value is not None else 2)
    assert found[-1] == ("x", "2")


def test_spaces_may_align_the_columns(tmp_path):
    path = write(tmp_path / "x.txt", 'user  item  time\n   u     A     1\n  v "a b"   22\n')
    assert read(path, Layout(" ", lenient=True)) == [("u", "A", "1"), ("v", "a b", "22")]


def test_a_value_across_blocks_is_read_by_duckdb(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tsv", HEADER + 'u\t"two\nlines"\t1\n' * 200)
    for block in (7, 20, 1000):
        monkeypatch.setattr("dataloader.readers.lines.BLOCK", block)
        assert suits_duckdb(path, TSV)
    assert not suits_duckdb(write(path, HEADER + 'u\t"two\nlines"\t1\n' * 200 + 'u\t"x\t1\n'), TSV)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "expected"), [
    ("a,b\n1,2\n" + "x" * 5000, [("1", "2"), 3]),
    ("a,b\n1,2\n" + "x" * 5000 + "\n3,4\n", [("1", "2"), 3, ("3", "4")]),
    ("a,b\n" + "x" * 5000 + ",1\n3,4", [2, ("3", "4")])])
@pytest.mark.parametrize("layout", [CSV, Layout(quote="")])
def test_a_line_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch, text, expected, layout):
    monkeypatch.setattr(delimited, "MAX_LINE", 1000)
    monkeypatch.setattr("dataloader.readers.lines.MAX_LINE", 1000)
    monkeypatch.setattr("dataloader.readers.lines.BLOCK", 100)
    path = write(tmp_path / "x.csv", text)
    assert not suits_duckdb(path, layout)
    assert read(path, layout) == expected


def test_a_line_of_maximum_length_does_not_take_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_LINE", 10)
    assert read(write(tmp_path / "x.csv", "a,b\n1234567,9\n1234567\n3,4\n"), CSV)[-2:] == [3, ("3", "4")]


def test_the_checksum_of_a_gzipped_file_is_compared(tmp_path):
    packed = bytearray(gzip.compress(b"a,b\n" + b"1,2\n" * 1000, compresslevel=0))
    packed[500] ^= 1
    (tmp_path / "x.csv.gz").write_bytes(packed)
    with refused(DamagedError, f"{tmp_path}/x.csv.gz:1002"):
        suits_duckdb(tmp_path / "x.csv.gz", CSV)
