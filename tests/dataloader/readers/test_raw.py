"""Raw tables of every format: read by DuckDB, and by Python where DuckDB fails."""

import gzip
import json
from pathlib import Path

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataloader.readers import raw as tables
from dataloader.readers.delimited import Layout
from dataloader.readers.lines import NO_RECORD, DamagedError, parse_json, parse_python
from dataloader.readers.raw import RawTable, existing_columns, load, repair, type_of
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions
from tests.errors import refused

COLUMNS = {"item": ["a"], "title": ["t"]}
QUERY = "SELECT item, title ->> '$' AS title FROM {rows}"
TYPES = {"item": "VARCHAR", "title": "JSON"}


@pytest.fixture
def work(tmp_path):
    with Workspace(tmp_path / "work", "1GB") as work:
        yield work


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def loaded(work: Workspace, table: RawTable) -> list[tuple]:
    """Item and title of every row, in order."""
    work.run("DROP TABLE IF EXISTS found")
    load(work, table, "found", QUERY, TYPES)
    repair(work, table, "found", QUERY, TYPES, "item IS NULL")
    return work.run("SELECT * FROM found ORDER BY rowid")


def line_of(record: dict, **options) -> bytes:
    return json.dumps(record, **options).encode("utf-8", "surrogatepass")


GOOD = b'{"a": "1", "t": "one"}'
LINES = [  # a line, and its row when it is next to good lines
    (b'\xef\xbb\xbf{"a": "2", "t": "two"}', ("2", "two")),
    (b'{"a": "2", "t": "two"}\r', ("2", "two")),
    (b'{"a": "2", "t": "half \\ud83d"}', ("2", "half ?")),
    (b'{"a": "2", "t": "whole \\ud83d\\ude00"}', ("2", "whole 😀")),
    (b'{"a": "half \\ud83d", "t": "two"}', (None, "two")),
    ('{"a": "e\u0301\u00e9\u202e\u2028", "t": "NFC"}'.encode(), ("e\u0301\u00e9\u202e\u2028", "NFC")),
    (b'{"a": "x\\u0000y", "t": "nothing \\u0000 byte"}', ("x\0y", "nothing \0 byte")),
    (b'{"a": 12345678901234567890, "t": 7}', ("12345678901234567890", "7")),
    (b'{"t": "two"}', (None, "two")),
    (b'{"a": null, "t": null}', (None, None)),
    (b'{"a": "2", "t": "two", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("2", "two")),
    (b'{"a": "2", "t": ' + b"[" * 100_000, (None, None)),
    (b'{"a": "2", "t": "' + b"x" * 20_000_000 + b'"}', ("2", "x" * 20_000_000)),
    (b'{"a": "2", "t": "' + b"x" * 70_000_000 + b'"}', (None, None)),
    (b'{"a": "2"', (None, None)),
    (b'{"a": "2"} {"a": "3"}', (None, None)),
    (b'["a", "2"]', (None, None)),
    (b"null", (None, None)),
    (b'{"a": "\xff"}', (None, None)),
    (b"\x00", (None, None)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "row"), LINES, ids=[repr(line[:24]) for line, _row in LINES])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_odd_line_is_read_and_affects_no_other(tmp_path, work, line, row, ending):
    for place in range(3):
        lines = [GOOD, GOOD]
        lines.insert(place, line)
        content = b"\n\n" + b"\n \n".join(lines) + (b"" if place == 1 else b"\n")
        found = loaded(work, RawTable(write(tmp_path / f"x.jsonl{ending}", content), "json", COLUMNS))
        assert found == [row if n == place else ("1", "one") for n in range(3)]
        if len(line) > 1_000_000:
            break


TEXTS = st.text(st.sampled_from("a'\"\\ \n\t\r\x00é日🍼\u2028\ud800\udc00") | st.characters(), max_size=8)
RECORDS = st.lists(st.fixed_dictionaries({}, optional={
    "a": TEXTS | st.none() | st.integers(), "t": TEXTS, "other": st.none() | st.booleans() | st.lists(TEXTS)}),
    min_size=1, max_size=6)
PLAIN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def as_read(record: dict, pairs: bool) -> tuple:
    """The row of a record by Python's own codecs; `pairs`: whether two surrogates become one character."""
    item, title = record.get("a"), record.get("t")
    if pairs:
        item, title = (joined(value) if isinstance(value, str) else value for value in (item, title))
    if isinstance(item, str):
        item = item if encodable(item) else None
    return None if item is None else str(item), None if title is None else title.encode("utf-8", "replace").decode()


def joined(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def encodable(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text or "?" in text and not any(
        0xD800 <= ord(c) < 0xE000 for c in text)


@pytest.mark.slow
@PLAIN
@given(RECORDS)
@example([{"a": "\ud800"}, {"a": "b", "t": "\ud83d\ude00"}, {}])
def test_json_is_read_as_python_s_codec_reads_it(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("json")
    path = write(folder / "x.jsonl", b"\n".join(map(line_of, records)))
    with Workspace(folder / "work", "1GB") as work:
        found = loaded(work, RawTable(path, "json", COLUMNS))
    assert found == [as_read(record, pairs=True) for record in records]
    assert [parse_json(line_of(record)) for record in records] == [
        json.loads(line_of(record)) for record in records]


@pytest.mark.slow
@PLAIN
@given(RECORDS)
@example([{"a": "\ud800"}, {"a": "b", "t": "\ud83d\ude00"}, {"a": "it's \"x\"", "other": None}])
def test_literals_are_read_as_python_reads_them(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("python")
    lines = [repr(record).encode("utf-8", "backslashreplace") for record in records]
    with Workspace(folder / "work", "1GB") as work:
        found = loaded(work, RawTable(write(folder / "x.gz", b"\n".join(lines)), "python", COLUMNS))
    assert found == [as_read(record, pairs=False) for record in records]


def test_ordinary_json_and_literals_need_no_parsing_in_python(tmp_path, work, monkeypatch):
    monkeypatch.setattr(tables, "PARSERS", dict.fromkeys(tables.PARSERS))
    records = [{"a": f"{n}", "t": f"it's \"{n}\"\n\\", "other": [n, 1.5]} for n in range(100)]
    for format_, write_one in (("json", json.dumps), ("python", repr)):
        path = write(tmp_path / "x.gz", "\n".join(map(write_one, records)).encode())
        assert loaded(work, RawTable(path, format_, COLUMNS)) == [(r["a"], r["t"]) for r in records]


def test_many_odd_lines_keep_their_places(tmp_path, work):
    lines = [b'{"a": "%d", "t": "%s"}' % (n, b"\\ud800" if n % 3 else b"x") for n in range(5000)]
    table = RawTable(write(tmp_path / "x.jsonl", b"\n\n".join(lines)), "json", COLUMNS)
    assert loaded(work, table) == [(str(n), "?" if n % 3 else "x") for n in range(5000)]
    assert {row[0] for row in work.run("SHOW TABLES")} == {"found"}
    assert [path.name for path in work.folder.iterdir() if path.is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "options"), [
    ("json", "FORMAT json"), ("csv", "FORMAT csv"), ("parquet", "FORMAT parquet, ROW_GROUP_SIZE 10000")])
def test_rows_keep_the_order_of_a_large_file(tmp_path, work, format_, options):
    path = tmp_path / f"x.{format_}"
    duckdb.execute(f"COPY (SELECT i::VARCHAR AS a, 'x' AS t FROM range(600000) r(i)) TO '{path}' ({options})")
    load(work, RawTable(path, format_, COLUMNS), "found", QUERY, TYPES)
    assert work.run("SELECT count(*), count(*) FILTER (item::INTEGER <> rowid) FROM found") == [(600_000, 0)]


FOLDERS = ["plain", "a b", "it's", 'say "hi"', "st*r", "b[r]", "[!a]", "~", "{a,b}", "ünï 日本 🍼", "q?m",
           "back\\slash", "a%20b", "#h", "x;y", "$HOME", "new\nline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_a_path_may_hold_anything(tmp_path, work, name):
    content = {"csv": b"a,t\n1,one\n", "jsonl": GOOD, "json": b'\xef\xbb\xbf{"a": "1", "t": "one"}', "gz": GOOD,
               "csv.gz": b"a,t\n1,one\n", "literals": b"{'a': '1', 't': 'one'}"}
    for ending, lines in content.items():
        format_ = "python" if ending == "literals" else "csv" if "csv" in ending else "json"
        path = write(tmp_path / name / f"{name}.{ending}", lines)
        assert loaded(work, RawTable(path, format_, COLUMNS)) == [("1", "one")], ending
    path = tmp_path / name / f"{name}.parquet"
    duckdb.sql("SELECT '1' AS a, 'one' AS t").write_parquet(str(path))
    table = RawTable(path, "parquet", COLUMNS)
    assert loaded(work, table) == [("1", "one")]
    assert existing_columns(work, table) == ["a", "t"]


def test_a_link_to_a_file_of_another_name_is_followed(tmp_path, work):
    write(tmp_path / "blob.gz", GOOD).rename(tmp_path / "blob")
    (tmp_path / "x.jsonl.gz").symlink_to(tmp_path / "blob")
    assert loaded(work, RawTable(tmp_path / "x.jsonl.gz", "json", COLUMNS)) == [("1", "one")]


@pytest.mark.parametrize(("content", "rows"), [
    (b"a,t\n1,one\n2,two\n", [("1", "one"), ("2", "two")]),
    (b"a,t\r\n1,one\n2,two\n", [("1", "one"), ("2", "two")]),               # mixed line ends
    (b"t,a\none,1\nno row\n\n \ntwo,2\n", [("1", "one"), (None, None), ("2", "two")]),
    (b't,a\none,1\n"x"y,3\ntwo,2,\n', [("1", "one"), (None, None), ("2", "two")]),
    (b"t,a\none,1\n\xff,3\ntwo,2\n", [("1", "one"), (None, None), ("2", "two")]),
    (b't,a\n"o\nne",1\n,\ntwo,2\n', [("1", "o\nne"), (None, None), ("2", "two")]),
    (b"a\n1\n\n2\n", [("1", None), ("2", None)]),                           # one column alone
    (b"A,a,t,T\nx,1,one,y\n", [("1", "one")]),
    (b"a,t\n", []),
])
def test_bad_csv_rows_become_empty_rows(tmp_path, work, content, rows):
    assert loaded(work, RawTable(write(tmp_path / "x.csv", content), "csv", COLUMNS)) == rows


def test_the_first_column_with_a_value_is_used(tmp_path, work):
    columns = {"item": ["a", "b"], "title": ["t", "u"]}
    lines = [{"a": "1", "b": "2", "t": "one", "u": "two"}, {"b": "2", "u": "two"},
             {"a": None, "b": "2", "t": [], "u": "u"}, {"a": "1", "t": "", "u": "two"}, {"a": "1", "t": []}]
    path = write(tmp_path / "x.jsonl", b"\n".join(map(line_of, lines)))
    assert loaded(work, RawTable(path, "json", columns)) == [
        ("1", "one"), ("2", "two"), ("2", "u"), ("1", "two"), ("1", None)]


def test_parquet_of_any_types_is_read(tmp_path, work):
    path = tmp_path / "x.parquet"
    duckdb.sql("""SELECT * FROM (VALUES (1::BIGINT, ['one', 'two'], '\\xC3\\xA9'::BLOB),
                                        (NULL, NULL, NULL)) v(a, t, "B")""").write_parquet(str(path))
    assert loaded(work, RawTable(path, "parquet", COLUMNS)) == [("1", '["one","two"]'), (None, None)]
    assert loaded(work, RawTable(path, "parquet", {"item": ["B"]})) == [("é", None), (None, None)]


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b"PAR1", lambda b: b"", lambda b: b[:20] + b[30:]])
def test_damaged_parquet_is_refused(tmp_path, work, damage):
    path = tmp_path / "x.parquet"
    duckdb.sql("SELECT i::VARCHAR AS a, i::VARCHAR AS t FROM range(10) r(i)").write_parquet(str(path))
    path.write_bytes(damage(path.read_bytes()))
    with refused(DataError, path):
        loaded(work, RawTable(path, "parquet", COLUMNS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.literals.gz"])
@pytest.mark.parametrize("cut", [4, 9, 3000])
def test_a_truncated_file_is_named_with_its_last_line(tmp_path, work, name, cut):
    rows = [{"a": f"{n * 7919 % 100_003}", "t": "x"} for n in range(5000)]
    text = "a,t\n" + "".join(f"{row['a']},x\n" for row in rows) if "csv" in name else "\n".join(
        map(repr if "literals" in name else json.dumps, rows))
    path = write(tmp_path / name, text.encode())
    path.write_bytes(path.read_bytes()[:-cut])
    table = RawTable(path, {"x.jsonl.gz": "json", "x.csv.gz": "csv"}.get(name, "python"), COLUMNS)
    with refused(DamagedError) as error:
        loaded(work, table)
    file, _, line = str(error.value.where).rpartition(":")
    assert file == str(path)
    assert mentions(error.value.why, int(line) - 1)
    assert 3000 < int(line) <= 5002 or cut == 3000


def test_a_full_disk_is_not_reported_as_a_bad_file(tmp_path, work, monkeypatch):
    path = write(tmp_path / "x.jsonl", GOOD)
    monkeypatch.setattr(tables, "_rows_of_json", lambda *_args: "SELECT error('none') AS item, NULL AS title")
    run = work.run

    def full(query, *parameters):
        if query.startswith("CREATE TABLE found"):
            raise duckdb.IOException("Could not write file: No space left on device")
        return run(query, *parameters)

    monkeypatch.setattr(work, "run", full)
    with pytest.raises(duckdb.IOException, match="No space left"):
        load(work, RawTable(path, "json", COLUMNS), "found", QUERY, TYPES)


def test_the_columns_of_json_are_those_of_its_first_records(tmp_path, work):
    lines = [b"no record", b'{"a": 1}', b'{"b": 1, "a": 2}', *[b"{}"] * 997, b'{"late": 1}']
    assert existing_columns(work, RawTable(write(tmp_path / "x.jsonl", b"\n".join(lines)), "json", {})) == ["a", "b"]


def test_only_parquet_has_types(tmp_path, work):
    duckdb.sql("SELECT DATE '2014-01-01' AS a, now() AS t").write_parquet(str(tmp_path / "x.parquet"))
    table = RawTable(tmp_path / "x.parquet", "parquet", COLUMNS)
    assert (type_of(work, table, "item"), type_of(work, table, "title")) == ("DATE", "TIMESTAMP WITH TIME ZONE")
    path = write(tmp_path / "x.csv", b"a,t\n2014-01-01,x\n")
    assert type_of(work, RawTable(path, "csv", COLUMNS, layout=Layout()), "item") == "VARCHAR"


def test_both_parsers_refuse_lines_of_empty_rows():
    for line, row in LINES:
        if row == (None, None) and b"null" not in line:
            for parse in (parse_json, parse_python):
                with pytest.raises(NO_RECORD):
                    parse(line)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.literals.gz"])
def test_one_changed_byte_of_a_gzipped_file_is_found(tmp_path, work, monkeypatch, name):
    monkeypatch.setattr("dataloader.readers.lines.BLOCK", 1000)  # so that the first lines do not reach the checksum
    rows = [{"a": f"{n}", "t": "x"} for n in range(2000)]
    text = "a,t\n" + "".join(f"{row['a']},x\n" for row in rows) if "csv" in name else "\n".join(
        map(repr if "literals" in name else json.dumps, rows))
    packed = bytearray(gzip.compress(text.encode(), compresslevel=0))
    packed[packed.index(b"1234")] = ord("9")
    (tmp_path / name).write_bytes(packed)
    format_ = {"x.jsonl.gz": "json", "x.csv.gz": "csv"}.get(name, "python")
    with refused(DamagedError):
        loaded(work, RawTable(tmp_path / name, format_, COLUMNS))
