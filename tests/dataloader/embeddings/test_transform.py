"""Transforms against scikit-learn, and which embeddings are published or refused."""

import json
import logging
import re

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler, normalize

from common.artifacts import load_embeddings, load_mask, load_meta, save_array
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import file_sha256
from dataloader.embeddings import transform
from dataloader.embeddings.transform import is_current, publish_embedding, transformed
from dataloader.options import Transform
from tests.dataloader.dataset import add_item, write_dataset
from tests.dataloader.helpers import logged, mentions
from tests.errors import refused

NONE = Transform(pca=None, whiten=False, zscore=False, l2=False)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(transform, "ROWS", 7)  # so that every test needs several slices


def spread(num_items: int = 40, dim: int = 6) -> np.ndarray:
    """Vectors far from zero, with another variance in each direction."""
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(num_items, dim)) * np.array([5, 3, 2, 1, 0.5, 0.1]) @ rng.normal(size=(dim, dim))
    return (mixed + 10 * rng.normal(size=dim)).astype(np.float32)


def everyone(vectors: np.ndarray) -> np.ndarray:
    return np.ones(len(vectors), dtype=bool)


def apply(vectors: np.ndarray, present: np.ndarray | None = None, **flags) -> np.ndarray:
    return transformed(vectors.copy(), everyone(vectors) if present is None else present, NONE._replace(**flags))


def aligned(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Their principal components with our signs, which PCA does not determine."""
    return theirs * np.sign((ours * theirs).sum(axis=0))


def test_no_flag_changes_nothing():
    vectors = spread()
    np.testing.assert_array_equal(apply(vectors), vectors)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("num_dims", [1, 3, 6])
def test_pca_is_scikit_learn_s(num_dims, whiten):
    vectors = spread()
    ours = apply(vectors, pca=num_dims, whiten=whiten)
    theirs = PCA(num_dims, whiten=whiten, svd_solver="full").fit_transform(vectors.astype(np.float64))
    assert (ours.dtype, ours.shape) == (np.float32, (40, num_dims))
    np.testing.assert_allclose(ours, aligned(ours, theirs), rtol=1e-3, atol=1e-4)


def test_the_signs_of_pca_ignore_the_item_order():
    vectors = spread()
    np.testing.assert_allclose(apply(vectors, pca=4), apply(vectors[::-1], pca=4)[::-1], atol=1e-4)


def test_zscore_is_scikit_learn_s():
    vectors = spread()
    np.testing.assert_allclose(apply(vectors, zscore=True), StandardScaler().fit_transform(vectors), atol=1e-5)


def test_a_constant_dimension_becomes_zero_and_not_noise():
    vectors = spread()
    vectors[:, 2] = 0.1  # not exact in binary, so that its mean is off by a rounding
    assert (apply(vectors, zscore=True)[:, 2] == 0).all()
    np.testing.assert_allclose(apply(vectors, zscore=True), StandardScaler().fit_transform(vectors), atol=1e-5)


def test_whitening_leaves_a_direction_without_variance_at_zero():
    vectors = spread()
    vectors[:, 5] = vectors[:, 0] + vectors[:, 1]
    whitened = apply(vectors, pca=6, whiten=True)
    np.testing.assert_allclose(whitened[:, :5].var(axis=0, ddof=1), 1, rtol=1e-4)
    assert np.abs(whitened[:, 5]).max() == 0


def test_l2_is_scikit_learn_s():
    vectors = spread()
    np.testing.assert_allclose(apply(vectors, l2=True), normalize(vectors), atol=1e-6)


def test_pca_comes_before_zscore_and_zscore_before_l2():
    vectors = spread()
    ours = apply(vectors, pca=3, zscore=True, l2=True)
    theirs = normalize(StandardScaler().fit_transform(PCA(3).fit_transform(vectors.astype(np.float64))))
    np.testing.assert_allclose(ours, aligned(ours, theirs), atol=1e-4)


@pytest.mark.parametrize("flags", [{"pca": 3}, {"pca": 3, "whiten": True}, {"zscore": True}, {"l2": True}, {}])
def test_items_without_a_vector_get_the_mean_of_the_others(flags):
    vectors = spread()
    present = everyone(vectors)
    present[[0, 9, 39]] = False
    with_noise = vectors.copy()
    with_noise[~present] = 1e6
    ours, alone = apply(with_noise, present, **flags), apply(vectors[present], **flags)
    np.testing.assert_allclose(ours[present], alone, atol=1e-4)
    np.testing.assert_allclose(ours[~present], np.tile(alone.mean(axis=0), (3, 1)), atol=1e-4)


@pytest.mark.parametrize(("num_items", "asked", "most"), [(40, 7, 6), (4, 4, 3)])
def test_too_many_dimensions_are_refused_with_both_numbers(num_items, asked, most):
    with refused(ConfigError, "--pca") as error:
        apply(spread()[:num_items], pca=asked)
    assert mentions(error.value.what, asked)
    assert mentions(error.value.why, num_items, most)


@pytest.mark.parametrize("kind", ["float64", "read-only", "columns first", "a view"])
def test_any_kind_of_array_works(kind):
    vectors = spread()
    other = {"float64": vectors.astype(np.float64), "read-only": vectors.copy(),
             "columns first": np.asfortranarray(vectors), "a view": np.repeat(vectors, 2, axis=0)[::2]}[kind]
    other.setflags(write=kind != "read-only")
    made = transformed(other, everyone(vectors), NONE._replace(l2=True))
    assert made.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(made, apply(vectors, l2=True))


SETTINGS = {"text_model": "of a test"}
COMMAND = "bash dataloader/3_get_text_emb.sh"


def publish(options, vectors, **more):
    publish_embedding(options.target, vectors, SETTINGS, COMMAND, **more)


def small(tmp_path, *flags: str):
    return write_dataset(tmp_path, ["a", "b", "c", "d"], *flags).text


def files(options) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in options.folder.path.iterdir()}


def test_the_artifact_records_its_inputs_and_settings(tmp_path):
    options = small(tmp_path, "--pca=2", "--whiten", "--l2")
    publish(options, spread(4), inputs={"users.parquet": file_sha256(options.folder.users)},
            encoder={"precision": "float32"})
    meta = load_meta(options.target.path, "")
    assert meta["settings"] == {"text_model": "of a test",
                                "transform": {"pca": 2, "whiten": True, "zscore": False, "l2": True}}
    assert meta["inputs"] == {name: file_sha256(options.folder.path / name)
                              for name in ("items.parquet", "users.parquet")}
    assert (meta["dim"], meta["num_missing"], meta["encoder"]) == (2, 0, {"precision": "float32"})
    assert meta["items_sha256"] == load_meta(options.folder.items, "")["items_sha256"]
    assert meta["command"] == COMMAND
    assert load_embeddings(options.folder, "td").shape == (4, 2)


def test_only_the_embedding_that_suffix_names_is_transformed(tmp_path):
    options = small(tmp_path, "--suffix=fused-concat", "--l2")
    vectors = spread(4)
    publish(options, vectors.copy())
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), vectors)


@pytest.mark.parametrize("origin", [{"settings": {"adopted": True}}, {"settings": {}, "recommender": "sasrec"}])
def test_an_embedding_of_another_origin_is_not_replaced(tmp_path, caplog, origin):
    options = write_dataset(tmp_path / "data", ["a", "b"]).text
    items = load_meta(options.folder.items, "")
    save_array(options.target.path, np.ones((2, 3), dtype=np.float32), {
        "inputs": {options.folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"],
        "command": "my own command", **origin})
    assert is_current(options.target, SETTINGS, {})
    assert logged(caplog, "my own command", "--force", level=logging.WARNING)
    add_item(options, "c")
    with refused(ArtifactError, options.target.path, names=["items.parquet"], fix=["--force"]):
        is_current(options.target, SETTINGS, {})


def test_an_embedding_is_current_until_settings_or_inputs_change(tmp_path):
    options = small(tmp_path)
    inputs = {"items.parquet": load_meta(options.folder.items, "")["sha256"]}
    assert not is_current(options.target, SETTINGS, inputs)
    publish(options, spread(4))
    assert is_current(options.target, SETTINGS, inputs)
    assert not is_current(options.target, {"text_model": "another"}, inputs)
    assert not is_current(options.target._replace(transform=NONE._replace(l2=True)), SETTINGS, inputs)
    assert not is_current(options.target, SETTINGS, {**inputs, "images.parquet": "0"})
    add_item(options, "e")
    assert not is_current(options.target, SETTINGS, {"items.parquet": load_meta(options.folder.items, "")["sha256"]})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_an_invalid_row_is_refused_and_the_old_embedding_stays(tmp_path, bad):
    options = small(tmp_path)
    publish(options, spread(4))
    before, vectors = files(options), spread(4)
    vectors[[1, 3]] = 0
    vectors[[1, 3], 2] = bad
    with refused(DataError, options.target.path) as error:
        publish(options, vectors)
    assert mentions(error.value.what, 2)
    assert re.findall(r"raw-\d", error.value.why) == ["raw-1", "raw-3"]
    assert files(options) == before


def test_a_transform_that_zeroes_items_is_refused(tmp_path):
    options = small(tmp_path, "--zscore")
    with refused(DataError, options.target.path, names=["--pca", "--zscore", "--l2"]) as error:
        publish(options, np.full((4, 3), 0.1, dtype=np.float32))
    assert mentions(error.value.what, 4)


@pytest.mark.parametrize("num_rows", [3, 5])
def test_another_number_of_rows_than_items_is_an_error(tmp_path, num_rows):
    options = small(tmp_path)
    with refused(DataError, options.target.path, fix=[f"{COMMAND} --force"]) as error:
        publish(options, spread(num_rows))
    assert mentions(error.value.what, num_rows, 4)
    assert not options.folder.embeddings("td").exists()


def test_items_without_a_vector_are_marked_in_a_mask(tmp_path):
    options = small(tmp_path)
    vectors = spread(4)
    vectors[2] = np.nan
    publish(options, vectors.copy(), present=np.array([True, True, False, True]))
    made = load_embeddings(options.folder, "td")
    np.testing.assert_allclose(made[2], vectors[[0, 1, 3]].mean(axis=0), rtol=1e-6)
    assert load_mask(options.folder, "td").tolist() == [True, True, False, True]
    assert load_meta(options.folder.embeddings("td"), "")["num_missing"] == 1
    publish(options, spread(4))
    assert load_mask(options.folder, "td").tolist() == [True] * 4
    assert not options.folder.mask("td").exists()


def test_no_vector_at_all_is_an_error(tmp_path):
    options = small(tmp_path)
    with refused(DataError, options.target.path, fix=["td"]):
        publish(options, spread(4), present=np.zeros(4, dtype=bool))


def overwrite(options, array: np.ndarray | None = None, damage: int = 0) -> None:
    """Replace the artifact by another array, or shorten it, with a meta of the right size."""
    path = options.folder.embeddings("td")
    meta_file = path.with_name(path.name + ".meta.json")
    if array is not None:
        np.save(path, array, allow_pickle=True)
    path.write_bytes(path.read_bytes()[:path.stat().st_size - damage])
    meta = {**json.loads(meta_file.read_text()), "size": path.stat().st_size, "sha256": file_sha256(path)}
    meta_file.write_text(json.dumps(meta))


@pytest.mark.parametrize(("array", "values"), [
    (np.array([[object()]] * 4, dtype=object), ()),
    (np.zeros((4, 3), dtype=np.float16), ("float16", "(4, 3)", "float32")),
    (np.zeros((4, 3), dtype=np.float64), ("float64", "(4, 3)", "float32")),
    (np.zeros(4, dtype=np.float32), ("float32", "(4,)")),
    (np.zeros((4, 3, 2), dtype=np.float32), ("float32", "(4, 3, 2)")),
    (np.zeros((5, 3), dtype=np.float32), ("5", "items.parquet", "4")),
], ids=["object", "float16", "float64", "1-d", "3-d", "5 rows"])
def test_another_array_is_refused_with_its_type_and_shape(tmp_path, array, values):
    options = small(tmp_path)
    publish(options, spread(4))
    overwrite(options, array)
    with refused(ArtifactError, options.folder.path / "Baby.emb-td.npy", fix=[f"{COMMAND} --force"]) as error:
        load_embeddings(options.folder, "td")
    assert not [value for value in values if value not in f"{error.value.what}; {error.value.why}"]


def test_a_truncated_file_is_refused(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    path, size = options.target.path, options.target.path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with refused(ArtifactError, path, names=[size - 1, size], fix=[f"{COMMAND} --force"]):
        load_embeddings(options.folder, "td")
    overwrite(options, damage=8)  # its meta has its size
    with refused(ArtifactError, path, fix=[f"{COMMAND} --force"]):
        load_embeddings(options.folder, "td")


def test_an_array_stored_by_columns_is_read_correctly(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    overwrite(options, np.asfortranarray(spread(4)))
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), spread(4))


def test_an_embedding_of_items_in_another_order_is_refused(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    add_item(options, "e")
    with refused(ArtifactError, options.target.path, names=["items.parquet"], fix=[f"{COMMAND} --force"]):
        load_embeddings(options.folder, "td")
