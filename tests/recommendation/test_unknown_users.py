"""Errors about unknown users: whether the filters removed the user, by the raw file or by the meta file."""

import duckdb
import pandas as pd
import pytest
import yaml

from common.artifacts import DatasetFolder, ids_sha256
from common.errors import DataError
from recommendation.histories import Lookup, Query
from tests.errors import refused

from .test_pipeline import write_table

FILTERS = [{"step": "read", "interactions": 1_041}, {"step": "--min_rating 4", "interactions": 1_041},
           {"step": "the 5/5-core (user/item)", "interactions": 1_039}]
EVENTS = [("u1", "a", 1), ("01", "b", 2), ("01", 'c, "d"', 3)]


@pytest.fixture
def make(tmp_path):
    """Source, raw file, flags in source.yaml, filters -> the lookup of a dataset with the users `u1` and `zz`."""
    def make(source: str = "local", raw=None, flags: str = "", filters: list[dict] = FILTERS) -> Lookup:
        folder = DatasetFolder(tmp_path / "data", "Tiny")
        write_table(folder.items, pd.DataFrame({"item": [0], "raw_id": ["a"], "title": ["a"], "text": ["a"]}),
                    {"num_items": 1, "items_sha256": ids_sha256(["a"])})
        write_table(folder.users, pd.DataFrame({"user": [0, 1], "raw_id": ["u1", "zz"]}), {})
        recorded = {"file": raw.name, "size": raw.stat().st_size} if raw else {"file": "gone.csv", "size": 3}
        recorded["sha256"] = "its hash"
        write_table(folder.interactions, pd.DataFrame({"user": [0]}), {
            "filters": filters, "raw": {"interactions": recorded}, "settings": {"source": source}})
        folder.source_flags.write_text(flags or (f"interactions: {raw}\n" if raw else ""))
        return Lookup(folder, None)

    return make


def ask(lookup: Lookup, user: str, where: str = "--user") -> None:
    lookup.histories([Query(user, None, where)])


@pytest.fixture
def write(tmp_path):
    """Name -> the path of a file with the `EVENTS`, in the format of the name."""
    def write(name: str, header: str = "user_id,item_id,timestamp"):
        path, columns = tmp_path / "raw" / name, header.split(",")
        path.parent.mkdir(exist_ok=True)
        frame = pd.DataFrame(EVENTS, columns=columns)
        if path.suffix == ".parquet":
            duckdb.from_df(frame).write_parquet(str(path))
        elif ".json" in name:
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False, sep="," if ".csv" in name else "\t")
        return path

    return write


@pytest.mark.parametrize(("name", "columns", "flag"), [
    ("events.csv", "user_id,item_id,timestamp", ""), ("events.csv.gz", "user_id,item_id,timestamp", ""),
    ("e [1].csv", "my id,item,when", "my id"), ("events.tsv", "user_id,item_id,timestamp", ""),
    ("Tiny.inter", "user_id:token,item_id:token,timestamp:float", ""),
    ("events.jsonl.gz", "buyer,item_id,timestamp", "buyer"), ("events.parquet", "user_id,item_id,timestamp", "")])
def test_a_filtered_user_is_found_in_the_raw_file(make, write, name, columns, flag):
    path = write(name, columns)
    flags = {"interactions": str(path)} | ({"user_column": flag} if flag else {})
    lookup = make(raw=path, flags=yaml.safe_dump(flags))
    with refused(DataError, "--user", names=["'01'", "Tiny", f"{path} has 2 events", "the 5/5-core (user/item)"],
                 fix=["--history"]) as raised:
        ask(lookup, "01")
    assert "u1" not in str(raised.value)  # no other user is suggested


@pytest.mark.parametrize(("name", "content", "flags"), [
    ("log.txt", "a;01;1\nb;u1;2\nc;01;3\n", "no_header: interactions\nuser_column: 2\n"),
    ("log.csv", "01,a,1\nu1,b,2\n01,c,3\n", "no_header: both\n"),
    ("log.json", "".join(f'{{"actor": {{"id": "{user}"}}}}\n' for user, _, _ in EVENTS), "user_column: actor.id\n")])
def test_other_layouts_are_searched_too(make, tmp_path, name, content, flags):
    raw = tmp_path / name
    raw.write_text(content)
    with refused(DataError, "--user", names=[raw, 2], fix=["--history"]) as raised:
        ask(make(raw=raw, flags=f"interactions: {raw}\n{flags}"), "01")
    assert "filters removed" in str(raised.value)


def test_the_raw_file_is_also_found_in_a_folder(make, write, tmp_path):
    path = write("interactions.csv")
    with refused(DataError, "--user", names=[path, 2]):
        ask(make(raw=path, flags=f"raw_dir: {path.parent}\n"), "01")
    path = write("reviews_Tiny_5.json.gz", "reviewerID,asin,unixReviewTime")
    target = tmp_path / "data/Tiny/raw/amazon14" / path.name
    target.parent.mkdir(parents=True)
    lookup = make("amazon14", path, flags="{}")
    path.rename(target)
    with refused(DataError, "--user", names=[target, 2]):
        ask(lookup, "01")


def test_a_file_of_histories_gets_a_line_to_copy(make, write):
    with refused(DataError, "asked.jsonl:3", names=["'01'"], fix=['{"user": "01", "history": ["id", "id"]}']):
        ask(make(raw=write("events.csv")), "01", "asked.jsonl:3")


def test_a_user_who_is_in_no_raw_file_is_misspelled(make, write):
    lookup = make(raw=write("events.csv"))
    with refused(DataError, "--user", names=["'u3'", "'u1'"], fix=["--user=u1"]) as raised:
        ask(lookup, "u3")
    assert "5-core" not in str(raised.value)


@pytest.mark.parametrize("change", ["gone", "changed", "no column", "no table", "damaged flags"])
def test_without_the_raw_file_the_filters_are_named(make, write, change):
    path = write("events.csv", "client,item_id,timestamp" if change == "no column" else "user_id,item_id,timestamp")
    if change == "no table":
        path.write_bytes(b"\x00\xff" * 100)
    lookup = make(raw=path, flags="a: [" if change == "damaged flags" else "")
    if change == "gone":
        path.unlink()
    elif change == "changed":
        path.write_text(path.read_text() + "01,e,4\n")
    filters = ["1,041 interactions read", "2 removed by the 5/5-core (user/item)"]
    with refused(DataError, "--user", names=["'01'", *filters], fix=["--history"]):
        ask(lookup, "01")
    with refused(DataError, "--user", names=["'u1'", "5/5-core"], fix=["--user=u1", "--history"]):
        ask(lookup, "u_1")


@pytest.mark.parametrize("filters", [[], FILTERS[:2]])
def test_filters_that_removed_nothing_are_not_named(make, write, filters):
    with refused(DataError, "--user", names=["'u_1'", "'u1'"], fix=["--user=u1"]) as raised:
        ask(make(raw=write("events.csv"), filters=filters), "u_1")
    assert "interactions read" not in str(raised.value)
