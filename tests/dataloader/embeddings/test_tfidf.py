"""TF-IDF vectors against scikit-learn, and vectors of texts without known words."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from dataloader.embeddings import tfidf
from dataloader.embeddings.tfidf import tfidf_vectors

ROOT = Path(__file__).resolve().parents[3]
# Every word is in two texts or more.
SHARED = ["red baby bottle", "Blue baby bottle, baby!", "red warm blanket", "blue warm blanket", "red red toy a 3",
          "blue toy A 3"]


def vectors_of(texts: list[str]) -> np.ndarray:
    return tfidf_vectors(np.array(texts, dtype=object))


def oracle(texts: list[str]) -> np.ndarray:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", min_df=2, sublinear_tf=True)
    return vectorizer.fit_transform(texts).toarray()


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_inner_products_match_scikit_learn_without_rare_words():
    vectors = vectors_of(SHARED)
    assert vectors.dtype == np.float32
    expected = oracle(SHARED)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_fewer_dimensions_are_the_strongest_directions(monkeypatch):
    monkeypatch.setattr(tfidf, "DIM", 3)
    vectors, expected = vectors_of(SHARED), oracle(SHARED)
    _, _, directions = np.linalg.svd(expected)
    strongest = directions[:3]
    strongest *= np.sign(strongest[range(3), np.abs(strongest).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(vectors, expected @ strongest.T, atol=1e-4)


def test_dimensions_without_any_spread_are_left_out():
    assert vectors_of(["red toy"] * 5 + ["blue toy"] * 5).shape == (10, 2)
    assert vectors_of(["red toy"]).shape == (1, 1)


def test_a_large_catalogue_has_384_dimensions(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{n}" for n in rng.integers(0, 600, size=12)) for _ in range(500)]
    assert vectors_of(texts).shape == (500, 384)


@pytest.mark.parametrize("text", ["unheardof", "B000123XYZ", "x", "★", "!!! ???", "日本語", "\ud800", "3"])
def test_a_text_without_any_known_word_still_has_a_vector(text):
    texts = [*SHARED, text] * 3
    texts[-1] += text  # its last form is unlike any other
    norms = np.linalg.norm(vectors_of(texts), axis=1)
    assert norms.min() > 0.1


def test_an_empty_text_has_a_zero_vector():
    assert not vectors_of([*SHARED, "  "])[-1].any()


def test_misspelt_words_and_model_numbers_are_near_similar_ones():
    texts = [*SHARED, "stroller", "strollr", "hinge kx-2041", "hinge kx-2042", "blanket wz-7733"]
    likeness = cosines(vectors_of(texts))
    assert likeness[6, 7] > 0.3
    assert likeness[6, 7] > likeness[6, :6].max()
    assert likeness[8, 9] > likeness[8, 10]


def test_slices_do_not_matter(monkeypatch):
    texts = [*SHARED, "unheardof"] * 3
    whole = vectors_of(texts)
    monkeypatch.setattr(tfidf, "ROWS", 4)
    np.testing.assert_array_equal(vectors_of(texts), whole)


def test_a_sample_suffices_to_give_every_item_a_vector(monkeypatch):
    monkeypatch.setattr(tfidf, "SAMPLE", 6)
    texts = [text for text in SHARED for _ in range(7)]
    vectors = vectors_of(texts)
    likeness = cosines(vectors)
    assert len(vectors) == 42
    for first in range(0, 42, 7):
        assert likeness[first:first + 7, first:first + 7].min() > 0.999


def test_rare_terms_are_dropped_while_counting(monkeypatch):
    texts = [f"common n{number}" for number in range(50)]
    terms = tfidf._frequent_terms(texts)
    monkeypatch.setattr(tfidf, "MAX_COUNTED", 5)
    assert tfidf._frequent_terms(texts) == terms == ["common"]


def test_only_the_most_frequent_terms_are_kept(monkeypatch):
    monkeypatch.setattr(tfidf, "MAX_TERMS", 2)
    assert tfidf._frequent_terms(["a b", "a b", "a c", "b", "c"]) == ["a", "b"]


@pytest.mark.slow
def test_the_hash_seed_does_not_matter():
    script = ("import hashlib, sys, numpy as np; from dataloader.embeddings.tfidf import tfidf_vectors; "
              "from tests.dataloader.embeddings.test_tfidf import SHARED; "
              "print(hashlib.sha256(tfidf_vectors(np.array([*SHARED, 'unheardof'], dtype=object))).hexdigest())")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not the seed of this process
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": seed})
    assert done.stdout.strip() == hashlib.sha256(vectors_of([*SHARED, "unheardof"])).hexdigest()
