"""Columns in nested objects of JSON records, by dotted names."""

import json

import pytest

from common.errors import ConfigError, DataError
from dataloader.readers.lines import column_names, value_at
from tests.dataloader.reading import items_of, local, read_raw, refused

FLAGS = ("--user_column=actor.id", "--item_column=object.item.sku", "--time_column=at.seconds",
         "--rating_column=object.stars")


def write(path, records: list, broken: str = "") -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + broken)


def event(user, item, time, stars=4.5) -> dict:
    return {"actor": {"id": user, "name": "x"}, "object": {"item": {"sku": item}, "stars": stars},
            "at": {"seconds": time}}


@pytest.mark.parametrize("broken", ["", '\ufeff{"actor": {"id": "e"}, "object": {"item": {"sku": "q"}, "stars": 1}, '
                                        '"at": {"seconds": 13}}\n'], ids=["by DuckDB", "by Python"])
def test_nested_values_are_read_unchanged(tmp_path, broken):
    write(tmp_path / "interactions.jsonl", [event("0012", "00", 10), event(7, 3, 11, 5), event("d", "z.1", 12, None)],
          broken)
    events = [("0012", "00", 10, 4.5), ("7", "3", 11, 5.0)]
    with pytest.raises(DataError):  # the third has no rating
        read_raw(local(tmp_path, *FLAGS))
    write(tmp_path / "interactions.jsonl", [event("0012", "00", 10), event(7, 3, 11, 5)], broken)
    assert read_raw(local(tmp_path, *FLAGS))[0] == events + ([("e", "q", 13, 1.0)] if broken else [])


def test_a_literal_key_wins(tmp_path):
    records = [event("nested", "i", 10) | {"actor.id": "literal"}, event("nested", "i", 11)]
    write(tmp_path / "interactions.jsonl", records)
    assert [row[0] for row in read_raw(local(tmp_path, *FLAGS))[0]] == ["literal", "nested"]


def test_texts_of_items_may_be_nested_lists(tmp_path):
    write(tmp_path / "interactions.jsonl", [event("u", "i", 10)])
    write(tmp_path / "items.jsonl", [{"item": {"sku": "i"}, "text": {"name": "Pot", "lines": ["blue", "big"]}},
                                     {"item": {"sku": "j"}, "text": None}])
    options = local(tmp_path, *FLAGS, "--item_id_column=item.sku", "--title_column=text.name",
                    "--description_column=text.lines")
    first, second = items_of(options)
    assert (first["raw_id"], first["title"], first["description"]) == ("i", "Pot", "blue big")
    assert (second["raw_id"], second["title"], second["description"]) == ("j", "", "")


def test_an_unknown_nested_column_is_refused_with_the_nearest(tmp_path):
    write(tmp_path / "interactions.jsonl", [event("u", "i", 10)])
    refused(local(tmp_path, *FLAGS, "--user_column=actor.idd"), ConfigError, "--user_column actor.idd",
            names=["'actor.id'"], fix=["--user_column actor.id"])


def test_a_bad_nested_value_is_named_with_its_line(tmp_path):
    write(tmp_path / "interactions.jsonl", [event("u", "i", 10), event("u", "i", "soon")])
    refused(local(tmp_path, *FLAGS), DataError, f"{tmp_path / 'interactions.jsonl'}:2", names=["soon"])


def test_values_and_names_of_columns_by_hand():
    record = {"a": {"b": {"c": 1}, "d": None}, "a.b.c": None, "e.f": 2, "e": {"f": 3}}
    assert [value_at(record, name) for name in ("a.b.c", "a.d", "a.b.x", "a.b.c.d", "e.f", "x", "e")] == [
        1, None, None, None, 2, None, {"f": 3}]
    assert list(column_names(record)) == ["a", "a.b", "a.b.c", "a.d", "a.b.c", "e.f", "e", "e.f"]
