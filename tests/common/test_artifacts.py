import json
import pickle
import re
from pathlib import Path

import duckdb
import numpy as np
import pytest

from common import artifacts, publishing
from common.artifacts import DatasetFolder, dataset_line, ids_sha256, load_codes, load_embeddings, load_mask, save_array
from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError
from common.metas import verify
from common.publishing import publish
from tests.common.helpers import names, numbers, put
from tests.errors import refused

ITEMS = ids_sha256(["a", "b", "c"])


@pytest.fixture
def folder(tmp_path):
    """A dataset with three items and empty tables."""
    folder = DatasetFolder(tmp_path, "Toys")
    put(folder.items, b"three items", num_items=3, items_sha256=ITEMS)
    return folder


def save_codes(folder, codes, dtype=np.int32, **meta):
    meta = {"inputs": {}, "items_sha256": ITEMS, "codebook_sizes": [4, 2], "command": "make codes", **meta}
    return save_array(folder.codes("vq", "td", None), np.array(codes, dtype=dtype), meta)


def save_embeddings(folder, rows, dtype=np.float32, **meta):
    save_array(folder.embeddings("td"), np.array(rows, dtype=dtype), {"inputs": {}, "items_sha256": ITEMS, **meta})


def test_file_names_are_those_of_the_contract():
    folder = DatasetFolder(Path("data"), "Toys")
    assert folder.interactions == Path("data/Toys/interactions.parquet")
    assert folder.items == Path("data/Toys/items.parquet")
    assert folder.users == Path("data/Toys/users.parquet")
    assert folder.embeddings("td") == Path("data/Toys/Toys.emb-td.npy")
    assert folder.codes("rqvae", "td", None) == Path("data/Toys/Toys.codes-rqvae-td.npy")
    assert folder.codes("rqvae", "td", "small") == Path("data/Toys/Toys.codes-rqvae-td-small.npy")


def test_codes_come_back_with_their_meta(folder):
    saved = save_codes(folder, [[0, 1], [3, 0], [0, 0]], disambiguation_level=1)
    codes, meta = load_codes(folder, "vq", "td", None)
    assert codes.dtype == np.int32
    assert codes.tolist() == [[0, 1], [3, 0], [0, 0]]
    assert meta == saved
    assert meta["disambiguation_level"] == 1


def test_missing_codes_name_the_command_that_makes_them(folder):
    with refused(DataError, folder.codes("vq", "td", "small"), fix=[
            "python quantization/main.py --quantizer_name vq --dataset_name Toys --embedding_suffix td --tag small"]):
        load_codes(folder, "vq", "td", "small")


@pytest.mark.parametrize(("tag", "nearest", "flags"), [
    (None, "vq-td", "--quantizer_name vq --embedding_suffix td"),
    ("x-1", "vq-td-x-1", "--quantizer_name vq --embedding_suffix td --tag x-1")])
def test_missing_codes_name_the_flags_of_the_nearest_ones(folder, tag, nearest, flags):
    save_embeddings(folder, [[0, 1], [2, 3], [4, 5]])
    save_array(folder.codes("vq", "td", tag), np.zeros((3, 1), dtype=np.int32), {"inputs": {}})
    with refused(DataError, folder.codes("vp", "td", tag), names=[f"'{nearest}'"], fix=[
            flags, "python quantization/main.py --quantizer_name vp"]) as raised:
        load_codes(folder, "vp", "td", tag)
    assert ("--tag" in raised.value.fix) == (tag is not None)


def test_a_missing_embedding_names_the_flag_of_the_nearest(folder):
    save_embeddings(folder, [[0, 1], [2, 3], [4, 5]])
    with refused(DataError, folder.embeddings("dt"), names=["'td'"], fix=[
            "--embedding_suffix td", "bash dataloader/run_pipeline.sh --dataset Toys --suffix dt"]):
        load_embeddings(folder, "dt")


def test_a_damaged_artifact_is_made_again_with_force(folder):
    save_embeddings(folder, [[0, 1], [np.nan, 3], [4, 5]], command="make embeddings")
    save_codes(folder, [[0, 1], [9, 0], [0, 0]])
    with refused(DataError, folder.embeddings("td"), names=["[1]"], fix=["make embeddings --force"]):
        load_embeddings(folder, "td")
    with refused(ArtifactError, folder.codes("vq", "td", None), names=["[4, 2]"], fix=["make codes --force"]):
        load_codes(folder, "vq", "td", None)


@pytest.mark.parametrize("size", [10**9, 10**18])
def test_a_codebook_larger_than_any_is_refused(folder, size):
    save_codes(folder, [[0, 1], [3, 0], [0, 0]], codebook_sizes=[4, size])
    with refused(ArtifactError, folder.codes("vq", "td", None), names=[size, 3], fix=["make codes --force"]):
        load_codes(folder, "vq", "td", None)


@pytest.mark.parametrize("codes", [
    [[0, 1], [4, 0], [0, 0]], [[0, 1], [3, -1], [0, 0]], [[0], [1], [2]], [[0, 1, 0], [1, 1, 0], [2, 1, 0]]])
def test_codes_outside_their_codebooks_are_refused_with_the_sizes(folder, codes):
    save_codes(folder, codes)
    with refused(ArtifactError, folder.codes("vq", "td", None), names=["[4, 2]"], fix=["make codes --force"]):
        load_codes(folder, "vq", "td", None)


def test_items_with_the_same_codes_need_a_disambiguation_level(folder):
    save_codes(folder, [[0, 1], [3, 0], [0, 1]])
    with refused(ArtifactError, folder.codes("vq", "td", None), fix=["make codes --disambiguation extra_level"]):
        load_codes(folder, "vq", "td", None)


def test_codes_of_another_type_are_refused(folder):
    save_codes(folder, [[0, 1], [3, 0], [0, 0]], dtype=np.int64)
    with refused(ArtifactError, folder.codes("vq", "td", None), names=["int64", "(3, 2)", "int32"],
                 fix=["make codes --force"]):
        load_codes(folder, "vq", "td", None)


@pytest.mark.parametrize(("codes", "meta"), [
    ([[0, 1], [3, 0]], {}), ([[0, 1], [3, 0], [0, 0]], {"items_sha256": ids_sha256(["b", "a", "c"])})])
def test_codes_of_other_items_are_refused_with_both_counts(folder, codes, meta):
    save_codes(folder, codes, **meta)
    with refused(ArtifactError, folder.codes("vq", "td", None), names=["items.parquet"],
                 fix=["make codes --force"]) as raised:
        load_codes(folder, "vq", "td", None)
    assert numbers(raised) >= {str(len(codes)), "3"}


@pytest.mark.parametrize(("key", "named"), [("items_sha256", "items.parquet"), ("codebook_sizes", "[]")])
def test_codes_without_a_needed_key_are_refused(folder, key, named):
    save_codes(folder, [[0, 1], [3, 0], [0, 0]])
    path = publishing.meta_path(folder.codes("vq", "td", None))
    meta = json.loads(path.read_text())
    del meta[key]
    path.write_text(json.dumps(meta))
    with refused(ArtifactError, folder.codes("vq", "td", None), names=[named]):
        load_codes(folder, "vq", "td", None)


def test_embeddings_come_back(folder):
    save_embeddings(folder, [[0.5, 1], [2, 3], [4, 5]])
    array = load_embeddings(folder, "td")
    assert array.dtype == np.float32
    assert array.tolist() == [[0.5, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused_with_their_rows(folder, bad):
    save_embeddings(folder, [[0, 1], [2, bad], [bad, 5]])
    with refused(DataError, folder.embeddings("td"), names=["[1, 2]"]):
        load_embeddings(folder, "td")


def save_masked(folder, mask, dtype=bool, **meta):
    """Save a mask, and embeddings that have it as an input."""
    saved = save_array(folder.mask("image"), np.array(mask, dtype=dtype), {"inputs": {}, "items_sha256": ITEMS, **meta})
    save_array(folder.embeddings("image"), np.ones((3, 2), dtype=np.float32), {
        "inputs": {folder.mask("image").name: saved["sha256"]}, "items_sha256": ITEMS})


def test_a_mask_says_which_items_have_their_own_vector(folder):
    save_masked(folder, [True, False, True])
    assert folder.mask("image").name == "Toys.mask-image.npy"
    mask = load_mask(folder, "image")
    assert mask.dtype == bool
    assert mask.tolist() == [True, False, True]


def test_embeddings_without_a_mask_have_a_vector_for_every_item(folder):
    save_embeddings(folder, [[0.5, 1], [2, 3], [4, 5]])
    assert load_mask(folder, "td").tolist() == [True] * 3


def test_a_mask_that_the_embedding_does_not_use_is_ignored(folder):
    save_masked(folder, [True, False, True])
    save_array(folder.embeddings("image"), np.ones((3, 2), dtype=np.float32), {"inputs": {}, "items_sha256": ITEMS})
    assert load_mask(folder, "image").tolist() == [True] * 3


@pytest.mark.parametrize(("mask", "dtype", "held"), [
    ([1, 0, 1], np.int8, ["int8", "(3,)"]), ([[True], [False], [True]], bool, ["bool", "(3, 1)"])])
def test_a_mask_of_another_kind_is_refused(folder, mask, dtype, held):
    save_masked(folder, mask, dtype)
    with refused(ArtifactError, folder.mask("image"), names=[*held, "bool"]):
        load_mask(folder, "image")


@pytest.mark.parametrize(("mask", "meta"), [([True, False], {}), ([True, False, True], {"items_sha256": "others"})])
def test_a_mask_of_other_items_is_refused(folder, mask, meta):
    save_masked(folder, mask, **meta)
    with refused(ArtifactError, folder.mask("image"), names=["items.parquet"]) as raised:
        load_mask(folder, "image")
    assert numbers(raised) >= {str(len(mask)), "3"}


def test_a_mask_that_changed_makes_its_embedding_stale(folder):
    save_masked(folder, [True, False, True])
    save_array(folder.mask("image"), np.array([True] * 3), {"inputs": {}, "items_sha256": ITEMS})
    with refused(ArtifactError, folder.embeddings("image"), names=["Toys.mask-image.npy"]):
        load_mask(folder, "image")


@pytest.mark.parametrize(("rows", "dtype", "held"), [
    ([[0, 1], [2, 3], [4, 5]], np.float64, ["float64", "(3, 2)"]), ([0, 1, 2], np.float32, ["float32", "(3,)"])])
def test_embeddings_of_another_kind_are_refused(folder, rows, dtype, held):
    save_embeddings(folder, rows, dtype)
    with refused(ArtifactError, folder.embeddings("td"), names=[*held, "float32"]):
        load_embeddings(folder, "td")


@pytest.mark.parametrize(("rows", "meta"), [
    ([[0, 1], [2, 3]], {}), ([[0, 1], [2, 3], [4, 5]], {"items_sha256": ids_sha256(["a", "c", "b"])})])
def test_embeddings_of_other_items_are_refused(folder, rows, meta):
    save_embeddings(folder, rows, **meta)
    with refused(ArtifactError, folder.embeddings("td"), names=["items.parquet"]) as raised:
        load_embeddings(folder, "td")
    assert numbers(raised) >= {str(len(rows)), "3"}


def test_an_embedding_without_columns_is_refused(folder):
    save_embeddings(folder, np.empty((3, 0)))
    with refused(ArtifactError, folder.embeddings("td"), names=["(3, 0)"]):
        load_embeddings(folder, "td")


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_a_pickle_is_refused_and_never_run(folder, tmp_path, kind):
    canary = tmp_path / "canary"

    def write(staged: Path):
        with staged.open("wb") as file:
            if kind == "object array":
                np.save(file, np.array([[Canary(canary)]] * 3, dtype=object), allow_pickle=True)
            else:
                pickle.dump(Canary(canary), file)

    publish(folder.embeddings("td"), write, {"inputs": {}, "items_sha256": ITEMS})
    with refused(ArtifactError, folder.embeddings("td")) as raised:
        load_embeddings(folder, "td")
    assert "allow_pickle" not in str(raised.value)  # NumPy's advice to load the file unsafely
    assert not canary.exists()
    with folder.embeddings("td").open("rb") as file:  # unpickling does create the canary
        np.load(file, allow_pickle=True)
    assert canary.exists()


def test_a_file_made_elsewhere_needs_a_meta(folder):
    path = folder.embeddings("td")
    with path.open("wb") as file:
        np.save(file, np.ones((3, 2), dtype=np.float32))
    with refused(ArtifactError, path, names=[f"{path.name}.meta.json"]):
        load_embeddings(folder, "td")
    publishing.write_meta(path, {"inputs": {folder.items.name: publishing.file_sha256(folder.items)},
                                "items_sha256": ITEMS, "title": "Zoë"})
    assert load_embeddings(folder, "td").tolist() == [[1, 1]] * 3
    meta = verify(path, "")
    assert (meta["schema_version"], meta["size"]) == (publishing.SCHEMA_VERSION, path.stat().st_size)
    assert names(folder.path) == {"items.parquet", "items.parquet.meta.json", path.name, f"{path.name}.meta.json"}


def test_a_file_that_changed_no_longer_fits_its_meta(folder):
    folder.users.write_bytes(b"users")
    publishing.write_meta(folder.users, {"inputs": {}})
    verify(folder.users, "")
    folder.users.write_bytes(b"USERS")
    with refused(ArtifactError, folder.users):
        verify(folder.users, "")


def test_codes_that_were_replaced_by_hand_are_refused(folder):
    save_codes(folder, [[0, 1], [3, 0], [0, 0]])
    path = folder.codes("vq", "td", None)
    np.save(path, np.load(path)[::-1])  # the size is the same
    with refused(ArtifactError, path, fix=["make codes --force"]):
        load_codes(folder, "vq", "td", None)


def test_an_object_array_is_not_written_either(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):  # numpy's parameter
        save_array(tmp_path / "file.npy", np.array([{}], dtype=object), {"inputs": {}})
    assert names(tmp_path) == set()


FACTS = {"num_users": 120, "num_items": 48, "num_interactions": 1081, "split_name": "leave_one_out",
         "num_in_split": {"train": 841, "valid": 120, "test": 120}, "num_repeats": {"valid": 12, "test": 37},
         "num_cold_items": {"valid": 4, "test": 3}, "num_without_text": 2}


def test_one_line_tells_the_facts_about_a_dataset(folder):
    put(folder.interactions, b"events", **FACTS)  # 37 / 120 = 0.308
    line = dataset_line(folder)
    assert re.findall(r"[\d,]+\d|\d", line) == ["120", "48", "1,081", "31", "3", "2"]
    assert line.startswith("Toys: ")
    assert "leave_one_out" in line


@pytest.mark.parametrize("kept", [[], ["num_users", "num_items", "num_interactions"],
                                  ["num_users", "num_items", "num_interactions", "split_name", "num_without_text"]])
def test_a_meta_without_facts_gives_a_shorter_line(folder, kept):
    put(folder.interactions, b"events", **{key: FACTS[key] for key in kept})
    line = dataset_line(folder)
    assert line.startswith("Toys: ")
    assert re.findall(r"[\d,]+\d|\d", line) == [f"{FACTS[key]:,}" for key in kept if key != "split_name"]


def test_a_line_about_a_stale_dataset_says_so(folder):
    put(folder.interactions, b"events", **FACTS | {"inputs": {folder.items.name: "another hash"}})
    assert folder.items.name in dataset_line(folder)
    assert "1,081" not in dataset_line(folder)


def test_an_unknown_dataset_names_its_command_and_the_others(tmp_path):
    for name in ("Baby", "Games"):
        put(DatasetFolder(tmp_path, name).interactions, b"events")
    for asked, nearest in (("Babi", "Baby"), ("ml-100k", None)):
        command = f"bash dataloader/run_pipeline.sh --dataset {asked} --data_root {tmp_path}"
        with refused(ConfigError, f"--dataset {asked}", names=[tmp_path, "Baby", "Games"], fix=[command]) as raised:
            DatasetFolder(tmp_path, asked).require()
        assert ("'Baby'" in str(raised.value)) == (nearest is not None)
        assert ("--dataset Baby" in raised.value.fix) == (nearest is not None)
    DatasetFolder(tmp_path, "Baby").require()


def test_without_any_dataset_the_error_names_the_folder(tmp_path):
    with refused(ConfigError, "--dataset Baby", names=[tmp_path / "nowhere"], fix=[
            f"bash dataloader/run_pipeline.sh --dataset Baby --data_root {tmp_path / 'nowhere'}"]) as raised:
        DatasetFolder(tmp_path / "nowhere", "Baby").require()
    assert "'Baby'" not in str(raised.value)


def test_the_command_for_data_elsewhere_says_where(tmp_path):
    assert DatasetFolder(tmp_path, "Toys").make_command.endswith(f"--dataset Toys --data_root {tmp_path}")
    assert DatasetFolder(ROOT / "data", "Toys").make_command == "bash dataloader/run_pipeline.sh --dataset Toys"


def test_the_hash_of_ids_depends_on_their_order_and_borders():
    lists = (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["", "ab"], ["a", "b", ""], [], ["é", "b"], ["\ud800"])
    assert len({ids_sha256(ids) for ids in lists}) == len(lists)
    assert ids_sha256(["a", "b"]) == ids_sha256(["a", "b"])


def write_table(path: Path, query: str, **meta) -> None:
    # DuckDB cannot tell the format from the name of a staged file.
    publish(path, lambda staged: duckdb.sql(f"COPY ({query}) TO '{staged}' (FORMAT parquet)"), {"inputs": {}, **meta})


# Valid tables: two users, three items, and in each row a user's next event.
TABLES = {
    "items": "FROM (VALUES (1, 'b', 'Yo-yo', 'y', NULL), (0, 'a', 'Kite', 'k', 'http://h/0.jpg'), "
             "(2, 'c', 'Ball', 'z', 'http://h/2.jpg')) AS t(item, raw_id, title, text, image_url)",
    "users": "FROM (VALUES (1, 'v'), (0, 'u')) AS t(\"user\", raw_id)",
    "interactions": "FROM (VALUES (0, 2, 50, 5.0::FLOAT, 'train'), (0, 0, 50, 1, 'valid'), (1, 1, 40, 3, 'test')) "
                    "AS t(\"user\", item, \"timestamp\", rating, split)",
}


def write_tables(folder: DatasetFolder, **queries: str) -> DatasetFolder:
    """Write the tables of `TABLES`. A query over its rows `t` changes a table; the meta files fit the changed files."""
    for name, rows in TABLES.items():
        query = queries.get(name, "FROM t")
        write_table(folder.path / f"{name}.parquet", f"WITH t AS ({rows}) {query}", num_items=3, items_sha256=ITEMS,
                    command=f"make {name}")
    return folder


@pytest.fixture
def tables(tmp_path) -> DatasetFolder:
    return write_tables(DatasetFolder(tmp_path, "Toys"))


def test_interactions_keep_the_order_of_the_file(tables):
    events = artifacts.load_interactions(tables)
    assert events.user.tolist() == [0, 0, 1]
    assert events.item.tolist() == [2, 0, 1]
    assert events.timestamp.tolist() == [50, 50, 40]
    assert events.split.tolist() == [0, 1, 2]
    assert [column.dtype for column in events] == [np.int64, np.int64, np.int64, np.int8]


def test_items_and_users_come_in_the_order_of_their_numbers(tables):
    items = artifacts.load_items(tables)
    assert {name: column.tolist() for name, column in items.items()} == {
        "raw_id": ["a", "b", "c"], "title": ["Kite", "Yo-yo", "Ball"], "text": ["k", "y", "z"]}
    assert artifacts.load_users(tables)["raw_id"].tolist() == ["u", "v"]
    assert artifacts.load_image_urls(tables).tolist() == ["http://h/0.jpg", None, "http://h/2.jpg"]
    assert artifacts.load_items_meta(tables)["num_items"] == 3


# table -> a query over its rows `t` that makes the table invalid, and the values that the error names
INVALID = {
    "items": {
        "ids with a fraction": ("SELECT * REPLACE (item + 0.5::DOUBLE AS item) FROM t", ["item", "DOUBLE"]),
        "ids from 1": ("SELECT * REPLACE (item + 1 AS item) FROM t", [1, 3]),
        "an id twice": ("SELECT * REPLACE (item % 2 AS item) FROM t", [2, 0, 1]),
        "a huge id": ("SELECT * REPLACE (item * 500000000 AS item) FROM t", [1_000_000_000]),
        "an id too large for int64": ("SELECT * REPLACE (18446744073709551615::UBIGINT AS item) FROM t", ["item"]),
        "no id": ("SELECT * REPLACE (nullif(item, 1) AS item) FROM t", ["item"]),
        "no raw id": ("SELECT * REPLACE (nullif(raw_id, 'b') AS raw_id) FROM t", ["raw_id"]),
        "equal raw ids": ("SELECT * REPLACE (replace(raw_id, 'b', 'a') AS raw_id) FROM t", [2, 3]),
        "exchanged raw ids": ("SELECT * REPLACE (translate(raw_id, 'ab', 'ba') AS raw_id) FROM t", [ITEMS[:12]]),
        "raw ids that are numbers": ("SELECT * REPLACE (item AS raw_id) FROM t", ["raw_id", "VARCHAR"]),
        "no title": ("SELECT * REPLACE (nullif(title, 'Ball') AS title) FROM t", ["title"]),
        "no column": ("SELECT * EXCLUDE (text) FROM t", ["text"]),
        "a row fewer": ("FROM t WHERE item < 2", [2, 3]),
        "a row more": ("FROM t UNION ALL SELECT 3, 'd', 'Top', 't', NULL", [4, 3]),
        "no rows": ("FROM t LIMIT 0", []),
    },
    "users": {
        "all rows three times": ("SELECT t.* FROM t, range(3)", [2, 5]),
        "a gap": ('SELECT * REPLACE ("user" * 2 AS "user") FROM t', [0, 2]),
        "no raw id": ("SELECT * REPLACE (nullif(raw_id, 'v') AS raw_id) FROM t", ["raw_id"]),
        "equal raw ids": ("SELECT * REPLACE ('u' AS raw_id) FROM t", [1, 2]),
        "ids that are text": ('SELECT * REPLACE ("user"::VARCHAR AS "user") FROM t', ["user", "VARCHAR"]),
    },
    "interactions": {
        "an unknown item": ("SELECT * REPLACE (item + 1 AS item) FROM t", [1, "items.parquet"]),
        "a huge item": ("SELECT * REPLACE (item * 500000000 AS item) FROM t", [2, "items.parquet"]),
        "a negative item": ("SELECT * REPLACE (item - 1 AS item) FROM t", [1, "items.parquet"]),
        "items with a fraction": ("SELECT * REPLACE (item + 0.5::DOUBLE AS item) FROM t", ["item", "DOUBLE"]),
        "no item": ("SELECT * REPLACE (nullif(item, 1) AS item) FROM t", [1, "item"]),
        "an unknown user": ('SELECT * REPLACE ("user" + 1 AS "user") FROM t', [1, "users.parquet"]),
        "a user without events": ('FROM t WHERE "user" = 0', [1, 2, "users.parquet"]),
        "users not in order": ('FROM t ORDER BY "user" DESC', [1]),
        "times not in order": ('SELECT * REPLACE ("timestamp" - item AS "timestamp") FROM t ORDER BY item', [1]),
        "no time": ('SELECT * REPLACE (nullif("timestamp", 40) AS "timestamp") FROM t', [1, "timestamp"]),
        "times that are text": ('SELECT * REPLACE ("timestamp"::VARCHAR AS "timestamp") FROM t', ["VARCHAR"]),
        "a time too large": ('SELECT * REPLACE (18446744073709551615::UBIGINT AS "timestamp") FROM t', []),
        "an unknown split": ("SELECT * REPLACE (replace(split, 'test', 'tset') AS split) FROM t", [1, "valid"]),
        "no split": ("SELECT * REPLACE (nullif(split, 'test') AS split) FROM t", [1, "valid"]),
        "splits not in order": ("SELECT * REPLACE (CASE split WHEN 'train' THEN 'valid' WHEN 'valid' THEN 'train' "
                                "ELSE split END AS split) FROM t", [1, "valid"]),
        "a rating that is not finite": ("SELECT * REPLACE ('inf'::FLOAT AS rating) FROM t", [3]),
        "no rating": ("SELECT * REPLACE (nullif(rating, 5) AS rating) FROM t", [1, "rating"]),
        "no column": ("SELECT * EXCLUDE (split) FROM t", ["split"]),
        "no rows": ("FROM t LIMIT 0", []),
    },
}
LOADERS = {"items": artifacts.load_items, "users": artifacts.load_users, "interactions": artifacts.load_interactions}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in INVALID.items() for case in cases])
def test_an_invalid_table_is_refused_even_if_its_hash_fits(tmp_path, name, case):
    query, values = INVALID[name][case]
    folder = write_tables(DatasetFolder(tmp_path, "Toys"), **{name: query})
    with refused(ArtifactError, folder.path / f"{name}.parquet", names=values,
                 fix=[f"make {name} --force"]):
        LOADERS[name](folder)


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_table_is_refused_even_if_its_hash_fits(tables, name):
    put(tables.path / f"{name}.parquet", b"PAR1 and no more", num_items=3, items_sha256=ITEMS)
    with refused(ArtifactError, tables.path / f"{name}.parquet", fix=[f"make {name}.parquet --force"]):
        LOADERS[name](tables)


FITTING = {"num_interactions": 3, "num_users": 2, "num_items": 3, "num_in_split": {"train": 1, "valid": 1, "test": 1},
           "num_repeats": {"valid": 0, "test": 1}, "num_cold_items": {"valid": 1, "test": 1}}


@pytest.mark.parametrize(("key", "value"), [
    (None, None), ("num_interactions", 2), ("num_users", 3), ("num_items", 4),
    ("num_in_split", {"train": 2, "valid": 0, "test": 1}), ("num_repeats", {"valid": 0, "test": 2}),
    ("num_cold_items", {"valid": 0, "test": 1}), ("items_sha256", "0" * 64)])
def test_interactions_must_have_the_numbers_of_their_meta(tables, key, value):
    path = publishing.meta_path(tables.interactions)
    meta = {**json.loads(path.read_text()), **FITTING}
    path.write_text(json.dumps(meta if key is None else {**meta, key: value}))
    if key is None:
        artifacts.load_interactions(tables)
        return
    with refused(ArtifactError, tables.interactions, names=[key], fix=["make interactions --force"]):
        artifacts.load_interactions(tables)


def test_a_line_break_in_a_meta_adds_no_line(tables):
    path = publishing.meta_path(tables.interactions)
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_name": "x\nerror: forged"}))
    assert len(dataset_line(tables).splitlines()) == 1


@pytest.mark.parametrize("num_items", [2, 1_000_000_000])
def test_a_wrong_number_of_items_in_the_meta_is_refused(tables, num_items):
    write_table(tables.items, TABLES["items"], num_items=num_items, items_sha256=ITEMS)
    with refused(ArtifactError, publishing.meta_path(tables.items), names=["num_items", 3, num_items]):
        artifacts.load_items_meta(tables)
    with refused(ArtifactError, tables.items, names=[3, num_items]):
        artifacts.load_items(tables)


ODD_NAMES = ["fold[12]", "a*b", "q?", "item=7", "{x}", "50%"]


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_a_data_root_is_no_pattern_and_no_partition(tmp_path, odd):
    # A pattern would also match `plain`; with a partition, DuckDB would add a column.
    plain = {"fold[12]": "fold1", "a*b": "aXb", "q?": "qX"}.get(odd, "other")
    write_tables(DatasetFolder(tmp_path / plain, "Toys"), users="SELECT * REPLACE (raw_id || '!' AS raw_id) FROM t")
    folder = write_tables(DatasetFolder(tmp_path / odd, "Toys"))
    save_codes(folder, [[0, 1], [3, 0], [0, 0]])
    assert artifacts.load_users(folder)["raw_id"].tolist() == ["u", "v"]
    assert artifacts.load_items(folder)["raw_id"].tolist() == ["a", "b", "c"]
    assert artifacts.load_image_urls(folder).tolist() == ["http://h/0.jpg", None, "http://h/2.jpg"]
    assert artifacts.load_interactions(folder).item.tolist() == [2, 0, 1]
    assert (folder.variants(), folder.suffixes()) == (["vq-td"], [])
    with refused(ConfigError, names=["Toys"]):
        DatasetFolder(tmp_path / odd, "Toyz").require()
