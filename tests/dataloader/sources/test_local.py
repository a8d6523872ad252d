"""A user's own files: every format, columns by flags, and errors for missing columns and files."""

import csv
import gzip
import json
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from common.errors import ConfigError, DataError
from dataloader.sources import local as reader
from tests.dataloader.helpers import mentions
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import ODD_IDS, events_of, items_of, local, read_raw, refused

ATOMIC_IDS = [raw_id for raw_id in ODD_IDS if not set(raw_id) & set("\t\r\n")]  # the format has no quotes


def write_csv(path: Path, header: list[str], rows: list[tuple], delimiter: str = ",") -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        # All in quotes: by itself the writer does not quote a carriage return.
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([header, *rows])


def write_json(path: Path, header: list[str], rows: list[tuple]) -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows)


def write_parquet(path: Path, header: list[str], rows: list[tuple]) -> None:
    duckdb.from_df(pd.DataFrame(rows, columns=header)).write_parquet(str(path))


def write_atomic(path: Path, header: list[str], rows: list[tuple]) -> None:
    kinds = {"rating": "float", "timestamp": "float", "title": "token_seq", "description": "token_seq"}
    typed = [f"{name}:{kinds.get(name, 'token')}" for name in header]
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [typed, *rows]), encoding="utf-8", newline="")


def write_tsv(path: Path, header: list[str], rows: list[tuple]) -> None:
    write_csv(path, header, rows, "\t")


WRITERS = {"csv": write_csv, "csv.gz": write_csv, "tsv": write_tsv, "tsv.gz": write_tsv, "jsonl": write_json,
           "json": write_json, "ndjson": write_json, "jsonl.gz": write_json, "parquet": write_parquet,
           "pq": write_parquet}
ENDINGS = pytest.mark.parametrize("ending", WRITERS)


def write_shop(folder: Path, ending: str, events: list[tuple], items: list[tuple] = (),
               columns=("user_id", "item_id", "timestamp", "rating"), item_columns=("item_id", "title", "description")):
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[ending](folder / f"interactions.{ending}", list(columns), events)
    if items:
        WRITERS[ending](folder / f"items.{ending}", list(item_columns), items)


@pytest.mark.slow
@ENDINGS
def test_ids_of_events_and_items_are_unchanged(tmp_path, ending):
    # In a text file, an id with a line break is refused.
    ids = [raw_id for raw_id in ODD_IDS if "sv" not in ending or not set(raw_id) & set("\r\n")]
    events = [(raw_id, raw_id, 10 + place, 5) for place, raw_id in enumerate(ids)]
    write_shop(tmp_path, ending, events, [(raw_id, f"no. {place}", "d") for place, raw_id in enumerate(ids)])
    found, records, _num_bad = read_raw(local(tmp_path))
    assert found == events
    assert [(record["raw_id"], record["title"]) for record in records] == [
        (raw_id, f"no. {place}") for place, raw_id in enumerate(ids)]


def test_atomic_files_of_recbole_are_read_without_column_types(tmp_path):
    events = [(raw_id, raw_id, 10 + place, 4.5) for place, raw_id in enumerate(ATOMIC_IDS)]
    write_atomic(tmp_path / "shop.inter", ["user_id", "item_id", "timestamp", "rating"], events)
    write_atomic(tmp_path / "shop.item", ["item_id", "title", "description"],
                 [(raw_id, 'say "hi"', "it's <b>so</b>") for raw_id in ATOMIC_IDS])
    options = local(tmp_path)
    assert reader.raw_paths(options) == [tmp_path / "shop.inter", tmp_path / "shop.item"]
    found, records, _num_bad = read_raw(options)
    assert found == events
    assert [(r["raw_id"], r["title"], r["description"]) for r in records] == [
        (raw_id, 'say "hi"', "it's so") for raw_id in ATOMIC_IDS]


@pytest.mark.parametrize("flag", ["venue", "venue:token"])
def test_an_atomic_column_may_be_named_with_its_type(tmp_path, flag):
    write_atomic(tmp_path / "shop.inter", ["user_id", "venue", "timestamp"], [("a", "x", 5)])
    assert events_of(local(tmp_path, "--item_column", flag)) == [("a", "x", 5, 1.0)]


@pytest.mark.slow
@ENDINGS
def test_flags_name_the_columns(tmp_path, ending):
    write_shop(tmp_path, ending, [("x", 7, "a", 3)], [("x", "Cup", "Acme", "Holds")],
               ("Article", "when", "who", "stars"), ("sku", "name", "maker", "about it"))
    options = local(tmp_path, "--user_column", "who", "--item_column=Article", "--time_column", "when",
                    "--rating_column", "stars", "--item_id_column", "sku", "--title_column", "name", "--brand_column",
                    "maker", "--description_column", "about it", "--template", "full")
    events, [record], _num_bad = read_raw(options)
    assert events == [("a", "x", 7, 3.0)]
    assert (record["raw_id"], record["title"], record["brand"], record["description"]) == ("x", "Cup", "Acme", "Holds")


@pytest.mark.slow
@ENDINGS
def test_item_column_also_names_the_id_of_items(tmp_path, ending):
    write_shop(tmp_path, ending, [("a", "x", 7)], [("x", "Cup")], ("user_id", "sku", "timestamp"), ("sku", "title"))
    events, [record], _num_bad = read_raw(local(tmp_path, "--item_column", "sku"))
    assert (events, record["raw_id"]) == ([("a", "x", 7, 1.0)], "x")


@pytest.mark.slow
@ENDINGS
def test_items_and_their_texts_and_ratings_are_optional(tmp_path, ending):
    write_shop(tmp_path / "one", ending, [("a", "x", 7)], columns=("user_id", "item_id", "timestamp"))
    assert read_raw(local(tmp_path / "one")) == ([("a", "x", 7, 1.0)], [], 0)
    write_shop(tmp_path / "two", ending, [("a", "x", 7, 5)], [("x",), ("y",)], item_columns=("item_id",))
    assert [record["raw_id"] for record in items_of(local(tmp_path / "two"))] == ["x", "y"]


@pytest.mark.slow
@ENDINGS
@pytest.mark.parametrize(("flags", "columns", "where", "names", "fix"), [
    ((), ("userid", "item_id", "timestamp"), "--user_column user_id", ["'userid'"], "--user_column userid"),
    ((), ("user_id", "item_id", "date"), "--time_column timestamp", ["date, item_id, user_id"], "--time_column NAME"),
    (("--item_column", "sku"), ("user_id", "SKU", "timestamp"), "--item_column sku", ["'SKU'"], "--item_column SKU"),
    (("--rating_column", "stars"), ("user_id", "item_id", "timestamp"), "--rating_column stars",
     ["item_id, timestamp, user_id"], "--rating_column NAME"),
])
def test_a_missing_column_is_refused_with_the_nearest_name(tmp_path, ending, flags, columns, where, names, fix):
    write_shop(tmp_path, ending, [("a", "x", 7)], columns=columns)
    refused(local(tmp_path, *flags), ConfigError, where, names=[tmp_path / f"interactions.{ending}", *names], fix=[fix])


@pytest.mark.slow
@ENDINGS
def test_a_missing_item_column_is_refused_if_needed_or_named(tmp_path, ending):
    write_shop(tmp_path, ending, [("a", "x", 7, 5)], [("x", "Cup", "d")], item_columns=("sku", "title", "about"))
    refused(local(tmp_path, "--item_id_column", "sku", "--description_column", "abuot"), ConfigError,
            "--description_column abuot", names=[tmp_path / f"items.{ending}", "'about'"],
            fix=["--description_column about"])
    refused(local(tmp_path), ConfigError, "--item_id_column item_id")


def test_a_repeated_name_of_a_needed_column_is_refused(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp,item_id,other,other\na,x,1,y,1,2\n")
    error = refused(local(tmp_path), ConfigError, f"{tmp_path}/interactions.csv:1")
    assert mentions(error.what, "item_id", 2)


@pytest.mark.parametrize("text", ["\ufeffuser_id,item_id,timestamp\r\na,x,1\r\n\r\nb,y,2\r\n",
                                  "user_id,item_id,timestamp\r\na,x,1\nb,y,2",
                                  'user_id,item_id,timestamp\n"a","x","1"\n\n\n"b","y",2,\n'])
def test_byte_order_marks_and_blank_lines_do_no_harm(tmp_path, text):
    (tmp_path / "interactions.csv").write_text(text, newline="")
    assert events_of(local(tmp_path)) == [("a", "x", 1, 1.0), ("b", "y", 2, 1.0)]


def test_a_line_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "interactions.csv").write_bytes("user_id,item_id,timestamp\na,x,1\nZoë,y,2\n".encode("latin-1"))
    refused(local(tmp_path), DataError, f"{tmp_path}/interactions.csv:3", what=["UTF-8"])


@pytest.mark.parametrize("name", ["events.xlsx", "events.csv.bz2", "events", "events.parquet.gz"])
def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / name))
    refused(options, ConfigError, f"--interactions {tmp_path}/{name}",
            names=[".csv, .tsv, .inter, .item, .jsonl, .json, .ndjson, .parquet, .pq"])


def test_flags_name_files_anywhere(tmp_path):
    folder = tmp_path / "it's [a] *folder*?"
    write_shop(folder, "csv", [("a", "x", 7, 5)], [("x", "Cup", "d")])
    (folder / "interactions.csv").rename(folder / "clicks ~ 日本.csv")
    (folder / "items.csv").rename(folder / "shop's items.csv")
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(folder / "clicks ~ 日本.csv"),
                           "--items", str(folder / "shop's items.csv"))
    events, [record], _num_bad = read_raw(options)
    assert (events, record["title"]) == ([("a", "x", 7, 5.0)], "Cup")


def test_a_folder_without_interactions_is_refused_with_expected_names(tmp_path):
    write_csv(tmp_path / "items.csv", ["item_id"], [("x",)])
    (tmp_path / "interactions.xlsx").write_text("x")
    refused(local(tmp_path), DataError, tmp_path, names=["interactions.*", "shop.inter"], fix=["--interactions FILE"])


def test_several_files_of_interactions_are_refused(tmp_path):
    write_shop(tmp_path, "csv", [("a", "x", 7, 5)])
    write_shop(tmp_path, "jsonl", [("a", "x", 7, 5)])
    refused(local(tmp_path), ConfigError, tmp_path, names=["interactions.csv", "interactions.jsonl"],
            fix=["--interactions FILE"])
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / "interactions.csv"))
    assert events_of(options) == [("a", "x", 7, 5.0)]


def test_metas_of_tables_are_not_tables(tmp_path):
    write_shop(tmp_path, "parquet", [("a", "x", 7, 5)])
    (tmp_path / "interactions.parquet.meta.json").write_text("{}")
    assert events_of(local(tmp_path)) == [("a", "x", 7, 5.0)]


def test_lists_of_parquet_and_json_are_joined(tmp_path):
    write_shop(tmp_path, "csv", [("a", "x", 7, 5)])
    duckdb.sql("""SELECT 'x' AS item_id, ['Holds', '5 oz'] AS description, [['a', 'b'], ['c']] AS categories
               """).write_parquet(str(tmp_path / "items.parquet"))
    [record] = items_of(local(tmp_path, "--template", "full"))
    assert (record["description"], record["categories"]) == ("Holds 5 oz", "a, b, c")


@pytest.mark.slow
def test_a_column_may_serve_two_fields(tmp_path):
    for ending in ("jsonl", "csv", "parquet"):
        write_shop(tmp_path / ending, ending, [("7", "x", 7)], [("x", "Cup")], ("user_id", "item_id", "timestamp"),
                   ("item_id", "name"))
        options = local(tmp_path / ending, "--title_column", "item_id", "--description_column", "name",
                        "--brand_column", "name", "--template", "{title} | {description} | {brand}")
        events, [record], _num_bad = read_raw(options)
        assert events == [("7", "x", 7, 1.0)]
        assert [record[key] for key in ("raw_id", "title", "description", "brand")] == ["x", "x", "Cup", "Cup"]
        assert read_raw(local(tmp_path / ending, "--user_column", "timestamp"))[0] == [("7", "x", 7, 1.0)]


def test_columns_may_differ_by_case_alone_except_in_json(tmp_path):
    for ending in ("csv", "jsonl"):
        write_shop(tmp_path / ending, ending, [("a", "x", 7)], columns=("ID", "id", "timestamp"))
    flags = ("--user_column", "ID", "--item_column", "id")
    assert events_of(local(tmp_path / "csv", *flags)) == [("a", "x", 7, 1.0)]
    assert mentions(str(refused(local(tmp_path / "jsonl", *flags), ConfigError)), "ID", "id")


def test_ids_may_be_numbers(tmp_path):
    write_parquet(tmp_path / "interactions.parquet", ["user_id", "item_id", "timestamp"], [(7, 2**60, 1)])
    write_json(tmp_path / "items.jsonl", ["item_id", "title"], [(2**60, 5)])
    events, [record], _num_bad = read_raw(local(tmp_path))
    assert events == [("7", str(2**60), 1, 1.0)]
    assert (record["raw_id"], record["title"]) == (str(2**60), "5")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_folder_named_like_a_pattern_is_read_alone(tmp_path, ending):
    wanted = tmp_path / "user_id=z" / "fold[12]*"
    for number, folder in enumerate((wanted.parent / "fold1", wanted.parent / "fold2x", wanted)):
        write_shop(folder, ending, [("a", f"item {number}", 7, 5)])
    options = make_options(tmp_path / "data", "--dataset", "shop", "--raw_dir", str(wanted))
    assert [event[:2] for event in events_of(options)] == [("a", "item 2")]
