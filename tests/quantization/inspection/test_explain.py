"""Trees of small catalogues by hand."""

import numpy as np
import pytest

from common.artifacts import DatasetFolder, ids_sha256, save_array
from common.publishing import publish
from quantization.inspection.explain import About, build_tree, cut, describe, display_names
from quantization.inspection.keywords import words_of
from quantization.inspection.page import explain

# Two depths: lamps 0 and 1 under <a_0>, all of one brand with the cables under <a_2>.
SHOP = [
    ([0, 0], "Acme desk lamp red"), ([0, 0], "Acme desk lamp blue"), ([0, 1], "Acme floor lamp red"),
    ([0, 1], "Acme floor lamp green"), ([2, 3], "Acme usb cable red"), ([2, 3], "Acme usb cable"),
]


def make(rows, sizes, counter=None, texts=None):
    titles = np.array([title for _, title in rows], dtype=object)
    codes = np.array([code for code, _ in rows], dtype=np.int32)
    tree = build_tree(codes, titles, titles if texts is None else np.array(texts, dtype=object), sizes, counter)
    raw_ids = np.array([f"raw{i}" for i in range(len(rows))], dtype=object)
    return tree, About("Shop", "rqvae-td", raw_ids.tolist(), display_names(titles, raw_ids), (0.5, 0.0))


def text_of(rows, sizes, counter=None):
    return describe(*make(rows, sizes, counter))


def test_prefixes_have_their_sizes_parents_and_codes():
    tree, _ = make(SHOP, [3, 4])
    assert tree.depths[0].size.tolist() == [4, 2]
    assert tree.depths[1].size.tolist() == [2, 2, 2]
    assert tree.depths[1].parent.tolist() == [0, 0, 1]
    assert [tree.prefix(1, node) for node in range(3)] == [[0, 0], [0, 1], [2, 3]]
    assert tree.depths[1].node.tolist() == [0, 0, 1, 1, 2, 2]


def test_typical_words_set_a_prefix_apart_and_the_common_brand_does_not():
    tree, _ = make(SHOP, [3, 4])
    lamps, cables = map(set, tree.depths[0].words)
    assert "lamp" in lamps
    assert cables == {"usb", "cable"}
    assert not {"acme", "red"} & (lamps | cables)  # everywhere; on both sides


def test_words_of_a_second_code_differ_from_its_parents():
    tree, _ = make(SHOP, [3, 4])
    assert tree.depths[1].words[:2] == [["desk"], ["floor"]]  # "lamp" is said one level up


def test_an_only_child_is_told_from_the_rest_of_the_catalogue():
    tree, _ = make(SHOP, [3, 4])
    assert set(tree.depths[1].words[2]) == {"usb", "cable"}


def test_where_all_codes_are_equal_no_word_sets_anything_apart():
    tree, _ = make([([0, 0], f"Acme lamp {i}") for i in range(20)], [1, 1])
    assert [depth.words for depth in tree.depths] == [[[]], [[]]]
    assert tree.depths[1].examples == [[0, 1, 2]]


def test_a_word_needs_two_items_and_a_share_of_the_prefix():
    rows = [([0], f"thing{i} " + ("rare" if i < 2 else "common")) for i in range(40)]
    rows += [([1], f"other{i}") for i in range(40)]
    tree, _ = make(rows, [2])
    assert tree.depths[0].words == [["common"], []]  # "rare" is in 2 of 40, "thing3" in one item


def test_examples_are_the_titles_with_most_typical_words_in_item_order():
    rows = [([0], "oil"), ([0], "green tea bag"), ([0], "tea"), ([0], "green tea bag two"), ([0], "tea bag"),
            ([1], "lamp"), ([1], "lamp oil"), ([1], "lamp"), ([1], "lamp"), ([1], "lamp")]
    tree, _ = make(rows, [2])
    assert "tea" in tree.depths[0].words[0]
    assert tree.depths[0].examples[0] == [1, 3, 4]
    assert tree.depths[0].examples[1] == [5, 6, 7]


def test_plurals_count_with_their_singular_in_the_form_that_is_used_most():
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
    lines = text_of(SHOP, [3, 4]).splitlines()
    assert lines[0] == "What the semantic IDs of Shop mean (rqvae-td)"
    assert lines[1] == "6 items; 2 levels of 3, 4 codes; collision rate 0.5000, after disambiguation 0.0000"
    heads = [line.split(":")[0].rstrip() for line in lines if line.lstrip().startswith("<")][:5]
    assert heads == ["<a_0>  4 items, 66.7%", "    <a_0><b_0>  2 items, 50.0%", "    <a_0><b_1>  2 items, 50.0%",
                     "<a_2>  2 items, 33.3%", "    <a_2><b_3>  2 items, 100.0%"]


def test_the_text_is_limited_and_says_what_is_left():
    rows = [([a, b], f"title {a} {b}") for a in range(12) for b in range(5)]
    text = text_of(rows, [12, 5])
    assert "… and 2 more prefixes of one code, 10 items" in text
    assert "    … and 2 more prefixes below <a_9>, 2 items" in text
    assert "<a_10>" not in text
    assert "<b_3>" not in text


def test_the_disambiguation_level_is_no_level_and_equal_codes_are_a_list():
    rows = [([0, 1, 0], "one"), ([0, 1, 1], "two"), ([0, 2, 0], "three")]
    tree, about = make(rows, [3, 3, 2], counter=2)
    text = describe(tree, about)
    assert len(tree.depths) == 2
    assert "2 levels × 3 codes;" in text
    assert "Items of equal codes: 2 in 1 group; <c_…> only counts them, it has no meaning" in text
    assert text.splitlines()[-3:] == ["    <a_0><b_1>  2 items", "        · one", "        · two"]
    assert "<c_0>" not in text


def test_a_long_list_of_equal_codes_is_cut():
    assert text_of([([0], f"t{i}") for i in range(14)], [1]).endswith("        … and 4 more")


def test_one_item_and_no_words_at_all():
    text = text_of([([3, 1], "!!")], [4, 4])
    assert "<a_3>  1 item, 100.0%" in text
    assert text.endswith("No two items have equal codes.")


def test_an_item_without_title_shows_its_raw_id_and_speaks_by_its_text():
    tree, about = make([([0], ""), ([0], None), ([1], "lamp"), ([1], "lamp")], [2],
                       texts=["garden hose", "hose", "", ""])
    assert tree.depths[0].words == [["hose"], ["lamp"]]
    assert "    · raw0\n    · raw1" in describe(tree, about)


def test_a_title_is_cut_to_its_columns_and_cannot_drive_the_terminal():
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
    text = explain(folder, "rqvae", "td", "x", tmp_path / "pages" / "page.html")
    assert text.startswith("What the semantic IDs of Shop mean (rqvae-td-x)\n6 items;")
    assert text.endswith(f"open {tmp_path}/pages/page.html in a browser")
    assert "Acme floor lamp" in (tmp_path / "pages" / "page.html").read_text(encoding="utf-8")
