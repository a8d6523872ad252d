"""Item ids that are different in the two files."""

import logging
from pathlib import Path

import pytest

from common.artifacts import load_meta
from common.errors import DataError
from dataloader.process import check, process
from dataloader.readers.raw import RawTable
from dataloader.tables.joins import check_join
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND
from tests.dataloader.reading import local
from tests.errors import refused

FLAGS = ("--min_user_interactions=0", "--min_item_interactions=0")
TABLES = [RawTable(Path("events.csv"), "csv", {}), RawTable(Path("items.csv"), "csv", {})]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with Workspace(tmp_path_factory.mktemp("joins") / ".work", "1GB") as work:
        yield work


@pytest.fixture
def join(work, tmp_path):
    """Compare these ids of the interactions with these ids of the records."""
    def run(ours: list[str], theirs: list[str]) -> dict[str, int]:
        for table in ("item_keys", "metadata", "our_ids", "their_ids"):
            work.run(f"DROP TABLE IF EXISTS {table}")
        work.run("CREATE TABLE item_keys AS SELECT unnest(?::VARCHAR[]) AS raw, unnest(range(?)) AS key", ours,
                 len(ours))
        work.run("CREATE TABLE metadata AS SELECT unnest(?::VARCHAR[]) AS raw_id", theirs)
        return check_join(work, TABLES, local(tmp_path))

    return run


@pytest.mark.parametrize(("ours", "theirs", "reason"), [
    (["1001", "1002"], ["01001", "01002"], "zeros"),
    (["007", "8"], ["7", "008"], "zeros"),
    (["1001", "1002"], ["1001.0", "1002.0"], ".0"),
    (["1001.00"], ["1001"], ".0"),
    (["1001", "1002"], [" 1001", "1002\t"], "blanks"),
    (["1001\u00a0", "\ufeff1002"], ["1001", "1002"], "blanks"),
    (["AB", "CD"], ["ab", "Cd"], "case"),
    (["'1001'"], ["1001"], "quotes"),
    (["caf\u00e9"], ["cafe\u0301"], "Unicode"),
    (["1001"], ["1.001E+03"], "number"),
    (["01001"], ["1001.0"], "number"),
    (["978-0-13"], ["978013"], "punctuation"),
    (["1001"], ["item-1001"], "separator"),
    (["B0X1", "B0X2"], ["asin:B0X1", "asin:B0X2"], "separator"),
    (["i1001"], ["1001"], "number"),
])
def test_ids_that_do_not_join_are_refused_with_the_reason(join, ours, theirs, reason):
    shown = ascii if reason == "Unicode" else repr
    with refused(DataError, "items.csv", names=["events.csv", shown(ours[0]), shown(theirs[0]), reason],
                 fix=["--item_column", "--item_id_column"]) as error:
        join(ours, theirs)
    assert mentions(error.value.what, 0, len(ours))


def test_ids_without_a_common_form_are_shown_without_a_reason(join):
    with refused(DataError, "items.csv", names=["'B01'", "'lamp'"]):
        join(["B01", "B02"], ["lamp", "rope"])


@pytest.mark.parametrize(("num_records", "level"), [(1, None), (2, logging.WARNING), (99, logging.WARNING), (100, 0)])
def test_a_share_of_one_percent_or_a_half_is_enough(join, caplog, num_records, level):
    ours, theirs = [f"i{n}" for n in range(200)], [*(f"i{n}" for n in range(num_records)), "I150", *"xyz"]
    if level is None:
        with refused(DataError, "items.csv", names=["'i1'", "'I150'"]):
            join(ours, theirs)
    else:
        assert join(ours, theirs) == {"num_raw_items": 200, "num_raw_items_with_record": num_records}
        assert [record.levelno for record in caplog.records] == ([level] if level else [])
        assert all(mentions(record.getMessage(), num_records, 200) for record in caplog.records)


def test_few_differences_among_many_ids_are_no_reason(join, caplog):
    join([f"i{n}" for n in range(100)], ["I99", *(f"i{n}" for n in range(40))])
    assert mentions(caplog.records[0].getMessage(), "'i40'", "'I99'")
    assert "case" not in caplog.records[0].getMessage()


def test_records_that_all_join_give_a_record_as_example(join, caplog):
    join(["a", "b", "c"], ["a"])
    assert mentions(caplog.records[0].getMessage(), "'b'", "'a'")


def test_an_items_file_without_records_is_not_refused(join):
    assert join(["a"], []) == {"num_raw_items": 1, "num_raw_items_with_record": 0}


def shop(folder: Path, *flags: str):
    (folder / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f"{user},{item},{1_393_545_600 + item}\n" for user in "uv" for item in (1001, 1002, 1003)))
    (folder / "i.csv").write_text("item_id,title\n01001,Lamp\n01002,Rope\n01003,Stool\n9,Unused\n")
    return make_options(folder / "data", "--dataset=shop", f"--interactions={folder / 'e.csv'}",
                        f"--items={folder / 'i.csv'}", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "flags"), [
    (lambda options: process(options, COMMAND), FLAGS), (check, FLAGS),
    (lambda options: process(options, COMMAND), ()),                       # the 5-core would remove all events
    (lambda options: process(options, COMMAND), (*FLAGS, "--drop_items_without_text"))])
def test_the_join_is_checked_before_any_filter(tmp_path, run, flags):
    options = shop(tmp_path, *flags)
    with refused(DataError, tmp_path / "i.csv", names=["'1001'", "'01001'", "zeros"]):
        run(options)
    assert not options.folder.interactions.exists()


def test_the_counts_of_the_join_are_in_the_meta(tmp_path):
    options = shop(tmp_path, *FLAGS)
    (tmp_path / "i.csv").write_text("item_id,title\n1001,Lamp\n1002,Rope\n9,Unused\n10,Unused\n")
    process(options, COMMAND)
    meta = load_meta(options.folder.interactions, "")
    assert (meta["num_raw_items"], meta["num_raw_items_with_record"], meta["num_unused_records"]) == (3, 2, 2)
