"""Missing values, code and contradictions in item records: counts, warnings and the texts that remain."""

import json
import logging
from pathlib import Path

import pytest

from common.artifacts import load_meta
from dataloader.process import process
from tests.dataloader.helpers import logged, mentions, table
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND

pytestmark = pytest.mark.slow
START = 1_393_545_600


def described(folder: Path, records: list[dict], *flags: str) -> tuple[list[tuple], dict]:
    """The items A, B, … with their titles and texts, and the meta of the interactions. Every item has two events."""
    ids = sorted({record["item_id"] for record in records if len(record["item_id"]) == 1})
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f"{user},{item},{START + n}\n" for user in "uv" for n, item in enumerate([*ids, ids[0], ids[0]])))
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    options = make_options(folder / "data", "--dataset=shop", f"--interactions={folder / 'events.csv'}",
                           f"--items={folder / 'items.jsonl'}", "--min_user_interactions=0",
                           "--min_item_interactions=0", *flags)
    process(options, COMMAND)
    return table(options.folder.items, 'raw_id, title, "text"'), load_meta(options.folder.interactions, "")


def titled(titles: dict[str, object], **fields) -> list[dict]:
    return [{"item_id": item, "title": title, **fields} for item, title in titles.items()]


def warned(caplog, *values: object) -> bool:
    return logged(caplog, *values, level=logging.WARNING)


def test_missing_values_are_counted_and_one_none_is_a_title(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    titles = {"A": "NaN", "B": "nan", "C": "None", "D": "\\N", "E": "<NA>", "F": float("nan"), "G": "null", "H": "Rope"}
    items, meta = described(tmp_path, titled(titles))
    assert [title for _item, title, _text in items] == ["A", "B", "None", "D", "E", "F", "null", "Rope"]
    assert meta["num_missing_values"] == {"title": 5}
    assert logged(caplog, 5, "title", "'A'", "'nan'", "--missing_values")


def test_none_in_two_records_of_a_field_is_missing(tmp_path):
    records = [*titled({"A": "None", "B": "None", "C": "null", "D": "Rope"}, description="None"),
               {"item_id": "E", "title": "Cup", "description": "NULL", "price": "None"}]
    items, meta = described(tmp_path, records, "--template={title} | {description} | {price}")
    assert [text for _item, _title, text in items] == ["A", "B", "null", "Rope", "Cup. NULL"]
    assert meta["num_missing_values"] == {"title": 2, "description": 4, "price": 1}


def test_the_texts_of_missing_values_can_be_changed(tmp_path):
    records = titled({"A": "N/A", "B": "None", "C": "None", "D": "nan"})
    items, meta = described(tmp_path, records, "--missing_values=N/A,-")
    assert [title for _item, title, _text in items] == ["A", "None", "None", "nan"]
    assert meta["num_missing_values"] == {"title": 1}
    items, meta = described(tmp_path, records, "--missing_values=")  # a changed setting: the tables are made again
    assert [title for _item, title, _text in items] == ["N/A", "None", "None", "nan"]
    assert meta["num_missing_values"] == {}


def test_objects_without_text_are_counted(tmp_path, caplog):
    items, meta = described(tmp_path, titled({"A": {"name": "Lamp"}, "B": {"id": 1}, "C": [{"id": 2}]}))
    assert [title for _item, title, _text in items] == ["Lamp", "B", "C"]
    assert meta["num_objects_without_text"] == {"title": 2}
    assert warned(caplog, "title", 2, "'B'")


def test_a_named_column_without_any_text_gives_a_warning(tmp_path, caplog):
    described(tmp_path, titled({"A": "Lamp", "B": "Rope"}, maker="nan", pic=None, note="new"), "--brand_column=maker",
              "--image_column=pic", "--description_column=note", "--template={title} {brand} {description}")
    assert warned(caplog, "--brand_column maker")
    assert warned(caplog, "--image_column pic")
    assert not warned(caplog, "--description_column")


CODE = ["function(){ var a = 1; } ", "var aPageStart = (new Date()).getTime(); ", ".x { color: red } ", ".aBox{} ",
        "#id .c > p { top: 0 } ", "body { margin: 0; } ", "$(document).ready(function () { ",
        "@media (max-width: 9px) ", "const f = x => { x } ", "jQuery(function nav(a, b) { "]
NO_CODE = ["Learn about functions (and variables), e.g. {sets}, with .NET. ", "Vol. 1 #2 {limited edition}: new ",
           "The zeta function (and its zeros), revised; see a@media.com and document.pdf "]


@pytest.mark.parametrize("description", ["", "A lamp"])
def test_long_titles_of_code_are_not_titles(tmp_path, caplog, description):
    code = {chr(65 + n): text * 30 for n, text in enumerate(CODE)}
    plain = {chr(75 + n): text * 30 for n, text in enumerate(NO_CODE)} | {"Y": "getTime()", "Z": "function(){} .x {"}
    items, meta = described(tmp_path, titled(code | plain, description=description))
    assert [title for _item, title, _text in items] == [*code, *map(str.strip, plain.values())]
    assert {text for _item, _title, text in items[:len(CODE)]} == ({description} if description else set(code))
    assert meta["num_titles_of_code"] == len(CODE)
    assert warned(caplog, len(CODE), "'A'")


@pytest.mark.parametrize(("records", "number", "values"), [
    # one property of an item per record
    (titled({"A": "red"}) + titled({"A": "Lamp"}) + titled({"B": "blue"}) + titled({"B": "Rope"}), 2, ("red", "Lamp")),
    (titled({"A": "Lamp"}, description="old") + titled({"A": "Lamp", "B": "Rope"}, description="new"), 1,
     ("old", "new")),
    # records that complete each other, or are equal
    (titled({"A": "Lamp"}) + titled({"A": "Lamp", "B": "Rope"}, description="new") + titled({"A": ""}), 0, ()),
    (titled({"A": "Lamp"}) + titled({"A": "nan", "B": "Rope"}) + titled({"A": "<b>Lamp</b> "}), 0, ()),
    # an item without interactions
    (titled({"A": "Lamp", "B": "Rope"}) + titled({"unused": "red"}) + titled({"unused": "blue"}), 0, ()),
])
def test_items_with_contradicting_records_are_counted(tmp_path, caplog, records, number, values):
    items, meta = described(tmp_path, records)
    assert items[0][1] == records[0]["title"]  # the first record with a text is used
    assert meta["num_contradicting_items"] == number
    assert warned(caplog, number, "'A'", *map(repr, values)) == (number > 0)


def test_without_unusual_values_nothing_is_logged(tmp_path, caplog):
    _items, meta = described(tmp_path, titled({"A": "Lamp", "B": "Rope"}, description="new"))
    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []
    assert {key: meta[key] for key in ("num_missing_values", "num_objects_without_text", "num_titles_of_code",
                                       "num_contradicting_items", "num_events_before_1990")} == {
        "num_missing_values": {}, "num_objects_without_text": {}, "num_titles_of_code": 0, "num_contradicting_items": 0,
        "num_events_before_1990": 0}
    assert mentions(str(meta["num_raw_items_with_record"]), 2)
