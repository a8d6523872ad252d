"""The nearest neighbours of items, by hand and against all cosines."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from recommendation.counting import neighbours
from recommendation.counting.neighbours import as_matrix, neighbours_of_texts, neighbours_of_vectors


def test_neighbours_of_vectors_by_hand():
    items, weights = neighbours_of_vectors(np.array([[1, 0], [3, 0], [1, 1], [-1, 0.0]]))
    # The cosine of item 2 and items 0 and 1 is 1 / sqrt(2). A negative cosine has the weight 0.
    assert as_matrix(items, weights).toarray() == pytest.approx(
        np.array([[0, 1, 0.5, 0], [1, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]), abs=1e-6)


def test_items_without_a_vector_of_their_own_have_no_neighbours():
    _, weights = neighbours_of_vectors(np.ones((3, 2)), np.array([True, True, False]))
    assert weights == pytest.approx(np.array([[1, 0], [1, 0], [0, 0]]))


@pytest.mark.parametrize("block_cells", [1, 500, 10**6])
def test_neighbours_of_texts_are_the_nearest_of_all(monkeypatch, block_cells):
    monkeypatch.setattr(neighbours, "BLOCK_CELLS", block_cells)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in (60 * rng.random(8) ** 1.5).astype(int)) for _ in range(100)]
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.2).fit_transform(texts).toarray()
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    items, weights = neighbours_of_texts(texts)
    assert items.shape == weights.shape == (100, 30)
    assert np.sort(weights, axis=1)[:, ::-1] == pytest.approx(weights)
    for item in range(100):
        found = items[item][weights[item] > 0]
        assert item not in found
        assert len(set(found)) == len(found)
        assert weights[item, :len(found)] == pytest.approx(cosines[item, found] ** 2, abs=1e-5)
        assert weights[item] == pytest.approx(np.sort(cosines[item])[::-1][:30] ** 2, abs=1e-5)


@pytest.mark.parametrize("texts", [["a1", "b2", "c3"], [""] * 40, ["the same"] * 40, ["one"]])
def test_texts_without_common_words_have_no_neighbours(texts):
    items, weights = neighbours_of_texts(texts)
    assert items.shape == (len(texts), min(30, len(texts) - 1))
    assert as_matrix(items, weights).nnz == 0
