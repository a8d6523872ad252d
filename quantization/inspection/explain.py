"""Show the semantic IDs as a tree of prefixes. Each prefix has a size, typical words and example titles."""

import re
import unicodedata
from typing import NamedTuple

import numpy as np
from scipy import sparse

from quantization.export import letter, token
from quantization.inspection.keywords import Background, best, count, typical, word_table

# N items, L levels of the ID, G nodes (prefixes) of one depth, V words

MAX_EXAMPLES = 3     # examples of a prefix
# The first two depths always have words and examples. A deeper depth has them only if the tree down to this depth has
# at most MAX_NODES nodes. Nodes with a single item are not counted.
MAX_NODES = 30_000
SHOWN = (10, 3)      # number of prefixes in the text: of length 1, and of length 2 below each of them
LINE = 100           # maximum width of a line in the text, in columns

# Characters that would break a line, control the terminal or reverse the reading direction.
UNPRINTABLE = re.compile("[\\s\\x00-\\x1f\\x7f-\\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


class Depth(NamedTuple):
    """All prefixes (nodes) of one length, ordered by their codes."""

    node: np.ndarray            # (N,) the node of each item
    size: np.ndarray            # (G,) the number of items of each node
    first: np.ndarray           # (G,) the first item of each node
    parent: np.ndarray          # (G,) the parent of each node: its index at the previous depth
    words: list[list[str]]      # the words of each node, the most typical first; none if MAX_NODES is exceeded
    examples: list[list[int]]   # the items of each node, the most typical first; one item if MAX_NODES is exceeded


class Tree(NamedTuple):
    """The tree of all prefixes of the semantic IDs."""

    codes: np.ndarray      # (N, L), including the disambiguation level
    sizes: list[int]       # sizes of the L codebooks
    counter: int | None    # the disambiguation level (None: there is none); it is not a depth of the tree
    depths: list[Depth]

    @property
    def columns(self) -> list[int]:
        """The column of `codes` for each depth of the tree. The disambiguation level is not part of the tree."""
        return [level for level in range(self.codes.shape[1]) if level != self.counter]

    @property
    def shape(self) -> str:
        """The codebook sizes as text, such as `3 levels × 256 codes` or `2 levels of 64, 256 codes`."""
        sizes = [self.sizes[column] for column in self.columns]
        return _plural(len(sizes), "level") + (
            f" × {_plural(sizes[0], 'code')}" if len(set(sizes)) == 1 else f" of {', '.join(map(str, sizes))} codes")

    def prefix(self, depth: int, node: int) -> list[int]:
        return self.codes[self.depths[depth].first[node], self.columns[:depth + 1]].tolist()

    def largest_nodes(self, depth: int, parent: int | None = None) -> np.ndarray:
        """Return the nodes of one depth, or only the children of `parent`, the largest first."""
        found = self.depths[depth]
        nodes = np.arange(len(found.size)) if parent is None else np.flatnonzero(found.parent == parent)
        return nodes[np.argsort(-found.size[nodes], kind="stable")]


class PageInfo(NamedTuple):
    """Data about the items and the quantizer, to show together with the tree."""

    dataset: str
    quantizer: str              # name of the quantizer, with embedding suffix and tag
    raw_ids: list[str]
    names: list[str]            # titles, or raw ids of items without a title
    collisions: tuple[float, float]  # collision rates before and after disambiguation


def display_names(titles: np.ndarray, raw_ids: np.ndarray) -> list[str]:
    return [title if title and title.strip() else raw_id for title, raw_id in zip(titles, raw_ids, strict=True)]


def build_tree(codes: np.ndarray, titles: np.ndarray, texts: np.ndarray, sizes: list[int],
               disambiguation_level: int | None) -> Tree:
    """Build the prefix tree of codes (N, L), with typical words and examples for each prefix.

    titles, texts: the title and the text of each item, (N,); the words come from the title, or from the text if there
        is no title
    sizes: the L codebook sizes
    """
    descriptions = [title if title and title.strip() else (text or "")[:200]
                    for title, text in zip(titles, texts, strict=True)]
    has_word, words = word_table(descriptions)
    tree = Tree(codes, list(sizes), disambiguation_level, [])
    root = np.zeros(len(codes), dtype=np.int64)
    all_items = Background(count(root, has_word), np.array([len(codes)]))
    parent, background, num_described = root, all_items, 0
    for depth, column in enumerate(tree.columns):
        key = parent * sizes[column] + codes[:, column]
        _, first, node, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        num_described += int((size > 1).sum())
        found = Depth(node, size, first, parent[first], [[] for _ in size], [[i] for i in first.tolist()])
        if depth < 2 or num_described <= MAX_NODES:
            counts = count(node, has_word)
            chosen = typical(counts, size, background, found.parent)
            # A node may have no siblings, or no typical words compared with its siblings. Compare it with all items.
            without_words = np.bincount(chosen[0], minlength=len(size)) == 0
            more = typical(counts, size, all_items, np.zeros_like(size), without_words)
            chosen = np.concatenate([chosen, more], axis=1)
            found = found._replace(words=_group_by_node(len(size), chosen[0], [words[w] for w in chosen[1]]),
                                   examples=_examples(found, has_word, chosen))
            background = Background(counts, size)
        tree.depths.append(found)
        parent = node
    return tree


def _examples(depth: Depth, has_word: sparse.csr_array, chosen: np.ndarray) -> list[list[int]]:
    """For each node, return the items whose titles contain the largest number of the node's typical words."""
    typical = sparse.csr_array((np.ones(chosen.shape[1], dtype=np.int32), (chosen[0], chosen[1])),
                               shape=(len(depth.size), has_word.shape[1]))
    score = np.asarray(typical[depth.node].multiply(has_word).sum(axis=1)).ravel()  # (N,)
    chosen_items = best(depth.node, score, np.arange(len(score)), MAX_EXAMPLES)
    return _group_by_node(len(depth.size), depth.node[chosen_items], chosen_items.tolist())


def _group_by_node(num_nodes: int, node: np.ndarray, values: list) -> list[list]:
    lists: list[list] = [[] for _ in range(num_nodes)]
    for index, value in zip(node.tolist(), values, strict=True):
        lists[index].append(value)
    return lists


def describe(tree: Tree, info: PageInfo) -> str:
    """Return a text that shows the prefixes with the most items, their typical words and example titles."""
    lines, order, num_items = _heading(tree, info), tree.largest_nodes(0), len(tree.codes)
    for node in order[:SHOWN[0]]:
        lines += ["", *_node_lines(tree, info, 0, node, num_items)]
        size = int(tree.depths[0].size[node])
        if len(tree.depths) > 1 and size > 1:
            below = tree.largest_nodes(1, node)
            for child in below[:SHOWN[1]]:
                lines += _node_lines(tree, info, 1, child, size)
            lines += _more(tree, 1, below[SHOWN[1]:], f"below {_prefix_text(tree, 0, node)}")
    lines += ["", *_more(tree, 0, order[SHOWN[0]:], "at the first level")] * (len(order) > SHOWN[0])
    return "\n".join(lines + _equal_codes(tree, info))


def _heading(tree: Tree, info: PageInfo) -> list[str]:
    before, after = info.collisions
    return [f"What the semantic IDs of {info.dataset} mean ({info.quantizer})",
            f"{_plural(len(tree.codes), 'item')}; {tree.shape}; collision rate {before:.4f}, "
            f"after disambiguation {after:.4f}",
            "After each prefix: number of items, share of the parent's items (at the first level: of all items),",
            "typical words compared with the sibling prefixes, and typical titles."]


def _node_lines(tree: Tree, info: PageInfo, depth: int, node: int, out_of: int) -> list[str]:
    found, indent = tree.depths[depth], "    " * depth
    size, words = int(found.size[node]), ", ".join(found.words[node])
    head = f"{indent}{_prefix_text(tree, depth, node)}  {_plural(size, 'item')}, {size / out_of:.1%}"
    # Variants of a product often have the same title after the cut. Show it only once.
    titles = dict.fromkeys(cut(info.names[i], LINE - len(indent) - 6) for i in found.examples[node])
    return [head + (f":  {words}" if words else ""), *(f"{indent}    · {title}" for title in titles)]


def _more(tree: Tree, depth: int, hidden: np.ndarray, where: str) -> list[str]:
    if not len(hidden):
        return []
    items = int(tree.depths[depth].size[hidden].sum())
    return ["    " * depth + f"… and {len(hidden):,} more {'prefix' if len(hidden) == 1 else 'prefixes'} {where}, "
            f"{_plural(items, 'item')}"]


def _equal_codes(tree: Tree, info: PageInfo) -> list[str]:
    """Return the text lines about items with the same codes: the largest groups, with some of their items."""
    depth = len(tree.depths) - 1
    size, order = tree.depths[depth].size, tree.largest_nodes(depth)
    shared = order[size[order] > 1]
    if not len(shared):
        return ["", "No two items have the same codes."]
    lines = ["", f"Items with the same codes: {size[shared].sum():,} in {_plural(len(shared), 'group')}"]
    if tree.counter is not None:
        lines[-1] += f"; <{letter(tree.counter)}_…> only numbers the items of a group"
    for node in shared[:SHOWN[1]]:
        members = np.flatnonzero(tree.depths[depth].node == node)
        lines.append(f"    {_prefix_text(tree, depth, node)}  {_plural(len(members), 'item')}")
        lines += [f"        · {cut(info.names[i], LINE - 10)}" for i in members[:SHOWN[0]]]
        lines += [f"        … and {len(members) - SHOWN[0]:,} more"] * (len(members) > SHOWN[0])
    return lines


def _prefix_text(tree: Tree, depth: int, node: int) -> str:
    return "".join(map(token, tree.columns, tree.prefix(depth, node)))


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def cut(text: str, columns: int) -> str:
    """Put the text on one line, and cut it to at most `columns` columns. Wide characters have two columns."""
    text = UNPRINTABLE.sub(" ", text).encode("utf-8", "replace").decode().strip()
    widths = np.cumsum([1 + (unicodedata.east_asian_width(c) in "WF") for c in text[:columns + 1]])
    if not text or widths[-1] <= columns:
        return text
    return text[:int(np.searchsorted(widths, columns - 1, side="right"))].rstrip() + "…"
