"""--check finds the faults in a folder, names the file, and writes nothing."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from common.artifacts import DatasetFolder, load_meta, save_array
from common.errors import ArtifactError, DataError, ResourceError
from common.publishing import file_sha256, meta_path, write_meta
from tests.dataloader.checking import EVENTS, check, check_finds, findings, flip, state
from tests.dataloader.helpers import logged, mentions
from tests.dataloader.processing import run
from tests.errors import refused

VECTORS = [[0.5, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Raw files in `raw`, and a sound dataset with files of all kinds in `data`."""
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
    """A copy that the test may damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return DatasetFolder(tmp_path / "data", "Baby")


def save(folder: DatasetFolder, path: Path, rows, dtype=np.float32, inputs=(), **meta) -> None:
    items = load_meta(folder.items, "")
    save_array(path, np.array(rows, dtype=dtype), {
        "inputs": {folder.items.name: items["sha256"], **{p.name: file_sha256(p) for p in inputs}},
        "items_sha256": items["items_sha256"], "command": f"make {path.name}", **meta})


def change(path: Path, query: str) -> None:
    """Replace a table by a query over `t`, its present rows; all metas are updated to match."""
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


def test_a_sound_folder_passes_and_stays_unchanged(folder, caplog):
    caplog.set_level(logging.INFO)
    before = state(folder)
    check(folder)
    assert state(folder) == before
    assert logged(caplog, folder.path, 7)
    for name in ("items.parquet", "users.parquet", "interactions.parquet", "Baby.codes-vq-td.npy"):
        assert logged(caplog, name)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# A query over the rows `t` of a table, and the values in each finding.
INTERACTIONS = {
    "unknown items": ("SELECT * REPLACE (item + 1 AS item) FROM t", [(2, "items.parquet")]),
    "unknown users": ('SELECT * REPLACE ("user" - 1 AS "user") FROM t', [(4, "users.parquet")]),
    "users not in order": ("FROM t ORDER BY rowid DESC", [(11,), (6, "train", "valid")]),
    "times not in order": ('SELECT * REPLACE (CASE "timestamp" WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE "timestamp" END '
                           'AS "timestamp") FROM t', [(3,)]),
    "leak": ("SELECT * REPLACE (CASE split WHEN 'test' THEN 'train' WHEN 'valid' THEN 'test' ELSE split END AS split) "
             "FROM t", [(3, "train", "valid")]),
    "two test events": ("SELECT * REPLACE (CASE split WHEN 'valid' THEN 'test' ELSE split END AS split) FROM t",
                        [(3, "test")]),
    "two valid events": ("SELECT * REPLACE (CASE split WHEN 'train' THEN 'valid' ELSE split END AS split) FROM t",
                         [(3, "valid")]),
    "unknown split": ("SELECT * REPLACE (replace(split, 'valid', 'dev') AS split) FROM t",
                      [(3, "train", "valid", "test")]),
    "rating not finite": ("SELECT * REPLACE (CASE item WHEN 0 THEN 'nan'::FLOAT ELSE rating END AS rating) FROM t",
                          [(2, "rating")]),
    "users without events": ('FROM t WHERE "user" <> 1', [(1, 3, "users.parquet")]),
    "nulls": ('SELECT * REPLACE (nullif("timestamp", 0) AS "timestamp") FROM t', [(3, "timestamp")]),
    "missing column": ("SELECT * EXCLUDE (split) FROM t", [("split", "user", "item", "timestamp", "rating")]),
    "wrong type": ('SELECT * REPLACE ("user"::VARCHAR AS "user") FROM t', [("user", "VARCHAR", "TINYINT")]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("query", "expected"), INTERACTIONS.values(), ids=INTERACTIONS)
def test_faults_of_the_interactions_are_found(folder, caplog, query, expected):
    change(folder.interactions, query)
    check_finds(folder, DataError, caplog, *(("interactions.parquet", *values) for values in expected))


def test_interactions_without_rows_are_found(folder, caplog):
    change(folder.interactions, "FROM t LIMIT 0")
    [(file, text)] = findings(folder, DataError, caplog)
    assert file == "interactions.parquet"
    assert "users.parquet" not in text  # as a list of the users without events does


@pytest.mark.slow
@pytest.mark.parametrize(("table", "query", "values"), [
    ("items", "SELECT * REPLACE (item + (item > 2)::INTEGER AS item) FROM t", (4, 5)),
    ("users", 'SELECT * REPLACE ("user" + 1 AS "user") FROM t', (0, 1, 2, 3)),
    ("users", "SELECT * REPLACE (replace(raw_id, 'b', 'a') AS raw_id) FROM t", (2, 3)),
    ("items", "SELECT * REPLACE (nullif(\"text\", 'v') AS \"text\") FROM t", (1, "text")),
    ("items", "SELECT * EXCLUDE (title) FROM t", ("title", "item", "raw_id", "text")),
    ("users", "FROM t LIMIT 0", ()),
], ids=["items gap", "users from 1", "duplicate raw id", "null", "missing column", "no rows"])
def test_faults_of_items_and_users_are_found(folder, caplog, table, query, values):
    change(getattr(folder, table), query)
    check_finds(folder, DataError, caplog, (f"{table}.parquet", *values))


@pytest.mark.slow
def test_duplicate_items_are_found(folder, caplog):
    change(folder.items, "SELECT * REPLACE (item % 4 AS item) FROM t")
    file, text = findings(folder, DataError, caplog)[0]
    assert file == "items.parquet"
    assert mentions(text, 0, 3, 4)


def by_time(folder: DatasetFolder, query: str) -> None:
    """Change splits or times of the events, and record a temporal split in the meta."""
    meta = json.loads(meta_path(folder.interactions).read_text())
    counts = ("num_in_split", "num_repeats", "num_cold_items")
    kept = {key: value for key, value in meta.items() if key not in counts}
    meta_path(folder.interactions).write_text(json.dumps({**kept, "split_name": "temporal"}))
    change(folder.interactions, query)


@pytest.mark.parametrize("border", [2, 3])
def test_training_events_must_precede_all_test_events(folder, caplog, border):
    # The last user's event at time 2 is always in test. With border 3, other users have training events at time 2.
    by_time(folder, f"""SELECT * REPLACE (CASE WHEN "timestamp" < CASE "user" WHEN 2 THEN 2 ELSE {border} END
                                          THEN 'train' ELSE 'test' END AS split) FROM t""")
    if border == 2:
        check(folder)
    else:
        check_finds(folder, DataError, caplog, ("interactions.parquet", "train", 2, "test"))


def test_validation_events_must_precede_all_test_events(folder, caplog):
    by_time(folder, """SELECT * REPLACE (CASE WHEN "timestamp" = 0 THEN 'train'
        WHEN "timestamp" < 2 + ("user" > 1)::INTEGER THEN 'valid' ELSE 'test' END AS split) FROM t""")
    check_finds(folder, DataError, caplog, ("interactions.parquet", "valid", 2, "test"))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "dtype", "values"), [
    (VECTORS[:4], np.float32, (4, 5)),
    ([*VECTORS[:3], [np.nan, 1], [1, -np.inf]], np.float32, ("[3, 4]",)),
    ([[0, 0], *VECTORS[1:]], np.float32, ("[0]",)),
    (VECTORS, np.float64, ("float64", "(5, 2)", "float32", 2)),
    (VECTORS, np.float16, ("float16", "(5, 2)", "float32", 2)),
    ([1, 2, 3, 4, 5], np.float32, ("float32", "(5,)", 2)),
])
def test_faults_of_embeddings_are_found(folder, caplog, rows, dtype, values):
    save(folder, folder.embeddings("td"), rows, dtype)
    check_finds(folder, DataError, caplog, ("Baby.emb-td.npy", *values))


def test_the_first_bad_rows_are_named_across_blocks(folder, caplog, monkeypatch):
    monkeypatch.setattr("dataloader.check.ROWS", 2)
    monkeypatch.setattr("dataloader.check.NUM_NAMED", 2)
    save(folder, folder.embeddings("td"), [VECTORS[0], *[[0, 0]] * 3, [np.nan, 0]])
    check_finds(folder, DataError, caplog, ("Baby.emb-td.npy", "[4]"), ("Baby.emb-td.npy", "[1, 2]", 1))


@pytest.mark.parametrize(("codes", "dtype", "values"), [
    ([[0, 1], [1, 0], [2, 0], [3, 1], [0, 1]], np.int32, ()),
    ([[0, 1], [1, 0], [2, 0], [3, 1], [-1, 1]], np.int32, ()),
    ([[0, 1], [1, 0], [2, 0]], np.int32, (3, 5)),
    ([[0, 1], [1, 0], [2, 0], [3, 1], [3, 0]], np.int64, ("int64", "(5, 2)", "int32", 2)),
], ids=["duplicate", "negative", "too few", "wrong type"])
def test_faults_of_codes_are_found(folder, caplog, codes, dtype, values):
    save(folder, folder.codes("vq", "td", None), codes, dtype, codebook_sizes=[4, 2])
    check_finds(folder, DataError, caplog, ("Baby.codes-vq-td.npy", *values))


def test_codes_outside_their_codebooks_are_found(folder, caplog):
    save(folder, folder.codes("vq", "td", None), [[0, 1], [1, 0], [2, 0], [3, 1], [4, 0]], np.int32,
         codebook_sizes=[4, 2])
    check_finds(folder, ArtifactError, caplog, ("Baby.codes-vq-td.npy", "[4, 2]"))


def test_a_codebook_larger_than_any_is_found(folder, caplog):
    save(folder, folder.codes("vq", "td", None), [[0, 1], [1, 0], [2, 0], [3, 1], [3, 0]], np.int32,
         codebook_sizes=[4, 10**9])
    check_finds(folder, ArtifactError, caplog, ("Baby.codes-vq-td.npy", 10**9, 5))


def test_arrays_without_columns_are_found(folder, caplog):
    save(folder, folder.embeddings("td"), np.empty((5, 0)))
    file, text = findings(folder, DataError, caplog)[0]
    assert file == "Baby.emb-td.npy"
    assert "columns" in text


def test_a_wrong_number_of_items_in_the_meta_is_found(folder, caplog):
    path = meta_path(folder.items)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_items": 10**9}))
    check_finds(folder, ArtifactError, caplog, ("items.parquet.meta.json", "num_items", 5, 10**9))


@pytest.mark.parametrize("name", ["users.parquet", "Baby.emb-td.npy"])
def test_a_named_pipe_is_found_without_a_read(folder, caplog, name):
    path = folder.path / name
    path.unlink()
    os.mkfifo(path)
    with refused(DataError, folder.path, names=[path]):
        check(folder)


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "object array", "pickle", "archive", "huge shape"])
def test_a_damaged_array_is_found_and_runs_no_code(folder, tmp_path, caplog, damage):
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
    check_finds(folder, DataError, caplog, ("Baby.emb-td.npy",))
    assert not canary.exists()


def test_a_damaged_mask_is_found_and_excuses_no_vector(folder, caplog):
    folder.mask("image").write_bytes(b"damage")
    make_metas_fit(folder)
    check_finds(folder, DataError, caplog, ("Baby.emb-image.npy", "[1]"), ("Baby.mask-image.npy",))


def test_a_damaged_parquet_file_is_found(folder, caplog):
    folder.users.write_bytes(b"PAR1 and no more")
    make_metas_fit(folder)
    check_finds(folder, DataError, caplog, ("users.parquet",))


def test_a_missing_table_is_found(folder, caplog):
    folder.users.unlink()
    again = "bash dataloader/2_process.sh --force"
    check_finds(folder, DataError, caplog, ("users.parquet",), ("users.parquet", again))


def test_a_flipped_bit_is_found_by_the_hash(folder, caplog):
    flip(folder.embeddings("td"), -5)
    check_finds(folder, ArtifactError, caplog, ("Baby.emb-td.npy", "make Baby.emb-td.npy --force"))


def test_a_changed_table_makes_its_derived_files_stale(folder, caplog):
    meta = json.loads(meta_path(folder.items).read_text())
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE t AS SELECT * REPLACE ('new' AS title) FROM read_parquet('{folder.items}')")
        connection.table("t").write_parquet(str(folder.items))
    write_meta(folder.items, {key: value for key, value in meta.items() if key not in ("sha256", "size")})
    derived = ("interactions.parquet", "Baby.emb-image.npy", "Baby.emb-td.npy", "Baby.mask-image.npy",
               "Baby.codes-vq-td.npy")
    check_finds(folder, ArtifactError, caplog, *((name, "items.parquet") for name in derived))


def test_embeddings_of_other_items_are_found(folder, caplog):
    save(folder, folder.embeddings("td"), VECTORS, items_sha256="of others")
    check_finds(folder, ArtifactError, caplog, (
        "Baby.emb-td.npy", "of others", "items.parquet", load_meta(folder.items, "")["items_sha256"]))


def test_interactions_that_lack_a_row_are_found(folder, caplog):
    # Without its first event, the first user still has events.
    change(folder.interactions, "FROM t OFFSET 1")
    check_finds(folder, ArtifactError, caplog, ("interactions.parquet", "num_interactions"))


def test_the_meta_of_the_users_needs_no_items(folder):
    meta = json.loads(meta_path(folder.users).read_text())
    meta_path(folder.users).write_text(json.dumps({key: meta[key] for key in meta if key != "items_sha256"}))
    check(folder)


def test_too_little_memory_is_not_a_finding(folder):
    with refused(ResourceError, "memory", names=["1KB"], fix=["--memory_limit"]):
        check(folder, "--memory_limit=1KB")


@pytest.mark.parametrize("damage", ["missing", "no JSON", "no sha256", "another schema"])
def test_a_meta_that_is_missing_or_invalid_is_found(folder, caplog, damage):
    path = meta_path(folder.embeddings("td"))
    meta = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    else:
        del meta["sha256"]
        path.write_text({"no JSON": "{", "no sha256": json.dumps(meta), "another schema": json.dumps(
            {**meta, "sha256": "", "schema_version": 99})}[damage])
    check_finds(folder, ArtifactError, caplog, {
        "missing": ("Baby.emb-td.npy", path.name), "no JSON": (path.name,),
        "no sha256": (path.name, "sha256"), "another schema": (path.name, 99, 2)}[damage])


def test_a_damaged_list_of_images_is_found(folder, caplog):
    folder.image_table.write_bytes(b"the list of step 1")
    write_meta(folder.image_table, {"inputs": {}, "items_sha256": load_meta(folder.items, "")["items_sha256"]})
    check(folder)
    flip(folder.image_table, 0)
    check_finds(folder, ArtifactError, caplog, (folder.image_table.name,))


def test_all_findings_are_printed_and_content_decides_the_error(folder, caplog):
    change(folder.interactions, "SELECT * REPLACE (item - 1 AS item, 'dev' AS split) FROM t")
    change(folder.users, "SELECT * REPLACE ('same' AS raw_id) FROM t")
    save(folder, folder.embeddings("td"), VECTORS[1:])
    meta_path(folder.mask("image")).unlink()
    flip(folder.codes("vq", "td", None), -3)
    missing = ("Baby.mask-image.npy", "Baby.mask-image.npy.meta.json")  # found as an input, and as a file
    check_finds(
        folder, DataError, caplog, ("users.parquet", 1, 3), ("interactions.parquet", 2, "items.parquet"),
        ("interactions.parquet", 12, "train", "valid", "test"), ("Baby.emb-td.npy", 4, 5), missing, missing,
        ("Baby.codes-vq-td.npy",))


def test_adopting_does_not_replace_existing_metas(folder):
    flip(folder.embeddings("td"), -5)
    before = state(folder)
    with refused(ArtifactError, folder.path, names=["Baby.emb-td.npy"]):
        check(folder, "--adopt")
    assert {path: content for path, content in state(folder).items() if not path.endswith(".lock")} == {
        path: content for path, content in before.items() if not path.endswith(".lock")}


def test_raw_files_and_folder_are_checked_together(folder, tmp_path, caplog):
    flip(folder.embeddings("td"), -5)
    caplog.set_level(logging.INFO)
    with refused(ArtifactError, folder.path, names=["Baby.emb-td.npy"]):
        check(folder, "--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0")
    assert logged(caplog, 3, 5, 12)  # users, items and interactions of the raw files
