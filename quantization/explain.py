"""What semantic IDs mean: the tree of their prefixes with sizes, typical words and example titles."""

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from common.artifacts import DatasetFolder, load_codes, load_items, variant, write_text
from quantization.page import make_page

# N items, L levels of the ID, G nodes (prefixes) at one depth, V words

MAX_WORDS, MAX_EXAMPLES = 5, 3
MIN_SHARE = 0.1      # of a prefix's items have a word that is typical for it
MIN_SCORE = 1.0      # standard deviations of the log-odds
MAX_NODES = 30_000   # the first two depths are always described, deeper ones up to this many nodes
SHOWN = (10, 3)      # prefixes that the text shows at the first depth, and below each of those
LINE = 100           # columns

# Short on purpose: what all titles say falls out by the contrast, and longer lists hold words like "fire" and "mill".
# The last line is what shops count in.
STOP_WORDS = frozenset(re.findall(r"\w+", """
    an and are as at be by for from has in into is it its of on or our out per that the their this to up use used using
    via we with without you your und der die das für mit et le la les des de du pour avec el los con para amp nbsp quot
    inch inches pack packs pc pcs piece pieces"""))
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Everything that is no separator, so that scripts which write vowels as combining marks stay whole.
LETTERS = ("[^\\s\\x00-/:-@\\[-`{-\\xbf\xd7\xf7\u2000-\u2bff\u3000-\u303f\ud800-\udfff\ufe0f\U0001f000-\U0001faff"
           + CJK + "]")
WORD = re.compile(rf"[{CJK}]+|(?:(?:\d+[.,])+|\b[^\W\d_]-)?{LETTERS}+")  # 1.75mm and t-shirt are one word
# What would break a line, drive the terminal or reverse the reading direction.
UNPRINTABLE = re.compile("[\\s\\x00-\\x1f\\x7f-\\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


class Depth(NamedTuple):
    """All prefixes of one length, in the order of their codes."""

    node: np.ndarray            # (N,) each item's prefix
    size: np.ndarray            # (G,) items
    first: np.ndarray           # (G,) the first item
    parent: np.ndarray          # (G,) index among the prefixes that are one code shorter
    words: list[list[str]]      # G lists, the most typical first; empty where this depth is not described
    examples: list[list[int]]   # G lists of items, the most typical first


class Tree(NamedTuple):
    codes: np.ndarray      # (N, L), the disambiguation level included
    sizes: list[int]       # of the L codebooks
    counter: int | None    # the level that only counts items of equal codes; no depth of the tree
    depths: list[Depth]

    @property
    def columns(self) -> list[int]:
        """The levels that carry meaning: depth d of the tree is column `columns[d]` of the codes."""
        return [level for level in range(self.codes.shape[1]) if level != self.counter]

    @property
    def shape(self) -> str:
        """`3 levels × 256 codes`, or every codebook's size where they differ."""
        sizes = [self.sizes[column] for column in self.columns]
        return _counted(len(sizes), "level") + (
            f" × {_counted(sizes[0], 'code')}" if len(set(sizes)) == 1 else f" of {', '.join(map(str, sizes))} codes")

    def prefix(self, depth: int, node: int) -> list[int]:
        return self.codes[self.depths[depth].first[node], self.columns[:depth + 1]].tolist()

    def largest(self, depth: int, parent: int | None = None) -> np.ndarray:
        """The nodes at a depth, or only those below one node, by falling size."""
        found = self.depths[depth]
        nodes = np.arange(len(found.size)) if parent is None else np.flatnonzero(found.parent == parent)
        return nodes[np.argsort(-found.size[nodes], kind="stable")]


class About(NamedTuple):
    """What a reader must know beside the tree."""

    dataset: str
    quantizer: str              # with embedding suffix and tag
    raw_ids: list[str]
    names: list[str]            # titles, or raw ids where an item has none
    collisions: tuple[float, float]  # rates before and after disambiguation


def explain(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, page: Path) -> str:
    """The text that shows what the codes mean; the same, to click through, is written to `page`."""
    codes, meta = load_codes(folder, quantizer, suffix, tag, distinct=False)
    items = load_items(folder)
    tree = build_tree(codes, items["title"], items["text"], meta["codebook_sizes"], meta["disambiguation_level"])
    about = About(folder.name, variant(quantizer, suffix, tag), items["raw_id"].tolist(),
                  display_names(items["title"], items["raw_id"]),
                  (meta["collision_rate_before"], meta["collision_rate_after"]))
    write_text(page, make_page(tree, about))
    return f"{describe(tree, about)}\n\nTo click through it and to search: {page}"


def display_names(titles: np.ndarray, raw_ids: np.ndarray) -> list[str]:
    return [title if title and title.strip() else raw_id for title, raw_id in zip(titles, raw_ids, strict=True)]


def token(level: int, code: int) -> str:
    """`<a_12>`: the letter names the level, as in the LC-Rec family."""
    return f"<{letter(level)}_{code}>"


def letter(level: int) -> str:
    return (letter(level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)


def build_tree(codes: np.ndarray, titles: np.ndarray, texts: np.ndarray, sizes: list[int],
               disambiguation_level: int | None) -> Tree:
    """The prefixes of all items' codes, (N, L), each with what its titles have in common.

    An item without a title speaks through the beginning of its text.
    """
    spoken = [title if title and title.strip() else (text or "")[:200]
              for title, text in zip(titles, texts, strict=True)]
    has_word, words = word_table(spoken)
    tree = Tree(codes, list(sizes), disambiguation_level, [])
    whole = np.zeros(len(codes), dtype=np.int64)
    catalogue = Reference(_count(whole, has_word), np.array([len(codes)]))
    parent, around, described = whole, catalogue, 0
    for depth, column in enumerate(tree.columns):
        key = parent * sizes[column] + codes[:, column]
        _, first, node, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        described += int((size > 1).sum())
        found = Depth(node, size, first, parent[first], [[] for _ in size], [[i] for i in first.tolist()])
        if depth < 2 or described <= MAX_NODES:
            counts = _count(node, has_word)
            chosen = _typical(counts, size, around, found.parent)
            # What nothing sets apart from its siblings, or has none, is told from the rest of the catalogue.
            silent = np.bincount(chosen[0], minlength=len(size)) == 0
            others = _typical(counts, size, catalogue, np.zeros_like(size), silent)
            chosen = np.concatenate([chosen, others], axis=1)
            found = found._replace(words=_listed(len(size), chosen[0], [words[w] for w in chosen[1]]),
                                   examples=_examples(found, has_word, chosen))
            around = Reference(counts, size)
        tree.depths.append(found)
        parent = node
    return tree


def word_table(texts: list[str]) -> tuple[sparse.csr_array, np.ndarray]:
    """Which item has which word, 0/1 (N, V), and the words (V,) in alphabetical order; each is in two items or more."""
    try:
        vectorizer = CountVectorizer(analyzer=words_of, binary=True, dtype=np.int32)
        has_word = sparse.csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # scikit-learn refuses texts without any word
        return sparse.csr_array((len(texts), 0), dtype=np.int32), np.array([], dtype=object)
    words = vectorizer.get_feature_names_out()
    frequency = np.asarray(has_word.sum(axis=0)).ravel()
    index = {word: i for i, word in enumerate(words)}
    stem = np.array([index.get(_singular(word, index), i) for i, word in enumerate(words)])
    fold = sparse.csr_array((np.ones_like(stem, dtype=np.int32), (np.arange(len(stem)), stem)), shape=(len(stem),) * 2)
    has_word = sparse.csr_array(has_word @ fold)
    has_word.data[:] = 1
    # A folded word is shown in the form that the titles use most.
    by_frequency = np.lexsort((-frequency, stem))
    stems, at = np.unique(stem[by_frequency], return_index=True)
    words[stems] = words[by_frequency[at]]
    kept = np.flatnonzero(np.asarray(has_word.sum(axis=0)).ravel() >= 2)
    return sparse.csr_array(has_word[:, kept]), words[kept]


def words_of(text: str) -> list[str]:
    """Lower-case words with a letter in them; pairs of neighbouring characters where a script has no spaces."""
    words = []
    for found in WORD.findall(unicodedata.normalize("NFKC", text).lower()):
        if re.match(f"[{CJK}]", found):
            words += [found[i:i + 2] for i in range(len(found) - 1)]
        elif len(found) > 1 and found not in STOP_WORDS and any(map(str.isalpha, found)):
            words.append(found)
    return words


def _singular(word: str, known: dict[str, int]) -> str:
    """The singular of an English plural if that is a word of these titles, else the word."""
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    candidates = [word[:-1]] + ([word[:-2]] if word.endswith("es") else [])
    candidates += [word[:-3] + "y"] if word.endswith("ies") else []
    return next((candidate for candidate in candidates if candidate in known), word)


class Reference(NamedTuple):
    """What nodes are compared with."""

    counts: sparse.csr_array  # (G, V) items with a word
    size: np.ndarray          # (G,) items


def _count(node: np.ndarray, has_word: sparse.csr_array) -> sparse.csr_array:
    """How many items of each node have each word: (G, V)."""
    members = sparse.csr_array((np.ones(len(node), dtype=np.int32), (node, np.arange(len(node)))))
    counts = sparse.csr_array(members @ has_word)
    counts.sort_indices()
    return counts


def _typical(counts: sparse.csr_array, size: np.ndarray, around: Reference, parent: np.ndarray,
             asked: np.ndarray | None = None) -> np.ndarray:
    """(2, M) pairs of node and word: for each (asked) node its most typical words, the best first.

    A word's score is the z-score of its log-odds inside the node against the rest of the node's
    parent in `around` (Monroe et al. 2008, with document frequencies and a flat prior of one half).
    """
    table = counts.tocoo()
    kept = (table.data >= 2) & (table.data >= MIN_SHARE * size[table.row])
    kept &= True if asked is None else asked[table.row]
    node, word, inside = table.row[kept].astype(np.int64), table.col[kept], table.data[kept].astype(np.int64)
    whole, total = _look_up(around.counts, parent[node], word), around.size[parent[node]]
    cells = np.array([inside, size[node] - inside, whole - inside, total - size[node] - whole + inside]) + 0.5
    log_odds = np.log(cells[0] / cells[1]) - np.log(cells[2] / cells[3])
    score = log_odds / np.sqrt((1 / cells).sum(axis=0))
    # The smoothing favours the small side; the plain shares must agree.
    kept = (score >= MIN_SCORE) & (inside * total > whole * size[node])
    best = _best(node[kept], score[kept], word[kept], MAX_WORDS)
    return np.array([node[kept][best], word[kept][best]])


def _look_up(counts: sparse.csr_array, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """counts[row, column] for pairs that are all stored there."""
    table = counts.tocoo()
    keys = table.row.astype(np.int64) * counts.shape[1] + table.col
    return table.data[np.searchsorted(keys, row * counts.shape[1] + column)].astype(np.int64)


def _best(node: np.ndarray, score: np.ndarray, tie: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the `limit` highest scores of every node, node by node; ties go to the lowest `tie`."""
    order = np.lexsort((tie, -score, node))
    _, start, count = np.unique(node[order], return_index=True, return_counts=True)
    return order[np.arange(len(order)) - np.repeat(start, count) < limit]


def _examples(depth: Depth, has_word: sparse.csr_array, chosen: np.ndarray) -> list[list[int]]:
    """For each node the items whose titles have most of its typical words."""
    typical = sparse.csr_array((np.ones(chosen.shape[1], dtype=np.int32), (chosen[0], chosen[1])),
                               shape=(len(depth.size), has_word.shape[1]))
    score = np.asarray(typical[depth.node].multiply(has_word).sum(axis=1)).ravel()  # (N,)
    best = _best(depth.node, score, np.arange(len(score)), MAX_EXAMPLES)
    return _listed(len(depth.size), depth.node[best], best.tolist())


def _listed(num_nodes: int, node: np.ndarray, values: list) -> list[list]:
    lists = [[] for _ in range(num_nodes)]
    for at, value in zip(node.tolist(), values, strict=True):
        lists[at].append(value)
    return lists


def describe(tree: Tree, about: About) -> str:
    """The tree's largest prefixes as text, below a heading that says what is shown."""
    lines, order, num_items = _heading(tree, about), tree.largest(0), len(tree.codes)
    for node in order[:SHOWN[0]]:
        lines += ["", *_node_lines(tree, about, 0, node, num_items)]
        size = int(tree.depths[0].size[node])
        if len(tree.depths) > 1 and size > 1:
            below = tree.largest(1, node)
            for child in below[:SHOWN[1]]:
                lines += _node_lines(tree, about, 1, child, size)
            lines += _more(tree, 1, below[SHOWN[1]:], f"below {_id(tree, 0, node)}")
    lines += ["", *_more(tree, 0, order[SHOWN[0]:], "of one code")] * (len(order) > SHOWN[0])
    return "\n".join(lines + _equal_codes(tree, about))


def _heading(tree: Tree, about: About) -> list[str]:
    before, after = about.collisions
    return [f"What the semantic IDs of {about.dataset} mean ({about.quantizer})",
            f"{_counted(len(tree.codes), 'item')}; {tree.shape}; collision rate {before:.4f}, "
            f"after disambiguation {after:.4f}",
            "Per prefix: its items, their share of the items one level up, the words that set their titles apart",
            "from the others there, and the most typical titles."]


def _node_lines(tree: Tree, about: About, depth: int, node: int, out_of: int) -> list[str]:
    found, indent = tree.depths[depth], "    " * depth
    size, words = int(found.size[node]), ", ".join(found.words[node])
    head = f"{indent}{_id(tree, depth, node)}  {_counted(size, 'item')}, {size / out_of:.1%}"
    # Variants of one product often differ only where the line is cut off.
    titles = dict.fromkeys(cut(about.names[i], LINE - len(indent) - 6) for i in found.examples[node])
    return [head + (f":  {words}" if words else ""), *(f"{indent}    · {title}" for title in titles)]


def _more(tree: Tree, depth: int, left: np.ndarray, where: str) -> list[str]:
    if not len(left):
        return []
    items = int(tree.depths[depth].size[left].sum())
    return ["    " * depth + f"… and {len(left):,} more {'prefix' if len(left) == 1 else 'prefixes'} {where}, "
            f"{_counted(items, 'item')}"]


def _equal_codes(tree: Tree, about: About) -> list[str]:
    """The largest groups of items that no level with a meaning tells apart, as lists."""
    depth = len(tree.depths) - 1
    size, order = tree.depths[depth].size, tree.largest(depth)
    shared = order[size[order] > 1]
    if not len(shared):
        return ["", "No two items have equal codes."]
    lines = ["", f"Items of equal codes: {size[shared].sum():,} in {_counted(len(shared), 'group')}"]
    if tree.counter is not None:
        lines[-1] += f"; <{letter(tree.counter)}_…> only counts them, it has no meaning"
    for node in shared[:SHOWN[1]]:
        members = np.flatnonzero(tree.depths[depth].node == node)
        lines.append(f"    {_id(tree, depth, node)}  {_counted(len(members), 'item')}")
        lines += [f"        · {cut(about.names[i], LINE - 10)}" for i in members[:SHOWN[0]]]
        lines += [f"        … and {len(members) - SHOWN[0]:,} more"] * (len(members) > SHOWN[0])
    return lines


def _id(tree: Tree, depth: int, node: int) -> str:
    return "".join(map(token, tree.columns, tree.prefix(depth, node)))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def cut(text: str, columns: int) -> str:
    """The text on one line of at most `columns`, where a wide character takes two."""
    text = UNPRINTABLE.sub(" ", text).encode("utf-8", "replace").decode().strip()
    widths = np.cumsum([1 + (unicodedata.east_asian_width(c) in "WF") for c in text[:columns + 1]])
    if not text or widths[-1] <= columns:
        return text
    return text[:int(np.searchsorted(widths, columns - 1, side="right"))].rstrip() + "…"
