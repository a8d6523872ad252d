"""A family of datasets is one file in sources/ and its YAML; no other file changes."""

import shutil

import pytest

import dataloader.sources
from common.artifacts import load_meta
from dataloader import flags
from dataloader.process import process
from tests.dataloader.helpers import make_options, table

READER = '''
from dataloader.readers.raw import RawTable


def raw_paths(options):
    return [options.raw / "log.clicks"]


def raw_tables(options, paths, work):
    return [RawTable(paths[0], "json", {"user": ["u"], "item": ["i"], "time": ["t"]})]
'''
CONFIG = '''
reader: clicks
order: {order}
found_by: {{"log.clicks": any}}
found_names: .*
datasets: [Baby]
files: {{}}
wheels: {{}}
items: {{columns: {{item: item, title: title}}}}
time_unit: s
templates: {{td: ["{{title}}"]}}
min_user_interactions: 0
min_item_interactions: 0
rating_range: [0, 5]
expected: {{}}
'''


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A function that adds the family `clicks` with this `order`."""
    def add(order: int) -> None:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "clicks.py").write_text(READER)
        shutil.copytree(flags.CONFIGS, tmp_path / "configs")
        (tmp_path / "configs" / "clicks.yaml").write_text(CONFIG.format(order=order))
        monkeypatch.setattr(flags, "CONFIGS", tmp_path / "configs")
        monkeypatch.setattr(dataloader.sources, "__path__", [*dataloader.sources.__path__, str(tmp_path / "sources")])
        flags.source_configs.cache_clear()

    yield add
    monkeypatch.undo()
    flags.source_configs.cache_clear()


def test_a_new_family_is_found_by_its_files_and_read(tmp_path, family):
    family(order=60)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.clicks").write_text("".join(
        f'{{"u": "{user}", "i": "{item}", "t": {time}}}\n' for user in "ab" for time, item in enumerate("xyz")))
    found = make_options(tmp_path / "data", "--dataset", "Shop", "--raw_dir", str(tmp_path / "raw")).process
    process(found, "")
    assert load_meta(found.folder.interactions, "")["settings"]["source"] == "clicks"
    assert table(found.folder.items, "raw_id") == [("x",), ("y",), ("z",)]


@pytest.mark.parametrize(("order", "source"), [(5, "clicks"), (60, "amazon14")])
def test_the_search_follows_the_order_in_the_yaml(tmp_path, family, order, source):
    family(order)
    assert make_options(tmp_path / "data", "--dataset", "Baby").process.source == source
    assert make_options(tmp_path / "data", "--dataset", "Baby", "--source", "clicks").process.source == "clicks"
