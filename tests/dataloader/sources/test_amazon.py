"""Raw files of Amazon from 2014, 2018 and 2023, read to events and item records."""

import json
import os

import pytest

from common.errors import DataError
from dataloader.process import process
from dataloader.readers import lines
from dataloader.sources import amazon
from tests import errors
from tests.dataloader.helpers import mentions, review, write_baby, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import ODD_IDS, events_of, items_of, read_raw, refused

EVENT = [("a", "x", 1_700_000_000)]
FULL = ("--template", "full")
DOWNLOAD = ["bash dataloader/0_download_dataset.sh --dataset Baby", "--source amazon14 --force"]
RECORD = {"asin": "0001048791", "title": "Baby's \"first\" cup", "description": "Holds 5 oz", "brand": "Cups & Co"}


def amazon14(folder, events=EVENT, metadata=(), *flags):
    write_baby(folder / "raw", events, [repr(record) for record in metadata])
    return make_options(folder / "data", "--raw_dir", str(folder / "raw"), "--source", "amazon14", *flags)


def amazon18(folder, events=EVENT, metadata=(), *flags):
    write_gz(folder / "raw" / "Beauty_5.json.gz", [review(*event) for event in events])
    write_gz(folder / "raw" / "meta_Beauty.json.gz", map(json.dumps, metadata))
    return make_options(folder / "data", "--dataset", "Beauty", "--raw_dir", str(folder / "raw"), "--source",
                        "amazon18", *flags)


def amazon23(folder, events=EVENT, metadata=(), *flags):
    """Events in whole seconds, written in milliseconds."""
    reviews = [{"rating": (*rest, 5.0)[0], "title": "Nice", "text": "Yes.", "asin": "variant", "parent_asin": item,
                "user_id": user, "timestamp": time * 1000 + 7, "verified_purchase": True}
               for user, item, time, *rest in events]
    write_gz(folder / "raw" / "Beauty.jsonl.gz", map(json.dumps, reviews))
    renamed = {"asin": "parent_asin", "brand": "store"}
    write_gz(folder / "raw" / "meta_Beauty.jsonl.gz", [
        json.dumps({renamed.get(key, key): value for key, value in record.items()}) for record in metadata])
    return make_options(folder / "data", "--dataset", "Beauty", "--raw_dir", str(folder / "raw"), *flags)


YEARS = pytest.mark.parametrize("write", [amazon14, amazon18, amazon23])


@YEARS
def test_ids_are_unchanged_and_events_keep_their_order(tmp_path, write):
    events = [(raw_id, raw_id, 1_700_000_000 - time) for time, raw_id in enumerate(ODD_IDS)]
    found = [(user, item, int(time), rating) for user, item, time, rating in events_of(write(tmp_path, events))]
    assert found == [(*event, 5.0) for event in events]


@YEARS
def test_ids_of_items_are_kept_to_the_byte(tmp_path, write):
    options = write(tmp_path, EVENT, [{"asin": raw_id, "title": "t"} for raw_id in ODD_IDS])
    assert [record["raw_id"] for record in items_of(options)] == ODD_IDS


@YEARS
def test_every_rating_is_kept(tmp_path, write):
    events = [("a", f"item {n}", 1_700_000_000, rating) for n, rating in enumerate((1.0, 3.5, 5, 0))]
    assert [rating for *_, rating in events_of(write(tmp_path, events))] == [1.0, 3.5, 5.0, 0.0]


def test_the_times_of_2023_keep_their_milliseconds(tmp_path):
    assert events_of(amazon23(tmp_path, EVENT)) == [("a", "x", 1_700_000_000.007, 5.0)]


@pytest.mark.slow
@YEARS
def test_a_record_of_each_year_gives_the_same_texts(tmp_path, write):
    record = {**RECORD, **{
        amazon14: {"categories": [["Baby", "Cups"], ["Gifts"]], "price": 12.5},
        amazon18: {"category": ["Baby", "Cups", "Gifts"], "price": "$12.5", "description": ["Holds", "", "5 oz"]},
        amazon23: {"categories": ["Baby", "Cups", "Gifts"], "price": 12.5, "description": ["Holds 5 oz"]}}[write]}
    [found] = items_of(write(tmp_path, EVENT, [record], *FULL))
    assert (found["raw_id"], found["title"], found["description"], found["brand"], found["categories"]) == (
        "0001048791", "Baby's \"first\" cup", "Holds 5 oz", "Cups & Co", "Baby, Cups, Gifts")
    assert found["price"].lstrip("$") == "12.5"
    assert found["image_url"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("write", "fields", "url"), [
    (amazon14, {"imUrl": "http://a/1.jpg"}, "http://a/1.jpg"),
    (amazon14, {"imUrl": ""}, None),
    (amazon18, {"imageURL": ["http://a/1.jpg", "http://a/2.jpg"]}, "http://a/1.jpg"),
    (amazon18, {"imageURL": ["http://a/1.jpg"], "imageURLHighRes": ["http://a/big.jpg"]}, "http://a/big.jpg"),
    (amazon18, {"imageURL": ["http://a/1.jpg"], "imageURLHighRes": []}, "http://a/1.jpg"),
    (amazon18, {"imageURL": [], "imageURLHighRes": []}, None),
    (amazon18, {"imageURL": "", "imageURLHighRes": "http://a/big.jpg"}, "http://a/big.jpg"),
    (amazon23, {"images": [{"thumb": "http://a/t.jpg", "large": "http://a/l.jpg", "hi_res": "http://a/h.jpg"},
                           {"large": "http://a/second.jpg"}]}, "http://a/l.jpg"),
    (amazon23, {"images": [{"thumb": "http://a/t.jpg", "large": None, "hi_res": "http://a/h.jpg"}]}, "http://a/h.jpg"),
    (amazon23, {"images": [{"thumb": "http://a/t.jpg"}]}, "http://a/t.jpg"),
    (amazon23, {"images": []}, None),
    (amazon23, {"images": None}, None),
])
def test_the_main_image_address_is_found_in_each_year(tmp_path, write, fields, url):
    [record] = items_of(write(tmp_path, EVENT, [{"asin": "x", "title": "t", **fields}]))
    assert record["image_url"] == url


def test_only_wanted_records_are_cleaned(tmp_path):
    _events, records, _num_bad = read_raw(amazon14(tmp_path, metadata=[RECORD, {"asin": "B2", "title": "Bib"}]),
                                          "SELECT 'B2'")
    assert [(record["raw_id"], record["wanted"], record["title"]) for record in records] == [
        ("0001048791", False, ""), ("B2", True, "Bib")]


@pytest.mark.parametrize("field", ["asin", "title", "related"])
def test_code_in_a_literal_is_refused_and_never_run(tmp_path, field):
    canary = tmp_path / "canary"
    options = amazon14(tmp_path, metadata=[RECORD])
    line = f"{{'asin': 'B2', '{field}': __import__('os').system('touch {canary}')}}"
    write_gz(tmp_path / "raw" / "meta_Baby.json.gz", [repr(RECORD), "", line])
    refused(options, DataError, f"{tmp_path}/raw/meta_Baby.json.gz:3", names=[repr(line[:80])])
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("line", "what"), [
    ("{'title': 'no key'}", ["asin"]),
    ("{'asin': '', 'title': 'empty'}", ["asin"]),
    ("{'asin': None}", ["asin"]),
    ("{'asin': 'B1', 'title': ", []),
    ("{'asin': 'B1' 'title': 'x'}", []),
    ("['B1', 'a list']", ["list"]),
    ("{'asin': 'B1\x00'}", []),
    ("-" * 100_000 + "1", []),
    ("[" * 100_000, []),
    ("{'asin': " + "[" * 100_000 + "]" * 100_000 + "}", []),
    ("{'asin': 'B1', 'title': " + "[" * 100_000 + "]" * 100_000 + "}", []),
    ("{'asin': 'B1', 'title': [[['x']]]}", []),
    ("{'asin': '" + "B" * 10_001 + "'}", ["'BBBBBBBBBBBBBBBBBBBB'", "10,001", "10,000"]),
    ("{'asin': 'B\\ud800'}", [r"'B\ud800'"]),
    ("\"\\" * 20_000, []),
])
def test_a_line_of_2014_without_a_record_is_named(tmp_path, line, what):
    options = amazon14(tmp_path)
    write_gz(tmp_path / "raw" / "meta_Baby.json.gz", [repr(RECORD), "", line])
    error = refused(options, DataError, f"{tmp_path}/raw/meta_Baby.json.gz:3", what=what, fix=["--bad_lines skip"])
    assert mentions(error.why, 1, 2)  # of two lines
    assert len(str(error)) < 700


@pytest.mark.slow
def test_several_processes_read_large_literals_like_one(tmp_path, monkeypatch):
    texts = ["plain", "it's", 'say "hi"', "both ' and \"", "tab\tand\nline", "caf\xe9 \u2122 🍼", "back\\slash",
             "\x00\x07", "None of this is True", "\u2028", "half \ud800", "a" * 2000]
    records = [{"asin": f"B{n}", "title": texts[n % len(texts)], "price": n / 7, "used": None, "new": True,
                "categories": [["a", texts[-n % len(texts)]], ["b"]],
                "related": {"bought": [f"B{k}" for k in range(n % 9)]}} for n in range(3000)]
    options = amazon14(tmp_path, EVENT, records, *FULL)
    one = read_raw(options)[1]
    assert len(one) == 3000
    monkeypatch.setattr(lines, "BLOCK", 10_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    started = []
    monkeypatch.setattr(lines, "ProcessPoolExecutor", lambda *args: started.append(args[0]) or REAL_POOL(*args))
    assert read_raw(options)[1] == one
    assert set(started) == {3}


REAL_POOL = lines.ProcessPoolExecutor


def test_the_review_file_may_have_any_of_its_names(tmp_path):
    write_gz(tmp_path / "meta_Baby.json.gz", ["{'asin': 'x'}"])
    for name in ("Baby.json.gz", "Baby_5.json.gz", "reviews_Baby_5.json.gz"):  # in rising precedence
        write_gz(tmp_path / name, [review("a", "x", 1)])
        options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path))
        assert amazon.raw_paths(options) == [tmp_path / name, tmp_path / "meta_Baby.json.gz"]


def test_a_folder_without_reviews_is_refused_with_expected_names(tmp_path):
    names = ["reviews_Baby_5.json.gz", " Baby_5.json.gz", " Baby.json.gz"]
    with errors.refused(DataError, tmp_path, names=names) as error:
        amazon.raw_paths(make_options(tmp_path / "data", "--raw_dir", str(tmp_path), "--source", "amazon14"))
    assert "--force" not in error.value.fix  # it does not write to the user's own folder
    downloads = tmp_path / "data/Baby/raw/amazon14"
    with errors.refused(DataError, downloads, names=names, fix=[*DOWNLOAD, tmp_path / "data"]):
        amazon.raw_paths(make_options(tmp_path / "data"))


def test_metadata_is_optional_except_after_a_download(tmp_path):
    write_gz(tmp_path / "own" / "Baby.json.gz", [review("a", "x", 1)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "own"))
    assert read_raw(options) == ([("a", "x", 1, 5.0)], [], 0)
    write_gz(tmp_path / "data/Baby/raw/amazon14/reviews_Baby_5.json.gz", [review("a", "x", 1)])
    with errors.refused(DataError, tmp_path / "data/Baby/raw/amazon14/meta_Baby.json.gz",
                        fix=DOWNLOAD):
        amazon.raw_paths(make_options(tmp_path / "data"))


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "reviews", "metadata", "source"), [
    ("Baby", "reviews_Baby.json.gz", "meta_Baby.json.gz", "amazon14"),
    ("Baby", "reviews_Baby_5.json", "meta_Baby.json", "amazon14"),
    ("own", "reviews_own.json", "", "amazon14"),
    ("Beauty", "Beauty_5.json", "meta_Beauty.json", "amazon18"),
    ("Beauty", "Beauty.json", "meta_Beauty.json", "amazon18"),
    ("Beauty", "Beauty.jsonl", "meta_Beauty.jsonl", "amazon23"),
    ("own", "own.jsonl", "meta_own.jsonl.gz", "amazon23")])
def test_unpacked_files_and_other_usual_names_are_found(tmp_path, dataset, reviews, metadata, source):
    new = source == "amazon23"
    time = 1_500_000_000_000 if new else 1_500_000_000
    line = json.dumps({"user_id": "a", "parent_asin": "x", "rating": 5, "timestamp": time} if new else
                      {"reviewerID": "a", "asin": "x", "overall": 5, "unixReviewTime": time})
    record = {"parent_asin" if new else "asin": "x", "title": "t"}
    for name, text in ((reviews, line), (metadata, repr(record) if source == "amazon14" else json.dumps(record))):
        if name.endswith(".gz"):
            write_gz(tmp_path / name, [text])
        elif name:
            (tmp_path / name).write_text(f"{text}\n")
    options = make_options(tmp_path / "data", "--dataset", dataset, "--raw_dir", str(tmp_path))
    assert options.source == source
    events, records, _num_bad = read_raw(options)
    assert events == [("a", "x", 1_500_000_000, 5.0)]
    assert [found["title"] for found in records] == (["t"] if metadata else [])


def test_a_name_of_the_source_comes_before_other_spellings(tmp_path):
    (tmp_path / "reviews_Baby_5.json").write_text("")
    write_gz(tmp_path / "Baby.json.gz", [review("a", "x", 1)])
    assert amazon.raw_paths(make_options(tmp_path / "data", "--raw_dir", str(tmp_path))) == [tmp_path / "Baby.json.gz"]


def test_only_a_damaged_download_is_downloaded_again(tmp_path):
    write_gz(tmp_path / "own" / "reviews_Baby_5.json.gz", [review("a", "x", n) for n in range(300)])
    path = tmp_path / "own" / "reviews_Baby_5.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    (downloads := tmp_path / "data/Baby/raw/amazon14").mkdir(parents=True)
    for name, content in ((path.name, path.read_bytes()), ("meta_Baby.json.gz", b"")):
        (downloads / name).write_bytes(content)
    with errors.refused(DataError, fix=DOWNLOAD):
        process(make_options(tmp_path / "data"), "")
    with pytest.raises(DataError) as error:
        process(make_options(tmp_path / "data", "--raw_dir", str(path.parent)), "")
    assert "--force" not in error.value.fix
