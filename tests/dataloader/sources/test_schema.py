"""Files of another source than they are read as, and of none."""

import json

import pytest

from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.helpers import review, write_gz
from tests.dataloader.reading import local, read_raw, refused

REVIEWS = {
    "amazon14": json.loads(review("a", "x", 1_393_545_600)),
    "amazon18": {**json.loads(review("a", "x", 1_393_545_600)), "verified": True, "style": {"Size:": " L"}},
    "amazon23": {"rating": 5.0, "title": "t", "asin": "v", "parent_asin": "x", "user_id": "a",
                 "timestamp": 1_393_545_600_000},
}
RECORDS = {
    "amazon14": repr({"asin": "x", "title": "t", "imUrl": "http://a/1.jpg", "categories": [["Baby"]]}),
    "amazon18": json.dumps({"asin": "x", "title": "t", "imageURL": ["http://a/1.jpg"], "category": ["Baby"]}),
    "amazon23": json.dumps({"parent_asin": "x", "title": "t", "images": [{"large": "http://a/1.jpg"}], "store": "B",
                            "categories": ["Baby"]}),
}
NAMES = {"amazon14": ("Beauty_5.json.gz", "meta_Beauty.json.gz"),
         "amazon18": ("Beauty_5.json.gz", "meta_Beauty.json.gz"),
         "amazon23": ("Beauty.jsonl.gz", "meta_Beauty.jsonl.gz")}


def folder_of(folder, reviews: str, records: str, source: str, *flags: str):
    """Files of these years under the names of `source`, as which they are read."""
    for name, lines in zip(NAMES[source], ([json.dumps(REVIEWS[reviews])] * 3, [RECORDS[records]] * 3), strict=True):
        write_gz(folder / "raw" / name, lines)
    return make_options(folder / "data", "--dataset", "Beauty", "--raw_dir", str(folder / "raw"), "--source", source,
                        *flags)


@pytest.mark.parametrize("source", NAMES)
def test_files_of_the_right_year_are_read(tmp_path, source):
    events, records, _num_bad = read_raw(folder_of(tmp_path, source, source, source))
    assert (len(events), records[0]["raw_id"], records[0]["image_url"]) == (3, "x", "http://a/1.jpg")


@pytest.mark.parametrize(("source", "of", "needed", "found", "fix"), [
    ("amazon23", "amazon18", "needed: user_id, parent_asin, rating, timestamp", "found: reviewerID, asin, overall",
     "--source amazon14 or amazon18"),
    ("amazon14", "amazon23", "needed: reviewerID, asin, overall, unixReviewTime", "found: rating, title, asin",
     "--source amazon23"),
    ("amazon18", "amazon23", "needed: reviewerID, asin, overall, unixReviewTime", "found: rating, title, asin",
     "--source amazon23")])
def test_interactions_of_another_year_are_refused_with_its_name(tmp_path, source, of, needed, found, fix):
    error = refused(folder_of(tmp_path, of, source, source))
    assert str(error.where) == f"{tmp_path}/raw/{NAMES[source][0]}"
    assert error.what.startswith("has no ")
    assert (needed in error.why, found in error.why, error.fix) == (True, True, fix)


@pytest.mark.parametrize(("source", "of", "what", "fix"), [
    ("amazon14", "amazon18", "has no image", "--source amazon18"), ("amazon14", "amazon23", "has no item", "amazon23"),
    ("amazon18", "amazon14", "has no item", "--source amazon14"), ("amazon18", "amazon23", "has no item", "amazon23"),
    ("amazon23", "amazon14", "has no item", "--source amazon14"), ("amazon23", "amazon18", "has no item", "amazon18")])
def test_metadata_of_another_year_are_refused_with_its_name(tmp_path, source, of, what, fix):
    error = refused(folder_of(tmp_path, source, of, source))
    assert str(error.where) == f"{tmp_path}/raw/{NAMES[source][1]}"
    assert error.what == what or what == "has no item"  # the first that is found may be another field
    assert error.fix.endswith(fix)
    assert "needed: asin" in error.why or "needed: parent_asin" in error.why


def test_a_field_that_a_template_wants_is_missed_where_another_year_has_it(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14", "--template", "{title} | {categories}")
    write_gz(tmp_path / "raw" / "meta_Beauty.json.gz", [json.dumps({"asin": "x", "title": "t", "category": ["Baby"]})])
    error = refused(options)
    assert (error.what, error.fix) == ("has no categories", "--source amazon18")
    assert "found: asin, title, category" in error.why


def test_fields_that_no_record_has_and_no_other_year_either_are_no_error(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14", "--template", "full")
    write_gz(tmp_path / "raw" / "meta_Beauty.json.gz", [repr({"asin": "x", "title": "t"})])
    assert read_raw(options)[1][0]["title"] == "t"


def test_fields_under_names_of_no_source_are_refused_with_the_flags_to_name_them(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14")
    write_gz(tmp_path / "raw" / "Beauty_5.json.gz", ['{"uid": "a", "sku": "x", "when": 1}'])
    error = refused(options)
    assert error.what == "has no user and no item and no time and no rating"
    assert "found: uid, sku, when" in error.why
    assert error.fix.startswith(f"--source local --interactions {tmp_path}/raw/Beauty_5.json.gz")


def test_a_field_with_useless_values_alone_is_named_by_its_line(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14")
    write_gz(tmp_path / "raw" / "Beauty_5.json.gz", [json.dumps({**REVIEWS["amazon14"], "overall": "five"})] * 2)
    error = refused(options)
    assert (error.where, error.what) == (f"{tmp_path}/raw/Beauty_5.json.gz:1",
                                         "has the rating 'five', which is no number")


def test_a_file_of_amazon_that_is_named_as_one_s_own_is_told(tmp_path):
    (tmp_path / "interactions.jsonl").write_text(json.dumps(REVIEWS["amazon14"]) + "\n")
    assert "there are: asin, overall, reviewText, reviewerID, unixReviewTime" in str(refused(local(tmp_path), 2))


def write_files(folder, names: dict[str, list[str]]) -> None:
    for name, lines in names.items():
        if name.endswith(".gz"):
            write_gz(folder / name, lines)
        else:
            (folder / name).write_text("\n".join(lines))


@pytest.mark.parametrize(("dataset", "files", "source"), [
    ("Beauty", {"Beauty_5.json.gz": [], "meta_Beauty.json.gz": ["", RECORDS["amazon14"]]}, "amazon14"),
    ("Beauty", {"Beauty_5.json.gz": [], "meta_Beauty.json.gz": ["", RECORDS["amazon18"]]}, "amazon18"),
    ("Beauty", {"Beauty_5.json.gz": [], "meta_Beauty.json.gz": ["no record", RECORDS["amazon18"]]}, "amazon18"),
    ("Beauty", {"Beauty_5.json.gz": [], "meta_Beauty.json.gz": ["no record", RECORDS["amazon14"]]}, "amazon14"),
    ("Beauty", {"Beauty_5.json.gz": [], "meta_Beauty.json.gz": ["\ufeff" + RECORDS["amazon18"]]}, "amazon18"),
    ("Beauty", {"Beauty.jsonl.gz": [], "meta_Beauty.jsonl.gz": [RECORDS["amazon23"]]}, "amazon23"),
    ("shop", {"shop.json.gz": [], "meta_shop.json.gz": ["no record"]}, "amazon14"),
    ("Beauty", {"Beauty_5.json.gz": []}, "amazon14"),
    ("Baby_Products", {"Baby_Products.json.gz": []}, "amazon23"),
    ("shop", {"shop.json.gz": [], "meta_shop.json.gz": [RECORDS["amazon18"]]}, "amazon18"),
    ("ml-100k", {"ml-100k.zip": []}, "movielens"),
    ("ml-100k", {"recbole-1.2.1-py3-none-any.whl": []}, "movielens"),
    ("ml-latest", {"ml-latest.zip": []}, "movielens"),
    ("shop", {"interactions.csv": []}, "local"), ("shop", {"interactions.jsonl.gz": []}, "local"),
    ("shop", {"shop.inter": []}, "local"),
])
def test_a_folder_of_raw_files_tells_its_source(tmp_path, dataset, files, source):
    (tmp_path / "raw").mkdir()
    write_files(tmp_path / "raw", files)
    assert make_options(tmp_path / "data", "--dataset", dataset, "--raw_dir", str(tmp_path / "raw")).source == source


def test_a_folder_that_tells_nothing_asks_for_the_source(tmp_path):
    error = refused_options(tmp_path, "--dataset", "shop", "--raw_dir", str(tmp_path))
    assert "holds nothing that tells where shop is from" in str(error)


def refused_options(tmp_path, *flags):
    with pytest.raises(Exception, match="Fix: ") as error:
        make_options(tmp_path / "data", *flags)
    return error.value
