import json
import pickle
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from common import artifacts, publishing
from common.artifacts import DatasetFolder, ids_sha256, load_codes, load_embeddings, load_mask, save_array
from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError, UserError
from common.publishing import publish
from tests.common.helpers import names, put

ITEMS = ids_sha256(["a", "b", "c"])


@pytest.fixture
def folder(tmp_path):
    """A data set with three items, and nothing in its tables yet."""
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


def test_codes_that_are_not_there_name_the_command(folder):
    with pytest.raises(DataError, match="Fix: python quantization/main.py --quantizer_name vq --dataset_name Toys "
                                        "--embedding_suffix td --tag small"):
        load_codes(folder, "vq", "td", "small")


@pytest.mark.parametrize(("tag", "flags"), [
    (None, "--quantizer_name vq --embedding_suffix td"),
    ("x-1", "--quantizer_name vq --embedding_suffix td --tag x-1")])
def test_codes_that_are_not_there_name_the_flags_of_the_nearest(folder, tag, flags):
    save_embeddings(folder, [[0, 1], [2, 3], [4, 5]])
    save_array(folder.codes("vq", "td", tag), np.zeros((3, 1), dtype=np.int32), {"inputs": {}})
    with pytest.raises(DataError) as raised:
        load_codes(folder, "vp", "td", tag)
    assert raised.value.exit_code == 3
    assert raised.value.fix.startswith(f"{flags}, or to make vp-td")


def test_an_embedding_that_is_not_there_names_the_flag_of_the_nearest(folder):
    save_embeddings(folder, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(DataError) as raised:
        load_embeddings(folder, "dt")
    assert raised.value.where == folder.embeddings("dt")
    assert raised.value.fix.startswith("--embedding_suffix td, or to make dt: bash dataloader/run_pipeline.sh")


def test_what_the_same_command_would_take_for_current_is_made_again_by_force(folder):
    save_embeddings(folder, [[0, 1], [np.nan, 3], [4, 5]], command="make embeddings")
    save_codes(folder, [[0, 1], [9, 0], [0, 0]])
    for load, fix in ((lambda: load_embeddings(folder, "td"), "make embeddings --force"),
                      (lambda: load_codes(folder, "vq", "td", None), "make codes --force")):
        with pytest.raises(UserError) as raised:
            load()
        assert raised.value.fix == fix


@pytest.mark.parametrize(("codes", "message"), [
    ([[0, 1], [3, 0], [0, 1]], "gives several items the same semantic ID"),
    ([[0, 1], [4, 0], [0, 0]], "has codes outside its codebooks"),
    ([[0, 1], [3, -1], [0, 0]], "has codes outside its codebooks"),
    ([[0], [1], [2]], "has codes outside its codebooks"),
    ([[0, 1, 0], [1, 1, 0], [2, 1, 0]], "has codes outside its codebooks"),
    ([[0, 1], [3, 0]], r"belongs to another list of items \(2 rows\). items.parquet has 3")])
def test_codes_that_a_recommender_could_not_use_are_refused(folder, codes, message):
    save_codes(folder, codes)
    with pytest.raises(ArtifactError, match=message):
        load_codes(folder, "vq", "td", None)


def test_codes_of_another_type_or_of_other_items_are_refused(folder):
    codes = [[0, 1], [3, 0], [0, 0]]
    save_codes(folder, codes, dtype=np.int64)
    with pytest.raises(ArtifactError, match=r"holds int64 \(3, 2\). wanted int32"):
        load_codes(folder, "vq", "td", None)
    save_codes(folder, codes, items_sha256=ids_sha256(["b", "a", "c"]))
    with pytest.raises(ArtifactError, match="belongs to another list of items"):
        load_codes(folder, "vq", "td", None)


@pytest.mark.parametrize("key", ["items_sha256", "codebook_sizes"])
def test_codes_whose_meta_lacks_what_the_next_stage_needs_are_refused(folder, key):
    save_codes(folder, [[0, 1], [3, 0], [0, 0]])
    path = publishing.meta_path(folder.codes("vq", "td", None))
    meta = json.loads(path.read_text())
    del meta[key]
    path.write_text(json.dumps(meta))
    with pytest.raises(ArtifactError):
        load_codes(folder, "vq", "td", None)


def test_embeddings_come_back(folder):
    save_embeddings(folder, [[0.5, 1], [2, 3], [4, 5]])
    array = load_embeddings(folder, "td")
    assert array.dtype == np.float32
    assert array.tolist() == [[0.5, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused_with_their_rows(folder, bad):
    save_embeddings(folder, [[0, 1], [2, bad], [bad, 5]])
    with pytest.raises(DataError, match=r"rows \[1, 2\] are not finite"):
        load_embeddings(folder, "td")


def save_masked(folder, mask, dtype=bool, **meta):
    """Embeddings, and a mask beside them that is one of their inputs."""
    saved = save_array(folder.mask("image"), np.array(mask, dtype=dtype), {"inputs": {}, "items_sha256": ITEMS, **meta})
    save_array(folder.embeddings("image"), np.ones((3, 2), dtype=np.float32), {
        "inputs": {folder.mask("image").name: saved["sha256"]}, "items_sha256": ITEMS})


def test_a_mask_says_which_items_have_a_vector_of_their_own(folder):
    save_masked(folder, [True, False, True])
    assert folder.mask("image").name == "Toys.mask-image.npy"
    mask = load_mask(folder, "image")
    assert mask.dtype == bool
    assert mask.tolist() == [True, False, True]


def test_embeddings_without_a_mask_have_a_vector_for_every_item(folder):
    save_embeddings(folder, [[0.5, 1], [2, 3], [4, 5]])
    assert load_mask(folder, "td").tolist() == [True] * 3


def test_a_mask_that_is_no_input_of_the_embedding_is_left_behind_by_another_and_not_read(folder):
    save_masked(folder, [True, False, True])
    save_array(folder.embeddings("image"), np.ones((3, 2), dtype=np.float32), {"inputs": {}, "items_sha256": ITEMS})
    assert load_mask(folder, "image").tolist() == [True] * 3


@pytest.mark.parametrize(("mask", "changed", "message"), [
    ([1, 0, 1], {"dtype": np.int8}, r"holds int8 \(3,\). wanted bool \(items,\)"),
    ([[True], [False], [True]], {}, r"holds bool \(3, 1\). wanted bool \(items,\)"),
    ([True, False], {}, r"another list of items \(2 rows\). items.parquet has 3"),
    ([True, False, True], {"items_sha256": "others"}, "another list of items")])
def test_a_mask_of_another_kind_or_of_other_items_is_refused(folder, mask, changed, message):
    save_masked(folder, mask, **changed)
    with pytest.raises(ArtifactError, match=message):
        load_mask(folder, "image")


def test_a_mask_that_changed_makes_its_embedding_stale(folder):
    save_masked(folder, [True, False, True])
    save_array(folder.mask("image"), np.array([True] * 3), {"inputs": {}, "items_sha256": ITEMS})
    with pytest.raises(ArtifactError, match=r"is stale. Toys.mask-image.npy has changed"):
        load_mask(folder, "image")


@pytest.mark.parametrize(("rows", "dtype", "message"), [
    ([[0, 1], [2, 3], [4, 5]], np.float64, r"holds float64 \(3, 2\)"),
    ([0, 1, 2], np.float32, r"holds float32 \(3,\)"),
    ([[0, 1], [2, 3]], np.float32, r"another list of items \(2 rows\). items.parquet has 3")])
def test_embeddings_of_another_kind_are_refused(folder, rows, dtype, message):
    save_embeddings(folder, rows, dtype)
    with pytest.raises(ArtifactError, match=message):
        load_embeddings(folder, "td")


def test_embeddings_of_as_many_other_items_are_refused(folder):
    save_embeddings(folder, [[0, 1], [2, 3], [4, 5]], items_sha256=ids_sha256(["a", "c", "b"]))
    with pytest.raises(ArtifactError, match="another list of items"):
        load_embeddings(folder, "td")


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_a_pickle_in_an_array_file_is_refused_and_never_run(folder, tmp_path, kind):
    canary = tmp_path / "canary"

    def write(staged: Path):
        with staged.open("wb") as file:
            if kind == "object array":
                np.save(file, np.array([[Canary(canary)]] * 3, dtype=object), allow_pickle=True)
            else:
                pickle.dump(Canary(canary), file)

    publish(folder.embeddings("td"), write, {"inputs": {}, "items_sha256": ITEMS})
    with pytest.raises(ArtifactError, match="is not a numpy array file"):
        load_embeddings(folder, "td")
    assert not canary.exists()
    with folder.embeddings("td").open("rb") as file:  # the canary does sing when it is unpickled
        np.load(file, allow_pickle=True)
    assert canary.exists()


def test_a_file_made_elsewhere_gets_the_meta_that_readers_ask_for(folder):
    path = folder.embeddings("td")
    with path.open("wb") as file:
        np.save(file, np.ones((3, 2), dtype=np.float32))
    with pytest.raises(ArtifactError, match="has no meta"):
        load_embeddings(folder, "td")
    publishing.write_meta(path, {"inputs": {folder.items.name: publishing.file_sha256(folder.items)},
                                "items_sha256": ITEMS, "title": "Zoë"})
    assert load_embeddings(folder, "td").tolist() == [[1, 1]] * 3
    meta = artifacts.verify(path, "")
    assert (meta["schema_version"], meta["size"]) == (artifacts.SCHEMA_VERSION, path.stat().st_size)
    assert names(folder.path) == {"items.parquet", "items.parquet.meta.json", path.name, f"{path.name}.meta.json"}


def test_the_meta_of_a_file_that_changes_afterwards_no_longer_fits(folder):
    folder.users.write_bytes(b"users")
    publishing.write_meta(folder.users, {"inputs": {}})
    folder.users.write_bytes(b"USERS")
    with pytest.raises(ArtifactError, match="does not match the sha256"):
        artifacts.verify(folder.users, "")


def test_an_object_array_is_not_written_either(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        save_array(tmp_path / "file.npy", np.array([{}], dtype=object), {"inputs": {}})
    assert names(tmp_path) == set()


def test_an_unknown_data_set_names_its_command_and_the_data_sets_that_are_there(tmp_path):
    for name in ("Baby", "Games"):
        put(DatasetFolder(tmp_path, name).interactions, b"events")
    for asked, fix in (("Babi", "Fix: --dataset Baby, or to make Babi: bash"), ("ml-100k", "Fix: bash")):
        with pytest.raises(ConfigError) as raised:
            DatasetFolder(tmp_path, asked).require()
        assert raised.value.exit_code == 2
        assert f"{fix} dataloader/run_pipeline.sh --dataset {asked}" in str(raised.value)
        assert "Baby, Games" in str(raised.value)
    DatasetFolder(tmp_path, "Baby").require()


def test_the_nearest_data_set_is_suggested(tmp_path):
    for name in ("Baby", "Games"):
        put(DatasetFolder(tmp_path, name).interactions, b"events")
    with pytest.raises(ConfigError, match="did you mean 'Baby'"):
        DatasetFolder(tmp_path, "Babi").require()


def test_where_there_is_no_data_at_all_the_error_says_so(tmp_path):
    with pytest.raises(ConfigError, match="there are no data sets yet"):
        DatasetFolder(tmp_path / "nowhere", "Baby").require()


def test_the_command_for_data_elsewhere_says_where(tmp_path):
    assert DatasetFolder(tmp_path, "Toys").make_command.endswith(f"--dataset Toys --data_root {tmp_path}")
    assert DatasetFolder(ROOT / "data", "Toys").make_command == "bash dataloader/run_pipeline.sh --dataset Toys"


def test_the_hash_of_ids_depends_on_their_order_and_borders():
    lists = (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["", "ab"], ["a", "b", ""], [], ["é", "b"], ["\ud800"])
    assert len({ids_sha256(ids) for ids in lists}) == len(lists)
    assert ids_sha256(["a", "b"]) == ids_sha256(["a", "b"])


def write_table(path: Path, query: str, **meta) -> None:
    # The name is no format of its own, so that duckdb must be told.
    publish(path, lambda staged: duckdb.sql(f"COPY ({query}) TO '{staged}' (FORMAT parquet)"), {"inputs": {}, **meta})


def test_interactions_keep_the_order_of_the_file(tmp_path):
    folder = DatasetFolder(tmp_path, "Toys")
    write_table(folder.interactions, """
        FROM (VALUES (1, 2, 50, 5.0, 'train'), (1, 0, 40, 1.0, 'valid'), (0, 1, 60, 3.0, 'test'))
        AS t("user", item, "timestamp", rating, split)""")
    events = artifacts.load_interactions(folder)
    assert events.user.tolist() == [1, 1, 0]
    assert events.item.tolist() == [2, 0, 1]
    assert events.timestamp.tolist() == [50, 40, 60]
    assert events.split.tolist() == [0, 1, 2]
    assert [column.dtype for column in events] == [np.int64, np.int64, np.int64, np.int8]


def test_an_event_of_no_known_split_is_refused(tmp_path):
    folder = DatasetFolder(tmp_path, "Toys")
    write_table(folder.interactions, """FROM (VALUES (0, 1, 60, 3.0, 'tset')) AS t("user", item, "timestamp", rating,
        split)""")
    with pytest.raises(ArtifactError, match="split"):
        artifacts.load_interactions(folder)


def test_item_and_user_tables_come_in_the_order_of_their_numbers(tmp_path):
    folder = DatasetFolder(tmp_path, "Toys")
    write_table(folder.items,
                "FROM (VALUES (1, 'y', 'Yo-yo', 'a'), (0, 'x', NULL, 'b')) AS t(item, raw_id, title, text)")
    write_table(folder.users, "FROM (VALUES (1, 'v'), (0, 'u')) AS t(\"user\", raw_id)")
    items = artifacts.load_items(folder)
    assert {name: column.tolist() for name, column in items.items()} == {
        "raw_id": ["x", "y"], "title": [None, "Yo-yo"], "text": ["b", "a"]}
    assert artifacts.load_users(folder)["raw_id"].tolist() == ["u", "v"]


def test_a_data_root_is_no_pattern_and_no_partition(tmp_path):
    # As a pattern the last would read the first, and as a partition its name would be a column.
    roots = [tmp_path / "fold1", tmp_path / "item=7" / "fold[12]"]
    (tmp_path / "item=7" / "fold1").mkdir(parents=True)
    for number, root in enumerate(roots):
        folder = DatasetFolder(root, "Toys")
        write_table(folder.interactions, f"""FROM (VALUES (0, {number}, 60, 3.0, 'test')) AS t("user", item,
            "timestamp", rating, split)""")
        write_table(folder.items, f"FROM (VALUES (0, 'x{number}', NULL, 'b', NULL)) "
                                  "AS t(item, raw_id, title, text, image_url)")
        write_table(folder.users, f"FROM (VALUES (0, 'u{number}')) AS t(\"user\", raw_id)")
    shutil.copytree(roots[0] / "Toys", tmp_path / "item=7" / "fold1" / "Toys")
    for number, root in enumerate(roots):
        folder = DatasetFolder(root, "Toys")
        assert artifacts.load_interactions(folder).item.tolist() == [number]
        assert artifacts.load_items(folder)["raw_id"].tolist() == [f"x{number}"]
        assert artifacts.load_users(folder)["raw_id"].tolist() == [f"u{number}"]
        assert artifacts.load_image_urls(folder).tolist() == [None]


def test_image_addresses_come_in_the_order_of_the_items(tmp_path):
    folder = DatasetFolder(tmp_path, "Toys")
    write_table(folder.items, "FROM (VALUES (1, 'http://h/1.jpg'), (0, 'http://h/0.jpg'), (2, NULL)) "
                              "AS t(item, image_url)")
    assert artifacts.load_image_urls(folder).tolist() == ["http://h/0.jpg", "http://h/1.jpg", None]
