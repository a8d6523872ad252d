"""docs/your_own_files.md: the conversions and commands of all layouts, run on small files."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from common.artifacts import DatasetFolder, load_image_urls, load_interactions, load_items, load_users
from common.cli import ROOT
from tests import layouts
from tests.end_to_end.conftest import Tree, copy_program
from tests.layouts import EVENTS, FIRST, NUM_DAYS, NUM_ITEMS, NUM_USERS, TITLES

PAGE = ROOT / "docs" / "your_own_files.md"
BLOCKS = re.compile(r"^(?:```python\n(?P<python>(?:(?!^```).)*?)^```\n\n)?```bash\n(?P<bash>.*?)^```",
                    re.DOTALL | re.MULTILINE)
MAX_LINES = 5


class Layout(NamedTuple):
    write: Callable[[Path], None]  # writes the files of the layout
    titles: list[str] = TITLES
    days: bool = False             # the times are only days
    images: bool = False           # the items have image URLs


LAYOUTS = {
    "Baby": Layout(layouts.amazon_2014),
    "baby_2023": Layout(layouts.amazon_parquet, images=True),
    "baby_5core": Layout(layouts.amazon_ratings, [f"B{item}" for item in range(NUM_ITEMS)]),
    "movies": Layout(layouts.movielens),
    "yelp": Layout(layouts.yelp),
    "steam": Layout(layouts.steam, days=True),
    "poetry": Layout(layouts.goodreads, images=True),
    "retailrocket": Layout(layouts.retailrocket, [f"category {item + 2}" for item in range(NUM_ITEMS)]),
    "hm": Layout(layouts.hm, days=True),
    "kuairec": Layout(layouts.kuairec),
    "yoochoose": Layout(layouts.yoochoose, [f"{214_536_000 + item}" for item in range(NUM_ITEMS)]),
    "mind": Layout(layouts.mind),
    "lastfm": Layout(layouts.lastfm),
    "rees46": Layout(layouts.rees46),
    "shop": Layout(layouts.recbole),
}


def examples() -> dict[str, tuple[str, str]]:
    """Return dataset -> (conversion, command) for every command of the page."""
    found = {}
    for match in BLOCKS.finditer(PAGE.read_text(encoding="utf-8")):
        found[re.search(r"--dataset (\S+)", match["bash"])[1]] = (match["python"] or "", match["bash"])
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    return copy_program(tmp_path_factory.mktemp("layouts") / "program")


def test_every_command_of_the_page_has_a_layout():
    assert examples().keys() == LAYOUTS.keys()


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_conversion_has_at_most_five_lines(dataset):
    lines = [line for line in examples()[dataset][0].splitlines() if line and line != "import duckdb"]
    assert len(lines) <= MAX_LINES


@pytest.mark.slow
@pytest.mark.parametrize("dataset", LAYOUTS)
def test_the_command_of_a_layout_makes_the_right_tables(tree, dataset):
    layout, (conversion, command) = LAYOUTS[dataset], examples()[dataset]
    raw = tree.root / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir()
    layout.write(raw)
    if conversion:
        assert tree.command("python", "-c", conversion).code == 0
    outcome = tree.command("bash", "-c", command)
    assert outcome.code == 0, outcome.err
    folder = DatasetFolder(tree.root / "data", dataset)
    assert len(load_users(folder)["raw_id"]) == NUM_USERS
    items, events = load_items(folder), load_interactions(folder)
    assert len(events.item) == NUM_USERS * NUM_DAYS
    assert sorted(items["title"]) == sorted(layout.titles)
    assert sorted(times(events.timestamp, layout.days)) == sorted(times([time for _, _, time in EVENTS], layout.days))
    # The first user of the file uses the items 0, 1, 2, ...
    first = [items["title"][item] for item in events.item[events.user == 0]]
    assert first == layout.titles[:NUM_DAYS]
    assert events.timestamp.min() == FIRST
    assert all(url is not None for url in load_image_urls(folder)) == layout.images


def times(seconds, days: bool) -> list[int]:
    return [int(second) // (86_400 if days else 1) for second in seconds]
