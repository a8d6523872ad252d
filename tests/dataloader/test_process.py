"""From raw files to the three tables: what is in them, what is recorded, what is made again when, what is an error."""

import gzip
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import publishing
from common.artifacts import ids_sha256, load_interactions, load_items, load_meta, load_users, verify
from common.errors import ArtifactError, DataError
from common.publishing import file_sha256
from dataloader.process import check, outdated, process
from dataloader.workspace import Workspace
from tests.dataloader.helpers import contents, review, table, write_baby, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND, run

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"

#        user, item, time; d falls first, then z, then c
EVENTS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("c", "y", 1), ("c", "z", 2), ("d", "z", 1),
          ("a", "x", 3), ("b", "x", 3)]


def test_a_user_s_events_go_by_time_and_then_by_input_line(tmp_path):
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


def test_a_temporal_split_is_recorded_with_its_moments(tmp_path):
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
def test_whole_seconds_are_published_whatever_the_raw_times_count(tmp_path, unit, first, second):
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(
        f"{user},x,{time}\n" for user in "ab" for time in (second, first, second)))
    options = make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / "e.csv"),
                           "--min_user_interactions=0", "--min_item_interactions=0", "--time_unit", unit)
    process(options, COMMAND)
    times = [(1_400_000_001,), (1_400_000_002,), (1_400_000_002,)]
    assert table(options.folder.interactions, '"timestamp"') == times * 2


@pytest.mark.slow
@pytest.mark.parametrize(("events", "flags", "what", "why", "fix"), [
    ([], (), "no interaction is left", "0 interactions read", "a file with more interactions"),
    (EVENTS, ("--min_user_interactions=5", "--min_item_interactions=5"), "no interaction is left",
     "9 interactions read; 9 removed by the 5/5-core, 0 left",
     "relax --min_user_interactions or --min_item_interactions"),
    (EVENTS, ("--min_rating=5.5", "--duplicates=exact"), "no interaction is left",
     "9 interactions read; 9 removed by --min_rating 5.5, 0 left; 0 removed by --duplicates exact, 0 left",
     "relax --min_rating"),
    ([("a", "x", 1)] * 9, (), "only one user is left", "9 interactions read", "a file with more interactions"),
    (EVENTS[:2] * 2 + EVENTS[2:3], ("--min_user_interactions=2",), "only one user is left",
     "5 interactions read; 1 removed by the 2/0-core, 4 left", "relax --min_user_interactions"),
    (EVENTS[:7], (), "no event is left for valid and test", "no user has three events; 7 interactions read",
     "a file with more interactions"),
    (EVENTS, ("--duplicates=user_item",), "no event is left for valid and test",
     "no user has three events; 9 interactions read; 2 removed by --duplicates user_item, 7 left",
     "relax --duplicates"),
    ([(u, "x", 1) for u in "abcdef"], ("--split=temporal",), "no event is left for train and valid",
     "by time, valid at 1 and test at 1 (seconds); 6 interactions read", "other --split_ratios or --split_dates"),
], ids=["empty file", "nothing left by the core", "nothing left by the rating", "one user", "one user left",
        "no user with three events", "none left with three", "one moment"])
def test_too_little_is_an_error_with_the_counts_of_every_filter_and_the_keys_to_relax(tmp_path, events, flags, what,
                                                                                      why, fix):
    with pytest.raises(DataError) as error:
        run(tmp_path, events, *flags)
    assert error.value.exit_code == 3
    assert (error.value.where, error.value.what) == (tmp_path / "raw" / "reviews_Baby_5.json.gz", what)
    assert (error.value.why, error.value.fix) == (why, fix)
    assert [path.name for path in (tmp_path / "data" / "Baby").iterdir()] == [".lock"]


def test_interactions_without_items_and_items_without_interactions_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metadata = [repr({"asin": asin, "title": "Cup"}) for asin in ("x", "x", "unsold", "unsold", "unheard of")]
    meta = load_meta(run(tmp_path, EVENTS, metadata=metadata).folder.items, "")
    assert {key: meta[key] for key in ("num_records", "num_duplicate_records", "num_unused_records",
                                       "num_without_record", "num_without_text")} == {
        "num_records": 5, "num_duplicate_records": 2, "num_unused_records": 2, "num_without_record": 2,
        "num_without_text": 2}
    assert ("5 item records: 2 repeat another, 2 are of items without interactions; 2 items have no record"
            in caplog.text)


def test_lines_that_are_left_out_are_counted_and_listed(tmp_path):
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
        "split": "leave_one_out", "time_unit": "s", "bad_lines": "fail"}
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


def test_the_second_run_reuses_the_tables_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = run(tmp_path, EVENTS).folder.interactions.stat()
    assert "reusing" not in caplog.text
    after = run(tmp_path, EVENTS).folder.interactions.stat()
    assert "process: reusing" in caplog.text
    assert "4 users, 3 items, 9 interactions" in caplog.text
    assert after == before


def test_force_makes_the_tables_again_with_the_same_bytes(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    before, written = contents(folder), folder.interactions.stat().st_mtime_ns
    run(tmp_path, EVENTS, "--force")
    assert contents(folder) == before
    assert folder.interactions.stat().st_mtime_ns > written


def test_the_tables_are_reused_when_the_raw_files_are_deleted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = run(tmp_path, EVENTS)
    shutil.rmtree(tmp_path / "raw")
    process(options, COMMAND)
    assert "process: reusing" in caplog.text


@pytest.mark.slow
def test_changed_settings_make_the_tables_again_and_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, EVENTS)
    folder = run(tmp_path, EVENTS, minimum=2).folder
    assert load_meta(folder.interactions, "")["num_interactions"] == 6
    assert "making the tables again (min_item_interactions: 0 -> 2; min_user_interactions: 0 -> 2)" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ("--min_rating=1",), ("--duplicates=exact",), ("--template={title}",), ("--drop_items_without_text",),
    ("--split=temporal",), ("--time_unit=ms",), ("--bad_lines=skip",), ("--source=amazon18",)])
def test_every_setting_that_the_tables_depend_on_makes_them_outdated(tmp_path, flags):
    metadata = [repr({"asin": asin, "title": asin}) for asin in "xyz"]
    options = run(tmp_path, EVENTS, metadata=metadata)
    raw = ("--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0")
    assert not outdated(make_options(options.folder.data_root, *raw))
    assert outdated(make_options(options.folder.data_root, *raw, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--memory_limit=1GB",), ("--seed=3",), ("--suffix=image",), ("--mirror=http://h",)])
def test_flags_of_other_steps_and_of_the_machine_leave_the_tables_current(tmp_path, flags):
    run(tmp_path, EVENTS)
    assert not outdated(make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0",
                                   "--min_item_interactions=0", *flags))


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["reviews", "metadata"])
def test_a_changed_raw_file_makes_the_tables_again(tmp_path, changed, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, EVENTS)
    if changed == "reviews":
        folder = run(tmp_path, EVENTS[1:]).folder
        assert load_meta(folder.interactions, "")["num_interactions"] == 8
    else:
        folder = run(tmp_path, EVENTS, metadata=[repr({"asin": "x", "title": "Cup"})]).folder
        assert load_items(folder)["title"].tolist() == ["Cup", "y", "z"]
    assert "making the tables again (the raw files have changed)" in caplog.text


def damage_in_disguise(path: Path) -> None:
    """Other bytes under the same size and modification time."""
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
    publishing._sha256_of_version.cache_clear()  # a check is a process of its own
    with pytest.raises(ArtifactError) as error:
        check(checked)
    assert (error.value.where, error.value.exit_code) == (checked.folder.interactions, 4)
    assert "meta_Baby.json.gz" in error.value.why


def test_a_damaged_table_is_made_again(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    whole = contents(folder)
    folder.items.write_bytes(b"")
    run(tmp_path, EVENTS)
    assert contents(folder) == whole


@pytest.mark.slow
def test_a_failed_run_leaves_the_tables_that_were_there(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    before = contents(folder)
    with pytest.raises(DataError):
        run(tmp_path, EVENTS, metadata=["no record"], minimum=2)
    assert contents(folder) == before
    assert {path.name for path in folder.path.iterdir()} == {".lock", *before, *(f"{n}.meta.json" for n in before)}


SHOP = "kunde,ware,wann\n" + "".join(f"{user},{item},{time}\n" for user in "ab" for time, item in enumerate("xyx"))


def shop(tmp_path: Path, *flags: str, named: bool = True):
    (tmp_path / "shop.csv").write_text(SHOP)
    files = ("--interactions", str(tmp_path / "shop.csv"), "--user_column=kunde", "--item_column=ware",
             "--time_column=wann") if named else ()
    return make_options(tmp_path / "data", "--dataset", "shop", "--min_user_interactions=0",
                        "--min_item_interactions=0", *files, *flags)


def test_a_data_set_of_own_files_is_known_later_without_naming_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    process(shop(tmp_path), COMMAND)
    later = shop(tmp_path, named=False)
    assert later.source == "local"
    process(later, COMMAND)
    assert "process: reusing" in caplog.text
    (tmp_path / "shop.csv").write_text(SHOP + "c,x,9\n")
    process(later, COMMAND)  # the file is not named: nothing tells that it has changed


def test_other_settings_for_own_files_that_are_not_named_ask_for_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    process(shop(tmp_path), COMMAND)
    before = contents(shop(tmp_path).folder)
    with pytest.raises(DataError) as error:
        process(shop(tmp_path, "--duplicates=exact", named=False), COMMAND)
    assert error.value.fix == "name them: --interactions FILE"
    assert "duplicates: keep -> exact" in caplog.text
    assert contents(shop(tmp_path).folder) == before


@pytest.mark.parametrize(("expected", "level", "message"), [
    ([5, 6, 30], logging.INFO, "these are the counts that the literature has"),
    ([5, 6, 31], logging.WARNING, "the literature has [5, 6, 31] users, items, interactions, and this set [5, 6, 30]"),
])
def test_counts_are_compared_with_the_literature_s(tmp_path, caplog, expected, level, message):
    caplog.set_level(logging.INFO)
    write_baby(tmp_path / "raw", [(f"user {u}", f"item {i}", i) for u in range(5) for i in range(6)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"))
    process(options._replace(config={**options.config, "expected": {"Baby": expected}}), COMMAND)
    assert (level, message) in [(record.levelno, record.message.removeprefix("process: ")) for record in caplog.records]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--min_user_interactions=4",), ("--duplicates=exact",), ("--min_rating=1",)])
def test_another_way_of_filtering_is_not_compared(tmp_path, caplog, flags):
    caplog.set_level(logging.INFO)
    write_baby(tmp_path / "raw", [(f"user {u}", f"item {i}", i) for u in range(5) for i in range(6)])
    process(make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), *flags), COMMAND)
    assert "literature" not in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "Beauty").exists(), reason=f"the real data set is not there: {REAL / 'Beauty'}")
def test_the_real_beauty_has_the_counts_that_the_literature_has(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = make_options(tmp_path, "--dataset", "Beauty", "--raw_dir", str(REAL / "Beauty"), "--source", "amazon14")
    process(options, COMMAND)
    meta = load_meta(options.folder.interactions, "")
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (22363, 12101, 198502)
    assert "these are the counts that the literature has" in caplog.text
