"""Ids that are lists, objects or blanks, and the printed commands that write one event per line."""

import json
import logging
import re
import shlex
import subprocess
from pathlib import Path

import duckdb
import pytest

from common.errors import ConfigError, DataError, UserError
from dataloader.readers.bad_rows import check_texts
from dataloader.sources.local import raw_paths, raw_tables
from dataloader.tables.events import make_keys, read_events
from tests import errors
from tests.dataloader.helpers import process_options
from tests.dataloader.reading import empty_workspace, events_of, items_of, listed, local, refused

pytestmark = pytest.mark.slow

T = 1_577_836_800
EVENT = {"user_id": "a", "item_id": "x", "timestamp": T}


def as_json(folder: Path, *records: dict):
    path = folder / "interactions.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return local(folder)


def as_parquet(folder: Path, **columns: str):
    """Write two equal rows with these SQL values."""
    values = {"user_id": "'a'", "item_id": "'x'", "timestamp": str(T)} | columns
    select = ", ".join(f"{value} AS {name}" for name, value in values.items())
    duckdb.sql(f"SELECT {select} FROM range(2)").write_parquet(str(folder / "interactions.parquet"))
    return local(folder)


def as_csv(folder: Path, items: list[str]):
    cells = (item.replace('"', '""') for item in items)
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f'a,"{cell}",{T}\n' for cell in cells))
    return local(folder)


def follow(error: UserError, folder: Path, *flags: str) -> list[tuple]:
    """Run the command in the fix, and return the events of the file that it writes."""
    command, target = re.search(r" with: (.*) \(then use (.*?)\)", error.fix).groups()
    subprocess.run(["bash", "-c", command], check=True, cwd=folder)
    return events_of(process_options(folder / "data", "--dataset=shop", "--source=local",
                                     f"--interactions={target}", *flags))


def check_keys(options) -> list[str]:
    """Read the events and check their ids; return the raw items in file order."""
    with empty_workspace() as work:
        table = raw_tables(options, raw_paths(options), work)[0]
        read_events(work, table, options, Path())
        make_keys(work)
        check_texts(work, table)
        return [raw for raw, in work.run("SELECT raw FROM kept JOIN item_keys ON item_key = key ORDER BY line")]


@pytest.mark.parametrize(("value", "column"), [
    ({"$oid": "b"}, "user_id.$oid"), ({"name": "n", "id": "b"}, "user_id.id"), ({"a": {"key": "b"}}, "user_id.a.key")])
def test_an_object_is_refused_with_its_column(tmp_path, value, column):
    error = refused(as_json(tmp_path, EVENT | {"user_id": value}), DataError, f"{tmp_path}/interactions.jsonl:1")
    flag, found = shlex.split(error.fix.partition(", or ")[0].removeprefix("use "))
    assert (flag, found) == ("--user_column", column)
    assert events_of(local(tmp_path, flag, found)) == [("b", "x", T, 1.0)]


@pytest.mark.parametrize(("times", "expected"), [(T, [T, T]), ([T, T + 1], [T, T + 1])])
def test_lists_of_json_become_one_event_each(tmp_path, times, expected):
    error = refused(as_json(tmp_path, EVENT, EVENT | {"item_id": [0, "[1]"], "timestamp": times}), DataError,
                    f"{tmp_path}/interactions.jsonl:2")
    assert follow(error, tmp_path) == [("a", "x", T, 1.0), ("a", "0", expected[0], 1.0), ("a", "[1]", expected[1], 1.0)]


def test_lists_of_python_records_become_one_event_each(tmp_path):
    (tmp_path / "interactions.json").write_text(f"{EVENT | {'item_id': ['x', 'y']}}\n")
    error = refused(local(tmp_path), DataError, f"{tmp_path}/interactions.json:1")
    assert [event[1] for event in follow(error, tmp_path)] == ["x", "y"]


@pytest.mark.parametrize(("columns", "events"), [
    ({"item_id": "['x', 'y']"}, [("a", "x", T, 1.0), ("a", "y", T, 1.0)] * 2),
    ({"item_id": "['x', 'y']", "timestamp": f"[{T}, {T + 1}]"}, [("a", "x", T, 1.0), ("a", "y", T + 1, 1.0)] * 2),
    ({"timestamp": f"[{T}, {T + 1}]"}, [("a", "x", T, 1.0), ("a", "x", T + 1, 1.0)] * 2),
    ({"user_id": "{'$oid': 'b'}"}, [("b", "x", T, 1.0)] * 2)])
def test_nested_values_of_parquet_are_converted(tmp_path, columns, events):
    error = refused(as_parquet(tmp_path, **columns), DataError, f"{tmp_path}/interactions.parquet: row 1")
    assert "--time" not in error.fix
    assert follow(error, tmp_path) == events


@pytest.mark.parametrize("cells", [["[1, 2]", "3"], ["['1', '2']", "[3]"], ['["1", "2"]', "['3']"]])
def test_lists_in_most_cells_become_one_event_each(tmp_path, cells):
    options = as_csv(tmp_path, [cells[0], cells[0], cells[1]])
    with errors.refused(DataError, f"{tmp_path}/interactions.csv:2") as raised:
        check_keys(options)
    assert [event[1] for event in follow(raised.value, tmp_path)] == ["1", "2", "1", "2", "3"]


@pytest.mark.parametrize(("cells", "num_warnings"), [
    (["[B00]", "[x, y]", "[1]", "{}", "{a}", "[]"], 0), (["[1, 2]", "x", "y"], 1), (["{'a': 1}", "x"], 1)])
def test_other_texts_with_brackets_stay_ids(tmp_path, caplog, cells, num_warnings):
    assert check_keys(as_csv(tmp_path, cells)) == cells
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == num_warnings


def test_an_object_in_most_cells_is_refused(tmp_path):
    with errors.refused(DataError, f"{tmp_path}/interactions.csv:2"):
        check_keys(as_csv(tmp_path, ['{"$oid": "a"}'] * 2))


def test_a_sequence_of_recbole_becomes_one_event_each(tmp_path):
    (tmp_path / "shop.inter").write_text(f"user_id:token\titem_id:token_seq\ttimestamp:float\na\tx y\t{T}\n")
    error = refused(local(tmp_path), DataError, f"{tmp_path}/shop.inter:1", what=["item_id:token_seq"])
    assert [event[:3] for event in follow(error, tmp_path)] == [("a", "x", T), ("a", "y", T)]


@pytest.mark.parametrize("times", [{"timestamp": T}, {"timestamp": [T, T]}])
def test_a_hint_converts_a_column_of_lists(tmp_path, times):
    record = {"user_id": "a", "items": ["x", "y"], **times}
    as_json(tmp_path, record)
    error = refused(local(tmp_path), ConfigError, "--item_column item_id")
    assert follow(error, tmp_path, "--item_column=items") == [("a", "x", T, 1.0), ("a", "y", T, 1.0)]


def test_a_hint_names_no_column_of_objects(tmp_path):
    record = {"userid": {"user": "a"}, "item_id": "x", "timestamp": T}
    as_json(tmp_path, record)
    error = refused(local(tmp_path), ConfigError, "--user_column user_id")
    assert not re.search(r"--user_column userid(?!\.)", error.fix)


@pytest.mark.parametrize("value", [True, False, [], {}, ["x"], " ", "\t ", "\u3000"[:0] + "  "])
def test_values_that_are_no_ids_are_refused_or_skipped(tmp_path, value):
    records = [EVENT | {"item_id": value}, *[EVENT] * 99]
    refused(as_json(tmp_path, *records), DataError, f"{tmp_path}/interactions.jsonl:1")
    options = local(tmp_path, "--bad_lines=skip")
    assert len(events_of(options)) == 99
    assert [fault["where"] for fault in listed(options)] == [f"{tmp_path}/interactions.jsonl:1"]


def test_lists_as_ids_of_records_are_refused(tmp_path):
    as_json(tmp_path, EVENT)
    (tmp_path / "items.jsonl").write_text('{"item_id": ["x", "y"], "title": "Lamp", "categories": ["a", "b", "c"]}\n')
    refused(local(tmp_path), DataError, f"{tmp_path}/items.jsonl:1")
    (tmp_path / "items.jsonl").write_text('{"item_id": {"$oid": "x"}, "title": "Lamp"}\n')
    refused(local(tmp_path), DataError, f"{tmp_path}/items.jsonl:1", fix=["--item_id_column"])
    assert [item["raw_id"] for item in items_of(local(tmp_path, "--item_id_column=item_id.$oid"))] == ["x"]
