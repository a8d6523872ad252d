"""An HTML page for browsing semantic IDs: a single file that needs no network."""

import json
import re
from itertools import chain
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_items, variant
from common.publishing import write_text
from quantization.inspection.explain import PageInfo, Tree, build_tree, describe, display_names

TEMPLATE = Path(__file__).with_name("page.html")
MAX_ITEMS = 100_000   # maximum number of items on the page, which then has about 20 MB
TITLE_LENGTH = 160    # maximum number of characters of a title
# Characters that could end the script element, line ends of JavaScript, and characters that UTF-8 cannot encode.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def explain(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, page: Path) -> str:
    """Return a text about the meaning of the codes, and write the HTML page to the file `page`."""
    codes, meta = load_codes(folder, quantizer, suffix, tag, distinct=False)
    items = load_items(folder)
    tree = build_tree(codes, items["title"], items["text"], meta["codebook_sizes"], meta["disambiguation_level"])
    info = PageInfo(folder.name, variant(quantizer, suffix, tag), items["raw_id"].tolist(),
                  display_names(items["title"], items["raw_id"]),
                  (meta["collision_rate_before"], meta["collision_rate_after"]))
    write_text(page, make_page(tree, info))
    return f"{describe(tree, info)}\n\nTo browse and search the tree, open {page} in a browser"


def make_page(tree: Tree, info: PageInfo) -> str:
    """Return the HTML text of the page: page.html with the data of the tree as JSON."""
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", embed(page_data(tree, info)))


def embed(data: dict) -> str:
    """Convert data to JSON text that is safe inside an HTML script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # The unsafe characters occur only in JSON strings, where every character may be escaped.
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def page_data(tree: Tree, info: PageInfo) -> dict:
    """Return the data for the script in page.html: the items, and the prefixes with typical words and examples.

    codes: a flat list: all codes of the first item, then all codes of the second item, ...
    nodes: a prefix such as "12.3" -> [number of items, words, examples]. Items that are not on the page count too.
        Words are indices into `vocabulary`. Examples are indices of items on the page.
    """
    kept = kept_items(tree)
    index_of = {item: i for i, item in enumerate(kept.tolist())}
    vocabulary: dict[str, int] = {}
    nodes = {}
    for depth, found in enumerate(tree.depths):
        for node in np.flatnonzero(found.size > 1).tolist():
            if depth < 2 or found.words[node]:
                words = [vocabulary.setdefault(word, len(vocabulary)) for word in found.words[node]]
                examples = [index_of[item] for item in found.examples[node] if item in index_of]
                nodes[".".join(map(str, tree.prefix(depth, node)))] = [int(found.size[node]), words, examples]
    return {
        "dataset": info.dataset, "quantizer": info.quantizer, "collisions": list(info.collisions),
        "shape": tree.shape, "sizes": tree.sizes, "counter": tree.counter, "num_items": len(tree.codes),
        "titles": [shorten(info.names[i]) for i in kept], "ids": [info.raw_ids[i] for i in kept],
        "codes": list(chain.from_iterable(tree.codes[kept].tolist())),
        "vocabulary": list(vocabulary), "nodes": nodes}


def kept_items(tree: Tree) -> np.ndarray:
    """Return the items that the page shows, in item order: all items, but at most `MAX_ITEMS`.

    If there are more items, the function selects the examples of each first code first, and then items of the most
    frequent first codes.
    """
    num_items, first = len(tree.codes), tree.depths[0]
    if num_items <= MAX_ITEMS:
        return np.arange(num_items)
    is_example = np.zeros(num_items, dtype=bool)
    is_example[list(chain.from_iterable(first.examples))] = True
    order = np.lexsort((first.node, -first.size[first.node], ~is_example))  # stable: ties keep the item order
    return np.sort(order[:MAX_ITEMS])


def shorten(title: str) -> str:
    return title if len(title) <= TITLE_LENGTH else title[:TITLE_LENGTH - 1] + "…"
