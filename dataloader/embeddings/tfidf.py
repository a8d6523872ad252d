"""Text embeddings without a model: TF-IDF of words and word pairs, reduced by a truncated SVD. They are not cached."""

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

DIM = 384             # the number of dimensions of the default text model
MAX_TERMS = 50_000    # terms are the most frequent words and word pairs
MAX_COUNTED = 2_000_000  # words and word pairs whose counts are kept in memory
MIN_ITEMS = 2         # number of items that must have a term; a term of one item makes it similar to no other item
PIECES = 4096         # hash buckets for the three-letter pieces of all other words
BUCKET = "#{}"        # name of a bucket; it cannot be a term, because no term contains both '#' and a digit
SAMPLE = 100_000      # items from which terms and directions are learned; more items need memory and change little
ROWS = 16_384         # items transformed at once
SEED = 0              # seed of the randomized SVD
SMALLEST = 1e-6       # fraction of the largest singular value; directions below it contain only rounding errors
WORD = re.compile(r"\w+")


def tfidf_vectors(texts: np.ndarray) -> np.ndarray:
    """Return the vectors of all texts: float32 (N, D). D is DIM, or smaller if the texts vary in fewer directions."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = texts[np.linspace(0, len(texts) - 1, min(SAMPLE, len(texts))).astype(np.int64)]
    log.info("embed: learning TF-IDF from %d of %d items", len(sample), len(texts))
    terms = _frequent_terms(sample)
    vectorizer = TfidfVectorizer(analyzer=partial(_analyzed, frozenset(terms)), lowercase=False, sublinear_tf=True,
                                 dtype=np.float32, vocabulary=[*terms, *map(BUCKET.format, range(PIECES))])
    directions = _directions(vectorizer.fit_transform(sample))  # (D, terms)
    dim = len(directions)
    log.info("embed: %d terms, reduced to %d dimensions%s", len(terms), dim,
             "" if dim == DIM else f" (not {DIM}, because these texts vary in fewer directions)")
    vectors = np.empty((len(texts), dim), dtype=np.float32)
    with Progress("embed texts", len(texts), "texts") as progress:
        for start in range(0, len(texts), ROWS):
            part = texts[start:start + ROWS]
            vectors[start:start + len(part)] = vectorizer.transform(part) @ directions.T
            progress.update(len(part))
    return vectors


def _directions(weights) -> np.ndarray:
    """Return the leading right singular vectors of sparse weights: (N, terms) -> float32 (D, terms).

    The sign of each vector makes its largest entry positive.
    """
    from sklearn.utils.extmath import randomized_svd

    _, strengths, directions = randomized_svd(weights, min(DIM, *weights.shape), n_iter=5, random_state=SEED)
    directions = directions[strengths > SMALLEST * strengths[0]]
    largest = np.abs(directions).argmax(axis=1)
    return directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]


def _frequent_terms(texts: np.ndarray) -> list[str]:
    """Return the words and word pairs that at least MIN_ITEMS texts contain; the most frequent ones if too many."""
    counts, limit = Counter(), MAX_COUNTED
    for text in texts:
        counts.update(set(_terms(_words(text))))
        if len(counts) > limit:  # drop the terms that occurred only once so far
            counts = Counter({term: count for term, count in counts.items() if count > 1})
            limit = max(MAX_COUNTED, 2 * len(counts))
    frequent = sorted((-count, term) for term, count in counts.items() if count >= MIN_ITEMS)
    return sorted(term for _, term in frequent[:MAX_TERMS])


def _words(text: str) -> list[str]:
    """Split a text into words of letters and digits; a text without any is split into its symbols."""
    return WORD.findall(text.lower()) or text.split()


def _terms(words: list[str]) -> Iterator[str]:
    yield from words
    yield from map(" ".join, pairwise(words))


def _analyzed(known: frozenset[str], text: str) -> Iterator[str]:
    """Yield the `known` terms of a text, and the buckets of the three-letter pieces of its other words.

    The pieces make a misspelled word similar to the correct one, and a model number similar to related numbers. They
    also ensure that every text with a visible character has a term.
    """
    words = _words(text)
    for padded in (f"<{word}>" for word in words if word not in known):
        for start in range(len(padded) - 2):
            piece = padded[start:start + 3].encode("utf-8", "surrogatepass")
            yield BUCKET.format(zlib.crc32(piece) % PIECES)
    yield from filter(known.__contains__, _terms(words))
