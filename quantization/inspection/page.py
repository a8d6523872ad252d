"""The HTML page of semantic IDs: one file that opens from disk and asks no network for anything."""

import json
import re
from itertools import chain
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_items, variant
from common.publishing import write_text
from quantization.inspection.explain import PageInfo, Tree, build_tree, describe, display_names

TEMPLATE = Path(__file__).with_name("page.html")
MAX_ITEMS = 100_000   # a browser reads some 20 MB with ease
TITLE_LENGTH = 160
# What could end the script element, is a line end to JavaScript, or has no UTF-8 of its own.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def explain(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, page: Path) -> str:
    """The text that shows what the codes mean; the same, to click through, is written to `page`."""
    codes, meta = load_codes(folder, quantizer, suffix, tag, distinct=False)
    items = load_items(folder)
    tree = build_tree(codes, items["title"], items["text"], meta["codebook_sizes"], meta["disambiguation_level"])
    info = PageInfo(folder.name, variant(quantizer, suffix, tag), items["raw_id"].tolist(),
                  display_names(items["title"], items["raw_id"]),
                  (meta["collision_rate_before"], meta["collision_rate_after"]))
    write_text(page, make_page(tree, info))
    return f"{describe(tree, info)}\n\nTo click through it and to search, open {page} in a browser"


def make_page(tree: Tree, info: PageInfo) -> str:
    """The page: `page.html` with the data of a tree in its JSON element."""
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", embed(page_data(tree, info)))


def embed(data: dict) -> str:
    """JSON that is safe inside a script element; `json.loads` gives the data back."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Outside its strings JSON has none of these characters, and inside a string any may be written as an escape.
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def page_data(tree: Tree, info: PageInfo) -> dict:
    """All that the page shows: the items, and per described prefix what cannot be counted from them.

    `codes` is flat, one row of all levels after the other. `nodes` maps `"12.3"`, a prefix, to its
    size in the whole catalogue, its words (indices into `vocabulary`) and its examples (indices of items).
    """
    kept = kept_items(tree)
    at = {item: i for i, item in enumerate(kept.tolist())}
    vocabulary: dict[str, int] = {}
    nodes = {}
    for depth, found in enumerate(tree.depths):
        for node in np.flatnonzero(found.size > 1).tolist():
            if depth < 2 or found.words[node]:
                words = [vocabulary.setdefault(word, len(vocabulary)) for word in found.words[node]]
                examples = [at[item] for item in found.examples[node] if item in at]
                nodes[".".join(map(str, tree.prefix(depth, node)))] = [int(found.size[node]), words, examples]
    return {
        "dataset": info.dataset, "quantizer": info.quantizer, "collisions": list(info.collisions),
        "shape": tree.shape, "sizes": tree.sizes, "counter": tree.counter, "num_items": len(tree.codes),
        "titles": [shorten(info.names[i]) for i in kept], "ids": [info.raw_ids[i] for i in kept],
        "codes": list(chain.from_iterable(tree.codes[kept].tolist())),
        "vocabulary": list(vocabulary), "nodes": nodes}


def kept_items(tree: Tree) -> np.ndarray:
    """The items that the page holds, in order: all, or `MAX_ITEMS`.

    Of more, it holds the examples of each first code and then the items of the largest first codes.
    """
    num_items, first = len(tree.codes), tree.depths[0]
    if num_items <= MAX_ITEMS:
        return np.arange(num_items)
    is_example = np.zeros(num_items, dtype=bool)
    is_example[list(chain.from_iterable(first.examples))] = True
    order = np.lexsort((first.node, -first.size[first.node], ~is_example))  # stable: items in their order
    return np.sort(order[:MAX_ITEMS])


def shorten(title: str) -> str:
    return title if len(title) <= TITLE_LENGTH else title[:TITLE_LENGTH - 1] + "…"
