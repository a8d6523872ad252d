"""The Python examples of the README and of docs/, run as they are printed on a finished job."""

import re
import sys

import pytest

from common.artifacts import DatasetFolder, load_items
from common.cli import ROOT

from .conftest import Tree

EXAMPLES = {"README.md": "Recommender", "docs/recommenders.md": "Recommender", "docs/semantic_ids.md": "SemanticIDs"}


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_python_example_of_a_page_runs(whole_run, page):
    tree: Tree = whole_run[0]
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    code = next(block for block in blocks if EXAMPLES[page] in block).replace("tea_shop", "Baby")
    raw_ids = load_items(DatasetFolder(tree.root / "data", "Baby"))["raw_id"]
    shop_ids = sorted(set(re.findall(r"\bT\d{3}\b", code)))
    for shop_id, raw_id in zip(shop_ids, raw_ids[:len(shop_ids)], strict=True):
        code = code.replace(shop_id, raw_id)
    outcome = tree.command("python", "-c", code)
    assert outcome.code == 0, outcome.err
    assert raw_ids[0] in outcome.out or re.search(r"\d", outcome.out)


def test_the_reference_is_current(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    from make_reference import TARGET, make_reference

    assert TARGET.read_text(encoding="utf-8") == make_reference(), "run: python docs/make_reference.py"


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"),
             *(ROOT / "benchmarks").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
