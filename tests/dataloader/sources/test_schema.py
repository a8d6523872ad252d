"""Files that are read as those of another source, and files of no known source."""

import json
import re

import pytest

from common.errors import ConfigError, DataError
from tests import errors
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
    """Files of these years under the names of `source`, and options to read them as such."""
    for name, lines in zip(NAMES[source], ([json.dumps(REVIEWS[reviews])] * 3, [RECORDS[records]] * 3), strict=True):
        write_gz(folder / "raw" / name, lines)
    return make_options(folder / "data", "--dataset", "Beauty", "--raw_dir", str(folder / "raw"), "--source", source,
                        *flags)


@pytest.mark.parametrize("source", NAMES)
def test_files_of_the_right_year_are_read(tmp_path, source):
    events, records, _num_bad = read_raw(folder_of(tmp_path, source, source, source))
    assert (len(events), records[0]["raw_id"], records[0]["image_url"]) == (3, "x", "http://a/1.jpg")


def sources_in(fix: str) -> list[str]:
    assert "--source " in fix
    return re.findall(r"amazon\d\d", fix)


OLD_FIELDS = ["reviewerID", "asin", "overall", "unixReviewTime"]


@pytest.mark.parametrize(("source", "of", "names", "suggested"), [
    ("amazon23", "amazon18", ["user_id", "parent_asin", "rating", "timestamp", *OLD_FIELDS], ["amazon14", "amazon18"]),
    ("amazon14", "amazon23", [*OLD_FIELDS, *REVIEWS["amazon23"]], ["amazon23"]),
    ("amazon18", "amazon23", [*OLD_FIELDS, *REVIEWS["amazon23"]], ["amazon23"])])
def test_interactions_of_another_year_are_refused(tmp_path, source, of, names, suggested):
    error = refused(folder_of(tmp_path, of, source, source), DataError, f"{tmp_path}/raw/{NAMES[source][0]}",
                    names=names)
    assert sources_in(error.fix) == suggested


@pytest.mark.parametrize(("source", "of", "missing", "needed", "found"), [
    ("amazon14", "amazon18", "image", "imUrl", "imageURL"), ("amazon14", "amazon23", "", "asin", "parent_asin"),
    ("amazon18", "amazon14", "", "asin", "json"), ("amazon18", "amazon23", "", "asin", "parent_asin"),
    ("amazon23", "amazon14", "", "parent_asin", "json"), ("amazon23", "amazon18", "", "parent_asin", "imageURL")])
def test_metadata_of_another_year_are_refused(tmp_path, source, of, missing, needed, found):
    error = refused(folder_of(tmp_path, source, of, source), DataError, f"{tmp_path}/raw/{NAMES[source][1]}",
                    what=[missing], names=[needed, found])
    assert sources_in(error.fix) == [of]


def test_a_missing_template_field_of_another_year_is_refused(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14", "--template", "{title} | {categories}")
    path = tmp_path / "raw" / "meta_Beauty.json.gz"
    write_gz(path, [json.dumps({"asin": "x", "title": "t", "category": ["Baby"]})])
    error = refused(options, DataError, path, what=["categories"], names=["asin, title, category"])
    assert sources_in(error.fix) == ["amazon18"]


def test_fields_that_no_year_has_may_be_missing(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14", "--template", "full")
    write_gz(tmp_path / "raw" / "meta_Beauty.json.gz", [repr({"asin": "x", "title": "t"})])
    assert read_raw(options)[1][0]["title"] == "t"


def test_unknown_field_names_are_refused_with_the_column_flags(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14")
    path = tmp_path / "raw" / "Beauty_5.json.gz"
    write_gz(path, ['{"uid": "a", "sku": "x", "when": 1}'])
    refused(options, DataError, path, names=[*OLD_FIELDS, "uid, sku, when"],
            fix=[f"--source local --interactions {path}", "_column NAME"])


def test_a_field_with_only_bad_values_is_refused(tmp_path):
    options = folder_of(tmp_path, "amazon14", "amazon14", "amazon14")
    write_gz(tmp_path / "raw" / "Beauty_5.json.gz", [json.dumps({**REVIEWS["amazon14"], "overall": "five"})] * 2)
    refused(options, DataError, f"{tmp_path}/raw/Beauty_5.json.gz:1", what=["'five'"])


def test_an_amazon_file_named_as_local_is_refused(tmp_path):
    (tmp_path / "interactions.jsonl").write_text(json.dumps(REVIEWS["amazon14"]) + "\n")
    refused(local(tmp_path), ConfigError, "--user_column user_id",
            names=["asin, overall, reviewText, reviewerID, unixReviewTime"])


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
def test_the_source_follows_from_the_raw_files(tmp_path, dataset, files, source):
    (tmp_path / "raw").mkdir()
    write_files(tmp_path / "raw", files)
    assert make_options(tmp_path / "data", "--dataset", dataset, "--raw_dir", str(tmp_path / "raw")).source == source


def test_an_unknown_folder_needs_the_source_flag(tmp_path):
    with errors.refused(ConfigError, f"--raw_dir {tmp_path}", names=["shop"],
                        fix=["--source", "--interactions FILE --items FILE"]):
        make_options(tmp_path / "data", "--dataset", "shop", "--raw_dir", str(tmp_path))
