"""The data card of a dataset: numbers worked out by hand, and when it is written."""

import json
import logging
import re
from pathlib import Path

from common.artifacts import DatasetFolder, dataset_line, load_meta
from common.publishing import meta_path
from dataloader.card import card
from dataloader.fusion import fuse
from dataloader.process import process
from dataloader.text_embedding import embed
from tests.dataloader.helpers import make_options, process_options
from tests.dataloader.processing import COMMAND, run, version
from tests.text import lines_with

DAY = 86_400
# Users with 4, 3 and 1 events. "a" buys x again in valid and in test; the test event of "b" is the only one of "new".
EVENTS = [("a", "x", DAY), ("a", "y", DAY), ("a", "x", 2 * DAY), ("a", "x", 2 * DAY), ("b", "y", DAY),
          ("b", "x", 2 * DAY), ("b", "new", 40 * DAY), ("c", "y", DAY), ("d", "low", DAY, 1.0)]
METADATA = [repr({"asin": asin, "title": title}) for asin, title in (("x", "Cup"), ("x", "Mug"), ("unsold", "Pot"))]


def made(tmp_path: Path, *flags: str) -> tuple[DatasetFolder, str]:
    folder = run(tmp_path, EVENTS, "--min_rating=2", *flags, metadata=METADATA).folder
    return folder, folder.card.read_text(encoding="utf-8")


def test_the_card_has_numbers_worked_out_by_hand(tmp_path):
    _folder, text = made(tmp_path)
    assert lines_with(text, "3 users", "3 items", "8 interactions")
    assert lines_with(text, "events read", 9)
    assert lines_with(text, "--min_rating 2", 1, 8)
    assert lines_with(text, "1970-01-02 to 1970-02-10")
    assert lines_with(text, "25 %", "same time")  # y and the second of the two x of "a": 2 of 8 events
    assert lines_with(text, "1 events", "exact duplicates")
    assert lines_with(text, "train", 4, "50 %")
    assert lines_with(text, "valid", 2, "25 %", "50 %", 0)
    assert lines_with(text, "test", 2, "25 %", "50 %", 1)
    assert lines_with(text, "items without text", 2)
    assert lines_with(text, "further records", 1)
    assert lines_with(text, "items before the filters", 4)
    assert lines_with(text, "items before the filters that have a record", 1)
    assert lines_with(text, 9, 1990)
    assert lines_with(text, "records of items without interactions", 1)
    assert lines_with(text, "interactions", "reviews_Baby_5.json.gz")
    assert lines_with(text, COMMAND)


def test_a_temporal_split_is_named_on_the_card(tmp_path):
    _folder, text = made(tmp_path, "--split=temporal", "--split_dates=1970-01-03,1970-01-05")
    assert lines_with(text, "temporal")
    assert lines_with(text, "valid", 3, "38 %", "67 %")  # two of the three events are the x of "a"
    assert lines_with(text, "test", 1, "12 %", "0 %", 1)


def test_the_card_is_renewed_with_the_tables_only(tmp_path):
    folder, first = made(tmp_path)
    before = version(folder.card)
    made(tmp_path)
    assert version(folder.card) == before
    second = made(tmp_path, "--duplicates=exact")[1]
    assert lines_with(second, "--duplicates exact", 1, 7)
    assert second != first
    assert not folder.card.with_name("card.md.meta.json").exists()


def test_a_missing_card_is_written_again(tmp_path):
    folder, text = made(tmp_path)
    folder.card.unlink()
    tables = [version(path) for path in (folder.interactions, folder.items, folder.users)]
    assert made(tmp_path)[1] == text
    assert [version(path) for path in (folder.interactions, folder.items, folder.users)] == tables


def test_a_meta_of_an_earlier_version_lacks_some_lines(tmp_path):
    folder, text = made(tmp_path)
    meta = load_meta(folder.interactions, "")
    for key in ("num_repeats", "num_cold_items"):
        del meta[key]
    del meta["statistics"]["num_equal_times"]
    shorter = card(folder.name, meta)
    assert not re.search("repeats|cold|same time as", shorter)
    assert lines_with(shorter, "valid", 2, "25 %")


def test_later_steps_print_one_line_of_facts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, _text = made(tmp_path)
    options = make_options(tmp_path / "data", "--text_model=tfidf", "--suffix=words")
    embed(options.text, COMMAND)
    fuse(make_options(tmp_path / "data", "--suffix=cf").fusion, COMMAND)
    lines = [message for message in caplog.messages if dataset_line(folder) in message]
    assert len(lines) == 2
    assert all(lines_with(line, "3 users", "3 items", "8 interactions", "50 %", "1 cold", "2 items") for line in lines)


def test_adopted_tables_get_no_card(tmp_path):
    folder, _text = made(tmp_path)
    folder.card.unlink()
    for path in (folder.interactions, folder.items, folder.users):
        meta = json.loads(meta_path(path).read_text())
        kept = {key: meta[key] for key in ("schema_version", "sha256", "size", "inputs", "items_sha256", "num_users",
                                           "num_items", "num_interactions")}
        meta_path(path).write_text(json.dumps(kept | {"settings": {"source": "local", "adopted": True}}))
    process(process_options(tmp_path / "data", "--dataset=Baby", "--source=local"), COMMAND)
    assert not folder.card.exists()
