"""--check on a user's own files: tables without metas, which --adopt gives theirs, and raw files before any run."""

import logging
from pathlib import Path

import duckdb
import numpy as np
import pytest

from common.artifacts import (
    DatasetFolder,
    load_codes,
    load_embeddings,
    load_interactions,
    load_items,
    load_mask,
    load_meta,
)
from common.errors import ArtifactError, ConfigError, DataError
from dataloader import process
from tests.dataloader.checking import EVENTS, check, refused, state
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.helpers import write_baby
from tests.dataloader.processing import COMMAND


def own_files(tmp_path: Path, name: str = "shop") -> DatasetFolder:
    """Tables and arrays as a user might have written them, with other integer types, and without metas."""
    folder = DatasetFolder(tmp_path / "own", name)
    folder.path.mkdir(parents=True)
    for path, query in ((folder.items, """SELECT i AS item, 'raw ' || i AS raw_id, 'Title' AS title, 'Text' AS "text"
                                          FROM range(4) t(i)"""),
                        (folder.users, 'SELECT i::UTINYINT AS "user", \'user \' || i AS raw_id FROM range(2) t(i)'),
                        (folder.interactions, """
                            SELECT i // 4 AS "user", i % 3 AS item, 100 + i AS "timestamp", 4 AS rating,
                                   CASE i % 4 WHEN 3 THEN 'test' WHEN 2 THEN 'valid' ELSE 'train' END AS split
                            FROM range(8) t(i)""")):
        duckdb.sql(query).write_parquet(str(path))
    for path, array in ((folder.embeddings("mine"), np.ones((4, 3), dtype=np.float32)),
                        (folder.codes("theirs", "mine", None), np.array([[0, 5], [1, 5], [2, 0], [2, 1]], np.int32))):
        with path.open("wb") as file:
            np.save(file, array)
    return folder


def check_own(folder: DatasetFolder, *flags: str) -> None:
    check(folder, "--dataset", folder.name, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shop", "Baby"])  # also under a name that a source has
def test_own_files_without_metas_are_checked_and_adopted(tmp_path, caplog, name):
    folder = own_files(tmp_path, name)
    found = refused(folder, ArtifactError, caplog, "--dataset", name)
    assert [line.split(". ")[0] for line in found] == [
        f"{file}: has no meta" for file in ("items.parquet", "users.parquet", "interactions.parquet",
                                            f"{name}.emb-mine.npy", f"{name}.codes-theirs-mine.npy")]
    check_own(folder, "--adopt")
    check_own(folder)
    assert load_interactions(folder).split.tolist() == [0, 0, 1, 2] * 2
    assert load_items(folder)["raw_id"].tolist() == ["raw 0", "raw 1", "raw 2", "raw 3"]
    assert load_embeddings(folder, "mine").shape == (4, 3)
    assert load_meta(folder.embeddings("mine"), "")["dim"] == 3
    codes, meta = load_codes(folder, "theirs", "mine", None)
    assert codes.tolist() == [[0, 5], [1, 5], [2, 0], [2, 1]]
    assert (meta["codebook_sizes"], meta["collision_rate_after"]) == ([3, 6], 0)


def test_an_adopted_data_set_is_known_and_its_tables_are_left_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = own_files(tmp_path)
    check_own(folder, "--adopt")
    options = make_options(folder.data_root, "--dataset", "shop")
    assert options.source == "local"
    before = state(folder)
    process.process(options, COMMAND)
    assert "process: reusing" in caplog.text
    assert "2 users, 4 items, 8 interactions" in caplog.text
    assert state(folder) == before


def test_a_mask_is_adopted_as_an_input_of_its_embedding(tmp_path):
    folder = own_files(tmp_path)
    with folder.mask("mine").open("wb") as file:
        np.save(file, np.array([True, True, False, True]))
    check_own(folder, "--adopt")
    assert load_mask(folder, "mine").tolist() == [True, True, False, True]


def test_what_is_not_sound_is_not_adopted(tmp_path, caplog):
    folder = own_files(tmp_path)
    duckdb.sql("SELECT 7 AS \"user\", 'raw' AS raw_id").write_parquet(str(folder.users))
    found = refused(folder, DataError, caplog, "--dataset", "shop", "--adopt")
    assert found[0] == "users.parquet: the users are not 0 to 0: there are 1 different ones from 7 to 7"


def test_a_data_set_that_is_not_there_is_a_wrong_name(tmp_path):
    with pytest.raises(ConfigError, match="there is no such data set"):
        check(DatasetFolder(tmp_path, "Baby"))
    assert list(tmp_path.iterdir()) == []


def raw(tmp_path: Path, events, metadata=()) -> list[str]:
    write_baby(tmp_path / "raw", events, metadata)
    return ["--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0"]


def test_raw_files_are_looked_at_before_anything_is_made(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    check(DatasetFolder(tmp_path / "data", "Baby"), *raw(tmp_path, EVENTS))
    assert "3 users, 5 items, 12 interactions" in caplog.text
    assert "check: the raw files are sound" in caplog.text
    assert not (tmp_path / "data").exists()


def test_own_raw_files_are_looked_at_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in EVENTS))
    check(DatasetFolder(tmp_path / "data", "shop"), "--dataset=shop", "--interactions", str(tmp_path / "e.csv"),
          "--min_user_interactions=0", "--min_item_interactions=0")
    assert "check: the raw files are sound" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"e.csv"}


def test_raw_files_that_are_not_sound_are_an_error_with_file_and_line(tmp_path):
    flags = raw(tmp_path, [*EVENTS, ("a", "v", -5)])
    with pytest.raises(DataError) as error:
        check(DatasetFolder(tmp_path / "data", "Baby"), *flags)
    assert str(error.value.where) == f"{tmp_path / 'raw' / 'reviews_Baby_5.json.gz'}:13"
    assert not (tmp_path / "data").exists()


def test_lines_that_would_be_skipped_are_printed(tmp_path, caplog):
    events = [(f"u{n % 20}", f"i{n % 7}", n) for n in range(300)] + [("u1", "i1", -5)]
    check(DatasetFolder(tmp_path / "data", "Baby"), "--bad_lines=skip", *raw(tmp_path, events))
    assert '"reason": "has the time -5, which is not from 0' in caplog.text
    assert not (tmp_path / "data").exists()
