"""Faults of raw data, one by one, through the command that a user runs."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from common.artifacts import load_interactions, load_items, load_meta, load_users
from dataloader import process
from dataloader.options import ProcessOptions
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.helpers import review, run_here, write_gz
from tests.dataloader.reading import ODD_IDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ("--min_user_interactions=0", "--min_item_interactions=0")
NOW = 1_393_545_600
EVENTS = [(f"user {n % 8}", f"item {n % 5}", NOW + n, float(n % 5 + 1)) for n in range(200)]
REVIEWS = [review(*event) for event in EVENTS]
RECORDS = [repr({"asin": f"item {n}", "title": f"Title {n}", "description": "It's <b>soft</b>"}) for n in range(5)]
NAMES = ("reviews_Baby_5.json.gz", "meta_Baby.json.gz")


class Outcome(NamedTuple):
    code: int
    log: str    # all that was said
    error: str  # the last line of stderr


class Shop:
    """A folder of raw files, and the command that processes them."""

    def __init__(self, folder: Path):
        self.folder, self.raw, self.data = folder, folder / "raw", folder / "data"
        self.raw.mkdir(parents=True)
        self.mend()

    def mend(self) -> None:
        for path in self.raw.iterdir():
            path.unlink()
        self.write(REVIEWS, RECORDS)

    def write(self, reviews: list[str], records: list[str]) -> None:
        for name, lines in zip(NAMES, (reviews, records), strict=True):
            write_gz(self.raw / name, lines)

    def run(self, *flags: str) -> Outcome:
        return self._outcome(*run_here(process.main, self._flags(flags), self.folder))

    def run_apart(self, *flags: str, seed: str = "0", limit: Callable[[], None] | None = None) -> Outcome:
        """The command in a process of its own."""
        done = subprocess.run([sys.executable, "-P", "-m", "dataloader.process", *self._flags(flags)], cwd=self.folder,
                              capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed})
        return self._outcome(done.returncode, done.stdout, done.stderr)

    def _flags(self, flags: tuple[str, ...]) -> list[str]:
        return ["--raw_dir", str(self.raw), "--data_root", str(self.data), *FLAGS, *flags]

    def _outcome(self, code: int, out: str, err: str) -> Outcome:
        assert "Traceback" not in err
        return Outcome(code, out + err, err.strip().splitlines()[-1] if err.strip() else "")

    @property
    def options(self) -> ProcessOptions:
        return make_options(self.data, "--raw_dir", str(self.raw), *FLAGS)

    def artifacts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.data / "Baby").iterdir() if path.name != ".lock"}

    def tables(self) -> dict[str, bytes]:
        return {name: content for name, content in self.artifacts().items() if name.endswith(".parquet")}


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path / "it's a [shop]")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Shop:
    """What the command makes of the files without a fault."""
    shop = Shop(tmp_path_factory.mktemp("whole"))
    assert shop.run_apart().code == 0
    return shop


def cut(name: str, size: int) -> Callable[[Shop], None]:
    def damage(shop: Shop) -> None:
        path = shop.raw / name
        path.write_bytes(path.read_bytes()[:-size])
    return damage


def lines(reviews: list[str] = (), records: list[str] = ()) -> Callable[[Shop], None]:
    """These lines stand behind the first ten and the first two."""
    return lambda shop: shop.write([*REVIEWS[:10], *reviews, *REVIEWS[10:]], [*RECORDS[:2], *records, *RECORDS[2:]])


def every(**changed) -> Callable[[Shop], None]:
    """Every review with other fields."""
    return lambda shop: shop.write([json.dumps({**json.loads(line), **changed}) for line in REVIEWS], RECORDS)


IN_2023 = [json.dumps({"user_id": user, "parent_asin": item, "rating": rating, "timestamp": time * 1000})
           for user, item, time, rating in EVENTS]
RECORDS_2023 = [json.dumps({"parent_asin": f"item {n}", "title": f"Title {n}"}) for n in range(5)]
NOT_UTF8 = b'{"reviewerID": "\xff", "asin": "x", "overall": 5, "unixReviewTime": 1}\n'


def not_utf8(shop: Shop) -> None:
    path = shop.raw / NAMES[0]
    path.write_bytes(path.read_bytes() + gzip.compress(NOT_UTF8))


#                 fault, file:line, what, in the reason, the fix
FAULTS = {
    "F09 reviews": (cut(NAMES[0], 300), NAMES[0] + ":", "the file is damaged from here on", "lines could be read",
                    "--force"),
    "F09 metadata": (cut(NAMES[1], 4), NAMES[1] + ":6: ", "the file is damaged from here on", "5 lines could be read",
                     "--force"),
    "F10": (lines(["", "no JSON, but " + "x" * 100]), NAMES[0] + ":12: ", "is not a JSON record",
            f"it reads 'no JSON, but {'x' * 67}'; 1 of 201 lines are like that", "--bad_lines skip"),
    "F10 metadata": (lines([], ["", "{'asin': 'item 9',"]), NAMES[1] + ":4: ", "is not a Python record",
                     "\"{'asin': 'item 9',\"; 1 of 6 lines are like that", "--bad_lines skip"),
    "F11": (lines([review("a", "x", NOW, float("nan"))]), NAMES[0] + ":11: ", "has the rating nan",
                   "1 of 201 lines", "mend the line"),
    "F11 infinite time": (lines(['{"reviewerID": "a", "asin": "x", "overall": 5, "unixReviewTime": Infinity}']),
                          NAMES[0] + ":11: ", "has the time inf, which is not finite", "1 of 201", "mend the line"),
    "F11 negative": (lines([review("a", "x", -1)]), NAMES[0] + ":11: ", "has the time -1, which is not from 0 to",
                     "1 of 201 lines", "mend the line"),
    "F11 milliseconds": (lines([review("a", "x", NOW * 1000)]), NAMES[0] + ":11: ",
                         "--time_unit ms, if that is what it counts", "1 of 201 lines", "mend the line"),
    "F12 reviews": (lambda shop: shop.write(IN_2023, RECORDS), NAMES[0] + ": ", "has no user and no item and no time",
                    "needed: reviewerID, asin, overall, unixReviewTime; found: user_id, parent_asin, rating, timestamp",
                    "--source amazon23"),
    "F12 metadata": (lambda shop: shop.write(REVIEWS, RECORDS_2023), NAMES[1] + ": ", "has no item",
                     "found: parent_asin, title", "--source amazon23"),
    "F12 nobody's": (every(reviewerID=None, unixReviewTime="?"), NAMES[0] + ":1: ", "lacks the user (reviewerID)",
                     "200 of 200 lines", "mend the line"),
    "F13": (lines([review("", "x", NOW)]), NAMES[0] + ":11: ", "lacks the user (reviewerID)", "1 of 201",
                  "mend the line"),
    "F13 endless": (lines([review("a", "x" * 10_001, NOW)]), NAMES[0] + ":11: ", "of 10,001 bytes", "1 of 201",
                    "mend the line"),
    "F15": (lines([review("a\ud800", "x", NOW)]), NAMES[0] + ":11: ", "which holds half a character",
                             "1 of 201", "mend the line"),
    "F15 not UTF-8": (not_utf8, NAMES[0] + ":201: ", "is not a JSON record", "can't decode byte 0xff", "mend the line"),
    "F16": (lines(["[" * 100_000]), NAMES[0] + ":11: ", "is not a JSON record", "1 of 201", "mend the line"),
    "F16 deep in an item": (lines([], ["{'asin': 'item 1', 'title': " + "[" * 10**5 + "]" * 10**5 + "}"]),
                            NAMES[1] + ":3: ", "is not a Python record", "1 of 6", "mend the line"),
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_fault_is_named_and_costs_nothing_that_was_there(shop, whole, row):
    fault, where, what, why, fix = FAULTS[row]
    shutil.copytree(whole.data, shop.data)
    before = shop.artifacts()
    fault(shop)
    outcome = shop.run("--source", "amazon14")
    assert outcome.code == 3, outcome.log
    assert outcome.error.startswith(f"error: {shop.raw}/{where}"), outcome.error
    assert (what in outcome.error, why in outcome.error) == (True, True), outcome.error
    assert fix in outcome.error.partition(" Fix: ")[2]
    assert len(outcome.error) < 1000
    assert shop.artifacts() == before
    shop.mend()
    if " " not in row or row.endswith("reviews"):  # once for each of the faults
        assert shop.run("--force").code == 0
        assert shop.tables() == whole.tables()


def test_f10_bad_lines_are_left_out_counted_and_listed_up_to_one_in_a_hundred(shop, whole):
    lines(["", "no JSON", review("a", "x", NOW, float("inf"))])(shop)
    outcome = shop.run("--bad_lines", "skip")
    assert outcome.code == 0, outcome.log
    assert "2 of 202 lines of reviews_Baby_5.json.gz are left out" in outcome.log
    listed = [json.loads(line) for line in (shop.data / "Baby" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(fault["where"], fault["excerpt"][:7]) for fault in listed] == [
        (f"{shop.raw}/{NAMES[0]}:12", "no JSON"), (f"{shop.raw}/{NAMES[0]}:13", '{"revie')]
    assert load_meta(shop.options.folder.interactions, "")["num_bad_lines"] == 2
    assert shop.tables() == whole.tables()
    before = shop.tables()
    lines(["no JSON"] * 3)(shop)
    outcome = shop.run("--bad_lines", "skip")
    assert (outcome.code, shop.tables()) == (3, before)
    assert "3 of 203 lines are like that, and more than 1 % is not left out" in outcome.error


def test_f11_the_unit_of_the_times_goes_by_the_flag_alone(shop, whole):
    every(unixReviewTime=None)(shop)
    shop.write([json.dumps({**json.loads(line), "unixReviewTime": json.loads(line)["unixReviewTime"] * 1000})
                for line in REVIEWS], RECORDS)
    assert shop.run().code == 3
    assert shop.run("--time_unit", "ms").code == 0
    assert shop.tables() == whole.tables()
    shop.mend()
    outcome = shop.run("--time_unit", "ms", "--force")
    assert (outcome.code, "--time_unit s, if that is what it counts" in outcome.error) == (3, True)


def test_f13_odd_ids_are_kept_to_the_byte_through_to_the_tables(shop):
    events = [(raw_id, ODD_IDS[(place + n) % len(ODD_IDS)], NOW + n) for place, raw_id in enumerate(ODD_IDS)
              for n in range(3)]
    shop.write([review(*event) for event in events], [repr({"asin": raw_id, "title": "t"}) for raw_id in ODD_IDS])
    assert shop.run().code == 0
    folder = shop.options.folder
    assert load_users(folder)["raw_id"].tolist() == ODD_IDS
    assert sorted(load_items(folder)["raw_id"].tolist()) == sorted(ODD_IDS)
    assert set(load_items(folder)["title"]) == {"t"}


def test_f14_records_and_events_that_repeat_others_are_counted_and_the_first_record_counts(shop):
    again = [repr({"asin": "item 1", "title": "Second"}), RECORDS[1]]
    shop.write([*REVIEWS, *REVIEWS[:7]], [*RECORDS, *again])
    outcome = shop.run()
    assert outcome.code == 0
    assert "7 item records: 2 repeat another" in outcome.log
    assert "7 events repeat another of the same user, item and time" in outcome.log
    assert load_items(shop.options.folder)["title"].tolist() == [f"Title {n}" for n in range(5)]
    outcome = shop.run("--duplicates", "exact")
    assert "7 removed by --duplicates exact, 200 left" in outcome.log


def test_f15_texts_of_every_script_survive(shop):
    title = "half \ud800 \ufeffmark e\u0301 \u00e9 \u202eolleh\u202c 🍼 &lt;script&gt;x&lt;/script&gt; a\u2028b"
    lines_2014 = [repr({"asin": f"item {n}", "title": title}) for n in range(5)]
    write_gz(shop.raw / NAMES[0], ["\ufeff" + REVIEWS[0] + "\r", *(line + "\r" for line in REVIEWS[1:])])
    (shop.raw / NAMES[1]).write_bytes(b"")
    write_gz(shop.raw / NAMES[1], [line.encode("utf-8", "backslashreplace").decode() for line in lines_2014])
    outcome = shop.run("--source", "amazon14")
    assert outcome.code == 0, outcome.log
    items = load_items(shop.options.folder)
    assert items["title"].tolist() == ["half ? \ufeffmark e\u0301 \u00e9 \u202eolleh\u202c 🍼 x a b"] * 5
    assert len(load_interactions(shop.options.folder).user) == 200


def test_f16_long_texts_and_lines_are_cut_and_counted_in_little_memory(shop):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))

    long = [repr({"asin": "item 0", "title": "Long", "description": "word &amp; " * 1_000_000}),
            repr({"asin": "item 1", "title": "Longer", "related": ["B" * 10] * 1_600_000}),
            repr({"asin": "item 2", "title": "Nested", "other": None}).replace("None", "[" * 10**5 + "]" * 10**5)]
    shop.write(REVIEWS, [*long, *RECORDS[3:]])
    outcome = shop.run_apart("--memory_limit", "1GB", limit=limit)
    assert outcome.code == 0, outcome.log
    assert "1 texts are longer than 10000 characters and were cut" in outcome.log
    texts = load_items(shop.options.folder)["text"].tolist()
    assert 9_980 < len(texts[0]) <= 10_000
    assert set(texts[0].removeprefix("Long. ").split()) == {"word", "&"}
    assert texts[1:3] == ["Longer", "Nested"]


def test_f18_items_without_records_and_records_without_items_are_counted(shop):
    shop.write(REVIEWS, [*RECORDS[:3], *(repr({"asin": f"unknown {n}", "title": "t"}) for n in range(4))])
    outcome = shop.run()
    assert outcome.code == 0
    assert ("7 item records: 0 repeat another, 4 are of items without interactions; 2 items have no record"
            in outcome.log)
    assert "2 items have no text; their raw ids stand in for it" in outcome.log
    meta = load_meta(shop.options.folder.items, "")
    assert (meta["num_without_record"], meta["num_unused_records"], meta["num_without_text"]) == (2, 4, 2)
    assert meta["settings"]["drop_items_without_text"] is False
    items = load_items(shop.options.folder)
    assert items["text"].tolist()[3:] == ["item 3", "item 4"]
    outcome = shop.run("--drop_items_without_text")
    assert outcome.code == 0
    assert "80 removed by --drop_items_without_text" in outcome.log
    assert load_meta(shop.options.folder.items, "")["settings"]["drop_items_without_text"] is True


def test_f19_equal_times_go_by_the_input_line_whatever_the_hash_seed(shop):
    events = [(f"user {n % 3}", f"item {n * 7 % 5}", NOW + n % 2) for n in range(60)]
    shop.write([review(*event) for event in events], RECORDS)
    found = []
    for seed in ("1", "2"):
        assert shop.run_apart("--force", seed=seed).code == 0
        found.append(shop.tables())
    assert found[0] == found[1]
    interactions = load_interactions(shop.options.folder)
    raw_ids = load_items(shop.options.folder)["raw_id"]
    for user in range(3):
        own = [(time, line, item) for line, (who, item, time) in enumerate(events) if who == f"user {user}"]
        assert raw_ids[interactions.item[interactions.user == user]].tolist() == [item for *_, item in sorted(own)]
