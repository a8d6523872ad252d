"""Text embeddings without a model: TF-IDF of words and word pairs, reduced by a truncated SVD.

These vectors are not cached.
"""

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
MAX_TERMS = 50_000    # maximum number of terms; the terms are the most frequent words and word pairs
MAX_COUNTED = 2_000_000  # words and word pairs whose counts are kept in memory
MIN_ITEMS = 2         # minimum number of items with a term; a term of a single item cannot make two items similar
PIECES = 4096         # number of hash buckets for the three-letter pieces of words that are not terms
BUCKET = "#{}"        # name of a bucket; the name cannot be a term, because no term contains both '#' and a digit
SAMPLE = 100_000      # items from which terms and directions are learned; more items need memory but change little
ROWS = 16_384         # items transformed at once
SEED = 0              # seed of the randomized SVD
# Directions with a singular value below this fraction of the largest one contain only rounding errors.
SMALLEST = 1e-6
WORD = re.compile(r"\w+")


def tfidf_vectors(texts: np.ndarray) -> np.ndarray:
    """Return the vectors of all texts: float32 (len(texts), D).

    The number of dimensions D is DIM, or less if the texts vary in fewer directions.
    """
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
    """Return the leading right singular vectors of a sparse matrix: (texts, terms) -> float32 (D, terms).

    The sign of a vector is arbitrary, so its entry with the largest absolute value is made positive.
    """
    from sklearn.utils.extmath import randomized_svd

    _, strengths, directions = randomized_svd(weights, min(DIM, *weights.shape), n_iter=5, random_state=SEED)
    directions = directions[strengths > SMALLEST * strengths[0]]
    largest = np.abs(directions).argmax(axis=1)
    return directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]


def _frequent_terms(texts: np.ndarray) -> list[str]:
    """Return the MAX_TERMS most frequent words and word pairs that occur in at least MIN_ITEMS texts."""
    counts, limit = Counter(), MAX_COUNTED
    for text in texts:
        counts.update(set(_terms(_words(text))))
        if len(counts) > limit:  # drop the terms that have occurred in only one text so far
            counts = Counter({term: count for term, count in counts.items() if count > 1})
            limit = max(MAX_COUNTED, 2 * len(counts))
    frequent = sorted((-count, term) for term, count in counts.items() if count >= MIN_ITEMS)
    return sorted(term for _, term in frequent[:MAX_TERMS])


def _words(text: str) -> list[str]:
    """Split a text into words of letters and digits. If it has no such words, split the text at white space."""
    return WORD.findall(text.lower()) or text.split()


def _terms(words: list[str]) -> Iterator[str]:
    yield from words
    yield from map(" ".join, pairwise(words))


def _analyzed(known: frozenset[str], text: str) -> Iterator[str]:
    """Yield the features of a text: its known terms, and the hash buckets of all three-letter pieces of unknown words.

    The pieces make a misspelled word similar to the correct word. They also give at least one feature to every text
    with a visible character.
    """
    words = _words(text)
    for padded in (f"<{word}>" for word in words if word not in known):
        for start in range(len(padded) - 2):
            piece = padded[start:start + 3].encode("utf-8", "surrogatepass")
            yield BUCKET.format(zlib.crc32(piece) % PIECES)
    yield from filter(known.__contains__, _terms(words))
