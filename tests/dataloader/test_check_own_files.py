"""--check on a user's own files: tables whose metas --adopt writes, and raw files before any run."""

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
from common.publishing import meta_path
from dataloader import process
from tests.dataloader.checking import EVENTS, check, check_finds, findings, state
from tests.dataloader.helpers import logged, mentions, write_baby
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND
from tests.errors import refused
from tests.text import lines_with


def own_files(tmp_path: Path, name: str = "shop") -> DatasetFolder:
    """Write tables and arrays as a user might: with other integer types, and without metas."""
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
@pytest.mark.parametrize("name", ["shop", "Baby"])  # also with the name of a source's dataset
def test_own_files_without_metas_are_checked_and_adopted(tmp_path, caplog, name):
    folder = own_files(tmp_path, name)
    files = ("items.parquet", "users.parquet", "interactions.parquet", f"{name}.emb-mine.npy",
             f"{name}.codes-theirs-mine.npy")
    check_finds(folder, ArtifactError, caplog, *((file, f"{file}.meta.json") for file in files),
                flags=("--dataset", name))
    check_own(folder, "--adopt")
    check_own(folder)
    assert load_interactions(folder).split.tolist() == [0, 0, 1, 2] * 2
    assert load_items(folder)["raw_id"].tolist() == ["raw 0", "raw 1", "raw 2", "raw 3"]
    assert load_embeddings(folder, "mine").shape == (4, 3)
    assert load_meta(folder.embeddings("mine"), "")["dim"] == 3
    codes, meta = load_codes(folder, "theirs", "mine", None)
    assert codes.tolist() == [[0, 5], [1, 5], [2, 0], [2, 1]]
    assert (meta["codebook_sizes"], meta["collision_rate_after"]) == ([3, 6], 0)


def test_an_adopted_dataset_is_known_and_stays_unchanged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = own_files(tmp_path)
    check_own(folder, "--adopt")
    options = make_options(folder.data_root, "--dataset", "shop")
    assert options.source == "local"
    before = state(folder)
    process.process(options, COMMAND)
    assert state(folder) == before
    assert logged(caplog, folder.interactions, 2, 4, 8)  # users, items, interactions


def test_a_mask_is_adopted_as_an_input_of_its_embedding(tmp_path):
    folder = own_files(tmp_path)
    with folder.mask("mine").open("wb") as file:
        np.save(file, np.array([True, True, False, True]))
    check_own(folder, "--adopt")
    assert load_mask(folder, "mine").tolist() == [True, True, False, True]


def test_an_adopted_file_that_changed_can_be_adopted_again(tmp_path):
    folder = own_files(tmp_path)
    path = folder.embeddings("mine")
    check_own(folder, "--adopt")
    np.save(path, np.full((4, 3), 2, dtype=np.float32))
    with refused(ArtifactError, path, fix=[meta_path(path), "--check --adopt"]) as raised:
        load_embeddings(folder, "mine")
    assert "--force" not in raised.value.fix
    meta_path(path).unlink()
    check_own(folder, "--adopt")
    assert load_embeddings(folder, "mine").tolist() == [[2, 2, 2]] * 4


def test_faulty_files_are_not_adopted(tmp_path, caplog):
    folder = own_files(tmp_path)
    duckdb.sql("SELECT 7 AS \"user\", 'raw' AS raw_id").write_parquet(str(folder.users))
    file, text = findings(folder, DataError, caplog, "--dataset", "shop", "--adopt")[0]
    assert file == "users.parquet"
    assert mentions(text, 0, 1, 7)
    assert not list(folder.path.glob("*.meta.json"))


def test_an_unknown_dataset_is_refused(tmp_path):
    with refused(ConfigError, "--dataset Baby", names=[tmp_path],
                 fix=[f"bash dataloader/run_pipeline.sh --dataset Baby --data_root {tmp_path}"]):
        check(DatasetFolder(tmp_path, "Baby"))
    assert list(tmp_path.iterdir()) == []


def raw(tmp_path: Path, events, metadata=()) -> list[str]:
    write_baby(tmp_path / "raw", events, metadata)
    return ["--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0", "--min_item_interactions=0"]


def test_raw_files_are_checked_before_any_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    check(DatasetFolder(tmp_path / "data", "Baby"), *raw(tmp_path, EVENTS))
    assert logged(caplog, 3, 5, 12)  # users, items, interactions
    assert not (tmp_path / "data").exists()


def test_own_raw_files_are_checked(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in EVENTS))
    check(DatasetFolder(tmp_path / "data", "shop"), "--dataset=shop", "--interactions", str(tmp_path / "e.csv"),
          "--min_user_interactions=0", "--min_item_interactions=0")
    assert logged(caplog, 3, 5, 12)
    assert {path.name for path in tmp_path.iterdir()} == {"e.csv"}


def test_a_bad_raw_line_is_an_error_with_its_number(tmp_path):
    flags = raw(tmp_path, [*EVENTS, ("a", "v", -5)])
    with refused(DataError, f"{tmp_path / 'raw' / 'reviews_Baby_5.json.gz'}:13", names=[-5]):
        check(DatasetFolder(tmp_path / "data", "Baby"), *flags)
    assert not (tmp_path / "data").exists()


def test_lines_to_skip_are_printed_with_their_reason(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    events = [(f"u{n % 20}", f"i{n % 7}", n) for n in range(300)] + [("u1", "i1", -5)]
    check(DatasetFolder(tmp_path / "data", "Baby"), "--bad_lines=skip", *raw(tmp_path, events))
    [line] = lines_with(caplog.text, f"{tmp_path / 'raw' / 'reviews_Baby_5.json.gz'}:301")
    assert mentions(line, -5, 0)
    assert not (tmp_path / "data").exists()
