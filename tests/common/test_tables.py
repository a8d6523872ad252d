from pathlib import Path

import duckdb
import pytest

from common.tables import parquet_rows, percent


@pytest.mark.parametrize(("share", "text"), [(0, "0 %"), (0.308, "31 %"), (1, "100 %")])
def test_a_share_is_a_whole_percentage(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("share", [1e-9, 0.0049, 0.9951, 1 - 1e-9])
def test_a_share_of_some_is_neither_none_nor_all(share):
    assert percent(share) not in ("0 %", "100 %")


@pytest.mark.parametrize("name", ["fold[12]", "fold*", "fold?", "[", "[!f]", "v=7", "it's", "~", "**"])
def test_a_path_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("fold1", 1), ("fold2", 2), (name, 3)):
        Path(folder).mkdir()
        duckdb.sql(f"SELECT {value} AS v").write_parquet(str(tmp_path / folder / "table.parquet"))
    assert duckdb.sql(f"FROM {parquet_rows(Path(name) / 'table.parquet')}").fetchall() == [(3,)]
