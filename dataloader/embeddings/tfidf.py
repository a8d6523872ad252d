"""Vectors without a model: TF-IDF of words and pairs of words, reduced by a truncated SVD; they are not cached."""

import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from common.progress import Progress

log = logging.getLogger(__name__)

DIM = 384             # as many as the default text model has
MAX_TERMS = 50_000    # the most frequent words and pairs
MAX_COUNTED = 2_000_000  # words and pairs that are counted at once
MIN_ITEMS = 2         # that have a term; what only one item has likens it to none
PIECES = 4096         # buckets for the pieces of all other words
BUCKET = "#{}"        # their names, like no word, nor a sign that stands for one
SAMPLE = 100_000      # items from which terms and directions are learned; more would need memory, and add little
ROWS = 16_384         # items that are transformed at once
SEED = 0              # of the SVD, which draws its first directions at random
SMALLEST = 1e-6       # of the largest singular value: directions below hold rounding errors
WORD = re.compile(r"\w+")


def tfidf_vectors(texts: np.ndarray) -> np.ndarray:
    """float32 (N, D) of the items' texts; D is DIM, or less where the texts differ in fewer directions."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = texts[np.linspace(0, len(texts) - 1, min(SAMPLE, len(texts))).astype(np.int64)]
    log.info("embed: learning TF-IDF from %d of %d items", len(sample), len(texts))
    terms = _frequent_terms(sample)
    vectorizer = TfidfVectorizer(analyzer=partial(_analyzed, frozenset(terms)), lowercase=False, sublinear_tf=True,
                                 dtype=np.float32, vocabulary=[*terms, *map(BUCKET.format, range(PIECES))])
    directions = _directions(vectorizer.fit_transform(sample))  # (D, terms)
    dim = len(directions)
    log.info("embed: %d terms, reduced to %d dimensions%s", len(terms), dim,
             "" if dim == DIM else f" (not {DIM}: these texts differ in no more)")
    vectors = np.empty((len(texts), dim), dtype=np.float32)
    with Progress("embed texts", len(texts), "texts") as progress:
        for start in range(0, len(texts), ROWS):
            part = texts[start:start + ROWS]
            vectors[start:start + len(part)] = vectorizer.transform(part) @ directions.T
            progress.update(len(part))
    return vectors


def _directions(weights) -> np.ndarray:
    """float32 (D, terms): the strongest right singular vectors of sparse (N, terms), the largest entry positive."""
    from sklearn.utils.extmath import randomized_svd

    _, strengths, directions = randomized_svd(weights, min(DIM, *weights.shape), n_iter=5, random_state=SEED)
    directions = directions[strengths > SMALLEST * strengths[0]]
    largest = np.abs(directions).argmax(axis=1)
    return directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]


def _frequent_terms(texts: np.ndarray) -> list[str]:
    """Words and pairs that MIN_ITEMS items have, the most frequent ones if there are too many."""
    counts, limit = Counter(), MAX_COUNTED
    for text in texts:
        counts.update(set(_terms(_words(text))))
        if len(counts) > limit:  # forget what was seen once so far
            counts = Counter({term: count for term, count in counts.items() if count > 1})
            limit = max(MAX_COUNTED, 2 * len(counts))
    frequent = sorted((-count, term) for term, count in counts.items() if count >= MIN_ITEMS)
    return sorted(term for _, term in frequent[:MAX_TERMS])


def _words(text: str) -> list[str]:
    """Letters and digits; of a text that has none, its signs."""
    return WORD.findall(text.lower()) or text.split()


def _terms(words: list[str]) -> Iterator[str]:
    yield from words
    yield from map(" ".join, pairwise(words))


def _analyzed(known: frozenset[str], text: str) -> Iterator[str]:
    """A text's `known` terms, and the three-letter pieces of its other words, each as its bucket.

    So a misspelt word is like the right one, a model number like its neighbours, and no text that has a visible sign
    is without any term.
    """
    words = _words(text)
    for padded in (f"<{word}>" for word in words if word not in known):
        for start in range(len(padded) - 2):
            piece = padded[start:start + 3].encode("utf-8", "surrogatepass")
            yield BUCKET.format(zlib.crc32(piece) % PIECES)
    yield from filter(known.__contains__, _terms(words))
