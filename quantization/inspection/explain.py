"""What semantic IDs mean: the tree of their prefixes with sizes, typical words and example titles."""

import re
import unicodedata
from typing import NamedTuple

import numpy as np
from scipy import sparse

from quantization.export import letter, token
from quantization.inspection.keywords import Background, best, count, typical, word_table

# N items, L levels of the ID, G nodes (prefixes) at one depth, V words

MAX_EXAMPLES = 3
MAX_NODES = 30_000   # the first two depths are always described, deeper ones up to this many nodes
SHOWN = (10, 3)      # prefixes that the text shows at the first depth, and below each of those
LINE = 100           # columns

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

    def largest_nodes(self, depth: int, parent: int | None = None) -> np.ndarray:
        """The nodes at a depth, or only those below one node, by falling size."""
        found = self.depths[depth]
        nodes = np.arange(len(found.size)) if parent is None else np.flatnonzero(found.parent == parent)
        return nodes[np.argsort(-found.size[nodes], kind="stable")]


class PageInfo(NamedTuple):
    """What a reader must know beside the tree."""

    dataset: str
    quantizer: str              # with embedding suffix and tag
    raw_ids: list[str]
    names: list[str]            # titles, or raw ids where an item has none
    collisions: tuple[float, float]  # rates before and after disambiguation


def display_names(titles: np.ndarray, raw_ids: np.ndarray) -> list[str]:
    return [title if title and title.strip() else raw_id for title, raw_id in zip(titles, raw_ids, strict=True)]


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
    catalogue = Background(count(whole, has_word), np.array([len(codes)]))
    parent, around, described = whole, catalogue, 0
    for depth, column in enumerate(tree.columns):
        key = parent * sizes[column] + codes[:, column]
        _, first, node, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        described += int((size > 1).sum())
        found = Depth(node, size, first, parent[first], [[] for _ in size], [[i] for i in first.tolist()])
        if depth < 2 or described <= MAX_NODES:
            counts = count(node, has_word)
            chosen = typical(counts, size, around, found.parent)
            # What nothing sets apart from its siblings, or has none, is told from the rest of the catalogue.
            silent = np.bincount(chosen[0], minlength=len(size)) == 0
            others = typical(counts, size, catalogue, np.zeros_like(size), silent)
            chosen = np.concatenate([chosen, others], axis=1)
            found = found._replace(words=_listed(len(size), chosen[0], [words[w] for w in chosen[1]]),
                                   examples=_examples(found, has_word, chosen))
            around = Background(counts, size)
        tree.depths.append(found)
        parent = node
    return tree


def _examples(depth: Depth, has_word: sparse.csr_array, chosen: np.ndarray) -> list[list[int]]:
    """For each node the items whose titles have most of its typical words."""
    typical = sparse.csr_array((np.ones(chosen.shape[1], dtype=np.int32), (chosen[0], chosen[1])),
                               shape=(len(depth.size), has_word.shape[1]))
    score = np.asarray(typical[depth.node].multiply(has_word).sum(axis=1)).ravel()  # (N,)
    chosen_items = best(depth.node, score, np.arange(len(score)), MAX_EXAMPLES)
    return _listed(len(depth.size), depth.node[chosen_items], chosen_items.tolist())


def _listed(num_nodes: int, node: np.ndarray, values: list) -> list[list]:
    lists: list[list] = [[] for _ in range(num_nodes)]
    for at, value in zip(node.tolist(), values, strict=True):
        lists[at].append(value)
    return lists


def describe(tree: Tree, info: PageInfo) -> str:
    """The tree's largest prefixes as text, below a heading that says what is shown."""
    lines, order, num_items = _heading(tree, info), tree.largest_nodes(0), len(tree.codes)
    for node in order[:SHOWN[0]]:
        lines += ["", *_node_lines(tree, info, 0, node, num_items)]
        size = int(tree.depths[0].size[node])
        if len(tree.depths) > 1 and size > 1:
            below = tree.largest_nodes(1, node)
            for child in below[:SHOWN[1]]:
                lines += _node_lines(tree, info, 1, child, size)
            lines += _more(tree, 1, below[SHOWN[1]:], f"below {_id(tree, 0, node)}")
    lines += ["", *_more(tree, 0, order[SHOWN[0]:], "of one code")] * (len(order) > SHOWN[0])
    return "\n".join(lines + _equal_codes(tree, info))


def _heading(tree: Tree, info: PageInfo) -> list[str]:
    before, after = info.collisions
    return [f"What the semantic IDs of {info.dataset} mean ({info.quantizer})",
            f"{_counted(len(tree.codes), 'item')}; {tree.shape}; collision rate {before:.4f}, "
            f"after disambiguation {after:.4f}",
            "Per prefix: its items, their share of the items one level up, the words that set their titles apart",
            "from the others there, and the most typical titles."]


def _node_lines(tree: Tree, info: PageInfo, depth: int, node: int, out_of: int) -> list[str]:
    found, indent = tree.depths[depth], "    " * depth
    size, words = int(found.size[node]), ", ".join(found.words[node])
    head = f"{indent}{_id(tree, depth, node)}  {_counted(size, 'item')}, {size / out_of:.1%}"
    # Variants of one product often differ only where the line is cut off.
    titles = dict.fromkeys(cut(info.names[i], LINE - len(indent) - 6) for i in found.examples[node])
    return [head + (f":  {words}" if words else ""), *(f"{indent}    · {title}" for title in titles)]


def _more(tree: Tree, depth: int, left: np.ndarray, where: str) -> list[str]:
    if not len(left):
        return []
    items = int(tree.depths[depth].size[left].sum())
    return ["    " * depth + f"… and {len(left):,} more {'prefix' if len(left) == 1 else 'prefixes'} {where}, "
            f"{_counted(items, 'item')}"]


def _equal_codes(tree: Tree, info: PageInfo) -> list[str]:
    """The largest groups of items that no level with a meaning tells apart, as lists."""
    depth = len(tree.depths) - 1
    size, order = tree.depths[depth].size, tree.largest_nodes(depth)
    shared = order[size[order] > 1]
    if not len(shared):
        return ["", "No two items have equal codes."]
    lines = ["", f"Items of equal codes: {size[shared].sum():,} in {_counted(len(shared), 'group')}"]
    if tree.counter is not None:
        lines[-1] += f"; <{letter(tree.counter)}_…> only counts them, it has no meaning"
    for node in shared[:SHOWN[1]]:
        members = np.flatnonzero(tree.depths[depth].node == node)
        lines.append(f"    {_id(tree, depth, node)}  {_counted(len(members), 'item')}")
        lines += [f"        · {cut(info.names[i], LINE - 10)}" for i in members[:SHOWN[0]]]
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
