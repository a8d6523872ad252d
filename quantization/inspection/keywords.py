"""Split titles into words, and find the words that are typical of a prefix of semantic IDs."""

import re
import unicodedata
from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

# N items, G nodes (prefixes) at one depth, V words

MAX_WORDS = 5        # maximum number of typical words of a prefix
MIN_SHARE = 0.1      # a typical word occurs in at least this share of the prefix's items
MIN_SCORE = 1.0      # minimum z-score of a typical word

# This list is short on purpose. Words that occur in all titles are never typical, so they need not be in the list.
# Longer lists would remove useful words such as "fire" and "mill". The last line contains units of goods.
STOP_WORDS = frozenset(re.findall(r"\w+", """
    an and are as at be by for from has in into is it its of on or our out per that the their this to up use used using
    via we with without you your und der die das für mit et le la les des de du pour avec el los con para amp nbsp quot
    inch inches pack packs pc pcs piece pieces"""))
# Characters of scripts that have no spaces between words.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# All characters except separators. (Letters only would split words in scripts that write vowels as combining marks.)
LETTERS = ("[^\\s\\x00-/:-@\\[-`{-\\xbf\xd7\xf7\u2000-\u2bff\u3000-\u303f\ud800-\udfff\ufe0f\U0001f000-\U0001faff"
           + CJK + "]")
WORD = re.compile(rf"[{CJK}]+|(?:(?:\d+[.,])+|\b[^\W\d_]-)?{LETTERS}+")  # a word, such as 1.75mm or t-shirt


def word_table(texts: list[str]) -> tuple[sparse.csr_array, np.ndarray]:
    """Find the words that occur in at least two texts.

    texts: one text per item
    Returns a table (N, V) and the words (V,). An entry of the table is 1 if the text of the item contains the word,
    else 0.
    """
    try:
        vectorizer = CountVectorizer(analyzer=words_of, binary=True, dtype=np.int32)
        has_word = sparse.csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # scikit-learn raises ValueError if no text contains a word
        return sparse.csr_array((len(texts), 0), dtype=np.int32), np.array([], dtype=object)
    words = vectorizer.get_feature_names_out()
    frequency = np.asarray(has_word.sum(axis=0)).ravel()
    index = {word: i for i, word in enumerate(words)}
    stem = np.array([index.get(_singular(word, index), i) for i, word in enumerate(words)])
    fold = sparse.csr_array((np.ones_like(stem, dtype=np.int32), (np.arange(len(stem)), stem)), shape=(len(stem),) * 2)
    has_word = sparse.csr_array(has_word @ fold)
    has_word.data[:] = 1
    # Singular and plural are one word, shown in the more frequent form.
    by_frequency = np.lexsort((-frequency, stem))
    stems, at = np.unique(stem[by_frequency], return_index=True)
    words[stems] = words[by_frequency[at]]
    kept = np.flatnonzero(np.asarray(has_word.sum(axis=0)).ravel() >= 2)
    return sparse.csr_array(has_word[:, kept]), words[kept]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without stop words.

    A word has at least two characters, and at least one letter. In Chinese and Japanese, every pair of adjacent
    characters is a word.
    """
    words = []
    for found in WORD.findall(unicodedata.normalize("NFKC", text).lower()):
        if re.match(f"[{CJK}]", found):
            words += [found[i:i + 2] for i in range(len(found) - 1)]
        elif len(found) > 1 and found not in STOP_WORDS and any(map(str.isalpha, found)):
            words.append(found)
    return words


def _singular(word: str, known: dict[str, int]) -> str:
    """Return the singular of an English plural if `known` contains it, else the word itself."""
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    candidates = [word[:-1]] + ([word[:-2]] if word.endswith("es") else [])
    candidates += [word[:-3] + "y"] if word.endswith("ies") else []
    return next((candidate for candidate in candidates if candidate in known), word)


class Background(NamedTuple):
    """Word counts to compare the nodes with: one row per parent node, or one row for all items."""

    counts: sparse.csr_array  # (rows, V) number of items with each word
    size: np.ndarray          # (rows,) number of items


def count(node: np.ndarray, has_word: sparse.csr_array) -> sparse.csr_array:
    """Return how many items of each node contain each word: (G, V) for G nodes.

    node: the node of each item, (N,)
    has_word: 1 if the item contains the word, else 0, (N, V)
    """
    members = sparse.csr_array((np.ones(len(node), dtype=np.int32), (node, np.arange(len(node)))))
    counts = sparse.csr_array(members @ has_word)
    counts.sort_indices()
    return counts


def typical(counts: sparse.csr_array, size: np.ndarray, background: Background, parent: np.ndarray,
            selected: np.ndarray | None = None) -> np.ndarray:
    """Return up to `MAX_WORDS` typical words of each node, the most typical first.

    counts: number of items with each word in each node, (G, V)
    size: number of items of each node, (G,)
    parent: the row of `background` for each node, (G,)
    selected: True for each node whose words are returned, (G,) bool; None: all nodes
    Returns pairs of a node and a word, (2, number of pairs)

    The score of a word compares its log-odds inside the node with its log-odds in the rest of the background row. The
    score is the z-score of the difference (Monroe et al. 2008, with document frequencies and a flat prior of 0.5).
    """
    table = counts.tocoo()
    kept = (table.data >= 2) & (table.data >= MIN_SHARE * size[table.row])
    kept &= True if selected is None else selected[table.row]
    node, word, inside = table.row[kept].astype(np.int64), table.col[kept], table.data[kept].astype(np.int64)
    whole, total = _look_up(background.counts, parent[node], word), background.size[parent[node]]
    cells = np.array([inside, size[node] - inside, whole - inside, total - size[node] - whole + inside]) + 0.5
    log_odds = np.log(cells[0] / cells[1]) - np.log(cells[2] / cells[3])
    score = log_odds / np.sqrt((1 / cells).sum(axis=0))
    # The prior favors small nodes. Therefore, the word must also be more frequent in the node than in the background.
    kept = (score >= MIN_SCORE) & (inside * total > whole * size[node])
    chosen = best(node[kept], score[kept], word[kept], MAX_WORDS)
    return np.array([node[kept][chosen], word[kept][chosen]])


def _look_up(counts: sparse.csr_array, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return `counts[row, column]` for arrays of rows and columns. These entries must not be 0."""
    table = counts.tocoo()
    keys = table.row.astype(np.int64) * counts.shape[1] + table.col
    return table.data[np.searchsorted(keys, row * counts.shape[1] + column)].astype(np.int64)


def best(node: np.ndarray, score: np.ndarray, tie: np.ndarray, limit: int) -> np.ndarray:
    """For each node, return the indices of the entries with the `limit` highest scores.

    `node`, `score` and `tie` have one value per entry. The result is ordered by node, then by score, the highest first.
    Entries with equal scores are ordered by `tie`.
    """
    order = np.lexsort((tie, -score, node))
    _, start, count = np.unique(node[order], return_index=True, return_counts=True)
    return order[np.arange(len(order)) - np.repeat(start, count) < limit]
