"""From raw files to the three tables: their rows, their metas, when they are made again, and the errors."""

import gzip
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import publishing
from common.artifacts import SPLITS, ids_sha256, load_interactions, load_items, load_meta, load_users, verify
from common.errors import ArtifactError, DataError
from common.publishing import file_sha256
from dataloader.process import check, outdated, process
from dataloader.workspace import Workspace
from tests.dataloader.helpers import contents, logged, mentions, review, table, write_baby, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND, run, version
from tests.errors import refused

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"

# user, item, time; the filters remove d, then z, then c
EVENTS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("c", "y", 1), ("c", "z", 2), ("d", "z", 1),
          ("a", "x", 3), ("b", "x", 3)]


def test_events_of_a_user_are_sorted_by_time_and_line(tmp_path):
    events = [("a", "p", 5), ("b", "s", 1), ("a", "q", 3), ("a", "r", 5), ("a", "s", 3), ("b", "p", 1), ("a", "p", 5)]
    folder = run(tmp_path, events).folder
    p, s, q, r = range(4)
    assert table(folder.interactions, '"user", item, "timestamp"') == [
        (0, q, 3), (0, s, 3), (0, p, 5), (0, r, 5), (0, p, 5), (1, s, 1), (1, p, 1)]


def test_the_filters_the_split_and_the_ratings_reach_the_table(tmp_path):
    events = [("a", "x", 1, 5.0), ("a", "x", 1, 4.0), ("a", "y", 2, 2.0), ("a", "y", 3, 3.0), ("a", "x", 4, 3.5),
              ("b", "y", 1, 5.0), ("b", "x", 2, 5.0), ("b", "y", 9, 5.0)]
    folder = run(tmp_path, events, "--min_rating", "3", "--duplicates", "exact").folder
    assert table(folder.interactions) == [
        (0, 0, 1, 5.0, "train"), (0, 1, 3, 3.0, "valid"), (0, 0, 4, 3.5, "test"),
        (1, 1, 1, 5.0, "train"), (1, 0, 2, 5.0, "valid"), (1, 1, 9, 5.0, "test")]


def test_the_same_user_and_item_twice_are_two_events(tmp_path):
    folder = run(tmp_path, [(user, "x", 1) for user in "aaab"]).folder
    assert table(folder.interactions, '"user", item, split') == [
        (0, 0, "train"), (0, 0, "valid"), (0, 0, "test"), (1, 0, "train")]
    assert load_meta(folder.interactions, "")["statistics"]["num_exact_duplicates"] == 2


def test_a_temporal_split_is_recorded_with_its_times(tmp_path):
    events = [(user, "x", time) for user, time in zip("abcdefghij", range(100, 110), strict=True)]
    options = run(tmp_path, events, "--split", "temporal", "--split_ratios", "0.5,0.2,0.3")
    meta = load_meta(options.folder.interactions, "")
    assert meta["split_name"] == "temporal"
    assert meta["split_begins"] == {"valid": 105, "test": 107}
    assert meta["num_in_split"] == {"train": 5, "valid": 2, "test": 3}
    assert meta["settings"]["split_ratios"] == [0.5, 0.2, 0.3]
    assert table(options.folder.interactions, "split") == [("train",)] * 5 + [("valid",)] * 2 + [("test",)] * 3


RAW_TIMES = [("s", "1400000001", "1400000002"), ("ms", "1400000001000", "1400000002999"),
             ("us", "1400000001000999", "1400000002000000"), ("date", "2014-05-13T16:53:21Z", "2014-05-13 16:53:22.9")]


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "first", "second"), RAW_TIMES)
def test_times_of_every_unit_become_whole_seconds(tmp_path, unit, first, second):
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f"{user},x,{time}\n" for user in "ab" for time in (second, first, second)))
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / "e.csv"),
                           "--min_user_interactions=0", "--min_item_interactions=0", "--time_unit", unit)
    process(options, COMMAND)
    times = [(1_400_000_001,), (1_400_000_002,), (1_400_000_002,)]
    assert table(options.folder.interactions, '"timestamp"') == times * 2


# The events, the flags, the names in the error, its counts (read; removed and left by each filter), the flags to relax.
@pytest.mark.slow
@pytest.mark.parametrize(("events", "flags", "names", "counts", "relax"), [
    ([], (), [], [0], []),
    (EVENTS, ("--min_user_interactions=5", "--min_item_interactions=5"), ["5/5"], [9, 9, 0],
     ["--min_user_interactions", "--min_item_interactions"]),
    (EVENTS, ("--min_rating=5.5", "--duplicates=exact"), ["--min_rating 5.5", "--duplicates exact"], [9, 9, 0, 0, 0],
     ["--min_rating"]),
    ([("a", "x", 1)] * 9, (), [], [9], []),
    (EVENTS[:2] * 2 + EVENTS[2:3], ("--min_user_interactions=2",), ["2/0"], [5, 1, 4], ["--min_user_interactions"]),
    (EVENTS[:7], (), ["valid", "test"], [7], []),
    (EVENTS, ("--duplicates=user_item",), ["valid", "test", "--duplicates user_item"], [9, 2, 7], ["--duplicates"]),
    ([(u, "x", 1) for u in "abcdef"], ("--split=temporal",), SPLITS, [1, 1, 6], ["--split"]),
], ids=["empty file", "nothing left by the core", "nothing left by the rating", "one user", "one user left",
        "no user with three events", "none left with three", "one moment"])
def test_too_few_events_are_refused_with_counts_and_flags(tmp_path, events, flags, names, counts, relax):
    with refused(DataError, tmp_path / "raw" / "reviews_Baby_5.json.gz") as raised:
        run(tmp_path, events, *flags)
    told = f"{raised.value.what} {raised.value.why}"
    assert mentions(told, *names), told
    in_order = iter(re.findall(r"\d+", told))
    assert all(str(count) in in_order for count in counts), told
    assert re.findall(r"--\w+", raised.value.fix) == relax
    if "valid" not in names:  # the error is about users, not about the split that comes next
        assert not mentions(told, *SPLITS)
    assert [path.name for path in (tmp_path / "data" / "Baby").iterdir()] == [".lock"]


def test_records_and_items_without_each_other_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metadata = [repr({"asin": asin, "title": "Cup"}) for asin in ("x", "x", "unsold", "unsold", "unheard of")]
    meta = load_meta(run(tmp_path, EVENTS, metadata=metadata).folder.items, "")
    assert {key: meta[key] for key in ("num_records", "num_duplicate_records", "num_unused_records",
                                       "num_without_record", "num_without_text")} == {
        "num_records": 5, "num_duplicate_records": 2, "num_unused_records": 2, "num_without_record": 2,
        "num_without_text": 2}
    assert ["5", "2", "2", "2"] in [re.findall(r"\d+", record.message) for record in caplog.records]


def test_skipped_lines_are_counted_and_listed(tmp_path):
    events = [review(f"u{n % 20}", f"i{n % 7}", n) for n in range(300)]
    write_gz(tmp_path / "raw" / "reviews_Baby_5.json.gz", [*events, "{", review("u1", "i1", 1, 99.0)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--bad_lines", "skip")
    process(options, COMMAND)
    meta = load_meta(options.folder.interactions, "")
    assert (meta["num_bad_lines"], meta["num_interactions"], meta["settings"]["bad_lines"]) == (2, 300, "skip")
    assert meta["filters"][0] == {"step": "read", "interactions": 300}
    listed = [json.loads(line) for line in (options.folder.path / "bad_lines.jsonl").read_text().splitlines()]
    assert [entry["where"].rsplit(":")[-1] for entry in listed] == ["301", "302"]


def test_the_metas_record_inputs_counts_and_settings(tmp_path):
    options = run(tmp_path, EVENTS, minimum=2)
    folder, raw = options.folder, tmp_path / "raw"
    meta = load_meta(folder.interactions, "")
    assert meta["inputs"] == {"items.parquet": file_sha256(folder.items), "users.parquet": file_sha256(folder.users)}
    assert meta["raw"] == {role: {"file": name, "sha256": file_sha256(raw / name), "size": (raw / name).stat().st_size,
                                  "mtime_ns": (raw / name).stat().st_mtime_ns} for role, name in (
        ("interactions", "reviews_Baby_5.json.gz"), ("items", "meta_Baby.json.gz"))}
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (2, 2, 6)
    assert meta["settings"] == {
        "source": "amazon14", "min_rating": None, "duplicates": "keep", "min_user_interactions": 2,
        "min_item_interactions": 2, "drop_items_without_text": False, "template": ["{title}", "{description}"],
        "split": "leave_one_out", "time_unit": "s", "time_format": None,
        "missing_values": None, "bad_lines": "fail"}
    assert meta["command"] == COMMAND
    assert meta["split_name"] == "leave_one_out"
    assert load_meta(folder.items, "")["items_sha256"] == meta["items_sha256"] == ids_sha256(["x", "y"])
    for path in (folder.interactions, folder.items, folder.users):
        verify(path, "")


def test_the_tables_read_back_as_the_next_stage_reads_them(tmp_path):
    folder = run(tmp_path, EVENTS, minimum=2).folder
    interactions = load_interactions(folder)
    assert interactions.user.tolist() == [0, 0, 0, 1, 1, 1]
    assert interactions.item.tolist() == [0, 1, 0, 0, 1, 0]
    assert interactions.timestamp.tolist() == [1, 2, 3, 1, 2, 3]
    assert interactions.split.tolist() == [0, 1, 2, 0, 1, 2]
    assert load_users(folder)["raw_id"].tolist() == ["a", "b"]
    assert load_items(folder)["raw_id"].tolist() == ["x", "y"]


def many_events(count: int = 1500) -> list[tuple[str, str, int]]:
    rng = random.Random(3)
    return [(f"user {rng.randrange(count // 25)}", f"item {rng.randrange(count // 40)}", rng.randrange(5))
            for _ in range(count)]


def test_running_twice_gives_the_same_bytes(tmp_path):
    first, second = (run(tmp_path / name, many_events(), minimum=5).folder for name in ("first", "second"))
    assert contents(first) == contents(second)


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    """More rows than one thread takes at a time (122,880), and many equal times."""
    raw = tmp_path / "raw" / "reviews_Baby_5.json.gz"
    raw.parent.mkdir()
    with gzip.open(raw, "wt", compresslevel=1) as file:
        file.writelines(review(*event) + "\n" for event in many_events(150_000))
    options = make_options(tmp_path / "data", "--raw_dir", str(raw.parent), "--force")
    enter, found = Workspace.__enter__, []
    for num_threads in (1, 3):
        def with_threads(work: Workspace, num_threads: int = num_threads) -> Workspace:
            work = enter(work)
            work.run(f"SET threads = {num_threads}")
            return work

        monkeypatch.setattr(Workspace, "__enter__", with_threads)
        process(options, COMMAND)
        found.append(contents(options.folder))
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_hash_seed_changes_nothing(tmp_path):
    write_baby(tmp_path / "raw", many_events())
    found = []
    for seed in ("1", "2"):
        words = [sys.executable, "-P", "-m", "dataloader.process", "--raw_dir", str(tmp_path / "raw"),
                 "--data_root", str(tmp_path / seed)]
        subprocess.run(words, check=True, capture_output=True, cwd=tmp_path,
                       env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)})
        found.append(contents(make_options(tmp_path / seed).folder))
    assert found[0] == found[1]


def test_the_second_run_reuses_the_tables(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = run(tmp_path, EVENTS).folder.interactions
    before = version(path)
    caplog.clear()
    run(tmp_path, EVENTS)
    assert version(path) == before
    [record] = caplog.records
    assert mentions(record.message, path, 4, 3, 9)  # users, items, interactions


def test_force_makes_the_tables_again_with_the_same_bytes(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    before, written = contents(folder), version(folder.interactions)
    run(tmp_path, EVENTS, "--force")
    assert contents(folder) == before
    assert version(folder.interactions) != written


def test_the_tables_are_reused_without_their_raw_files(tmp_path):
    options = run(tmp_path, EVENTS)
    before = version(options.folder.interactions)
    shutil.rmtree(tmp_path / "raw")
    process(options, COMMAND)
    assert version(options.folder.interactions) == before


@pytest.mark.slow
def test_changed_settings_make_the_tables_again_and_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, EVENTS)
    folder = run(tmp_path, EVENTS, minimum=2).folder
    assert load_meta(folder.interactions, "")["num_interactions"] == 6
    [line] = [record.message for record in caplog.records if mentions(
        record.message, "min_item_interactions", "min_user_interactions")]
    assert re.findall(r"\d+", line) == ["0", "2"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ("--min_rating=1",), ("--duplicates=exact",), ("--template={title}",), ("--drop_items_without_text",),
    ("--split=temporal",), ("--time_unit=ms",), ("--bad_lines=skip",), ("--source=amazon18",)])
def test_every_setting_of_the_tables_makes_them_outdated(tmp_path, flags):
    metadata = [repr({"asin": asin, "title": asin}) for asin in "xyz"]
    options = run(tmp_path, EVENTS, metadata=metadata)
    raw = ("--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0")
    assert not outdated(make_options(options.folder.data_root, *raw))
    assert outdated(make_options(options.folder.data_root, *raw, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--memory_limit=1GB",), ("--seed=3",), ("--suffix=image",), ("--mirror=http://h",)])
def test_flags_of_other_steps_leave_the_tables_current(tmp_path, flags):
    run(tmp_path, EVENTS)
    assert not outdated(make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0",
                                   "--min_item_interactions=0", *flags))


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["reviews", "metadata"])
def test_a_changed_raw_file_makes_the_tables_again(tmp_path, changed):
    run(tmp_path, EVENTS)
    if changed == "reviews":
        folder = run(tmp_path, EVENTS[1:]).folder
        assert load_meta(folder.interactions, "")["num_interactions"] == 8
    else:
        folder = run(tmp_path, EVENTS, metadata=[repr({"asin": "x", "title": "Cup"})]).folder
        assert load_items(folder)["title"].tolist() == ["Cup", "y", "z"]


def damage_in_disguise(path: Path) -> None:
    """Change the bytes of a file, but not its size and modification time."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_raw_files_that_look_unchanged_are_not_read(tmp_path, monkeypatch):
    options = run(tmp_path, EVENTS)
    monkeypatch.setattr(publishing, "_sha256_of_version", lambda *version: pytest.fail("reads a raw file"))
    damage_in_disguise(tmp_path / "raw" / "reviews_Baby_5.json.gz")
    assert not outdated(options)


def test_a_changed_raw_file_is_hashed_once_for_the_rebuild(tmp_path, monkeypatch):
    options = run(tmp_path, EVENTS)
    write_baby(tmp_path / "raw", EVENTS[1:])
    hashed = []
    monkeypatch.setattr(publishing, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    process(options, COMMAND)
    assert [name for name in hashed if name.endswith(".gz")] == ["reviews_Baby_5.json.gz", "meta_Baby.json.gz"]


def test_a_check_finds_a_raw_file_that_only_looks_unchanged(tmp_path):
    raw = make_options(tmp_path / "data").folder.path / "raw" / "amazon14"
    write_baby(raw, EVENTS, [repr({"asin": "x", "title": "Cup"})])
    flags = ("--min_user_interactions=0", "--min_item_interactions=0")
    process(make_options(tmp_path / "data", *flags), COMMAND)
    checked = make_options(tmp_path / "data", "--check", *flags)
    check(checked)
    damage_in_disguise(raw / "meta_Baby.json.gz")
    publishing._sha256_of_version.cache_clear()  # as in a new process
    with refused(ArtifactError, checked.folder.interactions, names=["meta_Baby.json.gz"],
                 fix=[f"{checked.folder.make_command} --force"]):
        check(checked)


def test_a_damaged_table_is_made_again(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    whole = contents(folder)
    folder.items.write_bytes(b"")
    run(tmp_path, EVENTS)
    assert contents(folder) == whole


@pytest.mark.slow
def test_a_failed_run_keeps_the_old_tables(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    before = contents(folder)
    with pytest.raises(DataError):
        run(tmp_path, EVENTS, metadata=["no record"], minimum=2)
    assert contents(folder) == before
    assert {path.name for path in folder.path.iterdir()} == {
        ".lock", folder.source_flags.name, folder.card.name, *before, *(f"{n}.meta.json" for n in before)}


SHOP = "kunde,ware,wann\n" + "".join(f"{user},{item},{time}\n" for user in "ab" for time, item in enumerate("xyx"))


def shop(tmp_path: Path, *flags: str, named: bool = True):
    if named:
        (tmp_path / "shop.csv").write_text(SHOP)
    files = ("--interactions", str(tmp_path / "shop.csv"), "--user_column=kunde", "--item_column=ware",
             "--time_column=wann") if named else ()
    return make_options(tmp_path / "data", "--dataset", "shop", "--min_user_interactions=0",
                        "--min_item_interactions=0", *files, *flags)


def test_a_later_run_knows_a_dataset_of_own_files(tmp_path):
    process(shop(tmp_path), COMMAND)
    later = shop(tmp_path, named=False)
    assert later.source == "local"
    before = version(later.folder.interactions)
    process(later, COMMAND)
    (tmp_path / "shop.csv").write_text(SHOP + "c,x,9\n")
    process(later, COMMAND)
    assert version(later.folder.interactions) != before


def test_other_settings_for_own_files_need_the_files(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    process(shop(tmp_path), COMMAND)
    before = contents(shop(tmp_path).folder)
    (tmp_path / "shop.csv").unlink()
    later = shop(tmp_path, "--duplicates=exact", named=False)
    with refused(DataError, later.raw, fix=["--interactions FILE"]):
        process(later, COMMAND)
    assert logged(caplog, "duplicates", "keep", "exact")
    assert contents(shop(tmp_path).folder) == before


def comparison(tmp_path: Path, caplog, expected: list[int], *flags: str) -> list[logging.LogRecord]:
    """The log records that are there only because the YAML of the source has `expected` counts."""
    caplog.set_level(logging.INFO)
    write_baby(tmp_path / "raw", [(f"user {u}", f"item {i}", i) for u in range(5) for i in range(6)])
    options, records = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), *flags), []
    for counts in ({}, {"Baby": expected}):
        caplog.clear()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        process(options._replace(config={**options.config, "expected": counts}), COMMAND)
        records.append(caplog.records[:])
    without = {record.message for record in records[0]}
    return [record for record in records[1] if record.message not in without]


def test_expected_counts_are_confirmed(tmp_path, caplog):
    assert [record.levelno for record in comparison(tmp_path, caplog, [5, 6, 30])] == [logging.INFO]


def test_other_counts_than_expected_are_a_warning(tmp_path, caplog):
    [record] = comparison(tmp_path, caplog, [5, 6, 31])
    assert record.levelno == logging.WARNING
    assert re.findall(r"\d+", record.message) == ["5", "6", "31", "5", "6", "30"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--min_user_interactions=4",), ("--duplicates=exact",), ("--min_rating=1",)])
def test_counts_of_other_filters_are_not_compared(tmp_path, caplog, flags):
    assert comparison(tmp_path, caplog, [5, 6, 31], *flags) == []


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "Beauty").exists(), reason=f"the real dataset is not there: {REAL / 'Beauty'}")
def test_the_real_beauty_has_the_counts_of_the_literature(tmp_path):
    options = make_options(tmp_path, "--dataset", "Beauty", "--raw_dir", str(REAL / "Beauty"), "--source", "amazon14")
    process(options, COMMAND)
    meta = load_meta(options.folder.interactions, "")
    counts = [meta["num_users"], meta["num_items"], meta["num_interactions"]]
    assert counts == options.config["expected"]["Beauty"] == [22363, 12101, 198502]
