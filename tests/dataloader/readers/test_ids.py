"""Raw ids that are stored as floating-point numbers."""

import json

import duckdb
import pytest

from common.errors import DataError
from tests.dataloader.reading import events_of, items_of, listed, local, refused

MOST = {"DOUBLE": 2**53, "FLOAT": 2**24}


def as_parquet(folder, ids: str, file: str = "interactions"):
    """Write rows with these SQL values as ids of users and items."""
    columns = "id AS user_id, id AS item_id, 1393545600 AS timestamp" if file == "interactions" else "id AS item_id"
    duckdb.sql(f"SELECT {columns} FROM (VALUES {ids}) v(id)").write_parquet(str(folder / f"{file}.parquet"))
    return local(folder)


def as_json(folder, ids: list[str], *flags: str):
    """Write rows with these ids in JSON notation."""
    (folder / "interactions.jsonl").write_text("".join(
        f'{{"user_id": {raw}, "item_id": {raw}, "timestamp": 1393545600}}\n' for raw in ids))
    return local(folder, *flags)


def pairs(*ids: str) -> list[tuple[str, str]]:
    return [(raw_id, raw_id) for raw_id in ids]


@pytest.mark.parametrize("kind", MOST)
def test_whole_numbers_of_parquet_become_integers(tmp_path, kind):
    options = as_parquet(tmp_path, f"(1001::{kind}), (0::{kind}), (-7::{kind}), ({MOST[kind]}::{kind})")
    assert [event[:2] for event in events_of(options)] == pairs("1001", "0", "-7", str(MOST[kind]))


@pytest.mark.parametrize("value", [
    "20000000000000001::DOUBLE", "9007199254740994::DOUBLE", "16777218::FLOAT", "1.5::DOUBLE", "'nan'::FLOAT",
    "'inf'::DOUBLE", "-9007199254740994::DOUBLE"])
def test_numbers_that_are_not_exact_are_refused(tmp_path, value):
    kind = value.partition("::")[2]
    error = refused(as_parquet(tmp_path, f"(1::{kind}), ({value})"), DataError,
                    f"{tmp_path}/interactions.parquet: row 2", what=["user", f"{MOST[kind]:,}"])
    assert str(duckdb.sql(f"SELECT {value}").fetchall()[0][0]) in error.what


def test_a_file_of_inexact_ids_has_one_fix(tmp_path):
    options = as_parquet(tmp_path, ", ".join(f"({20000000000000001 + n}::DOUBLE)" for n in range(20)))
    refused(options, DataError, f"{tmp_path}/interactions.parquet: row 1", fix=["text or integers"])


def test_ids_of_records_become_integers_too(tmp_path):
    as_parquet(tmp_path, "(1001)")
    options = as_parquet(tmp_path, "(1001.0::DOUBLE), (7::DOUBLE)", "items")
    assert [record["raw_id"] for record in items_of(options)] == ["1001", "7"]
    as_parquet(tmp_path, "(1001.0::DOUBLE), (7.5::DOUBLE)", "items")
    refused(local(tmp_path), DataError, f"{tmp_path}/items.parquet: row 2", what=["7.5"])


@pytest.mark.parametrize("values", [
    {"1001.0": "1001", '"1001.0"': "1001.0", "1001": "1001", '"1e3"': "1e3"},
    {"1e3": "1000", "1001.00": "1001", "-0.0": "0", "5": "5"},
    {"200000000000000000000000001": "200000000000000000000000001", "20000000000000001": "20000000000000001"},
    {'"NaN"': "NaN", '"Infinity"': "Infinity", '"-Infinity"': "-Infinity", "2.0": "2"},
    {'"v1.0"': "v1.0", '"e"': "e", '"1.5"': "1.5", '"١.٠"': "١.٠", '"true"': "true", '"[1, 2]"': "[1, 2]"},
])
def test_whole_numbers_of_json_become_integers_and_texts_stay(tmp_path, values):
    assert [event[:2] for event in events_of(as_json(tmp_path, list(values)))] == pairs(*values.values())


@pytest.mark.parametrize("value", ["1.5", "NaN", "Infinity", "-Infinity", "2e16", "20000000000000001.0", "1e-3"])
def test_other_numbers_of_json_are_refused_or_skipped(tmp_path, value):
    ids = ["7.0", value, *(str(n) for n in range(98))]
    error = refused(as_json(tmp_path, ids), DataError, f"{tmp_path}/interactions.jsonl:2")
    assert repr(float(value)) in error.what
    options = as_json(tmp_path, ids, "--bad_lines=skip")
    assert len(events_of(options)) == 99
    assert [fault["where"] for fault in listed(options)] == [f"{tmp_path}/interactions.jsonl:2"]


def test_numbers_in_nested_and_repaired_records_become_integers(tmp_path):
    (tmp_path / "interactions.jsonl").write_text("".join(
        f'{mark}{{"a": {{"u": 1.0}}, "item_id": 2.0, "timestamp": {n}}}\n' for n, mark in enumerate(("", "\ufeff"))),
        encoding="utf-8")
    assert [event[:2] for event in events_of(local(tmp_path, "--user_column=a.u"))] == [("1", "2")] * 2
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": 2.0, "title": "Lamp"}))
    assert [record["raw_id"] for record in items_of(local(tmp_path, "--user_column=a.u"))] == ["2"]


def test_ids_of_text_files_do_not_change(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n1001.0,1e3,1\nNaN,nan,2\n")
    assert [event[:2] for event in events_of(local(tmp_path))] == [("1001.0", "1e3"), ("NaN", "nan")]
