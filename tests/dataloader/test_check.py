"""--check finds what is wrong with a folder, names the file, and writes nothing."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from common.artifacts import DatasetFolder, load_meta, save_array
from common.errors import ArtifactError, DataError, ResourceError
from common.publishing import file_sha256, meta_path, write_meta
from tests.dataloader.checking import EVENTS, check, flip, refused, state
from tests.dataloader.processing import run

VECTORS = [[0.5, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The raw files in `raw`, and in `data` a sound data set with all kinds of files."""
    root = tmp_path_factory.mktemp("made")
    folder = run(root, EVENTS).folder
    save(folder, folder.embeddings("td"), VECTORS)
    save(folder, folder.mask("image"), [True, False, True, True, True], dtype=bool)
    save(folder, folder.embeddings("image"), [VECTORS[0], [0, 0], *VECTORS[2:]], inputs=[folder.mask("image")])
    save(folder, folder.codes("vq", "td", None), [[0, 1], [1, 0], [2, 0], [3, 1], [3, 0]], dtype=np.int32,
         codebook_sizes=[4, 2])
    return root


@pytest.fixture
def folder(made, tmp_path) -> DatasetFolder:
    """A copy of that, for a test to damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return DatasetFolder(tmp_path / "data", "Baby")


def save(folder: DatasetFolder, path: Path, rows, dtype=np.float32, inputs=(), **meta) -> None:
    items = load_meta(folder.items, "")
    save_array(path, np.array(rows, dtype=dtype), {
        "inputs": {folder.items.name: items["sha256"], **{p.name: file_sha256(p) for p in inputs}},
        "items_sha256": items["items_sha256"], "command": f"make {path.name}", **meta})


def change(path: Path, query: str) -> None:
    """Write a table anew as a query over `t`, its present rows; its meta, and what records it, are made to fit."""
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE t AS FROM read_parquet('{path}')")
        connection.sql(query).write_parquet(str(path))
    make_metas_fit(DatasetFolder(path.parent.parent, path.parent.name))


def make_metas_fit(folder: DatasetFolder) -> None:
    arrays = sorted(folder.path.glob("*.npy"), key=lambda path: ".mask-" not in path.name)  # the masks are inputs
    for path in (folder.items, folder.users, folder.interactions, *arrays):
        if meta_path(path).exists():
            meta = json.loads(meta_path(path).read_text())
            for key in ("sha256", "size"):
                del meta[key]
            write_meta(path, {**meta, "inputs": {name: file_sha256(folder.path / name) for name in meta["inputs"]}})


def test_a_sound_folder_is_said_to_be_sound_and_left_as_it_is(folder, caplog):
    caplog.set_level(logging.INFO)
    before = state(folder)
    check(folder)
    assert state(folder) == before
    assert f"check: {folder.path} is sound: 7 files" in caplog.text
    for name in ("items.parquet: content ok", "interactions.parquet: events ok", "Baby.codes-vq-td.npy: content ok"):
        assert f"check: {name}" in caplog.text


INTERACTIONS = [
    ('SELECT * REPLACE (item + 1 AS item) FROM t', "2 events name an item that items.parquet lacks"),
    ('SELECT * REPLACE ("user" - 1 AS "user") FROM t', "4 events name a user that users.parquet lacks"),
    ('FROM t ORDER BY rowid DESC', "events are not in order of user and time"),
    ('SELECT * REPLACE (CASE "timestamp" WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE "timestamp" END AS "timestamp") FROM t',
     "3 events are not in order of user and time"),
    ("SELECT * REPLACE (CASE split WHEN 'test' THEN 'train' WHEN 'valid' THEN 'test' ELSE split END AS split) FROM t",
     "3 events of train or valid stand behind one of a later split of the same user: it would leak"),
    ("SELECT * REPLACE (CASE split WHEN 'valid' THEN 'test' ELSE split END AS split) FROM t",
     "3 users have several test events, which is not leave-one-out"),
    ("SELECT * REPLACE (CASE split WHEN 'train' THEN 'valid' ELSE split END AS split) FROM t",
     "3 users have several valid events, which is not leave-one-out"),
    ("SELECT * REPLACE (replace(split, 'valid', 'dev') AS split) FROM t",
     "3 events have a split that is none of train, valid, test"),
    ("SELECT * REPLACE (CASE item WHEN 0 THEN 'nan'::FLOAT ELSE rating END AS rating) FROM t",
     "events have a rating that is not finite"),
    ('FROM t WHERE "user" <> 1', "1 of the 3 users of users.parquet have no event"),
    ('SELECT * REPLACE (nullif("timestamp", 0) AS "timestamp") FROM t', "3 rows have no timestamp"),
    ("SELECT * EXCLUDE (split) FROM t", "lacks the columns split; it has user, item, timestamp, rating"),
    ('SELECT * REPLACE ("user"::VARCHAR AS "user") FROM t', "has the column user as VARCHAR, wanted TINYINT or"),
    ("FROM t LIMIT 0", "has no rows"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("query", "finding"), INTERACTIONS, ids=[finding for _query, finding in INTERACTIONS])
def test_what_is_wrong_with_the_interactions_is_found(folder, caplog, query, finding):
    change(folder.interactions, query)
    found = refused(folder, DataError, caplog)
    assert any(line.startswith("interactions.parquet: ") and finding in line for line in found), found


@pytest.mark.slow
@pytest.mark.parametrize(("table", "query", "finding"), [
    ("items", "SELECT * REPLACE (item + (item > 2)::INTEGER AS item) FROM t",
     "items.parquet: the items are not 0 to 4: there are 5 different ones from 0 to 5"),
    ("items", "SELECT * REPLACE (item % 4 AS item) FROM t",
     "items.parquet: the items are not 0 to 4: there are 4 different ones from 0 to 3"),
    ("users", 'SELECT * REPLACE ("user" + 1 AS "user") FROM t',
     "users.parquet: the users are not 0 to 2: there are 3 different ones from 1 to 3"),
    ("users", "SELECT * REPLACE (replace(raw_id, 'b', 'a') AS raw_id) FROM t",
     "users.parquet: only 2 of 3 raw ids are different"),
    ("items", "SELECT * REPLACE (nullif(\"text\", 'v') AS \"text\") FROM t", "items.parquet: 1 rows have no text"),
    ("items", "SELECT * EXCLUDE (title) FROM t", "items.parquet: lacks the columns title; it has item, raw_id, text"),
    ("users", "FROM t LIMIT 0", "users.parquet: has no rows"),
])
def test_what_is_wrong_with_items_and_users_is_found(folder, caplog, table, query, finding):
    change(getattr(folder, table), query)
    found = refused(folder, DataError, caplog)
    assert any(line.startswith(finding) for line in found), found


def by_time(folder: DatasetFolder, query: str) -> None:
    """Give the events other splits or times, and the meta a temporal split."""
    meta = json.loads(meta_path(folder.interactions).read_text())
    meta_path(folder.interactions).write_text(json.dumps({**meta, "split_name": "temporal"}))
    change(folder.interactions, query)


@pytest.mark.parametrize(("border", "finding"), [
    (2, None),
    (3, "train goes on until 2, and test begins at 2"),  # at the very moment
])
def test_by_time_no_training_event_may_be_later_than_or_at_the_moment_of_a_test_event(folder, caplog, border, finding):
    # The last user's events of the second 2 are in test, whatever the other users' border is.
    by_time(folder, f"""SELECT * REPLACE (CASE WHEN "timestamp" < CASE "user" WHEN 2 THEN 2 ELSE {border} END
                                          THEN 'train' ELSE 'test' END AS split) FROM t""")
    if finding is None:
        check(folder)
    else:
        assert refused(folder, DataError, caplog) == [f"interactions.parquet: {finding}"]


def test_by_time_validation_may_not_overlap_either(folder, caplog):
    by_time(folder, """SELECT * REPLACE (CASE WHEN "timestamp" = 0 THEN 'train'
        WHEN "timestamp" < 2 + ("user" > 1)::INTEGER THEN 'valid' ELSE 'test' END AS split) FROM t""")
    assert refused(folder, DataError, caplog) == [
        "interactions.parquet: valid goes on until 2, and test begins at 2"]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "dtype", "finding"), [
    (VECTORS[:4], np.float32, "has 4 rows, and there are 5 items"),
    ([*VECTORS[:3], [np.nan, 1], [1, -np.inf]], np.float32, "rows [3, 4] are not finite"),
    ([[0, 0], *VECTORS[1:]], np.float32, "rows [0] are all zero"),
    (VECTORS, np.float64, "holds float64 (5, 2), wanted float32 with 2 dimensions"),
    (VECTORS, np.float16, "holds float16 (5, 2), wanted float32 with 2 dimensions"),
    ([1, 2, 3, 4, 5], np.float32, "holds float32 (5,), wanted float32 with 2 dimensions"),
])
def test_what_is_wrong_with_embeddings_is_found(folder, caplog, rows, dtype, finding):
    save(folder, folder.embeddings("td"), rows, dtype)
    assert refused(folder, DataError, caplog) == [f"Baby.emb-td.npy: {finding}"]


def test_of_many_bad_rows_the_first_are_named_across_blocks(folder, caplog, monkeypatch):
    monkeypatch.setattr("dataloader.check.ROWS", 2)
    monkeypatch.setattr("dataloader.check.NUM_NAMED", 2)
    save(folder, folder.embeddings("td"), [VECTORS[0], *[[0, 0]] * 3, [np.nan, 0]])
    assert refused(folder, DataError, caplog) == ["Baby.emb-td.npy: rows [4] are not finite",
                                                  "Baby.emb-td.npy: rows [1, 2] and 1 more are all zero"]


@pytest.mark.parametrize(("codes", "dtype", "finding"), [
    ([[0, 1], [1, 0], [2, 0], [3, 1], [0, 1]], np.int32, "gives several items the same semantic ID"),
    ([[0, 1], [1, 0], [2, 0], [3, 1], [-1, 1]], np.int32, "has negative codes"),
    ([[0, 1], [1, 0], [2, 0]], np.int32, "has 3 rows, and there are 5 items"),
    ([[0, 1], [1, 0], [2, 0], [3, 1], [3, 0]], np.int64, "holds int64 (5, 2), wanted int32 with 2 dimensions"),
])
def test_what_is_wrong_with_codes_is_found(folder, caplog, codes, dtype, finding):
    save(folder, folder.codes("vq", "td", None), codes, dtype, codebook_sizes=[4, 2])
    assert refused(folder, DataError, caplog) == [f"Baby.codes-vq-td.npy: {finding}"]


def test_codes_outside_the_codebooks_of_their_meta_are_found(folder, caplog):
    save(folder, folder.codes("vq", "td", None), [[0, 1], [1, 0], [2, 0], [3, 1], [4, 0]], np.int32,
         codebook_sizes=[4, 2])
    assert refused(folder, ArtifactError, caplog) == [
        "Baby.codes-vq-td.npy: its meta has codebooks of [4, 2] codes, and there are others in it"]


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "object array", "pickle", "archive", "huge shape"])
def test_a_file_that_is_no_array_is_found_and_nothing_in_it_is_run(folder, tmp_path, caplog, damage):
    path, canary = folder.embeddings("td"), tmp_path / "canary"
    whole = path.read_bytes()
    if damage == "object array":
        with path.open("wb") as file:
            np.save(file, np.array([[Canary(canary)]] * 5, dtype=object), allow_pickle=True)
    elif damage == "archive":
        with path.open("wb") as file:
            np.savez(file, VECTORS)
    else:
        path.write_bytes({"truncated": whole[:-4], "empty": b"", "text": b"0.5,1\n", "huge shape": whole.replace(
            b"(5, 2)", b"(" + b"9" * 30 + b",)"), "pickle": pickle.dumps(Canary(canary))}[damage])
    make_metas_fit(folder)
    [finding] = refused(folder, DataError, caplog)
    assert finding.startswith("Baby.emb-td.npy: is not a numpy array file: ")
    assert not canary.exists()


def test_a_damaged_mask_is_a_finding_of_its_own_and_excuses_no_vector(folder, caplog):
    folder.mask("image").write_bytes(b"damage")
    make_metas_fit(folder)
    found = refused(folder, DataError, caplog)
    assert found[0] == "Baby.emb-image.npy: rows [1] are all zero"
    assert found[1].startswith("Baby.mask-image.npy: is not a numpy array file: ")
    assert len(found) == 2


def test_a_parquet_file_that_is_none_is_found(folder, caplog):
    folder.users.write_bytes(b"PAR1 and no more")
    make_metas_fit(folder)
    [finding] = refused(folder, DataError, caplog)
    assert finding.startswith("users.parquet: cannot be read: ")


def test_a_missing_table_is_found(folder, caplog):
    folder.users.unlink()
    found = refused(folder, DataError, caplog)
    assert "users.parquet: is not there" in found


def test_a_flipped_bit_is_found_by_the_hash(folder, caplog):
    flip(folder.embeddings("td"), -5)
    [finding] = refused(folder, ArtifactError, caplog)
    assert finding == ("Baby.emb-td.npy: does not match the sha256 in its meta. it was changed or damaged. "
                       "Fix: make Baby.emb-td.npy --force")


def test_a_changed_table_makes_what_was_made_from_it_stale(folder, caplog):
    meta = json.loads(meta_path(folder.items).read_text())
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE t AS SELECT * REPLACE ('new' AS title) FROM read_parquet('{folder.items}')")
        connection.table("t").write_parquet(str(folder.items))
    write_meta(folder.items, {key: value for key, value in meta.items() if key not in ("sha256", "size")})
    found = refused(folder, ArtifactError, caplog)
    assert [line.split(". ")[0] for line in found] == [
        f"{name}: is stale" for name in ("interactions.parquet", "Baby.emb-image.npy", "Baby.emb-td.npy",
                                         "Baby.mask-image.npy", "Baby.codes-vq-td.npy")]


def test_embeddings_of_another_list_of_items_are_found(folder, caplog):
    save(folder, folder.embeddings("td"), VECTORS, items_sha256="of others")
    [finding] = refused(folder, ArtifactError, caplog)
    assert finding.startswith("Baby.emb-td.npy: its meta is of another list of items (of others, and items.parquet has")


def test_users_need_not_say_which_items_they_go_with(folder, caplog):
    caplog.set_level("INFO")
    meta = json.loads(meta_path(folder.users).read_text())
    meta_path(folder.users).write_text(json.dumps({key: meta[key] for key in meta if key != "items_sha256"}))
    check(folder)
    assert "is sound" in caplog.text


def test_too_little_memory_is_no_fault_of_the_files(folder):
    with pytest.raises(ResourceError, match="1KB are not enough for this data set"):
        check(folder, "--memory_limit=1KB")


@pytest.mark.parametrize("damage", ["missing", "no JSON", "no sha256", "another schema"])
def test_a_meta_that_cannot_be_used_is_found(folder, caplog, damage):
    path = meta_path(folder.embeddings("td"))
    meta = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    else:
        del meta["sha256"]
        path.write_text({"no JSON": "{", "no sha256": json.dumps(meta), "another schema": json.dumps(
            {**meta, "sha256": "", "schema_version": 99})}[damage])
    [finding] = refused(folder, ArtifactError, caplog)
    assert finding.startswith({"missing": "Baby.emb-td.npy: has no meta", "another schema":
                               "Baby.emb-td.npy.meta.json: has schema version 99"}.get(
        damage, "Baby.emb-td.npy.meta.json: is not a valid meta"))


def test_a_list_of_images_that_was_damaged_is_found(folder, caplog):
    folder.figures.write_bytes(b"whatever step 1 writes")
    write_meta(folder.figures, {"inputs": {}, "items_sha256": load_meta(folder.items, "")["items_sha256"]})
    check(folder)
    flip(folder.figures, 0)
    [finding] = refused(folder, ArtifactError, caplog)
    assert finding.startswith("figures.parquet: does not match the sha256")


def test_all_findings_are_printed_and_content_decides_the_exit_code(folder, caplog):
    change(folder.interactions, "SELECT * REPLACE (item - 1 AS item, 'dev' AS split) FROM t")
    change(folder.users, "SELECT * REPLACE ('same' AS raw_id) FROM t")
    save(folder, folder.embeddings("td"), VECTORS[1:])
    meta_path(folder.mask("image")).unlink()
    flip(folder.codes("vq", "td", None), -3)
    found = [line.split(". ")[0] for line in refused(folder, DataError, caplog)]
    assert "users.parquet: only 1 of 3 raw ids are different" in found
    assert any("name an item that items.parquet lacks" in line for line in found)
    assert any("have a split that is none of" in line for line in found)
    assert "Baby.emb-td.npy: has 4 rows, and there are 5 items" in found
    assert "Baby.mask-image.npy: has no meta" in found
    assert "Baby.codes-vq-td.npy: does not match the sha256 in its meta" in found


def test_metas_that_are_there_are_not_replaced_by_adopting(folder, caplog):
    flip(folder.embeddings("td"), -5)
    before = state(folder)
    with pytest.raises(ArtifactError):
        check(folder, "--adopt")
    assert {path: content for path, content in state(folder).items() if not path.endswith(".lock")} == {
        path: content for path, content in before.items() if not path.endswith(".lock")}


def test_raw_files_and_the_folder_are_checked_together(folder, tmp_path, caplog):
    flip(folder.embeddings("td"), -5)
    caplog.set_level(logging.INFO)
    with pytest.raises(ArtifactError):
        check(folder, "--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0")
    assert "check: the raw files are sound" in caplog.text
