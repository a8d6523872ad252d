"""Trees of small catalogues worked out by hand."""

import re

import numpy as np
import pytest

from common.artifacts import DatasetFolder, ids_sha256, save_array
from common.publishing import publish
from quantization.inspection.explain import PageInfo, build_tree, cut, describe, display_names
from quantization.inspection.keywords import words_of
from quantization.inspection.page import explain
from tests.quantization.conftest import numbers

# Two depths: two kinds of lamps under <a_0>, cables under <a_2>, all of one brand.
SHOP = [
    ([0, 0], "Acme desk lamp red"), ([0, 0], "Acme desk lamp blue"), ([0, 1], "Acme floor lamp red"),
    ([0, 1], "Acme floor lamp green"), ([2, 3], "Acme usb cable red"), ([2, 3], "Acme usb cable"),
]


def make(rows, sizes, counter=None, texts=None):
    titles = np.array([title for _, title in rows], dtype=object)
    codes = np.array([code for code, _ in rows], dtype=np.int32)
    tree = build_tree(codes, titles, titles if texts is None else np.array(texts, dtype=object), sizes, counter)
    raw_ids = np.array([f"raw{i}" for i in range(len(rows))], dtype=object)
    return tree, PageInfo("Shop", "rqvae-td", raw_ids.tolist(), display_names(titles, raw_ids), (0.5, 0.0))


def text_of(rows, sizes, counter=None):
    return describe(*make(rows, sizes, counter))


def heading(text: str) -> str:
    """Everything above the first prefix."""
    return text.partition("\n<")[0]


def told(line: str) -> set[str]:
    """The numbers of a line, without those in tokens."""
    return set(numbers(re.sub(r"<[^>]*>", "", line)))


def prefixes(text: str) -> list[tuple[str, set[str]]]:
    """The prefixes in their order, indented by depth, and the numbers next to each."""
    lines = [re.fullmatch(r"( *(?:<[a-z]+_\d+>)+)([^:]*).*", line) for line in text.splitlines()]
    return [(line[1], told(line[2])) for line in lines if line]


def others(text: str) -> list[str]:
    """The lines below the heading that show neither a prefix nor a title."""
    return [line for line in text.removeprefix(heading(text)).splitlines()
            if line.strip() and not line.lstrip().startswith(("<", "·"))]


def test_prefixes_have_their_sizes_parents_and_codes():
    tree, _ = make(SHOP, [3, 4])
    assert tree.depths[0].size.tolist() == [4, 2]
    assert tree.depths[1].size.tolist() == [2, 2, 2]
    assert tree.depths[1].parent.tolist() == [0, 0, 1]
    assert [tree.prefix(1, node) for node in range(3)] == [[0, 0], [0, 1], [2, 3]]
    assert tree.depths[1].node.tolist() == [0, 0, 1, 1, 2, 2]


def test_common_words_are_not_typical_of_a_prefix():
    tree, _ = make(SHOP, [3, 4])
    lamps, cables = map(set, tree.depths[0].words)
    assert "lamp" in lamps
    assert cables == {"usb", "cable"}
    assert not {"acme", "red"} & (lamps | cables)  # in all titles; under both codes


def test_words_of_a_second_code_differ_from_its_parents():
    tree, _ = make(SHOP, [3, 4])
    assert tree.depths[1].words[:2] == [["desk"], ["floor"]]  # "lamp" is a word of the parent


def test_an_only_child_is_compared_with_the_whole_catalogue():
    tree, _ = make(SHOP, [3, 4])
    assert set(tree.depths[1].words[2]) == {"usb", "cable"}


def test_equal_codes_have_no_typical_words():
    tree, _ = make([([0, 0], f"Acme lamp {i}") for i in range(20)], [1, 1])
    assert [depth.words for depth in tree.depths] == [[[]], [[]]]
    assert tree.depths[1].examples == [[0, 1, 2]]


def test_a_typical_word_needs_two_items_and_a_share():
    rows = [([0], f"thing{i} " + ("rare" if i < 2 else "common")) for i in range(40)]
    rows += [([1], f"other{i}") for i in range(40)]
    tree, _ = make(rows, [2])
    assert tree.depths[0].words == [["common"], []]  # "rare" is in 2 of 40, "thing3" in one item


def test_examples_have_the_most_typical_words_in_item_order():
    rows = [([0], "oil"), ([0], "green tea bag"), ([0], "tea"), ([0], "green tea bag two"), ([0], "tea bag"),
            ([1], "lamp"), ([1], "lamp oil"), ([1], "lamp"), ([1], "lamp"), ([1], "lamp")]
    tree, _ = make(rows, [2])
    assert "tea" in tree.depths[0].words[0]
    assert tree.depths[0].examples[0] == [1, 3, 4]
    assert tree.depths[0].examples[1] == [5, 6, 7]


def test_singular_and_plural_count_as_the_more_frequent_form():
    tree, _ = make([([0], "big magnets"), ([0], "magnets"), ([0], "magnet"), ([1], "glass"), ([1], "glass"),
                    ([1], "glass")], [2])
    assert tree.depths[0].words == [["magnets"], ["glass"]]


@pytest.mark.parametrize(("text", "words"), [
    ("The men's T-shirt, 1.75mm & 3D (100)", ["men", "t-shirt", "1.75mm", "3d"]),
    ("Größe ЛАМПА x", ["größe", "лампа"]),
    ("耐克运动 Nike", ["耐克", "克运", "运动", "nike"]),
    ("हिन्दी किताब", ["हिन्दी", "किताब"]),
    ("<b>\udc00-- 🔥", []),
])
def test_words_of_any_script(text, words):
    assert words_of(text) == words


def test_chinese_titles_have_typical_words():
    rows = [([0], "耐克运动鞋"), ([0], "李宁运动裤"), ([1], "苹果手机壳"), ([1], "华为手机")]
    tree, _ = make(rows, [2])
    assert tree.depths[0].words == [["运动"], ["手机"]]


def test_the_text_shows_the_heading_and_the_largest_prefixes_first():
    text = text_of(SHOP, [3, 4])
    assert "Shop" in heading(text)
    assert "rqvae-td" in heading(text)
    assert {"6", "2", "3", "4", "0.5000", "0.0000"} <= told(heading(text))
    assert prefixes(text)[:5] == [
        ("<a_0>", {"4", "66.7%"}), ("    <a_0><b_0>", {"2", "50.0%"}), ("    <a_0><b_1>", {"2", "50.0%"}),
        ("<a_2>", {"2", "33.3%"}), ("    <a_2><b_3>", {"2", "100.0%"})]


def test_the_text_is_limited_and_counts_the_rest():
    rows = [([a, b], f"title {a} {b}") for a in range(12) for b in range(5)]
    text = text_of(rows, [12, 5])
    *below, left, _ = others(text)
    assert [(re.findall("<.*?>", line), told(line)) for line in below] == [([f"<a_{a}>"], {"2"}) for a in range(10)]
    assert told(left) == {"2", "10"}
    assert "<a_10>" not in text
    assert "<b_3>" not in text


def test_the_disambiguation_level_is_not_part_of_the_tree():
    rows = [([0, 1, 0], "one"), ([0, 1, 1], "two"), ([0, 2, 0], "three")]
    tree, info = make(rows, [3, 3, 2], counter=2)
    text = describe(tree, info)
    assert len(tree.depths) == 2
    assert numbers(tree.shape) == ["2", "3"]
    assert tree.shape in heading(text)
    [group] = [line for line in others(text) if "<c_" in line]
    assert told(group) == {"2", "1"}
    *_, last, one, two = text.splitlines()
    assert prefixes(last) == [("    <a_0><b_1>", {"2"})]
    assert (one, two) == ("        · one", "        · two")
    assert "<c_0>" not in text


def test_a_long_list_of_equal_codes_is_cut():
    *_, last_title, left = text_of([([0], f"t{i}") for i in range(14)], [1]).splitlines()
    assert last_title == "        · t9"
    assert numbers(left) == ["4"]


def test_one_item_without_words_is_described():
    text = text_of([([3, 1], "!!")], [4, 4])
    assert prefixes(text)[0] == ("<a_3>", {"1", "100.0%"})
    [last] = others(text)
    assert text.endswith(last)
    assert not numbers(last)


def test_an_item_without_title_uses_raw_id_and_text():
    tree, info = make([([0], ""), ([0], None), ([1], "lamp"), ([1], "lamp")], [2],
                       texts=["garden hose", "hose", "", ""])
    assert tree.depths[0].words == [["hose"], ["lamp"]]
    assert "    · raw0\n    · raw1" in describe(tree, info)


def test_a_title_is_cut_and_loses_its_control_characters():
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abcde…"
    assert cut("运动鞋", 6) == "运动鞋"
    assert cut("运动鞋子", 6) == "运动…"
    assert cut("a\x1b[31m\n\u202eb\ud800", 99) == "a [31m b?"


def test_explain_reads_the_artifacts_and_writes_the_page(tmp_path):
    import duckdb

    folder, raw_ids = DatasetFolder(tmp_path, "Shop"), [f"raw{i}" for i in range(len(SHOP))]
    same = {"command": "make", "items_sha256": ids_sha256(raw_ids)}
    rows = [(i, raw_ids[i], title, title) for i, (_, title) in enumerate(SHOP)]

    def write(path):
        values = ", ".join(f"({i}, '{raw}', '{title}', '{text}')" for i, raw, title, text in rows)
        duckdb.sql(f"SELECT * FROM (VALUES {values}) t(item, raw_id, title, text)").write_parquet(str(path))

    publish(folder.items, write, same | {"inputs": {}, "num_items": len(SHOP)})
    save_array(folder.codes("rqvae", "td", "x"), np.array([code for code, _ in SHOP], dtype=np.int32), same | {
        "inputs": {}, "codebook_sizes": [3, 4], "disambiguation_level": None,
        "collision_rate_before": 0.5, "collision_rate_after": 0.5})
    page = tmp_path / "pages" / "page.html"
    text = explain(folder, "rqvae", "td", "x", page)
    assert "Shop" in heading(text)
    assert "rqvae-td-x" in heading(text)
    assert "6" in told(heading(text))
    assert str(page) in text.splitlines()[-1]
    assert "Acme floor lamp" in page.read_text(encoding="utf-8")
