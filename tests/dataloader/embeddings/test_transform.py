"""Transforms against scikit-learn, and what is published or refused."""

import json

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler, normalize

from common.artifacts import load_embeddings, load_mask, load_meta
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import file_sha256
from dataloader.embeddings import transform
from dataloader.embeddings.transform import is_current, publish_embedding, transformed
from dataloader.options import Transform
from tests.dataloader.dataset import add_item, write_dataset

NONE = Transform(pca=None, whiten=False, zscore=False, l2=False)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(transform, "ROWS", 7)  # so that every test crosses the border of a slice


def spread(num_items: int = 40, dim: int = 6) -> np.ndarray:
    """Vectors with a direction of its own variance each, far from zero."""
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(num_items, dim)) * np.array([5, 3, 2, 1, 0.5, 0.1]) @ rng.normal(size=(dim, dim))
    return (mixed + 10 * rng.normal(size=dim)).astype(np.float32)


def everyone(vectors: np.ndarray) -> np.ndarray:
    return np.ones(len(vectors), dtype=bool)


def apply(vectors: np.ndarray, present: np.ndarray | None = None, **flags) -> np.ndarray:
    return transformed(vectors.copy(), everyone(vectors) if present is None else present, NONE._replace(**flags))


def aligned(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Their principal components with our signs, which PCA leaves open."""
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


def test_the_signs_of_pca_do_not_depend_on_the_order_of_the_items():
    vectors = spread()
    np.testing.assert_allclose(apply(vectors, pca=4), apply(vectors[::-1], pca=4)[::-1], atol=1e-4)


def test_zscore_is_scikit_learn_s():
    vectors = spread()
    np.testing.assert_allclose(apply(vectors, zscore=True), StandardScaler().fit_transform(vectors), atol=1e-5)


def test_a_dimension_that_is_the_same_everywhere_becomes_zero_and_not_noise():
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


def test_all_of_them_go_in_order_pca_then_zscore_then_length():
    vectors = spread()
    ours = apply(vectors, pca=3, zscore=True, l2=True)
    theirs = normalize(StandardScaler().fit_transform(PCA(3).fit_transform(vectors.astype(np.float64))))
    np.testing.assert_allclose(ours, aligned(ours, theirs), atol=1e-4)


@pytest.mark.parametrize("flags", [{"pca": 3}, {"pca": 3, "whiten": True}, {"zscore": True}, {"l2": True}, {}])
def test_items_without_a_vector_move_nothing_and_get_the_mean_of_the_others(flags):
    vectors = spread()
    present = everyone(vectors)
    present[[0, 9, 39]] = False
    with_noise = vectors.copy()
    with_noise[~present] = 1e6
    ours, alone = apply(with_noise, present, **flags), apply(vectors[present], **flags)
    np.testing.assert_allclose(ours[present], alone, atol=1e-4)
    np.testing.assert_allclose(ours[~present], np.tile(alone.mean(axis=0), (3, 1)), atol=1e-4)


@pytest.mark.parametrize(("num_items", "asked", "most"), [(40, 7, 6), (4, 4, 3)])
def test_more_dimensions_than_there_are_is_an_error_with_both_numbers(num_items, asked, most):
    with pytest.raises(ConfigError) as error:
        apply(spread()[:num_items], pca=asked)
    assert f"asks for {asked} dimensions" in error.value.what
    assert f"at most {most}" in error.value.why


@pytest.mark.parametrize("kind", ["float64", "read-only", "columns first", "a view"])
def test_any_kind_of_array_will_do(kind):
    vectors = spread()
    other = {"float64": vectors.astype(np.float64), "read-only": vectors.copy(),
             "columns first": np.asfortranarray(vectors), "a view": np.repeat(vectors, 2, axis=0)[::2]}[kind]
    other.setflags(write=kind != "read-only")
    made = transformed(other, everyone(vectors), NONE._replace(l2=True))
    assert made.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(made, apply(vectors, l2=True))


SETTINGS = {"text_model": "of a test"}


def publish(options, vectors, **more):
    publish_embedding(options.target, vectors, SETTINGS, "bash dataloader/3_get_text_emb.sh", **more)


def small(tmp_path, *flags: str):
    return write_dataset(tmp_path, ["a", "b", "c", "d"], *flags).text


def files(options) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in options.folder.path.iterdir()}


def test_the_artifact_says_what_it_was_made_from_and_how(tmp_path):
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
    assert meta["command"] == "bash dataloader/3_get_text_emb.sh"
    assert load_embeddings(options.folder, "td").shape == (4, 2)


def test_only_the_embedding_that_suffix_names_is_transformed(tmp_path):
    options = small(tmp_path, "--suffix=fused-concat", "--l2")
    vectors = spread(4)
    publish(options, vectors.copy())
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), vectors)


def test_what_was_made_is_current_until_settings_flags_or_items_change(tmp_path):
    options = small(tmp_path)
    inputs = {"items.parquet": load_meta(options.folder.items, "")["sha256"]}
    assert not is_current(options.target, SETTINGS, inputs)
    publish(options, spread(4))
    assert is_current(options.target, SETTINGS, inputs)
    assert not is_current(options.target, {"text_model": "another"}, inputs)
    assert not is_current(options.target._replace(transform=NONE._replace(l2=True)), SETTINGS, inputs)
    assert not is_current(options.target, SETTINGS, {**inputs, "figures.parquet": "0"})
    add_item(options, "e")
    assert not is_current(options.target, SETTINGS, {"items.parquet": load_meta(options.folder.items, "")["sha256"]})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_a_row_that_is_not_usable_is_an_error_with_its_items_and_the_old_embedding_stays(tmp_path, bad):
    options = small(tmp_path)
    publish(options, spread(4))
    before, vectors = files(options), spread(4)
    vectors[[1, 3]] = 0
    vectors[[1, 3], 2] = bad
    with pytest.raises(DataError) as error:
        publish(options, vectors)
    assert error.value.exit_code == 3
    assert "no usable vector for 2 items" in error.value.what
    assert error.value.why == "raw-1, raw-3"
    assert files(options) == before


def test_a_transform_that_leaves_nothing_of_an_item_is_an_error_that_says_so(tmp_path):
    options = small(tmp_path, "--zscore")
    with pytest.raises(DataError, match="for 4 items: not finite, or all zero, after --pca, --zscore or --l2"):
        publish(options, np.full((4, 3), 0.1, dtype=np.float32))


@pytest.mark.parametrize("num_rows", [3, 5])
def test_another_number_of_rows_than_items_is_an_error(tmp_path, num_rows):
    options = small(tmp_path)
    with pytest.raises(DataError, match=f"{num_rows} vectors were made for 4 items"):
        publish(options, spread(num_rows))
    assert not options.folder.embeddings("td").exists()


def test_items_without_a_vector_are_marked_in_a_mask_beside_it(tmp_path):
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
    with pytest.raises(DataError, match="no item has a vector"):
        publish(small(tmp_path), spread(4), present=np.zeros(4, dtype=bool))


def overwrite(options, array: np.ndarray | None = None, damage: int = 0) -> None:
    """Put another array, or less of it, in the artifact's place, with a meta that fits its size."""
    path = options.folder.embeddings("td")
    meta_file = path.with_name(path.name + ".meta.json")
    if array is not None:
        np.save(path, array, allow_pickle=True)
    path.write_bytes(path.read_bytes()[:path.stat().st_size - damage])
    meta = {**json.loads(meta_file.read_text()), "size": path.stat().st_size, "sha256": file_sha256(path)}
    meta_file.write_text(json.dumps(meta))


@pytest.mark.parametrize(("array", "words"), [
    (np.array([[object()]] * 4, dtype=object), "is not a numpy array file"),
    (np.zeros((4, 3), dtype=np.float16), "holds float16 (4, 3)"),
    (np.zeros((4, 3), dtype=np.float64), "holds float64 (4, 3)"),
    (np.zeros(4, dtype=np.float32), "holds float32 (4,)"),
    (np.zeros((4, 3, 2), dtype=np.float32), "holds float32 (4, 3, 2)"),
    (np.zeros((5, 3), dtype=np.float32), "belongs to another list of items (5 rows)"),
], ids=["object", "float16", "float64", "1-d", "3-d", "5 rows"])
def test_a_file_that_is_not_the_embedding_is_refused_with_what_it_holds(tmp_path, array, words):
    options = small(tmp_path)
    publish(options, spread(4))
    overwrite(options, array)
    with pytest.raises(ArtifactError) as error:
        load_embeddings(options.folder, "td")
    assert error.value.exit_code == 4
    assert words in str(error.value)
    assert "Baby.emb-td.npy" in str(error.value)
    assert error.value.fix


def test_a_truncated_file_is_refused(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    options.target.path.write_bytes(options.target.path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="its meta says"):
        load_embeddings(options.folder, "td")
    overwrite(options, damage=8)
    with pytest.raises(ArtifactError, match="is not a numpy array file"):
        load_embeddings(options.folder, "td")


def test_an_array_stored_by_columns_is_read_as_it_is_meant(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    overwrite(options, np.asfortranarray(spread(4)))
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), spread(4))


def test_an_embedding_of_items_in_another_order_is_refused(tmp_path):
    options = small(tmp_path)
    publish(options, spread(4))
    add_item(options, "e")
    with pytest.raises(ArtifactError, match=r"items.parquet has changed"):
        load_embeddings(options.folder, "td")
