"""A family of datasets is one file in sources/ and its YAML; no other file changes. The family is that of the docs."""

import shutil
import sys

import pytest

import dataloader.sources
from common.artifacts import load_meta
from common.cli import ROOT
from common.errors import DataError
from dataloader import flags
from dataloader.download import raw_files
from dataloader.process import process
from tests.dataloader.helpers import make_options, table
from tests.docs import FAMILY, FAMILY_CONFIG
from tests.errors import refused

SHOP = ROOT / "examples" / "shop"
MODULE = "dataloader.sources.tea"


@pytest.fixture
def add_family(tmp_path, monkeypatch):
    """A function that adds the family `tea` of docs/extending.md, by default with the YAML of the page."""
    def add(config: str = FAMILY_CONFIG) -> None:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "tea.py").write_text(FAMILY)
        shutil.copytree(flags.CONFIGS, tmp_path / "configs")
        (tmp_path / "configs" / "tea.yaml").write_text(config)
        monkeypatch.setattr(flags, "CONFIGS", tmp_path / "configs")
        monkeypatch.setattr(dataloader.sources, "__path__", [str(tmp_path / "sources"), *dataloader.sources.__path__])
        flags.source_configs.cache_clear()

    own = sys.modules.pop(MODULE, None)  # the checkout may have this family as well
    yield add
    monkeypatch.undo()
    flags.source_configs.cache_clear()
    sys.modules.pop(MODULE, None)
    if own is not None:
        sys.modules[MODULE] = own


def test_a_new_family_is_found_by_its_files_and_read(tmp_path, add_family):
    add_family()
    options = make_options(tmp_path / "data", "--dataset", "tea_2025", "--raw_dir", str(SHOP)).process
    process(options, "")
    meta = load_meta(options.folder.interactions, "")
    assert meta["settings"]["source"] == "tea"
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (120, 48, 1081)
    assert (meta["num_without_text"], meta["num_without_record"], meta["num_bad_lines"]) == (0, 0, 0)
    title = "Assam, loose leaf, 100 g"
    details = "Assam: black tea, malty, strong, good with milk. Sold as loose leaf, 100 g."
    assert ("T001", title, f"{title}. {details}") in table(options.folder.items, 'raw_id, title, "text"')


def test_a_missing_file_of_the_family_is_named(tmp_path, add_family):
    add_family()
    (tmp_path / "raw").mkdir()
    shutil.copy(SHOP / "orders.csv", tmp_path / "raw")
    options = make_options(tmp_path / "data", "--dataset", "tea_2025", "--raw_dir", str(tmp_path / "raw")).process
    with refused(DataError, tmp_path / "raw" / "catalogue.csv", fix=["--raw_dir"]):
        process(options, "")


def test_a_dataset_of_a_new_family_is_downloaded_by_name(tmp_path, add_family):
    add_family()
    options = make_options(tmp_path / "data", "--dataset", "tea_2025").process
    assert options.downloads
    assert [(file.target, file.addresses) for file in raw_files(options)] == [
        (tmp_path / "data/tea_2025/raw/tea" / name, [f"https://example.org/tea_2025/{name}"])
        for name in ("orders.csv", "catalogue.csv")]


@pytest.mark.parametrize(("order", "source"), [(5, "tea"), (60, "amazon14")])
def test_the_search_follows_the_order_in_the_yaml(tmp_path, add_family, order, source):
    config = FAMILY_CONFIG.replace("order: 60", f"order: {order}").replace("[tea_2025]", "[Baby]")
    add_family(config)
    assert make_options(tmp_path / "data", "--dataset", "Baby").process.source == source
    assert make_options(tmp_path / "data", "--dataset", "Baby", "--source", "tea").process.source == "tea"
