"""Amazon's raw files of 2014 and 2018, read to events and item records."""

import gzip
import json

import duckdb
import pytest

from common.errors import DataError
from dataloader.sources import amazon
from tests.dataloader.helpers import review, write_baby, write_gz

ODD_IDS = ["0001048791", "NA", "null", "00", "1e5", "Ünï-日本-🍼", " two  spaces ", "tab\there", "line\nbreak",
           "A" * 5000]
GOOD = json.dumps({"asin": "B1", "title": "Good"})


def read_events(raw) -> list[tuple]:
    connection = duckdb.connect()
    amazon.read(amazon.raw_paths(raw, "Baby"), connection)
    return connection.execute("""SELECT raw_user, raw_item, "timestamp", rating FROM events ORDER BY line""").fetchall()


def read_records(raw) -> list[dict]:
    return list(amazon.read(amazon.raw_paths(raw, "Baby"), duckdb.connect()))


def refused(read, raw) -> DataError:
    with pytest.raises(DataError) as error:
        read(raw)
    assert error.value.exit_code == 3
    return error.value


RECORD = {"asin": "0001048791", "title": "Baby's \"first\" cup", "description": "Holds 5 oz", "brand": "Cups & Co"}


@pytest.mark.parametrize("write", [repr, json.dumps], ids=["2014", "2018"])
def test_metadata_are_read_as_python_literals_and_as_json(tmp_path, write):
    write_baby(tmp_path, [], [write(RECORD), write({"asin": "B2"})])
    assert read_records(tmp_path) == [
        {"raw_id": "0001048791", "title": "Baby's \"first\" cup", "description": "Holds 5 oz", "brand": "Cups & Co"},
        {"raw_id": "B2", "title": "", "description": "", "brand": ""}]


@pytest.mark.parametrize("write", [repr, json.dumps], ids=["2014", "2018"])
@pytest.mark.parametrize("raw_id", ODD_IDS, ids=[ascii(i[:20]) for i in ODD_IDS])
def test_ids_of_items_are_kept_to_the_byte(tmp_path, write, raw_id):
    write_baby(tmp_path, [], [write({"asin": raw_id, "title": "t"})])
    assert read_records(tmp_path)[0]["raw_id"] == raw_id


def record_of(raw, **fields) -> dict:
    write_baby(raw, [], [json.dumps({"asin": "B1", **fields})])
    return read_records(raw)[0]


def test_the_parts_of_a_description_are_joined(tmp_path):
    record = record_of(tmp_path, description=["First part.", "", "Second\n part."])
    assert record["description"] == "First part. Second part."


@pytest.mark.parametrize(("raw", "clean"), [
    ("Cup <b>for</b> two<br/>babies", "Cup for two babies"),
    ("Salt &amp; Pepper &quot;set&quot; &#39;S&#39;", "Salt & Pepper \"set\" 'S'"),
    ("&lt;i&gt;Soft&lt;/i&gt; blanket", "Soft blanket"),
    ("<script>alert('x')</script>Bib", "alert('x') Bib"),
    ("<!-- var a = 1 -->Bib", "Bib"),
    ("width < 5 in and height > 3 in", "width < 5 in and height > 3 in"),
    ("I <3 babies", "I <3 babies"),
    ("בקבוק 🍼 für Zoë\u2028new line", "בקבוק 🍼 für Zoë new line"),
    ("half a pair \ud800 stays readable", "half a pair ? stays readable"),
])
def test_texts_lose_their_markup_and_nothing_else(tmp_path, raw, clean):
    assert record_of(tmp_path, title=raw)["title"] == clean


def test_a_hostile_literal_is_refused_by_line_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    hostile = f"{{'asin': __import__('os').system('touch {canary}'), 'title': 'x'}}"
    write_baby(tmp_path, [], [repr(RECORD), hostile])
    error = refused(read_records, tmp_path)
    assert str(error).startswith(f"{tmp_path}/meta_Baby.json.gz:2: is not an item record")
    assert "__import__" in str(error)
    assert not canary.exists()


@pytest.mark.parametrize(("line", "cause"), [
    ("{'title': 'no key'}", "asin"),
    ("{'asin': 'B1', 'title': ", "never closed"),
    ("['B1', 'a list']", "list"),
    ("-" * 100_000 + "1", ""),
    ("[" * 100_000, "too many nested"),
])
def test_a_line_that_is_no_record_is_named(tmp_path, line, cause):
    write_baby(tmp_path, [], [repr(RECORD), "", line])
    error = refused(read_records, tmp_path)
    assert f"{tmp_path}/meta_Baby.json.gz:3: is not an item record" in str(error)
    assert cause in error.why
    assert len(str(error)) < 600


def test_a_deeply_nested_line_of_json_is_named(tmp_path):
    write_baby(tmp_path, [], [GOOD, '{"asin": ' + "[" * 100_000])
    assert "meta_Baby.json.gz:2: is not an item record" in str(refused(read_records, tmp_path))


@pytest.mark.parametrize("number", [1, 2])
def test_a_line_that_is_not_utf8_is_named(tmp_path, number):
    write_baby(tmp_path, [])
    lines = [GOOD.encode()] * 2
    lines.insert(number - 1, b'{"asin": "\xff"}')
    (tmp_path / "meta_Baby.json.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    error = refused(read_records, tmp_path)
    assert f"meta_Baby.json.gz:{number}: is not an item record" in str(error)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    write_baby(tmp_path, [])
    (tmp_path / "meta_Baby.json.gz").write_bytes(gzip.compress(f"\ufeff{GOOD}\r\n{GOOD}\r\n".encode()))
    assert [record["title"] for record in read_records(tmp_path)] == ["Good", "Good"]


def cut_short(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def test_a_truncated_metadata_file_names_the_line_where_it_ends(tmp_path):
    write_baby(tmp_path, [], [GOOD] * 3)
    cut_short(tmp_path / "meta_Baby.json.gz", 4)
    error = refused(read_records, tmp_path)
    assert str(error).startswith(f"{tmp_path}/meta_Baby.json.gz:4: the file is damaged from here on")
    assert "--force" in error.fix


def test_ids_of_users_and_items_are_kept_to_the_byte(tmp_path):
    events = [(raw_id, raw_id, time) for time, raw_id in enumerate(ODD_IDS)]
    write_baby(tmp_path, events)
    assert read_events(tmp_path) == [(*event, 5.0) for event in events]


def test_every_rating_counts_and_is_kept(tmp_path):
    write_baby(tmp_path, [])
    write_gz(tmp_path / "reviews_Baby_5.json.gz", [review("a", "x", 7, rating) for rating in (1.0, 3.5, 5.0)])
    assert [rating for *_, rating in read_events(tmp_path)] == [1.0, 3.5, 5.0]


@pytest.mark.parametrize("line", ['{"reviewerID": "a", "asin": ', "no json", '["a", "b"]', '{"overall": 5} {}',
                                  '{"reviewerID": "a", "asin": "b", "overall": "five", "unixReviewTime": 1}'])
def test_a_malformed_review_is_an_error_that_names_the_file(tmp_path, line):
    write_baby(tmp_path, [])
    write_gz(tmp_path / "reviews_Baby_5.json.gz", [review("a", "x", 1), line, review("a", "y", 2)])
    error = refused(read_events, tmp_path)
    assert f"{tmp_path}/reviews_Baby_5.json.gz" in str(error)
    assert "--force" in error.fix


def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path):
    write_baby(tmp_path, [])
    write_gz(tmp_path / "reviews_Baby_5.json.gz", [review("a", "x", 1), review("a", "y", 2), "no json"])
    assert str(refused(read_events, tmp_path)).startswith(f"{tmp_path}/reviews_Baby_5.json.gz:3: ")


@pytest.mark.parametrize("key", ["reviewerID", "asin", "overall", "unixReviewTime"])
@pytest.mark.parametrize("how", ["left out", "null"])
def test_a_review_without_a_field_is_named_by_its_line(tmp_path, key, how):
    whole = json.loads(review("a", "y", 2))
    lacking = {**whole, key: None} if how == "null" else {k: v for k, v in whole.items() if k != key}
    write_baby(tmp_path, [])
    write_gz(tmp_path / "reviews_Baby_5.json.gz", [review("a", "x", 1), json.dumps(lacking)])
    assert str(refused(read_events, tmp_path)).startswith(f"{tmp_path}/reviews_Baby_5.json.gz:2: lacks a field")


@pytest.mark.parametrize("rating", ["NaN", "Infinity"])
def test_a_rating_that_is_no_finite_number_is_refused(tmp_path, rating):
    write_baby(tmp_path, [])
    write_gz(tmp_path / "reviews_Baby_5.json.gz",
             [f'{{"reviewerID": "a", "asin": "x", "overall": {rating}, "unixReviewTime": 1}}'])
    assert "reviews_Baby_5.json.gz" in str(refused(read_events, tmp_path))


@pytest.mark.parametrize("size", [4, 2000])
def test_a_truncated_review_file_is_refused(tmp_path, size):
    write_baby(tmp_path, [(f"user {n * 7919 % 1009}", "x", n) for n in range(1000)])
    cut_short(tmp_path / "reviews_Baby_5.json.gz", size)
    assert "reviews_Baby_5.json.gz" in str(refused(read_events, tmp_path))


@pytest.mark.parametrize("name", ["reviews_Baby_5.json.gz", "Baby_5.json.gz", "Baby.json.gz"])
def test_the_review_file_goes_by_any_of_its_names(tmp_path, name):
    write_gz(tmp_path / name, [review("a", "x", 1)])
    write_gz(tmp_path / "meta_Baby.json.gz", [])
    assert amazon.raw_paths(tmp_path, "Baby") == [tmp_path / name, tmp_path / "meta_Baby.json.gz"]


def test_a_folder_without_reviews_lists_the_names_that_were_looked_for(tmp_path):
    error = refused(read_events, tmp_path)
    assert "reviews_Baby_5.json.gz, Baby_5.json.gz, Baby.json.gz" in error.why
    assert "0_download_dataset.sh --dataset Baby" in error.fix


def test_a_folder_without_metadata_says_what_they_are_for(tmp_path):
    write_gz(tmp_path / "Baby.json.gz", [review("a", "x", 1)])
    error = refused(read_events, tmp_path)
    assert str(error).startswith(f"{tmp_path}/meta_Baby.json.gz: not there")
