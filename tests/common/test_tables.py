import os
from pathlib import Path

import duckdb
import pytest

from common.errors import ConfigError
from common.tables import parquet_rows, percent, utf8_path
from tests.errors import refused


@pytest.mark.parametrize(("share", "text"), [(0, "0 %"), (0.308, "31 %"), (1, "100 %")])
def test_a_share_is_a_whole_percentage(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("share", [1e-9, 0.0049, 0.9951, 1 - 1e-9])
def test_a_share_of_some_is_neither_none_nor_all(share):
    assert percent(share) not in ("0 %", "100 %")


def test_a_path_of_an_ascii_locale_is_the_same_file(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "Tee ☃")))
    assert utf8_path(Path(str(folder).encode("utf-8").decode("ascii", "surrogateescape"))) == str(folder)
    with refused(ConfigError, tmp_path / "d\udcff", fix=["rename"]):
        utf8_path(tmp_path / "d\udcff")


@pytest.mark.parametrize("name", ["fold[12]", "fold*", "fold?", "[", "[!f]", "v=7", "it's", "~", "**"])
def test_a_path_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("fold1", 1), ("fold2", 2), (name, 3)):
        Path(folder).mkdir()
        duckdb.sql(f"SELECT {value} AS v").write_parquet(str(tmp_path / folder / "table.parquet"))
    assert duckdb.sql(f"FROM {parquet_rows(Path(name) / 'table.parquet')}").fetchall() == [(3,)]
