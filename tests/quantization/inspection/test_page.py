"""The page as a string: its data, and no way for the data to act as markup."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from quantization.inspection import page
from quantization.inspection.explain import PageInfo, build_tree, display_names
from quantization.inspection.page import TEMPLATE, make_page, page_data

HOSTILE = ["</script><img src=x onerror=alert(1)>", "<!-- <script>", "a\u2028b\u2029c", "\"quotes\" 'and' \\ `${x}`",
           "lone \ud800 and \udfff", "a & b \x00\x1b", "__DATA__", "运动鞋 größe 🔥", "  spaces  "]


def make(codes, titles, counter=None, sizes=None):
    codes, titles = np.array(codes, dtype=np.int32), np.array(titles, dtype=object)
    raw_ids = np.array([f"raw{i}" for i in range(len(titles))], dtype=object)
    tree = build_tree(codes, titles, titles, sizes or (codes.max(axis=0) + 1).tolist(), counter)
    return tree, PageInfo("Shop", "rqvae-td", raw_ids.tolist(), display_names(titles, raw_ids), (0.25, 0.0))


def embedded(html: str) -> dict:
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def script() -> str:
    return TEMPLATE.read_text(encoding="utf-8").split("<script>")[1].split("</script>")[0]


def test_hostile_titles_come_back_exactly_and_add_no_markup():
    html = make_page(*make([[i, 0] for i in range(len(HOSTILE))], HOSTILE))
    assert embedded(html)["titles"] == HOSTILE
    template = TEMPLATE.read_text(encoding="utf-8")
    for markup in ("<img", "<!--", "</script", "<script", "\u2028", "\u2029"):
        assert html.count(markup) == template.count(markup), markup
    html.encode("utf-8")


def test_the_page_loads_nothing_from_outside():
    html = make_page(*make([[0], [1]], ["lamp", "cable"]))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert f'content="{policy}"' in html
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(|XMLHttpRequest|import\(", html)


def test_the_script_never_reads_text_as_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script())


def test_items_are_flat_codes_titles_and_raw_ids():
    tree, info = make([[0, 1, 0], [0, 1, 1], [2, 0, 0]], ["red lamp", "blue lamp", ""], counter=2, sizes=[3, 4, 2])
    data = page_data(tree, info)
    assert data["codes"] == [0, 1, 0, 0, 1, 1, 2, 0, 0]
    assert data["titles"] == ["red lamp", "blue lamp", "raw2"]
    assert data["ids"] == ["raw0", "raw1", "raw2"]
    assert (data["sizes"], data["counter"], data["num_items"]) == ([3, 4, 2], 2, 3)
    assert data["collisions"] == [0.25, 0.0]


def test_a_node_has_its_size_words_and_examples():
    data = page_data(*make([[0, 1, 0], [0, 1, 1], [2, 0, 0], [2, 1, 0]], ["lamp", "lamp", "cable", "hose"], counter=2))
    assert set(data["nodes"]) == {"0", "0.1", "2"}
    size, words, examples = data["nodes"]["0"]
    assert (size, [data["vocabulary"][word] for word in words], examples) == (2, ["lamp"], [0, 1])


def test_titles_are_cut():
    titles = page_data(*make([[0], [1]], ["x" * 160, "x" * 161]))["titles"]
    assert titles == ["x" * 160, "x" * 159 + "…"]


@pytest.mark.parametrize(("codes", "titles"), [
    ([[0]], ["one"]), ([[3, 3]] * 4, ["same"] * 4), ([[0], [0]], ["", None]), ([[0, 0], [0, 1]], ["运动鞋", "运动裤"])])
def test_small_catalogues_make_a_page(codes, titles):
    tree, info = make(codes, titles)
    assert embedded(make_page(tree, info))["titles"] == info.names


def test_a_large_catalogue_keeps_examples_of_every_first_code(monkeypatch):
    monkeypatch.setattr(page, "MAX_ITEMS", 6)
    codes = [[0]] * 2 + [[1]] * 6 + [[2]]
    tree, info = make(codes, [f"title {i}" for i in range(9)])
    data = page_data(tree, info)
    # The examples fill the page: 0 and 1 of the first code, 2 to 4 of the second, 8 of the third.
    assert data["ids"] == ["raw0", "raw1", "raw2", "raw3", "raw4", "raw8"]
    assert data["num_items"] == 9
    assert data["nodes"]["1"][0] == 6  # of the whole catalogue
    monkeypatch.setattr(page, "MAX_ITEMS", 7)  # room for one more item, of the largest code
    assert page_data(tree, info)["ids"] == ["raw0", "raw1", "raw2", "raw3", "raw4", "raw5", "raw8"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_valid_javascript(tmp_path):
    (tmp_path / "page.js").write_text(script(), encoding="utf-8")
    done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
