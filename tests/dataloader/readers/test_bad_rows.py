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

import pytest

from common.artifacts import load_interactions, load_items, load_meta, load_users
from common.errors import DataError
from dataloader import process
from dataloader.options import ProcessOptions
from tests.dataloader.helpers import mentions, review, run_here, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import prints
from tests.dataloader.reading import ODD_IDS
from tests.errors import Outcome

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ("--min_user_interactions=0", "--min_item_interactions=0")
NOW = 1_393_545_600
EVENTS = [(f"user {n % 8}", f"item {n % 5}", NOW + n, float(n % 5 + 1)) for n in range(200)]
REVIEWS = [review(*event) for event in EVENTS]
RECORDS = [repr({"asin": f"item {n}", "title": f"Title {n}", "description": "It's <b>soft</b>"}) for n in range(5)]
NAMES = ("reviews_Baby_5.json.gz", "meta_Baby.json.gz")


class Shop:
    """A folder of raw files, and the command that processes them."""

    def __init__(self, folder: Path):
        self.folder, self.raw, self.data = folder, folder / "raw", folder / "data"
        self.raw.mkdir(parents=True)
        self.repair()

    def repair(self) -> None:
        for path in self.raw.iterdir():
            path.unlink()
        self.write(REVIEWS, RECORDS)

    def write(self, reviews: list[str], records: list[str]) -> None:
        for name, lines in zip(NAMES, (reviews, records), strict=True):
            write_gz(self.raw / name, lines)

    def run(self, *flags: str) -> Outcome:
        outcome = run_here(process.main, self._flags(flags), self.folder)
        assert "Traceback" not in outcome.err
        return outcome

    def run_apart(self, *flags: str, seed: str = "0", limit: Callable[[], None] | None = None) -> Outcome:
        """The command in a process of its own."""
        done = subprocess.run([sys.executable, "-P", "-m", "dataloader.process", *self._flags(flags)], cwd=self.folder,
                              capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed})
        assert "Traceback" not in done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def _flags(self, flags: tuple[str, ...]) -> list[str]:
        return ["--raw_dir", str(self.raw), "--data_root", str(self.data), *FLAGS, *flags]

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
    """The result of the command for files without a fault."""
    shop = Shop(tmp_path_factory.mktemp("whole"))
    assert shop.run_apart().code == 0
    return shop


def cut(name: str, size: int) -> Callable[[Shop], None]:
    def damage(shop: Shop) -> None:
        path = shop.raw / name
        path.write_bytes(path.read_bytes()[:-size])
    return damage


def lines(reviews: list[str] = (), records: list[str] = ()) -> Callable[[Shop], None]:
    """Insert these lines after the first ten reviews and after the first two records."""
    return lambda shop: shop.write([*REVIEWS[:10], *reviews, *REVIEWS[10:]], [*RECORDS[:2], *records, *RECORDS[2:]])


def every(**changed) -> Callable[[Shop], None]:
    """Change these fields in every review."""
    return lambda shop: shop.write([json.dumps({**json.loads(line), **changed}) for line in REVIEWS], RECORDS)


IN_2023 = [json.dumps({"user_id": user, "parent_asin": item, "rating": rating, "timestamp": time * 1000})
           for user, item, time, rating in EVENTS]
RECORDS_2023 = [json.dumps({"parent_asin": f"item {n}", "title": f"Title {n}"}) for n in range(5)]
NOT_UTF8 = b'{"reviewerID": "\xff", "asin": "x", "overall": 5, "unixReviewTime": 1}\n'


def not_utf8(shop: Shop) -> None:
    path = shop.raw / NAMES[0]
    path.write_bytes(path.read_bytes() + gzip.compress(NOT_UTF8))


FIELDS_2014, FIELDS_2023 = ["reviewerID", "asin", "overall", "unixReviewTime"], list(json.loads(IN_2023[0]))
SKIP = "--bad_lines skip"
#                 fault, file:line (None: any), bad lines and all lines, named values, in the fix
FAULTS = {
    "F09 reviews": (cut(NAMES[0], 300), f"{NAMES[0]}:None", (), [], ""),
    "F09 metadata": (cut(NAMES[1], 4), f"{NAMES[1]}:6", (5,), [], ""),
    "F10": (lines(["", "no JSON, but " + "x" * 100]), f"{NAMES[0]}:12", (1, 201), [repr("no JSON, but " + "x" * 67)],
            SKIP),
    "F10 metadata": (lines([], ["", "{'asin': 'item 9',"]), f"{NAMES[1]}:4", (1, 6), ["\"{'asin': 'item 9',\""], SKIP),
    "F11": (lines([review("a", "x", NOW, float("nan"))]), f"{NAMES[0]}:11", (1, 201), ["nan"], SKIP),
    "F11 infinite time": (lines(['{"reviewerID": "a", "asin": "x", "overall": 5, "unixReviewTime": Infinity}']),
                          f"{NAMES[0]}:11", (1, 201), ["inf"], SKIP),
    "F11 negative": (lines([review("a", "x", -1)]), f"{NAMES[0]}:11", (1, 201), [-1, "4,102,444,800"], SKIP),
    "F11 milliseconds": (lines([review("a", "x", NOW * 1000)]), f"{NAMES[0]}:11", (1, 201),
                         [NOW * 1000, "4,102,444,800", "--time_unit ms"], SKIP),
    "F12 reviews": (lambda shop: shop.write(IN_2023, RECORDS), NAMES[0], (), FIELDS_2014 + FIELDS_2023,
                    "--source amazon23"),
    "F12 metadata": (lambda shop: shop.write(REVIEWS, RECORDS_2023), NAMES[1], (), ["parent_asin", "title"],
                     "--source amazon23"),
    "F12 useless values": (every(reviewerID=None, unixReviewTime="?"), f"{NAMES[0]}:1", (200, 200), ["reviewerID"],
                           ""),
    "F13": (lines([review("", "x", NOW)]), f"{NAMES[0]}:11", (1, 201), ["reviewerID"], SKIP),
    "F13 endless": (lines([review("a", "x" * 10_001, NOW)]), f"{NAMES[0]}:11", (1, 201), ["10,001", "10,000"], SKIP),
    "F15": (lines([review("a\ud800", "x", NOW)]), f"{NAMES[0]}:11", (1, 201), [repr("a\ud800")], SKIP),
    "F15 not UTF-8": (not_utf8, f"{NAMES[0]}:201", (1, 201), ["0xff"], SKIP),
    "F16": (lines(["[" * 100_000]), f"{NAMES[0]}:11", (1, 201), ["[" * 80], SKIP),
    "F16 deep in an item": (lines([], ["{'asin': 'item 1', 'title': " + "[" * 10**5 + "]" * 10**5 + "}"]),
                            f"{NAMES[1]}:3", (1, 6), [], SKIP),
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_fault_is_named_and_changes_no_artifact(shop, whole, row):
    fault, place, counts, names, fix = FAULTS[row]
    shutil.copytree(whole.data, shop.data)
    before = shop.artifacts()
    fault(shop)
    outcome = shop.run("--source", "amazon14")
    error = outcome.error
    if place.endswith(":None"):
        line = int(error.where.rpartition(":")[2])
        place, counts = place.replace("None", str(line)), (line - 1,)
    outcome.check_error(DataError, f"{shop.raw}/{place}", names=names, fix=[fix])
    assert mentions(error.what, *counts)
    assert sum(map(len, error)) < 1000
    assert shop.artifacts() == before
    shop.repair()
    if " " not in row or row.endswith("reviews"):  # once for each of the faults
        assert shop.run("--force").code == 0
        assert shop.tables() == whole.tables()


def test_f10_bad_lines_are_skipped_up_to_one_percent(shop, whole):
    lines(["", "no JSON", review("a", "x", NOW, float("inf"))])(shop)
    outcome = shop.run("--bad_lines", "skip")
    assert outcome.code == 0, outcome.err
    assert prints(outcome.err, 2, 202, NAMES[0])
    listed = [json.loads(line) for line in (shop.data / "Baby" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(fault["where"], fault["excerpt"][:7]) for fault in listed] == [
        (f"{shop.raw}/{NAMES[0]}:12", "no JSON"), (f"{shop.raw}/{NAMES[0]}:13", '{"revie')]
    assert load_meta(shop.options.folder.interactions, "")["num_bad_lines"] == 2
    assert shop.tables() == whole.tables()
    before = shop.tables()
    lines(["no JSON"] * 3)(shop)
    outcome = shop.run("--bad_lines", "skip")
    outcome.check_error(DataError, f"{shop.raw}/{NAMES[0]}:11", names=["'no JSON'"])
    assert mentions(outcome.error.what, 3, 203, 1)  # 1 %
    assert shop.tables() == before
    assert "--bad_lines skip:2%" in outcome.error.fix
    assert shop.run("--bad_lines", "skip:2%").code == 0
    assert shop.tables() == before


def test_f11_the_flag_alone_sets_the_time_unit(shop, whole):
    every(unixReviewTime=None)(shop)
    shop.write([json.dumps({**json.loads(line), "unixReviewTime": json.loads(line)["unixReviewTime"] * 1000})
                for line in REVIEWS], RECORDS)
    assert shop.run().code == 3
    assert shop.run("--time_unit", "ms").code == 0
    assert shop.tables() == whole.tables()
    shop.repair()
    newest = max(time for _user, _item, time, _rating in EVENTS)
    shop.run("--time_unit", "ms", "--force").check_error(DataError, shop.raw / NAMES[0], names=[newest],
                                                         fix=["--time_unit s"])


def test_f13_odd_ids_reach_the_tables_unchanged(shop):
    events = [(raw_id, ODD_IDS[(place + n) % len(ODD_IDS)], NOW + n) for place, raw_id in enumerate(ODD_IDS)
              for n in range(3)]
    shop.write([review(*event) for event in events], [repr({"asin": raw_id, "title": "t"}) for raw_id in ODD_IDS])
    assert shop.run().code == 0
    folder = shop.options.folder
    assert load_users(folder)["raw_id"].tolist() == ODD_IDS
    assert sorted(load_items(folder)["raw_id"].tolist()) == sorted(ODD_IDS)
    assert set(load_items(folder)["title"]) == {"t"}


def test_f14_duplicates_are_counted_and_the_first_record_counts(shop):
    again = [repr({"asin": "item 1", "title": "Second"}), RECORDS[1]]
    shop.write([*REVIEWS, *REVIEWS[:7]], [*RECORDS, *again])
    outcome = shop.run()
    assert outcome.code == 0
    assert prints(outcome.out, 7, 2)  # item records
    meta = load_meta(shop.options.folder.items, "")
    assert (meta["num_records"], meta["num_duplicate_records"]) == (7, 2)
    assert meta["statistics"]["num_exact_duplicates"] == 7
    assert load_items(shop.options.folder)["title"].tolist() == [f"Title {n}" for n in range(5)]
    assert prints(shop.run("--duplicates", "exact").out, 7, "--duplicates exact", 200)


def test_f15_texts_of_every_script_survive(shop):
    title = "half \ud800 \ufeffmark e\u0301 \u00e9 \u202eolleh\u202c 🍼 &lt;script&gt;x&lt;/script&gt; a\u2028b"
    lines_2014 = [repr({"asin": f"item {n}", "title": title}) for n in range(5)]
    write_gz(shop.raw / NAMES[0], ["\ufeff" + REVIEWS[0] + "\r", *(line + "\r" for line in REVIEWS[1:])])
    (shop.raw / NAMES[1]).write_bytes(b"")
    write_gz(shop.raw / NAMES[1], [line.encode("utf-8", "backslashreplace").decode() for line in lines_2014])
    outcome = shop.run("--source", "amazon14")
    assert outcome.code == 0, outcome.err
    items = load_items(shop.options.folder)
    assert items["title"].tolist() == ["half ? \ufeffmark e\u0301 \u00e9 \u202eolleh\u202c 🍼 x a b"] * 5
    assert len(load_interactions(shop.options.folder).user) == 200


def test_f16_long_texts_are_cut_in_little_memory(shop):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))

    long = [repr({"asin": "item 0", "title": "Long", "description": "word &amp; " * 1_000_000}),
            repr({"asin": "item 1", "title": "Longer", "related": ["B" * 10] * 1_600_000}),
            repr({"asin": "item 2", "title": "Nested", "other": None}).replace("None", "[" * 10**5 + "]" * 10**5)]
    shop.write(REVIEWS, [*long, *RECORDS[3:]])
    outcome = shop.run_apart("--memory_limit", "1GB", limit=limit)
    assert outcome.code == 0, outcome.err
    assert prints(outcome.out, 1, 10000)
    assert load_meta(shop.options.folder.items, "")["num_texts_cut"] == 1
    texts = load_items(shop.options.folder)["text"].tolist()
    assert 9_980 < len(texts[0]) <= 10_000
    assert set(texts[0].removeprefix("Long. ").split()) == {"word", "&"}
    assert texts[1:3] == ["Longer", "Nested"]


def test_f18_items_and_records_without_a_match_are_counted(shop):
    shop.write(REVIEWS, [*RECORDS[:3], *(repr({"asin": f"unknown {n}", "title": "t"}) for n in range(4))])
    outcome = shop.run()
    assert outcome.code == 0
    assert prints(outcome.out, 7, 0, 4, 2)  # records, repeated ones, unused ones, and items without one
    assert prints(outcome.err, 2)  # items without a text
    meta = load_meta(shop.options.folder.items, "")
    assert (meta["num_without_record"], meta["num_unused_records"], meta["num_without_text"]) == (2, 4, 2)
    assert meta["settings"]["drop_items_without_text"] is False
    items = load_items(shop.options.folder)
    assert items["text"].tolist()[3:] == ["item 3", "item 4"]
    outcome = shop.run("--drop_items_without_text")
    assert (outcome.code, outcome.err) == (0, "")
    assert prints(outcome.out, 80, "--drop_items_without_text")
    assert load_meta(shop.options.folder.items, "")["settings"]["drop_items_without_text"] is True


def test_f19_equal_times_keep_the_input_order(shop):
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
