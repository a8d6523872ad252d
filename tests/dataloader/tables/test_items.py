"""Item records: the plain text of each field, the image address, and bad records."""

import html
import json
import re
import unicodedata

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from dataloader.readers.lines import MAX_LINE
from dataloader.sources import local as reader
from dataloader.tables import cells, items
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions
from tests.dataloader.reading import bad_lines, items_of, listed, local, read_raw, refused

ALL = ("--template", "full")


def catalogue(folder, records, *flags):
    """A shop with these item records as lines of JSON, and one event."""
    (folder / "interactions.jsonl").write_text('{"user_id": "a", "item_id": "x", "timestamp": 1}\n')
    (folder / "items.jsonl").write_text("".join(
        f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return local(folder, *flags)


def field_of(folder, name, value) -> str:
    [record] = items_of(catalogue(folder, [{"item_id": "x", name: value}], *ALL))
    return record["image_url" if name == "image" else name]


TEXTS = [
    ("Cup <b>for</b> two<br/>babies", "Cup for two babies"),
    ("Salt &amp; Pepper &quot;set&quot; &#39;S&#39; &#x27;X&#x27;", "Salt & Pepper \"set\" 'S' 'X'"),
    ("&lt;i&gt;Soft&lt;/i&gt; blanket", "Soft blanket"),
    ("caf&eacute; &trade; 5&nbsp;oz &hellip;", "café ™ 5 oz …"),
    ("AT&T, R&D; a && b &unknown; &#0; &", "AT&T, R&D; a && b &unknown; \ufffd &"),
    ("<script>alert('x')</script>Bib", "alert('x') Bib"),
    ("<!-- var a = 1 -->Bib", "Bib"),
    ("<!DOCTYPE html><?xml version='1'?><a href=\"http://a/?b=1&amp;c\" class='d'>Bib</a >", "Bib"),
    ("width < 5 in and height > 3 in", "width < 5 in and height > 3 in"),
    ("a<5 and b>3; x <= y; <- ->; <3; 1 <2> 3; <>", "a<5 and b>3; x <= y; <- ->; <3; 1 <2> 3; <>"),
    ("I <3 babies", "I <3 babies"),
    ("if a <b then <i>c</i> > d", "if a <b then c > d"),
    ("a <b" + " long" * 200 + "> c", "a <b" + " long" * 200 + "> c"),
    ("unclosed <b tag", "unclosed <b tag"),
    ("בקבוק 🍼 für Zoë\u2028new line", "בקבוק 🍼 für Zoë new line"),
    ("\u202eolleh\u202c e\u0301 \u00e9 \ufb01 \u200d\u200b", "\u202eolleh\u202c e\u0301 \u00e9 \ufb01 \u200d\u200b"),
    ("half a pair \ud800 stays readable", "half a pair ? stays readable"),
    ("  in\tfront\nand  behind \r\n", "in front and behind"),
    ("a\u00a0b\u2003c\u3000d\u1680e\u202ff\u205fg\u2028h\u2029i\x85j\x0bk\x1cl", "a b c d e f g h i j k l"),
    ("\u00a0\u00a0", ""),
    ("", ""),
    ("<br>", ""),
    ("NA", "NA"),
    (5, "5"), (1.5, "1.5"), (True, "true"), (None, ""), ({"a": "b"}, ""), ([], ""),
    (["First part.", "", None, "Second\n part."], "First part. Second part."),
    ([["One", "Two"], [], ["Three"]], "One Two Three"),
    (["Half <b", ">bold</b>"], "Half bold"),
]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["title", "description"])
def test_texts_lose_their_markup_and_nothing_else(tmp_path, field):
    records = [{"item_id": f"x{n}", field: raw} for n, (raw, _clean) in enumerate(TEXTS)]
    found = [record[field] for record in items_of(catalogue(tmp_path, records, *ALL))]
    assert found == [clean for _raw, clean in TEXTS]


@pytest.mark.slow
@pytest.mark.parametrize(("raw", "clean"), [
    ([["Baby", "Feeding &amp; Cups"], ["Gifts"]], "Baby, Feeding & Cups, Gifts"), (["Baby", "", "Cups"], "Baby, Cups"),
    ("Baby > Cups", "Baby > Cups"), ([[]], ""), ([["Only"]], "Only"), (["a", ["b"]], 'a, ["b"]')])
def test_categories_have_commas_between_them(tmp_path, raw, clean):
    assert field_of(tmp_path, "categories", raw) == clean


@pytest.mark.slow
@pytest.mark.parametrize(("raw", "clean"), [
    ("$12.99", "$12.99"), ("12.99", "12.99"), (12.99, "12.99"), (7, "7"), ("$1,299.00", "$1,299.00"),
    ("$5.99 - $12.99", "$5.99 - $12.99"), (" $5.99&nbsp;-&nbsp;$12.99 ", "$5.99 - $12.99"), ("$5-$9", "$5-$9"),
    (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget", ""), ("from 12.99", ""), ("None", ""),
    ("", ""), (None, ""), ("$", ""), ("<span>$3</span>", "$3"), (["$3"], "$3"), ("$12.99 $13", "")])
def test_a_price_is_an_amount_or_a_range(tmp_path, raw, clean):
    assert field_of(tmp_path, "price", raw) == clean


@pytest.mark.slow
@pytest.mark.parametrize(("raw", "url"), [
    ("http://a/1.jpg", "http://a/1.jpg"), (["http://a/1.jpg", "http://a/2.jpg"], "http://a/1.jpg"),
    ([{"large": "http://a/l.jpg"}], "http://a/l.jpg"), ([{"other": 1}], None), ([["http://a/1.jpg"]], None),
    ([], None), ("", None), (None, None), ({"a": "b"}, None), (5, None), ([None], None)])
def test_the_image_address_is_the_first_one(tmp_path, raw, url):
    assert field_of(tmp_path, "image", raw) == url


SPACES = re.compile(r"[\s\x85]+")
PLAIN_TEXTS = f"(SELECT *, {cells.plain('title')} AS title_plain FROM raw)"
PLAIN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.slow
@PLAIN
@given(st.lists(st.text(st.sampled_from("ab<>/&; #x\t\n\u00a0\u2003\x1d\x85é🍼3") | st.characters(), max_size=12),
                min_size=9, max_size=9))
@example(["&lt;b&gt;", "a &nbsp; b", "<b>&amp;lt;</b>", "\u180e", "\u200b", "\x00", "\x1b[0m", "&#x85;", "&#55296;"])
def test_cleaning_is_unescaping_then_dropping_tags_then_single_blanks(texts):
    """Compare with Python, where blanks are those of `str.split`."""
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    with duckdb.connect() as connection:
        connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
        connection.execute("CREATE TABLE raw (raw_id INTEGER, title JSON)")
        connection.executemany("INSERT INTO raw VALUES (?, to_json(?::VARCHAR))", list(enumerate(texts)))
        rows = connection.execute(f"SELECT {cells.clean('title')} FROM {PLAIN_TEXTS} ORDER BY raw_id").fetchall()
    found = [row[0] for row in rows]
    tag = re.compile(r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>")
    assert found == [" ".join(tag.sub(" ", html.unescape(text)).split()) for text in texts]


def test_every_blank_of_unicode_is_one():
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(blanks) > 25
    assert {unicodedata.category(blank) for blank in blanks} <= {"Zs", "Zl", "Zp", "Cc"}
    with duckdb.connect() as connection:
        connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
        connection.execute("CREATE TABLE raw AS SELECT to_json(unnest(?)) AS title",
                           [[f"{b}a{b}b{b}{b}c d {b}e{b} " for b in blanks]])
        found = connection.execute(f"SELECT {cells.clean('title')} FROM {PLAIN_TEXTS}").fetchall()
    assert found == [("a b c d e",)] * len(blanks)


def test_only_the_title_and_template_fields_are_read(tmp_path):
    record = {"item_id": "x", "title": "Cup", "brand": "B", "price": 3, "features": ["new"]}
    [found] = items_of(catalogue(tmp_path, [record], "--template", "{brand} | {features}"))
    assert found == {"raw_id": "x", "title": "Cup", "brand": "B", "features": "new", "image_url": None}


def test_unused_records_are_counted_and_not_cleaned(tmp_path):
    records = [{"item_id": f"x{n}", "title": f"Title {n}"} for n in range(1000)]
    _events, found, _num_bad = read_raw(catalogue(tmp_path, records), "SELECT 'x7' UNION ALL SELECT 'x999'")
    assert [record["raw_id"] for record in found] == [f"x{n}" for n in range(1000)]
    titles = {record["raw_id"]: record["title"] for record in found if record["title"]}
    assert titles["x7"] == "Title 7"
    assert titles["x999"] == "Title 999"
    assert len(titles) < 100  # these two, and a few with the same hash
    assert all(title == raw_id.replace("x", "Title ") for raw_id, title in titles.items())


def test_no_record_is_cleaned_if_none_is_wanted(tmp_path):
    _events, found, _num_bad = read_raw(catalogue(tmp_path, [{"item_id": "x", "title": "t"}]), "SELECT 'y' WHERE false")
    assert [(record["raw_id"], record["title"], record["image_url"]) for record in found] == [("x", "", None)]


@pytest.mark.slow
def test_records_keep_the_order_of_a_large_file(tmp_path):
    catalogue(tmp_path, [])
    duckdb.execute(f"""COPY (SELECT (i % 200000)::VARCHAR AS item_id, 'no. ' || i AS title FROM range(400000) r(i))
                       TO '{tmp_path}/items.jsonl' (FORMAT json)""")
    found = read_raw(local(tmp_path), "SELECT i::VARCHAR FROM range(200000) r(i)")[1]
    assert [record["title"] for record in found] == [f"no. {n}" for n in range(400_000)]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "values"), [
    ("no record", []),
    ('{"title": "no id"}', ["item_id"]),
    ('{"item_id": "", "title": "empty"}', ["item_id"]),
    ('{"item_id": null}', ["item_id"]),
    ('{"item_id": "half \\ud800"}', ["'half \\ud800'"]),
    ('{"item_id": "' + "x" * 10_001 + '"}', [f"'{'x' * 20}'", "10,001", "10,000"]),
    ('{"item_id": ' + "[" * 100_000 + "]" * 100_000 + "}", []),
    ('{"item_id": "y", "title": ' + "[" * 100_000 + "]" * 100_000 + "}", []),
    ('{"item_id": "y", "title": [[["deep"]]]}', []),
])
def test_a_line_without_an_item_is_named_or_skipped(tmp_path, line, values):
    records = [{"item_id": f"x{n}", "title": "t"} for n in range(99)]
    records.insert(1, line)
    options = catalogue(tmp_path, records)
    error = refused(options, DataError, f"{tmp_path}/items.jsonl:2")
    assert mentions(error.what, *values)
    assert len(str(error)) < 700
    events, found, num_bad = read_raw(local(tmp_path, "--bad_lines", "skip"))
    assert (len(events), [record["raw_id"] for record in found], num_bad) == (1, [f"x{n}" for n in range(99)], 1)
    [one] = listed(options)
    assert one == {"where": f"{tmp_path}/items.jsonl:2", "reason": error.what, "excerpt": line[:80]}


@pytest.mark.slow
def test_a_huge_line_is_listed_and_affects_no_other(tmp_path):
    line = '{"item_id": "y", "title": "' + "x" * 70_000_000 + '"}'
    records = [{"item_id": f"x{n}", "title": "t"} for n in range(99)]
    options = catalogue(tmp_path, [*records[:50], line, *records[50:]], "--bad_lines", "skip")
    assert [record["raw_id"] for record in items_of(options)] == [f"x{n}" for n in range(99)]
    [fault] = listed(options)
    assert (fault["where"], fault["excerpt"]) == (f"{tmp_path}/items.jsonl:51", line[:80])
    assert mentions(fault["reason"], f"{MAX_LINE:,}")


def test_lines_of_both_files_are_listed_together(tmp_path):
    options = catalogue(tmp_path, ["no record", *({"item_id": f"x{n}"} for n in range(99))], "--bad_lines", "skip")
    (tmp_path / "interactions.jsonl").write_text(
        "no record\n" + '{"user_id": "a", "item_id": "x", "timestamp": 1}\n' * 99)
    assert read_raw(options)[2] == 2
    assert [one["where"] for one in listed(options)] == [
        f"{tmp_path}/interactions.jsonl:1", f"{tmp_path}/items.jsonl:1"]
    assert bad_lines(options).name == "bad_lines.jsonl"


@pytest.mark.slow
def test_a_huge_description_is_cut_to_a_million_characters(tmp_path):
    records = [{"item_id": "x", "description": "wörd " * 2_000_000}, {"item_id": "y", "description": "short"}]
    found = items_of(catalogue(tmp_path, records))
    assert [len(record["description"]) for record in found] == [999_999, 5]  # the last blank is removed
    assert set(found[0]["description"].split()) == {"wörd"}


@pytest.mark.slow
def test_the_memory_for_long_texts_is_bounded(tmp_path):
    line = json.dumps({"item_id": "x", "description": "a &amp; <b>c</b> " * 600_000})
    catalogue(tmp_path, [line] * 20)
    with Workspace(tmp_path / "work", "1GB") as work:
        options = local(tmp_path)
        tables = reader.raw_tables(options, reader.raw_paths(options), work)
        items.read_items(work, tables[1], options, "SELECT 'x'", tmp_path / "log")
        assert work.run("SELECT DISTINCT length(description) > 300000 FROM metadata") == [(True,)]
