"""Values of item records that are not plain texts: missing values, lists in a text, and objects."""

import json

import duckdb
import pytest

from dataloader.tables import cells
from dataloader.tables.items import _query
from dataloader.workspace import Workspace
from tests.dataloader.reading import items_of, local


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with Workspace(tmp_path_factory.mktemp("cells") / ".work", "1GB") as work:
        cells.register(work)
        yield work


def read(work: Workspace, field: str, values: list[str | None], missing=None) -> list[tuple]:
    """The text (or URL) and the note of each of these values, which are JSON."""
    fields, column = ([], "image_url") if field == "image" else ([field], field)
    rows = f"SELECT 'x' AS item, value::JSON AS {field}" + (", NULL::JSON AS image" if fields else "")
    query = _query(fields, missing, "true").replace("{rows}", f"({rows} FROM (SELECT unnest(?::VARCHAR[]) AS value))")
    return work.run(f"SELECT {column}, {field}_note FROM ({query})", values)


TOKENS = ["\\N", "nan", "NaN", "<NA>", "None", "null", "NULL"]


def test_values_that_mean_missing_have_no_text_and_a_note(work):
    assert read(work, "title", [*map(json.dumps, TOKENS), "NaN"]) == [("", token) for token in [*TOKENS, "NaN"]]
    assert read(work, "image", ['"nan"', "NaN", None]) == [(None, "nan"), (None, "NaN"), (None, None)]


@pytest.mark.parametrize("title", ["Nan", "NAN", " nan", "none", "N/A", "-", "nan nan", "Nanny", "NA", "\\\\N"])
def test_only_the_exact_whole_value_is_missing(work, title):
    assert read(work, "title", [json.dumps(title)]) == [(title.strip(), None)]


def test_other_texts_can_mean_missing(work):
    values = ["N/A", "–", "nan", "None", "a,b"]
    for ascii in (True, False):
        assert read(work, "title", [json.dumps(v, ensure_ascii=ascii) for v in values], ("N/A", "–")) == [
            ("", "N/A"), ("", "–"), ("nan", None), ("None", None), ("a,b", None)]
    assert read(work, "title", ['"nan"', '"\\\\N"', "NaN"], ()) == [("nan", None), ("\\N", None), ("", "NaN")]


@pytest.mark.parametrize(("cell", "text"), [
    ("['x', 'y']", "x, y"), ('["x", "y"]', "x, y"), ("['it\\'s', \"a\"]", "it's, a"), ('["caf\\u00e9"]', "café"),
    ("['a\\nb']", "a b"), ("['Salt &amp; Pepper', '<b>new</b>']", "Salt & Pepper, new"), ("['x', '']", "x"), ("[]", ""),
    ("[ 'x' ,'y' ]", "x, y"), ('["Home", "\U0001f37c"]', "Home, \U0001f37c"),
    # lists of NumPy and of objects, and objects
    ("['x' 'y']", "x, y"), ("[{'id': 28, 'name': 'Action'}, 'x']", "Action, x"),
    ('[{"name": "Action", "id": null}]', "Action"), ("{'id': 1, 'name': 'x', 'b': None}", "x"), ("{Live} x", None),
    ("{x}", None),
    # all of it must be a list of texts and objects
    ("['x', 'y'] and more", None), ("[Live] x", None), ("[1, 2]", None), ("['x', None]", None), ("['x' 'y' 5]", None),
    ("[['x']]", None), ("['x'", None), ("x, y", None), ("('x', 'y')", None), ("[x]", None), ("['x'][0]", None),
    ("[" * 5000 + "]" * 5000, None), ("[__import__('os')]", None), ('["\\ud800"]', "?"),
])
def test_a_list_in_a_text_must_have_only_texts(work, cell, text):
    assert read(work, "categories", [json.dumps(cell)]) == [(cell if text is None else text, None)]


@pytest.mark.parametrize(("value", "text"), [
    ({"name": "x"}, "x"), ({"title": "x"}, "x"), ({"value": 5}, "5"), ({"text": "a &amp; <b>b</b>"}, "a & b"),
    ({"text": "b", "name": "a"}, "a"), ({"name": "", "title": None, "value": 1.5}, "1.5"),
    ([{"name": "x"}, {"title": "y"}], "x y"), (["a", {"name": "b"}, "{c}"], "a b {c}"),
    ([[{"name": "x"}], ["y"]], "x y"), ([{"id": 1}, {"name": "x"}], "x"),
])
def test_an_object_gives_the_text_of_its_usual_field(work, value, text):
    assert read(work, "title", [json.dumps(value, separators=(",", ":"))]) == [(text, None)]


@pytest.mark.parametrize("value", [{"id": 1}, {}, [{"id": 1}, {"id": 2}], {"name": {"en": "x"}}, {"name": ["x"]},
                                   {"name": ""}, "[{'id': 1}]", '[{"id": 1}]', "{'id': 1}"])
def test_an_object_without_a_text_has_a_note(work, value):
    raw = json.dumps(value, separators=(",", ":"))
    assert read(work, "title", [raw]) == [("", cells.NO_TEXT)]
    assert read(work, "image", [raw]) == [(None, cells.NO_TEXT)]


@pytest.mark.parametrize(("value", "url"), [
    ({"large": ["http://a/l", "http://b/l"], "hi_res": [None], "thumb": ["http://a/t"]}, "http://a/l"),
    ({"large": [None], "hi_res": ["http://a/h"]}, "http://a/h"), ({"thumb": "http://a/t"}, "http://a/t"),
    ({"url": "http://a/u"}, "http://a/u"), ([{"url": "http://a/u"}, {"url": "http://b/u"}], "http://a/u"),
    ("['http://a/1', 'http://a/2']", "http://a/1"), ('["http://a/1"]', "http://a/1"),
])
def test_images_in_objects_of_lists_are_found(work, value, url):
    assert read(work, "image", [json.dumps(value, separators=(",", ":"))]) == [(url, None)]


def test_parquet_structs_and_numbers_are_read_like_json(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,A,1\n")
    duckdb.sql("""SELECT 'A' AS item_id, {'name': 'Lamp'} AS title, 'nan'::DOUBLE AS price,
                         '[''x'', ''y'']' AS categories,
                         {'large': ['http://a/l'], 'hi_res': [NULL]} AS image""").write_parquet(
        str(tmp_path / "items.parquet"))
    [record] = items_of(local(tmp_path, "--template=full"))
    assert record == {"raw_id": "A", "title": "Lamp", "price": "", "categories": "x, y", "image_url": "http://a/l"}
