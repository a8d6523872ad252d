"""The report of --check on raw files: all that it finds at once, for every format, and what `process` would do."""

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from common.artifacts import DatasetFolder, load_meta
from common.errors import DataError
from dataloader import process
from tests.dataloader.helpers import run_here
from tests.errors import Outcome
from tests.text import lines_with

DAY = 86_400
# Four users; "a" has x three times, twice at the same time. z has no record, and T9 has no event.
EVENTS = [("a", "x", DAY, 5), ("a", "x", DAY, 4), ("a", "y", 2 * DAY, 3), ("a", "x", 3 * DAY, 5), ("b", "y", DAY, 1),
          ("b", "x", 9 * DAY, 2), ("b", "z", 40 * DAY, 5), ("c", "y", DAY, 4), ("d", "x", DAY, 4)]
FIELDS = ("user_id", "item_id", "timestamp", "rating")
ITEMS = [("x", "Cup", "white"), ("x", "Mug", ""), ("y", "Pot", ""), ("T9", "Pan", "")]
ITEM_FIELDS = ("item_id", "title", "colour")


def write(path: Path, rows: list[tuple], fields: tuple[str, ...]) -> Path:
    """Write rows to a file whose format follows from its name."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        values = ", ".join(map(str, rows))
        duckdb.sql(f"SELECT * FROM (VALUES {values}) t({', '.join(fields)})").write_parquet(str(path))
        return path
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in rows]
    else:
        lines = [{"csv": ",", "tsv": "\t"}[kind].join(map(str, row)) for row in [fields, *rows]]
    text = "".join(f"{line}\n" for line in lines)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode())
    return path


def check(tmp_path: Path, *flags: str, minimum: int = 0) -> Outcome:
    """Check raw files, and check that nothing was written."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = run_here(process.main, [*flags_of(tmp_path, minimum), "--check", *flags], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return done


def flags_of(tmp_path: Path, minimum: int) -> list[str]:
    return ["--data_root", str(tmp_path / "data"), "--dataset=shop", f"--min_user_interactions={minimum}",
            f"--min_item_interactions={minimum}"]


def shop(tmp_path: Path, ending: str = "csv", events: list[tuple] = EVENTS, items: list[tuple] = ITEMS) -> list[str]:
    """Write both files, and return the flags that name them."""
    return ["--interactions", str(write(tmp_path / f"orders.{ending}", events, FIELDS)),
            "--items", str(write(tmp_path / f"catalogue.{ending}", items, ITEM_FIELDS))]


def command_in(text: str) -> list[str]:
    """The words of the command at the end of a report, without `bash` and the script."""
    bash, script, *words = shlex.split(text.splitlines()[-1])
    assert (bash, script) == ("bash", "dataloader/2_process.sh")
    return words


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_is_described_in_one_text(tmp_path, ending):
    done = check(tmp_path, *shop(tmp_path, ending))
    assert (done.code, done.err) == (0, "")
    text = done.out
    assert lines_with(text, tmp_path / f"orders.{ending}")
    assert lines_with(text, "9 rows")
    assert lines_with(text, "user_id", "text", "0 %", "a", "user")
    assert lines_with(text, "timestamp", 86400, "0 %", "time")
    assert lines_with(text, "9 valid events", "4 users", "3 items")
    assert lines_with(text, "1970-01-02 to 1970-02-10")
    assert lines_with(text, "2 events", "22 %", 1)  # x of "a" repeats twice, once at the same time
    assert lines_with(text, "4 rows")
    assert lines_with(text, "title", "text", "Cup", "0 %")
    assert lines_with(text, "colour", "75 %", "white")
    assert lines_with(text, "2 of 3 items", "67 %")
    assert lines_with(text, "4 records", 1, 1)
    assert lines_with(text, "without a record", "'z'")
    assert lines_with(text, "without interactions", "'T9'")
    assert lines_with(text, "4 users", "3 items", "9 interactions")
    assert lines_with(text, "leave_one_out", "train 5", "valid 2", "test 2")


def test_the_printed_command_does_what_was_reported(tmp_path):
    flags = shop(tmp_path)
    text = check(tmp_path, *flags, "--min_rating=2", "--split=temporal", "--split_dates=1970-01-03,1970-01-05",
                 "--template={title} | in {categories}", "--categories_column=colour").out
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_here(process.main, command_in(text), elsewhere)
    assert done.code == 0, done.err
    meta = load_meta(DatasetFolder(tmp_path / "data", "shop").interactions, "")
    assert (meta["num_interactions"], meta["num_in_split"]) == (8, {"train": 4, "valid": 2, "test": 2})
    assert lines_with(text, "train 4", "valid 2", "test 2")
    assert meta["settings"]["template"] == ["{title}", "in {categories}"]


def test_all_faults_of_both_files_are_reported_at_once(tmp_path):
    flags = shop(tmp_path, events=EVENTS * 2)
    orders, catalogue = tmp_path / "orders.csv", tmp_path / "catalogue.csv"
    with orders.open("a") as file:
        file.write("a,x,soon,5\nb,x,later,1\na,,86400,5\na,x,1e12,5\na,x,86400,great\na,x,86400\n")
    with catalogue.open("a") as file:
        file.write(",Bowl,\n")
    done = check(tmp_path, *flags)
    done.check_error(DataError, f"{orders}:20", names=["soon", "6", "24"])
    for number, value in ((20, "soon"), (21, "later"), (22, "item_id"), (23, "1e12"), (24, "great"), (25, 3)):
        assert lines_with(done.out, f"{orders}:{number}", value)
    assert lines_with(done.out, "2 of 24 lines")  # two invalid times
    assert len(lines_with(done.out, "1 of 24 lines")) == 4
    assert lines_with(done.out, f"{catalogue}:6", "item_id")
    assert lines_with(done.out, "1 of 5 lines")
    reasons = [line for line in done.out.splitlines() if line.startswith(("  1. ", "  2. ", "  3. "))]
    assert [reason.split(":")[0].split("/")[-1] for reason in reasons] == ["orders.csv", "catalogue.csv"]
    assert lines_with(done.out, "18 valid events")  # the check goes on with the other lines
    assert lines_with(done.out, "leave_one_out", "train 14", "valid 2", "test 2")


def test_at_most_three_lines_of_a_kind_are_shown(tmp_path):
    done = check(tmp_path, *shop(tmp_path, events=[*EVENTS, *[("a", "x", "never", 5)] * 30]))
    assert lines_with(done.out, "30 of 39 lines")
    assert len([line for line in done.out.splitlines() if line.startswith(f"    {tmp_path}") and "never" in line]) == 3


@pytest.mark.parametrize(("times", "flag", "fitting"), [
    (lambda time: time * 1000 + 1_400_000_000_000, "s", "ms"),
    (lambda time: time + 1_400_000_000, "ms", "s"),
    (lambda time: f"2014-05-{13 + time // DAY:02}" if time < 10 * DAY else "2014-06-22", "s", "date"),
    (lambda time: 20140513 + time // DAY if time < 10 * DAY else 20140622, "s", "date"),
    (lambda time: time + 1_400_000_000, "date", "s")])
def test_the_check_goes_on_with_the_fitting_time_unit(tmp_path, times: Callable, flag, fitting):
    events = [(user, item, times(time), rating) for user, item, time, rating in EVENTS]
    done = check(tmp_path, *shop(tmp_path, events=events), f"--time_unit={flag}")
    done.check_error(DataError, done.error.where, fix=[f"--time_unit {fitting}"])
    assert lines_with(done.out, "2014-05-14 to 2014-06-22", f"--time_unit {fitting}")
    assert lines_with(done.out, "9 valid events", "4 users", "3 items")
    assert f"--time_unit={fitting}" in command_in(done.out)
    assert run_here(process.main, command_in(done.out), tmp_path).code == 0


def test_other_faults_are_found_in_spite_of_a_wrong_unit(tmp_path):
    events = [(user, item, time + 1_400_000_000_000, rating) for user, item, time, rating in EVENTS]
    done = check(tmp_path, *shop(tmp_path, events=[*events, ("a", "", 1_400_000_000_000, 5)]))
    assert done.code == 3
    assert lines_with(done.out, "9 of 10 lines")
    assert lines_with(done.out, "1 of 10 lines")
    assert lines_with(done.out, f"{tmp_path / 'orders.csv'}:11", "item_id")


def test_all_missing_columns_are_named_and_ids_compared(tmp_path):
    flags = ["--user_column=customer", "--time_column=when", "--rating_column=stars", "--title_column=name"]
    done = check(tmp_path, *shop(tmp_path), *flags)
    done.check_error(DataError, "--user_column customer", names=["4 reasons"])
    for flag in flags:
        assert lines_with(done.out, flag.replace("=", " "), "column not found")
    assert lines_with(done.out, "timestamp", 86400)
    assert lines_with(done.out, "2 of 3 items", "67 %")
    assert "leave_one_out" not in done.out


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_a_damaged_file_does_not_hide_the_other_one(tmp_path):
    flags = shop(tmp_path, "jsonl.gz", items=[*ITEMS, ("", "Bowl", "")])
    damage(tmp_path / "orders.jsonl.gz")
    done = check(tmp_path, *flags)
    assert done.code == 3
    assert lines_with(done.out, "cannot be read")
    assert lines_with(done.out, f"{tmp_path / 'catalogue.jsonl.gz'}:5", "item_id")
    damage(tmp_path / "catalogue.jsonl.gz")
    done = check(tmp_path, "--interactions", str(write(tmp_path / "whole.csv", EVENTS, FIELDS)), *flags[2:])
    assert done.code == 3
    assert lines_with(done.out, "leave_one_out", "train 5", "valid 2", "test 2")
    assert "without text" not in done.out


@pytest.mark.parametrize("policy", ["skip", "skip:0.5%"])
def test_lines_that_process_would_skip_are_no_fault(tmp_path, policy):
    done = check(tmp_path, *shop(tmp_path, events=[*EVENTS * 30, ("a", "x", "never", 5)]), f"--bad_lines={policy}")
    assert done.code == 0, done.err
    assert lines_with(done.out, "1 of 271 lines", "skipped")
    assert lines_with(done.out, f"{tmp_path / 'orders.csv'}:272", "never")
    assert lines_with(done.out, "270 valid events")


def test_special_characters_of_a_file_are_escaped(tmp_path):
    items = [("x", "\x1b[31mred", "\u202eolleh"), ("y\tz", "a\rb", "")]
    done = check(tmp_path, *shop(tmp_path, "jsonl", items=items))
    assert done.code == 0
    assert all(line.isprintable() for line in done.out.splitlines())


@pytest.mark.parametrize(("ending", "change", "flags"), [
    ("csv", None, []),
    ("csv", None, ["--min_user_interactions=9"]),
    ("csv", None, ["--min_rating=6"]),
    ("csv", None, ["--duplicates=user_item"]),
    ("csv", None, ["--split=temporal", "--split_dates=1980-01-01,1990-01-01"]),
    ("csv", None, ["--title_column=titel"]),
    ("csv", None, ["--item_id_column=sku"]),
    ("csv", None, ["--drop_items_without_text"]),
    ("csv", None, ["--no_header=items"]),
    ("csv", None, ["--separator=tab"]),
    ("jsonl", None, ["--separator=tab"]),
    ("csv", b"user_id,item_id,timestamp\na,x,1\na,y,2\na,z\nb,x,1\n", ["--bad_lines=skip:20%"]),
    ("csv", b"user_id,item_id,timestamp,rating\n", []),
    ("csv", b"", []),
    ("csv", b"user_id,item_id,timestamp,user_id\na,x,1,b\n", []),
    ("csv", "user_id,item_id,timestamp\na,x,1\n".encode("utf-16"), []),
    ("csv", b"a,x,1\n", []),
    ("csv", b"user_id;item_id;timestamp\na;x;1\n", []),
    ("jsonl", b"[]\n", []),
    ("jsonl", b'{"user_id": "a"}\n', []),
    ("jsonl", b'{"User_id": 1, "user_id": "a", "item_id": "x", "timestamp": 3}\n', ["--rating_column=User_id"]),
    ("parquet", b"no parquet", []),
    ("csv.gz", b"no gzip", []),
    ("unknown", b"user_id,item_id,timestamp\n", [])])
def test_the_check_stops_exactly_if_process_stops(tmp_path, ending, change, flags):
    if change is None:
        named = shop(tmp_path, ending)
    else:
        (tmp_path / f"orders.{ending}").write_bytes(change)
        named = ["--interactions", str(tmp_path / f"orders.{ending}")]
    checked = check(tmp_path, *named, *flags)
    processed = run_here(process.main, [*flags_of(tmp_path, 0), *named, *flags], tmp_path)
    assert checked.code == (3 if processed.code else 0), (checked.err, processed.err)
    if processed.code:
        assert checked.error.where == processed.error.where
        assert processed.error.what in checked.out
    assert command_in(checked.out)


def test_items_files_that_are_ambiguous_do_not_stop_the_check(tmp_path):
    flags = shop(tmp_path)[:2]
    for name in ("items.csv", "items.jsonl"):
        write(tmp_path / name, ITEMS, ITEM_FIELDS)
    done = check(tmp_path, *flags)
    done.check_error(DataError, tmp_path, names=["items.csv", "items.jsonl"], fix=["--items"])
    assert lines_with(done.out, "leave_one_out", "train 5", "valid 2", "test 2")


def test_remembered_flags_are_part_of_the_command(tmp_path):
    flags = shop(tmp_path)
    assert run_here(process.main, [*flags_of(tmp_path, 0), *flags, "--min_rating=2"], tmp_path).code == 0
    done = check(tmp_path, *flags)
    assert done.code == 0
    assert "--min_rating=2.0" in next(line for line in done.out.splitlines() if "2_process.sh" in line)
    assert lines_with(done.out, "8 interactions")


def test_different_ids_of_two_files_are_shown_side_by_side(tmp_path):
    ids = {"x": "1001", "y": "1002", "z": "1003"}
    events = [(user, ids[item], time, rating) for user, item, time, rating in EVENTS]
    done = check(tmp_path, *shop(tmp_path, events=events, items=[(f"0{n}", "Cup", "") for n in range(1001, 1006)]))
    done.check_error(DataError, tmp_path / "catalogue.csv", names=["1001", "01001"])
    assert lines_with(done.out, "0 of 3 items", "0 %")
    assert lines_with(done.out, "without a record", "'1001'", "'1002'", "'1003'")
    assert lines_with(done.out, "without interactions", "'01001'", "'01002'", "'01003'")
    assert lines_with(done.out, "leave_one_out", "train 5", "valid 2", "test 2")
